//! A place for tests of real boxes: an image of the machine's own shell, a hostd process, and what is left of it.
//!
//! Longer than 500 lines: one place that all tests of real boxes share.
#![allow(clippy::unwrap_used, reason = "tests; clippy does not see that without the usual harness")]

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use bytes::BytesMut;
use hostd::{Boxes, Config};
use quinn::{Connection, RecvStream};
use tokio_util::sync::CancellationToken;
use wire::{
    Fault, SandboxId,
    call::{Answer, Call, ChangeKind, ExecRequest, Exit, FileChange, FileOp},
    frame::Kind,
    launch::LaunchReply,
};
use wire_net::stream;

use crate::common::{Fleet, HOST, block_on, call};

const PROGRAMS: &[&str] =
    &["sh", "cat", "sleep", "head", "true", "stty", "perl", "id", "ls", "echo", "mkdir", "pwd"];

/// Runs the tests, or is the hostd or the spawner of one.
pub(crate) fn main(tests: &[(&str, fn())]) {
    hostd::main_if_asked();
    let argument = std::env::args().nth(1);
    if argument.as_deref() == Some("__hostd") {
        return hostd_process(&std::env::args().nth(2).unwrap());
    }
    if std::env::args().any(|arg| arg == "--list") || !crate::common::real_boxes() {
        return;
    }
    let is_number = |arg: &String| arg.bytes().all(|byte| byte.is_ascii_digit());
    let wanted = argument.filter(|arg| !arg.starts_with('-') && !is_number(arg));
    let mut failed = Vec::new();
    for (name, test) in tests {
        if wanted.as_ref().is_some_and(|wanted| !name.contains(wanted.as_str())) {
            continue;
        }
        let begun = Instant::now();
        let outcome = std::panic::catch_unwind(test);
        let word = if outcome.is_ok() { "ok" } else { "FAILED" };
        println!("test {name} ... {word} ({} ms)", begun.elapsed().as_millis());
        if outcome.is_err() {
            failed.push(*name);
        }
    }
    assert!(failed.is_empty(), "failed: {failed:?}");
}

/// Serves until its input is closed.
fn hostd_process(config: &str) {
    let text = fs::read_to_string(config).unwrap();
    let config: Config = toml::from_str(&text).unwrap();
    let stop = CancellationToken::new();
    let token = stop.clone();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_line(&mut String::new());
        token.cancel();
    });
    if let Err(fault) = hostd::run(config, stop) {
        eprintln!("hostd: {fault}");
        std::process::exit(1);
    }
}

pub(crate) struct Place {
    fleet: Fleet,
    config: Config,
    hostd: Option<Child>,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    /// With room for so many boxes, whatever the machine has.
    pub(crate) fn with_room(boxes_max: u32) -> Self {
        Self::with(|config| {
            config.boxes_max = boxes_max;
            config.cpu_millis = Some(u64::from(boxes_max) * 4_000);
            config.memory_bytes = Some(u64::from(boxes_max) << 32);
        })
    }

    /// With other settings.
    pub(crate) fn with(change: impl FnOnce(&mut Config)) -> Self {
        let fleet = Fleet::new();
        let root = fleet.dir.path().join("root");
        make_root(&root);
        let objects = format!("dir://{}", fleet.dir.path().join("objects").display());
        fs::create_dir_all(fleet.dir.path().join("objects")).unwrap();
        block_on(async {
            let store = wire_net::objects::open(&objects).unwrap();
            let source = hostd_image::Source::RootfsDir(root);
            let progress = std::sync::Arc::new(());
            hostd_image::prepare(store, "acme", "img", source, progress).await.unwrap();
        });
        let mut config = Config {
            boxes: Boxes::Real,
            objects,
            pool: [4, 0, 0, 0],
            boxes_max: 60,
            uid_base: Some(0x4000_0000),
            ..fleet.config(HOST)
        };
        change(&mut config);
        let mut place = Self { fleet, config, hostd: None };
        place.start_hostd();
        place
    }

    pub(crate) fn start_hostd(&mut self) {
        let path = self.fleet.dir.path().join("hostd.toml");
        fs::write(&path, toml::to_string(&self.config).unwrap()).unwrap();
        let mut hostd = Command::new(std::env::current_exe().unwrap())
            .arg("__hostd")
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(hostd.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("ready hostd "), "{line:?}");
        self.hostd = Some(hostd);
    }

    /// As for an upgrade: it stops by itself, and its boxes run on.
    pub(crate) fn stop_hostd(&mut self) {
        let mut hostd = self.hostd.take().unwrap();
        drop(hostd.stdin.take());
        assert!(hostd.wait().unwrap().success());
    }

    pub(crate) fn kill_hostd(&mut self) {
        let mut hostd = self.hostd.take().unwrap();
        hostd.kill().unwrap();
        hostd.wait().unwrap();
    }

    /// The spawner of this place, by the lock file that it holds.
    pub(crate) fn kill_spawner(&self) {
        let boxes = self.config.state.join("boxes");
        let pids = processes(|pid| {
            let argument = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let holds = fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|fds| {
                fds.flatten()
                    .any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.starts_with(&boxes)))
            });
            holds && argument.windows(9).any(|window| window == b"__spawner")
        });
        // What it forks has its files for a moment.
        let child_of_one = |pid: &&i32| pids.contains(&parent_of(**pid));
        let spawners: Vec<i32> = pids.iter().filter(|pid| !child_of_one(pid)).copied().collect();
        assert_eq!(spawners.len(), 1, "one spawner: {pids:?}");
        let pid = rustix::process::Pid::from_raw(spawners[0]).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }

    /// Holders of image mounts of this place, by the lock file that they hold; their workers are their children.
    pub(crate) fn image_holders(&self) -> Vec<i32> {
        let state = self.config.state.clone();
        processes(|pid| {
            let argument = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            argument.windows(14).any(|window| window == b"__image-holder")
                && fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|fds| {
                    let mut links = fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
                    links.any(|to| to.starts_with(&state))
                })
        })
    }

    /// Where its state is.
    pub(crate) fn state(&self) -> &Path {
        &self.config.state
    }

    /// Where images are stored.
    pub(crate) fn objects(&self) -> PathBuf {
        self.fleet.dir.path().join("objects/objects")
    }

    /// Another host's state: nothing of any image is there.
    pub(crate) fn forget_images(&mut self) {
        self.stop_hostd();
        // Parked boxes have the mounts in their namespaces.
        self.kill_spawner();
        let begun = Instant::now();
        let images = self.config.state.join("images");
        while !self.image_holders().is_empty() {
            assert!(begun.elapsed() < Duration::from_secs(30), "an image holder stays");
            std::thread::sleep(Duration::from_millis(20));
        }
        fs::remove_dir_all(images).unwrap();
        self.start_hostd();
    }

    pub(crate) fn tear_journal(&self, bytes: u64) {
        let path = self.config.state.join("journal");
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        let len = file.metadata().unwrap().len();
        file.set_len(len.saturating_sub(bytes)).unwrap();
    }

    pub(crate) async fn placer(&self) -> Connection {
        self.fleet.placer(HOST, self.config.listen).await
    }

    /// Programs of a name that run in boxes of this place, by their control group.
    pub(crate) fn boxes_of_programs(&self, name: &str) -> usize {
        let group = group_name(&self.config.state);
        let ours = |pid: i32| {
            let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            comm.trim() == name && is_in(pid, &group)
        };
        processes(ours).len()
    }

    /// Waits until so many run: a program that was just executed has its name a moment later.
    pub(crate) fn programs_become(&self, name: &str, wanted: usize) {
        let begun = Instant::now();
        loop {
            let there = self.boxes_of_programs(name);
            if there == wanted {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "{there} of {wanted} {name}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Where this host takes launches.
    pub(crate) fn listens(&self) -> std::net::SocketAddr {
        self.config.listen
    }

    pub(crate) fn descriptors(&self) -> usize {
        let pid = self.hostd.as_ref().unwrap().id();
        fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
    }

    /// Stops the host with all its boxes, and looks that nothing is left.
    pub(crate) fn end(mut self) {
        self.stop_hostd();
        self.config.stop_ends_sandboxes = true;
        self.start_hostd();
        let mut hostd = self.hostd.take().unwrap();
        drop(hostd.stdin.take());
        assert!(hostd.wait().unwrap().success());
        let state = self.config.state.clone();
        let group = group_name(&state);
        let begun = Instant::now();
        loop {
            let left = processes(|pid| is_in(pid, &group));
            let groups = groups_left(&state);
            let holders = self.image_holders();
            let processes = left.len() + holders.len();
            if processes + groups + mounts_of(self.fleet.dir.path()) == 0 {
                return;
            }
            let what = format!(
                "{left:?} processes, {holders:?} image holders, {groups} groups, {} mounts",
                mounts_of(self.fleet.dir.path())
            );
            assert!(begun.elapsed() < Duration::from_secs(30), "left: {what}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // After a failed test: its spawner ends with the last hostd that asks it to.
        if let Some(mut hostd) = self.hostd.take() {
            let _ = hostd.kill();
            let _ = hostd.wait();
            self.config.stop_ends_sandboxes = true;
            if std::thread::panicking() {
                self.start_hostd();
                if let Some(mut hostd) = self.hostd.take() {
                    drop(hostd.stdin.take());
                    let _ = hostd.wait();
                }
            }
        }
    }
}

fn parent_of(pid: i32) -> i32 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name, in brackets, may hold blanks.
    let rest = stat.rsplit(") ").next().unwrap_or_default();
    rest.split(' ').nth(1).and_then(|ppid| ppid.parse().ok()).unwrap_or(0)
}

/// Mounts below a directory.
fn mounts_of(dir: &Path) -> usize {
    let dir = dir.display().to_string();
    let all = fs::read_to_string("/proc/self/mounts").unwrap();
    all.lines().filter(|line| line.split(' ').nth(1).is_some_and(|at| at.starts_with(&dir))).count()
}

fn group_name(state: &Path) -> String {
    hostd_sandbox::Config::new(state.join("boxes"), Vec::new()).group_name()
}

fn is_in(pid: i32, group: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|text| text.contains(group))
}

/// Control groups of a state directory's spawner.
fn groups_left(state: &Path) -> usize {
    fn walk(dir: &Path, name: &str, depth: usize) -> usize {
        let Ok(entries) = fs::read_dir(dir) else { return 0 };
        let dirs = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()));
        dirs.map(|entry| {
            let ours = entry.file_name().to_string_lossy().starts_with(name);
            usize::from(ours) + if depth > 0 { walk(&entry.path(), name, depth - 1) } else { 0 }
        })
        .sum()
    }
    walk(Path::new("/sys/fs/cgroup"), &group_name(state), 4)
}

pub(crate) fn processes(wanted: impl Fn(i32) -> bool) -> Vec<i32> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| entry.file_name().to_string_lossy().parse::<i32>().ok())
        .filter(|pid| wanted(*pid))
        .collect()
}

fn make_root(root: &Path) {
    for program in PROGRAMS {
        let found = ["/bin", "/usr/bin"].iter().map(|dir| Path::new(dir).join(program));
        if let Some(path) = found.into_iter().find(|path| path.exists()) {
            install(root, &path, program);
        }
    }
    for dir in ["etc", "tmp", "root", "proc", "dev", "sys"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\n").unwrap();
}

fn install(root: &Path, program: &Path, name: &str) {
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::copy(program, root.join("bin").join(name)).unwrap();
    let ldd = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8_lossy(&ldd.stdout).into_owned();
    let libraries: BTreeSet<&str> =
        text.split_whitespace().filter(|word| word.starts_with('/')).collect();
    for library in libraries {
        let to: PathBuf = root.join(library.trim_start_matches('/'));
        if !to.exists() {
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::copy(fs::canonicalize(library).unwrap(), &to).unwrap();
        }
    }
}

pub(crate) fn fault_of(reply: &LaunchReply) -> &Fault {
    match reply {
        LaunchReply::Failed(fault) => fault,
        other => panic!("not failed: {other:?}"),
    }
}

pub(crate) async fn exited(connection: &Connection, id: SandboxId) -> Exit {
    match call(connection, &Call::Wait(id)).await.unwrap() {
        Answer::Exited(exit) => exit,
        other => panic!("{other:?}"),
    }
}

type Said = (String, String, Option<Exit>);

async fn all(recv: &mut RecvStream) -> Said {
    let (mut out, mut err, mut exit) = (Vec::new(), Vec::new(), None);
    let mut scratch = BytesMut::new();
    while let Some((kind, payload)) = stream::read_frame(recv, &mut scratch).await.unwrap() {
        match kind {
            Kind::Stdout => out.extend_from_slice(&payload),
            Kind::Stderr => err.extend_from_slice(&payload),
            Kind::Exit => exit = Some(Exit::from_frame_bytes(&payload).unwrap()),
            other => panic!("{other:?}"),
        }
    }
    (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap(), exit)
}

pub(crate) async fn attach_all(
    connection: &Connection,
    sandbox: SandboxId,
    process: u32,
    offset: u64,
) -> Said {
    let attach = Call::Attach { sandbox, process, offset, follow: true };
    let (_, _send, mut recv) = stream::open_on_behalf(connection, "acme", &attach).await.unwrap();
    all(&mut recv).await
}

pub(crate) async fn exec_all(connection: &Connection, exec: ExecRequest, input: &[u8]) -> Said {
    let call = Call::Exec(exec);
    let (_, mut send, mut recv) = stream::open_on_behalf(connection, "acme", &call).await.unwrap();
    let feed = async {
        for piece in input.chunks(50_000) {
            stream::write_frame(&mut send, Kind::Stdin, piece).await.unwrap();
        }
        // What was given no input has ended by then, perhaps with its stream.
        let _ = stream::write_frame(&mut send, Kind::End, &[]).await;
    };
    let ((), said) = tokio::join!(feed, all(&mut recv));
    said
}

pub(crate) async fn read_until(recv: &mut RecvStream, said: &mut String, wanted: &str) {
    let mut scratch = BytesMut::new();
    while !said.contains(wanted) {
        let frame = stream::read_frame(recv, &mut scratch);
        let frame = tokio::time::timeout(Duration::from_secs(60), frame).await;
        match frame.expect(said).unwrap() {
            Some((Kind::Stdout, payload)) => said.push_str(&String::from_utf8_lossy(&payload)),
            other => panic!("{other:?} after {said:?}"),
        }
    }
}

pub(crate) async fn write_file(
    connection: &Connection,
    sandbox: SandboxId,
    path: &str,
    bytes: &[u8],
) -> Result<(), Fault> {
    let op = FileOp::Write { path: path.into(), mode: 0o640 };
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    let call = Call::File { sandbox, op }.to_bytes();
    stream::write_frame(&mut send, Kind::OnBehalf, b"acme").await?;
    stream::write_frame(&mut send, Kind::Call, &call).await?;
    for piece in bytes.chunks(100_000) {
        stream::write_frame(&mut send, Kind::Data, piece).await?;
    }
    stream::write_frame(&mut send, Kind::End, &[]).await?;
    let answer = stream::expect_frame(&mut recv, Kind::Answer).await?;
    match Answer::from_bytes(&answer).unwrap() {
        Answer::Done => Ok(()),
        Answer::Fault(fault) => Err(fault),
        other => panic!("{other:?}"),
    }
}

pub(crate) async fn read_file(
    connection: &Connection,
    sandbox: SandboxId,
    path: &str,
) -> Result<Vec<u8>, Fault> {
    let op = FileOp::Read(path.into());
    let call = Call::File { sandbox, op };
    let (_, _send, mut recv) = stream::open_on_behalf(connection, "acme", &call).await?;
    let mut bytes = Vec::new();
    let mut scratch = BytesMut::new();
    loop {
        match stream::read_frame(&mut recv, &mut scratch).await? {
            Some((Kind::Data, payload)) => bytes.extend_from_slice(&payload),
            Some((Kind::End, _)) => return Ok(bytes),
            other => panic!("{other:?}"),
        }
    }
}

/// Says a line to the main program and hears one.
pub(crate) async fn converse(connection: &Connection, sandbox: SandboxId, word: &str) -> String {
    let attach = Call::Attach { sandbox, process: 0, offset: 0, follow: true };
    let (_, mut send, mut recv) =
        stream::open_on_behalf(connection, "acme", &attach).await.unwrap();
    let line = format!("{word}\n");
    stream::write_frame(&mut send, Kind::Stdin, line.as_bytes()).await.unwrap();
    let mut said = String::new();
    read_until(&mut recv, &mut said, &format!("{}\n", word.to_uppercase())).await;
    said.lines().last().unwrap_or_default().to_owned()
}

/// What a watch tells, to its end.
pub(crate) async fn read_changes(recv: &mut RecvStream) -> Vec<(ChangeKind, String)> {
    let (mut changes, mut scratch) = (Vec::new(), BytesMut::new());
    loop {
        let frame = stream::read_frame(recv, &mut scratch);
        match tokio::time::timeout(Duration::from_secs(60), frame).await.unwrap().unwrap() {
            Some((Kind::Data, payload)) => {
                let change = FileChange::from_frame_bytes(&payload).unwrap();
                changes.push((change.kind, String::from_utf8(change.name).unwrap()));
            }
            Some((Kind::End, _)) => return changes,
            other => panic!("{other:?} after {changes:?}"),
        }
    }
}
