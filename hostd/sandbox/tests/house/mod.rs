//! What the tests of boxes share: a runner, a root made of the machine's own shell, a spawner.
//!
//! Tests of this crate bring their own `main`, because a spawner is a re-exec of the running binary.

#![allow(clippy::unwrap_used, reason = "tests; clippy does not see that without the usual harness")]
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use hostd_sandbox::{
    ClaimError, ClaimSpec, Config, Event, Events, Exited, Joined, Limits, Program, RootSpec,
    Running, SandboxId, Shape, Spawner,
};

/// Programs of the machine that the test root gets, with their libraries.
const PROGRAMS: &[&str] = &[
    "sh", "ls", "cat", "id", "sleep", "head", "tail", "true", "false", "mkdir", "mv", "rm", "ln",
    "stat", "wc", "tr", "dd", "env", "stty", "tty", "hostname", "readlink", "touch", "chmod",
    "chown", "kill", "ps", "grep", "seq", "date", "uname", "pwd",
];

/// Runs tests one after another; with an argument, those whose name holds it.
pub(crate) fn run(tests: &[(&'static str, fn())]) {
    hostd_sandbox::main_if_asked();
    let wanted = std::env::args().nth(1).filter(|a| !a.starts_with('-'));
    if std::env::args().any(|a| a == "--list") {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        println!("skipped: boxes need root");
        return;
    }
    let mut failed = Vec::new();
    for (name, test) in tests {
        if wanted.as_ref().is_some_and(|w| !name.contains(w.as_str())) {
            continue;
        }
        let start = std::time::Instant::now();
        let done = watchdog(name);
        let outcome = std::panic::catch_unwind(test);
        drop(done);
        let word = if outcome.is_ok() { "ok" } else { "FAILED" };
        println!("test {name} ... {word} ({} ms)", start.elapsed().as_millis());
        if outcome.is_err() {
            failed.push(*name);
        }
    }
    assert!(failed.is_empty(), "failed: {failed:?}");
}

/// Spawners of this run, for the watchdog.
static SPAWNERS: std::sync::Mutex<Vec<u32>> = std::sync::Mutex::new(Vec::new());

/// Ends the run, and its spawners with their boxes, if a test does not end in time. Call off by drop.
fn watchdog(name: &'static str) -> std::sync::mpsc::Sender<()> {
    let (sender, ended) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        let late = ended.recv_timeout(Duration::from_secs(180));
        if late == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            println!("test {name} ... HANGS");
            for pid in SPAWNERS.lock().unwrap().iter() {
                let pid = rustix::process::Pid::from_raw(i32::try_from(*pid).unwrap()).unwrap();
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
            std::process::exit(1);
        }
    });
    sender
}

/// Puts a program and the libraries that it names into a root.
pub(crate) fn install(root: &Path, program: &Path, name: &str) {
    let target = root.join("bin").join(name);
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::copy(program, &target).unwrap();
    let ldd = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8_lossy(&ldd.stdout).into_owned();
    let libraries: BTreeSet<&str> =
        text.split_whitespace().filter(|w| w.starts_with('/')).collect();
    for library in libraries {
        let to = root.join(library.trim_start_matches('/'));
        if !to.exists() {
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::copy(fs::canonicalize(library).unwrap(), &to).unwrap();
        }
    }
}

/// A root directory with a shell and a few tools, owned by root, removed at the end.
pub(crate) fn root() -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("volley-root").tempdir().unwrap();
    set_mode(dir.path(), 0o755);
    for program in PROGRAMS {
        let found = ["/bin", "/usr/bin"].iter().map(|d| Path::new(d).join(program));
        if let Some(path) = found.into_iter().find(|p| p.exists()) {
            install(dir.path(), &path, program);
        }
    }
    for (name, mode) in [("etc", 0o755), ("tmp", 0o1777), ("root", 0o700), ("home", 0o755)] {
        fs::create_dir_all(dir.path().join(name)).unwrap();
        set_mode(&dir.path().join(name), mode);
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33:web:/home:/bin/sh\n";
    fs::write(dir.path().join("etc/passwd"), passwd).unwrap();
    fs::write(dir.path().join("etc/group"), "root:x:0:\nweb:x:33:\nlog:x:40:web\n").unwrap();
    dir
}

/// Sets a file's mode.
pub(crate) fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Apart from any other spawner of the machine.
pub(crate) const UID_BASE: u32 = 0x3000_0000;

/// A shape for tests.
pub(crate) fn shape(parked: u32) -> Shape {
    Shape { name: "small".into(), cpu_millis: 1000, memory_bytes: 96 << 20, pids: 48, parked }
}

/// A spawner of its own, shut down with everything at the end.
pub(crate) struct Place {
    pub(crate) spawner: Spawner,
    pub(crate) events: Events,
    pub(crate) config: Config,
    pub(crate) root: PathBuf,
    _root: tempfile::TempDir,
    _state: tempfile::TempDir,
    next: u8,
    /// Ends of sandboxes that nobody has asked for yet.
    ended: Vec<Exited>,
}

/// Starts one.
pub(crate) fn place(parked: u32) -> Place {
    let root = root();
    let state = tempfile::Builder::new().prefix("volley-state").tempdir().unwrap();
    let config = Config {
        slots: 64,
        linger_s: 20,
        uid_base: UID_BASE,
        ..Config::new(state.path().join("s"), vec![shape(parked)])
    };
    let Joined { spawner, events, started, .. } = Spawner::connect_or_start(&config).unwrap();
    assert!(started);
    SPAWNERS.lock().unwrap().push(spawner.pid());
    let path = root.path().to_path_buf();
    Place {
        spawner,
        events,
        config,
        root: path,
        _root: root,
        _state: state,
        next: 0,
        ended: Vec::new(),
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = wait(self.spawner.shutdown(true));
        SPAWNERS.lock().unwrap().retain(|pid| *pid != self.spawner.pid());
    }
}

/// Runs a future to its end on this thread.
pub(crate) fn wait<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(30), future).await.expect("30 s are over")
    })
}

impl Place {
    pub(crate) fn id(&mut self) -> SandboxId {
        self.next += 1;
        [self.next; 16]
    }

    pub(crate) fn spec(&mut self, program: Program) -> ClaimSpec {
        ClaimSpec {
            id: self.id(),
            shape: "small".into(),
            root: RootSpec::directory(&self.root).unwrap(),
            program,
            hostname: String::new(),
            limits: Limits::default(),
            network: None,
        }
    }

    pub(crate) fn claim(&mut self, program: Program) -> Result<Running, ClaimError> {
        let spec = self.spec(program);
        wait(self.spawner.claim(spec))
    }

    /// Runs a shell line to its end: stdout, stderr, how it ended.
    pub(crate) fn shell(&mut self, line: &str) -> (String, String, Exited) {
        let running = self.claim(Program::new(["sh", "-c", line])).unwrap();
        self.finish(running)
    }

    pub(crate) fn finish(&mut self, running: Running) -> (String, String, Exited) {
        let stdout = read_all(running.stdio.stdout.unwrap());
        let stderr = read_all(running.stdio.stderr.unwrap());
        (stdout, stderr, self.exited(running.id))
    }

    /// Waits for a sandbox's end and forgets it.
    pub(crate) fn exited(&mut self, id: SandboxId) -> Exited {
        let early = self.ended.iter().position(|e| e.id == id).map(|at| self.ended.remove(at));
        let exited = early.unwrap_or_else(|| {
            loop {
                match wait(self.events.recv()).expect("events ended") {
                    Event::Exited(e) if e.id == id => break e,
                    Event::Exited(e) => self.ended.push(e),
                    Event::Gone => panic!("the spawner is gone"),
                    _ => {}
                }
            }
        });
        wait(self.spawner.forget(id)).unwrap();
        exited
    }
}

/// Reads a descriptor to its end.
pub(crate) fn read_all(fd: OwnedFd) -> String {
    let mut bytes = Vec::new();
    let _ = fs::File::from(fd).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}
