//! A fleet made by `volley init` and started role by role, as an operator does: without hosts, then with one.

use std::{
    io::{BufRead as _, BufReader},
    net::{SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::Signal;
use tests::fleet::{Ran, signal, volley};

/// A role that is stopped when the test ends.
struct Role(Child);

impl Role {
    /// Starts a role on the settings that `init` wrote, with the places of this test over them.
    fn start(role: &str, config: &Path, more: &[String]) -> Self {
        let mut command = Command::new(volley());
        command.arg(role).arg("--config").arg(config).args(more).stdout(Stdio::piped());
        let mut child = command.spawn().expect("volley runs");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("its output is ours");
        BufReader::new(stdout).read_line(&mut line).expect("it says that it is ready");
        assert!(line.starts_with("ready "), "{role}: {line:?}");
        Self(child)
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        signal(self.0.id(), Signal::TERM);
        let deadline = Instant::now() + Duration::from_secs(10);
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A local address with a port that was free a moment ago.
fn free() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("loopback has ports");
    socket.local_addr().expect("it is bound")
}

fn member(fleet: &Path, prefix: &str) -> PathBuf {
    let entries = std::fs::read_dir(fleet).expect("the fleet is there").flatten();
    let mut found = entries.map(|entry| entry.path()).filter(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))
    });
    found.next().unwrap_or_else(|| panic!("{prefix} was made"))
}

#[test]
fn a_fleet_without_hosts_says_so_and_takes_the_first_that_comes() {
    let scratch = tempfile::tempdir().unwrap();
    let fleet = scratch.path().join("fleet");
    let state = |name: &str| format!("--state={}", scratch.path().join(name).display());
    let objects = format!("dir://{}", scratch.path().join("objects").display());
    let store = format!("embedded://{}", scratch.path().join("store").display());
    let mut init = Command::new(volley());
    init.arg("init").arg(&fleet).args(["--hosts", "1", "--tenant", "acme"]);
    let _ = Ran::of(init.args(["--objects", &objects, "--store", &store])).assert_done();

    let (admin, udp, placer, host) = (free(), free(), free(), free());
    let no_ops = "--set=ops=127.0.0.1:0".to_owned();
    let config = member(&fleet, "aggregator-").join("heartbeatd.toml");
    let more = [
        state("heartbeatd"),
        format!("--listen={admin}"),
        format!("--udp={udp}"),
        "--publish-ms=100".to_owned(),
        no_ops.clone(),
    ];
    let _heartbeatd = Role::start("heartbeatd", &config, &more);
    let config = member(&fleet, "placer-").join("placerd.toml");
    let more = [
        state("placerd"),
        format!("--listen={placer}"),
        format!("--aggregator={udp}"),
        format!("--set=admin=['{admin}']"),
        "--set=map_refresh_ms=100".to_owned(),
        no_ops.clone(),
    ];
    let _placerd = Role::start("placerd", &config, &more);

    let client = member(&fleet, "tenant-acme").join("client.toml");
    let run = || {
        let mut run = Command::new(volley());
        run.args(["run", "-d", "--image", "any", "--budget", "2s", "--placer"]);
        Ran::of(run.arg(placer.to_string()).arg("--client").arg(&client))
    };
    run().assert_error("no-hosts", 5);

    let config = member(&fleet, "host-").join("hostd.toml");
    let more = [
        state("hostd"),
        format!("--listen={host}"),
        format!("--aggregator={udp}"),
        "--boxes=none".to_owned(),
        no_ops,
    ];
    let _hostd = Role::start("hostd", &config, &more);
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let ran = run();
        if ran.code == Some(0) {
            assert!(ran.stdout.starts_with("sb-"), "{ran:?}");
            return;
        }
        assert_eq!(ran.code, Some(5), "{ran:?}");
        assert!(Instant::now() < deadline, "{ran:?}");
    }
}
