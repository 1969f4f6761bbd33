//! Commands on running sandboxes: list, inspect, kill, wait, pause, resume, extend, stats.
//!
//! Commands that take several sandboxes do what they can and fail with the first failure. Left out: any filter that
//! the hosts do not apply themselves.

use std::time::Duration;

use clap::Args;
use serde::Serialize;
use volley_client::{
    CallError, Exit, Listed, Network, Published, Sandbox, SandboxId, SandboxRecord, State, Stats,
};

use crate::{
    attach::pair,
    client::{ClientFlags, Session},
    failure::Failure,
    run::shape_name,
    show::{self, Output},
};

/// Flags of `volley ls`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  volley ls
  volley ls --all -l job=42 -o json
  volley ls --fresh

Without --fresh the list is what hosts last said beside their heartbeats: a second or two behind, and HEARD says how
long ago each was said.")]
pub(crate) struct ListFlags {
    #[command(flatten)]
    client: ClientFlags,
    #[command(flatten)]
    output: Output,
    /// Those that have ended as well, while they are remembered.
    #[arg(short, long)]
    all: bool,
    /// Ask every host, in fleets small enough for that: as it is now, with all of its command and labels.
    #[arg(long)]
    fresh: bool,
    /// Those with this label. May be repeated.
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = pair)]
    label: Vec<(String, String)>,
}

/// Flags of `volley inspect`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  volley inspect sb-... -o json")]
pub(crate) struct InspectFlags {
    #[command(flatten)]
    client: ClientFlags,
    #[command(flatten)]
    output: Output,
    /// The sandbox.
    sandbox: SandboxId,
}

/// Flags of `volley kill`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  volley kill sb-...\n  volley kill --signal TERM sb-...")]
pub(crate) struct KillFlags {
    #[command(flatten)]
    client: ClientFlags,
    /// Send this signal to the main process instead of ending the sandbox: a name or a number.
    #[arg(short, long, value_name = "SIGNAL", value_parser = signal_number)]
    signal: Option<u8>,
    /// The sandboxes.
    #[arg(required = true)]
    sandbox: Vec<SandboxId>,
}

/// Flags of `volley wait`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  volley wait sb-...")]
pub(crate) struct WaitFlags {
    #[command(flatten)]
    client: ClientFlags,
    #[command(flatten)]
    output: Output,
    /// The sandboxes.
    #[arg(required = true)]
    sandbox: Vec<SandboxId>,
}

/// Flags of `volley pause` and `volley resume`.
#[derive(Args, Debug)]
pub(crate) struct NamesFlags {
    #[command(flatten)]
    client: ClientFlags,
    /// The sandboxes.
    #[arg(required = true)]
    sandbox: Vec<SandboxId>,
}

/// Flags of `volley extend`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  volley extend --timeout 2h sb-...")]
pub(crate) struct ExtendFlags {
    #[command(flatten)]
    client: ClientFlags,
    /// Time to live from now.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, required_unless_present = "idle")]
    timeout: Option<Duration>,
    /// Time without input, output or calls after which it is ended.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    idle: Option<Duration>,
    /// The sandbox.
    sandbox: SandboxId,
}

/// Flags of `volley stats`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  volley stats sb-... -o json")]
pub(crate) struct StatsFlags {
    #[command(flatten)]
    client: ClientFlags,
    #[command(flatten)]
    output: Output,
    /// The sandboxes.
    #[arg(required = true)]
    sandbox: Vec<SandboxId>,
}

/// A sandbox, for programs.
#[derive(Debug, Serialize)]
struct Row {
    sandbox: String,
    launch_id: String,
    tenant: String,
    image: String,
    shape: String,
    command: Vec<String>,
    labels: Vec<(String, String)>,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit: Option<ExitRow>,
    age_ms: u64,
    left_ms: u64,
    /// Since its host said so; absent if it was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    heard_ms: Option<u64>,
    /// Egress rules; none: no egress; absent: not told by a list from records.
    #[serde(skip_serializing_if = "Option::is_none")]
    egress: Option<Vec<String>>,
    published: Vec<PublishedRow>,
}

/// A published port, for programs.
#[derive(Debug, Serialize)]
pub(crate) struct PublishedRow {
    port: u16,
    address: String,
}

impl From<Published> for PublishedRow {
    fn from(one: Published) -> Self {
        Self { port: one.port, address: one.address }
    }
}

/// A process's end, for programs.
#[derive(Clone, Copy, Debug, Serialize)]
struct ExitRow {
    code: i32,
    why: &'static str,
}

impl From<Exit> for ExitRow {
    fn from(exit: Exit) -> Self {
        Self { code: exit.code, why: exit.why.name() }
    }
}

impl From<SandboxRecord> for Row {
    fn from(record: SandboxRecord) -> Self {
        let (state, exit) = match record.state {
            State::Claimed => ("claimed", None),
            State::Running => ("running", None),
            State::Paused => ("paused", None),
            State::Stopped(exit) => ("stopped", Some(exit.into())),
        };
        Self {
            sandbox: record.sandbox.to_string(),
            launch_id: record.launch_id.to_string(),
            tenant: record.tenant,
            image: record.image,
            shape: shape_name(record.shape),
            command: record.command,
            labels: record.labels,
            state,
            exit,
            age_ms: record.age_ms,
            left_ms: record.left_ms,
            heard_ms: None,
            egress: Some(match record.network {
                Network::None => Vec::new(),
                Network::Egress(rules) if rules.is_empty() => vec!["any".to_owned()],
                Network::Egress(rules) => rules,
            }),
            published: record.published.into_iter().map(PublishedRow::from).collect(),
        }
    }
}

impl Row {
    fn state(&self) -> String {
        self.exit.map_or_else(
            || self.state.to_owned(),
            |exit| format!("{} ({} {})", self.state, exit.why, exit.code),
        )
    }

    fn labels(&self) -> String {
        let labels: Vec<_> =
            self.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
        show::or_dash(&labels.join(","))
    }

    fn ports(&self) -> String {
        let ports: Vec<_> =
            self.published.iter().map(|one| format!("{}->{}", one.address, one.port)).collect();
        show::or_dash(&ports.join(","))
    }

    fn left(&self) -> String {
        let over = self.left_ms == 0 || self.exit.is_some();
        if over { "-".to_owned() } else { show::age(self.left_ms) }
    }
}

/// `volley ls`.
pub(crate) fn list(flags: &ListFlags) -> Result<(), Failure> {
    let session = Session::open(&flags.client)?;
    let client = session.client();
    let rows: Vec<Row> = if flags.fresh {
        let records = session.block(client.list(&flags.label, flags.all))?;
        records.into_iter().map(Row::from).collect()
    } else {
        let recorded = session.block(client.list_recorded(&flags.label, flags.all));
        let recorded = recorded.map_err(|error| {
            Failure::from(error).hint("--fresh asks the hosts themselves, where the fleet is small")
        })?;
        if recorded.more {
            eprintln!("there are more; these are the newest. Narrow the list by --label.");
        }
        let row = |listed: Listed| Row {
            heard_ms: Some(listed.heard_ms),
            egress: None,
            ..listed.record.into()
        };
        recorded.listed.into_iter().map(row).collect()
    };
    let heads = [
        "SANDBOX", "IMAGE", "SHAPE", "STATE", "AGE", "LEFT", "HEARD", "LABELS", "PORTS", "COMMAND",
    ];
    show::list(flags.output, &rows, heads, |row| {
        [
            row.sandbox.clone(),
            row.image.clone(),
            row.shape.clone(),
            row.state(),
            show::age(row.age_ms),
            row.left(),
            row.heard_ms.map_or_else(|| "-".to_owned(), show::age),
            row.labels(),
            row.ports(),
            shortened(&row.command.join(" ")),
        ]
    })
}

fn shortened(text: &str) -> String {
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if clean.chars().count() <= 40 {
        return show::or_dash(&clean);
    }
    clean.chars().take(39).chain(['\u{2026}']).collect()
}

/// `volley inspect`.
pub(crate) fn inspect(flags: &InspectFlags) -> Result<(), Failure> {
    let session = Session::open(&flags.client)?;
    let row: Row = session.block(session.client().sandbox(flags.sandbox).inspect())?.into();
    let pairs = [
        ("sandbox", row.sandbox.clone()),
        ("launch id", row.launch_id.clone()),
        ("host", flags.sandbox.host.to_string()),
        ("tenant", row.tenant.clone()),
        ("image", row.image.clone()),
        ("shape", row.shape.clone()),
        ("state", row.state()),
        ("age", show::age(row.age_ms)),
        ("left", row.left()),
        ("labels", row.labels()),
        ("egress", show::or_dash(&row.egress.clone().unwrap_or_default().join(","))),
        ("ports", row.ports()),
        ("command", row.command.join(" ")),
    ];
    show::one(flags.output, &row, &pairs)
}

/// `volley kill`.
pub(crate) fn kill(flags: &KillFlags) -> Result<(), Failure> {
    let signal = flags.signal;
    each(&flags.client, &flags.sandbox, |sandbox| async move {
        match signal {
            Some(signal) => sandbox.signal(signal).await,
            None => sandbox.kill().await,
        }
    })
}

/// `volley pause`.
pub(crate) fn pause(flags: &NamesFlags) -> Result<(), Failure> {
    each(&flags.client, &flags.sandbox, |sandbox| async move { sandbox.pause().await })
}

/// `volley resume`.
pub(crate) fn resume(flags: &NamesFlags) -> Result<(), Failure> {
    each(&flags.client, &flags.sandbox, |sandbox| async move { sandbox.resume().await })
}

/// `volley extend`.
pub(crate) fn extend(flags: &ExtendFlags) -> Result<(), Failure> {
    let (lifetime, idle) = (flags.timeout, flags.idle);
    each(
        &flags.client,
        &[flags.sandbox],
        |sandbox| async move { sandbox.extend(lifetime, idle).await },
    )
}

/// Does something to each sandbox and prints those that it was done to.
fn each<F>(
    client: &ClientFlags,
    sandboxes: &[SandboxId],
    deed: impl Fn(Sandbox) -> F,
) -> Result<(), Failure>
where
    F: Future<Output = Result<(), CallError>>,
{
    let session = Session::open(client)?;
    let mut first = None;
    for &id in sandboxes {
        match session.block(deed(session.client().sandbox(id))).map_err(Failure::from) {
            Ok(()) => show::print(&id.to_string())?,
            Err(failure) if sandboxes.len() == 1 => return Err(failure),
            Err(failure) => {
                eprintln!("{id}: {failure}");
                first = first.or(Some(failure));
            }
        }
    }
    first.map_or(Ok(()), Err)
}

/// `volley wait`.
pub(crate) fn wait(flags: &WaitFlags) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct Ended {
        sandbox: String,
        #[serde(flatten)]
        exit: ExitRow,
    }
    let session = Session::open(&flags.client)?;
    let mut rows = Vec::with_capacity(flags.sandbox.len());
    for &sandbox in &flags.sandbox {
        let exit = session.block(session.client().sandbox(sandbox).wait())?;
        rows.push(Ended { sandbox: sandbox.to_string(), exit: exit.into() });
    }
    show::list(flags.output, &rows, ["SANDBOX", "CODE", "WHY"], |row| {
        [row.sandbox.clone(), row.exit.code.to_string(), row.exit.why.to_owned()]
    })
}

/// `volley stats`.
pub(crate) fn stats(flags: &StatsFlags) -> Result<(), Failure> {
    let session = Session::open(&flags.client)?;
    let mut rows = Vec::with_capacity(flags.sandbox.len());
    for &sandbox in &flags.sandbox {
        let stats = session.block(session.client().sandbox(sandbox).stats())?;
        rows.push(StatsRow::new(sandbox, stats));
    }
    let heads = [
        "SANDBOX", "CPU", "MEMORY", "PEAK", "LIMIT", "PIDS", "DISK", "NET IN", "NET OUT",
        "LOG LOST",
    ];
    show::list(flags.output, &rows, heads, |row| {
        [
            row.sandbox.clone(),
            format!("{:.3}s", Duration::from_nanos(row.cpu_ns).as_secs_f64()),
            show::bytes(row.memory_bytes),
            show::bytes(row.memory_peak_bytes),
            show::bytes(row.memory_limit_bytes),
            row.pids.to_string(),
            show::bytes(row.disk_bytes),
            show::bytes(row.net_in_bytes),
            show::bytes(row.net_out_bytes),
            show::bytes(row.log_lost_bytes),
        ]
    })
}

/// Usage, for programs.
#[derive(Debug, Serialize)]
struct StatsRow {
    sandbox: String,
    cpu_ns: u64,
    memory_bytes: u64,
    memory_peak_bytes: u64,
    memory_limit_bytes: u64,
    pids: u64,
    disk_bytes: u64,
    net_in_bytes: u64,
    net_out_bytes: u64,
    log_lost_bytes: u64,
}

impl StatsRow {
    fn new(sandbox: SandboxId, stats: Stats) -> Self {
        Self {
            sandbox: sandbox.to_string(),
            cpu_ns: stats.cpu_ns,
            memory_bytes: stats.memory_bytes,
            memory_peak_bytes: stats.memory_peak_bytes,
            memory_limit_bytes: stats.memory_limit_bytes,
            pids: stats.pids,
            disk_bytes: stats.disk_bytes,
            net_in_bytes: stats.net_in_bytes,
            net_out_bytes: stats.net_out_bytes,
            log_lost_bytes: stats.log_lost_bytes,
        }
    }
}

/// A signal from its name (`TERM`, `SIGTERM`) or number.
fn signal_number(text: &str) -> Result<u8, String> {
    const NAMES: [(&str, u8); 17] = [
        ("HUP", 1),
        ("INT", 2),
        ("QUIT", 3),
        ("ILL", 4),
        ("TRAP", 5),
        ("ABRT", 6),
        ("BUS", 7),
        ("FPE", 8),
        ("KILL", 9),
        ("USR1", 10),
        ("SEGV", 11),
        ("USR2", 12),
        ("PIPE", 13),
        ("ALRM", 14),
        ("TERM", 15),
        ("CONT", 18),
        ("STOP", 19),
    ];
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let named = NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    named
        .or_else(|| text.parse().ok().filter(|number| (1..=64).contains(number)))
        .ok_or_else(|| "no such signal".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        assert_eq!(signal_number("term"), Ok(15));
        assert_eq!(signal_number("SIGKILL"), Ok(9));
        assert_eq!(signal_number("34"), Ok(34));
        assert!(signal_number("0").is_err() && signal_number("65").is_err());
        assert!(signal_number("NOPE").is_err());
    }

    #[test]
    fn a_command_is_shortened_to_one_line() {
        assert_eq!(shortened(""), "-");
        assert_eq!(shortened("a\nb"), "a b");
        assert_eq!(shortened(&"x".repeat(50)).chars().count(), 40);
    }
}
