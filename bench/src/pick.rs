//! `bench pick`: picks and reservations a second on one core, over a table of so many hosts.
//!
//! Time is the thread's processor time. The ceiling is a bare loop: two random reads of slots as far apart as the
//! table's, and a comparison. Picks are released outside of the measured time.

use std::{
    fmt, hint,
    sync::{
        Barrier,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use placer_core::{
    Adopter, CapacityTable, MapView, Pick, Picker, Select,
    map::encode,
    table::{SLOT_WORDS, words_for},
};
use rand::{RngCore as _, SeedableRng as _, rngs::SmallRng};
use serde::Serialize;
use wire::{
    CapacityWord, Code, Fault, HostId, Seq, ShapeId, Stamp,
    map::{HostAddr, MapVersion},
};

use crate::{
    arena::Arena,
    cpu::thread_time,
    rounds::{Figure, alternate},
};

/// What is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Sizes of the fleet.
    pub hosts: Vec<usize>,
    /// Picks a round.
    pub picks: usize,
    /// Rounds after one that warms up.
    pub rounds: usize,
    /// Ask for huge pages.
    pub huge: bool,
    /// The seed of all that is drawn.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            hosts: vec![10_000, 100_000, 1_000_000],
            picks: 400_000,
            rounds: 7,
            huge: true,
            seed: 1,
        }
    }
}

/// Figures of one fleet size, in millions a second.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Row {
    /// Hosts.
    pub hosts: usize,
    /// Two random reads and a comparison.
    pub bare: Figure,
    /// The same, and an exchange on the better of the two.
    pub bare_claim: Figure,
    /// Pick and reserve, one at a time.
    pub single: Figure,
    /// Pick and reserve, 64 at a time.
    pub batched: Figure,
    /// The same on two threads, together.
    pub batched_on_two: Figure,
    /// Words of the feed written into the table, hosts in random order.
    pub fed: Figure,
}

/// All rows.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Whether huge pages were asked for.
    pub huge: bool,
    /// The seed.
    pub seed: u64,
    /// One a fleet size.
    pub rows: Vec<Row>,
}

const BATCH: usize = 64;
/// Free slots a shape of each host: more than any round reserves.
const FREE: [u16; 4] = [900; 4];

type Table<'a> = CapacityTable<&'a [AtomicU64]>;

/// Measures.
///
/// # Errors
/// [`Code::Internal`] without memory.
pub fn run(options: &Options) -> Result<Report, Fault> {
    let rows = options.hosts.iter().map(|hosts| row(options, *hosts)).collect::<Result<_, _>>()?;
    Ok(Report { huge: options.huge, seed: options.seed, rows })
}

fn internal(error: impl fmt::Display) -> Fault {
    Fault::new(Code::Internal, error.to_string())
}

/// Hosts with random ids, ascending.
#[must_use]
pub fn fleet(count: usize, seed: u64) -> Vec<(HostId, HostAddr)> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut hosts: Vec<_> = (0..count)
        .map(|_| {
            let ip = std::net::Ipv4Addr::from(0x0a00_0000 | (rng.next_u32() >> 8)).into();
            (HostId(rng.next_u64()), HostAddr { ip, port: 7_400 })
        })
        .collect();
    hosts.sort_unstable_by_key(|(id, _)| *id);
    hosts.dedup_by_key(|(id, _)| *id);
    hosts
}

fn row(options: &Options, hosts: usize) -> Result<Row, Fault> {
    let fleet = fleet(hosts, options.seed);
    let arena = Arena::new(words_for(fleet.len()), options.huge).map_err(internal)?;
    let table: Table<'_> = CapacityTable::create(arena.words(), 1);
    let version = MapVersion { epoch: 1, version: 1 };
    let map = MapView::open(encode(version, &fleet)).map_err(internal)?;
    let no_old: Option<&MapView<Vec<u8>>> = None;
    Adopter::new(&table).adopt(&table, no_old, &map).map_err(internal)?;
    let word = CapacityWord::new(FREE, 0, Stamp::of(Seq(1)));
    for (host, _) in &fleet {
        table.feed(*host, word);
    }
    let bare_arena = Arena::new(fleet.len() * SLOT_WORDS, options.huge).map_err(internal)?;
    for (at, word) in bare_arena.words().iter().enumerate() {
        word.store(at as u64, Ordering::Relaxed);
    }
    let seed = options.seed;
    let mut seq = 1;
    let [bare, bare_claim, single, batched, batched_on_two, fed] = alternate::<Fault, 6>(
        options.rounds,
        [
            &mut || Ok(bare_loop(bare_arena.words(), options.picks, seed, false)),
            &mut || Ok(bare_loop(bare_arena.words(), options.picks, seed, true)),
            &mut || one_at_a_time(&table, options.picks, seed),
            &mut || in_batches(&table, options.picks, seed),
            &mut || on_two(&table, options.picks, seed),
            &mut || {
                seq += 1;
                Ok(feed(&table, &fleet, options.picks, seq))
            },
        ],
    )?;
    Ok(Row { hosts, bare, bare_claim, single, batched, batched_on_two, fed })
}

/// Millions a second of the thread's processor time.
#[expect(clippy::cast_precision_loss, reason = "below 2^52")]
fn rate(count: usize, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64() / 1e6
}

fn bare_loop(words: &[AtomicU64], picks: usize, seed: u64, claim: bool) -> f64 {
    let mut rng = SmallRng::seed_from_u64(seed);
    let slots = words.len() / SLOT_WORDS;
    let from = thread_time();
    let mut sum = 0u64;
    for _ in 0..picks {
        let bits = rng.next_u64();
        let at = |half: u64| ((half * slots as u64) >> 32) as usize * SLOT_WORDS;
        let (a, b) = (at(bits & 0xffff_ffff), at(bits >> 32));
        let (x, y) = (words[a].load(Ordering::Relaxed), words[b].load(Ordering::Relaxed));
        sum = sum.wrapping_add(x.max(y));
        if claim {
            let (word, value) = if x > y { (&words[a], x) } else { (&words[b], y) };
            let claimed =
                word.compare_exchange(value, value ^ 1, Ordering::AcqRel, Ordering::Relaxed);
            sum = sum.wrapping_add(u64::from(claimed.is_ok()));
        }
    }
    hint::black_box(sum);
    rate(picks, thread_time() - from)
}

fn smallest() -> ShapeId {
    ShapeId::default()
}

/// Picks between two releases: what they are written to stays in the cache.
const CHUNK: usize = 64 * BATCH;

/// Fills chunk after chunk, timed; releases each, untimed.
fn in_chunks(
    table: &Table<'_>,
    picks: usize,
    mut fill: impl FnMut(&mut [Pick]),
) -> Result<f64, Fault> {
    let mut chunk: Vec<Pick> = (0..CHUNK).map(|_| Pick::NoHosts).collect();
    let chunks = picks.div_ceil(CHUNK);
    let mut time = Duration::ZERO;
    for _ in 0..chunks {
        let from = thread_time();
        fill(&mut chunk);
        time += thread_time() - from;
        for pick in &mut chunk {
            match std::mem::replace(pick, Pick::NoHosts) {
                Pick::Picked(picked) => table.release(picked.reservation),
                Pick::NoRoom | Pick::NoHosts => return Err(internal("an empty fleet had no room")),
            }
        }
    }
    Ok(rate(chunks * CHUNK, time))
}

fn one_at_a_time(table: &Table<'_>, picks: usize, seed: u64) -> Result<f64, Fault> {
    let mut picker = Picker::new(Select::default(), seed);
    in_chunks(table, picks, |chunk| {
        chunk.iter_mut().for_each(|pick| *pick = picker.pick(table, smallest(), &[]));
    })
}

fn in_batches(table: &Table<'_>, picks: usize, seed: u64) -> Result<f64, Fault> {
    let mut picker = Picker::new(Select::default(), seed);
    let shapes = [smallest(); BATCH];
    in_chunks(table, picks, |chunk| {
        for batch in chunk.chunks_exact_mut(BATCH) {
            picker.pick_batch(table, &shapes, batch);
        }
    })
}

fn on_two(table: &Table<'_>, picks: usize, seed: u64) -> Result<f64, Fault> {
    let start = Barrier::new(2);
    let half = |seed| {
        start.wait();
        in_batches(table, picks, seed)
    };
    thread::scope(|scope| {
        let other = scope.spawn(|| half(seed ^ 1));
        let mine = half(seed)?;
        Ok(mine + other.join().map_err(|_| internal("a picking thread panicked"))??)
    })
}

fn feed(table: &Table<'_>, fleet: &[(HostId, HostAddr)], count: usize, seq: u64) -> f64 {
    let mut rng = SmallRng::seed_from_u64(seq);
    let word = CapacityWord::new(FREE, 0, Stamp::of(Seq(seq)));
    let from = thread_time();
    for _ in 0..count {
        let at = (u64::from(rng.next_u32()) * fleet.len() as u64) >> 32;
        table.feed(fleet[at as usize].0, word);
    }
    rate(count, thread_time() - from)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pages = if self.huge { "huge pages asked for" } else { "4 KB pages" };
        writeln!(
            f,
            "picks, each with its reservation, in millions a second of a core ({pages}, seed {})",
            self.seed
        )?;
        for row in &self.rows {
            writeln!(f, "  {:>9} hosts", row.hosts)?;
            writeln!(f, "    bare two reads   {}", row.bare)?;
            writeln!(f, "    and an exchange  {}", row.bare_claim)?;
            let over = row.bare.median / row.single.median;
            writeln!(
                f,
                "    one at a time    {}; the bare loop is {over:.2} times as fast",
                row.single
            )?;
            writeln!(f, "    64 at a time     {}", row.batched)?;
            let times = row.batched_on_two.median / row.batched.median;
            writeln!(f, "    on two threads   {}; {times:.2} times one", row.batched_on_two)?;
            writeln!(f, "    words fed        {}", row.fed)?;
        }
        if let [first, .., last] = &self.rows[..] {
            let ratio = first.batched.median / last.batched.median;
            writeln!(
                f,
                "  {} to {} hosts costs {ratio:.2} times a batched pick",
                first.hosts, last.hosts
            )?;
        }
        Ok(())
    }
}
