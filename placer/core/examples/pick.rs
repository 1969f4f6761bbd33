//! Picks a second, beside the bare loop that any two-choice placement must pay for.
//!
//! `cargo run -p placer-core --release --example pick`. Every figure is the median (least, most) of alternating runs in one
//! process. A pick includes its reservation. With release: each is given back in the same run, through a ring of open ones.
//! Rates are by the processor time of the slowest thread. The bare loop draws two slots, reads both words and sums the greater.
#![expect(clippy::unwrap_used, clippy::cast_precision_loss, reason = "a measurement")]

use std::{
    hint::black_box,
    sync::{
        Barrier,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use placer_core::{
    Adopter, CapacityTable, MapView, Pick, Picker, Reservation, Select,
    map::encode,
    sync::zeroed,
    table::{HEADER_WORDS, words_for},
};
use rand::{RngCore, SeedableRng, rngs::SmallRng};
use wire::{
    CapacityWord, HostId, Seq, ShapeId, Stamp,
    map::{HostAddr, MapVersion},
};

const PICKS: usize = 4_000_000;
const BATCH: usize = 16;
const RUNS: usize = 7;
type Work<'a> = &'a (dyn Fn(&mut SmallRng) + Sync);

const OPEN: usize = 1_024; // Launches under way a thread: about what a core carries.

type Table = CapacityTable<Vec<AtomicU64>>;

fn table(hosts: usize) -> Table {
    let mut rng = SmallRng::seed_from_u64(1);
    let mut ids: Vec<u64> = (0..hosts).map(|_| rng.next_u64()).collect();
    ids.sort_unstable();
    ids.dedup();
    let addr = HostAddr { ip: [10, 0, 0, 1].into(), port: 1 };
    let rows: Vec<_> = ids.iter().map(|id| (HostId(*id), addr)).collect();
    let map = MapView::open(encode(MapVersion { epoch: 1, version: 1 }, &rows)).unwrap();
    let table = CapacityTable::create(zeroed(words_for(hosts)), 1);
    let begun = Instant::now();
    Adopter::new(&table).adopt::<_, Vec<u8>, _>(&table, None, &map).unwrap();
    let adopted = begun.elapsed();
    let begun = Instant::now();
    for id in &ids {
        let free = [(rng.next_u32() % 100) as u16 + 900; 4]; // Room for the 8 M of a run.
        table.feed(HostId(*id), CapacityWord::new(free, 0, Stamp::of(Seq(1))));
    }
    let fed = begun.elapsed() / u32::try_from(hosts).unwrap();
    println!("{hosts} hosts: adopted in {adopted:.0?}, {fed:.0?} a feed entry");
    table
}

fn bare(words: &[AtomicU64], rng: &mut SmallRng, picks: usize) -> u64 {
    let len = words.len() as u64;
    let mut sum = 0;
    for _ in 0..picks {
        let bits = rng.next_u64();
        let first = ((bits & 0xffff_ffff) * len) >> 32;
        let second = ((bits >> 32) * len) >> 32;
        let read = |at: u64| words[usize::try_from(at).unwrap()].load(Ordering::Acquire);
        sum += read(first).max(read(second));
    }
    sum
}

struct Open {
    ring: Vec<Option<Reservation>>,
    at: usize,
}

impl Open {
    fn new() -> Self {
        Self { ring: (0..OPEN).map(|_| None).collect(), at: 0 }
    }

    fn push(&mut self, table: &Table, pick: Pick) {
        let Pick::Picked(picked) = pick else { panic!("there is room") };
        if let Some(old) = self.ring[self.at].replace(picked.reservation) {
            table.release(old);
        }
        self.at = (self.at + 1) % OPEN;
    }

    fn end(self, table: &Table) {
        self.ring.into_iter().flatten().for_each(|open| table.release(open));
    }
}

fn stateless(table: &Table, shape: ShapeId, rng: &mut SmallRng) {
    for _ in 0..PICKS {
        assert!(matches!(Select::default().pick(table, rng, shape, &[]), Pick::Picked(_)));
    }
}

fn single(table: &Table, shape: ShapeId, rng: &mut SmallRng) {
    let mut picker = Picker::new(Select::default(), rng.next_u64());
    for _ in 0..PICKS {
        assert!(matches!(picker.pick(table, shape, &[]), Pick::Picked(_)));
    }
}

fn batched(table: &Table, shape: ShapeId, rng: &mut SmallRng) {
    let mut picker = Picker::new(Select::default(), rng.next_u64());
    let shapes = [shape; BATCH];
    let mut out: [Pick; BATCH] = std::array::from_fn(|_| Pick::NoRoom);
    for _ in 0..PICKS / BATCH {
        picker.pick_batch(table, &shapes, &mut out);
        assert!(out.iter().all(|pick| matches!(pick, Pick::Picked(_))));
    }
}

fn with_release(table: &Table, shape: ShapeId, rng: &mut SmallRng) {
    let mut picker = Picker::new(Select::default(), rng.next_u64());
    let mut open = Open::new();
    for _ in 0..PICKS {
        open.push(table, picker.pick(table, shape, &[]));
    }
    open.end(table);
}

/// Takes off what a run reserved, outside the measurement: heartbeats long after begin the counts anew.
fn forget(table: &Table, beat: &mut u64) {
    *beat += 100;
    for slot in 0..table.len() {
        if let Some((host, word)) = table.at(slot) {
            table.feed(host, CapacityWord::new(word.free_all(), 0, Stamp::of(Seq(*beat))));
        }
    }
}

/// Processor time of this thread, in nanoseconds: on a shared machine it says more than the clock on the wall.
fn thread_ns() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0)
}

/// Millions a second of `threads` threads at once, by the processor time of the slowest.
fn rate(threads: usize, work: Work<'_>) -> f64 {
    let barrier = Barrier::new(threads);
    let slowest_ns = std::thread::scope(|scope| {
        let run = |thread: usize| {
            let barrier = &barrier;
            scope.spawn(move || {
                let mut rng = SmallRng::seed_from_u64(7 + thread as u64);
                barrier.wait();
                let begun = thread_ns();
                work(&mut rng);
                thread_ns() - begun
            })
        };
        let running: Vec<_> = (0..threads).map(run).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).max().unwrap()
    });
    (threads * PICKS) as f64 / slowest_ns as f64 * 1e3
}

fn said(rates: &mut [f64]) -> String {
    rates.sort_by(f64::total_cmp);
    let median = rates[rates.len() / 2];
    format!(
        "{median:6.1} M/s ({:.1}-{:.1}), {:5.1} ns",
        rates[0],
        rates[rates.len() - 1],
        1e3 / median
    )
}

fn main() {
    let shape = ShapeId::new(1).unwrap();
    for hosts in [10_000, 100_000, 1_000_000] {
        let table = table(hosts);
        let bare_words = zeroed(words_for(hosts) - HEADER_WORDS);
        let bare_words = &bare_words[..hosts * 2];
        let works: [(&str, usize, Work<'_>); 8] = [
            ("bare loop, two reads", 1, &|rng| {
                black_box(bare(bare_words, rng, PICKS));
            }),
            ("no look-ahead", 1, &|rng| stateless(&table, shape, rng)),
            ("one at a time", 1, &|rng| single(&table, shape, rng)),
            ("batched", 1, &|rng| batched(&table, shape, rng)),
            ("one at a time + release", 1, &|rng| with_release(&table, shape, rng)),
            ("bare loop, 2 threads", 2, &|rng| {
                black_box(bare(bare_words, rng, PICKS));
            }),
            ("one at a time, 2 threads", 2, &|rng| single(&table, shape, rng)),
            ("batched, 2 threads", 2, &|rng| batched(&table, shape, rng)),
        ];
        let mut rates = vec![Vec::new(); works.len()];
        let mut beat = 1;
        for run in 0..=RUNS {
            for (at, (_, threads, work)) in works.iter().enumerate() {
                let rate = rate(*threads, *work);
                forget(&table, &mut beat);
                if run > 0 {
                    rates[at].push(rate); // The first warms up.
                }
            }
        }
        for ((name, ..), rates) in works.iter().zip(&mut rates) {
            println!("  {name:<26}{}", said(rates));
        }
    }
}
