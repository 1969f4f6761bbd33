//! The aggregator: heartbeat-core's shard, brake, quarantine and map builder, and the object store that holds its maps.

use std::{collections::BTreeMap, rc::Rc};

use heartbeat_core::{
    Heard, KeyRing, Shard,
    liveness::{Liveness, Verdict},
    map::MapBuilder,
    quarantine::{self, Quarantine, Settings},
    shard::upkeep::Census,
};
use placer_core::map::encode;
use wire::{
    CapacityWord, HostId,
    limits::DATAGRAM_BYTES_MAX,
    map::{MapVersion, Page},
    report::FailureReport,
    seal::{FleetKey, KeyEpoch},
};

use crate::Micros;

/// Words of the feed, as one datagram carries them.
pub type Words = Rc<Vec<(HostId, CapacityWord)>>;

/// A map as a placer's file: version and bytes.
pub type MapFile = Rc<(MapVersion, Vec<u8>)>;

/// The capacity service.
pub struct Control {
    shard: Shard,
    liveness: Liveness,
    quarantine: Quarantine,
    builder: MapBuilder,
    version: MapVersion,
    membership: u64,
    quarantined: BTreeMap<HostId, u64>,
    /// First quarantine of each host, in ms.
    pub quarantined_ms: BTreeMap<HostId, u64>,
    /// Most at once.
    pub quarantined_max: u64,
    /// Hosts removed.
    pub removed: u64,
    /// The brake was on.
    pub braked: bool,
    /// The newest map.
    pub newest: Option<MapFile>,
}

/// The fleet's key.
#[must_use]
pub fn fleet_key() -> FleetKey {
    FleetKey { epoch: KeyEpoch(1), secret: [7; 32] }
}

impl Control {
    /// An aggregator that knows nobody.
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn new() -> Self {
        let Some(keys) = KeyRing::new(vec![fleet_key()]) else { unreachable!("one key") };
        Self {
            shard: Shard::new(0, 1, keys, None),
            liveness: Liveness::new(0, 0),
            quarantine: Quarantine::new(Settings::default()),
            builder: MapBuilder::new(),
            version: MapVersion::default(),
            membership: 0,
            quarantined: BTreeMap::new(),
            quarantined_ms: BTreeMap::new(),
            quarantined_max: 0,
            removed: 0,
            braked: false,
            newest: None,
        }
    }

    /// A datagram came; the answer, if there is one.
    pub fn heard(&mut self, now: Micros, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut out = [0; DATAGRAM_BYTES_MAX];
        match self.shard.handle_datagram(now / 1_000, bytes, &mut out) {
            Heard::Directive(len) => Some(out[..len].to_vec()),
            _ => None,
        }
    }

    /// A placer's report.
    pub fn reported(&mut self, now: Micros, placer: u64, report: &FailureReport) {
        if !self.quarantine.admit(placer, report) {
            return;
        }
        if report.about == FailureReport::CAPACITY {
            return self.shard.handle_correction(report.host, report.word);
        }
        let (now_ms, total) = (now / 1_000, self.shard.len() as u64);
        let act = self.quarantine.handle_report(now_ms, total, placer, report.host);
        self.act(now_ms, act);
    }

    fn act(&mut self, now_ms: u64, acts: impl IntoIterator<Item = quarantine::Act>) {
        for act in acts {
            match act {
                quarantine::Act::Suspect(host) => self.shard.handle_suspicion(host, true),
                quarantine::Act::Clear(host) => self.shard.handle_suspicion(host, false),
                quarantine::Act::Quarantine(host) => {
                    self.shard.handle_quarantine(host, true);
                    self.quarantined.insert(host, now_ms);
                    self.quarantined_ms.entry(host).or_insert(now_ms);
                }
                quarantine::Act::Release(host) => {
                    self.shard.handle_quarantine(host, false);
                    self.quarantined.remove(&host);
                }
            }
        }
        self.quarantined_max = self.quarantined_max.max(self.quarantine.len());
    }

    /// Housekeeping; what the feed says now, a datagram each.
    pub fn tick(&mut self, now: Micros) -> Vec<Words> {
        let mut acts = Vec::new();
        self.quarantine.poll(now / 1_000, &mut acts);
        self.act(now / 1_000, acts);
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

    /// The slow scan.
    pub fn scan(&mut self, now: Micros) {
        let mut census = Census::default();
        self.shard.sweep(now / 1_000, 0, usize::MAX, &mut census);
        match self.liveness.judge(now / 1_000, census) {
            Verdict::Remove(silent) => {
                for one in silent {
                    if self.shard.handle_remove(&one) {
                        self.quarantine.handle_gone(one.host);
                        self.removed += 1;
                    }
                }
            }
            Verdict::Brake { .. } => self.braked = true,
            Verdict::Grace => {}
        }
    }

    /// Every host's word, as a placer gets it that asks for everything.
    #[must_use]
    pub fn everything(&self) -> Words {
        let mut words = Vec::new();
        self.shard.words(0, usize::MAX, &mut words);
        Rc::new(words)
    }

    /// A new map if hosts came, went or moved. The store keeps it in [`Control::newest`].
    ///
    /// # Panics
    /// If the pages do not check: that is a bug of the builder.
    pub fn publish(&mut self) -> Option<MapFile> {
        if self.newest.is_some() && self.membership == self.shard.membership() {
            return None;
        }
        self.membership = self.shard.membership();
        let mut hosts = Vec::new();
        self.shard.addresses(0, usize::MAX, &mut hosts);
        hosts.sort_unstable_by_key(|(host, _)| *host);
        let built = self.builder.build(&hosts).ok()?;
        self.builder.handle_published(&built.pages);
        // Through the pages, as a placer gets them.
        let bytes_of = |digest| built.new.iter().find(|new| new.digest == digest);
        for page in &built.pages {
            if let Some(new) = bytes_of(page.digest) {
                assert!(Page::parse(&new.bytes, page).is_ok(), "a page that was built checks");
            }
        }
        self.version = MapVersion { epoch: 1, version: self.version.version + 1 };
        let file = Rc::new((self.version, encode(self.version, &hosts)));
        self.newest = Some(Rc::clone(&file));
        Some(file)
    }
}

impl Default for Control {
    fn default() -> Self {
        Self::new()
    }
}
