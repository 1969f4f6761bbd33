//! `bench map`: building, publishing and adopting the host map.
//!
//! The steps are those of the publisher and of a placer's loader, on the real cores and a real object store, without
//! their daemons: pages built and put, head swapped; then head and pages read, checked, encoded, opened, and the
//! capacity table brought into line.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use heartbeat_core::map::MapBuilder;
use placer_core::{
    Adopter, CapacityTable, MapView, Pick, Picker, Select, map::encode, table::words_for,
};
use serde::Serialize;
use wire::{
    CapacityWord, Code, Fault, HostId, Seq, ShapeId, Stamp,
    map::{FORMAT, Head, MapVersion, Page, path},
};
use wire_net::objects::{
    self, Swap,
    object_store::{ObjectStore, ObjectStoreExt as _, path::Path},
};

use crate::{arena::Arena, pick::fleet, rounds::Figure};

/// What is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Hosts in the map.
    pub hosts: usize,
    /// Where it is published, as [`objects::open`] takes it.
    pub objects: String,
    /// Rounds.
    pub rounds: usize,
    /// The seed of the fleet.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { hosts: 1_000_000, objects: "mem://".into(), rounds: 5, seed: 1 }
    }
}

/// Milliseconds a step.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Hosts.
    pub hosts: usize,
    /// The store.
    pub objects: String,
    /// Bytes of all pages.
    pub bytes: usize,
    /// Pages.
    pub pages: usize,
    /// Pages out of hosts.
    pub build_ms: Figure,
    /// Pages and head into the store.
    pub publish_ms: Figure,
    /// Head and pages out of the store, checked.
    pub fetch_ms: Figure,
    /// One map out of the pages, checked, ready to be read.
    pub open_ms: Figure,
    /// The capacity table brought into line: every host is new.
    pub adopt_ms: Figure,
    /// The same when one host in a thousand has changed.
    pub adopt_change_ms: Figure,
    /// 64 picks and reservations, 99th percentile, in microseconds, while nothing else happens.
    pub pick_p99_us: Figure,
    /// The same while another thread adopts maps, one after another, with one host in a thousand changed.
    pub pick_adopting_p99_us: Figure,
    /// Maps that were adopted meanwhile, a second.
    pub adopting_per_second: f64,
}

const AT_ONCE: usize = 16;
/// Time for which picks are timed.
const PICKING: Duration = Duration::from_millis(500);

fn internal(error: impl fmt::Display) -> Fault {
    Fault::new(Code::Internal, error.to_string())
}

fn ms(from: Instant) -> f64 {
    from.elapsed().as_secs_f64() * 1e3
}

#[derive(Default)]
struct Steps {
    build: Vec<f64>,
    publish: Vec<f64>,
    fetch: Vec<f64>,
    open: Vec<f64>,
    adopt: Vec<f64>,
    change: Vec<f64>,
    pick_p99_us: Vec<f64>,
    adopting_p99_us: Vec<f64>,
    adopting: Vec<f64>,
}

/// Measures. Blocks.
///
/// # Errors
/// What the store says.
pub fn run(options: &Options) -> Result<Report, Fault> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(internal)?;
    let mut steps = Steps::default();
    let (mut bytes, mut pages) = (0, 0);
    for round in 0..options.rounds {
        let store = objects::open(&options.objects)?;
        // Each round publishes other hosts, so that no page is there already.
        let fleet = fleet(options.hosts, options.seed.wrapping_add(round as u64));
        let from = Instant::now();
        let built = MapBuilder::new().build(&fleet).map_err(internal)?;
        steps.build.push(ms(from));
        bytes = built.pages.iter().map(|page| page.bytes as usize).sum();
        pages = built.pages.len();
        let head = Head {
            format: FORMAT,
            version: MapVersion { epoch: 1, version: round as u64 + 1 },
            previous: MapVersion { epoch: 1, version: round as u64 },
            nonce: [0; 16],
            created_ms: 0,
            count: built.count,
            pages: built.pages,
        };
        let from = Instant::now();
        runtime.block_on(publish(&store, &head, built.new))?;
        steps.publish.push(ms(from));
        let from = Instant::now();
        let fetched = runtime.block_on(fetch(&store))?;
        steps.fetch.push(ms(from));
        adopt(&fetched, head.version, &mut steps)?;
    }
    let figure = |ms: &Vec<f64>| Figure::of(ms.clone());
    Ok(Report {
        hosts: options.hosts,
        objects: options.objects.clone(),
        bytes,
        pages,
        build_ms: figure(&steps.build),
        publish_ms: figure(&steps.publish),
        fetch_ms: figure(&steps.fetch),
        open_ms: figure(&steps.open),
        adopt_ms: figure(&steps.adopt),
        adopt_change_ms: figure(&steps.change),
        pick_p99_us: figure(&steps.pick_p99_us),
        pick_adopting_p99_us: figure(&steps.adopting_p99_us),
        adopting_per_second: figure(&steps.adopting).median,
    })
}

async fn publish(
    store: &Arc<dyn ObjectStore>,
    head: &Head,
    new: Vec<heartbeat_core::map::NewPage>,
) -> Result<(), Fault> {
    stream::iter(new)
        .map(|page| {
            let store = Arc::clone(store);
            async move {
                let at = Path::from(path::page(&page.digest));
                store.put(&at, page.bytes.into()).await.map_err(|error| objects::fault(&error))
            }
        })
        .buffer_unordered(AT_ONCE)
        .try_collect::<Vec<_>>()
        .await?;
    let at = Path::from(path::HEAD);
    let old = objects::read(&**store, &at).await?.map(|(_, version)| version);
    match objects::swap(&**store, &at, old, head.to_bytes().into()).await {
        Ok(Swap::Won(_)) => Ok(()),
        Ok(Swap::Lost) => Err(Fault::new(Code::Storage, "another publisher writes to this store")),
        Err(unknown) => Err(unknown.0),
    }
}

type Hosts = Vec<(wire::HostId, wire::map::HostAddr)>;

async fn fetch(store: &Arc<dyn ObjectStore>) -> Result<Hosts, Fault> {
    let head = objects::read(&**store, &Path::from(path::HEAD)).await?;
    let (head, _) = head.ok_or_else(|| internal("the head is gone"))?;
    let head = Head::from_bytes(&head).map_err(internal)?;
    let mut hosts = Vec::new();
    let mut pages = stream::iter(head.pages)
        .map(|page| {
            let store = Arc::clone(store);
            async move {
                let at = Path::from(path::page(&page.digest));
                objects::read(&*store, &at).await.map(|read| (page, read))
            }
        })
        .buffered(AT_ONCE);
    while let Some(read) = pages.next().await {
        let (page, read) = read?;
        let (bytes, _) = read.ok_or_else(|| internal("a page is gone"))?;
        hosts.extend(Page::parse(&bytes, &page).map_err(internal)?.hosts());
    }
    Ok(hosts)
}

fn adopt(hosts: &Hosts, version: MapVersion, steps: &mut Steps) -> Result<(), Fault> {
    let from = Instant::now();
    let map = MapView::open(encode(version, hosts)).map_err(internal)?;
    steps.open.push(ms(from));
    let arena = Arena::new(words_for(hosts.len() * 2), true).map_err(internal)?;
    let table = CapacityTable::create(arena.words(), 1);
    let mut adopter = Adopter::new(&table);
    let from = Instant::now();
    let no_old: Option<&MapView<Vec<u8>>> = None;
    adopter.adopt(&table, no_old, &map).map_err(internal)?;
    steps.adopt.push(ms(from));
    let mut changed = hosts.clone();
    changed.iter_mut().step_by(1_000).for_each(|(id, _)| id.0 ^= 1);
    changed.sort_unstable_by_key(|(id, _)| *id);
    changed.dedup_by_key(|(id, _)| *id);
    let next = MapVersion { version: version.version + 1, ..version };
    let changed = MapView::open(encode(next, &changed)).map_err(internal)?;
    let from = Instant::now();
    adopter.adopt(&table, Some(&map), &changed).map_err(internal)?;
    steps.change.push(ms(from));
    pick_meanwhile(&table, adopter, [&changed, &map], steps)
}

type Table<'a> = CapacityTable<&'a [AtomicU64]>;

/// Picks with nothing else going on, then while maps are adopted one after another, which no fleet does so fast.
fn pick_meanwhile(
    table: &Table<'_>,
    mut adopter: Adopter,
    maps: [&MapView<Vec<u8>>; 2],
    steps: &mut Steps,
) -> Result<(), Fault> {
    let word = CapacityWord::new([900; 4], 0, Stamp::of(Seq(1)));
    let feed = |hosts: &[HostId]| {
        hosts.iter().for_each(|host| {
            table.feed(*host, word);
        });
    };
    let ids = maps.map(|map| map.ids().collect::<Vec<_>>());
    ids.iter().for_each(|ids| feed(ids));
    let hosts = maps.map(|map| map.hosts().collect::<Vec<_>>());
    let fresh = [0, 1].map(|at| {
        let other = &ids[1 - at];
        let new = |id: &HostId| other.binary_search(id).is_err();
        ids[at].iter().copied().filter(new).collect::<Vec<_>>()
    });
    steps.pick_p99_us.push(pick_p99_us(table)?);
    let stop = AtomicBool::new(false);
    let (p99, adopted) = thread::scope(|scope| {
        let adopting = scope.spawn(|| {
            let (from, mut adopted) = (Instant::now(), 0u32);
            let (mut version, mut last) = (maps[0].version(), None::<MapView<Vec<u8>>>);
            while !stop.load(Ordering::Relaxed) {
                let next = (adopted as usize + 1) % 2;
                version.version += 1;
                let new = MapView::open(encode(version, &hosts[next])).map_err(internal)?;
                adopter
                    .adopt(table, Some(last.as_ref().unwrap_or(maps[0])), &new)
                    .map_err(internal)?;
                feed(&fresh[next]);
                last = Some(new);
                adopted += 1;
            }
            Ok::<_, Fault>(f64::from(adopted) / from.elapsed().as_secs_f64())
        });
        let p99 = pick_p99_us(table);
        stop.store(true, Ordering::Relaxed);
        let adopted = adopting.join().map_err(|_| internal("the adopting thread panicked"))?;
        Ok::<_, Fault>((p99?, adopted?))
    })?;
    steps.adopting_p99_us.push(p99);
    steps.adopting.push(adopted);
    Ok(())
}

/// Batches of 64 for half a second, each timed; the 99th percentile.
fn pick_p99_us(table: &Table<'_>) -> Result<f64, Fault> {
    const BATCH: usize = 64;
    let mut picker = Picker::new(Select::default(), 1);
    let shapes = [ShapeId::default(); BATCH];
    let mut picks: Vec<Pick> = (0..BATCH).map(|_| Pick::NoHosts).collect();
    let mut times = Vec::new();
    let began = Instant::now();
    while began.elapsed() < PICKING {
        let from = Instant::now();
        picker.pick_batch(table, &shapes, &mut picks);
        times.push(from.elapsed().as_secs_f64() * 1e6);
        for pick in &mut picks {
            match std::mem::replace(pick, Pick::NoHosts) {
                Pick::Picked(picked) => table.release(picked.reservation),
                Pick::NoRoom | Pick::NoHosts => return Err(internal("an empty fleet had no room")),
            }
        }
    }
    times.sort_unstable_by(f64::total_cmp);
    Ok(times[times.len() * 99 / 100])
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { hosts, objects, bytes, pages, .. } = self;
        writeln!(
            f,
            "host map of {hosts} hosts: {pages} pages, {bytes} bytes, on {objects}; milliseconds"
        )?;
        writeln!(f, "  build            {}", self.build_ms)?;
        writeln!(f, "  publish          {}", self.publish_ms)?;
        writeln!(f, "  fetch and check  {}", self.fetch_ms)?;
        writeln!(f, "  encode and open  {}", self.open_ms)?;
        writeln!(f, "  adopt, all new   {}", self.adopt_ms)?;
        writeln!(f, "  adopt, 0.1 % new {}", self.adopt_change_ms)?;
        writeln!(f, "  64 picks, p99    {} us", self.pick_p99_us)?;
        writeln!(
            f,
            "    while adopting {} us, {:.0} maps/s adopted",
            self.pick_adopting_p99_us, self.adopting_per_second
        )
    }
}
