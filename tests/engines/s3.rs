//! A real S3 server of a test's own: MinIO where it is in the cache (or `VOLLEY_MINIO=1` lets it be built), else moto;
//! `VOLLEY_S3=moto` asks for the latter.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Once,
    time::{Duration, Instant},
};

/// Keys of whichever server it is.
pub(crate) const KEYS: [(&str, &str); 2] =
    [("AWS_ACCESS_KEY_ID", "volley"), ("AWS_SECRET_ACCESS_KEY", "volley-secret")];
const BUCKET: &str = "volley";

pub(crate) struct S3 {
    child: Child,
    /// `http://127.0.0.1:PORT`.
    pub(crate) endpoint: String,
    /// Names a prefix of its bucket.
    pub(crate) url: String,
    /// Which server it is.
    pub(crate) what: &'static str,
    dir: tempfile::TempDir,
}

impl Drop for S3 {
    fn drop(&mut self) {
        // A stopped process does not end before it goes on; one that has ended gets no signal.
        let _ = self.send("CONT");
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that is free for TCP and UDP, below those that the kernel gives to whoever connects: what is killed and started
/// again finds it as it left it.
pub(crate) fn free_port() -> u16 {
    use std::hash::{BuildHasher as _, RandomState};
    loop {
        let port = 12_000 + u16::try_from(RandomState::new().hash_one(0) % 20_000).unwrap();
        let addr = ("127.0.0.1", port);
        if TcpListener::bind(addr).is_ok() && UdpSocket::bind(addr).is_ok() {
            return port;
        }
    }
}

pub(crate) fn script(name: &str) -> PathBuf {
    let roots = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    roots.map(|root| root.join("tests/engines").join(name)).find(|path| path.exists()).unwrap()
}

/// Runs a script to its end; else the last that it said.
pub(crate) fn ask(name: &str, what: &str) -> Result<(), String> {
    let asked = Command::new(script(name)).arg(what).output().map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&asked.stderr);
    let last = || said.trim().lines().last().unwrap_or_default().to_owned();
    if asked.status.success() { Ok(()) } else { Err(last()) }
}

/// Lets object stores that this process opens find the keys.
pub(crate) fn set_keys() {
    static SET: Once = Once::new();
    SET.call_once(|| {
        for (name, value) in KEYS {
            // SAFETY: set once, before any store of this process reads them; other tests read other variables.
            unsafe { std::env::set_var(name, value) };
        }
    });
}

impl S3 {
    /// Starts a server with a bucket, and says which; else says why there is none.
    pub(crate) fn start() -> Result<Self, String> {
        set_keys();
        let wanted = || match std::env::var("VOLLEY_S3").as_deref() {
            Ok("moto") => Err("VOLLEY_S3=moto asks for it".to_owned()),
            _ => Ok(()),
        };
        let minio = wanted().and_then(|()| ask("minio.sh", "have"));
        match minio.and_then(|()| ask("minio.sh", "fetch")) {
            Ok(()) => {
                println!("S3 server: MinIO");
                Self::minio()
            }
            Err(why) => {
                println!("S3 server: moto, because {why}");
                Self::moto()
            }
        }
    }

    fn minio() -> Result<Self, String> {
        let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
        let data = dir.path().join("data");
        // A bucket of a fresh server is a directory.
        std::fs::create_dir_all(data.join(BUCKET)).map_err(|error| error.to_string())?;
        let mut run = Command::new(script("minio.sh"));
        run.arg("run").arg(data);
        Self::run(run, dir, "MinIO", |port| get(port, "GET /minio/health/live"))
    }

    fn moto() -> Result<Self, String> {
        ask("moto.sh", "fetch")?;
        let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
        let mut run = Command::new(script("moto.sh"));
        run.arg("run");
        Self::run(run, dir, "moto", |port| get(port, &format!("PUT /{BUCKET}")))
    }

    fn run(
        mut command: Command,
        dir: tempfile::TempDir,
        what: &'static str,
        ready: impl Fn(u16) -> Option<()>,
    ) -> Result<Self, String> {
        let port = free_port();
        let log = File::create(dir.path().join("server.log")).map_err(|error| error.to_string())?;
        let child = command
            .arg(port.to_string())
            .stdout(log.try_clone().map_err(|error| error.to_string())?)
            .stderr(log)
            .stdin(Stdio::null())
            .spawn()
            .map_err(|error| error.to_string())?;
        let endpoint = format!("http://127.0.0.1:{port}");
        let url = format!("s3://{BUCKET}/fleet?endpoint={endpoint}&region=us-east-1");
        let mut server = Self { child, endpoint, url, what, dir };
        let began = Instant::now();
        while ready(port).is_none() {
            if let Ok(Some(status)) = server.child.try_wait() {
                return Err(format!("{what} ended: {status}"));
            }
            if began.elapsed() > Duration::from_secs(60) {
                return Err(format!("{what} did not answer within 60 s"));
            }
            std::thread::sleep(Duration::from_millis(100)); // Between two askings, not in their place.
        }
        Ok(server)
    }

    /// `kill -9`; of moto, which keeps all in memory, SIGSTOP: it answers nobody.
    pub(crate) fn kill(&mut self) {
        if self.what == "moto" {
            return self.signal("STOP");
        }
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// The same server again after [`Self::kill`], over what it had on disk.
    pub(crate) fn restart(&mut self) {
        if self.what == "moto" {
            return self.signal("CONT");
        }
        let port = self.endpoint.rsplit(':').next().unwrap().to_owned();
        let mut run = Command::new(script("minio.sh"));
        run.arg("run").arg(self.dir.path().join("data")).arg(&port);
        self.child = run.stdin(Stdio::null()).spawn().unwrap();
        let began = Instant::now();
        while get(port.parse().unwrap(), "GET /minio/health/live").is_none() {
            assert!(began.elapsed() < Duration::from_secs(60), "MinIO did not come back");
            std::thread::sleep(Duration::from_millis(100)); // Between two askings, not in their place.
        }
    }

    /// Names a prefix of the bucket by another way to the server.
    pub(crate) fn url_through(&self, endpoint: &str) -> String {
        self.url.replace(&self.endpoint, endpoint)
    }

    /// Sends a signal to this server alone.
    pub(crate) fn signal(&self, name: &str) {
        assert!(self.send(name), "kill -s {name}");
    }

    fn send(&self, name: &str) -> bool {
        let sent = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status();
        sent.is_ok_and(|status| status.success())
    }
}

/// Whether the server answers this request with success. What makes a bucket names an owner, since moto wants one; a
/// question of health must not, since MinIO checks it.
fn get(port: u16, what: &str) -> Option<()> {
    let owner =
        "Authorization: AWS4-HMAC-SHA256 Credential=volley/20260101/us-east-1/s3/aws4_request\r\n";
    let owner = if what.starts_with("PUT") { owner } else { "" };
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    let request =
        format!("{what} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 0\r\n{owner}\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.lines().next()?.contains(" 200").then_some(())
}
