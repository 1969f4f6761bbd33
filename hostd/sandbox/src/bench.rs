//! What a benchmark of boxes needs: a program that tells when its first instruction ran, and the bare
//! cost of what the kernel must do for any box.
//!
//! `benches/launch.rs` here and the `bench` crate use it. Left out: statistics and reports.

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use crate::fork::{self, Cloned};
use crate::sys;

/// A static program of some 180 bytes: reads `CLOCK_MONOTONIC`, writes it to stdout as two native
/// 64-bit words (seconds, nanoseconds), exits 0. `None` where we have none for this machine.
#[must_use]
pub fn tiny_program() -> Option<Vec<u8>> {
    const CODE: &[u8] = &[
        0x48, 0x83, 0xec, 0x10, // sub rsp, 16
        0xb8, 0xe4, 0, 0, 0, // mov eax, clock_gettime
        0xbf, 1, 0, 0, 0, // mov edi, CLOCK_MONOTONIC
        0x48, 0x89, 0xe6, 0x0f, 0x05, // mov rsi, rsp; syscall
        0xb8, 1, 0, 0, 0, // mov eax, write
        0xbf, 1, 0, 0, 0, // mov edi, 1
        0x48, 0x89, 0xe6, // mov rsi, rsp
        0xba, 16, 0, 0, 0, 0x0f, 0x05, // mov edx, 16; syscall
        0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05, // exit(0)
    ];
    program_of(CODE)
}

/// A static program that sleeps for ever: what an idle sandbox costs beside its program. `None` where we have none
/// for this machine.
#[must_use]
pub fn idle_program() -> Option<Vec<u8>> {
    program_of(&[
        0xb8, 34, 0, 0, 0, 0x0f, 0x05, // mov eax, pause; syscall
        0xeb, 0xf7, // again
    ])
}

/// An executable of one segment.
fn program_of(code: &[u8]) -> Option<Vec<u8>> {
    if std::env::consts::ARCH != "x86_64" {
        return None;
    }
    let length = 64 + 56 + code.len() as u64;
    let base = 0x40_0000_u64;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    elf.extend([2, 0, 0x3e, 0, 1, 0, 0, 0]); // executable, x86-64
    for word in [base + 120, 64, 0] {
        elf.extend(word.to_le_bytes()); // entry, program header, no sections
    }
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]); // load, read and execute
    for word in [0, base, base, length, length, 0x1000] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    Some(elf)
}

/// Reads what [`tiny_program`] wrote: nanoseconds of `CLOCK_MONOTONIC`.
///
/// # Errors
/// `UnexpectedEof` where it wrote nothing.
pub fn read_first_instruction(stdout: OwnedFd) -> io::Result<u64> {
    let mut words = [0_u8; 16];
    std::fs::File::from(stdout).read_exact(&mut words)?;
    let word = |at: usize| {
        let mut bytes = [0_u8; 8];
        bytes.copy_from_slice(&words[at..at + 8]);
        u64::from_ne_bytes(bytes)
    };
    Ok(word(0) * 1_000_000_000 + word(8))
}

/// `CLOCK_MONOTONIC` now, nanoseconds.
#[must_use]
pub fn now_ns() -> u64 {
    sys::now_ns()
}

/// One bare life: clone into the seven namespaces of a box, execute, wait. No limits, no root, no
/// filter: the floor under every box.
///
/// # Errors
/// What `clone3` gives.
pub fn bare_life(program: &Path) -> io::Result<()> {
    let path = sys::c_string(&program.to_string_lossy())?;
    let argv = sys::Strings::new(&[program.to_string_lossy()])?;
    let env = sys::Strings::new::<&str>(&[])?;
    let flags = libc::CLONE_NEWUSER
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    let null = std::fs::OpenOptions::new().write(true).open("/dev/null")?;
    use std::os::fd::AsFd;
    // SAFETY: the child makes three system calls on memory that was ready before the clone, and touches
    // no lock; so other threads of this process do not matter.
    match unsafe { fork::clone_process(u64::from(flags.unsigned_abs()), None) }? {
        Cloned::Child => {
            let _ = sys::move_fd(null.as_fd(), 1, false);
            let _ = sys::execve(&path, &argv, &env);
            sys::exit_now(127)
        }
        Cloned::Parent { pidfd, .. } => {
            use rustix::process::{WaitId, WaitIdOptions, waitid};
            waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)?;
            Ok(())
        }
    }
}
