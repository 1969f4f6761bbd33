//! `lookup = "store"`: capacity is read by key before each launch, and no feed is needed.

#![allow(clippy::unwrap_used, reason = "outside of test functions as well")]

mod house;

use heartbeat_core::{Row, shard::writes::Batch};
use house::{Host, House};
use volley_client::LaunchSpec;
use wire::{CapacityWord, Incarnation, Seq, Stamp, heartbeat::Heartbeat};

fn row(host: &Host, free: u16) -> Row {
    Row {
        host: host.id,
        incarnation: Incarnation(1),
        seq: Seq(1),
        revision: 0,
        ip: Heartbeat::ip_bytes(host.addr.ip()),
        port: host.addr.port(),
        word: CapacityWord::new([free; 4], 0, Stamp::of(Seq(1))),
        total: [500; 4],
        running: 0,
        interval_ms: 15_000,
        says_draining: false,
        no_boxes: true,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn candidates_are_read_from_the_store_and_a_full_host_gets_nothing() {
    let mut house = House::new("lookup", 3).await;
    let dir = tempfile::tempdir().unwrap();
    let url = format!("embedded://{}", dir.path().join("fleet").display());
    let store = heartbeat::store::open(&url).await.unwrap();
    for (host, free) in house.hosts.iter().zip([500, 0, 500]) {
        let batch = Batch { bucket: host.id.bucket(), rows: vec![row(host, free)] };
        store.upsert(&batch).await.unwrap();
    }
    drop(store);
    let (addr, _) = house
        .placer(1, |config| {
            config.lookup = placer::Lookup::Store;
            config.store = Some(url);
            config.aggregators.clear();
        })
        .await;
    let client = house.ready_client("acme", vec![addr]).await;
    for _ in 0..40 {
        let sandbox = client.launch(LaunchSpec::new("test")).await.unwrap();
        assert_ne!(sandbox.id().host, house.hosts[1].id);
    }
    assert_eq!(house.hosts[1].asked(), 0);
    assert!(house.hosts[0].started() > 5 && house.hosts[2].started() > 5, "both others are used");
}
