//! The shard, from outside: every rule of PROTOCOL 2 and 3 that could fail, and the faults H1 to H5 without sockets.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::{BTreeMap, BTreeSet};

use heartbeat_core::{
    Heard, KeyRing, Row, Shard,
    shard::{
        gathered::Gathered,
        upkeep::{Census, Standing},
    },
};
use proptest::prelude::*;
use rand::{Rng, RngCore, SeedableRng, TryRngCore, rngs::SmallRng, seq::SliceRandom};
use wire::{
    CapacityWord, HostId, Incarnation, Seq,
    datagram::Datagram,
    heartbeat::{Directive, Heartbeat},
    limits::DATAGRAM_BYTES_MAX,
    seal::{FleetKey, KeyEpoch, Role, SenderKey},
};

fn fleet(epoch: u32) -> FleetKey {
    FleetKey { epoch: KeyEpoch(epoch), secret: [epoch.to_le_bytes()[0]; 32] }
}

fn shard() -> Shard {
    Shard::new(0, 1, KeyRing::new(vec![fleet(1)]).unwrap(), None)
}

fn beat(seq: u64) -> Heartbeat {
    Heartbeat {
        incarnation: Incarnation(1),
        seq: Seq(seq),
        ip: Heartbeat::ip_bytes([10, 0, 0, 1].into()),
        port: 7_000,
        free: [9, 8, 7, 6],
        total: [10, 10, 10, 10],
        running: 4,
        interval_ms: 15_000,
        flags: 0,
    }
}

fn sealed(host: u64, epoch: u32, beat: &Heartbeat) -> Vec<u8> {
    let mut out = [0; DATAGRAM_BYTES_MAX];
    let key = fleet(epoch).sender(Role::Host, host);
    let len = beat.seal(HostId(host), KeyEpoch(epoch), &key, &mut out);
    out[..len].to_vec()
}

/// Hands a datagram over; gives the directive that came back, opened with the host's key of `epoch`.
fn hand(
    shard: &mut Shard,
    now_ms: u64,
    host: u64,
    epoch: u32,
    beat: &Heartbeat,
) -> Option<Directive> {
    let mut out = [0; DATAGRAM_BYTES_MAX];
    match shard.handle_datagram(now_ms, &sealed(host, epoch, beat), &mut out) {
        Heard::Directive(len) => {
            let datagram = Datagram::parse(&out[..len]).unwrap();
            let verified = datagram.verify(&fleet(epoch).sender(Role::Host, host)).unwrap();
            let (to, directive) = Directive::open(&verified).unwrap();
            assert_eq!((to, directive.seq), (HostId(host), beat.seq));
            Some(directive)
        }
        Heard::Nothing => None,
        other => panic!("{other:?}"),
    }
}

fn row(shard: &Shard, host: u64) -> Option<Row> {
    let mut seen = Vec::new();
    assert_eq!(shard.seen(0, 0, usize::MAX, &mut seen), None);
    seen.iter().map(|seen| seen.row).find(|row| row.host == HostId(host))
}

#[test]
fn a_first_heartbeat_registers_and_the_newest_wins() {
    let mut shard = shard();
    assert_eq!(hand(&mut shard, 0, 7, 1, &beat(10)), None);
    assert_eq!(shard.counters().registered, 1);
    hand(&mut shard, 1, 7, 1, &Heartbeat { running: 5, ..beat(11) });
    hand(&mut shard, 2, 7, 1, &Heartbeat { running: 9, ..beat(10) });
    let newer = Heartbeat { incarnation: Incarnation(2), running: 1, ..beat(12) };
    hand(&mut shard, 3, 7, 1, &newer);
    hand(&mut shard, 4, 7, 1, &Heartbeat { running: 77, ..beat(900) });
    let row = row(&shard, 7).unwrap();
    assert_eq!((row.running, row.seq, row.total), (1, Seq(12), [10; 4]));
    assert_eq!((shard.counters().accepted, shard.counters().stale), (3, 1));
}

/// H3: replay, reorder by 64, previous incarnation: each seq applied once, state never goes back.
#[test]
fn reordered_and_repeated_heartbeats_are_applied_once_and_never_back() {
    let seed = rand::rngs::OsRng.try_next_u64().unwrap();
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut order: Vec<u64> = (1..=4_000).collect();
    order.chunks_mut(64).for_each(|part| part.shuffle(&mut rng));
    let (mut shard, mut newest) = (shard(), 0);
    for &seq in &order {
        for _ in 0..rng.random_range(1..4) {
            hand(
                &mut shard,
                seq,
                7,
                1,
                &Heartbeat { running: u32::try_from(seq).unwrap(), ..beat(seq) },
            );
            newest = newest.max(seq);
            assert_eq!(row(&shard, 7).unwrap().seq, Seq(newest));
        }
    }
    let counters = *shard.counters();
    assert_eq!(counters.accepted + counters.late, 4_000, "each once: {counters:?}");
    assert_eq!(counters.stale, 0);
    assert!(counters.replayed > 1_000);
}

/// H4: PROTOCOL 2.4, "The replay window MUST NOT move before the tag has verified."
#[test]
fn a_forged_seq_does_not_shut_out_good_ones() {
    let mut shard = shard();
    hand(&mut shard, 0, 7, 1, &beat(1));
    let mut forged = sealed(7, 1, &beat(u64::MAX));
    *forged.last_mut().unwrap() ^= 1;
    let mut out = [0; DATAGRAM_BYTES_MAX];
    assert_eq!(shard.handle_datagram(1, &forged, &mut out), Heard::Nothing);
    hand(&mut shard, 2, 7, 1, &beat(2));
    assert_eq!(row(&shard, 7).unwrap().seq, Seq(2));
    assert_eq!((shard.counters().forged, shard.counters().accepted), (1, 2));
}

/// H2: one host's key forges nothing of another.
#[test]
fn a_key_speaks_for_its_own_host_only() {
    let mut shard = shard();
    let mut out = [0; DATAGRAM_BYTES_MAX];
    let stolen = fleet(1).sender(Role::Host, 8);
    let ask = Heartbeat { flags: Heartbeat::ASK, ..beat(1) };
    let len = ask.seal(HostId(7), KeyEpoch(1), &stolen, &mut out);
    let bytes = out[..len].to_vec();
    assert_eq!(shard.handle_datagram(0, &bytes, &mut out), Heard::Nothing, "no answer either");
    let placer = fleet(1).sender(Role::Placer, 7);
    let len = beat(1).seal(HostId(7), KeyEpoch(1), &placer, &mut out);
    let bytes = out[..len].to_vec();
    assert_eq!(shard.handle_datagram(0, &bytes, &mut out), Heard::Nothing);
    let unknown = sealed(7, 9, &beat(1));
    assert_eq!(shard.handle_datagram(0, &unknown, &mut out), Heard::Nothing);
    assert!(shard.is_empty());
    assert_eq!((shard.counters().forged, shard.counters().unknown_epoch), (2, 1));
}

/// H5: a key epoch rotated under 1,000 hosts: nobody is lost, everybody moves, and a revoked host is out.
#[test]
fn a_rotation_moves_every_host_and_loses_none() {
    let mut shard = shard();
    (1..=1_000).for_each(|host| assert_eq!(hand(&mut shard, 0, host, 1, &beat(1)), None));
    shard.handle_keys(KeyRing::new(vec![fleet(1), fleet(2)]).unwrap());
    for host in 1..=1_000 {
        let directive = hand(&mut shard, 15_000, host, 1, &beat(2)).unwrap();
        assert_eq!(directive.key_epoch, 2);
        let old = fleet(1).sender(Role::Host, host);
        let key = SenderKey(old.wrap(KeyEpoch(2), &directive.wrapped_key));
        assert_eq!(key, fleet(2).sender(Role::Host, host));
        assert_eq!(hand(&mut shard, 30_000, host, 2, &beat(3)), None);
    }
    shard.handle_keys(KeyRing::new(vec![fleet(2)]).unwrap());
    let gone = shard.handle_revoked(BTreeSet::from([HostId(5)]));
    assert_eq!(gone.len(), 1);
    for host in 1..=1_000 {
        hand(&mut shard, 45_000, host, 2, &beat(4));
        hand(&mut shard, 45_000, host, 1, &beat(5));
    }
    let mut census = Census::default();
    shard.sweep(45_001, 0, usize::MAX, &mut census);
    assert_eq!((census.total, census.alive), (999, 999));
    assert_eq!((shard.counters().revoked, shard.counters().unknown_epoch), (1, 1_000));
}

#[test]
fn drains_are_told_until_obeyed_and_resumed_after() {
    let mut shard = shard();
    let draining = |seq| Heartbeat { flags: Heartbeat::DRAINING, running: 0, ..beat(seq) };
    hand(&mut shard, 0, 7, 1, &draining(1));
    assert!(hand(&mut shard, 0, 7, 1, &draining(2)).is_none(), "drains are not known yet");
    shard.handle_drains(BTreeMap::new());
    assert_eq!(hand(&mut shard, 0, 7, 1, &draining(3)).unwrap().drain, Directive::RESUME);
    assert_eq!(hand(&mut shard, 0, 7, 1, &beat(4)), None);
    let mut news = Vec::new();
    shard.take_news(10, &mut news);
    news.clear();
    shard.handle_drains(BTreeMap::from([(HostId(7), Some(60_000)), (HostId(8), None)]));
    shard.take_news(10, &mut news);
    assert!(news[0].1.has(CapacityWord::DRAINING), "the feed says so at once");
    let directive = hand(&mut shard, 50_000, 7, 1, &beat(5)).unwrap();
    assert_eq!((directive.drain, directive.drain_deadline_ms), (Directive::DRAIN, 10_000));
    assert_eq!(hand(&mut shard, 50_000, 7, 1, &draining(6)), None, "it obeyed");
    let directive = hand(&mut shard, 0, 8, 1, &beat(1)).unwrap();
    assert_eq!((directive.drain, directive.drain_deadline_ms), (Directive::DRAIN, 0));
    let mut seen = Vec::new();
    shard.seen(50_000, 0, 10, &mut seen);
    let standing = |host| seen.iter().find(|seen| seen.row.host == HostId(host)).unwrap().standing;
    assert_eq!((standing(7), standing(8)), (Standing::Drained, Standing::Draining));
}

#[test]
fn who_asks_is_answered_and_who_does_not_is_told_only_news() {
    let mut shard = Shard::new(0, 1, KeyRing::new(vec![fleet(1)]).unwrap(), Some(1_000));
    let ask = Heartbeat { flags: Heartbeat::ASK, interval_ms: 1_000, ..beat(1) };
    assert!(hand(&mut shard, 0, 7, 1, &ask).unwrap().is_empty());
    assert!(hand(&mut shard, 0, 7, 1, &ask).is_none(), "a replay is not answered");
    assert_eq!(hand(&mut shard, 0, 7, 1, &beat(2)).unwrap().interval_ms, 1_000);
}

#[test]
fn marks_clear_only_when_the_very_state_was_acknowledged() {
    let mut shard = shard();
    (0..600u64).for_each(|host| assert_eq!(hand(&mut shard, 0, host << 44, 1, &beat(1)), None));
    assert!(shard.begin_round());
    let mut batches = Vec::new();
    while let Some(batch) = shard.take_batch() {
        assert!(batch.rows.iter().all(|row| row.host.bucket() == batch.bucket));
        batches.push(batch);
    }
    assert_eq!(batches.iter().map(|batch| batch.rows.len()).collect::<Vec<_>>(), [256, 256, 88]);
    assert!(!shard.begin_round(), "nothing is sent twice while it is on its way");
    hand(&mut shard, 1, 0, 1, &beat(2));
    for (at, batch) in batches.iter().enumerate() {
        let names: Vec<_> = batch.rows.iter().map(|row| (row.host, row.written())).collect();
        shard.handle_written(&names, at != 2);
    }
    assert_eq!(shard.dirty(), 1 + 88, "the one that beat meanwhile, and the batch that failed");
    assert!(shard.begin_round());
    let again = shard.take_batch().unwrap();
    assert_eq!(again.rows.iter().map(|row| row.seq).collect::<Vec<_>>(), [Seq(2)]);
    assert_eq!(shard.take_batch().unwrap().rows, batches[2].rows);
    assert_eq!(shard.take_batch(), None);
}

#[test]
fn rows_of_the_store_come_back_and_never_over_newer_ones() {
    let mut first = shard();
    hand(&mut first, 0, 7, 1, &beat(10));
    let stored = row(&first, 7).unwrap();
    let mut second = shard();
    assert!(second.handle_row(5, &stored));
    assert!(!second.handle_row(6, &stored), "seen before");
    assert_eq!(row(&second, 7), Some(stored));
    assert!(!second.begin_round(), "what came from the store does not go back to it");
    hand(&mut second, 7, 7, 1, &beat(10));
    assert_eq!(second.counters().replayed, 1, "a restart opens no door for replays");
    hand(&mut second, 8, 7, 1, &beat(11));
    assert!(!second.handle_row(9, &stored));
    assert_eq!(row(&second, 7).unwrap().seq, Seq(11));
}

#[test]
fn the_silent_are_found_and_one_that_speaks_in_time_stays() {
    let mut shard = shard();
    (1..=10).for_each(|host| assert_eq!(hand(&mut shard, 0, host, 1, &beat(1)), None));
    (3..=10).for_each(|host| assert_eq!(hand(&mut shard, 40_000, host, 1, &beat(2)), None));
    let mut fresh = Census::default();
    shard.sweep(61_000, 0, usize::MAX, &mut fresh);
    assert_eq!((fresh.fresh, fresh.silent.len()), (2, 0), "dead, and still to be counted only");
    let mut census = Census::default();
    shard.sweep(76_000, 0, usize::MAX, &mut census);
    assert_eq!(census.silent.iter().map(|silent| silent.host.0).collect::<Vec<_>>(), [1, 2]);
    let mut early = Census::default();
    shard.sweep_as_of(61_000, 60_000, 0, usize::MAX, &mut early);
    assert_eq!((early.fresh, early.suspect), (0, 2), "the store was not looked at since");
    hand(&mut shard, 76_001, 1, 1, &beat(2));
    let removed: Vec<_> =
        census.silent.iter().filter(|silent| shard.handle_remove(silent)).collect();
    assert_eq!(removed.len(), 1);
    let (mut news, membership) = (Vec::new(), shard.membership());
    shard.take_news(100, &mut news);
    let gone = news.iter().find(|(host, _)| *host == HostId(2)).unwrap();
    assert!(gone.1.has(CapacityWord::ABSENT));
    hand(&mut shard, 77_000, 2, 1, &beat(3));
    assert_eq!(shard.len(), 10);
    assert!(shard.membership() > membership);
}

#[test]
fn a_refusals_word_corrects_the_counts_and_not_the_future() {
    let mut shard = shard();
    hand(&mut shard, 0, 7, 1, &beat(10));
    let word = |free: u16, seq| CapacityWord::new([free; 4], 0, wire::Stamp::of(Seq(seq)));
    shard.handle_correction(HostId(7), word(3, 9));
    assert_eq!(row(&shard, 7).unwrap().word.free_all(), [9, 8, 7, 6], "older: ignored");
    shard.handle_correction(HostId(7), word(0, 400_000));
    let corrected = row(&shard, 7).unwrap().word;
    assert_eq!((corrected.free_all(), corrected.stamp()), ([0; 4], wire::Stamp::of(Seq(10))));
    hand(&mut shard, 1, 7, 1, &beat(11));
    assert_eq!(row(&shard, 7).unwrap().word.free_all(), [9, 8, 7, 6]);
}

#[test]
fn hosts_of_other_shards_are_handed_on_unread() {
    let keys = || KeyRing::new(vec![fleet(1)]).unwrap();
    let mut shards: Vec<_> = (0..4).map(|at| Shard::new(at, 4, keys(), None)).collect();
    let mut out = [0; DATAGRAM_BYTES_MAX];
    for host in (0..1_000u64).map(|at| at.wrapping_mul(0x9e37_79b9_7f4a_7c15)) {
        let bytes = sealed(host, 1, &beat(1));
        let steered = u32::from_be_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]) % 4;
        for at in 0..4u32 {
            let heard = shards[at as usize].handle_datagram(0, &bytes, &mut out);
            assert_eq!(heard == Heard::Elsewhere(steered), at != steered);
        }
    }
    let counts: Vec<_> = shards.iter().map(Shard::len).collect();
    assert_eq!(counts.iter().sum::<usize>(), 1_000);
    assert!(counts.iter().all(|&count| count > 180), "{counts:?}");
}

/// Issue 4: "at most 128 bytes a host in an aggregator".
#[test]
fn a_host_takes_less_than_128_bytes() {
    let mut shard = shard();
    let mut rng = SmallRng::seed_from_u64(1);
    let template = {
        hand(&mut shard, 0, 7, 1, &beat(1));
        row(&shard, 7).unwrap()
    };
    for _ in 1..100_000 {
        assert!(shard.handle_row(0, &Row { host: HostId(rng.next_u64()), ..template }));
    }
    let bytes = shard.bytes() as f64 / shard.len() as f64;
    println!("{bytes:.1} bytes a host");
    assert!(bytes <= 128.0, "{bytes}");
}

/// A batch means what its datagrams mean one by one: answers, records, counters.
#[test]
fn batches_change_nothing_but_the_cost() {
    let seed = rand::rngs::OsRng.try_next_u64().unwrap();
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let (mut single, mut batched) = (shard(), shard());
    let (mut gathered, mut out) = (Gathered::default(), [0; DATAGRAM_BYTES_MAX]);
    let (mut answers, mut expected) = (Vec::new(), Vec::new());
    for now_ms in 0..5_000u64 {
        let flags = if rng.random_bool(0.2) { Heartbeat::ASK } else { 0 };
        let said = Heartbeat { flags, ..beat(rng.random_range(1..50)) };
        let mut bytes = sealed(rng.random_range(0..100), 1, &said);
        match rng.random_range(0..10) {
            0 => bytes[20] ^= 1,
            1 => bytes.extend([0; 200]),
            2 => bytes.truncate(rng.random_range(0..40)),
            _ => {}
        }
        if let Heard::Directive(len) = single.handle_datagram(0, &bytes, &mut out) {
            expected.push((now_ms, out[..len].to_vec()));
        }
        let full = gathered.push(&bytes, now_ms);
        if full || rng.random_bool(0.1) || now_ms == 4_999 {
            batched.handle_gathered(
                0,
                &mut gathered,
                false,
                |_| false,
                |_, _, _, answer, at| {
                    if !answer.is_empty() {
                        answers.push((at, answer.to_vec()));
                    }
                },
            );
            assert!(gathered.is_empty());
        }
    }
    assert_eq!(answers, expected);
    assert_eq!(batched.counters(), single.counters());
    (0..100).for_each(|host| assert_eq!(row(&batched, host), row(&single, host)));
}

/// PROTOCOL 2.10: "if it brought a host or an address that the store does not have yet, or while the store takes no rows".
#[test]
fn what_the_store_does_not_have_is_news_to_the_other_aggregators() {
    let (mut shard, mut out) = (shard(), [0; DATAGRAM_BYTES_MAX]);
    let mut hear = |shard: &mut Shard, seq: u64, last_of_ip: u8, away: bool| {
        let mut said = beat(seq);
        said.ip[15] = last_of_ip;
        shard.handle_datagram(0, &sealed(7, 1, &said), &mut out);
        shard.is_news_to_peers(away)
    };
    let write = |shard: &mut Shard, acknowledged| {
        shard.begin_round();
        let batch = shard.take_batch().unwrap();
        let rows: Vec<_> = batch.rows.iter().map(|row| (row.host, row.written())).collect();
        shard.handle_written(&rows, acknowledged);
    };
    assert!(hear(&mut shard, 1, 1, false), "a new host");
    assert!(hear(&mut shard, 2, 1, false), "until it is written");
    assert!(!hear(&mut shard, 2, 1, false), "a replay is no news");
    write(&mut shard, false);
    assert!(hear(&mut shard, 3, 1, false), "that one was not acknowledged");
    write(&mut shard, true);
    assert!(!hear(&mut shard, 4, 1, false), "others read it in the store");
    assert!(hear(&mut shard, 5, 1, true), "unless it is away");
    assert!(!hear(&mut shard, 6, 1, false));
    assert!(hear(&mut shard, 7, 2, false), "it moved");

    // "It MUST NOT be answered nor sent on again."
    let (mut other, ask) = (self::shard(), Heartbeat { flags: Heartbeat::ASK, ..beat(7) });
    other.handle_relayed(0, &sealed(7, 1, &ask));
    assert_eq!((other.len(), other.dirty(), other.counters().directives), (1, 0, 0));
    assert!(!other.is_news_to_peers(true));
    let mut news = Vec::new();
    other.take_news(9, &mut news);
    assert_eq!(news.len(), 1, "placers are told");
    other.handle_datagram(0, &sealed(7, 1, &beat(8)), &mut [0; DATAGRAM_BYTES_MAX]);
    assert_eq!(other.dirty(), 1, "it has come here");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    /// H1 in small: bytes at random, and good datagrams with a byte changed, are never accepted.
    #[test]
    fn junk_is_never_accepted(junk in proptest::collection::vec(any::<u8>(), 0..300), at: usize, flip in 1u8..) {
        let mut shard = shard();
        let mut out = [0; DATAGRAM_BYTES_MAX];
        prop_assert_eq!(shard.handle_datagram(0, &junk, &mut out), Heard::Nothing);
        let mut bytes = sealed(7, 1, &Heartbeat { flags: Heartbeat::ASK, ..beat(1) });
        let at = at % bytes.len();
        bytes[at] ^= flip;
        prop_assert_eq!(shard.handle_datagram(0, &bytes, &mut out), Heard::Nothing);
        bytes.truncate(at);
        prop_assert_eq!(shard.handle_datagram(0, &bytes, &mut out), Heard::Nothing);
        prop_assert_eq!(shard.counters().accepted, 0);
    }
}
