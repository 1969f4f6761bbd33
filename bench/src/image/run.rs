//! Runs the program in a root: in an overlay of an image, in a plain directory, under crun or runc. What is measured is
//! the time until its first byte of output.

use std::{
    ffi::OsStr,
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use hostd_image::MountedImage;
use wire::{Code, Fault};

use super::tree::{PROGRAM, SHELL_PROGRAM, io_fault};

/// Runs a command until it has said something. Gives the time until then.
fn first_output(command: &mut Command) -> Result<Duration, Fault> {
    let fault = |error| io_fault("the program", &error);
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(fault)?;
    let mut said = [0; 16];
    let len = match child.stdout.take() {
        Some(mut stdout) => stdout.read(&mut said).map_err(fault)?,
        None => 0,
    };
    let took = started.elapsed();
    let done = child.wait_with_output().map_err(fault)?;
    if !said[..len].starts_with(b"ready") {
        let why = String::from_utf8_lossy(&done.stderr).into_owned();
        return Err(Fault::new(Code::Internal, format!("the program said nothing: {why}")));
    }
    Ok(took)
}

/// What is run in a root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Program {
    /// The Python program, by this interpreter.
    Python(PathBuf),
    /// The one of the smallest image.
    Shell,
}

impl Program {
    fn words(&self) -> Vec<&OsStr> {
        match self {
            Self::Python(python) => {
                let options = ["-I", "-S", "-c", PROGRAM].map(OsStr::new);
                [python.as_os_str()].into_iter().chain(options).collect()
            }
            Self::Shell => ["/bin/busybox", "sh", "-c", SHELL_PROGRAM].map(OsStr::new).to_vec(),
        }
    }
}

/// In a directory as its root.
pub(super) fn in_root(root: &Path, program: &Program) -> Result<Duration, Fault> {
    let mut command = Command::new("chroot");
    command.arg(root).args(program.words());
    first_output(&mut command)
}

/// In an overlay of a mounted image, which is taken away again. Gives the time from before the overlay.
pub(super) fn in_image(image: &MountedImage, program: &Program) -> Result<Duration, Fault> {
    let target = tempfile::tempdir().map_err(|error| io_fault("scratch directory", &error))?;
    let started = Instant::now();
    hostd_image::mount_overlay(image.layers(), target.path())
        .map_err(|error| io_fault("the overlay", &error))?;
    let mounted = started.elapsed();
    let ran = in_root(target.path(), program);
    hostd_image::unmount(target.path()).map_err(|error| io_fault("the overlay", &error))?;
    Ok(mounted + ran?)
}

/// A container runner of this machine, with a bundle of its own.
#[derive(Debug)]
pub(super) struct Runner {
    pub(super) name: &'static str,
    args: Vec<&'static str>,
    bundle: PathBuf,
    runs: u32,
}

impl Runner {
    /// A runner that gets the program to say something in `root`; `None` if this machine has none that does.
    pub(super) fn find(root: &Path, python: &Path, dir: &Path) -> Option<Self> {
        let ways: [(&'static str, &[&'static str]); 3] =
            [("crun", &[]), ("crun", &["--cgroup-manager=disabled"]), ("runc", &[])];
        for (n, (name, args)) in ways.into_iter().enumerate() {
            let bundle = dir.join(format!("bundle-{n}"));
            let made = bundle_of(name, &bundle, root, python);
            let mut runner = Self { name, args: args.to_vec(), bundle, runs: 0 };
            if made.is_some() && runner.run().is_ok() {
                return Some(runner);
            }
        }
        None
    }

    /// Runs the program once more.
    pub(super) fn run(&mut self) -> Result<Duration, Fault> {
        self.runs += 1;
        let id = format!("volley-bench-{}-{}", std::process::id(), self.runs);
        let mut command = Command::new(self.name);
        command.args(&self.args).arg("run").arg("--bundle").arg(&self.bundle).arg(&id);
        let ran = first_output(&mut command);
        let _ = Command::new(self.name)
            .args(["delete", "--force", &id])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        ran
    }
}

fn bundle_of(name: &str, bundle: &Path, root: &Path, python: &Path) -> Option<()> {
    fs::create_dir_all(bundle).ok()?;
    let made = Command::new(name).arg("spec").current_dir(bundle).output().ok()?;
    let path = bundle.join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
    config["process"]["terminal"] = false.into();
    config["process"]["args"] = serde_json::json!([python.to_str()?, "-I", "-S", "-c", PROGRAM]);
    config["root"]["path"] = root.to_str()?.into();
    config["root"]["readonly"] = true.into();
    fs::write(path, serde_json::to_vec(&config).ok()?).ok()?;
    made.status.success().then_some(())
}
