//! The sender against its promises: when, to whom, under which key, and what it obeys.

use std::net::SocketAddr;

use wire::{
    HostId, Incarnation, Seq,
    datagram::Datagram,
    heartbeat::{self, Directive, Heartbeat},
    limits::{DATAGRAM_BYTES_MAX, SEQ_RESERVE},
    map::HostAddr,
    seal::{KeyEpoch, SenderKey},
};

use crate::{
    admission::{Admission, Resources},
    beat::{Beat, BeatConfig, Ignored, Obey},
    limits::{BEAT_GAP_MS, HOME_INTERVALS},
    shapes::Shapes,
};

const INTERVAL_MS: u64 = 15_000;

fn to(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn key(epoch: u32) -> SenderKey {
    SenderKey([u8::try_from(epoch).unwrap(); 32])
}

fn beat() -> Beat {
    Beat::new(
        0,
        BeatConfig {
            host: HostId(7),
            incarnation: Incarnation(2),
            first_seq: Seq(100),
            reserved_to: Seq(100 + SEQ_RESERVE),
            addr: HostAddr { ip: [10, 0, 0, 1].into(), port: 7_000 },
            flags: 0,
            interval_ms: u32::try_from(INTERVAL_MS).unwrap(),
            key_epoch: KeyEpoch(1),
            key: key(1),
            aggregators: vec![to(1), to(2)],
        },
    )
}

fn admission() -> Admission {
    let whole = Resources { cpu_millis: 4_000, memory_bytes: 8 << 30 };
    Admission::new(&Shapes::default(), whole, 100, 0)
}

struct Sent {
    to: SocketAddr,
    heartbeat: Heartbeat,
}

fn poll(beat: &mut Beat, now_ms: u64, admission: &Admission) -> Option<Sent> {
    let mut out = [0; DATAGRAM_BYTES_MAX];
    let sent = beat.poll(now_ms, 0, admission, 0, &mut out)?;
    let datagram = Datagram::parse(&out[..sent.len]).unwrap();
    let epoch = datagram.sender.key_epoch.0;
    let (host, heartbeat) = heartbeat::open(&datagram.verify(&key(epoch)).unwrap()).unwrap();
    assert_eq!((host, heartbeat.seq), (HostId(7), sent.seq));
    Some(Sent { to: sent.to, heartbeat })
}

fn answer(beat: &mut Beat, now_ms: u64, directive: &Directive) -> Result<Obey, Ignored> {
    let mut out = [0; DATAGRAM_BYTES_MAX];
    let len = directive.seal(HostId(7), KeyEpoch(1), &key(1), &mut out);
    beat.handle_datagram(now_ms, &out[..len])
}

#[test]
fn the_first_is_due_at_once_and_the_next_after_the_interval() {
    let (mut beat, admission) = (beat(), admission());
    let first = poll(&mut beat, 0, &admission).unwrap().heartbeat;
    assert_eq!(first.seq, Seq(100));
    assert!(first.flags & Heartbeat::ASK != 0);
    answer(&mut beat, 1, &Directive::answering(Incarnation(2), Seq(100))).unwrap();
    assert_eq!(beat.poll_timeout(), INTERVAL_MS * 9 / 10);
    assert!(poll(&mut beat, INTERVAL_MS * 9 / 10 - 1, &admission).is_none());
    assert!(poll(&mut beat, INTERVAL_MS * 9 / 10, &admission).is_some());
}

#[test]
fn a_crossed_quarter_and_a_drain_are_told_at_once_but_not_in_a_flood() {
    let (mut beat, mut admission) = (beat(), admission());
    poll(&mut beat, 0, &admission).unwrap();
    answer(&mut beat, 1, &Directive::answering(Incarnation(2), Seq(100))).unwrap();
    let nano = wire::ShapeId::new(0).unwrap();
    admission.take(nano).unwrap();
    beat.handle_capacity(10, &admission);
    assert_eq!(beat.poll_timeout(), BEAT_GAP_MS);
    let told = poll(&mut beat, BEAT_GAP_MS, &admission).unwrap().heartbeat;
    assert_eq!(told.free[0], 15);
    admission.take(nano).unwrap();
    beat.handle_capacity(110, &admission);
    assert!(beat.poll_timeout() > 10_000, "within one quarter nothing is hastened");
    admission.set_draining(true);
    beat.handle_capacity(500, &admission);
    let drains = poll(&mut beat, 500, &admission).unwrap().heartbeat;
    assert!(drains.flags & Heartbeat::DRAINING != 0);
    beat.handle_stop(600);
    assert!(poll(&mut beat, 600, &admission).unwrap().heartbeat.flags & Heartbeat::STOPPING != 0);
    assert!(poll(&mut beat, u64::MAX - 1, &admission).is_none(), "the last is the last");
}

#[test]
fn silence_leads_to_the_next_aggregator_and_an_answer_home() {
    let (mut beat, admission) = (beat(), admission());
    let mut now_ms = 0;
    let mut tos = vec![];
    for _ in 0..4 {
        tos.push(poll(&mut beat, now_ms, &admission).unwrap().to);
        now_ms = beat.poll_timeout();
    }
    assert_eq!(tos, [to(1), to(1), to(1), to(2)]);
    assert!(now_ms <= 4_000, "found within seconds");
    let last = Seq(beat.next_seq().0 - 1);
    answer(&mut beat, now_ms, &Directive::answering(Incarnation(2), last)).unwrap();
    // Until it is time to look whether the first is back.
    let home = loop {
        let sent = poll(&mut beat, now_ms, &admission);
        if let Some(sent) = sent {
            if sent.to == to(1) {
                break sent.heartbeat.seq;
            }
            answer(&mut beat, now_ms, &Directive::answering(Incarnation(2), sent.heartbeat.seq))
                .unwrap();
        }
        now_ms = beat.poll_timeout();
        assert!(now_ms < INTERVAL_MS * HOME_INTERVALS * 3);
    };
    answer(&mut beat, now_ms, &Directive::answering(Incarnation(2), home)).unwrap();
    assert_eq!(beat.aggregator(), Some(to(1)));
}

#[test]
fn stale_and_forged_directives_are_ignored() {
    let (mut beat, admission) = (beat(), admission());
    poll(&mut beat, 0, &admission).unwrap();
    let directive = |incarnation, seq| Directive {
        drain: Directive::DRAIN,
        ..Directive::answering(Incarnation(incarnation), Seq(seq))
    };
    assert_eq!(answer(&mut beat, 1, &directive(1, 100)), Err(Ignored::Stale));
    assert_eq!(answer(&mut beat, 1, &directive(2, 101)), Err(Ignored::Stale), "never sent");
    assert_eq!(answer(&mut beat, 1, &directive(2, 99)), Err(Ignored::Stale));
    let mut out = [0; DATAGRAM_BYTES_MAX];
    let len = directive(2, 100).seal(HostId(7), KeyEpoch(1), &key(2), &mut out);
    assert_eq!(beat.handle_datagram(1, &out[..len]), Err(Ignored::Forged));
    assert_eq!(answer(&mut beat, 1, &directive(2, 100)).unwrap().drain_ms, Some(0));
    poll(&mut beat, 20_000, &admission).unwrap();
    answer(&mut beat, 20_001, &Directive::answering(Incarnation(2), Seq(101))).unwrap();
    assert_eq!(answer(&mut beat, 20_002, &directive(2, 100)), Err(Ignored::Stale), "older");
}

#[test]
fn a_new_key_epoch_and_interval_are_used_from_the_next_heartbeat_on() {
    let (mut beat, admission) = (beat(), admission());
    poll(&mut beat, 0, &admission).unwrap();
    let directive = Directive {
        key_epoch: 2,
        wrapped_key: key(1).wrap(KeyEpoch(2), &key(2).0),
        interval_ms: 1_000,
        ..Directive::answering(Incarnation(2), Seq(100))
    };
    let obey = answer(&mut beat, 1, &directive).unwrap();
    assert_eq!(obey.key, Some((KeyEpoch(2), key(2))));
    let next = poll(&mut beat, 1_001, &admission).unwrap().heartbeat;
    assert_eq!(next.interval_ms, 1_000);
    assert_eq!(answer(&mut beat, 1_002, &directive), Err(Ignored::Forged), "the old key is gone");
}

#[test]
fn numbers_are_used_only_once_they_are_reserved() {
    let (mut beat, admission) = (beat(), admission());
    beat.unreserve_for_test(Seq(101));
    assert!(poll(&mut beat, 0, &admission).is_some());
    assert!(poll(&mut beat, 100_000, &admission).is_none(), "not reserved");
    let to = beat.poll_reserve().unwrap();
    beat.handle_reserved(to);
    assert_eq!(poll(&mut beat, 100_000, &admission).unwrap().heartbeat.seq, Seq(101));
    assert_eq!(beat.poll_reserve(), None);
}
