//! `run`: launch, attach, exit as the command does.
//!
//! A launch whose outcome stayed unknown says its id, so that a script can ask again with `--launch-id`: the same id
//! runs at most once. When a connection is lost while the command runs, `run` attaches again where its output
//! ended. Left out: restart policies; a sandbox runs once.

use std::{process::ExitCode, time::Duration};

use clap::Args;
use volley_client::{LaunchId, LaunchSpec, Limits, Network, Publish, Rule, RuleError, Sandbox};
use wire::Code;

use crate::{
    attach::{self, Streams, pair, pump},
    client::{ClientFlags, Session},
    failure::Failure,
    show,
};

/// Names of the usual shapes, in the order of their indices.
pub(crate) const SHAPES: [&str; 4] = ["nano", "small", "medium", "large"];

/// Times that `run` attaches again in a row without hearing anything new.
const REATTACH_MAX: u32 = 5;

/// Flags of `volley run`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  volley run --image shell -- sh -c 'id; exit 7'
  volley run -it --image shell -- sh
  volley run -d --image shell --timeout 1h --label job=42 -- sleep 600
  volley run --image py --egress pypi.org:443 --egress '*.pythonhosted.org:443' -- pip download six
  volley run -d --image web --egress 10.20.0.0/16:5432 --publish 30080:80 -- serve
  seq 10 | volley run -i --image shell -- sort -rn")]
pub(crate) struct Flags {
    #[command(flatten)]
    client: ClientFlags,
    /// Image: a name, or an id of 64 hex digits.
    #[arg(long, value_name = "IMAGE")]
    image: String,
    /// Size: nano, small, medium, large, or an index.
    #[arg(long, value_name = "SHAPE", default_value = "nano", value_parser = shape)]
    shape: u8,
    /// Keep standard input open and pass it on.
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal.
    #[arg(short, long)]
    tty: bool,
    /// Print the sandbox's id and let it run.
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    detach: bool,
    /// Environment variable. May be repeated.
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// Working directory; default: the image's.
    #[arg(short = 'w', long, value_name = "DIR", default_value = "", hide_default_value = true)]
    cwd: String,
    /// User: a name, uid or uid:gid; default: the image's.
    #[arg(short, long, value_name = "USER", default_value = "", hide_default_value = true)]
    user: String,
    /// Label to list by. May be repeated.
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = pair)]
    label: Vec<(String, String)>,
    #[command(flatten)]
    limits: LimitFlags,
    /// What it may reach: [tcp:|udp:]WHERE[:PORT[-PORT]], WHERE an address, address/prefix, name, *.name or `any`.
    /// May be repeated; without it just its own loopback. What a host's operator closes stays closed: private ranges,
    /// metadata addresses and the host itself, unless opened there.
    #[arg(long, value_name = "RULE", value_parser = rule)]
    egress: Vec<String>,
    /// Open a port of it on its host's own address, where the operator allows that. Without HOST_PORT any that is free;
    /// `volley port ID` says which. May be repeated.
    #[arg(short, long, value_name = "[HOST_PORT:]PORT", value_parser = published)]
    publish: Vec<Publish>,
    /// Time within which it must have started.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    budget: Option<Duration>,
    /// Id of this launch (a UUID): the same id again is the same launch.
    #[arg(long, value_name = "UUID")]
    launch_id: Option<LaunchId>,
    /// Command and arguments; default: the image's.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Bounds of one sandbox beyond its shape's.
#[derive(Args, Clone, Copy, Debug)]
struct LimitFlags {
    /// Time to live, as in 90s, 1h 30m.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
    /// Time without input, output or calls after which it is ended.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    idle: Option<Duration>,
    /// Bytes that it may write to its root, as in 64M.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    disk: Option<u64>,
    /// Bytes of its log that are kept, newest last.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    log: Option<u64>,
    /// Processes and threads.
    #[arg(long, value_name = "COUNT")]
    pids: Option<u32>,
    /// Open files a process.
    #[arg(long, value_name = "COUNT")]
    open_files: Option<u32>,
}

/// A rule, checked here so that a slip is told at once; the host checks it again.
fn rule(text: &str) -> Result<String, RuleError> {
    text.parse::<Rule>().map(|_| text.to_owned())
}

fn published(text: &str) -> Result<Publish, RuleError> {
    text.parse()
}

/// A shape's index from its name or number.
pub(crate) fn shape(text: &str) -> Result<u8, String> {
    let at = SHAPES.iter().position(|name| *name == text);
    let at = at.or_else(|| text.parse().ok().filter(|at| *at < SHAPES.len()));
    at.and_then(|at| u8::try_from(at).ok())
        .ok_or_else(|| format!("no such shape; one of {}", SHAPES.join(", ")))
}

/// A shape's name, or its index where it has none.
pub(crate) fn shape_name(index: u8) -> String {
    SHAPES.get(usize::from(index)).map_or_else(|| index.to_string(), |name| (*name).to_owned())
}

/// Bytes from `4096`, `64K`, `64M`, `2G`; units of 1024.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match text[digits.len()..].to_ascii_lowercase().trim_end_matches("ib") {
        "" | "b" => 1,
        "k" | "kb" => 1 << 10,
        "m" | "mb" => 1 << 20,
        "g" | "gb" => 1 << 30,
        "t" | "tb" => 1 << 40,
        _ => return Err("unknown unit: write K, M, G or T".to_owned()),
    };
    let number: u64 = digits.parse().map_err(|_| "write a size as 4096, 64M or 2G".to_owned())?;
    number.checked_mul(unit).ok_or_else(|| "larger than can be".to_owned())
}

/// Milliseconds of a duration, as a request carries them.
pub(crate) fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Flags {
    fn spec(&self) -> LaunchSpec {
        let limits = &self.limits;
        let mut spec = LaunchSpec::new(&self.image)
            .command(&self.command)
            .shape(self.shape)
            .cwd(&self.cwd)
            .user(&self.user)
            .tty(self.tty)
            .stdin(self.interactive || self.tty)
            .network(self.network())
            .limits(Limits {
                hard_ms: limits.timeout.map_or(0, ms),
                idle_ms: limits.idle.map_or(0, ms),
                disk_bytes: limits.disk.unwrap_or(0),
                log_bytes: limits.log.unwrap_or(0),
                pids: limits.pids.unwrap_or(0),
                open_files: limits.open_files.unwrap_or(0),
            });
        for (name, value) in &self.env {
            spec = spec.env(name, value);
        }
        for (name, value) in &self.label {
            spec = spec.label(name, value);
        }
        for one in &self.publish {
            spec = spec.publish(one.host_port, one.port);
        }
        if let Some(budget) = self.budget {
            spec = spec.budget(budget);
        }
        if let Some(id) = self.launch_id {
            spec = spec.id(id);
        }
        spec
    }

    fn network(&self) -> Network {
        match self.egress.as_slice() {
            [] => Network::None,
            list => Network::Egress(list.to_vec()),
        }
    }
}

/// `volley run`.
pub(crate) fn run(flags: &Flags) -> Result<ExitCode, Failure> {
    let session = Session::open(&flags.client)?;
    let streams = Streams { stdin: flags.interactive || flags.tty, tty: flags.tty };
    session.block(async {
        let sandbox = session.client().launch(flags.spec()).await?;
        if !flags.publish.is_empty() {
            for open in sandbox.inspect().await?.published {
                eprintln!("volley: {} leads to port {} of the sandbox", open.address, open.port);
            }
        }
        if flags.detach {
            show::print(&sandbox.id().to_string())?;
            return Ok(ExitCode::SUCCESS);
        }
        follow(&sandbox, streams).await
    })
}

/// Shows a sandbox's main process until it ends, over lost connections.
async fn follow(sandbox: &Sandbox, streams: Streams) -> Result<ExitCode, Failure> {
    let mut seen = 0;
    let mut silent = 0;
    loop {
        let before = seen;
        let outcome = match sandbox.attach(seen).await {
            Ok(process) => pump(process, streams, &mut seen).await,
            Err(error) => Err(error.into()),
        };
        let failure = match outcome {
            Ok(exit) => return Ok(attach::exit_code(&exit)),
            Err(failure) => failure,
        };
        silent = if seen == before { silent + 1 } else { 0 };
        let may_pass = matches!(failure.code(), Code::Unreachable | Code::HostUnreachable);
        if silent > REATTACH_MAX || !may_pass {
            eprintln!("volley: the sandbox is {}", sandbox.id());
            return Err(failure);
        }
        tokio::time::sleep(Duration::from_millis(200 << silent.min(4))).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_of_1024() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("64M"), Ok(64 << 20));
        assert_eq!(size("2GiB"), Ok(2 << 30));
        assert!(size("2X").is_err());
        assert!(size("M").is_err());
        assert!(size("99999999999T").is_err());
    }

    #[test]
    fn slips_in_rules_are_told_at_once() {
        assert_eq!(rule("pypi.org:443"), Ok("pypi.org:443".to_owned()));
        assert!(rule("10.0.0.0/40").is_err() && rule("a b").is_err() && rule("x:0").is_err());
        assert_eq!(published("30080:80"), Ok(Publish { port: 80, host_port: 30_080 }));
        assert!(published("x").is_err());
    }

    #[test]
    fn shapes_have_names_and_numbers() {
        assert_eq!(shape("nano"), Ok(0));
        assert_eq!(shape("3"), Ok(3));
        assert!(shape("4").is_err() && shape("huge").is_err());
        assert_eq!(shape_name(1), "small");
    }
}
