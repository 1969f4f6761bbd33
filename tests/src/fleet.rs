//! A fleet of real processes for a test: `volley dev` in a scratch directory, and `volley` commands against it.
//!
//! The binary is the one that `VOLLEY_BIN` names, else it is built. A fleet is stopped when its value is dropped, as a
//! person stops it, and what it leaves behind can be asked for. Left out: anything that a person could not do.

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{OnceLock, mpsc},
    time::{Duration, Instant},
};

use cargo_metadata::Message;
use rustix::process::{Pid, Signal, kill_process};

/// Time for a dev fleet to come up on a busy machine, image and first launch included.
const UP_MAX: Duration = Duration::from_secs(120);

/// Time for it to stop.
const DOWN_MAX: Duration = Duration::from_secs(30);

/// The `volley` binary.
///
/// # Panics
/// If it cannot be built.
pub fn volley() -> &'static Path {
    static BIN: OnceLock<PathBuf> = OnceLock::new();
    BIN.get_or_init(|| std::env::var_os("VOLLEY_BIN").map_or_else(build, PathBuf::from))
}

fn build() -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["build", "--quiet", "--package", "volley", "--message-format=json"])
        .stderr(Stdio::inherit())
        .output()
        .expect("cargo runs");
    let messages = Message::parse_stream(output.stdout.as_slice());
    let built = messages.filter_map(Result::ok).find_map(|message| match message {
        Message::CompilerArtifact(artifact) => artifact.executable,
        _ => None,
    });
    built.expect("cargo built the binary `volley`").into_std_path_buf()
}

/// Whether this process may make real sandboxes; prints why not.
#[must_use]
pub fn can_box() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: real sandboxes need root");
    }
    root
}

/// A dev fleet that is up.
#[derive(Debug)]
pub struct Fleet {
    dev: Child,
    state: PathBuf,
    lines: mpsc::Receiver<String>,
    /// What it printed until it was up.
    pub said: Vec<String>,
    _scratch: tempfile::TempDir,
}

impl Fleet {
    /// Brings up a fleet and waits until it stays up.
    ///
    /// # Panics
    /// If it does not come up, with all that it said.
    #[must_use]
    pub fn up(flags: &[&str]) -> Self {
        Self::up_with(flags, &[])
    }

    /// As [`Fleet::up`], with variables in the environment of its roles: `VOLLEY_<ROLE>_<KEY>`.
    ///
    /// # Panics
    /// If it does not come up, with all that it said.
    #[must_use]
    pub fn up_with(flags: &[&str], variables: &[(&str, &str)]) -> Self {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let state = scratch.path().join("dev");
        let mut dev = Command::new(volley())
            .arg("dev")
            .arg("--state")
            .arg(&state)
            .args(flags)
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("volley runs");
        let (to, lines) = mpsc::sync_channel(1_024);
        let stdout = dev.stdout.take().expect("its output is ours");
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = to.try_send(line);
            }
        });
        let mut fleet = Self { dev, state, lines, said: Vec::new(), _scratch: scratch };
        fleet.read_until_up();
        fleet
    }

    fn read_until_up(&mut self) {
        let deadline = Instant::now() + UP_MAX;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    let up = line.contains("the fleet stays up");
                    self.said.push(line);
                    if up {
                        return;
                    }
                }
                Err(_) => panic!("the fleet is not up:\n{}\n{}", self.said.join("\n"), self.logs()),
            }
        }
    }

    /// The end of every role's log.
    #[must_use]
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for entry in fs::read_dir(self.state.join("log")).into_iter().flatten().flatten() {
            let log = fs::read_to_string(entry.path()).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(20)..];
            text += &format!("--- {}\n{}\n", entry.path().display(), tail.join("\n"));
        }
        text
    }

    /// Its state directory.
    #[must_use]
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Its client file.
    #[must_use]
    pub fn client(&self) -> PathBuf {
        self.state.join("client.toml")
    }

    /// A `volley` command against it.
    pub fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(volley());
        command.args(args).env("VOLLEY_CLIENT", self.client()).stdin(Stdio::null());
        command
    }

    /// Runs a command against it to its end.
    ///
    /// # Panics
    /// If the command cannot be started.
    pub fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Ran {
        Ran::of(&mut self.command(args))
    }

    /// Process ids of its roles by name, as its first line says them.
    ///
    /// # Panics
    /// If it did not say them.
    #[must_use]
    pub fn pids(&self, role: &str) -> Vec<u32> {
        let line = self.said.iter().find(|line| line.starts_with("fleet up")).expect("it says so");
        let roles = line.split_once('(').and_then(|(_, roles)| roles.strip_suffix(')'));
        let roles = roles.expect("roles stand in brackets").split(", ");
        roles
            .filter_map(|named| named.split_once(' '))
            .filter(|(name, _)| name.split('-').next() == Some(role))
            .map(|(_, pid)| pid.parse().expect("a pid is a number"))
            .collect()
    }

    /// Every process of it: its roles and all that they started.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        let parents: Vec<(u32, u32)> = fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter_map(|pid| Some((pid, parent(pid)?)))
            .collect();
        let mut found = vec![self.dev.id()];
        let mut at = 0;
        while let Some(of) = found.get(at).copied() {
            found.extend(parents.iter().filter(|(_, parent)| *parent == of).map(|(pid, _)| *pid));
            at += 1;
        }
        found
    }

    /// Stops it as Ctrl-C does and gives back its exit code.
    ///
    /// # Panics
    /// If it does not stop.
    pub fn stop(mut self) -> Option<i32> {
        self.ask_to_stop();
        self.wait()
    }

    fn ask_to_stop(&self) {
        signal(self.dev.id(), Signal::INT);
    }

    fn wait(&mut self) -> Option<i32> {
        let deadline = Instant::now() + DOWN_MAX;
        loop {
            if let Some(status) = self.dev.try_wait().expect("it is ours") {
                return status.code();
            }
            assert!(Instant::now() < deadline, "volley dev does not stop:\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if matches!(self.dev.try_wait(), Ok(None)) {
            self.ask_to_stop();
            let deadline = Instant::now() + DOWN_MAX;
            while matches!(self.dev.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
            let _ = self.dev.kill();
            let _ = self.dev.wait();
        }
    }
}

/// The parent of a process: the second field after its name, which may hold anything.
fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

/// Sends a signal to a process that this test started.
pub fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// A command that ended.
#[derive(Debug)]
pub struct Ran {
    /// Its exit code.
    pub code: Option<i32>,
    /// Its output.
    pub stdout: String,
    /// Its error output.
    pub stderr: String,
}

impl Ran {
    /// Runs it to its end.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn of(command: &mut Command) -> Self {
        let Output { status, stdout, stderr } = command.output().expect("the command starts");
        Self {
            code: status.code(),
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        }
    }

    /// Asserts that it failed with this code and status, and a hint.
    ///
    /// # Panics
    /// If it did not.
    pub fn assert_error(&self, name: &str, exit: i32) {
        assert_eq!(self.code, Some(exit), "{self:?}");
        assert!(self.stderr.contains(&format!("error[{name}]: ")), "{self:?}");
        assert!(self.stderr.contains("hint: "), "{self:?}");
    }

    /// Asserts that it was done, and gives back its output.
    ///
    /// # Panics
    /// If it was not.
    #[must_use]
    pub fn assert_done(&self) -> &str {
        assert_eq!(self.code, Some(0), "{self:?}");
        &self.stdout
    }
}
