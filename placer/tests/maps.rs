//! The map loader against bad maps (FAULTS M1, M2): whatever is offered, the last good map stays.

#![allow(clippy::unwrap_used, reason = "outside of test functions as well")]

mod house;

use std::sync::Arc;

use futures::stream::BoxStream;
use house::{hosts, leftovers, make_map, publish};
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult,
    memory::InMemory, path::Path,
};
use placer::{
    fleet::{Aperture, FleetKeeper},
    loader::{Loader, NotTaken, Refresh},
};
use wire::map::{HEAD_BYTES_MAX, Head, MapVersion, path as names};

const fn version(epoch: u64, version: u64) -> MapVersion {
    MapVersion { epoch, version }
}

fn head_path() -> Path {
    Path::from(names::HEAD)
}

struct Setup {
    store: Arc<InMemory>,
    loader: Loader,
    dir: tempfile::TempDir,
}

/// A loader that holds version 2.5 of a map of so many hosts.
async fn setup(count: u64) -> Setup {
    let store = Arc::new(InMemory::new());
    publish(&*store, version(2, 5), &hosts(count)).await;
    let dir = tempfile::tempdir().unwrap();
    let mut loader = Loader::new(Arc::clone(&store) as Arc<dyn ObjectStore>, dir.path());
    let Refresh::Newer { map, fetched } = loader.refresh().await.unwrap() else { panic!() };
    assert_eq!((map.len() as u64, fetched), (count, 4));
    Setup { store, loader, dir }
}

fn assert_holds(loader: &Loader, version: MapVersion, count: u64) {
    let map = loader.held().unwrap();
    assert_eq!((map.version(), map.len() as u64), (version, count));
    let mut expected = hosts(count);
    expected.sort_unstable_by_key(|(id, _)| *id);
    assert!(map.hosts().eq(expected));
}

#[tokio::test]
async fn no_flipped_bit_and_no_cut_of_head_or_page_is_taken() {
    let mut setup = setup(40).await;
    let (head, pages) = make_map(version(2, 6), &hosts(41));
    let good = head.to_bytes();
    for (page, bytes) in head.pages.iter().zip(&pages) {
        let path = Path::from(names::page(&page.digest));
        setup.store.put(&path, bytes.clone().into()).await.unwrap();
    }
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        setup.store.put(&head_path(), bad.into()).await.unwrap();
        let refused = setup.loader.refresh().await.unwrap_err();
        assert!(matches!(refused, NotTaken::Head(_)), "bit {bit}: {refused}");
    }
    for len in 0..good.len() {
        setup.store.put(&head_path(), good[..len].to_vec().into()).await.unwrap();
        assert!(matches!(setup.loader.refresh().await, Err(NotTaken::Head(_))), "{len} bytes");
    }
    setup.store.put(&head_path(), good.into()).await.unwrap();
    // The page that the new host is in is the one that is fetched.
    let (old, _) = make_map(version(2, 5), &hosts(40));
    let changed = |at: &usize| old.pages[*at].digest != head.pages[*at].digest;
    let changed = (0..4).find(changed).unwrap();
    let path = Path::from(names::page(&head.pages[changed].digest));
    let page = &pages[changed];
    for bit in 0..page.len() * 8 {
        let mut bad = page.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        setup.store.put(&path, bad.into()).await.unwrap();
        let refused = setup.loader.refresh().await.unwrap_err();
        assert!(
            matches!(refused, NotTaken::Page { index, .. } if index == changed),
            "bit {bit}: {refused}"
        );
    }
    for len in 0..page.len() {
        setup.store.put(&path, page[..len].to_vec().into()).await.unwrap();
        assert!(matches!(setup.loader.refresh().await, Err(NotTaken::Page { .. })), "{len} bytes");
    }
    assert_holds(&setup.loader, version(2, 5), 40);
    setup.store.put(&path, page.clone().into()).await.unwrap();
    let Ok(Refresh::Newer { fetched: 1, .. }) = setup.loader.refresh().await else { panic!() };
    assert_holds(&setup.loader, version(2, 6), 41);
    assert_eq!(leftovers(setup.dir.path()), Vec::<String>::new());
}

#[tokio::test]
async fn an_older_map_is_refused_by_name() {
    let mut setup = setup(40).await;
    for older in [version(2, 4), version(1, 900)] {
        publish(&*setup.store, older, &hosts(10)).await;
        let refused = setup.loader.refresh().await.unwrap_err();
        let NotTaken::Older { offered, held } = refused else { panic!("{refused}") };
        assert_eq!((offered, held), (older, version(2, 5)));
    }
    assert_holds(&setup.loader, version(2, 5), 40);
    publish(&*setup.store, version(3, 0), &hosts(7)).await;
    setup.loader.refresh().await.unwrap();
    assert_holds(&setup.loader, version(3, 0), 7);
}

#[tokio::test]
async fn a_head_with_the_pages_of_another_map_is_refused() {
    let mut setup = setup(40).await;
    let (new, _) = make_map(version(2, 6), &hosts(60));
    let (_, others) = make_map(version(2, 7), &hosts(80));
    for (page, bytes) in new.pages.iter().zip(others) {
        let path = Path::from(names::page(&page.digest));
        setup.store.put(&path, bytes.into()).await.unwrap();
    }
    setup.store.put(&head_path(), new.to_bytes().into()).await.unwrap();
    let refused = setup.loader.refresh().await.unwrap_err();
    assert!(matches!(refused, NotTaken::Page { .. } | NotTaken::TooLong { .. }), "{refused}");
    // A page that is not there at all.
    let (absent, _) = make_map(version(2, 8), &hosts(90));
    setup.store.put(&head_path(), absent.to_bytes().into()).await.unwrap();
    assert!(matches!(setup.loader.refresh().await, Err(NotTaken::Storage(_))));
    assert_holds(&setup.loader, version(2, 5), 40);
}

#[tokio::test]
async fn a_head_that_does_not_cover_all_ids_is_refused() {
    let mut setup = setup(40).await;
    let (good, _) = make_map(version(2, 6), &hosts(41));
    let refuse = |change: fn(&mut Head)| {
        let mut head = good.clone();
        change(&mut head);
        head.to_bytes()
    };
    let bad = [
        refuse(|head| head.pages.truncate(3)),
        refuse(|head| head.pages[1].first += 1),
        refuse(|head| head.pages.swap(0, 1)),
        refuse(|head| head.count += 1),
        refuse(|head| head.format += 1),
    ];
    for bytes in bad {
        setup.store.put(&head_path(), bytes.into()).await.unwrap();
        assert!(matches!(setup.loader.refresh().await, Err(NotTaken::Head(_))));
    }
    assert_holds(&setup.loader, version(2, 5), 40);
}

/// Claims that an object is small, and never ends.
#[derive(Debug)]
struct Endless;

impl std::fmt::Display for Endless {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("endless")
    }
}

type Done<T> = object_store::Result<T>;

fn unused<T>() -> Done<T> {
    Err(object_store::Error::NotImplemented { operation: "x".into(), implementer: "test".into() })
}

#[async_trait::async_trait]
impl ObjectStore for Endless {
    async fn get_opts(&self, location: &Path, _: GetOptions) -> Done<GetResult> {
        let chunk = bytes::Bytes::from(vec![0; 1 << 20]);
        let endless = futures::stream::repeat_with(move || Ok(chunk.clone()));
        let meta = ObjectMeta {
            location: location.clone(),
            last_modified: std::time::SystemTime::UNIX_EPOCH.into(),
            size: 100,
            e_tag: None,
            version: None,
        };
        let payload = GetResultPayload::Stream(Box::pin(endless));
        Ok(GetResult {
            payload,
            meta,
            range: 0..100,
            attributes: Default::default(),
            extensions: Default::default(),
        })
    }
    async fn put_opts(&self, _: &Path, _: PutPayload, _: PutOptions) -> Done<PutResult> {
        unused()
    }
    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> Done<Box<dyn MultipartUpload>> {
        unused()
    }
    fn delete_stream(&self, _: BoxStream<'static, Done<Path>>) -> BoxStream<'static, Done<Path>> {
        Box::pin(futures::stream::empty())
    }
    fn list(&self, _: Option<&Path>) -> BoxStream<'static, Done<ObjectMeta>> {
        Box::pin(futures::stream::empty())
    }
    async fn list_with_delimiter(&self, _: Option<&Path>) -> Done<ListResult> {
        unused()
    }
    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Done<()> {
        unused()
    }
}

#[tokio::test]
async fn an_endless_body_ends_at_the_bound() {
    let dir = tempfile::tempdir().unwrap();
    let mut loader = Loader::new(Arc::new(Endless), dir.path());
    let refused = loader.refresh().await.unwrap_err();
    let NotTaken::TooLong { bytes_max, .. } = refused else { panic!("{refused}") };
    assert_eq!(bytes_max, HEAD_BYTES_MAX + 32);
}

#[tokio::test]
async fn the_last_good_map_survives_a_restart_and_a_store_that_is_gone() {
    let Setup { store, loader, dir } = setup(40).await;
    drop(loader);
    let gone: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let mut loader = Loader::new(gone, dir.path());
    assert!(matches!(loader.refresh().await, Err(NotTaken::NoHead)));
    assert_holds(&loader, version(2, 5), 40);
    // Back again, with one host more: pages that did not change are not fetched again, though only the map was kept.
    publish(&*store, version(2, 6), &hosts(41)).await;
    let mut loader = Loader::new(store, dir.path());
    let Refresh::Newer { fetched, .. } = loader.refresh().await.unwrap() else { panic!() };
    assert_eq!(fetched, 1);
    assert_holds(&loader, version(2, 6), 41);
}

#[tokio::test]
async fn a_damaged_file_is_not_taken_up() {
    let Setup { store, loader, dir } = setup(40).await;
    drop(loader);
    let file = dir.path().join("map");
    let good = std::fs::read(&file).unwrap();
    for bit in (0..good.len() * 8).step_by(7) {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&file, bad).unwrap();
        let loader = Loader::new(Arc::clone(&store) as Arc<dyn ObjectStore>, dir.path());
        assert!(loader.held().is_none(), "bit {bit}");
    }
    let mut loader = Loader::new(store, dir.path());
    loader.refresh().await.unwrap();
    assert_holds(&loader, version(2, 5), 40);
}

#[tokio::test]
async fn the_table_follows_the_map_grows_and_survives() {
    let mut setup = setup(40).await;
    let state = tempfile::tempdir().unwrap();
    let held = setup.loader.held().cloned();
    let all = Aperture { placer: 1, hosts: 1 << 20 };
    let mut keeper = FleetKeeper::open(state.path(), all, held.clone()).unwrap();
    let word = wire::CapacityWord::new([7; 4], 0, wire::Stamp::of(wire::Seq(3)));
    let host = hosts(1)[0].0;
    assert!(keeper.table().feed(host, word));
    let busy = FleetKeeper::open(state.path(), all, None).unwrap_err();
    assert_eq!(busy.code, wire::Code::Busy);
    publish(&*setup.store, version(2, 6), &hosts(10_000)).await;
    let Refresh::Newer { map, .. } = setup.loader.refresh().await.unwrap() else { panic!() };
    let mut table = keeper.fleet().table.reader();
    keeper.adopt(Arc::clone(&map)).unwrap();
    assert_eq!(keeper.table().live(), 10_000);
    assert_eq!(table.get().get(host).unwrap().0, Some(word), "words move with the table");
    drop((keeper, table));
    let again = FleetKeeper::open(state.path(), all, Some(map)).unwrap();
    assert_eq!(again.table().get(host).unwrap().0, Some(word), "and outlive the process");
}

#[tokio::test]
async fn a_large_fleet_is_launched_on_in_part_and_each_placer_has_another() {
    let mut setup = setup(1_000).await;
    let map = setup.loader.held().cloned().unwrap();
    let part_of = |placer, map| {
        let state = tempfile::tempdir().unwrap();
        let aperture = Aperture { placer, hosts: 200 };
        let keeper = FleetKeeper::open(state.path(), aperture, Some(map)).unwrap();
        let table = keeper.table();
        let hosts: std::collections::BTreeSet<_> =
            (0..table.len()).filter_map(|slot| table.at(slot)).map(|(host, _)| host).collect();
        hosts
    };
    let (ours, theirs) = (part_of(1, Arc::clone(&map)), part_of(2, Arc::clone(&map)));
    assert_eq!((ours.len(), theirs.len()), (200, 200));
    // Two random fifths share a fifth of themselves: 40, give or take.
    let both = ours.intersection(&theirs).count();
    assert!((15..70).contains(&both), "{both}");
    // A tenth of the fleet leaves: nine tenths of the part stay.
    publish(&*setup.store, version(2, 6), &hosts(1_000)[100..]).await;
    let Refresh::Newer { map, .. } = setup.loader.refresh().await.unwrap() else { panic!() };
    let after = part_of(1, map);
    let gone: std::collections::BTreeSet<_> = hosts(100).into_iter().map(|(id, _)| id).collect();
    let stayed = ours.difference(&gone).collect::<Vec<_>>();
    assert_eq!(after.len(), 200);
    assert!(stayed.into_iter().all(|host| after.contains(host)));
}
