//! The store against a real Apache Cassandra 5, and an aggregator whose node is stopped under it.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod fleet;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use fleet::{Fleet, engines::cassandra::Cassandra, published, row, until};
use futures::{FutureExt as _, StreamExt as _, stream};
use heartbeat::store::{
    Store, StoreError,
    listed::{Kept, PARTITIONS},
    scylla::ScyllaStore,
};
use heartbeat_core::{Drain, Row, shard::upkeep::Silent, shard::writes::Batch};
use rand::{RngCore as _, SeedableRng as _, rngs::SmallRng};
use wire::{
    CapacityWord, HostId, Incarnation, LaunchId, SandboxId, Seq,
    call::{SandboxRecord, State},
    launch::Network,
    limits::RECORD_LIVES_MS,
};

fn rows(count: usize, seed: u64, seq: u64) -> Vec<Row> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut rows: Vec<_> = (0..count).map(|_| row(HostId(rng.next_u64()), seq)).collect();
    rows.sort_by_key(|row| row.host);
    rows
}

fn batches(rows: &[Row]) -> Vec<Batch> {
    rows.chunk_by(|a, b| a.host.bucket() == b.host.bucket())
        .flat_map(|part| part.chunks(256))
        .map(|part| Batch { bucket: part[0].host.bucket(), rows: part.to_vec() })
        .collect()
}

async fn write_batches(store: &ScyllaStore, batches: &[Batch]) -> f64 {
    let began = Instant::now();
    let done = stream::iter(batches).map(|batch| store.upsert(batch)).buffer_unordered(32);
    done.for_each(async |done| done.unwrap()).await;
    let rows: usize = batches.iter().map(|batch| batch.rows.len()).sum();
    rows as f64 / began.elapsed().as_secs_f64()
}

async fn write_singly(store: &ScyllaStore, rows: &[Row]) -> f64 {
    let began = Instant::now();
    let done = stream::iter(rows).map(|row| store.upsert_one(row)).buffer_unordered(256);
    done.for_each(async |done| done.unwrap()).await;
    rows.len() as f64 / began.elapsed().as_secs_f64()
}

async fn scan(store: &ScyllaStore) -> Vec<Row> {
    let mut all = Vec::new();
    for part in 0..store.scan_parts() {
        all.extend(store.scan(part).await.unwrap());
    }
    all.sort_by_key(|row| row.host);
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_store_keeps_what_it_acknowledged() {
    let mut node = match Cassandra::start().await {
        Ok(node) => node,
        Err(why) => return println!("skipped: {why}"),
    };
    let elsewhere = node.url.replace("/volley", "/nothing");
    let missing = heartbeat::store::check(&elsewhere).await;
    assert!(matches!(missing, Err(StoreError::NoSchema(_))), "{missing:?}");
    heartbeat::store::init(&node.url, 1).await.unwrap();
    println!("{}", heartbeat::store::check(&node.url).await.unwrap());
    let store = ScyllaStore::open(node.url.strip_prefix("scylla://").unwrap()).await.unwrap();

    order_of_writes(&store).await;
    lease_and_drains(&store).await;
    sandboxes_by_tenant(&store, node.cql()).await;

    // 100,000 rows in 400 partitions, as a million hosts fill theirs: 250 rows a batch.
    let mut written = rows(100_000, 1, 1);
    for row in &mut written {
        row.host.0 = (row.host.0 >> 12) | ((row.host.0 % 400) << 52);
    }
    written.sort_by_key(|row| row.host);
    let parts = batches(&written);
    for round in 1..=3 {
        let single = write_singly(&store, &written[..20_000]).await;
        let batched = write_batches(&store, &parts).await;
        println!(
            "round {round}: single {single:.0} rows/s, batches of {} {batched:.0} rows/s, ratio {:.1}",
            written.len() / parts.len(),
            batched / single
        );
    }
    let began = Instant::now();
    let read = scan(&store).await;
    println!("scan of {} rows: {:.2} s", read.len(), began.elapsed().as_secs_f64());
    assert_eq!(read, written);

    let mut pairs = Vec::new();
    for pair in written.chunks(2).take(500) {
        let began = Instant::now();
        let words = store.words([pair[0].host, pair[1].host]).await.unwrap();
        pairs.push(began.elapsed());
        assert_eq!(words, [Some(CapacityWord(1)), Some(CapacityWord(1))]);
    }
    pairs.sort();
    println!("two reads by key: p50 {:?}, p99 {:?}", pairs[250], pairs[495]);
    let gone: Vec<Silent> =
        written.iter().map(|row| Silent { host: row.host, seq: row.seq, heard_ms: 0 }).collect();
    store.remove(&gone).await.unwrap();
    assert!(scan(&store).await.is_empty());

    // D1: killed in the middle of writes. What was acknowledged is there; what was not may be.
    node.kill_and_restart().await;
    let store = ScyllaStore::open(node.url.strip_prefix("scylla://").unwrap()).await.unwrap();
    let again: Vec<Row> =
        written.iter().take(20_000).map(|row| Row { seq: Seq(2), ..*row }).collect();
    let parts = batches(&again);
    let writing = stream::iter(&parts)
        .map(|part| store.upsert(part).map(move |done| done.is_ok().then_some(part)))
        .buffer_unordered(8);
    let mut writing = std::pin::pin!(writing);
    let mut acknowledged = Vec::new();
    while let Some(done) = writing.next().await {
        acknowledged.extend(done);
        if acknowledged.len() == parts.len() / 2 {
            node.signal("KILL");
        }
    }
    println!("{} of {} batches acknowledged before the kill", acknowledged.len(), parts.len());
    assert!(acknowledged.len() < parts.len());
    node.kill_and_restart().await;
    let store = ScyllaStore::open(node.url.strip_prefix("scylla://").unwrap()).await.unwrap();
    let read = scan(&store).await;
    let lost = acknowledged.iter().flat_map(|part| &part.rows).filter(|row| {
        read.binary_search_by_key(&row.host, |read| read.host).map(|at| read[at]) != Ok(**row)
    });
    assert_eq!(lost.count(), 0);
}

/// Invariant 3: an older heartbeat never overwrites a newer one, whatever order the writes arrive in.
async fn order_of_writes(store: &ScyllaStore) {
    let host = HostId(u64::MAX - 5);
    let silent = |seq| Silent { host, seq: Seq(seq), heard_ms: 0 };
    store.upsert_one(&row(host, 10)).await.unwrap();
    store.upsert_one(&row(host, 9)).await.unwrap();
    assert_eq!(scan(store).await, [row(host, 10)]);
    let drained = Row { revision: 1, word: CapacityWord::default(), ..row(host, 10) };
    store.upsert_one(&drained).await.unwrap();
    store.upsert_one(&row(host, 10)).await.unwrap();
    assert_eq!(scan(store).await, [drained], "a revision is newer than its heartbeat");
    store.upsert_one(&row(host, 11)).await.unwrap();
    store.remove(&[silent(10)]).await.unwrap();
    assert_eq!(scan(store).await, [row(host, 11)], "a host that spoke since is not removed");
    store.remove(&[silent(11)]).await.unwrap();
    store.upsert_one(&row(host, 11)).await.unwrap();
    assert_eq!(scan(store).await, [], "a late write does not bring the dead back");
    store.upsert_one(&row(host, 12)).await.unwrap();
    assert_eq!(scan(store).await, [row(host, 12)], "a heartbeat does");
    store.remove(&[silent(12)]).await.unwrap();
}

async fn lease_and_drains(store: &ScyllaStore) {
    assert_eq!(store.lease(1, 2_000).await, Ok(true));
    assert_eq!(store.lease(2, 2_000).await, Ok(false));
    assert_eq!(store.lease(1, 2_000).await, Ok(true), "renewed");
    let began = Instant::now();
    until("the lease lapses", async || store.lease(2, 2_000).await.unwrap().then_some(())).await;
    assert!(began.elapsed() > Duration::from_millis(900));
    assert_eq!(store.lease(1, 2_000).await, Ok(false));

    let drain = |host, message: &str| Drain {
        host: HostId(host),
        deadline_ms: 5,
        since_ms: 6,
        message: message.to_owned(),
    };
    store.set_drain(&drain(u64::MAX, "kernel")).await.unwrap();
    store.set_drain(&drain(1, "disk")).await.unwrap();
    store.clear_drain(HostId(1)).await.unwrap();
    assert_eq!(store.drains().await.unwrap(), [drain(u64::MAX, "kernel")]);
}

fn kept(tenant: &str, local: u64, version: u64, state: State) -> Kept {
    let record = SandboxRecord {
        sandbox: SandboxId { host: HostId(u64::MAX - 7), local },
        launch_id: LaunchId([1; 16]),
        tenant: tenant.to_owned(),
        image: "shell".to_owned(),
        shape: 1,
        command: vec!["sh".to_owned()],
        labels: vec![("job".to_owned(), "42".to_owned())],
        state,
        age_ms: 5,
        left_ms: 6,
        network: Network::default(),
        published: Vec::new(),
    };
    Kept { version, heard_ms: 9, record }
}

/// What `volley ls` reads: a tenant's rows in their partitions, the newest of each, until their time is over.
async fn sandboxes_by_tenant(store: &ScyllaStore, cql: std::net::SocketAddr) {
    let keep = async |rows: &[Kept]| {
        let mut rows = rows.to_vec();
        rows.sort_by_key(Kept::partition);
        for batch in rows.chunk_by(|a, b| a.partition() == b.partition()) {
            store.keep_sandboxes(batch).await.unwrap();
        }
    };
    let list = async |tenant: &str, max: usize| {
        let mut all = Vec::new();
        for partition in 0..PARTITIONS {
            let rows = store.sandboxes(tenant, partition, max).await.unwrap();
            assert!(rows.len() <= max && rows.iter().all(|row| row.partition() == partition));
            all.extend(rows);
        }
        all.sort_by_key(|row| row.record.sandbox.local);
        all
    };
    let rows: Vec<_> = (0..500).map(|local| kept("acme", local, 5, State::Running)).collect();
    keep(&rows).await;
    keep(&[kept("acm", 1, 5, State::Running), kept("", 2, 5, State::Running)]).await;
    assert_eq!(list("acme", 1_000).await, rows, "as they were written, and nobody else's");
    assert_eq!(list("acm", 1_000).await.len(), 1);
    assert_eq!(list("nobody", 1_000).await, []);
    assert!(list("acme", 3).await.len() <= 3 * usize::from(PARTITIONS));
    // PROTOCOL 9.2: whatever order the writes arrive in.
    keep(&[kept("acme", 3, 4, State::Paused), kept("acme", 4, 6, State::Paused)]).await;
    let newest = list("acme", 1_000).await;
    assert_eq!((newest[3].record.state, newest[3].version), (State::Running, 5));
    assert_eq!((newest[4].record.state, newest[4].version), (State::Paused, 6));
    let session = scylla::client::session_builder::SessionBuilder::new()
        .known_node(cql.to_string())
        .build()
        .await
        .unwrap();
    let text = "SELECT TTL(record) FROM volley.sandbox_by_tenant";
    let rows = session.query_unpaged(text, ()).await.unwrap().into_rows_result().unwrap();
    let ttls: Vec<_> = rows.rows::<(Option<i32>,)>().unwrap().map(|row| row.unwrap().0).collect();
    let longest = i32::try_from(RECORD_LIVES_MS / 1_000).unwrap();
    assert_eq!(ttls.len(), 502);
    assert!(ttls.iter().all(|ttl| ttl.is_some_and(|ttl| (1..=longest).contains(&ttl))), "{ttls:?}");
}

/// D1, D2: the node stops for 10 s. Hosts are heard, the map goes on, nobody dies, and the rows land afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_node_makes_rows_wait_and_loses_nobody() {
    let node = match Cassandra::start().await {
        Ok(node) => node,
        Err(why) => return println!("skipped: {why}"),
    };
    let fleet = Fleet { store: node.url.clone(), ..Fleet::new() };
    let running = fleet
        .start(|config| (config.scan_ms, config.grace_ms, config.flush_ms) = (500, 2_000, 200))
        .await;
    let place = node.url.strip_prefix("scylla://").unwrap();
    let store = Arc::new(ScyllaStore::open(place).await.unwrap());
    let mut senders = fleet.senders(2_000, &[running.udp]);
    senders.hosts.iter_mut().for_each(|host| host.beat.interval_ms = 1_000);
    senders.beat_all(100_000).unwrap();
    until("all rows are in Cassandra", async || (scan(&store).await.len() == 2_000).then_some(()))
        .await;
    until("the map is published", async || {
        published(&fleet.objects()).await.filter(|(head, _)| head.count == 2_000)
    })
    .await;

    node.signal("STOP");
    let stopped = Instant::now();
    while stopped.elapsed() < Duration::from_secs(10) {
        senders.beat_all(100_000).unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let census = running.shards.census().await;
    assert_eq!((census.total, census.silent.len()), (2_000, 0), "hosts are heard all the while");
    let waiting: u64 = running.shards.figures().await.iter().map(|shard| shard.dirty).sum();
    println!("{waiting} rows wait after 10 s");
    assert_eq!(waiting, 2_000, "one row a host, however often it beat");
    // A host that comes while the database is away is launched on.
    let mut more = fleet.senders(1, &[running.udp]);
    more.hosts[0].beat.ip[15] ^= 1;
    more.hosts[0].beat.incarnation = Incarnation(2);
    let moved = more.hosts[0].beat.addr();
    until("the map has what changed meanwhile", async || {
        more.beat_all(1_000).unwrap();
        let (head, hosts) = published(&fleet.objects()).await?;
        (head.count == 2_000 && hosts.iter().any(|(_, addr)| *addr == moved)).then_some(())
    })
    .await;

    node.signal("CONT");
    let back = Instant::now();
    until("the rows have landed", async || {
        let waiting: u64 = running.shards.figures().await.iter().map(|shard| shard.dirty).sum();
        (waiting == 0).then_some(())
    })
    .await;
    println!("rows landed {:.1} s after the node came back", back.elapsed().as_secs_f64());
    let newest = senders.hosts[5].beat.seq;
    let read = scan(&store).await;
    let found = read.iter().find(|row| row.host == senders.hosts[5].host).unwrap();
    assert_eq!((read.len(), found.seq), (2_000, newest));
    running.stop().await;
}

/// D1 on three nodes that each hold every row: one is killed, and nothing is missed. `VOLLEY_RING=1`, for it takes 3 GiB and
/// a minute.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_of_three_is_killed_and_nothing_is_missed() {
    if std::env::var("VOLLEY_RING").is_err() {
        return println!("skipped: three nodes want VOLLEY_RING=1");
    }
    let [first, second, mut third] = match Cassandra::ring().await {
        Ok(ring) => ring,
        Err(why) => return println!("skipped: {why}"),
    };
    println!("{}", heartbeat::store::check(&first.url).await.unwrap());
    let fleet = Fleet { store: first.url.clone(), ..Fleet::new() };
    let running = fleet
        .start(|config| (config.scan_ms, config.grace_ms, config.flush_ms) = (500, 2_000, 200))
        .await;
    let mut senders = fleet.senders(2_000, &[running.udp]);
    let written = async |senders: &mut heartbeat::fleet_sender::FleetSender| {
        let began = Instant::now();
        senders.beat_all(100_000).unwrap();
        until("all rows are written", async || {
            let waiting: u64 = running.shards.figures().await.iter().map(|shard| shard.dirty).sum();
            (waiting == 0).then_some(())
        })
        .await;
        began.elapsed()
    };
    println!("2,000 rows in three copies: {:?}", written(&mut senders).await);
    let store = ScyllaStore::open(first.url.strip_prefix("scylla://").unwrap()).await.unwrap();
    let told =
        async |me| until("the lease is told", async || store.lease(me, 60_000).await.ok()).await;
    assert!(!told(7).await, "the aggregator has it");
    third.kill();
    let killed = Instant::now();
    println!("one node killed: rows written after {:?}", written(&mut senders).await);
    // Whoever asks just after the kill may wait for the dead node in vain, and asks again, as aggregators do.
    let newest = senders.hosts[0].beat.seq;
    until("a quorum has every row", async || {
        let mut rows = Vec::new();
        for part in 0..store.scan_parts() {
            rows.extend(store.scan(part).await.ok()?);
        }
        assert_eq!(rows.len(), 2_000);
        rows.iter().all(|row| row.seq == newest).then_some(())
    })
    .await;
    println!("read by a quorum {:?} after the kill", killed.elapsed());
    assert!(!told(8).await, "the aggregator has it");
    println!("the lease is told {:?} after it", killed.elapsed());
    until("the map goes on", async || {
        published(&fleet.objects()).await.filter(|(head, _)| head.count == 2_000)
    })
    .await;
    assert_eq!(running.shards.census().await.total, 2_000, "nobody was called dead");
    running.stop().await;
    drop((first, second));
}
