//! A real Apache Cassandra of a test's own, on free ports, stopped by its pid.

use std::{
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

pub(crate) struct Cassandra {
    child: Child,
    pub(crate) url: String,
    _dir: tempfile::TempDir,
}

impl Drop for Cassandra {
    fn drop(&mut self) {
        self.signal("CONT");
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Cassandra {
    /// Starts a node and makes our tables; else says why there is none.
    pub(crate) async fn start() -> Result<Self, String> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/engines/cassandra.sh");
        let fetched = Command::new(&script).arg("fetch").output().map_err(|e| e.to_string())?;
        if !fetched.status.success() {
            return Err(String::from_utf8_lossy(&fetched.stderr).trim().to_owned());
        }
        let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
        let (cql, storage) = (free_port(), free_port());
        let child = Command::new(&script)
            .arg("run")
            .arg(dir.path())
            .args([cql.to_string(), storage.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| error.to_string())?;
        let url = format!("scylla://127.0.0.1:{cql}/volley");
        let mut node = Self { child, url, _dir: dir };
        let began = Instant::now();
        loop {
            match heartbeat::store::init(&node.url, 1).await {
                Ok(()) => return Ok(node),
                Err(_) if began.elapsed() < Duration::from_secs(180) => {}
                Err(error) => return Err(format!("Cassandra did not come up: {error}")),
            }
            if let Ok(Some(status)) = node.child.try_wait() {
                let out = std::fs::read_to_string(node._dir.path().join("stdout"));
                return Err(format!("Cassandra ended ({status}): {}", out.unwrap_or_default()));
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// Sends a signal to this node alone.
    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status();
        assert!(sent.unwrap().success(), "kill -s {name}");
    }
}
