//! Attacks from inside a real sandbox (FAULTS I1-I4, I6, I7): a small hostile program tries every
//! door, images plant what published escapes planted, and bombs go off beside a neighbour.

#![allow(clippy::unwrap_used, reason = "tests; clippy does not see that without the usual harness")]

#[path = "../house/mod.rs"]
mod house;
mod inside;

use std::fs;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;
use std::time::Instant;

use hostd_sandbox::{BoxNetwork, ClaimError, ClaimSpec, Limits, Program};
use rustix::fs::OFlags;

use house::{Place, place, run, wait};
use inside::Host;

/// Doors that the program must report; fewer means that it died on the way.
const DOORS_MIN: usize = 120;

fn main() {
    hostd_sandbox::main_if_asked();
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|a| a == "__hoard") {
        return inside::hoard();
    }
    if args.get(1).is_some_and(|a| a == "__use-network") {
        return inside::use_network();
    }
    if args.get(1).is_some_and(|a| a == "__attack") {
        return inside::attack(&Host::from_args(&args[2..]));
    }
    run(&[
        ("every_door_is_closed", every_door_is_closed),
        ("every_door_is_closed_with_a_network", every_door_is_closed_with_a_network),
        ("the_runner_is_not_run_or_read", the_runner_is_not_run_or_read),
        ("a_working_directory_does_not_leak", a_working_directory_does_not_leak),
        ("planted_mount_points", planted_mount_points),
        ("hoards_are_counted_by_box", hoards_are_counted_by_box),
        ("a_used_network_serves_nobody_else", a_used_network_serves_nobody_else),
        ("bombs_do_not_reach_the_neighbour", bombs_do_not_reach_the_neighbour),
    ]);
}

/// A host with something to find.
struct Bait {
    _tcp: TcpListener,
    _unix: UnixListener,
    shm: i32,
    host: Host,
}

impl Bait {
    fn lay(secret_path: &Path) -> Self {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let abstract_name = format!("volley-bait-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(abstract_name.as_bytes()).unwrap();
        let unix = UnixListener::bind_addr(&address).unwrap();
        let shm_key = 0x5eed_0000 | i32::try_from(std::process::id() & 0xffff).unwrap();
        // SAFETY: takes no pointer.
        let shm = unsafe { libc::shmget(shm_key, 4096, libc::IPC_CREAT | 0o666) };
        assert!(shm >= 0);
        let host = Host {
            port: tcp.local_addr().unwrap().port(),
            pid: i32::try_from(std::process::id()).unwrap(),
            shm_key,
            abstract_name,
            secret_path: secret_path.to_string_lossy().into_owned(),
        };
        Self { _tcp: tcp, _unix: unix, shm, host }
    }
}

impl Drop for Bait {
    fn drop(&mut self) {
        // SAFETY: a null buffer is allowed for IPC_RMID; the segment is ours.
        unsafe { libc::shmctl(self.shm, libc::IPC_RMID, std::ptr::null_mut()) };
    }
}

/// Devices and a set-user-id program in the image.
fn plant(root: &Path) {
    let planted = root.join("planted");
    fs::create_dir_all(&planted).unwrap();
    for (name, kind, device) in [
        ("mem", libc::S_IFCHR, (1, 1)),
        ("kmsg", libc::S_IFCHR, (1, 11)),
        ("fuse", libc::S_IFCHR, (10, 229)),
        ("vda", libc::S_IFBLK, (254, 0)),
    ] {
        let path = std::ffi::CString::new(planted.join(name).to_str().unwrap()).unwrap();
        // SAFETY: the path is a C string that lives across the call.
        let rc =
            unsafe { libc::mknod(path.as_ptr(), kind | 0o666, libc::makedev(device.0, device.1)) };
        assert_eq!(rc, 0);
    }
    fs::copy(root.join("bin/id"), planted.join("setuid-id")).unwrap();
    house::set_mode(&planted.join("setuid-id"), 0o4755);
}

fn attack(place: &mut Place) -> (usize, Vec<String>, String) {
    attack_with(place, None)
}

fn attack_with(place: &mut Place, network: Option<BoxNetwork>) -> (usize, Vec<String>, String) {
    let bait = Bait::lay(Path::new(place.root.file_name().unwrap()));
    let args = ["probe".to_owned(), "__attack".to_owned()].into_iter().chain(bait.host.to_args());
    let spec = ClaimSpec { network, ..place.spec(Program::new(args)) };
    let running = wait(place.spawner.claim(spec)).unwrap();
    if network.is_some() {
        let tunnel = wait(place.spawner.tunnel(running.id)).unwrap();
        assert!(rustix::fs::fcntl_getfl(&tunnel.device).unwrap().contains(OFlags::NONBLOCK));
    }
    let (out, err, _) = place.finish(running);
    assert!(out.ends_with("done\n"), "the attack ended early:\n{out}\n{err}");
    let open = out.lines().filter(|l| l.starts_with("OPEN")).map(str::to_owned).collect();
    (out.lines().filter(|l| l.starts_with("closed")).count(), open, out)
}

fn every_door_is_closed() {
    let mut place = place(2);
    house::install(&place.root, &std::env::current_exe().unwrap(), "probe");
    plant(&place.root);
    let (closed, open, out) = attack(&mut place);
    assert_eq!(open, Vec::<String>::new(), "all of it:\n{out}");
    assert!(closed >= DOORS_MIN, "only {closed} doors:\n{out}");
    println!("{closed} doors closed");
}

/// A box with a network device, whose other end nobody serves: it has not one door more.
fn every_door_is_closed_with_a_network() {
    let mut place = place(2);
    if !Path::new("/dev/net/tun").exists() {
        println!("skipped: this kernel has no /dev/net/tun");
        return;
    }
    house::install(&place.root, &std::env::current_exe().unwrap(), "probe");
    plant(&place.root);
    fs::create_dir_all(place.root.join("etc")).unwrap();
    let _ = fs::remove_file(place.root.join("etc/resolv.conf"));
    symlink("/planted/resolver", place.root.join("etc/resolv.conf")).unwrap();
    let network = BoxNetwork {
        address: [198, 18, 0, 2],
        prefix_bits: 30,
        gateway: [198, 18, 0, 1],
        mtu: 65_520,
    };
    let (closed, open, out) = attack_with(&mut place, Some(network));
    assert_eq!(open, Vec::<String>::new(), "all of it:\n{out}");
    assert!(closed >= DOORS_MIN, "only {closed} doors:\n{out}");
    assert!(out.contains("resolver: nameserver 198.18.0.1"), "{out}");
    assert!(!place.root.join("planted/resolver").exists(), "a planted link was followed");
    println!("{closed} doors closed, with a network device");
}

/// Network namespaces serve again only while nothing was ever sent in them: what a box did is not there for the next.
fn a_used_network_serves_nobody_else() {
    let mut place = place(1);
    house::install(&place.root, &std::env::current_exe().unwrap(), "probe");
    let look = "readlink /proc/self/ns/net; cat /proc/net/dev /proc/net/sockstat /proc/net/snmp";
    let mut used = Vec::new();
    // The kernel gives the number of a network that is gone to the next: held, none of these can be given again.
    let mut held = Vec::new();
    let mut quiet: Vec<String> = Vec::new();
    let mut text = None;
    for round in 0..24 {
        if round % 3 == 2 {
            let line = "probe __use-network; read end";
            let program = Program { stdin: true, ..Program::new(["sh", "-c", line]) };
            let mut running = place.claim(program).unwrap();
            held.push(fs::File::open(format!("/proc/{}/ns/net", running.pid)).unwrap());
            drop(running.stdio.stdin.take());
            wait(place.spawner.close_stdin(running.id)).unwrap();
            used.push(place.finish(running).0.trim().to_owned());
            continue;
        }
        let (out, _, _) = place.shell(look);
        let (name, seen) = out.split_once('\n').unwrap();
        assert!(!used.iter().any(|used| used == name), "{name} served again after it was used");
        quiet.push(name.to_owned());
        // The whole machine's pages and memory of sockets aside, every box sees the same: an unused network.
        let ours = |line: &&str| !line.contains("mem") && !line.starts_with("TCP: inuse");
        let seen: String = seen.lines().filter(ours).collect();
        assert_eq!(*text.get_or_insert_with(|| seen.clone()), seen);
    }
    assert_eq!(used.len(), 8);
    quiet.sort();
    let boxes = quiet.len();
    quiet.dedup();
    assert!(quiet.len() < boxes, "no network served twice");
    println!("{boxes} quiet boxes had {} networks", quiet.len());
}

fn failed(place: &mut Place, program: Program) -> String {
    match place.claim(program) {
        Err(ClaimError::Failed(fault)) => fault.to_string(),
        other => panic!("not a failure: {other:?}"),
    }
}

fn the_runner_is_not_run_or_read() {
    let mut place = place(2);
    fs::write(place.root.join("bin/evil"), "#!/proc/self/exe __spawner\n").unwrap();
    house::set_mode(&place.root.join("bin/evil"), 0o755);
    symlink("/proc/self/exe", place.root.join("bin/link")).unwrap();
    for name in ["/proc/self/exe", "/bin/evil", "/bin/link", "/proc/1/exe", "/proc/thread-self/exe"]
    {
        let why = failed(&mut place, Program::new([name, "__spawner"]));
        assert!(why.contains("not executable"), "{name}: {why}");
    }
    // The same through an exec.
    let main = place.claim(Program::new(["sleep", "1000"])).unwrap();
    let exec = wait(place.spawner.exec(main.id, Program::new(["/proc/self/exe"]))).unwrap_err();
    assert!(exec.to_string().contains("not executable"), "{exec}");
}

fn a_working_directory_does_not_leak() {
    let mut place = place(2);
    for number in 0..24 {
        let cwd = format!("/proc/self/fd/{number}");
        let why = failed(&mut place, Program { cwd, ..Program::new(["true"]) });
        assert!(why.contains("working directory"), "{number}: {why}");
    }
    let why = failed(&mut place, Program { cwd: "/proc/1/root".into(), ..Program::new(["true"]) });
    assert!(why.contains("working directory"), "{why}");
    symlink("/proc/self/fd/4", place.root.join("cwd")).unwrap();
    let why = failed(&mut place, Program { cwd: "/cwd".into(), ..Program::new(["true"]) });
    assert!(why.contains("working directory"), "{why}");
    let program = Program { cwd: "/../../..".into(), ..Program::new(["sh", "-c", "pwd -P; ls"]) };
    let running = place.claim(program).unwrap();
    let (out, ..) = place.finish(running);
    assert!(out.starts_with("/\n") && out.contains("etc\n"), "{out}");
}

fn planted_mount_points() {
    type Planting = (&'static str, fn(&Path));
    let plantings: [Planting; 5] = [
        ("symlinks", |root| {
            symlink("/etc", root.join("proc")).unwrap();
            symlink("/tmp", root.join("dev")).unwrap();
            symlink("../../../..", root.join("sys")).unwrap();
        }),
        ("magic links", |root| {
            symlink("/proc/self/cwd", root.join("proc")).unwrap();
            symlink("/proc/self/fd/5", root.join("dev")).unwrap();
            symlink("/proc/1/root", root.join("sys")).unwrap();
        }),
        ("files", |root| {
            for name in ["proc", "dev", "sys"] {
                fs::write(root.join(name), "a file").unwrap();
            }
        }),
        ("false contents", |root| {
            for dir in ["dev/pts", "dev/shm", "proc/sys/kernel", "proc/1", "sys/fs/cgroup"] {
                fs::create_dir_all(root.join(dir)).unwrap();
            }
            symlink("/etc/passwd", root.join("dev/null")).unwrap();
            symlink("/proc/sys/kernel/core_pattern", root.join("dev/ptmx")).unwrap();
            symlink("/etc", root.join("dev/fd")).unwrap();
            fs::write(root.join("proc/kcore"), "false").unwrap();
        }),
        ("devices", |root| {
            let path = std::ffi::CString::new(root.join("dev").to_str().unwrap()).unwrap();
            // SAFETY: the path is a C string that lives across the call.
            let rc =
                unsafe { libc::mknod(path.as_ptr(), libc::S_IFBLK | 0o666, libc::makedev(254, 0)) };
            assert_eq!(rc, 0);
        }),
    ];
    for (name, planting) in plantings {
        let mut place = place(1);
        house::install(&place.root, &std::env::current_exe().unwrap(), "probe");
        plant(&place.root);
        planting(&place.root);
        let (closed, open, out) = attack(&mut place);
        assert_eq!(open, Vec::<String>::new(), "{name}:\n{out}");
        assert!(closed >= DOORS_MIN, "{name}: only {closed} doors");
        let line = "stat -f -c %T /proc /dev /sys; cat /etc/passwd | wc -l; echo x > /dev/null";
        assert_eq!(place.shell(line).0, "proc\ntmpfs\ntmpfs\n2\n", "{name}");
    }
}

/// What the kernel counts by user or for the machine: one box takes all that it can, and the next still
/// gets as much, and so does the host.
fn hoards_are_counted_by_box() {
    let mut place = place(2);
    house::install(&place.root, &std::env::current_exe().unwrap(), "probe");
    let mut hoards = Vec::new();
    for _ in 0..3 {
        let program = Program { stdin: true, ..Program::new(["probe", "__hoard"]) };
        let mut running = place.claim(program).unwrap();
        let mut line = String::new();
        let stdout = fs::File::from(running.stdio.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line).unwrap();
        hoards.push((running, line));
    }
    println!("each box's hoard: {}", hoards[0].1.trim());
    assert!(hoards.iter().all(|(_, line)| *line == hoards[0].1 && line.contains("terminals")));
    // SAFETY: takes no pointer.
    let own = unsafe { libc::inotify_init1(libc::IN_CLOEXEC) };
    assert!(own >= 0, "the host has no inotify left");
    // SAFETY: the descriptor is ours.
    unsafe { libc::close(own) };
}

fn bombs_do_not_reach_the_neighbour() {
    let mut place = place(2);
    let quiet = time_of_a_neighbour(&mut place, 20);
    let bombs = [
        "f() { f | f & }; f & exec sleep 1000",
        "while :; do tail /dev/zero; done",
        "i=0; while :; do dd if=/dev/zero of=/f bs=1M count=64; touch /g$i; i=$((i+1)); done 2>/dev/null",
        "while :; do echo flood flood flood; done",
    ];
    let mut running = Vec::new();
    for bomb in bombs {
        let mut spec = place.spec(Program::new(["sh", "-c", bomb]));
        // A tenth of a core each: the rest is the neighbour's.
        spec.limits = Limits {
            cpu_millis: Some(100),
            disk_bytes: 16 << 20,
            inodes: 500,
            ..Limits::default()
        };
        running.push(wait(place.spawner.claim(spec)).unwrap());
    }
    let loud = time_of_a_neighbour(&mut place, 20);
    println!("neighbour: median {quiet:?} alone, {loud:?} beside four bombs");
    for bomb in &running {
        wait(place.spawner.kill(bomb.id)).unwrap();
    }
    for bomb in running {
        assert_eq!(place.exited(bomb.id).stats.pids, 0);
    }
    // Wide, because this machine has other work; the figure is the bench's.
    assert!(loud < quiet * 10, "{loud:?} against {quiet:?}");
}

fn time_of_a_neighbour(place: &mut Place, rounds: usize) -> std::time::Duration {
    let mut times: Vec<_> = (0..rounds)
        .map(|_| {
            let start = Instant::now();
            let running = place.claim(Program::new(["true"])).unwrap();
            let time = start.elapsed();
            place.exited(running.id);
            time
        })
        .collect();
    times.sort();
    times[rounds / 2]
}
