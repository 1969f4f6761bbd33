//! `host`: what the fleet's hosts are doing, and taking them out of service.
//!
//! For operators. A drain is a durable flag in the capacity service; hostd obeys it with its next heartbeat, and is
//! drained when it counts no sandbox. Left out: anything that speaks to a host directly.

use std::time::Duration;

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use volley_client::{HostId, HostRecord};
use wire::CapacityWord;

use crate::{
    client::{ClientFlags, Session},
    failure::Failure,
    run::SHAPES,
    show::{self, Output},
};

/// Time between two looks of `--monitor`.
const LOOK: Duration = Duration::from_millis(500);

/// What the capacity service says of a host.
const STATES: [&str; 6] = ["alive", "suspect", "quarantined", "draining", "drained", "dead"];

/// `volley host ...`.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Lists hosts.
    Ls(ListFlags),
    /// Shows all that is known of a host.
    Inspect(InspectFlags),
    /// Takes a host out of service: no new work; what runs may end.
    Drain(DrainFlags),
    /// Puts a host back into service.
    Resume(ResumeFlags),
}

/// Flags of `volley host ls`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  volley host ls\n  volley host ls --state draining -o json")]
pub(crate) struct ListFlags {
    #[command(flatten)]
    client: ClientFlags,
    #[command(flatten)]
    output: Output,
    /// Those in this state.
    #[arg(long, value_name = "STATE", value_parser = STATES)]
    state: Option<String>,
}

/// Flags of `volley host inspect`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  volley host inspect h-00c0ffee00c0ffee")]
pub(crate) struct InspectFlags {
    #[command(flatten)]
    client: ClientFlags,
    #[command(flatten)]
    output: Output,
    /// The host.
    host: HostId,
}

/// Flags of `volley host drain`.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  volley host drain h-00c0ffee00c0ffee --deadline 30m --message 'kernel update' --monitor")]
pub(crate) struct DrainFlags {
    #[command(flatten)]
    client: ClientFlags,
    /// Time after which what still runs is stopped; without it nothing is.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    deadline: Option<Duration>,
    /// For those who look later.
    #[arg(short, long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    message: String,
    /// Wait until the host is drained.
    #[arg(long)]
    monitor: bool,
    /// The host.
    host: HostId,
}

/// Flags of `volley host resume`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  volley host resume h-00c0ffee00c0ffee")]
pub(crate) struct ResumeFlags {
    #[command(flatten)]
    client: ClientFlags,
    /// The host.
    host: HostId,
}

/// A host, for programs.
#[derive(Debug, Serialize)]
struct Row {
    host: String,
    addr: String,
    state: String,
    running: u32,
    free: [u16; 4],
    total: [u16; 4],
    age_ms: u64,
    flags: Vec<&'static str>,
    message: String,
}

impl From<HostRecord> for Row {
    fn from(record: HostRecord) -> Self {
        let named = [
            (CapacityWord::DRAINING, "draining"),
            (CapacityWord::SICK, "sick"),
            (CapacityWord::QUARANTINED, "quarantined"),
            (CapacityWord::ABSENT, "absent"),
        ];
        let flags = named.iter().filter(|(flag, _)| record.word.has(*flag));
        Self {
            host: record.host.to_string(),
            addr: record.addr,
            state: record.state,
            running: record.running,
            free: record.word.free_all(),
            total: record.total,
            age_ms: record.age_ms,
            flags: flags.map(|(_, name)| *name).collect(),
            message: record.message,
        }
    }
}

/// `volley host ...`.
pub(crate) fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Ls(flags) => list(&flags),
        Command::Inspect(flags) => inspect(&flags),
        Command::Drain(flags) => drain(&flags),
        Command::Resume(flags) => {
            let session = Session::open_as(&flags.client, true)?;
            session.block(session.client().resume_host(flags.host))?;
            show::print(&flags.host.to_string())
        }
    }
}

fn list(flags: &ListFlags) -> Result<(), Failure> {
    let session = Session::open_as(&flags.client, true)?;
    let mut rows: Vec<_> =
        session.block(session.client().hosts())?.into_iter().map(Row::from).collect();
    rows.retain(|row| flags.state.as_ref().is_none_or(|state| *state == row.state));
    rows.sort_by(|a, b| a.host.cmp(&b.host));
    let heads = ["HOST", "ADDRESS", "STATE", "RUNNING", "FREE", "TOTAL", "HEARTBEAT", "MESSAGE"];
    show::list(flags.output, &rows, heads, |row| {
        [
            row.host.clone(),
            row.addr.clone(),
            row.state.clone(),
            row.running.to_string(),
            slots(row.free),
            slots(row.total),
            format!("{} ago", show::age(row.age_ms)),
            show::or_dash(&row.message),
        ]
    })
}

fn slots(counts: [u16; 4]) -> String {
    counts.map(|count| count.to_string()).join("/")
}

fn find(session: &Session, host: HostId) -> Result<HostRecord, Failure> {
    Ok(session.block(session.client().host(host))?)
}

fn inspect(flags: &InspectFlags) -> Result<(), Failure> {
    let session = Session::open_as(&flags.client, true)?;
    let row = Row::from(find(&session, flags.host)?);
    let mut pairs = vec![
        ("host", row.host.clone()),
        ("address", row.addr.clone()),
        ("state", row.state.clone()),
        ("flags", show::or_dash(&row.flags.join(" "))),
        ("running", row.running.to_string()),
        ("last heartbeat", format!("{} ago", show::age(row.age_ms))),
        ("message", show::or_dash(&row.message)),
    ];
    for (at, shape) in SHAPES.iter().enumerate() {
        pairs.push((shape, format!("{} of {} slots free", row.free[at], row.total[at])));
    }
    show::one(flags.output, &row, &pairs)
}

fn drain(flags: &DrainFlags) -> Result<(), Failure> {
    let session = Session::open_as(&flags.client, true)?;
    // A wrong id is told before anything waits for it.
    find(&session, flags.host)?;
    session.block(session.client().drain(flags.host, flags.deadline, &flags.message))?;
    if flags.monitor {
        monitor(&session, flags.host)?;
    }
    show::print(&flags.host.to_string())
}

fn monitor(session: &Session, host: HostId) -> Result<(), Failure> {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
        bar.set_style(style);
    }
    loop {
        let record = find(session, host)?;
        if record.state == "drained" {
            bar.finish_and_clear();
            return Ok(());
        }
        bar.set_message(format!("{}: {} sandboxes run", record.state, record.running));
        bar.tick();
        std::thread::sleep(LOOK);
    }
}
