//! A fleet in a scratch directory: authority, aggregators, senders, and what a placer would read.
#![allow(dead_code, reason = "each test program uses its part")]

pub(crate) mod cql;
#[path = "../../../tests/engines/mod.rs"]
pub(crate) mod engines;
pub(crate) mod http;
pub(crate) mod process;

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use heartbeat::{
    Config, Running,
    fleet_sender::{FleetSender, Plan},
};
use heartbeat_core::Row;
use tokio_util::sync::CancellationToken;
use wire::{
    CapacityWord, Fault, HostId, Incarnation, Seq,
    call::HostRecord,
    map::{Head, HostAddr, Page, path},
};
use wire_net::{
    listing::HostList,
    objects::{
        self,
        object_store::{ObjectStore, path::Path},
    },
    quic,
    tls::{FleetAuthority, Peer},
};

pub(crate) struct Fleet {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) authority: FleetAuthority,
    pub(crate) store: String,
    pub(crate) objects_url: String,
}

impl Fleet {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = FleetAuthority::create(&dir.path().join("fleet")).unwrap();
        let store = format!("embedded://{}", dir.path().join("store").display());
        let objects_url = format!("dir://{}", dir.path().join("objects").display());
        Self { dir, authority, store, objects_url }
    }

    pub(crate) fn fleet_dir(&self) -> PathBuf {
        self.dir.path().join("fleet")
    }

    pub(crate) fn config(&self, id: u64) -> Config {
        let identity = self.dir.path().join(format!("aggregator-{id}"));
        self.authority.issue(&Peer::Aggregator(id)).unwrap().save(&identity).unwrap();
        let mut config =
            Config::new(identity, self.fleet_dir(), self.store.clone(), self.objects_url.clone());
        config.listen = SocketAddr::from(([127, 0, 0, 1], 0));
        config.udp = SocketAddr::from(([127, 0, 0, 1], 0));
        config.receivers = 2;
        (config.publish_ms, config.flush_ms) = (50, 50);
        config
    }

    pub(crate) async fn try_start(
        &self,
        change: impl FnOnce(&mut Config),
    ) -> Result<Running, Fault> {
        let mut config = self.config(1);
        change(&mut config);
        heartbeat::start(config, CancellationToken::new()).await
    }

    pub(crate) async fn start(&self, change: impl FnOnce(&mut Config)) -> Running {
        self.try_start(change).await.unwrap()
    }

    pub(crate) fn senders(&self, hosts: usize, aggregators: &[SocketAddr]) -> FleetSender {
        let key = self.authority.newest_key().clone();
        FleetSender::new(&Plan::new(hosts, key, aggregators.to_vec())).unwrap()
    }

    pub(crate) fn objects(&self) -> Arc<dyn ObjectStore> {
        objects::open(&self.objects_url).unwrap()
    }

    pub(crate) async fn operator(&self, running: &Running) -> quinn::Connection {
        self.operator_at(running.admin).await
    }

    pub(crate) async fn operator_at(&self, admin: SocketAddr) -> quinn::Connection {
        let identity = self.authority.issue(&Peer::Operator).unwrap();
        let endpoint = quic::dialer(SocketAddr::from(([127, 0, 0, 1], 0)), &identity).unwrap();
        quic::connect(&endpoint, admin, wire::seal::Role::Aggregator).await.unwrap()
    }
}

/// All hosts that an aggregator knows.
pub(crate) async fn hosts(operator: &quinn::Connection) -> Vec<HostRecord> {
    HostList::open(operator).await.unwrap().all().await.unwrap()
}

/// The map as a placer reads it, fully checked. A read that fails is a placer's to try again; a page that is missing is not.
pub(crate) async fn published(
    store: &Arc<dyn ObjectStore>,
) -> Option<(Head, Vec<(HostId, HostAddr)>)> {
    let (bytes, _) = objects::read(&**store, &Path::from(path::HEAD)).await.ok()??;
    let head = Head::from_bytes(&bytes).unwrap();
    let mut hosts = Vec::new();
    for named in &head.pages {
        let at = Path::from(path::page(&named.digest));
        let (bytes, _) = objects::read(&**store, &at).await.ok()?.expect("pages before heads");
        hosts.extend(Page::parse(&bytes, named).unwrap().hosts());
    }
    Some((head, hosts))
}

/// Asks again until there is an answer, for half a minute.
pub(crate) async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "not within a minute: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A row as the database tests write it.
pub(crate) fn row(host: HostId, seq: u64) -> Row {
    Row {
        host,
        incarnation: Incarnation(1),
        seq: Seq(seq),
        revision: 0,
        ip: [7; 16],
        port: 9,
        word: CapacityWord(seq),
        total: [1, 2, 3, 4],
        running: 5,
        interval_ms: 15_000,
        says_draining: false,
        no_boxes: true,
    }
}
