//! The roles: one process each, until it is told to stop.
//!
//! Settings come in layers (see `config`): flags, `VOLLEY_<ROLE>_<KEY>`, the file, defaults. Logs go to standard
//! error; standard output carries the one line `ready <role> <address>`. SIGTERM or Ctrl-C stops a role gracefully,
//! a second one at once. Left out: daemonising; a service supervisor does that better.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, ValueEnum};
use serde::{Serialize, de::DeserializeOwned};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;
use wire::{Code, Fault};

use crate::{config::Layers, failure::Failure};

/// Flags of every role.
#[derive(Args, Clone, Debug, Serialize)]
struct Shared {
    /// Settings file (TOML). Flags and VOLLEY_<ROLE>_<KEY> variables win over it.
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// Any setting by its key: `--set publish_ms=500`. May be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    #[serde(skip)]
    set: Vec<String>,
    /// Form of the log on standard error.
    #[arg(long, value_enum, default_value_t, value_name = "FORM")]
    #[serde(skip)]
    log: LogForm,
    /// Stop when the process that started this one ends.
    #[arg(long, hide = true)]
    #[serde(skip)]
    with_parent: bool,
    /// Directory of this role's certificate and keys, as `volley init` makes it.
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<PathBuf>,
    /// Directory that this role keeps over restarts.
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<PathBuf>,
    /// QUIC address to listen on.
    #[arg(long, value_name = "ADDR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    listen: Option<SocketAddr>,
    /// Address of /metrics, /livez and /readyz; none if not given.
    #[arg(long, value_name = "ADDR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    ops: Option<SocketAddr>,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum LogForm {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Flags of `volley hostd`.
#[derive(Args, Clone, Debug, Serialize)]
#[command(
    after_help = "Example:\n  volley hostd --config /etc/volley/hostd.toml --set pool.target=16"
)]
pub(crate) struct HostdFlags {
    #[command(flatten)]
    #[serde(flatten)]
    shared: Shared,
    /// Address that placers reach this host at; default: the one it listens on.
    #[arg(long, value_name = "ADDR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    advertise: Option<SocketAddr>,
    /// Aggregators' UDP addresses. May be repeated.
    #[arg(long = "aggregator", value_name = "ADDR")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    aggregators: Vec<SocketAddr>,
    /// `real` sandboxes, or `none`: admit, count and end launches without running anything.
    #[arg(long, value_name = "KIND")]
    #[serde(skip_serializing_if = "Option::is_none")]
    boxes: Option<String>,
    /// Object store of images: dir:///path or s3://bucket/prefix?endpoint=URL&region=R.
    #[arg(long, value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    objects: Option<String>,
}

/// Flags of `volley heartbeatd`.
#[derive(Args, Clone, Debug, Serialize)]
#[command(after_help = "Example:\n  volley heartbeatd --config /etc/volley/heartbeatd.toml")]
pub(crate) struct HeartbeatdFlags {
    #[command(flatten)]
    #[serde(flatten)]
    shared: Shared,
    /// UDP address that heartbeats come to.
    #[arg(long, value_name = "ADDR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    udp: Option<SocketAddr>,
    /// Directory with the fleet's keys.
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    fleet: Option<PathBuf>,
    /// Database: embedded:///path or scylla://host:port[,host:port]/keyspace.
    #[arg(long, value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    store: Option<String>,
    /// Object store of the host map: dir:///path or s3://bucket/prefix?endpoint=URL&region=R.
    #[arg(long, value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    objects: Option<String>,
    /// Milliseconds between publications of the map.
    #[arg(long, value_name = "MS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    publish_ms: Option<u64>,
}

/// Flags of `volley placerd`.
#[derive(Args, Clone, Debug, Serialize)]
#[command(after_help = "Example:\n  volley placerd --config /etc/volley/placerd.toml --choices 3")]
pub(crate) struct PlacerdFlags {
    #[command(flatten)]
    #[serde(flatten)]
    shared: Shared,
    /// Aggregators' UDP addresses, for the feed and for failure reports. May be repeated.
    #[arg(long = "aggregator", value_name = "ADDR")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    aggregators: Vec<SocketAddr>,
    /// Object store of the host map: dir:///path or s3://bucket/prefix?endpoint=URL&region=R.
    #[arg(long, value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    objects: Option<String>,
    /// Where capacity is looked up: `feed` or `store`.
    #[arg(long, value_name = "MODE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    lookup: Option<String>,
    /// Database for `--lookup store`.
    #[arg(long, value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    store: Option<String>,
    /// Hosts that a pick chooses the best of.
    #[arg(long, value_name = "K")]
    #[serde(skip_serializing_if = "Option::is_none")]
    choices: Option<usize>,
}

/// Runs hostd. It owns its runtime, so that it can be the one on io_uring.
pub(crate) fn hostd(flags: HostdFlags) -> Result<(), Failure> {
    let config = settings("hostd", &flags.shared, &flags)?;
    let stop = CancellationToken::new();
    stop_on_signal(stop.clone())?;
    hostd::run(config, stop).map_err(Failure::from)
}

/// Runs heartbeatd.
pub(crate) fn heartbeatd(flags: HeartbeatdFlags) -> Result<(), Failure> {
    let config = settings("heartbeatd", &flags.shared, &flags)?;
    on_runtime(|stop| heartbeat::run(config, stop))
}

/// Runs placerd.
pub(crate) fn placerd(flags: PlacerdFlags) -> Result<(), Failure> {
    let config = settings("placerd", &flags.shared, &flags)?;
    on_runtime(|stop| placer::run(config, stop))
}

fn settings<T: DeserializeOwned>(
    role: &str,
    shared: &Shared,
    flags: &impl Serialize,
) -> Result<T, Failure> {
    let prefix = format!("VOLLEY_{}_", role.to_ascii_uppercase());
    let file_variable = format!("{prefix}CONFIG");
    let file =
        shared.config.clone().or_else(|| std::env::var_os(&file_variable).map(PathBuf::from));
    log_to_stderr(shared.log);
    if shared.with_parent {
        stop_with_parent()?;
    }
    Layers::over_file(file)
        .environment(&prefix, &[&file_variable])
        .flags(flags)?
        .set(&shared.set)?
        .load()
}

/// Asks the kernel for a SIGTERM when the parent ends, so that `volley dev` leaves no role behind however it ends.
fn stop_with_parent() -> Result<(), Failure> {
    use rustix::process::{Signal, getppid, set_parent_process_death_signal};
    set_parent_process_death_signal(Some(Signal::TERM))
        .map_err(|error| Failure::io("cannot watch the parent", &error.into()))?;
    if getppid().is_none_or(rustix::process::Pid::is_init) {
        return Err(Failure::new(Code::Cancelled, "the parent ended before this role started"));
    }
    Ok(())
}

/// `VOLLEY_LOG` chooses what is logged, as `RUST_LOG` does elsewhere.
fn log_to_stderr(form: LogForm) {
    let filter = EnvFilter::try_from_env("VOLLEY_LOG")
        .unwrap_or_else(|_| EnvFilter::new("info,quinn=warn,quinn_proto=warn,scylla=warn"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match form {
        LogForm::Text => log.with_ansi(false).init(),
        LogForm::Json => log.json().init(),
    }
}

fn on_runtime<F>(role: impl FnOnce(CancellationToken) -> F) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Fault>>,
{
    let runtime = runtime()?;
    let stop = CancellationToken::new();
    runtime.block_on(async {
        watch_signals(stop.clone())?;
        role(stop).await.map_err(Failure::from)
    })
}

/// The runtime of everything but hostd.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::io("cannot start a runtime", &error))
}

/// Cancels `stop` at the first SIGTERM or Ctrl-C, and ends the process at the second.
pub(crate) fn watch_signals(stop: CancellationToken) -> Result<(), Failure> {
    let listen = |kind| signal(kind).map_err(|error| Failure::io("cannot catch signals", &error));
    let (mut term, mut int) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    tokio::spawn(async move {
        for again in [false, true] {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            if again {
                std::process::exit(i32::from(Code::Cancelled.exit()));
            }
            stop.cancel();
        }
    });
    Ok(())
}

/// The same where the role brings a runtime of its own: signals are watched on a small thread.
pub(crate) fn stop_on_signal(stop: CancellationToken) -> Result<(), Failure> {
    let small = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::io("cannot watch signals", &error))?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            small.block_on(async {
                if watch_signals(stop).is_ok() {
                    std::future::pending::<()>().await;
                }
            });
        })
        .map(drop)
        .map_err(|error| Failure::io("cannot watch signals", &error))
}
