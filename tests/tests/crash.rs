//! A hostd killed in the middle of a burst: every launch comes to one sandbox, none is lost, none is doubled.
//!
//! Launches are sent by the client library under ids that the test knows; a launch of unknown outcome is asked for again
//! under its own id, as the library's documentation says. Then the hosts are asked what they have.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::process::Signal;
use tests::fleet::{Fleet, can_box, signal};
use tokio::task::JoinSet;
use volley_client::{Client, ConnectOptions, LaunchId, LaunchSpec, SandboxId, draw_id};

const LAUNCHES: usize = 240;
const IN_FLIGHT: usize = 24;

/// When the host is killed: after so many launches have started.
const KILL_AFTER: usize = 60;

#[test]
fn a_killed_hostd_loses_and_doubles_nothing() {
    if !can_box() {
        return;
    }
    let fleet = Fleet::up(&["--hosts", "3", "--burst", "0"]);
    let victim = fleet.pids("hostd")[0];
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(burst(&fleet, victim));
    assert_eq!(fleet.stop(), Some(0));
}

async fn burst(fleet: &Fleet, victim: u32) {
    let client = connect(fleet).await;
    let started = Arc::new(AtomicUsize::new(0));
    let next = Arc::new(AtomicUsize::new(0));
    let mut lanes = JoinSet::new();
    for _ in 0..IN_FLIGHT {
        let (client, next, started) = (client.clone(), Arc::clone(&next), Arc::clone(&started));
        lanes.spawn(async move {
            let mut done: Vec<(LaunchId, SandboxId)> = Vec::new();
            while next.fetch_add(1, Ordering::Relaxed) < LAUNCHES {
                let id = draw_id();
                done.push((id, launch(&client, id).await));
                if started.fetch_add(1, Ordering::Relaxed) + 1 == KILL_AFTER {
                    signal(victim, Signal::KILL);
                }
            }
            done
        });
    }
    let mut known = HashMap::new();
    while let Some(done) = lanes.join_next().await {
        for (id, sandbox) in done.unwrap() {
            assert!(known.insert(id, sandbox).is_none(), "ids are drawn once");
        }
    }
    assert_eq!(known.len(), LAUNCHES, "nothing is lost");
    let different: HashSet<_> = known.values().collect();
    assert_eq!(different.len(), LAUNCHES, "no sandbox answers two launches");
    check_hosts(&client, &known).await;
    client.close().await;
}

/// What the hosts have, the restarted one among them: one sandbox a launch, and the one that was told.
async fn check_hosts(client: &Client, known: &HashMap<LaunchId, SandboxId>) {
    let labels = [("burst".to_owned(), "1".to_owned())];
    let deadline = Instant::now() + Duration::from_secs(30);
    let listed = loop {
        let listed = client.list(&labels, true).await.unwrap();
        let all: HashSet<_> = listed.iter().map(|record| record.launch_id).collect();
        if known.keys().all(|id| all.contains(id)) || Instant::now() > deadline {
            break listed;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let mut sandboxes: HashMap<LaunchId, Vec<SandboxId>> = HashMap::new();
    for record in &listed {
        sandboxes.entry(record.launch_id).or_default().push(record.sandbox);
    }
    for (id, sandbox) in known {
        let found = sandboxes.get(id).map_or(&[][..], Vec::as_slice);
        assert!(found.len() <= 1, "launch {id} is doubled: {found:?}");
        // A host that was killed may have lost the record of a sandbox that ended meanwhile, never another's.
        assert!(
            found.iter().all(|found| found == sandbox),
            "launch {id}: {found:?}, not {sandbox}"
        );
    }
    let strangers: Vec<_> = sandboxes.keys().filter(|id| !known.contains_key(*id)).collect();
    assert!(strangers.is_empty(), "sandboxes that nobody was told of: {strangers:?}");
    println!("{} launches, {} sandboxes listed", known.len(), listed.len());
}

async fn connect(fleet: &Fleet) -> Client {
    let text = std::fs::read_to_string(fleet.client()).unwrap();
    let file: toml::Table = text.parse().unwrap();
    let placers = file["placers"].as_array().unwrap();
    Client::connect(ConnectOptions {
        placers: placers.iter().map(|addr| addr.as_str().unwrap().parse().unwrap()).collect(),
        identity: file["identity"].as_str().unwrap().into(),
        ..ConnectOptions::default()
    })
    .await
    .unwrap()
}

/// Launches until it is known where it runs. The same id again is the same launch.
async fn launch(client: &Client, id: LaunchId) -> SandboxId {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let spec = LaunchSpec::new("shell")
            .command(["sleep", "300"])
            .label("burst", "1")
            .budget(Duration::from_secs(10))
            .id(id);
        match client.launch(spec).await {
            Ok(sandbox) => return sandbox.id(),
            Err(error) => assert!(Instant::now() < deadline, "launch {id}: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
