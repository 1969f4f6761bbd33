//! Seccomp programs as balanced trees over system call numbers.
//!
//! When a filter is installed, the kernel runs it once for every system call there is, to learn which
//! are always allowed. A chain of 300 comparisons (what filter compilers emit) makes that more than a
//! millisecond of every box; a tree of depth eight, some thirty microseconds. Left out: big-endian
//! machines, and conditions beyond those that [`Check`] names.

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, sock_filter};

const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const AT_LEAST: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const ANY_BIT: u16 = 0x45; // BPF_JMP | BPF_JSET | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K
const ALLOW: u32 = 0x7fff_0000;
const KILL: u32 = 0x8000_0000;
const ERRNO: u32 = 0x0005_0000;

/// What happens to a system call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is made.
    Allow,
    /// It fails with this error number.
    Refuse(u16),
    /// By an argument.
    Check(Check),
}

/// A condition on the low 32 bits of one argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Check {
    /// Which argument, from 0.
    pub(crate) argument: u8,
    /// How it is compared.
    pub(crate) test: Test,
    /// If the test holds.
    pub(crate) then: Box<Verdict>,
    /// If not.
    pub(crate) otherwise: Box<Verdict>,
}

/// A comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Test {
    /// Equal to one of these.
    OneOf(Vec<u32>),
    /// Has at least one of these bits.
    AnyBit(u32),
}

fn op(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

/// A comparison that skips `jt` or `jf` instructions.
fn branch(code: u16, k: u32, jt: usize, jf: usize) -> Result<sock_filter, String> {
    let narrow = |n: usize| u8::try_from(n).map_err(|_| "seccomp: a jump is too long".to_owned());
    Ok(sock_filter { code, jt: narrow(jt)?, jf: narrow(jf)?, k })
}

fn emit_verdict(verdict: &Verdict) -> Result<Vec<sock_filter>, String> {
    let check = match verdict {
        Verdict::Allow => return Ok(vec![op(RETURN, ALLOW)]),
        Verdict::Refuse(errno) => return Ok(vec![op(RETURN, ERRNO | u32::from(*errno))]),
        Verdict::Check(check) => check,
    };
    let then = emit_verdict(&check.then)?;
    let otherwise = emit_verdict(&check.otherwise)?;
    let mut program = vec![op(LOAD, 16 + 8 * u32::from(check.argument))];
    match &check.test {
        // Tests, then `otherwise`, then `then`.
        Test::OneOf(values) => {
            for (at, value) in values.iter().enumerate() {
                let rest = values.len() - at - 1;
                program.push(branch(EQUAL, *value, rest + otherwise.len(), 0)?);
            }
        }
        Test::AnyBit(bits) => program.push(branch(ANY_BIT, *bits, otherwise.len(), 0)?),
    }
    program.extend(otherwise);
    program.extend(then);
    Ok(program)
}

/// The tree over `segments`: (first number, verdict), sorted, the first at 0.
fn emit_tree(segments: &[(u32, &Verdict)]) -> Result<Vec<sock_filter>, String> {
    match segments {
        [] => Err("seccomp: no segments".into()),
        [(_, verdict)] => emit_verdict(verdict),
        _ => {
            let (low, high) = segments.split_at(segments.len() / 2);
            let (left, right) = (emit_tree(low)?, emit_tree(high)?);
            let middle = high[0].0;
            let mut program = Vec::with_capacity(left.len() + right.len() + 2);
            if left.len() <= usize::from(u8::MAX) {
                program.push(branch(AT_LEAST, middle, left.len(), 0)?);
            } else {
                program.push(branch(AT_LEAST, middle, 0, 1)?);
                let far = u32::try_from(left.len()).map_err(|e| e.to_string())?;
                program.push(op(JUMP, far));
            }
            program.extend(left);
            program.extend(right);
            Ok(program)
        }
    }
}

/// A program that gives `rules` their verdicts and everything else `default`. A system call by another
/// architecture's table kills the process.
pub(crate) fn compile(
    rules: &BTreeMap<u32, Verdict>,
    default: &Verdict,
) -> Result<BpfProgram, String> {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => 0xc000_003e,
        "aarch64" => 0xc000_00b7,
        other => return Err(format!("seccomp: no filter for {other}")),
    };
    let mut segments: Vec<(u32, &Verdict)> = Vec::new();
    let mut push = |first: u32, verdict| match segments.last() {
        Some((_, last)) if *last == verdict => {}
        _ => segments.push((first, verdict)),
    };
    let mut next = 0;
    for (number, verdict) in rules {
        if *number > next || next == 0 && *number > 0 {
            push(next, default);
        }
        push(*number, verdict);
        next = number + 1;
    }
    push(next, default);
    let mut program =
        vec![op(LOAD, 4), branch(EQUAL, architecture, 1, 0)?, op(RETURN, KILL), op(LOAD, 0)];
    program.extend(emit_tree(&segments)?);
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would; also returns the steps.
    fn run(program: &[sock_filter], number: u32, args: [u64; 6]) -> (u32, usize) {
        let architecture = program[1].k;
        let (mut at, mut a) = (0, 0);
        for steps in 1.. {
            let i = &program[at];
            at += 1;
            match i.code {
                LOAD => {
                    a = match i.k {
                        0 => number,
                        4 => architecture,
                        k => (args[((k - 16) / 8) as usize] & 0xffff_ffff) as u32,
                    }
                }
                JUMP => at += i.k as usize,
                RETURN => return (i.k, steps),
                code => {
                    let holds = match code {
                        EQUAL => a == i.k,
                        AT_LEAST => a >= i.k,
                        ANY_BIT => a & i.k != 0,
                        other => panic!("unknown code {other:#x}"),
                    };
                    at += usize::from(if holds { i.jt } else { i.jf });
                }
            }
        }
        unreachable!()
    }

    #[test]
    fn every_number_gets_its_verdict_in_few_steps() {
        let mut rules = BTreeMap::new();
        for n in (0..500).filter(|n| n % 3 == 0 || n % 7 == 0) {
            rules.insert(n, Verdict::Allow);
        }
        let program = compile(&rules, &Verdict::Refuse(38)).unwrap();
        for n in (0..1000).chain([0x4000_0000, 0x4000_0027, u32::MAX]) {
            let (verdict, steps) = run(&program, n, [0; 6]);
            let wanted = if rules.contains_key(&n) { ALLOW } else { ERRNO | 38 };
            assert_eq!(verdict, wanted, "{n}");
            assert!(steps < 16, "{steps} steps for {n}");
        }
        // Another architecture is killed.
        let mut other = program.clone();
        other[1].k ^= 1;
        assert_eq!(run(&program[..], 0, [0; 6]).0, ALLOW);
        other[1].jf = 0;
        assert_eq!(other[2].k, KILL);
    }

    #[test]
    fn checks_look_at_arguments() {
        let deny = || Box::new(Verdict::Refuse(1));
        let allow = || Box::new(Verdict::Allow);
        let inner =
            Check { argument: 2, test: Test::OneOf(vec![0]), then: allow(), otherwise: deny() };
        let family = Check {
            argument: 0,
            test: Test::OneOf(vec![1, 2, 10]),
            then: allow(),
            otherwise: Box::new(Verdict::Check(Check {
                argument: 0,
                test: Test::OneOf(vec![16]),
                then: Box::new(Verdict::Check(inner)),
                otherwise: deny(),
            })),
        };
        let bits =
            Check { argument: 1, test: Test::AnyBit(0xf0), then: deny(), otherwise: allow() };
        let rules = BTreeMap::from([(41, Verdict::Check(family)), (56, Verdict::Check(bits))]);
        let program = compile(&rules, &Verdict::Refuse(38)).unwrap();
        let go = |number, args| run(&program, number, args).0;
        for family in [1, 2, 10] {
            assert_eq!(go(41, [family, 0, 9, 0, 0, 0]), ALLOW);
        }
        assert_eq!(go(41, [16, 3, 0, 0, 0, 0]), ALLOW);
        assert_eq!(go(41, [16, 3, 9, 0, 0, 0]), ERRNO | 1);
        assert_eq!(go(41, [40, 1, 0, 0, 0, 0]), ERRNO | 1);
        assert_eq!(go(56, [0, 0x0f, 0, 0, 0, 0]), ALLOW);
        assert_eq!(go(56, [0, 0x1f, 0, 0, 0, 0]), ERRNO | 1);
        assert_eq!(go(55, [0; 6]), ERRNO | 38);
    }
}
