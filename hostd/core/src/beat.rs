//! When the next heartbeat goes out, to whom and under which key; and what a directive changes. DESIGN 3.1.
//!
//! A heartbeat leaves every interval with a tenth of jitter; at once when the free capacity of any shape crosses a
//! quarter, on a drain and on the stop; never two within [`BEAT_GAP_MS`]. Every second one asks for an answer
//! (PROTOCOL 3.5). Asks that stay open are sent again, and then the next aggregator of the bucket's order is
//! taken; from time to time the first is tried again, each host at a moment of its own.

use std::net::SocketAddr;

use wire::{
    HostId, Incarnation, Seq,
    datagram::{Datagram, Kind},
    heartbeat::{Directive, Heartbeat},
    limits::{DATAGRAM_BYTES_MAX, SEQ_RESERVE, SHAPES_MAX},
    map::HostAddr,
    seal::{KeyEpoch, Role, SenderKey},
};

use crate::{
    admission::Admission,
    limits::{ASK_EVERY, ASK_TRIES, ASK_WAIT_MS, BEAT_GAP_MS, HOME_INTERVALS},
};

/// What a sender is set up with.
#[derive(Clone, Debug)]
pub struct BeatConfig {
    /// Whose heartbeats.
    pub host: HostId,
    /// This start of the daemon.
    pub incarnation: Incarnation,
    /// The first seq to use: the end of the last reservation of earlier starts (PROTOCOL 2.6).
    pub first_seq: Seq,
    /// The first seq that is not yet reserved durably.
    pub reserved_to: Seq,
    /// Where launches go.
    pub addr: HostAddr,
    /// Flags that are always up, such as [`Heartbeat::NO_BOXES`].
    pub flags: u16,
    /// Milliseconds between heartbeats until a directive says otherwise.
    pub interval_ms: u32,
    /// The epoch of `key`.
    pub key_epoch: KeyEpoch,
    /// The host's own key.
    pub key: SenderKey,
    /// Aggregators in the order in which this host tries them (`wire::rendezvous::ranked`).
    pub aggregators: Vec<SocketAddr>,
}

/// A sealed heartbeat to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// Its bytes in the buffer.
    pub len: usize,
    /// To whom.
    pub to: SocketAddr,
    /// Its count.
    pub seq: Seq,
}

/// What the rest of the daemon must do about a directive.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Obey {
    /// Start a drain: milliseconds until what still runs is ended, zero for never.
    pub drain_ms: Option<u64>,
    /// End a drain.
    pub resume: bool,
    /// Keep this key durably; the sender uses it already.
    pub key: Option<(KeyEpoch, SenderKey)>,
}

/// Why a datagram was not obeyed. For a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ignored {
    /// Not a directive under our key.
    Forged,
    /// Of another incarnation, of a heartbeat never sent, or older than one that was obeyed (PROTOCOL 3.2).
    Stale,
}

/// The sender of one host.
#[derive(Debug)]
pub struct Beat {
    config: BeatConfig,
    next_seq: Seq,
    due_ms: u64,
    sent_ms: Option<u64>,
    /// Quarters of each shape that were free in the last heartbeat.
    quarters: [u8; SHAPES_MAX],
    draining: bool,
    stopping: bool,
    /// Index into the aggregators.
    at: usize,
    since_ask: u32,
    /// Asks that are open, and when the next is due.
    tries: u32,
    ask_again_ms: Option<u64>,
    home_ms: Option<u64>,
    /// The seq of a heartbeat that asked the first aggregator whether it is back.
    home_seq: Option<Seq>,
    obeyed: Seq,
}

impl Beat {
    /// A sender whose first heartbeat is due at once: it registers the host.
    #[must_use]
    pub fn new(now_ms: u64, config: BeatConfig) -> Self {
        Self {
            next_seq: config.first_seq,
            due_ms: now_ms,
            sent_ms: None,
            quarters: [0; SHAPES_MAX],
            draining: false,
            stopping: false,
            at: 0,
            since_ask: ASK_EVERY,
            tries: 0,
            ask_again_ms: None,
            home_ms: None,
            home_seq: None,
            obeyed: Seq(0),
            config,
        }
    }

    /// The next heartbeat's count: what is admitted now is in it (`visible_at`).
    #[must_use]
    pub const fn next_seq(&self) -> Seq {
        self.next_seq
    }

    /// The aggregator that is sent to.
    #[must_use]
    pub fn aggregator(&self) -> Option<SocketAddr> {
        self.config.aggregators.get(self.at).copied()
    }

    /// Milliseconds between heartbeats.
    #[must_use]
    pub const fn interval_ms(&self) -> u32 {
        self.config.interval_ms
    }

    /// Looks whether the capacity has changed enough to be told at once.
    pub fn handle_capacity(&mut self, now_ms: u64, admission: &Admission) {
        let changed = quarters(admission) != self.quarters || admission.draining() != self.draining;
        if changed && self.sent_ms.is_some() {
            self.hasten(now_ms);
        }
    }

    /// The daemon stops: one more heartbeat says so, and it is the last.
    pub fn handle_stop(&mut self, now_ms: u64) {
        self.stopping = true;
        self.due_ms = now_ms;
        self.ask_again_ms = None;
    }

    fn hasten(&mut self, now_ms: u64) {
        let soonest = self.sent_ms.map_or(now_ms, |sent| now_ms.max(sent + BEAT_GAP_MS));
        self.due_ms = self.due_ms.min(soonest);
    }

    /// When [`Beat::poll`] has something to send, in ms.
    #[must_use]
    pub fn poll_timeout(&self) -> u64 {
        self.ask_again_ms.map_or(self.due_ms, |ask| ask.min(self.due_ms))
    }

    /// The seq up to which numbers must be reserved durably before they are used, if it is time; answer with
    /// [`Beat::handle_reserved`].
    #[must_use]
    pub fn poll_reserve(&self) -> Option<Seq> {
        let left = self.config.reserved_to.0.saturating_sub(self.next_seq.0);
        (left < SEQ_RESERVE / 2).then(|| Seq(self.config.reserved_to.0 + SEQ_RESERVE))
    }

    /// Numbers below `to` are reserved.
    pub fn handle_reserved(&mut self, to: Seq) {
        self.config.reserved_to = self.config.reserved_to.max(to);
    }

    /// Writes the heartbeat that is due, if one is. `random` spreads the next one.
    pub fn poll(
        &mut self,
        now_ms: u64,
        random: u64,
        admission: &Admission,
        running: u32,
        out: &mut [u8; DATAGRAM_BYTES_MAX],
    ) -> Option<Outgoing> {
        let asking_again = self.ask_again_ms.is_some_and(|at_ms| at_ms <= now_ms);
        if (now_ms < self.due_ms && !asking_again) || self.next_seq >= self.config.reserved_to {
            return None;
        }
        if asking_again && self.tries >= ASK_TRIES {
            self.move_on(now_ms, random);
        }
        let going_home = self.at != 0 && self.home_ms.is_some_and(|at_ms| at_ms <= now_ms);
        let to = if going_home { 0 } else { self.at };
        let to = *self.config.aggregators.get(to)?;
        self.since_ask += 1;
        let ask = self.tries > 0 || going_home || self.since_ask >= ASK_EVERY;
        let seq = self.next_seq;
        let heartbeat = self.heartbeat(admission, running, ask);
        self.note_sent(now_ms, random, ask, going_home);
        self.quarters = quarters(admission);
        self.draining = admission.draining();
        let BeatConfig { host, key_epoch, key, .. } = &self.config;
        Some(Outgoing { len: heartbeat.seal(*host, *key_epoch, key, out), to, seq })
    }

    fn note_sent(&mut self, now_ms: u64, random: u64, ask: bool, going_home: bool) {
        let interval = u64::from(self.config.interval_ms);
        if going_home {
            self.home_seq = Some(self.next_seq);
            self.home_ms = Some(now_ms + self.home_wait(random));
        } else if ask {
            self.since_ask = 0;
            self.tries += 1;
            // With nobody else to ask, or after a whole round of silence, the interval is soon enough.
            let round = ASK_TRIES
                .saturating_mul(u32::try_from(self.config.aggregators.len()).unwrap_or(u32::MAX));
            let quick = self.config.aggregators.len() > 1 && self.tries < round;
            self.ask_again_ms = quick.then_some(now_ms + ASK_WAIT_MS.min(interval));
        }
        self.next_seq = Seq(self.next_seq.0 + 1);
        self.sent_ms = Some(now_ms);
        // From 0.9 to 1.1 of the interval, so that hosts that started together drift apart.
        self.due_ms = now_ms + interval * 9 / 10 + random % (interval / 5).max(1);
        if self.stopping {
            self.due_ms = u64::MAX;
            self.ask_again_ms = None;
        }
    }

    fn home_wait(&self, random: u64) -> u64 {
        let wait = u64::from(self.config.interval_ms) * HOME_INTERVALS;
        wait + random % wait.max(1)
    }

    fn move_on(&mut self, now_ms: u64, random: u64) {
        self.at = (self.at + 1) % self.config.aggregators.len().max(1);
        self.tries = 0;
        self.home_ms = Some(now_ms + self.home_wait(random));
    }

    fn heartbeat(&self, admission: &Admission, running: u32, ask: bool) -> Heartbeat {
        let flag = |up, flag| if up { flag } else { 0 };
        Heartbeat {
            incarnation: self.config.incarnation,
            seq: self.next_seq,
            ip: Heartbeat::ip_bytes(self.config.addr.ip),
            port: self.config.addr.port,
            free: admission.told(),
            total: admission.total(),
            running,
            interval_ms: self.config.interval_ms,
            flags: self.config.flags
                | flag(ask && !self.stopping, Heartbeat::ASK)
                | flag(admission.draining(), Heartbeat::DRAINING)
                | flag(admission.sick(), Heartbeat::SICK)
                | flag(self.stopping, Heartbeat::STOPPING),
        }
    }

    /// A datagram came. Checks that it is a directive for us, now; changes interval and key, and says what else
    /// must be done.
    ///
    /// # Errors
    /// [`Ignored`], by reason.
    pub fn handle_datagram(&mut self, now_ms: u64, bytes: &[u8]) -> Result<Obey, Ignored> {
        let directive = self.open(bytes).ok_or(Ignored::Forged)?;
        let sent = directive.seq >= self.config.first_seq && directive.seq < self.next_seq;
        if directive.incarnation != self.config.incarnation || !sent || directive.seq < self.obeyed
        {
            return Err(Ignored::Stale);
        }
        self.obeyed = directive.seq;
        self.tries = 0;
        self.ask_again_ms = None;
        if self.home_seq.is_some_and(|seq| seq == directive.seq) {
            self.at = 0;
            self.home_ms = None;
            self.home_seq = None;
        }
        if directive.interval_ms != 0 && directive.interval_ms != self.config.interval_ms {
            self.config.interval_ms = directive.interval_ms;
            self.due_ms = self.due_ms.min(now_ms + u64::from(directive.interval_ms));
        }
        Ok(Obey {
            drain_ms: (directive.drain == Directive::DRAIN).then_some(directive.drain_deadline_ms),
            resume: directive.drain == Directive::RESUME,
            key: self.new_key(&directive),
        })
    }

    fn open(&self, bytes: &[u8]) -> Option<Directive> {
        let datagram = Datagram::parse(bytes).ok()?;
        let ours = datagram.kind == Kind::Directive
            && datagram.sender.role == Role::Host
            && datagram.sender.id == self.config.host.0
            && datagram.sender.key_epoch == self.config.key_epoch;
        let verified = ours.then(|| datagram.verify(&self.config.key)).flatten()?;
        Directive::open(&verified).ok().map(|(_, directive)| directive)
    }

    fn new_key(&mut self, directive: &Directive) -> Option<(KeyEpoch, SenderKey)> {
        let epoch = KeyEpoch(directive.key_epoch);
        if epoch <= self.config.key_epoch {
            return None;
        }
        let key = SenderKey(self.config.key.wrap(epoch, &directive.wrapped_key));
        self.config.key_epoch = epoch;
        self.config.key = key.clone();
        Some((epoch, key))
    }
}

/// Quarters of each shape that are free, from 0 (none at all) to 5 (all).
fn quarters(admission: &Admission) -> [u8; SHAPES_MAX] {
    let (free, total) = (admission.told(), admission.total());
    let mut quarters = [0; SHAPES_MAX];
    for (quarter, (free, total)) in quarters.iter_mut().zip(free.into_iter().zip(total)) {
        *quarter = match (u32::from(free), u32::from(total)) {
            (0, _) => 0,
            (free, total) if free >= total => 5,
            (free, total) => u8::try_from(1 + free * 4 / total).unwrap_or(4),
        };
    }
    quarters
}

#[cfg(test)]
mod tests {
    use wire::heartbeat;

    use super::*;
    use crate::{admission::Resources, shapes::Shapes};

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
        assert!(
            poll(&mut beat, 600, &admission).unwrap().heartbeat.flags & Heartbeat::STOPPING != 0
        );
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
                answer(
                    &mut beat,
                    now_ms,
                    &Directive::answering(Incarnation(2), sent.heartbeat.seq),
                )
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
        assert_eq!(
            answer(&mut beat, 1_002, &directive),
            Err(Ignored::Forged),
            "the old key is gone"
        );
    }

    #[test]
    fn numbers_are_used_only_once_they_are_reserved() {
        let (mut beat, admission) = (beat(), admission());
        beat.config.reserved_to = Seq(101);
        assert!(poll(&mut beat, 0, &admission).is_some());
        assert!(poll(&mut beat, 100_000, &admission).is_none(), "not reserved");
        let to = beat.poll_reserve().unwrap();
        beat.handle_reserved(to);
        assert_eq!(poll(&mut beat, 100_000, &admission).unwrap().heartbeat.seq, Seq(101));
        assert_eq!(beat.poll_reserve(), None);
    }
}
