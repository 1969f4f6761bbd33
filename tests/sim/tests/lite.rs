//! The mode that CI runs: fixed seeds, a fresh one, the same seed twice, and planted bugs that must be noticed.

use rand::{TryRngCore, rngs::OsRng};
use tests_sim::{swarm, swarm::check};

/// Seeds that failed once. The first four: after an outage of the database another aggregator came to lead, and published
/// before it had read the rows of those who spoke to its neighbours.
const ONCE_BROKEN: [u64; 4] = [586, 1196, 1651, 1899];

#[test]
fn fixed_seeds_hold() {
    for seed in (1..=40).chain(ONCE_BROKEN) {
        if let Err(broken) = check(seed) {
            panic!("{broken}");
        }
    }
}

#[test]
fn a_fresh_seed_holds() {
    let seed = OsRng.try_next_u64().unwrap_or(7) >> 32;
    println!("seed {seed}");
    if let Err(broken) = check(seed) {
        panic!("{broken}");
    }
}

#[test]
fn a_seed_replays_event_by_event() {
    for seed in [3, 4, 5] {
        let (one, two) =
            (tests_sim::run(&swarm::options(seed)), tests_sim::run(&swarm::options(seed)));
        assert_eq!((one.digest, one.events), (two.digest, two.events), "seed {seed}");
        assert_eq!(one.latencies_us, two.latencies_us);
    }
    let (one, other) = (tests_sim::run(&swarm::options(3)), tests_sim::run(&swarm::options(6)));
    assert_ne!(one.digest, other.digest);
}

/// A host that answers cancels and does not obey them lets a launch run twice, or orphans it: some seed must show it.
#[test]
fn a_planted_bug_is_noticed() {
    let broken = (0..400).find_map(|seed| {
        let options = tests_sim::Options { cancels_lie: true, ..swarm::options(seed) };
        swarm::check_run(&options).err()
    });
    let broken = broken.unwrap_or_default();
    println!("{broken}");
    let noticed = ["two sandboxes", "was told to have failed", "was told Failed", "after it ended"];
    assert!(noticed.iter().any(|what| broken.contains(what)), "{broken}");
}

/// An object store that swaps whatever head is named lets two publishers make two lineages: some seed must show it.
#[test]
fn a_store_that_swaps_blindly_is_noticed() {
    let broken = (0..400).find_map(|seed| {
        let options = tests_sim::Options { swaps_blind: true, ..swarm::options(seed) };
        swarm::check_run(&options).err()
    });
    let broken = broken.unwrap_or_default();
    println!("{broken}");
    assert!(broken.contains("two lineages"), "{broken}");
}
