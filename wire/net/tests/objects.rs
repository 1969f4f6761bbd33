//! Object stores: one winner a round, whatever races, dies or answers late.
//!
//! The directory store and S3 run the same trial; for S3 a real server is started on a free port (`tests/engines`).
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

#[path = "../../../tests/engines/s3.rs"]
#[allow(dead_code, reason = "other test programs use more of it")]
mod s3;

use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    net::TcpListener,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use object_store::{
    GetOptions, ObjectStore, ObjectStoreExt as _, PutMode, UpdateVersion, path::Path,
};
use wire::Code;
use wire_net::objects::{HASHED_BYTES_MAX, Swap, open, prove, read, swap};

fn directory() -> (tempfile::TempDir, Arc<dyn ObjectStore>) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&format!("dir://{}", dir.path().display())).unwrap();
    (dir, store)
}

fn won(swap: Swap) -> UpdateVersion {
    match swap {
        Swap::Won(version) => version,
        Swap::Lost => panic!("lost"),
    }
}

async fn put_if(
    store: &dyn ObjectStore,
    version: Option<UpdateVersion>,
    bytes: &'static [u8],
) -> Swap {
    swap(store, &Path::from("map/head"), version, Bytes::from_static(bytes)).await.unwrap()
}

/// What every store must do.
async fn swaps_by_version(store: &dyn ObjectStore) {
    assert_eq!(read(store, &Path::from("map/head")).await.unwrap(), None);
    let first = won(put_if(store, None, b"a").await);
    assert_eq!(put_if(store, None, b"b").await, Swap::Lost);
    let second = won(put_if(store, Some(first.clone()), b"b").await);
    assert_ne!(first, second);
    assert_eq!(put_if(store, Some(first), b"c").await, Swap::Lost);
    let (bytes, version) = read(store, &Path::from("map/head")).await.unwrap().unwrap();
    assert_eq!((&bytes[..], &version), (&b"b"[..], &second));
    // The same request again, as after a lost reply: it finds its own bytes.
    assert_eq!(won(put_if(store, None, b"b").await), second);
    store.delete(&Path::from("map/head")).await.unwrap();
    assert_eq!(put_if(store, Some(second), b"d").await, Swap::Lost);
}

#[tokio::test]
async fn a_directory_swaps_by_version() {
    let (_dir, store) = directory();
    swaps_by_version(&*store).await;
}

#[tokio::test]
async fn memory_swaps_by_version_and_is_shared_by_name() {
    let store = open("mem://").unwrap();
    swaps_by_version(&*store).await;
    let path = Path::from("x");
    open("mem://shared").unwrap().put(&path, "1".into()).await.unwrap();
    assert!(read(&*open("mem://shared").unwrap(), &path).await.unwrap().is_some());
    assert!(read(&*open("mem://other").unwrap(), &path).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sixteen_writers_of_a_directory_have_one_winner_a_round() {
    let (dir, store) = directory();
    let report = prove(&store, 200).await.unwrap();
    assert!(report.holds(), "{report:?}");
    println!("{report:?}");
    assert_eq!(fs::read_dir(dir.path().join("objects/prove")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_handles_on_one_directory_exclude_one_another() {
    let (dir, one) = directory();
    let two = open(&format!("dir://{}", dir.path().display())).unwrap();
    let path = Path::from("counter");
    one.put(&path, "0".into()).await.unwrap();
    const EACH: u64 = 60;
    let add = |store: Arc<dyn ObjectStore>, who: u64| {
        let path = path.clone();
        tokio::spawn(async move {
            let mut done = 0;
            while done < EACH {
                let (bytes, version) = read(&*store, &path).await.unwrap().unwrap();
                let text = std::str::from_utf8(&bytes).unwrap();
                let count: u64 = text.split(' ').next().unwrap().parse().unwrap();
                let next = format!("{} {who}-{done}", count + 1);
                if let Swap::Won(_) =
                    swap(&*store, &path, Some(version), next.into()).await.unwrap()
                {
                    done += 1;
                }
            }
        })
    };
    let tasks = [add(one.clone(), 1), add(two.clone(), 2), add(one.clone(), 3), add(two, 4)];
    for task in tasks {
        task.await.unwrap();
    }
    let (bytes, _) = read(&*one, &path).await.unwrap().unwrap();
    assert!(bytes.starts_with(format!("{} ", 4 * EACH).as_bytes()), "{bytes:?}");
}

/// Killed writers leave neither a lock nor half an object: this test starts itself as the writer and kills it.
#[test]
fn a_killed_writer_leaves_a_whole_object_and_no_lock() {
    const WRITER: &str = "VOLLEY_TEST_DIR_WRITER";
    const SIZE: usize = 512 * 1024;
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let path = Path::from("object");
    if let Ok(dir) = env::var(WRITER) {
        let store = open(&format!("dir://{dir}")).unwrap();
        runtime.block_on(async {
            for n in 0u8.. {
                store.put(&path, vec![n; SIZE].into()).await.unwrap();
                println!("wrote");
            }
        });
        unreachable!("killed by then");
    }
    let (dir, store) = directory();
    for round in 0..8 {
        let mut writer = Command::new(env::current_exe().unwrap())
            .args(["--exact", "a_killed_writer_leaves_a_whole_object_and_no_lock", "--nocapture"])
            .env(WRITER, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(writer.stdout.take().unwrap()).lines();
        let mut wrote = 0;
        while wrote < 2 + round % 3 {
            wrote += usize::from(lines.next().unwrap().unwrap().contains("wrote"));
        }
        writer.kill().unwrap();
        writer.wait().unwrap();
        runtime.block_on(async {
            let (bytes, version) = read(&*store, &path).await.unwrap().unwrap();
            assert_eq!(bytes.len(), SIZE);
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "half of one, half of another");
            let next = Bytes::from(format!("round {round}"));
            let swapped = swap(&*store, &path, Some(version), next);
            let swapped = tokio::time::timeout(Duration::from_secs(60), swapped).await;
            won(swapped.expect("a dead process's lock is free").unwrap());
            let listed: Vec<_> = futures::StreamExt::collect::<Vec<_>>(store.list(None)).await;
            assert_eq!(listed.len(), 1, "what was not finished is not listed");
        });
    }
}

#[tokio::test]
async fn a_directory_reads_ranges_conditions_and_large_objects() {
    let (_dir, store) = directory();
    let path = Path::from("deep/er/object");
    let put = store.put(&path, "0123456789".into()).await.unwrap();
    assert_eq!(store.get_range(&path, 3..6).await.unwrap(), "345");
    let unless = GetOptions { if_none_match: put.e_tag.clone(), ..GetOptions::default() };
    let same = store.get_opts(&path, unless).await;
    assert!(matches!(same, Err(object_store::Error::NotModified { .. })), "{same:?}");
    assert_eq!(store.head(&path).await.unwrap().e_tag, put.e_tag);
    let listed = store.list_with_delimiter(Some(&Path::from("deep"))).await.unwrap();
    assert_eq!(listed.common_prefixes, [Path::from("deep/er")]);

    let large = vec![1; usize::try_from(HASHED_BYTES_MAX).unwrap() + 1];
    store.put(&path, large.clone().into()).await.unwrap();
    let got = store.get(&path).await.unwrap();
    assert_eq!(got.meta.e_tag, None);
    assert_eq!(got.bytes().await.unwrap(), large);
    let update = PutMode::Update(UpdateVersion { e_tag: None, version: None });
    let refused = store.put_opts(&path, "x".into(), update.into()).await;
    assert!(matches!(refused, Err(object_store::Error::Precondition { .. })), "{refused:?}");
}

#[test]
fn urls_that_name_no_store_say_why() {
    for url in ["", "dir://relative", "ftp://x", "s3://", "s3://bucket?colour=red", "/plain"] {
        assert_eq!(open(url).unwrap_err().code, Code::Config, "{url}");
    }
}

#[tokio::test]
async fn a_store_that_does_not_answer_leaves_the_outcome_unknown() {
    // A listener that accepts and says nothing, then goes.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().take(8) {
            drop(stream);
        }
    });
    let store = s3_store(&format!("http://{addr}"));
    let lost = swap(&*store, &Path::from("head"), None, Bytes::from_static(b"mine")).await;
    assert_eq!(lost.unwrap_err().0.code, Code::Storage);
}

fn s3_store(endpoint: &str) -> Arc<dyn ObjectStore> {
    s3::set_keys();
    open(&format!("s3://volley/fleet?endpoint={endpoint}&region=us-east-1")).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s3_swaps_by_version_and_has_one_winner_a_round() {
    let server = match tokio::task::spawn_blocking(s3::S3::start).await.unwrap() {
        Ok(server) => server,
        Err(why) => {
            println!("skipped: no S3 server: {why}");
            return;
        }
    };
    let store = s3_store(&server.endpoint);
    swaps_by_version(&*store).await;
    // moto is one Python thread: the full hundred rounds are for the server that has the speed for it.
    let rounds = if server.what == "MinIO" { 100 } else { 20 };
    let report = prove(&store, rounds).await.unwrap();
    println!("{}: {report:?}", server.what);
    assert!(report.holds(), "{report:?}");
    // Objects are under the URL's prefix.
    store.put(&Path::from("here"), "x".into()).await.unwrap();
    let whole =
        open(&format!("s3://volley?endpoint={}&region=us-east-1", server.endpoint)).unwrap();
    assert!(read(&*whole, &Path::from("fleet/here")).await.unwrap().is_some());
}
