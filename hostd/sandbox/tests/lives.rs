//! Lives that end badly: hostd killed, the spawner killed, hundreds of boxes one after another. Nothing
//! may be left, and nothing lost that still runs.
//!
//! Longer than 500 lines: a test a line of the promise, all on one set-up.

#![allow(clippy::unwrap_used, reason = "tests; clippy does not see that without the usual harness")]

mod house;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hostd_sandbox::{
    ClaimError, ClaimSpec, Config, Event, Joined, Limits, Program, Refusal, RootSpec, Spawner,
};

use house::{place, read_all, run, wait};

fn main() {
    hostd_sandbox::main_if_asked();
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|a| a == "__hostd-of-many") {
        return be_hostd_of_many(&args[2], &args[3]);
    }
    if args.get(1).is_some_and(|a| a == "__hostd-replaced") {
        fs::remove_file(std::env::current_exe().unwrap()).unwrap();
        return be_hostd(&args[2], &args[3]);
    }
    if args.get(1).is_some_and(|a| a == "__hostd") {
        return be_hostd(&args[2], &args[3]);
    }
    run(&[
        ("hostd_killed_boxes_adopted", hostd_killed_boxes_adopted),
        ("an_end_while_hostd_was_away", an_end_while_hostd_was_away),
        ("spawner_killed_nothing_left", spawner_killed_nothing_left),
        ("spawner_terminated_cleans_up", spawner_terminated_cleans_up),
        ("spawner_killed_frozen_box_swept", spawner_killed_frozen_box_swept),
        ("two_hundred_claims_leave_all_flat", two_hundred_claims_leave_all_flat),
        ("no_descriptors_left", no_descriptors_left),
        ("a_pool_that_cannot_be_filled_is_told", a_pool_that_cannot_be_filled_is_told),
        ("a_replaced_binary_still_starts", a_replaced_binary_still_starts),
        ("killed_at_any_moment", killed_at_any_moment),
        ("spawner_killed_at_any_moment", spawner_killed_at_any_moment),
        ("many_outlive_hostd", many_outlive_hostd),
        ("full_is_refused_and_freed", full_is_refused_and_freed),
        ("boxes_that_nobody_waits_for_go", boxes_that_nobody_waits_for_go),
        ("a_spawner_left_alone_ends", a_spawner_left_alone_ends),
    ]);
}

fn config(dir: &Path) -> Config {
    Config {
        slots: 16,
        linger_s: 20,
        uid_base: house::UID_BASE,
        ..Config::new(dir.join("s"), vec![house::shape(2)])
    }
}

fn spec(root: &Path, id: u8, line: &str) -> ClaimSpec {
    ClaimSpec {
        id: [id; 16],
        shape: "small".into(),
        root: RootSpec::directory(root).unwrap(),
        program: Program { stdin: true, ..Program::new(["sh", "-c", line]) },
        hostname: String::new(),
        limits: Limits::default(),
        network: None,
    }
}

/// A hostd of the test: starts two sandboxes, says so, and waits to be killed.
fn be_hostd(dir: &str, root: &str) {
    let joined = Spawner::connect_or_start(&config(Path::new(dir))).unwrap();
    let lines = ["read x; echo heard $x; sleep 1000", "read x; exit 9"];
    let mut kept = Vec::new();
    for (id, line) in (1..).zip(lines) {
        kept.push(wait(joined.spawner.claim(spec(Path::new(root), id, line))).unwrap());
    }
    println!("up");
    let _ = std::io::stdin().read(&mut [0]);
}

struct Hostd {
    child: std::process::Child,
    dir: tempfile::TempDir,
    _root: tempfile::TempDir,
}

fn hostd() -> Hostd {
    let (dir, root) = (tempfile::tempdir().unwrap(), house::root());
    let child = hostd_by(&std::env::current_exe().unwrap(), "__hostd", &dir, &root);
    Hostd { child, dir, _root: root }
}

fn hostd_by(
    exe: &Path,
    role: &str,
    dir: &tempfile::TempDir,
    root: &tempfile::TempDir,
) -> std::process::Child {
    let mut child = Command::new(exe)
        .arg(role)
        .args([dir.path(), root.path()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "up\n");
    child
}

fn hostd_killed_boxes_adopted() {
    let mut hostd = hostd();
    hostd.child.kill().unwrap();
    hostd.child.wait().unwrap();
    let joined = Spawner::connect_or_start(&config(hostd.dir.path())).unwrap();
    let Joined { spawner, mut events, mut live, started, .. } = joined;
    live.sort_by_key(|l| l.id);
    assert!(!started && live.len() == 2, "{live:?}");
    assert!(live.iter().all(|l| Path::new(&format!("/proc/{}", l.pid)).exists()));
    // The adopted box is as good as our own: stdio, exec, stats, kill.
    let stdio = wait(spawner.stdio([1; 16])).unwrap();
    rustix::io::write(stdio.stdin.as_ref().unwrap(), b"adopted\n").unwrap();
    let mut bytes = [0; 14];
    fs::File::from(stdio.stdout.unwrap()).read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"heard adopted\n");
    let done = wait(spawner.exec([1; 16], Program::new(["hostname"]))).unwrap();
    assert_eq!(read_all(done.stdio.stdout.unwrap()), "sandbox\n");
    wait(spawner.kill([1; 16])).unwrap();
    let ended = loop {
        if let Event::Exited(e) = wait(events.recv()).unwrap() {
            break e;
        }
    };
    assert_eq!((ended.id, ended.status.signal), ([1; 16], Some(9)));
    wait(spawner.shutdown(true)).unwrap();
    assert_clean(&config(hostd.dir.path()), spawner.pid());
}

fn an_end_while_hostd_was_away() {
    let mut hostd = hostd();
    let config = config(hostd.dir.path());
    hostd.child.kill().unwrap();
    hostd.child.wait().unwrap();
    let Joined { spawner, live, .. } = Spawner::connect_or_start(&config).unwrap();
    let stdio = wait(spawner.stdio([2; 16])).unwrap();
    let pid = live.iter().find(|l| l.id == [2; 16]).unwrap().pid;
    // A second hostd takes over; the first handle is told.
    let Joined { spawner: second, .. } = Spawner::connect_or_start(&config).unwrap();
    let gone = wait(spawner.pool()).unwrap_err();
    assert!(matches!(gone, ClaimError::Unknown { .. }), "{gone:?}");
    rustix::io::write(stdio.stdin.as_ref().unwrap(), b"\n").unwrap();
    while Path::new(&format!("/proc/{pid}")).exists() {}
    let Joined { spawner: third, exited, .. } = Spawner::connect_or_start(&config).unwrap();
    drop(second);
    assert_eq!(exited.len(), 1);
    assert_eq!((exited[0].id, exited[0].status.code), ([2; 16], Some(9)));
    wait(third.forget([2; 16])).unwrap();
    assert_eq!(wait(third.running()).unwrap().1, []);
    wait(third.shutdown(true)).unwrap();
    assert_clean(&config, third.pid());
}

fn groups_of(config: &Config) -> Vec<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    let mut found = Vec::new();
    for line in own.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (names, path) = (parts.next().unwrap(), parts.next().unwrap());
        let base = Path::new(&config.cgroup_root).join(names).join(path.trim_start_matches('/'));
        let Ok(entries) = fs::read_dir(base) else { continue };
        let ours = |p: &PathBuf| {
            p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&config.group_name()))
        };
        found.extend(entries.flatten().map(|e| e.path()).filter(ours));
    }
    found
}

/// No process, group, mount or socket of a spawner is left.
fn assert_clean(config: &Config, spawner: u32) {
    while Path::new(&format!("/proc/{spawner}/ns")).exists()
        && fs::read_to_string(format!("/proc/{spawner}/stat")).is_ok_and(|s| !s.contains(") Z"))
    {
        std::thread::yield_now();
    }
    assert_eq!(groups_of(config), Vec::<PathBuf>::new());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&config.state_dir), "{mounts}");
    assert!(!Path::new(&config.state_dir).join("spawner.sock").exists());
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !box_processes(config).is_empty() {
        let late = std::time::Instant::now() > deadline;
        assert!(!late, "still there: {:?}", box_processes(config));
    }
}

/// Processes with a user id of a box's range.
fn box_processes(config: &Config) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(status) = fs::read_to_string(entry.path().join("status")) else { continue };
        let uid = status.lines().find_map(|l| l.strip_prefix("Uid:"));
        let uid = uid.and_then(|l| l.split_whitespace().next()?.parse::<u32>().ok()).unwrap_or(0);
        if uid >= config.uid_base && uid < config.uid_base + config.slots * 65_536 {
            found.push(status);
        }
    }
    found
}

fn kill_spawner(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

fn spawner_killed_nothing_left() {
    let mut place = place(2);
    let line = "trap '' TERM; (sleep 1001 &); sleep 1002";
    let running = place.claim(Program::new(["sh", "-c", line])).unwrap();
    kill_spawner(place.spawner.pid());
    while !matches!(wait(place.events.recv()).unwrap(), Event::Gone) {}
    let unknown = wait(place.spawner.stats(running.id)).unwrap_err();
    assert!(matches!(unknown, ClaimError::Unknown { .. }), "{unknown:?}");
    // The program's end of the pipe closes with the last process of the box.
    assert_eq!(read_all(running.stdio.stdout.unwrap()), "");
    let swept = loop {
        let swept = hostd_sandbox::sweep(&place.config).unwrap();
        if swept.groups_left == 0 && !swept.spawner_alive {
            break swept;
        }
    };
    assert_eq!(swept.groups_left, 0);
    assert_clean(&place.config, place.spawner.pid());
    // And a new one starts in its place.
    let joined = Spawner::connect_or_start(&place.config).unwrap();
    assert!(joined.started && joined.live.is_empty());
    wait(joined.spawner.shutdown(true)).unwrap();
    assert_clean(&place.config, joined.spawner.pid());
}

fn spawner_terminated_cleans_up() {
    let mut place = place(2);
    place.claim(Program::new(["sleep", "1000"])).unwrap();
    let pid = i32::try_from(place.spawner.pid()).ok().and_then(rustix::process::Pid::from_raw);
    rustix::process::kill_process(pid.unwrap(), rustix::process::Signal::TERM).unwrap();
    while !matches!(wait(place.events.recv()).unwrap(), Event::Gone) {}
    assert_clean(&place.config, place.spawner.pid());
}

fn spawner_killed_frozen_box_swept() {
    let mut place = place(2);
    let running = place.claim(Program::new(["sleep", "1000"])).unwrap();
    wait(place.spawner.pause(running.id)).unwrap();
    kill_spawner(place.spawner.pid());
    while !matches!(wait(place.events.recv()).unwrap(), Event::Gone) {}
    // Starting a new one sweeps too.
    let joined = Spawner::connect_or_start(&place.config).unwrap();
    assert!(joined.started);
    while Path::new(&format!("/proc/{}/ns/pid", running.pid)).exists() {}
    wait(joined.spawner.shutdown(true)).unwrap();
    assert_clean(&place.config, joined.spawner.pid());
}

fn two_hundred_claims_leave_all_flat() {
    let mut place = place(4);
    let state_dir = place.config.state_dir.clone();
    let look = |pid: u32| {
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        // Those of others on this machine come and go.
        let mounts = |pid: u32| {
            let text = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
            text.lines().filter(|l| l.contains(&state_dir)).count()
        };
        let ours = fs::read_dir("/proc/self/fd").unwrap().count();
        (fds, mounts(pid), mounts(std::process::id()), ours)
    };
    let pid = place.spawner.pid();
    place.shell("exit 0");
    settle(&place.spawner, &place.config);
    let before = look(pid);
    let pages = || {
        let statm = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
        statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let rss = pages();
    for round in 0..200 {
        let line = if round % 2 == 0 { "exit 0" } else { "no-such-thing; (sleep 100 &); exit 1" };
        place.shell(line);
    }
    settle(&place.spawner, &place.config);
    let after = look(pid);
    assert_eq!((after.1, after.2, after.3), (before.1, before.2, before.3));
    // Up to 16 spare network namespaces are kept.
    assert!(after.0 <= before.0 + 16, "{after:?}, {before:?} before");
    assert!(pages() <= rss + rss / 20 + 64, "{} pages, {rss} before", pages());
}

fn limit_descriptors(pid: u32, soft: u64) -> u64 {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap());
    let before = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let limit = rustix::process::Rlimit { current: Some(soft), maximum: before.maximum };
    loop {
        match rustix::process::prlimit(pid, rustix::process::Resource::Nofile, limit) {
            Ok(old) => return old.current.unwrap(),
            // For a moment of each clone the spawner is another user.
            Err(rustix::io::Errno::PERM) => std::thread::yield_now(),
            Err(e) => panic!("{e}"),
        }
    }
}

/// O2: neither the spawner nor hostd has room for one more descriptor: launches fail by name, nothing is
/// half made, and afterwards all is as before.
fn no_descriptors_left() {
    let mut place = place(2);
    place.shell("exit 0");
    let pid = place.spawner.pid();
    let open = |pid: u32| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as u64;
    for spare in 0..12 {
        let old = limit_descriptors(pid, open(pid) + spare);
        let outcome = place.claim(Program::new(["true"]));
        limit_descriptors(pid, old);
        match outcome {
            Ok(running) => drop(place.exited(running.id)),
            Err(ClaimError::Unknown { why }) => panic!("with {spare} spare: {why}"),
            Err(_) => {}
        }
    }
    let own = std::process::id();
    for spare in 0..8 {
        let spec = place.spec(Program::new(["sleep", "1000"]));
        let id = spec.id;
        let old = limit_descriptors(own, open(own) + spare);
        // This thread's runtime needs some too.
        let outcome = place.spawner.claim_blocking(spec);
        limit_descriptors(own, old);
        match outcome {
            Ok(_) => {
                wait(place.spawner.kill(id)).unwrap();
                place.exited(id);
            }
            Err(ClaimError::Unknown { why }) => panic!("with {spare} spare: {why}"),
            Err(_) => {}
        }
    }
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while wait(place.spawner.pool()).unwrap()[0].running > 0 {
        assert!(std::time::Instant::now() < deadline, "a failed launch still runs");
    }
    assert_eq!(place.shell("echo well").0, "well\n");
}

/// While no boxes can be made, hostd hears that those parked are all there is: heartbeats say no more.
fn a_pool_that_cannot_be_filled_is_told() {
    let mut place = place(40);
    let pid = place.spawner.pid();
    let old = limit_descriptors(pid, 30);
    let pool = |event: Option<Event>| match event {
        Some(Event::Pool(pool)) => Some(pool),
        Some(_) => None,
        None => panic!("the spawner is gone"),
    };
    let said = loop {
        match pool(wait(place.events.recv())) {
            Some(pool) if pool.slots_left == 0 => break pool,
            _ => {}
        }
    };
    assert!(said.parked < 40, "{said:?}");
    assert_eq!(wait(place.spawner.pool()).unwrap()[0].slots_left, 0);
    limit_descriptors(pid, old);
    loop {
        match pool(wait(place.events.recv())) {
            Some(pool) if pool.slots_left > 0 => break,
            _ => {}
        }
    }
    assert_eq!(place.shell("echo well").0, "well\n");
}

/// An upgrade has replaced the file that hostd runs from before it starts its spawner.
fn a_replaced_binary_still_starts() {
    let (dir, root) = (tempfile::tempdir().unwrap(), house::root());
    let exe = dir.path().join("hostd");
    fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
    let mut hostd = hostd_by(&exe, "__hostd-replaced", &dir, &root);
    hostd.kill().unwrap();
    hostd.wait().unwrap();
    let Joined { spawner, live, .. } = Spawner::connect_or_start(&config(dir.path())).unwrap();
    assert_eq!(live.len(), 2);
    wait(spawner.shutdown(true)).unwrap();
}

/// A small generator, so that a failure can be had again from its seed.
struct Dice(u64);

impl Dice {
    fn new(name: &str) -> Self {
        let given = std::env::var("VOLLEY_SEED").ok().and_then(|s| s.parse().ok());
        let seed = given.unwrap_or_else(hostd_sandbox::bench::now_ns) | 1;
        println!("{name}: VOLLEY_SEED={seed}");
        Self(seed)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

fn spin(us: u64) {
    let end = hostd_sandbox::bench::now_ns() + us * 1000;
    while hostd_sandbox::bench::now_ns() < end {
        std::hint::spin_loop();
    }
}

/// O1: a claim is killed at a random moment from being sent to long after its start. It has one of two
/// outcomes, and either way nothing of it is left.
fn killed_at_any_moment() {
    let mut place = place(2);
    let mut dice = Dice::new("killed_at_any_moment");
    let (mut ran, mut failed) = (0, 0);
    for _ in 0..100 {
        let spec = place.spec(Program::new(["sh", "-c", "(sleep 1000 &); sleep 1001"]));
        let (id, spawner) = (spec.id, place.spawner.clone());
        let claimed = std::thread::spawn(move || spawner.claim_blocking(spec));
        spin(dice.below(3000));
        let killed = wait(place.spawner.kill(id));
        match claimed.join().unwrap() {
            Ok(_) => {
                ran += 1;
                if killed.is_err() {
                    // It came before its claim did.
                    wait(place.spawner.kill(id)).unwrap();
                }
                assert_eq!(place.exited(id).status.signal, Some(libc::SIGKILL));
            }
            Err(ClaimError::Failed(_)) => failed += 1,
            Err(other) => panic!("{other}"),
        }
    }
    println!("{ran} ran, {failed} were killed before");
    settle(&place.spawner, &place.config);
    assert_eq!(wait(place.spawner.running()).unwrap(), (vec![], vec![]));
}

/// O1: the spawner is killed at a random moment of three claims. Each ends as unknown or started, and a
/// sweep leaves nothing.
fn spawner_killed_at_any_moment() {
    let mut dice = Dice::new("spawner_killed_at_any_moment");
    for _ in 0..12 {
        let mut place = place(1);
        let claims: Vec<_> = (0..3)
            .map(|_| {
                let spec = place.spec(Program::new(["sleep", "1000"]));
                let spawner = place.spawner.clone();
                std::thread::spawn(move || spawner.claim_blocking(spec))
            })
            .collect();
        spin(dice.below(6000));
        kill_spawner(place.spawner.pid());
        for claim in claims {
            match claim.join().unwrap() {
                Ok(_) | Err(ClaimError::Unknown { .. }) => {}
                Err(other) => panic!("{other}"),
            }
        }
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        loop {
            let swept = hostd_sandbox::sweep(&place.config).unwrap();
            if !swept.spawner_alive && swept.groups_left == 0 {
                break;
            }
            assert!(std::time::Instant::now() < deadline, "{swept:?}");
        }
        assert_clean(&place.config, place.spawner.pid());
    }
}

/// Waits until the pool holds what its shape asks for, not one box more, and nothing runs.
fn settle(spawner: &Spawner, config: &Config) {
    let parked = config.shapes[0].parked;
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    loop {
        let pool = wait(spawner.pool()).unwrap();
        let left = config.slots - parked;
        if (pool[0].parked, pool[0].running, pool[0].slots_left) == (parked, 0, left) {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{pool:?}");
    }
}

/// How many: `VOLLEY_SURVIVORS`, 40 by default.
fn survivors() -> u16 {
    std::env::var("VOLLEY_SURVIVORS").ok().and_then(|n| n.parse().ok()).unwrap_or(40)
}

fn config_of_many(dir: &Path) -> Config {
    Config { slots: u32::from(survivors()) + 24, ..config(dir) }
}

fn be_hostd_of_many(dir: &str, root: &str) {
    let joined = Spawner::connect_or_start(&config_of_many(Path::new(dir))).unwrap();
    for number in 0..survivors() {
        let mut spec = spec(Path::new(root), 0, "read x; exit $x");
        spec.id[..2].copy_from_slice(&number.to_be_bytes());
        wait(joined.spawner.claim(spec)).unwrap();
    }
    println!("up");
    let _ = std::io::stdin().read(&mut [0]);
}

/// O4: hostd dies with many running; each of them is there for the next one, and can be talked to.
fn many_outlive_hostd() {
    let (dir, root) = (tempfile::tempdir().unwrap(), house::root());
    let mut hostd = hostd_by(&std::env::current_exe().unwrap(), "__hostd-of-many", &dir, &root);
    hostd.kill().unwrap();
    hostd.wait().unwrap();
    let config = config_of_many(dir.path());
    let Joined { spawner, mut events, live, .. } = Spawner::connect_or_start(&config).unwrap();
    assert_eq!(live.len(), usize::from(survivors()));
    for sandbox in &live {
        let stdio = wait(spawner.stdio(sandbox.id)).unwrap();
        let line = format!("{}\n", sandbox.id[1]);
        rustix::io::write(stdio.stdin.as_ref().unwrap(), line.as_bytes()).unwrap();
    }
    for _ in 0..survivors() {
        let ended = loop {
            if let Event::Exited(ended) = wait(events.recv()).unwrap() {
                break ended;
            }
        };
        assert_eq!(ended.status.code, Some(i32::from(ended.id[1])));
        wait(spawner.forget(ended.id)).unwrap();
    }
    wait(spawner.shutdown(true)).unwrap();
    assert_clean(&config, spawner.pid());
}

fn full_is_refused_and_freed() {
    let root = house::root();
    let dir = tempfile::tempdir().unwrap();
    let config = Config { slots: 2, claim_wait_ms: 5000, ..config(dir.path()) };
    let Joined { spawner, mut events, .. } = Spawner::connect_or_start(&config).unwrap();
    for id in [1, 2] {
        wait(spawner.claim(spec(root.path(), id, "sleep 1000"))).unwrap();
    }
    let refused = wait(spawner.claim(spec(root.path(), 3, "true"))).unwrap_err();
    assert_eq!(refused, Refusal::NoBox { shape: "small".into() }.into());
    wait(spawner.kill([1; 16])).unwrap();
    while !matches!(wait(events.recv()).unwrap(), Event::Exited(e) if e.id == [1; 16]) {}
    wait(spawner.claim(spec(root.path(), 3, "sleep 1000"))).unwrap();
    wait(spawner.shutdown(true)).unwrap();
    assert_clean(&config, spawner.pid());
}

/// Claims that have run out of time leave boxes made for them. These go again, or the slots of all shapes would.
fn boxes_that_nobody_waits_for_go() {
    let (root, dir) = (house::root(), tempfile::tempdir().unwrap());
    let config = Config { claim_wait_ms: 20, slots: 48, ..config(dir.path()) };
    let Joined { spawner, .. } = Spawner::connect_or_start(&config).unwrap();
    let claims = (1..=40).map(|id| {
        let (spawner, spec) = (spawner.clone(), spec(root.path(), id, "sleep 1000"));
        std::thread::spawn(move || (id, spawner.claim_blocking(spec)))
    });
    for claim in claims.collect::<Vec<_>>() {
        match claim.join().unwrap() {
            (id, Ok(_)) => wait(spawner.kill([id; 16])).unwrap(),
            (_, Err(e)) => assert_eq!(e, Refusal::NoBox { shape: "small".into() }.into()),
        }
    }
    settle(&spawner, &config);
    wait(spawner.shutdown(true)).unwrap();
    assert_clean(&config, spawner.pid());
}

fn a_spawner_left_alone_ends() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config { linger_s: 0, ..config(dir.path()) };
    let joined = Spawner::connect_or_start(&config);
    // With no time to linger it may be gone before anybody comes.
    if let Ok(joined) = joined {
        let pid = joined.spawner.pid();
        drop(joined);
        assert_clean(&config, pid);
    }
}
