//! `volley init`: a fleet's authority, and identities and settings for its members.
//!
//! The first call in a directory makes the authority; each call adds the members that it is asked for. A member is a
//! directory to copy to its machine: certificate, keys, and a settings file that runs as it is on one machine and is
//! edited for several. The authority's key stays: it belongs on no machine that runs a role. Left out: revocation.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::Args;
use wire::{Code, HostId};
use wire_net::tls::{FleetAuthority, Identity, Peer};

use crate::{client::ClientFile, failure::Failure, show};

/// Most members of one kind that one call makes.
const MEMBERS_MAX: u16 = 10_000;

/// Flags of `volley init`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  volley init fleet --hosts 3 --tenant acme       the authority, three hosts, an operator, a tenant
  volley init fleet --hosts 10                    ten hosts more for the same fleet
  volley init fleet --rotate-key                  new heartbeat keys; fleet.key goes to the aggregators again
  volley hostd --config fleet/host-00c0ffee00c0ffee/hostd.toml")]
pub(crate) struct Flags {
    /// Directory of the fleet.
    dir: PathBuf,
    /// Hosts to make identities for.
    #[arg(long, value_name = "COUNT", default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=i64::from(MEMBERS_MAX)))]
    hosts: u16,
    /// Placers to make identities for; one with a new fleet.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(..=i64::from(MEMBERS_MAX)))]
    placers: Option<u16>,
    /// Aggregators to make identities for; one with a new fleet.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(..=i64::from(MEMBERS_MAX)))]
    aggregators: Option<u16>,
    /// Tenant to make an identity for. May be repeated.
    #[arg(long = "tenant", value_name = "NAME")]
    tenants: Vec<String>,
    /// Start the next key epoch of heartbeats: hosts move to it by themselves; placers' `beat.key` files are renewed here.
    #[arg(long)]
    rotate_key: bool,
    /// End all key epochs but the newest. Once every aggregator says `hosts{what="old_key"} 0`.
    #[arg(long, conflicts_with = "rotate_key")]
    prune_keys: bool,
    /// Object store that the settings name: dir:///path or s3://bucket/prefix?endpoint=URL&region=R.
    #[arg(long, value_name = "URL")]
    objects: Option<String>,
    /// Database that the settings name: embedded:///path or scylla://host:port[,host:port]/keyspace.
    #[arg(long, value_name = "URL")]
    store: Option<String>,
}

/// A member that was made.
#[derive(Debug)]
pub(crate) struct Member {
    /// Its directory.
    pub(crate) dir: PathBuf,
    /// Its name.
    pub(crate) peer: Peer,
}

/// Makes the fleet of `dir`, or opens the one that is there. Says which.
pub(crate) fn authority(dir: &Path) -> Result<(FleetAuthority, bool), Failure> {
    let fleet = dir.join("fleet");
    if fleet.join("ca.key").exists() {
        return Ok((FleetAuthority::load(&fleet)?, false));
    }
    fs::create_dir_all(&fleet).map_err(|error| Failure::io(fleet.display(), &error))?;
    Ok((FleetAuthority::create(&fleet)?, true))
}

/// Issues an identity into its directory under `dir`.
pub(crate) fn issue(authority: &FleetAuthority, dir: &Path, peer: Peer) -> Result<Member, Failure> {
    let name = match &peer {
        Peer::Host(HostId(id)) => format!("host-{id:016x}"),
        Peer::Placer(id) => format!("placer-{id:016x}"),
        Peer::Aggregator(id) => format!("aggregator-{id:016x}"),
        Peer::Client { tenant } => format!("tenant-{tenant}"),
        Peer::Operator => "operator".to_owned(),
    };
    let dir = dir.join(name);
    let identity: Identity = authority.issue(&peer)?;
    fs::create_dir_all(&dir).map_err(|error| Failure::io(dir.display(), &error))?;
    identity.save(&dir)?;
    Ok(Member { dir, peer })
}

/// A fresh id of a host, placer or aggregator: 63 bits, so that settings files can say it as a number.
pub(crate) fn draw_id() -> Result<u64, Failure> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Failure::io("no randomness", &error.into()))?;
    Ok(u64::from_le_bytes(bytes) >> 1)
}

/// `volley init`.
pub(crate) fn run(flags: &Flags) -> Result<(), Failure> {
    let of_keys = flags.rotate_key || flags.prune_keys;
    if of_keys && !flags.dir.join("fleet/ca.key").exists() {
        let what = format!("{} holds no fleet whose keys could change", flags.dir.display());
        return Err(Failure::new(Code::Config, what).hint("give the directory that init made"));
    }
    let (mut authority, new) = authority(&flags.dir)?;
    let root =
        fs::canonicalize(&flags.dir).map_err(|error| Failure::io(flags.dir.display(), &error))?;
    if flags.rotate_key {
        return rotate(&mut authority, &root);
    }
    if flags.prune_keys {
        let ended = authority.prune()?.into_iter().map(|epoch| epoch.0.to_string());
        let ended = ended.collect::<Vec<_>>().join(", ");
        if ended.is_empty() {
            return show::print("there is one key epoch only, which stays");
        }
        return show::print(&format!("key epochs ended: {ended}; {}", handed_on(&root)));
    }
    let asked = usize::from(flags.hosts) + flags.tenants.len();
    if !new && asked == 0 && flags.placers.is_none() && flags.aggregators.is_none() {
        let what = format!("{} already holds a fleet, which was left as it is", root.display());
        return Err(Failure::new(Code::Config, what)
            .hint("say what to add: --hosts, --placers, --aggregators or --tenant"));
    }
    let many = |asked: Option<u16>| asked.unwrap_or(u16::from(new));
    let mut members = Vec::new();
    for _ in 0..many(flags.aggregators) {
        members.push(issue(&authority, &root, Peer::Aggregator(draw_id()?))?);
    }
    for _ in 0..many(flags.placers) {
        members.push(issue(&authority, &root, Peer::Placer(draw_id()?))?);
    }
    for _ in 0..flags.hosts {
        members.push(issue(&authority, &root, Peer::Host(HostId(draw_id()?)))?);
    }
    if new {
        members.push(issue(&authority, &root, Peer::Operator)?);
    }
    for tenant in &flags.tenants {
        members.push(issue(&authority, &root, Peer::Client { tenant: tenant.clone() })?);
    }
    for member in &members {
        let settings = settings(&root, flags, member)?;
        let kind = settings.unwrap_or_else(|| "identity".to_owned());
        show::print(&format!("{}  {kind}", member.dir.display()))?;
    }
    if new {
        show::print(&format!(
            "keep {} on a machine that runs no role: it can make any member",
            root.join("fleet/ca.key").display()
        ))?;
    }
    Ok(())
}

/// Starts the next key epoch. Hosts get it with their next heartbeat; what does not beat gets a file.
fn rotate(authority: &mut FleetAuthority, root: &Path) -> Result<(), Failure> {
    let epoch = authority.rotate()?;
    let entries = fs::read_dir(root).map_err(|error| Failure::io(root.display(), &error))?;
    for entry in entries.filter_map(Result::ok) {
        let name = entry.file_name().to_string_lossy().into_owned();
        let peer = Peer::parse(&format!("{name}.volley"));
        if let Some(peer @ (Peer::Placer(_) | Peer::Aggregator(_))) = peer
            && let Some(key) = authority.beat_key(&peer)
        {
            key.save(&entry.path())?;
            show::print(&format!("{}  beat.key", entry.path().display()))?;
        }
    }
    show::print(&format!(
        "key epoch {}; {}; copy placers' beat.key and restart them; when every aggregator says \
         hosts{{what=\"old_key\"}} 0, end the old ones: --prune-keys",
        epoch.0,
        handed_on(root)
    ))
}

fn handed_on(root: &Path) -> String {
    format!(
        "copy {} to the aggregators, which look at it each second",
        root.join("fleet/fleet.key").display()
    )
}

/// Writes the settings file of a member and says its name. Ports are the usual ones; a second role of a kind on the
/// same machine needs others.
fn settings(root: &Path, flags: &Flags, member: &Member) -> Result<Option<String>, Failure> {
    let state = Path::new("/var/lib/volley");
    let objects =
        flags.objects.clone().unwrap_or_else(|| "dir:///var/lib/volley/objects".to_owned());
    let store = flags
        .store
        .clone()
        .unwrap_or_else(|| "embedded:///var/lib/volley/heartbeatd/store".to_owned());
    let dir = member.dir.display().to_string();
    let (name, text) = match &member.peer {
        Peer::Aggregator(id) => (
            "heartbeatd.toml",
            Settings::new()
                .text("identity", &dir)
                .text("state", &state.join("heartbeatd").display().to_string())
                .text("fleet", &root.join("fleet").display().to_string())
                .text("listen", "127.0.0.1:7401")
                .text("udp", "127.0.0.1:7400")
                .text("ops", "127.0.0.1:7402")
                .text("store", &store)
                .text("objects", &objects)
                .number("aggregator_id", *id),
        ),
        Peer::Placer(_) => (
            "placerd.toml",
            Settings::new()
                .text("identity", &dir)
                .text("state", &state.join("placerd").display().to_string())
                .text("listen", "127.0.0.1:7420")
                .text("ops", "127.0.0.1:7422")
                .text("objects", &objects)
                .text("lookup", "feed")
                .list("aggregators", &["127.0.0.1:7400"])
                .list("admin", &["127.0.0.1:7401"]),
        ),
        Peer::Host(_) => (
            "hostd.toml",
            Settings::new()
                .text("identity", &dir)
                .text("state", &state.join("hostd").display().to_string())
                .text("listen", "127.0.0.1:7600")
                .text("ops", "127.0.0.1:7602")
                .list("aggregators", &["127.0.0.1:7400"])
                .text("objects", &objects)
                .text("boxes", "real"),
        ),
        Peer::Client { tenant } => {
            let file = ClientFile {
                placers: vec![([127, 0, 0, 1], 7420).into()],
                identity: ".".into(),
                tenant: Some(tenant.clone()),
                objects: Some(objects),
                ..ClientFile::default()
            };
            file.save(&member.dir.join("client.toml"))?;
            return Ok(Some("client.toml".to_owned()));
        }
        Peer::Operator => {
            let file = ClientFile {
                placers: vec![([127, 0, 0, 1], 7420).into()],
                identity: ".".into(),
                objects: Some(objects),
                ..ClientFile::default()
            };
            file.save(&member.dir.join("client.toml"))?;
            return Ok(Some("client.toml".to_owned()));
        }
    };
    text.save(&member.dir.join(name))?;
    Ok(Some(name.to_owned()))
}

/// A settings file as it is written: flat keys in a given order.
#[derive(Debug, Default)]
pub(crate) struct Settings(String);

impl Settings {
    /// An empty one.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a text.
    pub(crate) fn text(self, key: &str, value: &str) -> Self {
        self.value(key, &toml::Value::String(value.to_owned()))
    }

    /// Adds a number.
    ///
    /// # Panics
    /// If it does not fit TOML's integers, which have a sign.
    pub(crate) fn number(self, key: &str, value: u64) -> Self {
        let value = i64::try_from(value).expect("settings' numbers are below 2^63");
        self.value(key, &toml::Value::Integer(value))
    }

    /// Adds a yes or no.
    pub(crate) fn flag(self, key: &str, value: bool) -> Self {
        self.value(key, &toml::Value::Boolean(value))
    }

    /// Adds a list of texts.
    pub(crate) fn list(self, key: &str, values: &[&str]) -> Self {
        let values = values.iter().map(|value| toml::Value::String((*value).to_owned())).collect();
        self.value(key, &toml::Value::Array(values))
    }

    /// Begins an element of a list of tables; what follows belongs to it.
    pub(crate) fn table(mut self, name: &str) -> Self {
        self.0 += &format!("\n[[{name}]]\n");
        self
    }

    fn value(mut self, key: &str, value: &toml::Value) -> Self {
        self.0 += &format!("{key} = {value}\n");
        self
    }

    /// Writes the file.
    pub(crate) fn save(&self, file: &Path) -> Result<(), Failure> {
        fs::write(file, &self.0).map_err(|error| Failure::io(file.display(), &error))
    }
}
