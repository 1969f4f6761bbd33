//! A real Apache Cassandra of a test's own, on free ports: one node, or a ring of three.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::s3::{ask, free_port, script};

/// Time for a node to come up: a third of a minute, on a machine that does nothing else.
const UP_MAX: Duration = Duration::from_secs(300);

/// One node.
pub(crate) struct Cassandra {
    child: Child,
    /// Names it as a store.
    pub(crate) url: String,
    place: Place,
    dir: tempfile::TempDir,
}

/// Where a node is: its address, its token, and the address of the ring's first node.
#[derive(Clone, Copy)]
struct Place {
    ip: &'static str,
    token: &'static str,
    seed: &'static str,
    cql: u16,
    storage: u16,
}

impl Drop for Cassandra {
    fn drop(&mut self) {
        // A stopped process does not end before it goes on; one that has ended gets no signal.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.send("CONT");
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(dir: &Path, place: Place, commits: &str) -> Result<Child, String> {
    Command::new(script("cassandra.sh"))
        .env("COMMITLOG_SYNC", commits)
        .arg("run")
        .arg(dir)
        .args([place.cql.to_string(), place.storage.to_string()])
        .args([place.ip, place.token, place.seed])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| error.to_string())
}

impl Cassandra {
    /// Starts a node and makes our tables; else says why there is none.
    pub(crate) async fn start() -> Result<Self, String> {
        ask("cassandra.sh", "fetch")?;
        let place = Place {
            ip: "127.0.0.1",
            token: "0",
            seed: "127.0.0.1",
            cql: free_port(),
            storage: free_port(),
        };
        let mut node = Self::of(place)?;
        node.wait(1).await?;
        Ok(node)
    }

    /// Starts a ring of three nodes that each hold every row, and makes our tables; needs 3 GiB.
    pub(crate) async fn ring() -> Result<[Self; 3], String> {
        ask("cassandra.sh", "fetch")?;
        let (cql, storage) = (free_port(), free_port());
        let place = |ip, token| Place { ip, token, seed: "127.0.0.1", cql, storage };
        // One after another: two that join at once do not see each other's tokens.
        let began = Instant::now();
        let up = |what: &str| println!("{what} after {:.0} s", began.elapsed().as_secs_f64());
        let mut first = Self::of(place("127.0.0.1", "-3074457345618258603"))?;
        first.answer().await?;
        up("the first node is up");
        let mut second = Self::of(place("127.0.0.2", "0"))?;
        second.answer().await?;
        up("the second is");
        let mut third = Self::of(place("127.0.0.3", "3074457345618258602"))?;
        third.wait(3).await?;
        up("all three are, with tables in three copies");
        // Each must know that others live before it can speak for a quorum.
        for node in [&mut first, &mut second, &mut third] {
            let url = node.url.clone();
            node.until(async || heartbeat::store::check(&url).await.map(drop)).await?;
        }
        up("each of them finds a quorum");
        let url = format!("scylla://127.0.0.1:{cql},127.0.0.2:{cql},127.0.0.3:{cql}/volley");
        let mut ring = [first, second, third];
        ring.iter_mut().for_each(|node| node.url.clone_from(&url));
        Ok(ring)
    }

    fn of(place: Place) -> Result<Self, String> {
        let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
        let child = spawn(dir.path(), place, "periodic")?;
        let url = format!("scylla://{}:{}/volley", place.ip, place.cql);
        Ok(Self { child, url, place, dir })
    }

    /// Waits until the tables are there, in so many copies.
    async fn wait(&mut self, replicas: u32) -> Result<(), String> {
        let url = self.url.clone();
        self.until(async || heartbeat::store::init(&url, replicas).await).await
    }

    /// Waits until it answers.
    async fn answer(&mut self) -> Result<(), String> {
        let url = self.url.clone();
        let answers = async || match heartbeat::store::check(&url).await {
            Ok(_) | Err(heartbeat::store::StoreError::NoSchema(_)) => Ok(()),
            Err(error) => Err(error),
        };
        self.until(answers).await
    }

    async fn until(
        &mut self,
        ask: impl AsyncFn() -> Result<(), heartbeat::store::StoreError>,
    ) -> Result<(), String> {
        let began = Instant::now();
        loop {
            match ask().await {
                Ok(()) => return Ok(()),
                Err(_) if began.elapsed() < UP_MAX => {}
                Err(error) => return Err(format!("Cassandra did not come up: {error}")),
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                let out = std::fs::read_to_string(self.dir.path().join("stdout"));
                return Err(format!("Cassandra ended ({status}): {}", out.unwrap_or_default()));
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// `host:port`, where it takes queries.
    pub(crate) fn cql(&self) -> std::net::SocketAddr {
        format!("{}:{}", self.place.ip, self.place.cql).parse().unwrap()
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// The same node again, over what it had on disk.
    pub(crate) async fn restart(&mut self) {
        self.child = spawn(self.dir.path(), self.place, "periodic").unwrap();
        self.wait(1).await.unwrap();
    }

    /// `kill -9`, then the same node again, which from then on acknowledges a write only when its commit log is
    /// on disk. With periodic sync the database itself may lose what the last period acknowledged.
    pub(crate) async fn kill_and_restart(&mut self) {
        self.kill();
        self.child = spawn(self.dir.path(), self.place, "batch").unwrap();
        self.wait(1).await.unwrap();
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
