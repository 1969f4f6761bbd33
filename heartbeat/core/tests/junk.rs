//! FAULTS H1: "10^7 random and mutated datagrams: no panic, none accepted, no allocation a bad packet."
//!
//! 300,000 by default; `VOLLEY_H1_DATAGRAMS=10000000` for all of them (heartbeat/DESIGN.md has the figure).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

use heartbeat_core::{Heard, KeyRing, Shard};
use rand::{Rng as _, RngCore as _, SeedableRng as _, TryRngCore as _, rngs::SmallRng};
use wire::{
    HostId, Incarnation, Seq,
    heartbeat::Heartbeat,
    limits::DATAGRAM_BYTES_MAX,
    seal::{FleetKey, KeyEpoch, Role},
};

/// Counts what this thread allocates.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call is handed on to the system's allocator unchanged; the count lives in a thread local that needs no
// allocation and no destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the allocator's contract, which is the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above; what it frees came from `alloc` here and so from the system.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn beat(seq: u64) -> Heartbeat {
    Heartbeat {
        incarnation: Incarnation(1),
        seq: Seq(seq),
        ip: [7; 16],
        port: 7_400,
        free: [8; 4],
        total: [8; 4],
        running: 0,
        interval_ms: 15_000,
        flags: Heartbeat::ASK,
    }
}

/// Junk in a buffer of fixed size, so that making it allocates nothing either.
fn spoil(rng: &mut SmallRng, good: &[u8], out: &mut [u8; 400]) -> usize {
    let mut len = good.len();
    out[..len].copy_from_slice(good);
    match rng.random_range(0..8) {
        // At random altogether.
        0 => {
            len = rng.random_range(0..out.len());
            rng.fill_bytes(&mut out[..len]);
        }
        // The right head over a body at random.
        1 => rng.fill_bytes(&mut out[20..len]),
        2 => len = rng.random_range(0..len),
        3 => {
            let longer = rng.random_range(len + 1..out.len());
            rng.fill_bytes(&mut out[len..longer]);
            len = longer;
        }
        _ => {
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..len);
                out[at] = out[at].wrapping_add(rng.random_range(1..=255));
            }
        }
    }
    len
}

#[test]
fn no_bad_datagram_is_accepted_or_allocates() {
    let seed = rand::rngs::OsRng.try_next_u64().unwrap();
    let asked = std::env::var("VOLLEY_H1_DATAGRAMS").ok().and_then(|text| text.parse().ok());
    let datagrams: u64 = asked.unwrap_or(300_000);
    println!("seed {seed}, {datagrams} datagrams");
    let mut rng = SmallRng::seed_from_u64(seed);
    let key = FleetKey { epoch: KeyEpoch(1), secret: [7; 32] };
    let mut shard = Shard::new(0, 1, KeyRing::new(vec![key.clone()]).unwrap(), None);
    let mut out = [0; DATAGRAM_BYTES_MAX];
    let mut seal = |host: u64, seq: u64| {
        let sender = key.sender(Role::Host, host);
        let len = beat(seq).seal(HostId(host), KeyEpoch(1), &sender, &mut out);
        out[..len].to_vec()
    };
    let good: Vec<Vec<u8>> = (0..1_000).map(|host| seal(host, 2)).collect();
    // Half of them are known, so that their keys are cached.
    let known: Vec<Vec<u8>> = (0..500).map(|host| seal(host, 1)).collect();
    for datagram in &known {
        shard.handle_datagram(0, datagram, &mut out);
    }
    let mut junk = [0; 400];
    let before = ALLOCATIONS.get();
    for at in 0..datagrams {
        let from = &good[rng.random_range(0..good.len())];
        let len = spoil(&mut rng, from, &mut junk);
        if junk[..len] != from[..] {
            let heard = shard.handle_datagram(at, &junk[..len], &mut out);
            assert_eq!(heard, Heard::Nothing, "{:?}", &junk[..len]);
        }
    }
    let allocated = ALLOCATIONS.get() - before;
    println!("{allocated} allocations, {:?}", shard.counters());
    assert_eq!(allocated, 0);
    assert_eq!((shard.counters().accepted, shard.len()), (500, 500));
}
