//! A real Apache Cassandra of a test's own, on free ports, stopped by its pid.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

pub(crate) struct Cassandra {
    child: Child,
    pub(crate) url: String,
    ports: [u16; 2],
    dir: tempfile::TempDir,
}

impl Drop for Cassandra {
    fn drop(&mut self) {
        // A stopped process does not end before it goes on; one that has ended gets no signal.
        let _ = self.send("CONT");
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/engines/cassandra.sh")
}

fn spawn(dir: &Path, [cql, storage]: [u16; 2], commits: &str) -> Result<Child, String> {
    Command::new(script())
        .env("COMMITLOG_SYNC", commits)
        .arg("run")
        .arg(dir)
        .args([cql.to_string(), storage.to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| error.to_string())
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Cassandra {
    /// Starts a node and makes our tables; else says why there is none.
    pub(crate) async fn start() -> Result<Self, String> {
        let fetched = Command::new(script()).arg("fetch").output().map_err(|e| e.to_string())?;
        if !fetched.status.success() {
            return Err(String::from_utf8_lossy(&fetched.stderr).trim().to_owned());
        }
        let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
        let ports = [free_port(), free_port()];
        let child = spawn(dir.path(), ports, "periodic")?;
        let url = format!("scylla://127.0.0.1:{}/volley", ports[0]);
        let mut node = Self { child, url, ports, dir };
        node.wait().await?;
        Ok(node)
    }

    async fn wait(&mut self) -> Result<(), String> {
        let began = Instant::now();
        loop {
            match heartbeat::store::init(&self.url, 1).await {
                Ok(()) => return Ok(()),
                Err(_) if began.elapsed() < Duration::from_secs(180) => {}
                Err(error) => return Err(format!("Cassandra did not come up: {error}")),
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                let out = std::fs::read_to_string(self.dir.path().join("stdout"));
                return Err(format!("Cassandra ended ({status}): {}", out.unwrap_or_default()));
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// `kill -9`, then the same node again, which from then on acknowledges a write only when its commit log is
    /// on disk. With periodic sync the database itself may lose what the last period acknowledged.
    pub(crate) async fn kill_and_restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = spawn(self.dir.path(), self.ports, "batch").unwrap();
        self.wait().await.unwrap();
    }

    /// Sends a signal to this node alone.
    pub(crate) fn signal(&self, name: &str) {
        assert!(self.send(name), "kill -s {name}");
    }

    fn send(&self, name: &str) -> bool {
        let sent = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status();
        sent.is_ok_and(|status| status.success())
    }
}
