//! An aggregator as a process of its own, to be stopped and killed.

use std::{
    fmt::Write as _,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
};

use super::{Fleet, engines::s3::free_port};

pub(crate) struct Aggregator {
    child: Child,
    pub(crate) udp: SocketAddr,
    pub(crate) admin: SocketAddr,
    ops: u16,
}

impl Drop for Aggregator {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Aggregator {
    pub(crate) fn start(fleet: &Fleet, id: u64, objects: &str) -> Self {
        let config = fleet.config(id);
        let local = || SocketAddr::from(([127, 0, 0, 1], free_port()));
        let (udp, admin, ops) = (local(), local(), free_port());
        let mut text = String::new();
        for (key, value) in [
            ("identity", config.identity.display().to_string()),
            ("fleet", config.fleet.display().to_string()),
            ("listen", admin.to_string()),
            ("udp", udp.to_string()),
            ("ops", format!("127.0.0.1:{ops}")),
            ("store", fleet.store.clone()),
            ("objects", objects.to_owned()),
        ] {
            writeln!(text, "{key} = {value:?}").unwrap();
        }
        writeln!(text, "receivers = 1\npublish_ms = 100\nflush_ms = 100\nscan_ms = 500").unwrap();
        let file = fleet.dir.path().join(format!("aggregator-{id}.toml"));
        std::fs::write(&file, text).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_heartbeatd"))
            .arg(file)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line.trim(), format!("ready heartbeatd {udp}"));
        Self { child, udp, admin, ops }
    }

    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status();
        assert!(sent.unwrap().success(), "kill -s {name}");
    }

    /// One figure of `/metrics`.
    pub(crate) fn figure(&self, name: &str) -> Option<u64> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.ops)).ok()?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }
}
