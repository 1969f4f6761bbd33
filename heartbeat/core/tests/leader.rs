//! Publishers against an object store that loses replies, delays writes and answers late: one lineage, ever rising.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use heartbeat_core::leader::{Leader, Put, Want};
use rand::{Rng, SeedableRng, TryRngCore, rngs::SmallRng};
use wire::map::{Head, MapVersion};

/// The head object with compare-and-swap. Tokens count its writes.
#[derive(Default)]
struct Object {
    head: Option<Head>,
    token: u64,
    lineage: Vec<MapVersion>,
    /// PUTs whose sender was told nothing and which have not landed yet.
    late: Vec<(Head, Option<u64>)>,
}

impl Object {
    fn put(&mut self, head: Head, expected: Option<u64>) -> Put<u64> {
        let current = self.head.is_some().then_some(self.token);
        if expected != current {
            return Put::Lost;
        }
        if let Some(old) = &self.head {
            assert!(head.version > old.version, "{:?} over {:?}", head.version, old.version);
            assert_eq!(head.previous, old.version);
        }
        self.lineage.push(head.version);
        self.head = Some(head);
        self.token += 1;
        Put::Won(self.token)
    }

    fn land_late(&mut self, rng: &mut SmallRng) {
        if !self.late.is_empty() && rng.random_bool(0.3) {
            let at = rng.random_range(0..self.late.len());
            let (head, expected) = self.late.swap_remove(at);
            self.put(head, expected);
        }
    }
}

/// One step of one publisher; returns the version that it believes it published.
fn step(
    leader: &mut Leader<u64>,
    object: &mut Object,
    now_ms: u64,
    leased: bool,
    faults: bool,
    rng: &mut SmallRng,
) -> Option<MapVersion> {
    match leader.poll(now_ms) {
        Want::Lease => {
            let held = if faults && rng.random_bool(0.1) { None } else { Some(leased) };
            leader.handle_lease(now_ms, now_ms, held);
            None
        }
        Want::Head => {
            if faults && rng.random_bool(0.1) {
                leader.handle_head(now_ms, Err(()));
            } else {
                let before = leader.published_here();
                leader
                    .handle_head(now_ms, Ok(object.head.as_ref().map(|head| (head, object.token))));
                // A PUT that was unknown turned out to be ours.
                if !before && leader.published_here() {
                    return leader.version();
                }
            }
            None
        }
        Want::Scan => {
            leader.handle_scan(now_ms);
            None
        }
        Want::Publish => {
            leader.propose(Vec::new(), 0, rng.random(), now_ms);
            None
        }
        Want::Put { head, expected } => {
            let fate = if faults { rng.random_range(0..10) } else { 9 };
            let put = match fate {
                0 => Put::Unknown, // Never arrived.
                1 => {
                    object.late.push((head, expected));
                    Put::Unknown
                }
                2 => {
                    object.put(head, expected); // The reply was lost.
                    Put::Unknown
                }
                _ => object.put(head, expected),
            };
            leader.handle_put(now_ms, put)
        }
        Want::Wait(_) => None,
    }
}

/// M4 and M5 without a store: sixteen publishers that all believe they lead.
#[test]
fn sixteen_publishers_at_once_make_one_rising_lineage() {
    let seed = rand::rngs::OsRng.try_next_u64().unwrap();
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut object = Object::default();
    let mut leaders: Vec<Leader<u64>> = (0..16).map(|_| Leader::new()).collect();
    let mut believed = Vec::new();
    for now_ms in 0..40_000 {
        object.land_late(&mut rng);
        let at = rng.random_range(0..leaders.len());
        believed.extend(step(&mut leaders[at], &mut object, now_ms, true, true, &mut rng));
    }
    assert!(object.lineage.is_sorted_by(|a, b| a < b));
    assert!(object.lineage.len() > 100, "{} published", object.lineage.len());
    let published: std::collections::BTreeSet<_> = object.lineage.iter().copied().collect();
    assert!(believed.iter().all(|version| published.contains(version)), "nobody believes a lie");
    believed.sort_unstable();
    believed.dedup();
    println!("{} published, {} known to their publishers", published.len(), believed.len());
}

#[test]
fn a_reply_lost_after_a_put_makes_no_second_version() {
    let (mut object, mut rng) = (Object::default(), SmallRng::seed_from_u64(1));
    let mut leader = Leader::new();
    let mut now_ms = 0;
    while !matches!(leader.poll(now_ms), Want::Put { .. }) {
        step(&mut leader, &mut object, now_ms, true, false, &mut rng);
        now_ms += 1;
    }
    let Want::Put { head, expected } = leader.poll(now_ms) else { unreachable!() };
    object.put(head, expected);
    leader.handle_put(now_ms, Put::Unknown);
    for _ in 0..200 {
        now_ms += 1;
        if leader.published_here() {
            break;
        }
        step(&mut leader, &mut object, now_ms, true, false, &mut rng);
    }
    assert!(leader.published_here(), "its own nonce was found");
    assert_eq!(object.lineage, [MapVersion { epoch: 1, version: 1 }]);
}

/// M3: a leader that slept in mid-publish is fenced, and the epoch tells the two apart.
#[test]
fn a_zombie_is_fenced() {
    let (mut object, mut rng) = (Object::default(), SmallRng::seed_from_u64(1));
    let (mut zombie, mut other) = (Leader::new(), Leader::new());
    let mut now_ms = 0;
    while !matches!(zombie.poll(now_ms), Want::Put { .. }) {
        step(&mut zombie, &mut object, now_ms, true, false, &mut rng);
        now_ms += 1;
    }
    for _ in 0..100 {
        step(&mut other, &mut object, now_ms, true, false, &mut rng);
        now_ms += 1;
    }
    let before = object.lineage.clone();
    now_ms += 60_000;
    // It wakes without the lease, and what it had begun is refused.
    for _ in 0..20_000 {
        step(&mut zombie, &mut object, now_ms, false, false, &mut rng);
        now_ms += 1;
    }
    assert_eq!(object.lineage, before);
    assert_eq!(zombie.lost, 1);
    step(&mut other, &mut object, now_ms, true, false, &mut rng);
    for _ in 0..10 {
        step(&mut other, &mut object, now_ms, true, false, &mut rng);
    }
    assert!(object.lineage.len() > before.len(), "the other goes on");
    assert_eq!(object.lineage.last().unwrap().epoch, before[0].epoch);
}

#[test]
fn a_store_that_is_away_does_not_stop_the_leader() {
    let (mut object, mut rng) = (Object::default(), SmallRng::seed_from_u64(1));
    let mut leader = Leader::new();
    for now_ms in 0..60_000 {
        if leader.poll(now_ms) == Want::Lease {
            leader.handle_lease(now_ms, now_ms, (now_ms < 5_000).then_some(true));
        } else {
            step(&mut leader, &mut object, now_ms, true, false, &mut rng);
        }
    }
    assert!(leader.leads(60_000));
    assert!(object.lineage.len() > 10_000);
}
