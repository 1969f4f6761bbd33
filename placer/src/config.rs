//! The placer's settings, checked once.

use std::{net::SocketAddr, path::PathBuf};

use placer_core::{Policy, Select};
use serde::Deserialize;
use wire::{
    Code, Fault,
    limits::{ATTEMPTS_MAX, CHOICES_MAX, LANE_LAUNCHES_MAX},
};

/// Where capacity is looked up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lookup {
    /// In the table that the aggregators' feed fills.
    #[default]
    Feed,
    /// In the store: both candidates are read before each launch.
    Store,
}

/// Settings of `placerd`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Directory of the identity: `cert.pem`, `key.pem`, `ca.pem`, `beat.key`.
    pub identity: PathBuf,
    /// Directory of the map and the capacity table; one placer each.
    pub state: PathBuf,
    /// Where clients connect.
    pub listen: SocketAddr,
    /// Where `/metrics` is served, if at all.
    pub ops: Option<SocketAddr>,
    /// The object store that holds the map, as a URL.
    pub objects: String,
    /// `feed` or `store`.
    pub lookup: Lookup,
    /// With `lookup = "store"`: the store, as heartbeatd's `store`.
    pub store: Option<String>,
    /// Datagram addresses of the aggregators: the feed comes from them, failure reports go there.
    pub aggregators: Vec<SocketAddr>,
    /// QUIC addresses of the aggregators' admin: host lists and drains are passed on to them.
    pub admin: Vec<SocketAddr>,
    /// Candidates a pick.
    pub choices: usize,
    /// Hosts that one launch is tried on, at most.
    pub attempts: u32,
    /// Milliseconds between two looks for a newer map.
    pub map_refresh_ms: u64,
    /// Dispatching threads; zero for one a core.
    pub workers: usize,
    /// Hosts that launches go to. Above that many, a random part of the fleet of this size, so that connections stay warm.
    pub aperture: usize,
    /// Launches under way on one thread; more are refused at once.
    pub launches_max: usize,
    /// Hosts that a list asks, at most.
    pub list_hosts_max: usize,
    /// Launches that are remembered by id, to give a repeated one the same answer.
    pub known_max: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            identity: PathBuf::from("/etc/volley/placer"),
            state: PathBuf::from("/var/lib/volley/placer"),
            listen: SocketAddr::from(([0, 0, 0, 0], 7_420)),
            ops: None,
            objects: String::from("dir:///var/lib/volley/objects"),
            lookup: Lookup::Feed,
            store: None,
            aggregators: Vec::new(),
            admin: Vec::new(),
            choices: 2,
            attempts: ATTEMPTS_MAX,
            map_refresh_ms: 1_000,
            workers: 0,
            aperture: 4_096,
            launches_max: 4 * LANE_LAUNCHES_MAX,
            list_hosts_max: 10_000,
            known_max: 1 << 18,
        }
    }
}

impl Config {
    /// Checks what the types do not.
    ///
    /// # Errors
    /// [`Code::Config`], with the setting that is wrong.
    pub fn check(&self) -> Result<(), Fault> {
        let bad = |what: String| Err(Fault::new(Code::Config, what));
        if !(1..=CHOICES_MAX).contains(&self.choices) {
            return bad(format!("choices = {}: from 1 to {CHOICES_MAX}", self.choices));
        }
        if !(1..=ATTEMPTS_MAX).contains(&self.attempts) {
            return bad(format!("attempts = {}: from 1 to {ATTEMPTS_MAX}", self.attempts));
        }
        if !(10..=3_600_000).contains(&self.map_refresh_ms) {
            return bad(format!("map_refresh_ms = {}: from 10 to 3600000", self.map_refresh_ms));
        }
        if self.workers > 1_024 {
            return bad(format!("workers = {}: at most 1024", self.workers));
        }
        for (name, value) in [
            ("aperture", self.aperture),
            ("launches_max", self.launches_max),
            ("known_max", self.known_max),
        ] {
            if value == 0 {
                return bad(format!("{name} = 0: at least 1"));
            }
        }
        if self.lookup == Lookup::Feed && self.aggregators.is_empty() {
            return bad("aggregators: none, so that no capacity is ever heard of".to_owned());
        }
        if self.lookup == Lookup::Store && self.store.is_none() {
            return bad("store: missing, but lookup = \"store\"".to_owned());
        }
        Ok(())
    }

    /// How launches are carried out.
    #[must_use]
    pub fn policy(&self) -> Policy {
        Policy {
            select: Select { choices: self.choices },
            attempts_max: self.attempts,
            ..Policy::default()
        }
    }

    /// Dispatching threads.
    #[must_use]
    pub fn threads(&self) -> usize {
        if self.workers > 0 {
            return self.workers;
        }
        std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
    }
}
