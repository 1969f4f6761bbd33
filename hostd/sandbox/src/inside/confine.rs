//! Giving up: the two seccomp filters, landlock, capabilities.
//!
//! The first filter is an allow-list and is installed while parking, because installing it costs half a
//! millisecond. It still lets through the few mount calls that a claim needs; the second, tiny one
//! takes those away. What is not allowed answers `ENOSYS`, so that a C library falls back as it would
//! on an older kernel. Left out: 32-bit and x32 programs (killed, or every call refused).

use std::collections::BTreeMap;

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::error::Fault;
use crate::sys;
use crate::syscalls::{ALLOWED, FOR_THE_CLAIM};

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Both filters, compiled once by the spawner.
pub(crate) struct Filters {
    first: BpfProgram,
    second: BpfProgram,
}

/// Clone flags that make a namespace, `CLONE_NEWTIME` aside (which is no clone flag but a signal bit).
const NAMESPACES: u64 = 0x7e02_0000;

fn condition(
    index: u8,
    length: SeccompCmpArgLen,
    op: SeccompCmpOp,
    value: u64,
) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(index, length, op, value)
}

fn special_rules(rules: &mut Rules) -> Result<(), seccompiler::BackendError> {
    use SeccompCmpArgLen::{Dword, Qword};
    use SeccompCmpOp::{Eq, MaskedEq, Ne};
    let no_namespace = condition(0, Qword, MaskedEq(NAMESPACES), 0)?;
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![no_namespace])?]);
    // Neither typing into a terminal for its reader nor pasting on a console.
    let terminal =
        vec![condition(1, Dword, Ne, libc::TIOCSTI)?, condition(1, Dword, Ne, libc::TIOCLINUX)?];
    rules.insert(libc::SYS_ioctl, vec![SeccompRule::new(terminal)?]);
    let mut personality = Vec::new();
    for value in [0, 0x0008, 0x0002_0000, 0x0002_0008, 0x0004_0000, 0xffff_ffff] {
        personality.push(SeccompRule::new(vec![condition(0, Dword, Eq, value)?])?);
    }
    rules.insert(libc::SYS_personality, personality);
    // No vsock (it is not in any namespace and ends at the hypervisor), no packet, no AF_ALG.
    let mut families = Vec::new();
    for family in [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6] {
        let family = u64::from(family.unsigned_abs());
        families.push(SeccompRule::new(vec![condition(0, Dword, Eq, family)?])?);
    }
    let netlink = u64::from(libc::AF_NETLINK.unsigned_abs());
    families.push(SeccompRule::new(vec![
        condition(0, Dword, Eq, netlink)?,
        condition(2, Dword, Eq, 0)?,
    ])?);
    rules.insert(libc::SYS_socket, families);
    Ok(())
}

impl Filters {
    /// Compiles both.
    pub(crate) fn compile() -> Result<Self, String> {
        let arch =
            TargetArch::try_from(std::env::consts::ARCH).map_err(|e| format!("seccomp: {e}"))?;
        let text = |e: seccompiler::BackendError| format!("seccomp: {e}");
        let mut rules: Rules =
            ALLOWED.iter().chain(FOR_THE_CLAIM).map(|n| (*n, Vec::new())).collect();
        special_rules(&mut rules).map_err(text)?;
        let refuse = |errno: i32| SeccompAction::Errno(errno.unsigned_abs());
        let first = SeccompFilter::new(rules, refuse(libc::ENOSYS), SeccompAction::Allow, arch);
        let first = first.and_then(BpfProgram::try_from).map_err(text)?;
        let rules: Rules = FOR_THE_CLAIM.iter().map(|n| (*n, Vec::new())).collect();
        let second = SeccompFilter::new(rules, SeccompAction::Allow, refuse(libc::EPERM), arch);
        let second = second.and_then(BpfProgram::try_from).map_err(text)?;
        Ok(Self { first, second })
    }

    /// Installs the allow-list (and `no_new_privs`) on this process.
    pub(super) fn install_first(&self) -> Result<(), Fault> {
        apply(&self.first)
    }
}

fn apply(filter: &BpfProgram) -> Result<(), Fault> {
    seccompiler::apply_filter(filter)
        .map_err(|_| Fault::os("seccomp", &std::io::Error::last_os_error()))
}

/// Everything that is left to give up once the root stands.
pub(super) fn confine(filters: &Filters) -> Result<(), Fault> {
    fence().map_err(|why| Fault::BoxDied { what: format!("landlock: {why}") })?;
    sys::drop_capabilities().map_err(|e| Fault::os("capabilities", &e))?;
    apply(&filters.second)
}

/// Landlock: only what lies beneath this root; so a descriptor or magic link to anything else (the
/// runner's binary, a host directory) opens nothing. Signals and abstract sockets stay inside too.
fn fence() -> Result<(), landlock::RulesetError> {
    let abi = ABI::V6;
    let devices: BitFlags<AccessFs> = AccessFs::MakeBlock | AccessFs::MakeChar;
    let beneath = AccessFs::from_all(abi) & !devices;
    let root = PathFd::new("/").map_err(|_| {
        landlock::RulesetError::CreateRuleset(landlock::CreateRulesetError::MissingHandledAccess)
    })?;
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .add_rule(PathBeneath::new(root, beneath))?;
    ruleset.restrict_self().map(drop)
}
