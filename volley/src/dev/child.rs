//! A role as a child process: started, ready, stopped, and its log at hand when it does not come up.
//!
//! Children are process groups of their own, so that Ctrl-C reaches `volley dev` alone and it can stop them in order;
//! they ask the kernel for a signal at their parent's death, so that none outlives a `kill -9`. Left out: restarting
//! a child that crashed. A dev fleet shows its crashes.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use wire::Code;

use crate::{dev::fleet::RoleFile, failure::Failure};

/// Time for a role to be ready. It takes milliseconds; a machine under load takes longer.
const READY_MAX: Duration = Duration::from_secs(20);

/// Time for a role to stop before it is killed: it promises 2 s, on a machine that has time for it.
const STOP_MAX: Duration = Duration::from_secs(10);

/// Lines of a log that are shown with a failure.
const LOG_LINES: usize = 12;

/// Restarts of one role before the fleet is given up.
const RESTARTS_MAX: u32 = 5;

/// One role that runs.
#[derive(Debug)]
pub(crate) struct Role {
    file: RoleFile,
    log: PathBuf,
    child: Child,
    ready: mpsc::Receiver<String>,
    restarts: u32,
}

impl Role {
    /// Starts `volley <role> --config FILE`, logging to `log`.
    pub(crate) fn start(file: &RoleFile, log: &Path) -> Result<Self, Failure> {
        let (child, ready) = spawn(file, log, File::create(log))?;
        Ok(Self { file: file.clone(), log: log.to_owned(), child, ready, restarts: 0 })
    }

    /// Starts it again if it ended by itself, and says so.
    pub(crate) fn keep_running(&mut self) -> Result<(), Failure> {
        let Some(status) = self.child.try_wait().ok().flatten() else { return Ok(()) };
        if self.restarts == RESTARTS_MAX {
            return Err(self.failed(&format!("it ended by itself again ({status})")));
        }
        self.restarts += 1;
        eprintln!("volley dev: {} ended by itself ({status}); starting it again", self.file.name);
        let log = File::options().append(true).create(true).open(&self.log);
        (self.child, self.ready) = spawn(&self.file, &self.log, log)?;
        Ok(())
    }

    /// Waits for the role's `ready` line.
    pub(crate) fn wait_ready(&mut self) -> Result<(), Failure> {
        match self.ready.recv_timeout(READY_MAX) {
            Ok(_line) => Ok(()),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                Err(self.failed(&format!("not ready after {} s", READY_MAX.as_secs())))
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let status = self.child.wait().map_or_else(|e| e.to_string(), |s| s.to_string());
                Err(self.failed(&format!("it ended before it was ready ({status})")))
            }
        }
    }

    /// A failure with the end of the role's log.
    fn failed(&self, what: &str) -> Failure {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n  ");
        // The role's own error says best what is wrong.
        let code = lines
            .iter()
            .rev()
            .find_map(|line| line.strip_prefix("error[")?.split(']').next())
            .and_then(|name| Code::ALL.iter().copied().find(|code| code.name() == name))
            .unwrap_or(Code::Internal);
        Failure::new(code, format!("{}: {what}; the end of its log:\n  {tail}", self.file.name))
            .hint(format!("the whole log is {}", self.log.display()))
    }

    /// The process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process, for a bench that counts its processor time: hostds are counted together.
    pub(crate) fn metered(&self) -> bench::launch::RolePid {
        let role = self.file.name.split('-').next().unwrap_or_default().to_owned();
        bench::launch::RolePid { role, pid: self.pid() }
    }

    /// Its name in messages and in the names of its files.
    pub(crate) fn name(&self) -> &str {
        &self.file.name
    }

    /// Asks it to stop.
    pub(crate) fn ask_to_stop(&self) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            // It may have ended by itself; it is not reaped yet, so that its pid is still its own.
            let _ = kill_process(pid, Signal::TERM);
        }
    }

    /// Waits until it stopped; kills it if it does not.
    pub(crate) fn wait_stopped(&mut self) {
        let deadline = Instant::now() + STOP_MAX;
        while let Ok(None) = self.child.try_wait() {
            if Instant::now() >= deadline {
                eprintln!("volley dev: {} does not stop; killing it", self.file.name);
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        self.ask_to_stop();
        self.wait_stopped();
    }
}

fn spawn(
    file: &RoleFile,
    log_path: &Path,
    log: std::io::Result<File>,
) -> Result<(Child, mpsc::Receiver<String>), Failure> {
    let fail = |error| Failure::io(format!("cannot start {}", file.name), &error);
    let log = log.map_err(|error| Failure::io(log_path.display(), &error))?;
    let exe = std::env::current_exe().map_err(fail)?;
    let mut child = Command::new(exe)
        .arg(file.role)
        .arg("--with-parent")
        .arg("--config")
        .arg(&file.config)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .process_group(0)
        .spawn()
        .map_err(fail)?;
    let ready = watch(child.stdout.take());
    Ok((child, ready))
}

/// Passes on the `ready` line; the channel closes with the child's output.
fn watch(stdout: Option<ChildStdout>) -> mpsc::Receiver<String> {
    let (to, from) = mpsc::sync_channel(1);
    if let Some(stdout) = stdout {
        std::thread::spawn(move || {
            // Read to the end, so that a role that says more never meets a closed pipe.
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if line.starts_with("ready ") {
                    let _ = to.try_send(line);
                }
            }
        });
    }
    from
}
