//! The hostile program: run as root inside a real sandbox, it tries every door and says of each
//! whether it was closed. It knows nothing of the box but what a program can find out.
//! Longer than 500 lines: a list of doors, each a few lines.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr as UnixAddr, UnixStream};
use std::path::Path;
use std::time::Duration;

/// What the host tells the program about itself, to be looked for.
pub(crate) struct Host {
    /// A TCP port that the host listens on, on its loopback.
    pub(crate) port: u16,
    /// A process of the host.
    pub(crate) pid: i32,
    /// A System V shared memory key of the host.
    pub(crate) shm_key: i32,
    /// An abstract unix socket that the host listens on.
    pub(crate) abstract_name: String,
    /// A part of host paths that must not show.
    pub(crate) secret_path: String,
}

impl Host {
    pub(crate) fn to_args(&self) -> Vec<String> {
        vec![
            self.port.to_string(),
            self.pid.to_string(),
            self.shm_key.to_string(),
            self.abstract_name.clone(),
            self.secret_path.clone(),
        ]
    }

    pub(crate) fn from_args(args: &[String]) -> Self {
        Self {
            port: args[0].parse().unwrap(),
            pid: args[1].parse().unwrap(),
            shm_key: args[2].parse().unwrap(),
            abstract_name: args[3].clone(),
            secret_path: args[4].clone(),
        }
    }
}

/// Takes as much as it gets of what is counted by user or for the machine, says how much, and holds it.
pub(crate) fn hoard() {
    let (mut watches, mut terminals) = (0, 0);
    // SAFETY: takes no pointer; the descriptors are meant to stay open.
    while watches < 5000 && unsafe { libc::inotify_init1(0) } >= 0 {
        watches += 1;
    }
    // SAFETY: a constant C string.
    while terminals < 900 && unsafe { libc::open(c"/dev/ptmx".as_ptr(), libc::O_RDWR) } >= 0 {
        terminals += 1;
    }
    println!("{watches} inotify instances, {terminals} terminals");
    let _ = io::Read::read(&mut io::stdin(), &mut [0]);
}

fn door(name: &str, closed: bool, detail: impl std::fmt::Debug) {
    let word = if closed { "closed" } else { "OPEN" };
    println!("{word} {name}: {detail:?}");
}

/// Closed if the call failed.
fn refused<T: std::fmt::Debug>(name: &str, result: io::Result<T>) {
    door(name, result.is_err(), &result);
}

fn call(number: i64, args: [usize; 6]) -> io::Result<i64> {
    // SAFETY: the attack passes null or valid local pointers; whatever the kernel does with the rest is
    // what is being tested.
    let rc = unsafe { libc::syscall(number, args[0], args[1], args[2], args[3], args[4], args[5]) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(rc) }
}

/// Tries everything.
pub(crate) fn attack(host: &Host) {
    // First, before it opens any itself.
    descriptors();
    runner();
    proc_files(host);
    mounts();
    calls();
    processes(host);
    devices();
    sockets(host);
    network_settings();
    rights();
    chroot_escape();
    #[cfg(target_arch = "x86_64")]
    other_abis();
    println!("done");
}

/// I1: the runner's binary, memory and files through process 1.
fn runner() {
    for name in ["exe", "root", "cwd", "mem", "environ", "maps", "fd/3", "fd/4", "ns/mnt"] {
        refused(&format!("read /proc/1/{name}"), File::open(format!("/proc/1/{name}")));
    }
    let open = OpenOptions::new().write(true).open("/proc/1/exe");
    refused("write /proc/1/exe", open);
    refused("list /proc/1/fd", fs::read_dir("/proc/1/fd").map(Iterator::count));
    refused("list /proc/1/map_files", fs::read_dir("/proc/1/map_files").map(Iterator::count));
    refused("ptrace 1", call(libc::SYS_ptrace, [16, 1, 0, 0, 0, 0]));
    let mut byte = [0_u8; 1];
    let local = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let remote = libc::iovec { iov_base: 0x40_0000 as *mut libc::c_void, iov_len: 1 };
    let args = [1, &raw const local as usize, 1, &raw const remote as usize, 1, 0];
    refused("process_vm_readv 1", call(libc::SYS_process_vm_readv, args));
    let pidfd = call(libc::SYS_pidfd_open, [1, 0, 0, 0, 0, 0]).unwrap_or(-1);
    let args = [usize::try_from(pidfd).unwrap_or(99), 3, 0, 0, 0, 0];
    refused("pidfd_getfd 1", call(libc::SYS_pidfd_getfd, args));
}

/// I2: leaked descriptors and directories.
fn descriptors() {
    let mut open: Vec<i32> = (0..4096)
        // SAFETY: takes no pointer.
        .filter(|fd| unsafe { libc::fcntl(*fd, libc::F_GETFD) } >= 0)
        .collect();
    open.retain(|fd| *fd > 2);
    door("descriptors beyond 2", open.is_empty(), &open);
    let here = std::env::current_dir();
    door("working directory", here.as_ref().is_ok_and(|d| d.is_absolute()), &here);
    let (up, root) = (fs::metadata("/../../..").unwrap(), fs::metadata("/").unwrap());
    door("above the root", (up.dev(), up.ino()) == (root.dev(), root.ino()), up.ino());
}

/// I4: what `/proc` and `/sys` give away or let change.
fn proc_files(host: &Host) {
    for name in ["kcore", "kallsyms", "keys", "timer_list", "kmsg", "kpagecount", "vmallocinfo"] {
        let bytes = File::open(format!("/proc/{name}")).and_then(|mut f| {
            let mut some = [0; 16];
            io::Read::read(&mut f, &mut some)
        });
        door(&format!("read /proc/{name}"), !matches!(bytes, Ok(n) if n > 0), bytes);
    }
    for name in [
        "sys/kernel/core_pattern",
        "sys/kernel/hostname",
        "sys/kernel/modprobe",
        "sys/kernel/shmmax",
        "sys/vm/drop_caches",
        "sys/fs/binfmt_misc/register",
        "sys/net/ipv4/ip_forward",
        "sysrq-trigger",
        "irq/0/smp_affinity",
        "self/uid_map",
        "self/projid_map",
    ] {
        let wrote = OpenOptions::new()
            .write(true)
            .open(format!("/proc/{name}"))
            .and_then(|mut f| f.write_all(b"1"));
        refused(&format!("write /proc/{name}"), wrote);
    }
    let lower = OpenOptions::new()
        .write(true)
        .open("/proc/self/oom_score_adj")
        .and_then(|mut f| f.write_all(b"-900"));
    refused("lower oom_score_adj", lower);
    let names = |path: &str| -> Vec<_> {
        fs::read_dir(path).into_iter().flatten().flatten().map(|e| e.file_name()).collect()
    };
    door("/sys", names("/sys") == ["fs"] && names("/sys/fs") == ["cgroup"], names("/sys"));
    for name in ["memory/memory.limit_in_bytes", "cpu/cpu.cfs_quota_us", "memory/cgroup.procs"] {
        let open = OpenOptions::new().write(true).open(format!("/sys/fs/cgroup/{name}"));
        refused(&format!("write cgroup {name}"), open);
    }
    refused("make a cgroup", fs::create_dir("/sys/fs/cgroup/memory/x"));
    let agents = ["memory/release_agent", "memory/notify_on_release", "release_agent"];
    for name in agents {
        let wrote = fs::write(format!("/sys/fs/cgroup/{name}"), "1");
        refused(&format!("write cgroup {name}"), wrote);
    }
    let up = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let outside = up.lines().any(|l| !l.ends_with(":/") && l.contains("volley"));
    door("host cgroup paths", !outside, &up);
    refused("write /sys", File::create("/sys/x"));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    door("host paths in mountinfo", !mounts.contains(&host.secret_path), &host.secret_path);
    let command = fs::read("/proc/1/cmdline").unwrap_or_default();
    let command = String::from_utf8_lossy(&command).into_owned();
    door("host paths in process 1", !command.contains(&host.secret_path), command);
}

/// I3, I4: mounts, namespaces, the release agent's way.
fn mounts() {
    fs::create_dir_all("/tmp/m").unwrap();
    let path = CString::new("/tmp/m").unwrap();
    let at = path.as_ptr() as usize;
    for kind in ["tmpfs", "proc", "sysfs", "cgroup", "cgroup2", "overlay", "ramfs"] {
        let kind_c = CString::new(kind).unwrap();
        let k = kind_c.as_ptr() as usize;
        refused(&format!("mount {kind}"), call(libc::SYS_mount, [k, at, k, 0, 0, 0]));
        refused(&format!("fsopen {kind}"), call(libc::SYS_fsopen, [k, 0, 0, 0, 0, 0]));
    }
    let root = CString::new("/").unwrap();
    let proc = CString::new("/proc/sys").unwrap();
    let (root, proc) = (root.as_ptr() as usize, proc.as_ptr() as usize);
    let remount = usize::try_from(libc::MS_REMOUNT | libc::MS_BIND).unwrap();
    refused("remount /proc/sys", call(libc::SYS_mount, [0, proc, 0, remount, 0, 0]));
    let bind = usize::try_from(libc::MS_BIND).unwrap();
    refused("bind /", call(libc::SYS_mount, [root, at, 0, bind, 0, 0]));
    let detach = usize::try_from(libc::MNT_DETACH).unwrap();
    refused("unmount /proc/sys", call(libc::SYS_umount2, [proc, detach, 0, 0, 0, 0]));
    refused("open_tree", call(libc::SYS_open_tree, [usize::MAX, root, 1, 0, 0, 0]));
    let here = usize::try_from(libc::AT_FDCWD.unsigned_abs()).unwrap().wrapping_neg();
    refused("move_mount", call(libc::SYS_move_mount, [here, proc, here, at, 0, 0]));
    refused("pivot_root", call(libc::SYS_pivot_root, [at, at, 0, 0, 0, 0]));
    for (name, flag) in [
        ("user", libc::CLONE_NEWUSER),
        ("mount", libc::CLONE_NEWNS),
        ("pid", libc::CLONE_NEWPID),
        ("net", libc::CLONE_NEWNET),
        ("cgroup", libc::CLONE_NEWCGROUP),
    ] {
        let flag = usize::try_from(flag).unwrap();
        refused(&format!("unshare {name}"), call(libc::SYS_unshare, [flag, 0, 0, 0, 0, 0]));
        let signal = usize::try_from(libc::SIGCHLD).unwrap();
        refused(&format!("clone {name}"), call(libc::SYS_clone, [flag | signal, 0, 0, 0, 0, 0]));
    }
    let mut clone3 = [0_u64; 11];
    clone3[0] = u64::from(libc::CLONE_NEWUSER.unsigned_abs());
    let args = [clone3.as_mut_ptr() as usize, 88, 0, 0, 0, 0];
    refused("clone3", call(libc::SYS_clone3, args));
    let ns = File::open("/proc/self/ns/user").map(std::os::fd::IntoRawFd::into_raw_fd);
    let ns = usize::try_from(ns.unwrap_or(99)).unwrap();
    refused("setns", call(libc::SYS_setns, [ns, 0, 0, 0, 0, 0]));
    // SAFETY: closes a descriptor that only this function knows.
    unsafe { libc::close(i32::try_from(ns).unwrap()) };
}

/// I4: calls with a reach beyond the box.
fn calls() {
    let mut params = [0_u8; 256];
    let p = params.as_mut_ptr() as usize;
    for (name, number, args) in [
        ("io_uring_setup", libc::SYS_io_uring_setup, [8, p, 0, 0, 0, 0]),
        ("bpf", libc::SYS_bpf, [5, p, 128, 0, 0, 0]),
        ("perf_event_open", libc::SYS_perf_event_open, [p, 0, usize::MAX, usize::MAX, 0, 0]),
        ("userfaultfd", libc::SYS_userfaultfd, [1, 0, 0, 0, 0, 0]),
        ("keyctl", libc::SYS_keyctl, [0, usize::MAX - 2, 0, 0, 0, 0]),
        ("add_key", libc::SYS_add_key, [p, p, p, 1, usize::MAX - 2, 0]),
        ("request_key", libc::SYS_request_key, [p, p, 0, 0, 0, 0]),
        ("kexec_load", libc::SYS_kexec_load, [0; 6]),
        ("init_module", libc::SYS_init_module, [p, 256, p, 0, 0, 0]),
        ("delete_module", libc::SYS_delete_module, [p, 0, 0, 0, 0, 0]),
        ("open_by_handle_at", libc::SYS_open_by_handle_at, [0, p, 0, 0, 0, 0]),
        ("quotactl", libc::SYS_quotactl, [0; 6]),
        ("swapon", libc::SYS_swapon, [p, 0, 0, 0, 0, 0]),
        ("reboot", libc::SYS_reboot, [0; 6]),
        ("settimeofday", libc::SYS_settimeofday, [p, 0, 0, 0, 0, 0]),
        ("clock_settime", libc::SYS_clock_settime, [0, p, 0, 0, 0, 0]),
        ("syslog", libc::SYS_syslog, [3, p, 100, 0, 0, 0]),
        ("acct", libc::SYS_acct, [0; 6]),
        ("sethostname", libc::SYS_sethostname, [p, 1, 0, 0, 0, 0]),
        ("setdomainname", libc::SYS_setdomainname, [p, 1, 0, 0, 0, 0]),
        ("kcmp", libc::SYS_kcmp, [1, 1, 0, 0, 0, 0]),
        ("fanotify_init", libc::SYS_fanotify_init, [0; 6]),
        ("vhangup", libc::SYS_vhangup, [0; 6]),
        ("move_pages", libc::SYS_move_pages, [1, 0, 0, 0, 0, 0]),
        ("mount_setattr", libc::SYS_mount_setattr, [0, p, 0x1000, p, 32, 0]),
    ] {
        refused(name, call(number, args));
    }
    refused("TIOCSTI", call(libc::SYS_ioctl, [0, 0x5412, p, 0, 0, 0]));
}

/// I4: processes of the host and of this box's init.
fn processes(host: &Host) {
    // SAFETY: takes no pointer.
    let killed = unsafe { libc::kill(host.pid, 0) };
    door("host process", killed != 0 || host.pid < 64, killed);
    refused(
        "kill -9 1 by tgkill of a stranger",
        call(libc::SYS_tgkill, [99_999, 99_999, 9, 0, 0, 0]),
    );
    // SAFETY: takes no pointer. Process 1 of a pid namespace ignores it from inside.
    unsafe { libc::kill(1, libc::SIGKILL) };
    door("kill -9 1", Path::new("/proc/1/stat").exists(), "alive");
    let pids = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit()));
    let pids: Vec<_> = pids.map(|e| e.file_name()).collect();
    door("processes in sight", pids.len() <= 3, &pids);
    let shm = call(libc::SYS_shmget, [usize::try_from(host.shm_key).unwrap(), 1, 0, 0, 0, 0]);
    refused("host shared memory", shm);
}

/// I3, I4: devices, ours and planted.
fn devices() {
    for (name, device) in
        [("mem", (1, 1)), ("kmsg", (1, 11)), ("fuse", (10, 229)), ("vda", (254, 0))]
    {
        let path = CString::new(format!("/tmp/made-{name}")).unwrap();
        let kind = if name == "vda" { libc::S_IFBLK } else { libc::S_IFCHR };
        // SAFETY: the path is a C string that lives across the call.
        let rc =
            unsafe { libc::mknod(path.as_ptr(), kind | 0o666, libc::makedev(device.0, device.1)) };
        door(&format!("mknod {name}"), rc != 0, rc);
        refused(&format!("open planted {name}"), File::open(format!("/planted/{name}")));
    }
    let null = fs::metadata("/dev/null").unwrap();
    let real = null.file_type().is_char_device() && null.rdev() == libc::makedev(1, 3);
    door("/dev/null is the null device", real, null.rdev());
    for (name, result) in [
        ("unlink /dev/null", fs::remove_file("/dev/null")),
        ("chmod /dev/null", fs::set_permissions("/dev/null", fs::Permissions::from_mode(0o000))),
        ("make /dev/x", fs::write("/dev/x", "")),
        ("rename /dev/null", fs::rename("/dev/null", "/dev/zero2")),
    ] {
        refused(name, result);
    }
}

/// I6: the host's and the neighbours' network.
fn sockets(host: &Host) {
    let short = Duration::from_millis(300);
    for (name, address) in [
        ("host loopback", format!("127.0.0.1:{}", host.port)),
        ("metadata address", "169.254.169.254:80".into()),
        ("outside", "1.1.1.1:53".into()),
    ] {
        let address: SocketAddr = address.parse().unwrap();
        refused(name, TcpStream::connect_timeout(&address, short));
    }
    let address = UnixAddr::from_abstract_name(host.abstract_name.as_bytes()).unwrap();
    refused("host abstract socket", UnixStream::connect_addr(&address));
    interfaces();
    for (name, family, kind, protocol) in [
        ("vsock", libc::AF_VSOCK, libc::SOCK_STREAM, 0),
        ("packet", libc::AF_PACKET, libc::SOCK_RAW, 0x0300),
        ("raw", libc::AF_INET, libc::SOCK_RAW, 1),
        ("alg", libc::AF_ALG, libc::SOCK_SEQPACKET, 0),
        ("netlink audit", libc::AF_NETLINK, libc::SOCK_RAW, 9),
        ("netlink netfilter", libc::AF_NETLINK, libc::SOCK_RAW, 12),
    ] {
        // SAFETY: takes no pointer.
        let fd = unsafe { libc::socket(family, kind, protocol) };
        door(&format!("socket {name}"), fd < 0, io::Error::last_os_error());
    }
}

/// What a box's network device, if it has one, could be turned into; and other devices that could be made.
fn interfaces() {
    use std::os::fd::AsRawFd;
    let first = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    println!("resolver: {}", first.lines().next().unwrap_or("none"));
    refused("open /dev/net/tun", File::open("/dev/net/tun"));
    for fd in 0..32 {
        refused_quietly(
            &format!("descriptor {fd} of init"),
            File::open(format!("/proc/1/fd/{fd}")),
        );
    }
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    for name in ["eth0", "lo"] {
        for (what, request) in [
            ("address", libc::SIOCSIFADDR),
            ("flags", libc::SIOCSIFFLAGS),
            ("mtu", libc::SIOCSIFMTU),
            ("name", libc::SIOCSIFNAME),
        ] {
            // SAFETY: `ifreq` is plain data for which zero bytes are valid, and lives across the call.
            let rc = unsafe {
                let mut ifreq: libc::ifreq = std::mem::zeroed();
                for (to, from) in ifreq.ifr_name.iter_mut().zip(name.bytes()) {
                    *to = libc::c_char::from_ne_bytes([from]);
                }
                libc::ioctl(socket.as_raw_fd(), request, &raw mut ifreq)
            };
            door(&format!("set {what} of {name}"), rc != 0, io::Error::last_os_error());
        }
    }
    // SAFETY: as above.
    let rc = unsafe {
        let mut route: libc::rtentry = std::mem::zeroed();
        libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &raw mut route)
    };
    door("add a route", rc != 0, io::Error::last_os_error());
    for (what, level, name) in [
        ("mark packets", libc::SOL_SOCKET, libc::SO_MARK),
        ("take any address", libc::SOL_IP, libc::IP_TRANSPARENT),
    ] {
        let one = 1_i32;
        // SAFETY: the option is an int that lives across the call.
        let rc = unsafe {
            libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const one).cast(), 4)
        };
        door(what, rc != 0, io::Error::last_os_error());
    }
    for path in ["ipv4/ip_forward", "ipv4/conf/all/route_localnet", "ipv4/conf/all/rp_filter"] {
        let path = format!("/proc/sys/net/{path}");
        refused(&format!("write {path}"), OpenOptions::new().write(true).open(&path));
    }
    refused("an address of another", std::net::UdpSocket::bind("198.18.0.1:0"));
}

/// As [`refused`], for what is tried so often that only an open one is worth a line.
fn refused_quietly<T: std::fmt::Debug>(name: &str, result: io::Result<T>) {
    if result.is_ok() {
        refused(name, result);
    }
}

/// What would outlive the box in a network namespace that serves another one later: addresses, routes, links, settings.
fn network_settings() {
    // SAFETY: takes no pointer.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0) };
    // SAFETY: plain data for which zero bytes are valid; it lives across every call below.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = libc::c_char::from_ne_bytes([b'l']);
    request.ifr_name[1] = libc::c_char::from_ne_bytes([b'o']);
    for (name, what) in [
        ("link flags", libc::SIOCSIFFLAGS),
        ("address", libc::SIOCSIFADDR),
        ("mtu", libc::SIOCSIFMTU),
        ("link name", libc::SIOCSIFNAME),
        ("neighbour entry", libc::SIOCSARP),
        ("route", libc::SIOCADDRT),
    ] {
        // SAFETY: the largest of what these calls read is shorter than twice an `ifreq`.
        let mut room = [request; 3];
        // SAFETY: `room` lives across the call.
        let rc = unsafe { libc::ioctl(socket, what, room.as_mut_ptr()) };
        let error = io::Error::last_os_error();
        let refused = rc < 0 && error.raw_os_error() != Some(libc::EINVAL);
        door(&format!("set {name}"), refused, error);
    }
    // RTM_NEWADDR: 127.9.9.9/8 on loopback.
    // SAFETY: takes no pointer.
    let netlink = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, 0) };
    let message: [u8; 32] = [
        32, 0, 0, 0, 20, 0, 5, 6, 1, 0, 0, 0, 0, 0, 0,
        0, // length, type, request|ack|create|excl
        2, 8, 0, 0, 1, 0, 0, 0, // inet, prefix, link 1
        8, 0, 2, 0, 127, 9, 9, 9, // local address
    ];
    // SAFETY: the message lives across the call with its true length.
    unsafe { libc::send(netlink, message.as_ptr().cast(), message.len(), 0) };
    let mut answer = [0_u8; 64];
    // SAFETY: `answer` lives across the call with its true length.
    let got = unsafe { libc::recv(netlink, answer.as_mut_ptr().cast(), answer.len(), 0) };
    let error = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    door("add address by netlink", got < 20 || error < 0, error);
    for name in ["ipv4/ip_forward", "ipv4/ping_group_range", "core/somaxconn", "ipv4/tcp_rmem"] {
        let result = fs::write(format!("/proc/sys/net/{name}"), "1 1 1");
        refused(&format!("write net/{name}"), result);
    }
}

/// Uses loopback so that nobody could take this network for one that was never used, then says which it is.
pub(crate) fn use_network() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut there = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (_here, _) = listener.accept().unwrap();
    there.write_all(b"a secret").unwrap();
    println!("{}", fs::read_link("/proc/self/ns/net").unwrap().display());
}

/// I4: rights that grow.
fn rights() {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = |name: &str| {
        status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or("").trim().to_owned()
    };
    door("no_new_privs", line("NoNewPrivs:") == "1", line("NoNewPrivs:"));
    door("seccomp", line("Seccomp:") == "2", line("Seccomp:"));
    let bounding = u64::from_str_radix(&line("CapBnd:"), 16).unwrap_or(u64::MAX);
    // SYS_MODULE, SYS_RAWIO, SYS_PTRACE, SYS_ADMIN, SYS_BOOT, NET_ADMIN, NET_RAW, MKNOD, SYS_RESOURCE.
    let worst: u64 = [16, 17, 19, 21, 22, 12, 13, 27, 24].iter().map(|n| 1 << n).sum();
    door("capabilities", bounding & worst == 0, line("CapBnd:"));
    let core = libc::rlimit { rlim_cur: 1 << 20, rlim_max: 1 << 20 };
    // SAFETY: `core` lives across the call.
    let rc = unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const core) };
    door("core dumps", rc != 0, rc);
    // SAFETY: takes no pointer.
    let rc = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -10) };
    door("nice -10", rc != 0, rc);
    // A set-user-id program of the image, run by a user of the box, stays that user.
    // SAFETY: this process has one thread; the child only changes ids and executes.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // SAFETY: takes no pointer.
        let dropped = unsafe { libc::setgid(1000) == 0 && libc::setuid(1000) == 0 };
        let out = std::process::Command::new("/planted/setuid-id").arg("-u").output();
        let same = out.is_ok_and(|o| o.stdout == b"1000\n");
        // SAFETY: ends the child without the parent's buffers.
        unsafe { libc::_exit(i32::from(!(dropped && same))) };
    }
    let mut status = -1;
    // SAFETY: `status` lives across the call.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    door("set-user-id program", status == 0, status);
}

/// The classic way out of a chroot ends at the box's own root.
fn chroot_escape() {
    let root = fs::metadata("/").unwrap();
    fs::create_dir_all("/tmp/jail").unwrap();
    if std::os::unix::fs::chroot("/tmp/jail").is_ok() {
        for _ in 0..64 {
            let _ = std::env::set_current_dir("..");
        }
        let _ = std::os::unix::fs::chroot(".");
    }
    let there = fs::metadata("/").unwrap();
    door("chroot escape", (there.dev(), there.ino()) == (root.dev(), root.ino()), there.ino());
}

/// System calls by the doors of other ABIs: 32-bit is killed, x32 refused.
#[cfg(target_arch = "x86_64")]
fn other_abis() {
    refused("x32 getpid", call(0x4000_0000 | 39, [0; 6]));
    // SAFETY: one thread; the child makes one 32-bit call and ends.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let mut rax: u64 = 20;
        // SAFETY: `getpid` of the 32-bit table reads and writes no memory.
        unsafe { std::arch::asm!("int 0x80", inout("rax") rax, options(nostack)) };
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(rax == u64::MAX)) };
    }
    let mut status = 0;
    // SAFETY: `status` lives across the call.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    let killed = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSYS;
    // A kernel built without 32-bit programs faults instead.
    let faulted = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV;
    door("32-bit calls", killed || faulted, status);
}
