//! The files of a dev fleet: identities, settings and addresses.
//!
//! Everything is under one state directory. Identities, host state and prepared images stay over restarts, so that a
//! second start is quick and a fleet that was killed is cleaned up by its own daemons; what is only true of one run
//! (the database, the map, addresses) is made anew each time. Left out: several machines; `volley init` is for those.

use std::{
    fs::{self, File, TryLockError},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    path::{Path, PathBuf},
};

use clap::ValueEnum;
use wire::{Code, HostId};
use wire_net::tls::{FleetAuthority, Peer};

use crate::{
    client::ClientFile,
    failure::Failure,
    init::{self, Member, Settings},
};

/// The tenant of a dev fleet.
pub(crate) const TENANT: &str = "dev";

/// First of the ports that are tried, and the step to the next try.
const PORT: u16 = 7_500;
const PORT_STEP: u16 = 50;
const PORT_TRIES: u16 = 40;

/// Milliseconds between publications of the map: a dev fleet's hosts should be seen at once.
const PUBLISH_MS: u64 = 200;

/// Milliseconds between heartbeats: a dev fleet is small, and fresh words make few refusals.
const HEARTBEAT_MS: u64 = 500;

/// What each dev host says it has: far more than the machine, since its sandboxes are short and small.
const CPU_MILLIS: u64 = 64_000;
const MEMORY_BYTES: u64 = 64 << 30;

/// Whether sandboxes are real.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Boxes {
    /// Processes in namespaces and cgroups.
    #[default]
    Real,
    /// Launches are admitted, counted and ended; nothing runs.
    None,
}

/// What is wanted.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// Hosts.
    pub(crate) hosts: u16,
    /// All hosts in one process instead of one each (without sandboxes only).
    pub(crate) packed: bool,
    /// Whether sandboxes are real.
    pub(crate) boxes: Boxes,
    /// Database, unless the embedded one.
    pub(crate) store: Option<String>,
    /// Object store, unless a directory.
    pub(crate) objects: Option<String>,
    /// First port, unless any that is free.
    pub(crate) port: Option<u16>,
}

/// A dev fleet that was laid out.
#[derive(Debug)]
pub(crate) struct Fleet {
    /// Its directory.
    pub(crate) state: PathBuf,
    /// Roles in the order in which they start: what they are, and their settings files.
    pub(crate) roles: Vec<RoleFile>,
    /// The client file.
    pub(crate) client: ClientFile,
    /// Where the client file is.
    pub(crate) client_path: PathBuf,
    /// The placer's metrics.
    pub(crate) placer_ops: SocketAddr,
    /// Held while the fleet runs: its directory and its ports.
    _lock: File,
    _claim: Option<TcpListener>,
}

/// A role to start.
#[derive(Clone, Debug)]
pub(crate) struct RoleFile {
    /// Its subcommand.
    pub(crate) role: &'static str,
    /// Its name in messages, and of its log.
    pub(crate) name: String,
    /// Its settings.
    pub(crate) config: PathBuf,
}

/// Addresses by one base port.
#[derive(Clone, Copy, Debug)]
struct Ports(u16);

impl Ports {
    const HOST: u16 = 30;

    fn local(self, offset: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), self.0 + offset)
    }

    fn aggregator(self) -> SocketAddr {
        self.local(10)
    }

    fn heartbeats(self) -> SocketAddr {
        self.local(11)
    }

    fn placer(self) -> SocketAddr {
        self.local(20)
    }

    /// Hosts have an address each and one port, as hosts of a fleet do.
    fn host(self, at: u16) -> SocketAddr {
        let [high, low] = (at + 1).to_be_bytes();
        SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, high, low)), self.0 + Self::HOST)
    }

    fn ops(self, role: SocketAddr) -> SocketAddr {
        SocketAddr::new(role.ip(), role.port() + 2)
    }

    /// Whether nothing listens on any of them.
    fn are_free(self, hosts: u16) -> bool {
        let quic = [self.aggregator(), self.heartbeats(), self.placer()];
        let hosts: Vec<_> = (0..hosts).map(|at| self.host(at)).collect();
        let all: Vec<_> = quic.into_iter().chain(hosts).collect();
        let roles = all.iter().filter(|addr| **addr != self.heartbeats());
        let ops: Vec<_> = roles.map(|addr| self.ops(*addr)).collect();
        all.iter().all(|addr| UdpSocket::bind(addr).is_ok())
            && ops.iter().all(|addr| TcpListener::bind(addr).is_ok())
    }
}

impl Fleet {
    /// Makes or refreshes the fleet's files.
    pub(crate) fn lay_out(wanted: &Wanted, state: &Path) -> Result<Self, Failure> {
        let fail = |error| Failure::io(state.display(), &error);
        fs::create_dir_all(state).map_err(fail)?;
        let state = fs::canonicalize(state).map_err(fail)?;
        let lock = lock(&state)?;
        for folder in ["log", "config", "objects"] {
            fs::create_dir_all(state.join(folder)).map_err(fail)?;
        }
        for stale in ["store", "placer", "objects/map", "client.toml"] {
            remove(&state.join(stale))?;
        }
        let (ports, claim) = choose_ports(wanted)?;
        let (authority, _) = init::authority(&state)?;
        let members = Members::complete(&authority, &state, wanted.hosts)?;
        let objects = wanted.objects.clone();
        let objects =
            objects.unwrap_or_else(|| format!("dir://{}", state.join("objects").display()));
        let plan = Plan { wanted, state: &state, ports, objects: &objects };
        let mut roles = vec![plan.heartbeatd(&members.aggregator)?];
        if wanted.packed {
            roles.push(plan.hostd_of_all(&members.hosts)?);
        } else {
            for (at, host) in (0..).zip(&members.hosts) {
                roles.push(plan.hostd(at, host)?);
            }
        }
        roles.push(plan.placerd(&members.placer)?);
        let client = ClientFile {
            placers: vec![ports.placer()],
            identity: members.tenant.dir.clone(),
            operator: Some(members.operator.dir.clone()),
            tenant: Some(TENANT.to_owned()),
            objects: Some(objects),
        };
        let client_path = state.join("client.toml");
        client.save(&client_path)?;
        let placer_ops = ports.ops(ports.placer());
        Ok(Self { state, roles, client, client_path, placer_ops, _lock: lock, _claim: claim })
    }

    /// Removes what is only true while the fleet runs.
    pub(crate) fn put_away(&self) {
        // What cannot be removed is removed by the next start.
        let _ = fs::remove_file(&self.client_path);
        let _ = fs::remove_dir_all(self.state.join("shell"));
    }
}

fn lock(state: &Path) -> Result<File, Failure> {
    let path = state.join("lock");
    let file = File::create(&path).map_err(|error| Failure::io(path.display(), &error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let what = format!("another `volley dev` runs in {}", state.display());
            Err(Failure::new(Code::Busy, what).hint("stop it, or give --state another directory"))
        }
        Err(TryLockError::Error(error)) => Err(Failure::io(path.display(), &error)),
    }
}

fn remove(path: &Path) -> Result<(), Failure> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => return Ok(()),
    };
    removed.map_err(|error| Failure::io(path.display(), &error))
}

/// Ports, and the claim on them: the first port of a range is held, so that two fleets that start at once take
/// different ranges.
fn choose_ports(wanted: &Wanted) -> Result<(Ports, Option<TcpListener>), Failure> {
    if let Some(port) = wanted.port {
        // A port that is taken is told by the role that cannot have it.
        return Ok((Ports(port), None));
    }
    for ports in (0..PORT_TRIES).map(|at| Ports(PORT + at * PORT_STEP)) {
        let Ok(claim) = TcpListener::bind(ports.local(0)) else { continue };
        if ports.are_free(wanted.hosts) {
            return Ok((ports, Some(claim)));
        }
    }
    let last = PORT + PORT_TRIES * PORT_STEP;
    Err(Failure::new(Code::Busy, format!("no free ports between {PORT} and {last}"))
        .hint("give --port BASE"))
}

/// Who is in the fleet.
struct Members {
    aggregator: Member,
    placer: Member,
    operator: Member,
    tenant: Member,
    hosts: Vec<Member>,
}

impl Members {
    /// Those of the last run, and who is missing.
    fn complete(authority: &FleetAuthority, state: &Path, hosts: u16) -> Result<Self, Failure> {
        let mut found = Vec::new();
        let entries = fs::read_dir(state).map_err(|error| Failure::io(state.display(), &error))?;
        for entry in entries.filter_map(Result::ok) {
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Some(peer) = Peer::parse(&format!("{name}.volley")) {
                found.push(Member { dir: entry.path(), peer });
            }
        }
        found.sort_by(|a, b| a.dir.cmp(&b.dir));
        let mut take = |wanted: &dyn Fn(&Peer) -> bool| {
            let at = found.iter().position(|member| wanted(&member.peer))?;
            Some(found.remove(at))
        };
        let mut member = |wanted: &dyn Fn(&Peer) -> bool, fresh: &dyn Fn(u64) -> Peer| {
            // An identity that is not good any more is replaced.
            match take(wanted) {
                Some(member) if wire_net::tls::Identity::load(&member.dir).is_ok() => Ok(member),
                _ => init::issue(authority, state, fresh(init::draw_id()?)),
            }
        };
        Ok(Self {
            aggregator: member(&|peer| matches!(peer, Peer::Aggregator(_)), &Peer::Aggregator)?,
            placer: member(&|peer| matches!(peer, Peer::Placer(_)), &Peer::Placer)?,
            operator: member(&|peer| *peer == Peer::Operator, &|_| Peer::Operator)?,
            tenant: member(&|peer| matches!(peer, Peer::Client { .. }), &|_| Peer::Client {
                tenant: TENANT.to_owned(),
            })?,
            hosts: (0..hosts)
                .map(|_| {
                    member(&|peer| matches!(peer, Peer::Host(_)), &|id| Peer::Host(HostId(id)))
                })
                .collect::<Result<_, _>>()?,
        })
    }
}

/// What the settings of all roles are made from.
struct Plan<'a> {
    wanted: &'a Wanted,
    state: &'a Path,
    ports: Ports,
    objects: &'a str,
}

impl Plan<'_> {
    fn path(&self, parts: &str) -> String {
        self.state.join(parts).display().to_string()
    }

    fn role(
        &self,
        role: &'static str,
        name: String,
        settings: &Settings,
    ) -> Result<RoleFile, Failure> {
        let config = self.state.join("config").join(format!("{name}.toml"));
        settings.save(&config)?;
        Ok(RoleFile { role, name, config })
    }

    fn heartbeatd(&self, member: &Member) -> Result<RoleFile, Failure> {
        let store = self.wanted.store.clone();
        let store = store.unwrap_or_else(|| format!("embedded://{}", self.path("store")));
        let aggregator = self.ports.aggregator();
        let mut settings = Settings::new()
            .text("identity", &member.dir.display().to_string())
            .text("state", &self.path("heartbeat"))
            .text("fleet", &self.path("fleet"))
            .text("listen", &aggregator.to_string())
            .text("udp", &self.ports.heartbeats().to_string())
            .text("ops", &self.ports.ops(aggregator).to_string())
            .text("store", &store)
            .text("objects", self.objects)
            .number("publish_ms", PUBLISH_MS);
        if let Peer::Aggregator(id) = member.peer {
            settings = settings.number("aggregator_id", id);
        }
        self.role("heartbeatd", "heartbeatd".to_owned(), &settings)
    }

    fn hostd(&self, at: u16, member: &Member) -> Result<RoleFile, Failure> {
        let listen = self.ports.host(at);
        let settings = self
            .hosts_settings()
            .text("identity", &member.dir.display().to_string())
            .text("state", &member.dir.join("state").display().to_string())
            .text("listen", &listen.to_string())
            .text("ops", &self.ports.ops(listen).to_string());
        self.role("hostd", format!("hostd-{}", at + 1), &settings)
    }

    /// All hosts in one process: what a bench of placement wants of them.
    fn hostd_of_all(&self, members: &[Member]) -> Result<RoleFile, Failure> {
        let mut settings =
            self.hosts_settings().text("ops", &self.ports.ops(self.ports.host(0)).to_string());
        // Records of what ended: those of hundreds of hosts would fill the caches that each host has for itself elsewhere.
        settings = settings.number("ended_max", 16);
        for (at, member) in (0..).zip(members) {
            settings = settings
                .table("hosts")
                .text("identity", &member.dir.display().to_string())
                .text("state", &member.dir.join("state").display().to_string())
                .text("listen", &self.ports.host(at).to_string());
        }
        self.role("hostd", "hostd".to_owned(), &settings)
    }

    /// What is the same for all hosts.
    fn hosts_settings(&self) -> Settings {
        let settings = Settings::new()
            .list("aggregators", &[&self.ports.heartbeats().to_string()])
            .number("interval_ms", HEARTBEAT_MS)
            .number("cpu_millis", CPU_MILLIS)
            .number("memory_bytes", MEMORY_BYTES)
            .text("objects", self.objects)
            .flag("stop_ends_sandboxes", true)
            // A fleet of one machine for its own developer: sandboxes may be let out, and their ports onto loopback.
            .text("egress", "policy")
            .text("publish", "127.0.0.1");
        match self.wanted.boxes {
            Boxes::Real => settings.text("boxes", "real"),
            Boxes::None => settings.text("boxes", "none").number("noop_ms", 0),
        }
    }

    fn placerd(&self, member: &Member) -> Result<RoleFile, Failure> {
        let placer = self.ports.placer();
        let settings = Settings::new()
            .text("identity", &member.dir.display().to_string())
            .text("state", &self.path("placer"))
            .text("listen", &placer.to_string())
            .text("ops", &self.ports.ops(placer).to_string())
            .text("objects", self.objects)
            .list("aggregators", &[&self.ports.heartbeats().to_string()])
            .list("admin", &[&self.ports.aggregator().to_string()])
            .number("map_refresh_ms", PUBLISH_MS);
        self.role("placerd", "placerd".to_owned(), &settings)
    }
}
