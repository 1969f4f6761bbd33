//! The settings of one aggregator, checked once at the start.

use std::{net::SocketAddr, path::PathBuf};

use heartbeat_core::{limits::BRAKE_PERCENT, quarantine};
use serde::Deserialize;
use wire::{Code, Fault, limits::HEARTBEAT_INTERVAL_MS_RANGE};

/// Settings of `heartbeatd`. Every field has a default but the directories and stores, which are the fleet's own.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Directory of this aggregator's certificate and keys.
    pub identity: PathBuf,
    /// Directory with `fleet.key`, and `revoked` if any host is: one host id a line. Both are looked at again each
    /// second.
    pub fleet: PathBuf,
    /// Directory for what this process keeps. Nothing yet besides an embedded store that is named inside it.
    #[serde(default = "defaults::state")]
    pub state: PathBuf,
    /// Where operators and placers call, by QUIC.
    #[serde(default = "defaults::listen")]
    pub listen: SocketAddr,
    /// Where hosts and placers send datagrams.
    #[serde(default = "defaults::udp")]
    pub udp: SocketAddr,
    /// Where `/metrics`, `/livez` and `/readyz` are served, if anywhere.
    #[serde(default)]
    pub ops: Option<SocketAddr>,
    /// `embedded:///path` or `scylla://host:port[,host:port]/keyspace`.
    pub store: String,
    /// Object store for the map: `dir:///path`, `s3://bucket/prefix?..`.
    pub objects: String,
    /// This aggregator's id; by default the one of its certificate.
    #[serde(default)]
    pub aggregator_id: Option<u64>,
    /// Datagram addresses of all aggregators of the fleet, as hosts have them: new hosts, and all while the store is away, are said to
    /// the others directly. Without it aggregators meet in the store alone. An aggregator that is not among them warns.
    #[serde(default)]
    pub peers: Vec<SocketAddr>,
    /// Milliseconds between two looks whether the map has changed.
    #[serde(default = "defaults::publish_ms")]
    pub publish_ms: u64,
    /// Milliseconds between heartbeats that hosts are told; by default they keep their own.
    #[serde(default)]
    pub interval_ms: Option<u32>,
    /// Receiver threads; zero for one a core.
    #[serde(default)]
    pub receivers: u32,
    /// Bytes of kernel buffer of each receiver's socket.
    #[serde(default = "defaults::rcvbuf_bytes")]
    pub rcvbuf_bytes: usize,
    /// Milliseconds for which rows gather before they leave for the store.
    #[serde(default = "defaults::flush_ms")]
    pub flush_ms: u64,
    /// Milliseconds for which changes gather before they leave for placers.
    #[serde(default = "defaults::feed_ms")]
    pub feed_ms: u64,
    /// Milliseconds between two scans for the dead, and of a shared store for other aggregators' hosts.
    #[serde(default = "defaults::scan_ms")]
    pub scan_ms: u64,
    /// Milliseconds after a start or an outage of the store in which nobody is called dead.
    #[serde(default = "defaults::grace_ms")]
    pub grace_ms: u64,
    /// Percent of the fleet that may leave in one scan; above, nobody leaves.
    #[serde(default = "defaults::brake_percent")]
    pub brake_percent: u64,
    /// Distinct placers that must report a host before it is left out; at least two.
    #[serde(default = "defaults::quarantine_placers")]
    pub quarantine_placers: usize,
    /// Milliseconds inside which they must.
    #[serde(default = "defaults::quarantine_window_ms")]
    pub quarantine_window_ms: u64,
    /// Milliseconds of a first quarantine; each further one is twice as long, up to ten minutes.
    #[serde(default = "defaults::quarantine_ms")]
    pub quarantine_ms: u64,
}

mod defaults {
    use super::*;

    pub(super) fn state() -> PathBuf {
        PathBuf::from("/var/lib/volley/heartbeatd")
    }
    pub(super) fn listen() -> SocketAddr {
        SocketAddr::from(([0, 0, 0, 0], 7_401))
    }
    pub(super) fn udp() -> SocketAddr {
        SocketAddr::from(([0, 0, 0, 0], 7_400))
    }
    pub(super) const fn publish_ms() -> u64 {
        1_000
    }
    pub(super) const fn rcvbuf_bytes() -> usize {
        16 << 20
    }
    pub(super) const fn flush_ms() -> u64 {
        2_000
    }
    pub(super) const fn feed_ms() -> u64 {
        20
    }
    pub(super) const fn scan_ms() -> u64 {
        5_000
    }
    pub(super) const fn grace_ms() -> u64 {
        15_000
    }
    pub(super) const fn brake_percent() -> u64 {
        BRAKE_PERCENT
    }
    pub(super) fn quarantine_placers() -> usize {
        quarantine::Settings::default().placers_min
    }
    pub(super) fn quarantine_window_ms() -> u64 {
        quarantine::Settings::default().window_ms
    }
    pub(super) fn quarantine_ms() -> u64 {
        quarantine::Settings::default().first_ms
    }
}

impl Config {
    /// A config with the defaults for all but what has none.
    #[must_use]
    pub fn new(
        identity: PathBuf,
        fleet: PathBuf,
        store: impl Into<String>,
        objects: impl Into<String>,
    ) -> Self {
        Self {
            identity,
            fleet,
            state: defaults::state(),
            listen: defaults::listen(),
            udp: defaults::udp(),
            ops: None,
            store: store.into(),
            objects: objects.into(),
            aggregator_id: None,
            peers: Vec::new(),
            publish_ms: defaults::publish_ms(),
            interval_ms: None,
            receivers: 0,
            rcvbuf_bytes: defaults::rcvbuf_bytes(),
            flush_ms: defaults::flush_ms(),
            feed_ms: defaults::feed_ms(),
            scan_ms: defaults::scan_ms(),
            grace_ms: defaults::grace_ms(),
            brake_percent: defaults::brake_percent(),
            quarantine_placers: defaults::quarantine_placers(),
            quarantine_window_ms: defaults::quarantine_window_ms(),
            quarantine_ms: defaults::quarantine_ms(),
        }
    }

    /// Reads a config from TOML text; `file` names it in errors.
    ///
    /// # Errors
    /// [`Code::Config`], with file, line and fix.
    pub fn from_toml(file: &str, text: &str) -> Result<Self, Fault> {
        let config: Self = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            Fault::new(Code::Config, format!("{file}:{line}: {}", error.message()))
        })?;
        config.check()?;
        Ok(config)
    }

    /// Checks what types cannot say.
    ///
    /// # Errors
    /// [`Code::Config`], with the setting.
    pub fn check(&self) -> Result<(), Fault> {
        let bad = |setting: &str, why: &str| {
            Err(Fault::new(Code::Config, format!("setting `{setting}` {why}")))
        };
        if self.interval_ms.is_some_and(|ms| !HEARTBEAT_INTERVAL_MS_RANGE.contains(&ms.into())) {
            return bad("interval_ms", "must be from 100 to 120000");
        }
        if self.brake_percent > 100 {
            return bad("brake_percent", "must be at most 100");
        }
        if self.quarantine_placers < 2 {
            return bad(
                "quarantine_placers",
                "must be at least 2: one placer may be the broken one",
            );
        }
        if self.receivers > 256 {
            return bad("receivers", "must be at most 256");
        }
        let pauses = [self.publish_ms, self.flush_ms, self.feed_ms, self.scan_ms];
        if pauses.iter().any(|&ms| ms == 0 || ms > 600_000) {
            return bad("publish_ms, flush_ms, feed_ms and scan_ms", "must be from 1 to 600000");
        }
        Ok(())
    }

    /// Receiver threads.
    #[must_use]
    pub fn shards(&self) -> u32 {
        if self.receivers > 0 {
            return self.receivers;
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        u32::try_from(cores).unwrap_or(1).min(64)
    }

    pub(crate) fn quarantine(&self) -> quarantine::Settings {
        quarantine::Settings {
            placers_min: self.quarantine_placers,
            window_ms: self.quarantine_window_ms,
            first_ms: self.quarantine_ms,
            ..quarantine::Settings::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_is_an_error_with_its_line() {
        let text =
            "identity = \"i\"\nfleet = \"f\"\nstore = \"s\"\nobjects = \"o\"\nintervall_ms = 5\n";
        let fault = Config::from_toml("hb.toml", text).unwrap_err();
        assert_eq!(fault.code, Code::Config);
        assert!(fault.message.starts_with("hb.toml:5: unknown field"), "{}", fault.message);
        let fault = Config::from_toml("hb.toml", &text.replace("intervall_ms", "interval_ms"));
        assert!(fault.unwrap_err().message.contains("100 to 120000"));
    }
}
