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
    records::Records,
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

    /// Takes a reservation back.
    #[cfg(test)]
    pub(crate) fn unreserve_for_test(&mut self, to: Seq) {
        self.config.reserved_to = to;
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

    /// Seals records of this host's sandboxes for [`Beat::aggregator`]; their length, if they fit a datagram.
    #[must_use]
    pub fn seal_records(
        &self,
        records: &Records,
        out: &mut [u8; DATAGRAM_BYTES_MAX],
    ) -> Option<usize> {
        let BeatConfig { host, key_epoch, key, .. } = &self.config;
        records.seal(*host, *key_epoch, key, out)
    }

    fn note_sent(&mut self, now_ms: u64, random: u64, ask: bool, going_home: bool) {
        let interval = u64::from(self.config.interval_ms);
        if going_home {
            self.home_seq = Some(self.next_seq);
            self.home_ms = Some(now_ms + self.home_wait(random));
            // Nobody may be there: unless it answers, the one that did last hears of us at once (FAULTS H8).
            self.since_ask = ASK_EVERY;
            self.ask_again_ms = Some(now_ms + ASK_WAIT_MS.min(interval));
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
