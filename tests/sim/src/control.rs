//! An aggregator: heartbeat-core's shard, brake, quarantine, window of writes, leader and map builder, in one.
//!
//! It asks the stores of [`crate::stores`] and gets answers, late ones, or none. One question of the publisher is on its
//! way at a time, as in heartbeatd; batches of rows leave as the window allows. A killed one starts again with what the
//! database holds; a stopped one (SIGSTOP) hears nothing, and finds on waking what was answered meanwhile.

use std::{collections::BTreeMap, rc::Rc};

use heartbeat_core::{
    Heard, KeyRing, Shard,
    flush::Flush,
    leader::{Leader, Put, Want},
    liveness::{Liveness, Verdict},
    map::MapBuilder,
    quarantine::{self, Quarantine, Settings},
    shard::upkeep::Census,
};
use wire::{
    CapacityWord, HostId,
    limits::DATAGRAM_BYTES_MAX,
    map::{HostAddr, MapVersion, PageRef},
    report::FailureReport,
    seal::{FleetKey, KeyEpoch},
};

use crate::{
    Micros,
    stores::{Answer, Ask},
};

/// Words of the feed, as one datagram carries them.
pub type Words = Rc<Vec<(HostId, CapacityWord)>>;

/// Silence of the database after which nobody is judged for so long.
const GRACE_MS: u64 = 15_000;

/// A head is written again after this even if nothing changed. heartbeatd waits a minute; here swaps are to meet faults.
const REPUBLISH_MS: u64 = 1_500;

/// A question on its way, and what becomes of it.
#[derive(Clone, Debug)]
pub struct Question {
    /// Which aggregator asks.
    pub from: usize,
    /// Which start of it: the answer to an earlier one is nobody's.
    pub life: u32,
    /// When it was asked.
    pub asked: Micros,
    /// What.
    pub ask: Rc<Ask>,
}

/// What is remembered of the fleet over the lives of all aggregators, for who reads the outcome.
#[derive(Debug, Default)]
pub struct Noted {
    /// First quarantine of each host, in ms.
    pub quarantined_ms: BTreeMap<HostId, u64>,
    /// Most at once.
    pub quarantined_max: u64,
    /// Hosts removed by whoever led.
    pub removed: u64,
    /// The brake was on.
    pub braked: bool,
}

/// One aggregator.
pub struct Aggregator {
    at: usize,
    /// Counts its starts.
    pub life: u32,
    /// It runs.
    pub up: bool,
    /// It runs, and is stopped.
    pub stopped: bool,
    /// What was answered while it was stopped.
    pub held: Vec<(Question, Option<Answer>)>,
    shard: Shard,
    liveness: Liveness,
    quarantine: Quarantine,
    flush: Flush,
    leader: Leader<u64>,
    builder: MapBuilder,
    membership: u64,
    proposed: u64,
    published_ms: u64,
    nonces: u64,
    /// Pages, count and nonce of the head that is to follow the pages on their way.
    waiting: Option<(Vec<PageRef>, u64, [u8; 16])>,
    /// The version whose hosts were taken.
    listed: Option<MapVersion>,
    /// A question of the publisher, or a scan, is on its way.
    publishing: bool,
    scanning: bool,
    looked_ms: u64,
    /// Whether it led when it last looked, and how many turns to scan it has let pass since its last scan.
    led: bool,
    passed: u32,
    questions: Vec<Question>,
}

/// The fleet's key.
#[must_use]
pub fn fleet_key() -> FleetKey {
    FleetKey { epoch: KeyEpoch(1), secret: [7; 32] }
}

fn shard() -> Shard {
    let Some(keys) = KeyRing::new(vec![fleet_key()]) else { unreachable!("one key") };
    Shard::new(0, 1, keys, None)
}

impl Aggregator {
    /// One that knows nobody. Its clock is its own: it shows another time than its neighbour's.
    #[must_use]
    pub fn new(at: usize) -> Self {
        Self {
            at,
            life: 0,
            up: true,
            stopped: false,
            held: Vec::new(),
            shard: shard(),
            liveness: Liveness::new(0, 0),
            quarantine: Quarantine::new(Settings::default()),
            flush: Flush::default(),
            leader: Leader::new(),
            builder: MapBuilder::new(),
            membership: u64::MAX,
            proposed: 0,
            published_ms: 0,
            nonces: 0,
            waiting: None,
            listed: None,
            publishing: false,
            scanning: false,
            looked_ms: 0,
            led: false,
            passed: 0,
            questions: Vec::new(),
        }
    }

    /// It is killed, or starts again: with nothing but what the database will say.
    pub fn restart(&mut self, now: Micros, up: bool) {
        let (life, nonces) = (self.life + 1, self.nonces);
        let liveness = Liveness::new(self.ms(now), GRACE_MS);
        *self = Self { life, nonces, up, liveness, ..Self::new(self.at) };
        if up {
            self.scan(now);
        }
    }

    /// The time by its own clock, in ms.
    fn ms(&self, now: Micros) -> u64 {
        now / 1_000 + self.at as u64 * 600_000
    }

    /// Whether it hears and acts.
    #[must_use]
    pub const fn awake(&self) -> bool {
        self.up && !self.stopped
    }

    /// What it asked since the last call.
    pub fn take_questions(&mut self) -> Vec<Question> {
        std::mem::take(&mut self.questions)
    }

    fn ask(&mut self, now: Micros, ask: Ask) {
        let question = Question { from: self.at, life: self.life, asked: now, ask: Rc::new(ask) };
        self.questions.push(question);
    }

    /// A datagram came; the answer, if there is one.
    pub fn heard(&mut self, now: Micros, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut out = [0; DATAGRAM_BYTES_MAX];
        match self.shard.handle_datagram(self.ms(now), bytes, &mut out) {
            Heard::Directive(len) => Some(out[..len].to_vec()),
            _ => None,
        }
    }

    /// A placer's report.
    pub fn reported(
        &mut self,
        now: Micros,
        placer: u64,
        report: &FailureReport,
        noted: &mut Noted,
    ) {
        if !self.quarantine.admit(placer, report) {
            return;
        }
        if report.about == FailureReport::CAPACITY {
            return self.shard.handle_correction(report.host, report.word);
        }
        let (now_ms, total) = (self.ms(now), self.shard.len() as u64);
        let act = self.quarantine.handle_report(now_ms, total, placer, report.host);
        self.act(now, act, noted);
    }

    fn act(
        &mut self,
        now: Micros,
        acts: impl IntoIterator<Item = quarantine::Act>,
        noted: &mut Noted,
    ) {
        for act in acts {
            match act {
                quarantine::Act::Suspect(host) => self.shard.handle_suspicion(host, true),
                quarantine::Act::Clear(host) => self.shard.handle_suspicion(host, false),
                quarantine::Act::Quarantine(host) => {
                    self.shard.handle_quarantine(host, true);
                    noted.quarantined_ms.entry(host).or_insert(now / 1_000);
                }
                quarantine::Act::Release(host) => self.shard.handle_quarantine(host, false),
            }
        }
        noted.quarantined_max = noted.quarantined_max.max(self.quarantine.len());
    }

    /// Housekeeping; what the feed says now, a datagram each.
    pub fn tick(&mut self, now: Micros, noted: &mut Noted) -> Vec<Words> {
        let mut acts = Vec::new();
        self.quarantine.poll(self.ms(now), &mut acts);
        self.act(now, acts, noted);
        self.write(now);
        self.publish(now);
        self.scan_on_change(now);
        let mut said = Vec::new();
        loop {
            let mut words = Vec::new();
            self.shard.take_news(wire::feed::ENTRIES_MAX, &mut words);
            if words.is_empty() {
                return said;
            }
            said.push(Rc::new(words));
        }
    }

    /// Every host's word, as a placer gets it that asks for everything.
    #[must_use]
    pub fn everything(&self) -> Words {
        let mut words = Vec::new();
        self.shard.words(0, usize::MAX, &mut words);
        Rc::new(words)
    }

    fn write(&mut self, now: Micros) {
        while self.flush.room(self.ms(now)) > 0 && self.shard.begin_round() {
            let Some(batch) = self.shard.take_batch() else { continue };
            self.flush.handle_sent();
            self.ask(now, Ask::Write(batch));
        }
    }

    /// Its turn to scan: who does not lead takes one of four.
    pub fn scan_turn(&mut self, now: Micros) {
        self.passed += 1;
        if self.leads(now) || self.passed == 4 {
            self.scan(now);
        }
    }

    /// The slow scan begins; it judges when the rows are there.
    fn scan(&mut self, now: Micros) {
        if !self.scanning {
            self.scanning = true;
            self.passed = 0;
            self.ask(now, Ask::Scan);
        }
    }

    fn leads(&self, now: Micros) -> bool {
        self.leader.leads(self.ms(now))
    }

    /// Who has come to lead, or no longer does, scans at once.
    fn scan_on_change(&mut self, now: Micros) {
        let leads = self.leads(now);
        if leads != self.led && !self.scanning {
            self.led = leads;
            self.scan(now);
        }
    }

    fn judge(&mut self, now: Micros, noted: &mut Noted) {
        let (now_ms, mut census) = (self.ms(now), Census::default());
        self.shard.sweep_as_of(now_ms, self.looked_ms, 0, usize::MAX, &mut census);
        let verdict = self.liveness.judge(now_ms, census);
        noted.braked |= self.liveness.alarm();
        let Verdict::Remove(mut silent) = verdict else { return };
        silent.retain(|one| self.shard.handle_remove(one));
        silent.iter().for_each(|one| self.quarantine.handle_gone(one.host));
        if !silent.is_empty() && self.leads(now) {
            noted.removed += silent.len() as u64;
            self.ask(now, Ask::Remove(silent));
        }
    }

    /// Does what the leader wants, one question at a time.
    fn publish(&mut self, now: Micros) {
        if self.publishing {
            return;
        }
        let ask = match self.leader.poll(self.ms(now)) {
            Want::Wait(_) => return,
            Want::Lease => Ask::Lease,
            Want::Head => Ask::Head,
            Want::Put { head, expected } => Ask::Swap(head, expected),
            Want::Scan if self.listed == self.leader.version() => return self.scan(now),
            Want::Scan => Ask::Hosts,
            Want::Publish => {
                let fresh = self.ms(now) < self.published_ms + REPUBLISH_MS;
                let same = fresh && self.membership == self.shard.membership();
                if same && self.leader.published_here() {
                    return;
                }
                let Some(pages) = self.build() else { return };
                pages
            }
        };
        self.publishing = true;
        self.ask(now, ask);
    }

    fn hosts(&self) -> Vec<(HostId, HostAddr)> {
        let mut hosts = Vec::new();
        self.shard.addresses(0, usize::MAX, &mut hosts);
        hosts.sort_unstable_by_key(|(host, _)| *host);
        hosts
    }

    fn build(&mut self) -> Option<Ask> {
        self.proposed = self.shard.membership();
        let built = self.builder.build(&self.hosts()).ok()?;
        self.nonces += 1;
        let mut nonce = [0; 16];
        nonce[..8].copy_from_slice(&self.nonces.to_be_bytes());
        nonce[8] = u8::try_from(self.at).unwrap_or(u8::MAX);
        // The head is proposed when its pages are there.
        self.waiting = Some((built.pages, built.count, nonce));
        Some(Ask::Pages(built.new))
    }

    /// An answer came, or none ever will.
    pub fn answered(
        &mut self,
        now: Micros,
        question: &Question,
        answer: Option<Answer>,
        noted: &mut Noted,
    ) {
        let now_ms = self.ms(now);
        match (&*question.ask, answer) {
            (Ask::Write(batch), answer) => {
                let rows: Vec<_> = batch.rows.iter().map(|row| (row.host, row.written())).collect();
                self.flush.handle_done(now_ms, answer.is_some());
                self.shard.handle_written(&rows, answer.is_some());
                self.write(now);
            }
            (Ask::Scan, answer) => {
                self.scanning = false;
                self.liveness.handle_scan(now_ms, answer.is_some());
                if let Some(Answer::Rows(rows)) = answer {
                    self.looked_ms = self.ms(question.asked);
                    for row in rows {
                        self.shard.handle_row(now_ms, &row);
                    }
                    self.leader.handle_scan(self.looked_ms);
                }
                self.judge(now, noted);
            }
            (Ask::Remove(_), _) => {}
            (ask, answer) => {
                self.publishing = false;
                self.published(question.asked, now_ms, ask, answer);
                self.publish(now);
            }
        }
    }

    fn published(&mut self, asked: Micros, now_ms: u64, ask: &Ask, answer: Option<Answer>) {
        match (ask, answer) {
            (Ask::Lease, Some(Answer::Lease(held))) => {
                self.leader.handle_lease(self.ms(asked), now_ms, Some(held));
            }
            (Ask::Lease, _) => self.leader.handle_lease(self.ms(asked), now_ms, None),
            (Ask::Head, Some(Answer::Head(found))) => {
                let read = found.as_ref().map(|(head, token)| (head, *token));
                self.leader.handle_head(now_ms, Ok(read));
                if self.leader.published_here() {
                    (self.membership, self.published_ms) = (self.proposed, now_ms);
                }
                if let Some((head, _)) = found {
                    self.builder.handle_published(&head.pages);
                }
            }
            (Ask::Hosts, Some(Answer::Hosts(hosts))) => {
                for (host, addr) in hosts {
                    self.shard.handle_listed(now_ms, host, addr);
                }
                self.listed = self.leader.version();
            }
            (Ask::Head, _) => self.leader.handle_head(now_ms, Err(())),
            (Ask::Pages(_), Some(_)) => {
                if let Some((pages, count, nonce)) = self.waiting.take() {
                    self.leader.propose(pages, count, nonce, now_ms);
                }
            }
            (Ask::Swap(head, _), answer) => {
                let put = match answer {
                    Some(Answer::Swapped(put)) => put,
                    _ => Put::Unknown,
                };
                if self.leader.handle_put(now_ms, put).is_some() {
                    self.builder.handle_published(&head.pages);
                    (self.membership, self.published_ms) = (self.proposed, now_ms);
                }
            }
            _ => {}
        }
    }
}
