//! Every interleaving of what is lock-free here, under loom:
//! `RUSTFLAGS="--cfg loom" cargo test -p placer-core --release --test loom`.
//!
//! The models run the very code that runs over mapped memory, on loom's atomics. Two kinds of broken cells show that the
//! models would notice: [`Lossy`] loses updates between a read and a write, [`Weak`] takes every ordering for relaxed.
//! loom 0.7 remembers one last access a cell, so that of two reads and a write after them it races only the last read with
//! the write. Each cell here has a second atomic that every access writes, relaxed: it orders nothing, and makes loom look at
//! all the interleavings. loom proves safety, not progress; for that, [`Stopping`] ends one thread after `k` of its steps, for each `k`, and the others
//! must still come to an end (loom fails a model that goes on for ever).
#![cfg(loom)]
#![expect(clippy::unwrap_used, reason = "a test that unwraps nothing fails")]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use loom::{
    sync::{Arc, atomic::AtomicU64},
    thread,
};
use placer_core::{
    Adopter, CapacityTable, MapView, Pick, Picked, Published, Select,
    map::encode,
    sync::{Cell, Ordering, Words},
    table::{FORGOTTEN_AFTER_BEATS, words_for},
};
use rand::{SeedableRng, rngs::SmallRng};
use wire::{
    CapacityWord, Code, HostId, Incarnation, SandboxId, Seq, ShapeId, Stamp,
    launch::{Refused, Started, Steps, VisibleAt},
    map::{HostAddr, MapVersion},
};

trait Made: Cell + 'static {
    fn made() -> Self;
}

macro_rules! wrapped {
    ($(#[$doc:meta])* $name:ident, $load:expr, $store:expr, $exchange:expr) => {
        $(#[$doc])*
        struct $name {
            value: AtomicU64,
            touched: AtomicU64,
        }

        impl Made for $name {
            fn made() -> Self {
                Self { value: AtomicU64::new(0), touched: AtomicU64::new(0) }
            }
        }

        impl Cell for $name {
            fn load(&self, order: Ordering) -> u64 {
                self.touched.fetch_add(1, Ordering::Relaxed);
                $load(&self.value, order)
            }

            fn store(&self, value: u64, order: Ordering) {
                self.touched.fetch_add(1, Ordering::Relaxed);
                $store(&self.value, value, order);
            }

            fn exchange(&self, old: u64, new: u64, win: Ordering, lose: Ordering) -> Result<u64, u64> {
                self.touched.fetch_add(1, Ordering::Relaxed);
                $exchange(&self.value, old, new, win, lose)
            }
        }
    };
}

wrapped! {
    /// As it is.
    Sound,
    AtomicU64::load,
    AtomicU64::store,
    AtomicU64::compare_exchange
}

wrapped! {
    /// Loses updates: its exchange is a read and a write.
    Lossy,
    AtomicU64::load,
    AtomicU64::store,
    |cell: &AtomicU64, old, new, _, _| {
        let found = cell.load(Ordering::Acquire);
        if found == old {
            cell.store(new, Ordering::Release);
            Ok(old)
        } else {
            Err(found)
        }
    }
}

wrapped! {
    /// Orders nothing.
    Weak,
    |cell: &AtomicU64, _| cell.load(Ordering::Relaxed),
    |cell: &AtomicU64, value, _| cell.store(value, Ordering::Relaxed),
    |cell: &AtomicU64, old, new, _, _| {
        cell.compare_exchange(old, new, Ordering::Relaxed, Ordering::Relaxed)
    }
}

wrapped! {
    /// Ends its thread when the thread's steps are used up.
    Stopping,
    |cell: &AtomicU64, order| { step(); cell.load(order) },
    |cell: &AtomicU64, value, order| { step(); cell.store(value, order) },
    |cell: &AtomicU64, old, new, win, lose| {
        step();
        cell.compare_exchange(old, new, win, lose)
    }
}

/// The thread that will stop, and after how many more steps.
static STOPS: std::sync::Mutex<Option<(thread::ThreadId, usize)>> = std::sync::Mutex::new(None);

struct Stopped;

fn step() {
    let mut stops = STOPS.lock().unwrap();
    let Some((thread, left)) = &mut *stops else { return };
    if *thread == thread::current().id() {
        if *left == 0 {
            drop(stops);
            resume_unwind(Box::new(Stopped));
        }
        *left -= 1;
    }
}

struct Words64<C>(Vec<C>);

impl<C: Made> Words for Words64<C> {
    type Cell = C;
    fn words(&self) -> &[C] {
        &self.0
    }
}

type Table<C> = CapacityTable<Words64<C>>;

fn shape() -> ShapeId {
    ShapeId::new(0).unwrap()
}

fn word(free: u16, seq: u64) -> CapacityWord {
    CapacityWord::new([free; 4], 0, Stamp::of(Seq(seq)))
}

fn map(version: u64, ids: &[u64]) -> MapView<Vec<u8>> {
    let addr = HostAddr { ip: [10, 0, 0, 1].into(), port: 1 };
    let hosts: Vec<_> = ids.iter().map(|id| (HostId(*id), addr)).collect();
    MapView::open(encode(MapVersion { epoch: 1, version }, &hosts)).unwrap()
}

fn empty<C: Made>(capacity: usize, generation: u64) -> Table<C> {
    let words = Words64((0..words_for(capacity)).map(|_| C::made()).collect());
    CapacityTable::create(words, generation)
}

/// A table of hosts 1, 2, ... with the free slots given, and its adopter.
fn table<C: Made>(capacity: usize, free: &[u16]) -> (Table<C>, Adopter) {
    let table = empty(capacity, 1);
    let mut adopter = Adopter::new(&table);
    let ids: Vec<u64> = (1..=free.len() as u64).collect();
    adopt(&mut adopter, &table, &map(1, &ids));
    for (id, free) in ids.iter().zip(free) {
        assert!(table.feed(HostId(*id), word(*free, 1)));
    }
    (table, adopter)
}

fn adopt<C: Made>(adopter: &mut Adopter, table: &Table<C>, map: &MapView<Vec<u8>>) {
    adopter.adopt::<_, Vec<u8>, _>(table, None, map).unwrap();
}

/// Candidates of one, so that a model looks at one slot and the window at most.
fn pick<C: Made>(table: &Table<C>, seed: u64) -> Option<Picked> {
    let mut rng = SmallRng::seed_from_u64(seed);
    match (Select { choices: 1 }).pick_once(table, &mut rng, shape()) {
        Pick::Picked(picked) => Some(picked),
        Pick::NoRoom | Pick::NoHosts => None,
    }
}

fn started(host: HostId, free: u16, said_at: u64) -> Started {
    Started {
        sandbox: SandboxId { host, local: 1 },
        visible_at: VisibleAt { incarnation: Incarnation(1), seq: Seq(said_at + 1) },
        word: word(free, said_at),
        steps: Steps::default(),
    }
}

fn count<C: Made>(table: &Table<C>, host: u64) -> u16 {
    table.get(HostId(host)).unwrap().1.count(shape())
}

fn model(body: impl Fn() + Sync + Send + 'static) {
    model_of(3, body);
}

fn model_of(preemptions: usize, body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(body);
}

/// Whether loom finds a fault in it.
fn is_caught(body: impl Fn() + Sync + Send + 'static) -> bool {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let caught = catch_unwind(AssertUnwindSafe(|| model(body))).is_err();
    std::panic::set_hook(hook);
    caught
}

fn last_slot<C: Made>() {
    let (table, _) = table::<C>(1, &[1]);
    let table = Arc::new(table);
    let other = Arc::clone(&table);
    let there = thread::spawn(move || pick(&other, 1));
    let here = pick(&table, 2);
    let there = there.join().unwrap();
    assert!(here.is_some() != there.is_some(), "the last slot is given exactly once");
    assert_eq!(count(&table, 1), 1);
    [here, there].into_iter().flatten().for_each(|one| table.release(one.reservation));
    assert_eq!(count(&table, 1), 0);
}

#[test]
fn the_last_slot_is_given_once() {
    model(last_slot::<Sound>);
}

#[test]
fn a_lost_update_is_caught() {
    assert!(is_caught(last_slot::<Lossy>), "the model must notice a slot that is given twice");
}

fn settle_against_pick<C: Made>() {
    let (table, _) = table::<C>(1, &[1]);
    let launch = pick(&table, 1).unwrap();
    let table = Arc::new(table);
    let other = Arc::clone(&table);
    let there = thread::spawn(move || {
        other.settle(launch.reservation, &started(HostId(1), 0, 1));
    });
    assert!(pick(&table, 2).is_none(), "counted twice for a moment, never not at all");
    there.join().unwrap();
    assert_eq!(count(&table, 1), 0);
}

#[test]
fn a_slot_that_is_settled_is_never_free_in_between() {
    model(settle_against_pick::<Sound>);
}

#[test]
fn missing_orderings_are_caught() {
    assert!(is_caught(adopt_against_pick::<Weak>), "a slot must not be seen before its id");
    assert!(is_caught(settle_against_pick::<Weak>), "nor a freed reservation before its word");
}

#[test]
fn feed_correction_and_settling_end_with_the_newest_word() {
    // Three threads: two preemptions are what a model can afford.
    model_of(2, || {
        let (table, _) = table::<Sound>(1, &[5]);
        let launch = pick(&table, 1).unwrap();
        let refused = pick(&table, 1).unwrap();
        let table = Arc::new(table);
        let (feeds, refuses) = (Arc::clone(&table), Arc::clone(&table));
        let feeds = thread::spawn(move || {
            feeds.feed(HostId(1), word(7, 3));
        });
        let refuses = thread::spawn(move || {
            let reply = Refused { word: word(0, 2), code: Code::NoCapacity };
            refuses.refuse(refused.reservation, &reply);
        });
        table.settle(launch.reservation, &started(HostId(1), 4, 1));
        feeds.join().unwrap();
        refuses.join().unwrap();
        let (now, reserved) = table.get(HostId(1)).unwrap();
        assert_eq!(now, Some(word(7, 3)));
        assert_eq!(reserved.count(shape()), 0);
    });
}

#[test]
fn expiry_never_takes_off_what_is_not_counted() {
    model(|| {
        let (table, _) = table::<Sound>(1, &[3]);
        let old = pick(&table, 1).unwrap();
        let table = Arc::new(table);
        let other = Arc::clone(&table);
        let feeds = thread::spawn(move || {
            other.feed(HostId(1), word(3, 1 + u64::from(FORGOTTEN_AFTER_BEATS)));
        });
        let new = pick(&table, 2);
        table.release(old.reservation);
        feeds.join().unwrap();
        assert!(count(&table, 1) <= 1, "what is counted is under way");
        new.into_iter().for_each(|one| table.release(one.reservation));
        assert_eq!(count(&table, 1), 0);
    });
}

fn adopt_against_pick<C: Made>() {
    let table = Arc::new(empty::<C>(1, 1));
    let other = Arc::clone(&table);
    let adopts = thread::spawn(move || {
        let mut adopter = Adopter::new(&*other);
        adopt(&mut adopter, &other, &map(1, &[9]));
        assert!(other.feed(HostId(9), word(1, 1)));
    });
    if let Some(one) = pick(&table, 1) {
        assert_eq!(one.reservation.host, HostId(9), "a picked slot has its host");
        table.release(one.reservation);
    }
    adopts.join().unwrap();
    assert_eq!(count(&table, 9), 0);
}

#[test]
fn a_picked_slot_has_its_host() {
    model(adopt_against_pick::<Sound>);
}

#[test]
fn a_slot_that_changes_hands_under_a_pick_keeps_its_count() {
    model(|| {
        let (table, mut adopter) = table::<Sound>(1, &[2]);
        let table = Arc::new(table);
        let other = Arc::clone(&table);
        let adopts = thread::spawn(move || {
            adopt(&mut adopter, &other, &map(2, &[9]));
            assert!(other.feed(HostId(9), word(2, 5)));
        });
        if let Some(one) = pick(&table, 1) {
            assert!([HostId(1), HostId(9)].contains(&one.reservation.host));
            table.release(one.reservation);
        }
        table.correct(HostId(1), word(1, 1));
        adopts.join().unwrap();
        let (now, reserved) = table.get(HostId(9)).unwrap();
        assert_eq!((now, reserved.count(shape())), (Some(word(2, 5)), 0));
        assert_eq!(table.slot_of(HostId(1)), None);
    });
}

#[test]
fn a_swap_blocks_no_reader_and_goes_one_way() {
    model(|| {
        let published = Published::new(Arc::new(1u64));
        let mut reader = Published::reader(&published);
        let other = Arc::clone(&published);
        let swaps = thread::spawn(move || {
            assert_eq!(*other.replace(Arc::new(2)), 1);
            assert_eq!(*other.replace(Arc::new(3)), 2);
        });
        let first = **reader.get();
        let second = **reader.get();
        assert!((1..=3).contains(&first) && first <= second && second <= 3);
        swaps.join().unwrap();
        assert_eq!(**reader.get(), 3);
    });
}

#[test]
fn growth_under_a_launch_loses_nothing() {
    model(|| {
        let (small, _) = table::<Sound>(1, &[2]);
        let published = Published::new(Arc::new(small));
        let mut reader = Published::reader(&published);
        let other = Arc::clone(&published);
        // The feed's thread is the one that grows.
        let grows = thread::spawn(move || {
            let small = Published::reader(&other).get().clone();
            let bigger = Arc::new(empty::<Sound>(2, 2));
            let _adopter = Adopter::grow(&*small, &*bigger);
            small.feed(HostId(1), word(2, 2));
            other.replace(Arc::clone(&bigger));
            Adopter::catch_up(&*small, &*bigger);
            bigger
        });
        let picked = pick(reader.get(), 1);
        // Picked from the one, it may end in the other.
        let launch = picked.unwrap();
        reader.get().settle(launch.reservation, &started(HostId(1), 1, 2));
        let bigger = grows.join().unwrap();
        let (now, reserved) = bigger.get(HostId(1)).unwrap();
        assert_eq!(now.unwrap().stamp(), Stamp::of(Seq(2)), "no word of the feed is lost");
        assert_eq!(reserved.count(shape()), 0);
        assert!(Arc::ptr_eq(reader.get(), &bigger));
    });
}

/// Runs `stops` on a thread that ends after each number of its steps up to `steps`, and `goes_on` beside it.
fn whoever_stops<S, G>(steps: usize, stops: S, goes_on: G)
where
    S: Fn(&Table<Stopping>, Adopter) + Copy + Send + Sync + 'static,
    G: Fn(&Table<Stopping>) + Copy + Send + Sync + 'static,
{
    for left in 0..steps {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(2);
        builder.check(move || {
            *STOPS.lock().unwrap() = None;
            let (table, adopter) = table::<Stopping>(1, &[1]);
            let table = Arc::new(table);
            let other = Arc::clone(&table);
            let stopping = thread::spawn(move || {
                *STOPS.lock().unwrap() = Some((thread::current().id(), left));
                let end = catch_unwind(AssertUnwindSafe(|| stops(&other, adopter)));
                if let Err(why) = end {
                    assert!(why.is::<Stopped>(), "it stopped, it did not fail");
                }
            });
            goes_on(&table);
            stopping.join().unwrap();
        });
    }
}

#[test]
fn whoever_stops_in_a_pick_or_a_feed_stops_nobody() {
    whoever_stops(
        12,
        |table, _| {
            if let Some(one) = pick(table, 1) {
                table.settle(one.reservation, &started(HostId(1), 0, 1));
            }
        },
        |table| {
            let _ = pick(table, 2).map(|one| table.release(one.reservation));
            assert!(table.feed(HostId(1), word(1, 2)));
        },
    );
}

#[test]
fn whoever_stops_in_an_adoption_stops_nobody() {
    whoever_stops(
        16,
        |table, mut adopter| adopt(&mut adopter, table, &map(2, &[9])),
        |table| {
            let _ = pick(table, 2).map(|one| table.release(one.reservation));
            table.feed(HostId(1), word(1, 2));
            table.feed(HostId(9), word(1, 2));
        },
    );
}
