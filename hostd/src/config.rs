//! Settings of the host daemon. One struct a process; unknown keys are errors.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use hostd_core::{Resources, Shape, Shapes};
use hostd_image::MountBy;
use serde::{Deserialize, Serialize};
use wire::{Code, Fault, limits::HEARTBEAT_INTERVAL_MS_RANGE};

/// Whether sandboxes are real.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Boxes {
    /// Real ones; needs root.
    #[default]
    Real,
    /// None: launches are admitted, counted and ended by their deadlines, and run nothing. Heartbeats say so.
    None,
}

/// Which runtime drives a host's thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// tokio-uring where the kernel allows it, else tokio.
    #[default]
    Auto,
    /// tokio-uring, or an error.
    TokioUring,
    /// tokio.
    Tokio,
}

impl Engine {
    /// Its name in logs and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::TokioUring => "tokio-uring",
            Self::Tokio => "tokio",
        }
    }
}

/// Whether launches may ask for a way out of their box.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EgressMode {
    /// None may: launches that ask are refused.
    #[default]
    Off,
    /// By their rules, within what the operator leaves open.
    Policy,
}

/// One size of sandbox. A fleet has four, the same everywhere, in the same order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShapeConfig {
    /// What people call it.
    pub name: String,
    /// Processor, in thousandths of a core.
    pub cpu_millis: u64,
    /// Memory.
    pub memory_bytes: u64,
}

/// One host of a process that serves several. Everything else is the same for all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// Directory of its certificate and keys.
    pub identity: PathBuf,
    /// Directory of what it keeps.
    pub state: PathBuf,
    /// Where it takes launches (QUIC).
    pub listen: SocketAddr,
    /// Where placers reach it, if that is another address.
    #[serde(default)]
    pub advertise: Option<SocketAddr>,
}

/// Settings of the host daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Directory of the host's certificate and keys.
    pub identity: PathBuf,
    /// Directory of what the host keeps: incarnation, journal, boxes.
    pub state: PathBuf,
    /// Where it takes launches (QUIC).
    pub listen: SocketAddr,
    /// Where placers reach it, if that is another address.
    pub advertise: Option<SocketAddr>,
    /// Where `/metrics`, `/livez` and `/readyz` are served; nowhere if absent.
    pub ops: Option<SocketAddr>,
    /// The host's id, as `h-` and 16 hex digits. It stands in the certificate too; here it is only checked.
    pub host_id: Option<String>,
    /// Hosts of this process, if it is to serve several; the settings of the one host are then unused.
    pub hosts: Vec<HostConfig>,
    /// Threads over which hosts are dealt.
    pub threads: usize,
    /// Which runtime drives them.
    pub engine: Engine,
    /// Aggregators that heartbeats go to (UDP). None: the host stays unknown.
    pub aggregators: Vec<SocketAddr>,
    /// Milliseconds between heartbeats until a directive says otherwise.
    pub interval_ms: u32,
    /// Milliseconds between two sendings of what changed of sandboxes, for lists; zero never. Absent: 1,000 with real
    /// boxes, never without.
    pub records_ms: Option<u64>,
    /// Share of the free slots that is not told to the fleet.
    pub margin_percent: u8,
    /// Whether sandboxes are real.
    pub boxes: Boxes,
    /// With `boxes = "none"`: milliseconds after which one ends of its own; zero at once, absent never (its
    /// deadline ends it).
    pub noop_ms: Option<u64>,
    /// Processor that sandboxes share, in thousandths of a core; absent: all of the machine's.
    pub cpu_millis: Option<u64>,
    /// Memory that sandboxes share; absent: three quarters of the machine's.
    pub memory_bytes: Option<u64>,
    /// Sandboxes at once.
    pub boxes_max: u32,
    /// Ended sandboxes whose records are kept for those who look later, at most 1,024.
    pub ended_max: usize,
    /// The fleet's four shapes; absent: nano, small, medium, large.
    pub shapes: Option<[ShapeConfig; 4]>,
    /// Boxes kept parked, a shape.
    pub pool: [u32; 4],
    /// First user id of this host's boxes; absent: a band drawn from the host's id. Hosts that share a machine want
    /// bands that do not overlap: each takes 65,536 ids for each of its boxes.
    pub uid_base: Option<u32>,
    /// The object store that images are in.
    pub objects: String,
    /// How images are mounted: `auto`, `file` (lazily), `loop` (lazily, by loop devices), `unpack`.
    pub image_mount: MountBy,
    /// Record what first runs read as boot packs, for the hosts after this one.
    pub record_boot_packs: bool,
    /// Milliseconds that a sandbox lives whose launch did not say; zero for ever.
    pub hard_ms: u64,
    /// Bytes of output kept a process whose launch did not say.
    pub log_bytes: u64,
    /// Whether launches may ask for egress.
    pub egress: EgressMode,
    /// Ranges that egress may reach although they are private, link-local, loopback or the machine's own. Everything
    /// public is open to begin with.
    pub egress_allow: Vec<String>,
    /// Ranges that egress never reaches.
    pub egress_deny: Vec<String>,
    /// Name servers (`ip:port`) for names that egress rules open; empty: the machine's.
    pub egress_dns: Vec<String>,
    /// Connections of one sandbox at a time.
    pub egress_connections: u32,
    /// Bytes a second of one sandbox, both directions together; zero for no bound.
    pub egress_bytes_per_s: u64,
    /// Address on which ports of sandboxes are published; absent: none is.
    pub publish: Option<IpAddr>,
    /// Ports of this machine that launches may have, first and last.
    pub publish_ports: [u16; 2],
    /// End all sandboxes when the daemon stops. Else they run on and the next start takes them up again.
    pub stop_ends_sandboxes: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            identity: "/etc/volley/host".into(),
            state: "/var/lib/volley/host".into(),
            listen: SocketAddr::from(([0, 0, 0, 0], 7_600)),
            advertise: None,
            ops: None,
            host_id: None,
            hosts: Vec::new(),
            threads: 1,
            engine: Engine::Auto,
            aggregators: Vec::new(),
            interval_ms: 15_000,
            records_ms: None,
            margin_percent: 0,
            boxes: Boxes::Real,
            noop_ms: None,
            cpu_millis: None,
            memory_bytes: None,
            boxes_max: 1_000,
            ended_max: hostd_core::limits::ENDED_MAX,
            shapes: None,
            pool: [4, 4, 2, 0],
            uid_base: None,
            objects: String::new(),
            image_mount: MountBy::Auto,
            record_boot_packs: true,
            hard_ms: 3_600_000,
            log_bytes: 1 << 20,
            egress: EgressMode::Off,
            egress_allow: Vec::new(),
            egress_deny: Vec::new(),
            egress_dns: Vec::new(),
            egress_connections: hostd_egress::CONNECTIONS_DEFAULT,
            egress_bytes_per_s: 0,
            publish: None,
            publish_ports: [30_000, 32_767],
            stop_ends_sandboxes: false,
        }
    }
}

impl Config {
    /// Milliseconds between records of sandboxes.
    #[must_use]
    pub fn records_ms(&self) -> u64 {
        self.records_ms.unwrap_or(if self.boxes == Boxes::Real { 1_000 } else { 0 })
    }

    /// The hosts to serve: those listed, else the one.
    #[must_use]
    pub fn hosts(&self) -> Vec<HostConfig> {
        if !self.hosts.is_empty() {
            return self.hosts.clone();
        }
        vec![HostConfig {
            identity: self.identity.clone(),
            state: self.state.clone(),
            listen: self.listen,
            advertise: self.advertise,
        }]
    }

    /// Checks what the types do not.
    ///
    /// # Errors
    /// [`Code::Config`], with the key that is wrong.
    pub fn check(&self) -> Result<(), Fault> {
        let bad = |what: String| Err(Fault::new(Code::Config, what));
        if !HEARTBEAT_INTERVAL_MS_RANGE.contains(&u64::from(self.interval_ms)) {
            return bad(format!(
                "interval_ms = {} is outside {HEARTBEAT_INTERVAL_MS_RANGE:?}",
                self.interval_ms
            ));
        }
        if self.threads == 0 {
            return bad("threads = 0: at least one is needed".into());
        }
        if self.margin_percent > 90 {
            return bad(format!("margin_percent = {} leaves no host to use", self.margin_percent));
        }
        if self.boxes == Boxes::Real && self.hosts().len() > 1 {
            return bad("hosts: several hosts in one process are for boxes = \"none\" only".into());
        }
        if self.boxes == Boxes::Real && self.objects.is_empty() {
            return bad("objects is not set: real boxes need the store that images are in".into());
        }
        if self.boxes == Boxes::Real && self.pool.iter().sum::<u32>() > self.boxes_max {
            return bad("pool holds more boxes than boxes_max".into());
        }
        if let Err(error) = self.egress_settings(&[]).check() {
            return bad(format!("egress: {error}"));
        }
        let [first, last] = self.publish_ports;
        if first == 0 || first > last {
            return bad(format!(
                "publish_ports = [{first}, {last}]: write [first, last], from 1 on"
            ));
        }
        self.shapes().map(|_| ())
    }

    /// What the egress worker is told: the operator's settings, and the doors of the fleet that this host knows.
    #[must_use]
    pub fn egress_settings(&self, own: &[SocketAddr]) -> hostd_egress::EgressSettings {
        let doors = self.aggregators.iter().chain(own).chain(&self.ops);
        hostd_egress::EgressSettings {
            allow: self.egress_allow.clone(),
            deny: self.egress_deny.clone(),
            doors: doors.map(ToString::to_string).collect(),
            resolvers: self.egress_dns.clone(),
            connections_max: self.egress_connections,
            bytes_per_s: self.egress_bytes_per_s,
        }
    }

    /// The shapes.
    ///
    /// # Errors
    /// [`Code::Config`] if two have one name, or one needs nothing.
    pub fn shapes(&self) -> Result<Shapes, Fault> {
        let Some(shapes) = &self.shapes else { return Ok(Shapes::default()) };
        if shapes.iter().any(|shape| shape.cpu_millis == 0 || shape.memory_bytes == 0) {
            return Err(Fault::new(Code::Config, "shapes: one needs no processor or no memory"));
        }
        let shape = |at: usize| Shape {
            name: shapes[at].name.clone(),
            need: Resources {
                cpu_millis: shapes[at].cpu_millis,
                memory_bytes: shapes[at].memory_bytes,
            },
        };
        Shapes::new([shape(0), shape(1), shape(2), shape(3)])
            .ok_or_else(|| Fault::new(Code::Config, "shapes: two have one name"))
    }

    /// What sandboxes share.
    #[must_use]
    pub fn whole(&self) -> Resources {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
        Resources {
            cpu_millis: self.cpu_millis.unwrap_or(cores * 1_000),
            memory_bytes: self.memory_bytes.unwrap_or_else(|| machine_memory() / 4 * 3),
        }
    }
}

fn machine_memory() -> u64 {
    let info = rustix::system::sysinfo();
    let unit = u64::from(info.mem_unit.max(1));
    info.totalram.saturating_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_and_bad_values_are_errors() {
        assert!(toml::from_str::<Config>("lisen = \"127.0.0.1:1\"").is_err());
        let config: Config = toml::from_str("boxes = \"none\"\ninterval_ms = 5").unwrap();
        assert_eq!(config.check().unwrap_err().code, Code::Config);
        let config: Config = toml::from_str("boxes = \"none\"").unwrap();
        config.check().unwrap();
        assert_eq!(
            Config::default().check().unwrap_err().code,
            Code::Config,
            "objects are missing"
        );
    }
}
