//! The table, adoption, growth and selection as the daemon uses them, on one thread.
#![expect(clippy::unwrap_used, reason = "a test that unwraps nothing fails")]

use placer_core::{
    Adopter, CapacityTable, MapView, Pick, Picker, Select,
    map::encode,
    select::WINDOW_SLOTS,
    sync::zeroed,
    table::{FORGOTTEN_AFTER_BEATS, SLOT_WORDS, words_for},
};
use rand::{Rng, SeedableRng, TryRngCore, rngs::SmallRng};
use std::{net::IpAddr, sync::atomic::AtomicU64};
use wire::{
    CapacityWord, Code, HostId, SandboxId, Seq, ShapeId, Stamp,
    launch::{Refused, Started, Steps, VisibleAt},
    map::{HostAddr, MapVersion},
};

type Table = CapacityTable<Vec<AtomicU64>>;

const NANO: ShapeId = match ShapeId::new(0) {
    Some(shape) => shape,
    None => unreachable!(),
};

fn word(free: u16, seq: u64) -> CapacityWord {
    CapacityWord::new([free; 4], 0, Stamp::of(Seq(seq)))
}

fn map(version: u64, mut ids: Vec<u64>) -> MapView<Vec<u8>> {
    ids.sort_unstable();
    let addr = |id: u64| HostAddr {
        ip: IpAddr::from(id.to_be_bytes()[..4].try_into().map_or([10; 4], |ip: [u8; 4]| ip)),
        port: 9,
    };
    let hosts: Vec<_> = ids.iter().map(|id| (HostId(*id), addr(*id))).collect();
    MapView::open(encode(MapVersion { epoch: 1, version }, &hosts)).unwrap()
}

fn table(capacity: usize, hosts: u64, free: u16) -> Table {
    let table = CapacityTable::create(zeroed(words_for(capacity)), 1);
    let ids: Vec<u64> = (1..=hosts).collect();
    Adopter::new(&table).adopt::<_, Vec<u8>, _>(&table, None, &map(1, ids)).unwrap();
    for id in 1..=hosts {
        assert!(table.feed(HostId(id), word(free, 1)));
    }
    table
}

fn started(host: HostId, free: u16, said_at: u64) -> Started {
    Started {
        sandbox: SandboxId { host, local: 1 },
        visible_at: VisibleAt { incarnation: wire::Incarnation(1), seq: Seq(said_at + 1) },
        word: word(free, said_at),
        steps: Steps::default(),
    }
}

fn picked(pick: Pick) -> placer_core::Picked {
    match pick {
        Pick::Picked(picked) => picked,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_host_costs_32_bytes() {
    assert_eq!(SLOT_WORDS * 8, 32);
    assert_eq!(words_for(1_000_000) * 8, 32_000_256);
}

#[test]
fn the_last_slot_is_given_once_and_comes_back() {
    let table = table(4, 1, 1);
    let mut rng = SmallRng::seed_from_u64(1);
    let one = picked(Select::default().pick(&table, &mut rng, NANO, &[]));
    assert_eq!(one.reservation.host, HostId(1));
    assert_eq!(Select::default().pick(&table, &mut rng, NANO, &[]), Pick::NoRoom);
    table.release(one.reservation);
    picked(Select::default().pick(&table, &mut rng, NANO, &[]));
}

#[test]
fn an_empty_table_has_no_hosts_and_an_unheard_host_no_room() {
    let table = CapacityTable::create(zeroed(words_for(4)), 1);
    let mut rng = SmallRng::seed_from_u64(1);
    assert_eq!(Select::default().pick(&table, &mut rng, NANO, &[]), Pick::NoHosts);
    let mut adopter = Adopter::new(&table);
    adopter.adopt::<_, Vec<u8>, _>(&table, None, &map(1, vec![7])).unwrap();
    assert_eq!(Select::default().pick(&table, &mut rng, NANO, &[]), Pick::NoRoom);
    assert!(table.feed(HostId(7), word(1, 900_000)), "any stamp is news of an unheard host");
    picked(Select::default().pick(&table, &mut rng, NANO, &[]));
}

#[test]
fn a_reservation_ends_exactly_with_the_heartbeat_that_counts_it() {
    let table = table(4, 1, 2);
    let mut rng = SmallRng::seed_from_u64(1);
    let host = HostId(1);
    let free = || table.get(host).unwrap().0.unwrap().free(NANO);
    assert!(table.feed(host, word(2, 10)));
    let launch = picked(Select::default().pick(&table, &mut rng, NANO, &[]));
    table.settle(launch.reservation, &started(host, 1, 11));
    assert_eq!(free(), 1);
    assert!(!table.feed(host, word(2, 11)), "the heartbeat before does not undo it");
    assert_eq!(free(), 1);
    assert!(table.feed(host, word(2, 12)), "the heartbeat that counts it replaces it");
    assert_eq!(free(), 2);

    // The reply comes after the heartbeat that counts it: nothing is counted twice.
    let launch = picked(Select::default().pick(&table, &mut rng, NANO, &[]));
    assert!(table.feed(host, word(1, 13)));
    table.settle(launch.reservation, &started(host, 1, 12));
    assert_eq!(free(), 1);
    assert_eq!(table.get(host).unwrap().1.count(NANO), 0);
}

#[test]
fn a_refusal_corrects_and_keeps_a_quarantine() {
    let table = table(4, 1, 9);
    let mut rng = SmallRng::seed_from_u64(1);
    let launch = picked(Select::default().pick(&table, &mut rng, NANO, &[]));
    assert!(table.feed(HostId(1), word(9, 5).with(CapacityWord::QUARANTINED)));
    table.refuse(launch.reservation, &Refused { word: word(3, 5), code: Code::NoCapacity });
    let (now, reserved) = table.get(HostId(1)).unwrap();
    assert_eq!(now.unwrap(), word(3, 5).with(CapacityWord::QUARANTINED));
    assert_eq!(reserved.count(NANO), 0);
    assert_eq!(Select::default().pick(&table, &mut rng, NANO, &[]), Pick::NoRoom);
    assert!(table.feed(HostId(1), word(3, 6)), "the aggregator takes it off");
    picked(Select::default().pick(&table, &mut rng, NANO, &[]));
}

#[test]
fn the_same_heartbeat_again_brings_flags_and_lower_counts_only() {
    let table = table(4, 1, 9);
    let now = || table.get(HostId(1)).unwrap().0.unwrap();
    assert!(table.feed(HostId(1), word(9, 1).with(CapacityWord::QUARANTINED)));
    assert!(now().has(CapacityWord::QUARANTINED));
    assert!(table.feed(HostId(1), word(4, 1)), "released, and another placer was refused");
    assert_eq!(now(), word(4, 1));
    assert!(!table.feed(HostId(1), word(9, 1)), "delayed on the way");
    assert_eq!(now(), word(4, 1));
    assert!(!table.feed(HostId(1), word(1, 0)));
}

#[test]
fn what_a_crashed_placer_reserved_is_forgotten() {
    let table = table(4, 1, 1);
    let mut rng = SmallRng::seed_from_u64(1);
    let lost = picked(Select::default().pick(&table, &mut rng, NANO, &[]));
    for beat in 2..=u64::from(FORGOTTEN_AFTER_BEATS) {
        table.feed(HostId(1), word(1, beat));
        assert_eq!(Select::default().pick(&table, &mut rng, NANO, &[]), Pick::NoRoom);
    }
    table.feed(HostId(1), word(1, 1 + u64::from(FORGOTTEN_AFTER_BEATS)));
    let next = picked(Select::default().pick(&table, &mut rng, NANO, &[]));
    table.release(lost.reservation); // It comes back after all, of an older generation: nothing happens.
    assert_eq!(table.get(HostId(1)).unwrap().1.count(NANO), 1);
    table.release(next.reservation);
}

#[test]
fn a_slot_that_changed_hands_is_not_charged_for_its_last_host() {
    let table = table(1, 1, 5);
    let mut rng = SmallRng::seed_from_u64(1);
    let old = picked(Select::default().pick(&table, &mut rng, NANO, &[]));
    let mut adopter = Adopter::new(&table);
    adopter.adopt::<_, Vec<u8>, _>(&table, None, &map(2, vec![50])).unwrap();
    assert!(!table.feed(HostId(1), word(5, 9)), "a host that left is not heard");
    assert!(table.feed(HostId(50), word(5, 1)));
    let new = picked(Select::default().pick(&table, &mut rng, NANO, &[]));
    assert_eq!(new.reservation.host, HostId(50));
    table.settle(old.reservation, &started(HostId(1), 0, 90));
    let (word_now, reserved) = table.get(HostId(50)).unwrap();
    assert_eq!((word_now, reserved.count(NANO)), (Some(word(5, 1)), 1));
    table.release(new.reservation);
}

#[test]
fn adoption_keeps_slots_fills_holes_and_survives_a_crash() {
    let seed = rand::rngs::OsRng.try_next_u64().unwrap();
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut ids: Vec<u64> = (0..2_000).map(|_| rng.random()).collect();
    let table = CapacityTable::create(zeroed(words_for(2_400)), 1);
    let mut adopter = Adopter::new(&table);
    let mut old = map(1, ids.clone());
    adopter.adopt::<_, Vec<u8>, _>(&table, None, &old).unwrap();
    for round in 2..60 {
        let slots: Vec<_> = ids.iter().map(|id| (*id, table.slot_of(HostId(*id)))).collect();
        for _ in 0..rng.random_range(0..400) {
            let at = rng.random_range(0..ids.len());
            ids[at] = rng.random();
        }
        ids.sort_unstable();
        ids.dedup();
        let new = map(round, ids.clone());
        let known = rng.random_bool(0.5).then_some(&old);
        adopter.adopt(&table, known, &new).unwrap();
        if rng.random_bool(0.2) {
            adopter = Adopter::new(&table); // As after a restart.
        }
        assert_eq!(table.live(), ids.len() as u64);
        assert_eq!(table.map_version(), new.version());
        assert!(table.len() <= ids.len() + 400, "holes are filled in the next round");
        for id in &ids {
            let slot = table.slot_of(HostId(*id)).expect("every host of the map has a slot");
            assert_eq!(table.at(slot as usize).map(|(host, _)| host), Some(HostId(*id)));
        }
        for (id, slot) in slots {
            let stays = ids.binary_search(&id).is_ok();
            assert_eq!(table.slot_of(HostId(id)), if stays { slot } else { None });
        }
        old = new;
    }
    let too_many = map(99, (1..=2_401).collect());
    assert!(adopter.adopt(&table, Some(&old), &too_many).is_err());
    assert_eq!(table.live(), ids.len() as u64, "and nothing was changed");
}

#[test]
fn growth_keeps_words_and_points_to_its_successor() {
    let small = table(100, 100, 7);
    let bigger = CapacityTable::create(zeroed(words_for(200)), 2);
    let _adopter = Adopter::grow(&small, &bigger);
    small.feed(HostId(3), word(1, 2));
    Adopter::catch_up(&small, &bigger);
    assert_eq!(small.successor(), Some(2));
    assert_eq!((bigger.live(), bigger.map_version()), (100, small.map_version()));
    for id in 1..=100 {
        let free = bigger.get(HostId(id)).unwrap().0.unwrap().free(NANO);
        assert_eq!(free, if id == 3 { 1 } else { 7 });
    }
    // A launch that was picked from the small table ends in the bigger one.
    let mut rng = SmallRng::seed_from_u64(4);
    let launch = picked(Select::default().pick(&small, &mut rng, NANO, &[]));
    let host = launch.reservation.host;
    bigger.settle(launch.reservation, &started(host, 4, 5));
    assert_eq!(bigger.get(host).unwrap().0.unwrap().free(NANO), 4);
}

#[test]
fn a_table_is_taken_up_again_or_refused() {
    let first = table(8, 8, 3);
    let copy: Vec<AtomicU64> = (0..words_for(8)).map(|_| AtomicU64::new(0)).collect();
    assert!(CapacityTable::open(&copy[..]).is_err());
    drop(first);
    let words = zeroed(words_for(8));
    let made = CapacityTable::create(&words[..], 77);
    Adopter::new(&made).adopt::<_, Vec<u8>, _>(&made, None, &map(1, vec![1, 2])).unwrap();
    made.feed(HostId(2), word(3, 3));
    let again = CapacityTable::open(&words[..]).unwrap();
    assert_eq!((again.generation(), again.live()), (77, 2));
    assert_eq!(again.get(HostId(2)).unwrap().0, Some(word(3, 3)));
    assert!(CapacityTable::open(&words[..40]).is_err(), "truncated");
}

#[test]
fn picks_are_uniform_also_with_holes_ties_and_exclusions() {
    let hosts = 97;
    for choices in [1, 2, 3, 8] {
        let table = table(128, hosts, 1_000);
        let mut adopter = Adopter::new(&table);
        let kept: Vec<u64> = (1..=hosts).filter(|id| id % 10 != 0).collect();
        adopter.adopt::<_, Vec<u8>, _>(&table, None, &map(2, kept.clone())).unwrap();
        let mut rng = SmallRng::seed_from_u64(5);
        let mut counts = vec![0u32; 98];
        let excluded = [HostId(1), HostId(2)];
        let draws = 95_000;
        for _ in 0..draws {
            let one = picked(Select { choices }.pick(&table, &mut rng, NANO, &excluded));
            counts[usize::try_from(one.reservation.host.0).unwrap()] += 1;
            table.release(one.reservation);
        }
        let fair = f64::from(draws) / (kept.len() - 2) as f64;
        for id in kept.into_iter().filter(|id| *id > 2) {
            let share = f64::from(counts[usize::try_from(id).unwrap()]) / fair;
            assert!((0.8..1.2).contains(&share), "k {choices}, host {id}: {share}");
        }
        assert_eq!(counts[1] + counts[2], 0);
    }
}

#[test]
fn the_emptier_host_wins_and_the_last_room_is_found() {
    let table = table(10_000, 10_000, 0);
    let mut rng = SmallRng::seed_from_u64(6);
    assert_eq!(Select::default().pick(&table, &mut rng, NANO, &[]), Pick::NoRoom);
    for id in (1..10_000).step_by(WINDOW_SLOTS / 2) {
        table.feed(HostId(id), word(1, 2));
    }
    for _ in 0..100 {
        let one = picked(Select::default().pick(&table, &mut rng, NANO, &[]));
        table.release(one.reservation);
    }
    let two = self::table(2, 2, 1);
    two.feed(HostId(2), word(9, 2));
    for _ in 0..8 {
        assert_eq!(
            picked(Select::default().pick(&two, &mut rng, NANO, &[])).reservation.host,
            HostId(2)
        );
    }
}

#[test]
fn a_batch_picks_what_single_picks_would() {
    let table = table(1_000, 1_000, 3);
    let mut picker = Picker::new(Select::default(), 7);
    let mut out: Vec<Pick> = (0..3_000).map(|_| Pick::NoHosts).collect();
    picker.pick_batch(&table, &vec![NANO; 3_000], &mut out);
    let got = out.iter().filter(|pick| matches!(pick, Pick::Picked(_))).count();
    let held: u32 =
        (1..=1_000).map(|id| u32::from(table.get(HostId(id)).unwrap().1.count(NANO))).sum();
    assert_eq!(got, held as usize);
    assert!(got > 2_900, "{got}: the last ones are hard to find, the first are not");
    assert!((1..=1_000).all(|id| table.get(HostId(id)).unwrap().1.count(NANO) <= 3));
}

#[test]
fn penalties_keep_hosts_out_and_decay() {
    let table = table(100, 100, 1_000);
    let mut rng = SmallRng::seed_from_u64(8);
    let mut share = |table: &Table| {
        let mut of_one = 0;
        for _ in 0..20_000 {
            let one = picked(Select::default().pick(table, &mut rng, NANO, &[]));
            of_one += u32::from(one.reservation.host == HostId(1));
            table.release(one.reservation);
        }
        of_one
    };
    assert!((150..250).contains(&share(&table)));
    let mut rng = SmallRng::seed_from_u64(9);
    let on = loop {
        let one = picked(Select::default().pick(&table, &mut rng, NANO, &[]));
        if one.reservation.host == HostId(1) {
            break one.reservation;
        }
        table.release(one.reservation);
    };
    table.penalise(&on, 6, 10);
    table.release(on);
    assert!(share(&table) < 12);
    for tick in 1..=6 {
        assert!(table.decay(tick));
        assert!(!table.decay(tick), "once a tick");
    }
    assert!((150..250).contains(&share(&table)));
}

#[test]
fn a_damaged_table_gives_bad_picks_and_nothing_worse() {
    let seed = rand::rngs::OsRng.try_next_u64().unwrap();
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    for _ in 0..200 {
        let words = zeroed(words_for(16));
        let made = CapacityTable::create(&words[..], 3);
        Adopter::new(&made)
            .adopt::<_, Vec<u8>, _>(&made, None, &map(1, (1..=9).collect()))
            .unwrap();
        // Everything but magic and size, as a bad disk or a bad neighbour may leave it.
        for word in &words[2..] {
            if rng.random_bool(0.5) {
                word.store(rng.random(), std::sync::atomic::Ordering::Relaxed);
            }
        }
        let table = CapacityTable::open(&words[..]).unwrap();
        let mut picker = Picker::new(Select::default(), rng.random());
        for _ in 0..50 {
            if let Pick::Picked(picked) = picker.pick(&table, NANO, &[HostId(2)]) {
                table.penalise(&picked.reservation, 3, 10);
                table.release(picked.reservation);
            }
            table.feed(HostId(rng.random_range(0..12)), word(rng.random(), rng.random()));
        }
        table.decay(rng.random());
        let mut adopter = Adopter::new(&table);
        adopter.adopt::<_, Vec<u8>, _>(&table, None, &map(2, (5..=14).collect())).unwrap();
    }
}
