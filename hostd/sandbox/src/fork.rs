//! Making processes: `clone3` with namespaces, plain `fork`, and a `vfork` that takes a closure.
//!
//! Each is unsafe for the same reason: a child goes on with one thread of its parent's. Left out: threads.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::sys::{check, exit_now};

#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// The two sides of [`clone_process`].
pub(crate) enum Cloned {
    /// In the new process.
    Child,
    /// In the caller.
    Parent {
        /// The child, as the caller's namespace numbers it.
        pid: u32,
        /// Readable once it has exited.
        pidfd: OwnedFd,
    },
}

/// Forks with namespace flags, optionally into a v2 cgroup.
///
/// # Safety
/// The calling process must have one thread: the child goes on with a copy of this one alone, and a
/// lock that another thread held would stay locked in it for ever.
pub(crate) unsafe fn clone_process(
    flags: u64,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<Cloned> {
    const CLONE_PIDFD: u64 = 0x1000;
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut pidfd: libc::c_int = -1;
    let mut args = CloneArgs {
        flags: flags | CLONE_PIDFD,
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
        ..CloneArgs::default()
    };
    if let Some(fd) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(fd.as_raw_fd().unsigned_abs());
    }
    // SAFETY: `args` lives across the call and asks for no shared memory and no new stack, so that the
    // child runs on its own copy of this stack; the caller vouches for the single thread.
    let rc =
        check(unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) })?;
    if rc == 0 {
        return Ok(Cloned::Child);
    }
    // SAFETY: the kernel stored a descriptor that belongs to this process alone.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Cloned::Parent { pid: u32::try_from(rc).unwrap_or(0), pidfd })
}

/// Plain fork.
///
/// # Safety
/// As [`clone_process`]: one thread.
pub(crate) unsafe fn fork() -> io::Result<Option<i32>> {
    // SAFETY: the caller vouches that this process has one thread.
    let pid = unsafe { libc::fork() };
    match pid {
        0 => Ok(None),
        n if n > 0 => Ok(Some(n)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A stack for the child of [`vfork`].
pub(crate) struct Stack(Box<[std::mem::MaybeUninit<u128>]>);

impl Stack {
    const BYTES: usize = 64 * 1024;
    /// What the child uses of it, and more.
    const TOUCHED: usize = 8 * 1024;

    /// Makes one of which the part that will be used is memory already: page faults cost a launch more than most of
    /// its system calls.
    pub(crate) fn new() -> Self {
        let mut stack = Box::new_uninit_slice(Self::BYTES / size_of::<u128>());
        let top = stack.len() - Self::TOUCHED / size_of::<u128>();
        for word in &mut stack[top..] {
            word.write(0);
        }
        Self(stack)
    }
}

/// Runs `body` in a child that shares this process's memory while the parent stands still, until the
/// child executes a program or exits: `vfork`, which copies no page table.
///
/// `body` must not return to anybody: it ends in `execve` or [`exit_now`].
///
/// # Safety
/// One thread, and `body` must leave the parent's memory as usable as it found it: what it allocates it
/// frees or leaks, what it borrows it does not change, and it closes no descriptor by dropping an
/// owner that the parent owns too (descriptors themselves are copies).
pub(crate) unsafe fn vfork<F: FnOnce()>(stack: &mut Stack, body: F) -> io::Result<i32> {
    extern "C" fn enter<F: FnOnce()>(body: *mut libc::c_void) -> libc::c_int {
        // SAFETY: the pointer is that of the parent's `body`, which nobody else takes: the parent stands
        // still until this child is gone, and then only frees the memory that held it.
        let body = unsafe { body.cast::<std::mem::ManuallyDrop<F>>().as_mut() };
        if let Some(body) = body {
            // SAFETY: taken once, here.
            let body = unsafe { std::mem::ManuallyDrop::take(body) };
            body();
        }
        exit_now(127)
    }
    let mut body = std::mem::ManuallyDrop::new(body);
    // SAFETY: the end of `stack`, 16-aligned as u128 is; the child uses it alone while the
    // parent stands still in this call, which `CLONE_VFORK` makes sure of.
    let pid = unsafe {
        libc::clone(
            enter::<F>,
            stack.0.as_mut_ptr().add(stack.0.len()).cast(),
            libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD,
            (&raw mut body).cast(),
        )
    };
    check(libc::c_long::from(pid)).map(|_| pid)
}
