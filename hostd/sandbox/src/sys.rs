//! The system calls that rustix lacks, each behind one safe function.
//!
//! Left out: whatever rustix or std already gives. No policy here.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::thread::CpuSet;

/// `CLOCK_MONOTONIC`, nanoseconds.
pub(crate) fn now_ns() -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` lives across the call, which fills it; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut t) };
    u64::try_from(t.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(t.tv_nsec).unwrap_or(0)
}

pub(crate) fn check(rc: libc::c_long) -> io::Result<libc::c_long> {
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(rc) }
}

/// A string for the kernel.
pub(crate) fn c_string(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Keeps every capability over changes of user id from here on.
pub(crate) fn keep_capabilities_over_ids() -> io::Result<()> {
    const SECBIT_NO_SETUID_FIXUP: u64 = 1 << 2;
    prctl(libc::PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP)
}

/// Sets the effective user id of this (single-threaded) process.
pub(crate) fn set_effective_uid(uid: u32) -> io::Result<()> {
    // SAFETY: takes no pointer. The raw call acts on the calling thread, which is the only one.
    check(unsafe { libc::syscall(libc::SYS_setresuid, u32::MAX, uid, u32::MAX) }).map(drop)
}

/// `unshare`.
pub(crate) fn unshare(flags: i32) -> io::Result<()> {
    // SAFETY: takes no pointer; the callers here have one thread, so no other is surprised.
    check(libc::c_long::from(unsafe { libc::unshare(flags) })).map(drop)
}

#[repr(C)]
#[derive(Default)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

pub(crate) const ATTR_RDONLY: u64 = 0x1;
pub(crate) const ATTR_NOSUID: u64 = 0x2;
pub(crate) const ATTR_NODEV: u64 = 0x4;
pub(crate) const ATTR_NOEXEC: u64 = 0x8;
const ATTR_IDMAP: u64 = 0x0010_0000;

fn mount_setattr(mount: BorrowedFd<'_>, attr: &MountAttr) -> io::Result<()> {
    // SAFETY: the path is a constant C string and `attr` lives across the call with its true size.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            std::ptr::from_ref(attr),
            size_of::<MountAttr>(),
        )
    })
    .map(drop)
}

/// Sets attributes of a mount.
pub(crate) fn mount_restrict(mount: BorrowedFd<'_>, attr_set: u64) -> io::Result<()> {
    mount_setattr(mount, &MountAttr { attr_set, ..MountAttr::default() })
}

/// Shows a detached mount through a user namespace's id map.
pub(crate) fn mount_idmap(mount: BorrowedFd<'_>, userns: BorrowedFd<'_>) -> io::Result<()> {
    let userns_fd = u64::from(userns.as_raw_fd().unsigned_abs());
    mount_setattr(mount, &MountAttr { attr_set: ATTR_IDMAP, userns_fd, ..MountAttr::default() })
}

/// Clones the mount beneath a descriptor into a detached one.
pub(crate) fn clone_tree(fd: BorrowedFd<'_>, path: &str, recursive: bool) -> io::Result<OwnedFd> {
    use rustix::mount::{OpenTreeFlags as F, open_tree};
    let mut flags = F::OPEN_TREE_CLONE | F::OPEN_TREE_CLOEXEC;
    if path.is_empty() {
        flags |= F::AT_EMPTY_PATH;
    }
    if recursive {
        flags |= F::AT_RECURSIVE;
    }
    Ok(open_tree(fd, path, flags)?)
}

/// Attaches a detached mount (or moves an attached one) to a directory's descriptor.
pub(crate) fn attach(mount: BorrowedFd<'_>, to: BorrowedFd<'_>, path: &str) -> io::Result<()> {
    use rustix::mount::{MoveMountFlags as F, move_mount};
    let mut flags = F::MOVE_MOUNT_F_EMPTY_PATH;
    if path.is_empty() {
        flags |= F::MOVE_MOUNT_T_EMPTY_PATH;
    }
    Ok(move_mount(mount, "", to, path, flags)?)
}

/// A new mount of a file system, detached, with string options. An empty value is a flag.
pub(crate) fn new_mount(kind: &str, options: &[(&str, &str)], attr: u64) -> io::Result<OwnedFd> {
    use rustix::mount as m;
    let fs = m::fsopen(kind, m::FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        if value.is_empty() {
            m::fsconfig_set_flag(fs.as_fd(), *key)?;
        } else {
            m::fsconfig_set_string(fs.as_fd(), *key, *value)?;
        }
    }
    m::fsconfig_create(fs.as_fd())?;
    let flags = m::MountAttrFlags::from_bits_retain(u32::try_from(attr).unwrap_or(0));
    Ok(m::fsmount(fs.as_fd(), m::FsMountFlags::FSMOUNT_CLOEXEC, flags)?)
}

/// `prctl` with one argument.
pub(crate) fn prctl(option: i32, argument: u64) -> io::Result<()> {
    // SAFETY: used only with options whose argument is a number or, for PR_SET_NAME, a constant
    // C string that lives for ever.
    check(libc::c_long::from(unsafe { libc::prctl(option, argument, 0, 0, 0) })).map(drop)
}

/// Sets the process's short name.
pub(crate) fn set_name(name: &'static CStr) -> io::Result<()> {
    prctl(libc::PR_SET_NAME, name.as_ptr() as u64)
}

/// Closes every descriptor from `first` up.
pub(crate) fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: takes no pointer. Callers own nothing above `first` that they use afterwards.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) }).map(drop)
}

/// Sets a pair of limits.
pub(crate) fn set_rlimit(which: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
    // SAFETY: `limit` lives across the call.
    check(libc::c_long::from(unsafe { libc::setrlimit(which, &raw const limit) })).map(drop)
}

/// The soft and hard limit on open files.
pub(crate) fn open_files_limit() -> (u64, u64) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` lives across the call, which fills it.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    (limit.rlim_cur, limit.rlim_max)
}

/// Sets real, effective and saved ids of this (single-threaded) process.
pub(crate) fn set_ids(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    // SAFETY: `groups` lives across the call with its true length; the rest takes no pointer. Raw calls
    // act on the calling thread, which is the only one.
    unsafe {
        check(libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()))?;
        check(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
        check(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
    }
    Ok(())
}

#[repr(C)]
#[derive(Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

fn schedule(pid: i32, nice: i32, slice_ns: u64) -> io::Result<()> {
    let size = u32::try_from(size_of::<SchedAttr>()).unwrap_or(0);
    let attr = SchedAttr { size, nice, runtime: slice_ns, ..SchedAttr::default() };
    // SAFETY: `attr` lives across the call and says its own size.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, pid, &raw const attr, 0) }).map(drop)
}

/// Schedules this process (and what it forks) as the launch path wants it: ahead of others, in slices
/// so short that what just woke need not wait for the end of a long one.
pub(crate) fn schedule_for_launch() -> io::Result<()> {
    schedule(0, -20, 100_000)
}

/// Gives up the priority of the launch path and keeps its short slices, which anybody may have.
pub(crate) fn schedule_for_first_instruction() -> io::Result<()> {
    schedule(0, 0, 100_000)
}

/// Time that a program runs before others of its priority get their turn. The kernel's own slice of about 3 ms is what a program
/// that just begins beside busy neighbours would wait for, once or more; changing turns every half millisecond costs below 1 %.
const SLICE_NS: u64 = 500_000;

/// Schedules a process (0: this one) like any other program of a box.
pub(crate) fn schedule_normally(pid: i32) -> io::Result<()> {
    schedule(pid, 0, SLICE_NS)
}

/// The cores that this process may run on.
pub(crate) fn cores() -> io::Result<CpuSet> {
    Ok(rustix::thread::sched_getaffinity(None)?)
}

/// The core that this process runs on, alone.
pub(crate) fn this_core() -> CpuSet {
    let mut cores = CpuSet::new();
    cores.set(rustix::thread::sched_getcpu());
    cores
}

/// Lets a process (`None`: this one) run on these cores only.
pub(crate) fn keep_on(pid: Option<i32>, cores: &CpuSet) -> io::Result<()> {
    let bad = || io::Error::from_raw_os_error(libc::ESRCH);
    let pid = pid.map(|pid| rustix::process::Pid::from_raw(pid).ok_or_else(bad)).transpose()?;
    Ok(rustix::thread::sched_setaffinity(pid, cores)?)
}

/// Capability numbers that a program in a box may keep, as a bit mask: what a package manager and a
/// small server need, all of it bounded by the box's own user namespace.
pub(crate) const KEPT_CAPABILITIES: u64 = 1 << 0 // CHOWN
    | 1 << 1 // DAC_OVERRIDE
    | 1 << 3 // FOWNER
    | 1 << 4 // FSETID
    | 1 << 5 // KILL
    | 1 << 6 // SETGID
    | 1 << 7 // SETUID
    | 1 << 10 // NET_BIND_SERVICE
    | 1 << 18 // SYS_CHROOT
    | 1 << 31; // SETFCAP

/// Removes all but [`KEPT_CAPABILITIES`] from what any later `execve` may gain.
pub(crate) fn drop_bounding_set() -> io::Result<()> {
    for capability in 0..64_u64 {
        if KEPT_CAPABILITIES & (1 << capability) != 0 {
            continue;
        }
        match prctl(libc::PR_CAPBSET_DROP, capability) {
            Ok(()) => {}
            // Past the last that this kernel knows.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => break,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// `CAP_SYS_NICE`: kept by a box's init, outside the bounding set and so beyond its programs.
const SYS_NICE: u64 = 1 << 23;

/// Reduces init's own capabilities to [`KEPT_CAPABILITIES`] and the one to end a launch's priority.
pub(crate) fn drop_capabilities() -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Sets {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let kept = KEPT_CAPABILITIES | SYS_NICE;
    let word = |n: u32| u32::try_from((kept >> n) & 0xffff_ffff).unwrap_or(0);
    let header = Header { version: 0x2008_0522, pid: 0 };
    let sets = [0, 32].map(|n| Sets { effective: word(n), permitted: word(n), inheritable: 0 });
    // SAFETY: version 3 of the call reads one header and two sets; both live across it.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) }).map(drop)
}

/// Brings the loopback interface of this network namespace up.
pub(crate) fn loopback_up() -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: `ifreq` is plain data for which zero bytes are valid; the name is shorter than its field
    // and the request lives across the call.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = libc::c_char::from_ne_bytes([b'l']);
        request.ifr_name[1] = libc::c_char::from_ne_bytes([b'o']);
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap_or(1);
        let rc = libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request);
        check(libc::c_long::from(rc)).map(drop)
    }
}

/// A request about a network interface.
fn interface_request(name: &[u8]) -> libc::ifreq {
    // SAFETY: `ifreq` is plain data for which zero bytes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte less than the field, so that a zero byte ends it.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    request
}

fn interface_ioctl(fd: &OwnedFd, which: libc::c_ulong, request: &libc::ifreq) -> io::Result<()> {
    // SAFETY: every `which` of this file takes an `ifreq`, which lives across the call; the kernel may write to its
    // own part of the union, which nobody reads after.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), which, std::ptr::from_ref(request)) };
    check(libc::c_long::from(rc)).map(drop)
}

/// Makes an open `/dev/net/tun` a network device of this name, without a header before packets.
pub(crate) fn tun_attach(tun: &OwnedFd, name: &[u8]) -> io::Result<()> {
    let mut request = interface_request(name);
    let flags = libc::IFF_TUN | libc::IFF_NO_PI;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or(0);
    interface_ioctl(tun, libc::TUNSETIFF, &request)
}

fn internet_address(ip: [u8; 4]) -> libc::sockaddr {
    let mut bytes = [0; 14];
    bytes[2..6].copy_from_slice(&ip);
    let family = libc::sa_family_t::try_from(libc::AF_INET).unwrap_or(2);
    // A `sockaddr_in` as bytes: port, address, padding.
    libc::sockaddr { sa_family: family, sa_data: bytes.map(|b| libc::c_char::from_ne_bytes([b])) }
}

/// Gives an interface its address and brings it up.
pub(crate) fn set_link(
    socket: &OwnedFd,
    name: &[u8],
    address: [u8; 4],
    prefix_bits: u8,
    mtu: u32,
) -> io::Result<()> {
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix_bits.min(32))).unwrap_or(0);
    let mut request = interface_request(name);
    request.ifr_ifru.ifru_addr = internet_address(address);
    interface_ioctl(socket, libc::SIOCSIFADDR, &request)?;
    request.ifr_ifru.ifru_netmask = internet_address(mask.to_be_bytes());
    interface_ioctl(socket, libc::SIOCSIFNETMASK, &request)?;
    request.ifr_ifru.ifru_mtu = i32::try_from(mtu).unwrap_or(i32::MAX);
    interface_ioctl(socket, libc::SIOCSIFMTU, &request)?;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap_or(1);
    interface_ioctl(socket, libc::SIOCSIFFLAGS, &request)
}

/// Routes everything over a gateway.
pub(crate) fn add_default_route(socket: &OwnedFd, gateway: [u8; 4]) -> io::Result<()> {
    // SAFETY: `rtentry` is plain data for which zero bytes are valid: any destination, no device.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = internet_address([0; 4]);
    route.rt_genmask = internet_address([0; 4]);
    route.rt_gateway = internet_address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: the request takes an `rtentry`, which lives across the call.
    let rc = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &raw const route) };
    check(libc::c_long::from(rc)).map(drop)
}

/// Leaves the caller's session keyring for an empty one.
pub(crate) fn new_session_keyring() -> io::Result<()> {
    // SAFETY: a null name asks for an anonymous keyring.
    check(unsafe { libc::syscall(libc::SYS_keyctl, 1, 0) }).map(drop)
}

/// Blocks a signal and returns a descriptor that is readable when one is pending.
pub(crate) fn signal_fd(signal: i32) -> io::Result<OwnedFd> {
    // SAFETY: the set is a local that sigemptyset initialises; the descriptor is new and ours alone.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        check(libc::c_long::from(fd))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Gives this process, and all that it forks, the default disposition of every signal but SIGPIPE,
/// which stays ignored: a log that nobody reads any more must not end the spawner.
pub(crate) fn default_signals() {
    // SAFETY: both dispositions are valid for each. Failures (KILL, STOP, numbers that do not exist)
    // change nothing.
    unsafe {
        for signal in 1..=64 {
            let pipe = signal == libc::SIGPIPE;
            libc::signal(signal, if pipe { libc::SIG_IGN } else { libc::SIG_DFL });
        }
    }
}

/// The rest of it, for a program about to start.
pub(crate) fn default_pipe_signal() {
    // SAFETY: a valid disposition.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Unblocks every signal.
pub(crate) fn unblock_signals() {
    // SAFETY: the set is a local that sigemptyset initialises.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
}

/// Makes a terminal this session's own.
pub(crate) fn take_terminal(slave: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: takes a number, no pointer.
    check(libc::c_long::from(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) }))
        .map(drop)
}

/// Strings for `execve`, with the array of pointers that it takes: made before a fork, so that the
/// child allocates nothing.
pub(crate) struct Strings {
    pointers: Vec<*const libc::c_char>,
    _owned: Vec<CString>,
}

impl Strings {
    /// Fails on a string with a zero byte.
    pub(crate) fn new<S: AsRef<str>>(list: &[S]) -> io::Result<Self> {
        let owned = list.iter().map(|s| c_string(s.as_ref())).collect::<io::Result<Vec<_>>>()?;
        let pointers = owned.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect();
        Ok(Self { pointers, _owned: owned })
    }
}

/// `execve`; returns only the error.
pub(crate) fn execve(path: &CStr, argv: &Strings, env: &Strings) -> io::Error {
    // SAFETY: both arrays end in a null pointer and point at C strings that their owners keep alive
    // and in place (a CString's bytes do not move with it).
    unsafe { libc::execve(path.as_ptr(), argv.pointers.as_ptr(), env.pointers.as_ptr()) };
    io::Error::last_os_error()
}

/// Whether the working directory is beneath the root: otherwise the kernel says "(unreachable)".
pub(crate) fn is_beneath_root() -> bool {
    let mut path = [0_u8; libc::PATH_MAX as usize];
    // SAFETY: `path` lives across the call with its true length. The raw call, because a C library turns
    // the kernel's word into an error of its own.
    let length = unsafe { libc::syscall(libc::SYS_getcwd, path.as_mut_ptr(), path.len()) };
    length > 0 && path[0] == b'/'
}

/// Ends this process at once, with no destructor or exit handler of the parent's run.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: takes no pointer and does not return.
    unsafe { libc::_exit(code) }
}

/// Puts `fd` at exactly `number`, close-on-exec or not.
pub(crate) fn move_fd(fd: BorrowedFd<'_>, number: i32, cloexec: bool) -> io::Result<()> {
    if fd.as_raw_fd() == number {
        let flags = if cloexec { libc::FD_CLOEXEC } else { 0 };
        // SAFETY: takes no pointer.
        let rc = unsafe { libc::fcntl(number, libc::F_SETFD, flags) };
        return check(libc::c_long::from(rc)).map(drop);
    }
    let flags = if cloexec { libc::O_CLOEXEC } else { 0 };
    // SAFETY: takes no pointer. Callers hold no owner for the descriptor that `number` was.
    let rc = unsafe { libc::dup3(fd.as_raw_fd(), number, flags) };
    check(libc::c_long::from(rc)).map(drop)
}

/// Duplicates a descriptor to a number of at least `least`, close-on-exec.
pub(crate) fn dup_above(fd: BorrowedFd<'_>, least: i32) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, least)?)
}
