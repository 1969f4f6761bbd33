//! Many publishers over real object stores: one lineage, whoever races (FAULTS M4).
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use heartbeat_core::leader::{Leader, Put, Want};
use wire::map::{Head, MapVersion, path};
use wire_net::objects::{
    self, Swap,
    object_store::{ObjectStore, path::Path},
};

/// What each publisher believes it published.
type Believed = Arc<Mutex<Vec<MapVersion>>>;

/// One publisher that believes it always leads, by the leader's own rules, without pauses.
async fn publish(store: Arc<dyn ObjectStore>, me: u8, believed: Believed, done: Arc<AtomicBool>) {
    let (mut leader, mut now_ms, at) = (Leader::new(), 0, Path::from(path::HEAD));
    let mut nonce = 0u64;
    while !done.load(Ordering::Relaxed) {
        match leader.poll(now_ms) {
            Want::Lease => leader.handle_lease(now_ms, now_ms, Some(true)),
            Want::Head => {
                let read = objects::read(&*store, &at).await.unwrap();
                let read = read.map(|(bytes, token)| (Head::from_bytes(&bytes).unwrap(), token));
                let read = read.as_ref().map(|(head, token)| (head, token.clone()));
                leader.handle_head(now_ms, Ok(read));
            }
            Want::Scan => assert!(leader.handle_scan(now_ms)),
            Want::Publish => {
                nonce += 1;
                let mut mine = [me; 16];
                mine[..8].copy_from_slice(&nonce.to_le_bytes());
                leader.propose(Vec::new(), 0, mine, 0);
            }
            Want::Put { mut head, expected } => {
                head.pages = vec![wire::map::PageRef {
                    first: 0,
                    last: u64::MAX,
                    count: 0,
                    bytes: 0,
                    digest: [0; 32],
                }];
                let put = match objects::swap(&*store, &at, expected, head.to_bytes().into()).await
                {
                    Ok(Swap::Won(token)) => Put::Won(token),
                    Ok(Swap::Lost) => Put::Lost,
                    Err(_) => Put::Unknown,
                };
                if let Some(version) = leader.handle_put(now_ms, put) {
                    believed.lock().unwrap().push(version);
                }
            }
            Want::Wait(until_ms) => now_ms = until_ms,
        }
        tokio::task::yield_now().await;
    }
}

async fn race(store: Arc<dyn ObjectStore>, wins: usize) {
    let (believed, done) = (Believed::default(), Arc::new(AtomicBool::new(false)));
    let mut tasks = Vec::new();
    for me in 0..16 {
        let publisher = publish(Arc::clone(&store), me, Arc::clone(&believed), Arc::clone(&done));
        tasks.push(tokio::spawn(publisher));
    }
    while believed.lock().unwrap().len() < wins {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        assert!(tasks.iter().all(|task| !task.is_finished()), "a publisher failed");
    }
    done.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.unwrap();
    }
    let mut believed = believed.lock().unwrap().clone();
    let total = believed.len();
    believed.sort_unstable();
    believed.dedup();
    assert_eq!(believed.len(), total, "no version was won twice");
    // Every version's predecessor was won too: each counts one up, and none is missing.
    let versions: Vec<u64> = believed.iter().map(|version| version.version).collect();
    assert!(versions.iter().zip(1..).all(|(version, count)| *version == count), "{versions:?}");
    println!("{total} versions, {} epochs", believed.last().unwrap().epoch);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixteen_publishers_race_in_memory() {
    race(objects::open("mem://").unwrap(), 1_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixteen_publishers_race_on_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    race(objects::open(&format!("dir://{}", dir.path().display())).unwrap(), 300).await;
}
