//! A host on loopback for tests: a fleet's authority, identities, a hostd on a thread, and a placer's connection.
#![allow(dead_code, reason = "each test file uses a part")]
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::{net::SocketAddr, thread::JoinHandle, time::Duration};

use hostd::{Boxes, Config};
use quinn::Connection;
use tokio_util::sync::CancellationToken;
use wire::{
    Fault, HostId, LaunchId, SandboxId,
    call::{Answer, Call},
    launch::{LaunchHead, LaunchReply, LaunchRequest, Limits, Network, Started},
};
use wire_net::{
    quic, stream,
    tls::{FleetAuthority, Peer},
};

pub(crate) const HOST: HostId = HostId(0xabcd_0000_0000_0001);

pub(crate) struct Fleet {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) authority: FleetAuthority,
}

impl Fleet {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = FleetAuthority::create(&dir.path().join("fleet")).unwrap();
        Self { dir, authority }
    }

    /// Settings of a host without boxes, on a port of its own.
    pub(crate) fn config(&self, host: HostId) -> Config {
        let identity = self.dir.path().join(format!("identity-{host}"));
        if !identity.exists() {
            std::fs::create_dir_all(&identity).unwrap();
            self.authority.issue(&Peer::Host(host)).unwrap().save(&identity).unwrap();
        }
        Config {
            identity,
            state: self.dir.path().join(format!("state-{host}")),
            listen: free_addr(),
            boxes: Boxes::None,
            cpu_millis: Some(16_000),
            memory_bytes: Some(16 << 30),
            ..Config::default()
        }
    }

    pub(crate) async fn placer(&self, host: HostId, addr: SocketAddr) -> Connection {
        self.connect(&Peer::Placer(1), host, addr).await.unwrap()
    }

    pub(crate) async fn connect(
        &self,
        peer: &Peer,
        host: HostId,
        addr: SocketAddr,
    ) -> Result<Connection, Fault> {
        let identity = self.authority.issue(peer).unwrap();
        let endpoint = quic::dialer(SocketAddr::from(([127, 0, 0, 1], 0)), &identity).unwrap();
        let mut last = None;
        for _ in 0..100 {
            match quic::connect(&endpoint, addr, &Peer::Host(host)).await {
                Ok(connection) => return Ok(connection),
                Err(fault) => last = Some(fault),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err(last.unwrap())
    }
}

/// A port that nobody has now.
pub(crate) fn free_addr() -> SocketAddr {
    std::net::UdpSocket::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap()
}

pub(crate) struct Running {
    pub(crate) addr: SocketAddr,
    pub(crate) stop: CancellationToken,
    pub(crate) thread: Option<JoinHandle<Result<(), Fault>>>,
}

/// Runs a hostd on a thread of this process.
pub(crate) fn run(config: Config) -> Running {
    let (addr, stop) = (config.listen, CancellationToken::new());
    let token = stop.clone();
    let thread = Some(std::thread::spawn(move || hostd::run(config, token)));
    Running { addr, stop, thread }
}

impl Running {
    /// Waits for a run that ends of itself, with its fault.
    pub(crate) fn thread_result(mut self) -> Fault {
        self.thread.take().unwrap().join().unwrap().unwrap_err()
    }

    pub(crate) fn end(mut self) -> Result<(), Fault> {
        self.stop.cancel();
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub(crate) fn request(number: u128, image: &str, command: &[&str]) -> LaunchRequest {
    LaunchRequest {
        launch_id: LaunchId(number.to_le_bytes()),
        tenant: "acme".into(),
        image: image.into(),
        shape: 0,
        command: command.iter().map(|&arg| arg.into()).collect(),
        env: vec![],
        cwd: String::new(),
        user: String::new(),
        tty: false,
        stdin: false,
        limits: Limits::default(),
        network: Network::None,
        publish: vec![],
        labels: vec![],
    }
}

pub(crate) async fn launch(connection: &Connection, request: &LaunchRequest) -> LaunchReply {
    stream::launch(connection, LaunchHead::new(10_000), &request.to_bytes()).await.unwrap()
}

pub(crate) async fn started(connection: &Connection, request: &LaunchRequest) -> Started {
    match launch(connection, request).await {
        LaunchReply::Started(started) => started,
        other => panic!("not started: {other:?}"),
    }
}

pub(crate) async fn call(connection: &Connection, call: &Call) -> Result<Answer, Fault> {
    stream::call_on_behalf(connection, "acme", call).await
}

pub(crate) async fn inspect(connection: &Connection, id: SandboxId) -> wire::call::SandboxRecord {
    match call(connection, &Call::Inspect(id)).await.unwrap() {
        Answer::Sandbox(record) => record,
        other => panic!("{other:?}"),
    }
}

/// A runtime for the asking side.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// Says whether real boxes can be tested here; prints why not.
pub(crate) fn real_boxes() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: real boxes need root");
    }
    root
}
