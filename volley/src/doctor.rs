//! `doctor`: what this machine offers to hostd, and whether an object store can hold a fleet's map.
//!
//! Each check is one line: what, whether, and what follows if not. Nothing is changed on the machine; the proof of an
//! object store writes and removes objects of its own. Left out: judging a whole fleet; `host ls` and metrics do that.

use std::{fs, path::Path};

use clap::{Args, Subcommand};
use hostd_image::{MountBy, MountConfig, MountMode, Mounter, Serving};
use serde::Serialize;
use wire::Code;

use crate::{
    client::{ClientFile, ClientFlags},
    failure::Failure,
    role::runtime,
    show::{self, Form, Output},
};

/// Flags of `volley doctor`.
#[derive(Args, Debug)]
#[command(
    after_help = "\
Examples:
  volley doctor
  volley doctor objects s3://fleet/prod?region=eu-central-1",
    args_conflicts_with_subcommands = true
)]
pub(crate) struct Flags {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Proves an object store's compare-and-swap: racing writers, one winner a round.
    Objects(ObjectsFlags),
}

/// Flags of `volley doctor objects`.
#[derive(Args, Debug)]
struct ObjectsFlags {
    #[command(flatten)]
    client: ClientFlags,
    #[command(flatten)]
    output: Output,
    /// Rounds, of 16 writers each.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    rounds: u16,
    /// Object store to prove, instead of the client file's: dir:///path or s3://bucket/prefix?endpoint=URL&region=R.
    #[arg(value_name = "URL", conflicts_with = "objects")]
    store: Option<String>,
}

/// One check of the machine.
#[derive(Debug, Serialize)]
struct Check {
    what: &'static str,
    verdict: &'static str,
    detail: String,
}

/// `volley doctor`.
pub(crate) fn run(flags: &Flags) -> Result<(), Failure> {
    match &flags.what {
        Some(What::Objects(flags)) => prove(flags),
        None => machine(flags.output),
    }
}

fn machine(output: Output) -> Result<(), Failure> {
    let checks = [
        root(),
        user_namespaces(),
        cgroups(),
        boxes(),
        filesystem("overlay"),
        filesystem("erofs"),
        fuse(),
        tun(),
        images(),
        io_uring(),
    ];
    show::list(output, &checks, ["CHECK", "VERDICT", "DETAIL"], |check| {
        [check.what.to_owned(), check.verdict.to_owned(), check.detail.clone()]
    })
}

fn check(what: &'static str, good: bool, yes: &str, no: &str) -> Check {
    let (verdict, detail) = if good { ("good", yes) } else { ("lacking", no) };
    Check { what, verdict, detail: detail.to_owned() }
}

fn root() -> Check {
    let is_root = rustix::process::geteuid().is_root();
    check("root", is_root, "real sandboxes can be made", "only --boxes none can be run")
}

fn user_namespaces() -> Check {
    let most = read_number("/proc/sys/user/max_user_namespaces");
    let there = Path::new("/proc/self/ns/user").exists() && most != Some(0);
    let yes = most.map_or_else(|| "there".to_owned(), |most| format!("{most} at most"));
    check("user namespaces", there, &yes, "real sandboxes need them")
}

fn cgroups() -> Check {
    let root = Path::new("/sys/fs/cgroup");
    if let Ok(there) = fs::read_to_string(root.join("cgroup.controllers")) {
        let lacking = lacking(&["cpu", "memory", "pids"], |name| {
            there.split_whitespace().any(|controller| controller == name)
        });
        let no = format!("v2 lacks {lacking}: real sandboxes need it");
        return check("cgroups", lacking.is_empty(), "v2", &no);
    }
    let lacking = lacking(&["cpu", "cpuacct", "memory", "pids", "freezer"], |name| {
        root.join(name).join("tasks").exists()
    });
    let no = format!("neither v2 nor v1 with {lacking} at /sys/fs/cgroup: real sandboxes need one");
    check("cgroups", lacking.is_empty(), "v1 controllers (v1 or hybrid)", &no)
}

/// Those of some names that are not there.
fn lacking(names: &[&str], there: impl Fn(&str) -> bool) -> String {
    let names: Vec<_> = names.iter().copied().filter(|name| !there(name)).collect();
    names.join(", ")
}

/// What the first box would stumble over.
fn boxes() -> Check {
    match hostd::probe() {
        Ok(()) => check("mounts", true, "roots of sandboxes can be composed", ""),
        Err(why) => check("mounts", false, "", &why),
    }
}

fn filesystem(name: &'static str) -> Check {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let there = known.lines().any(|line| line.split_whitespace().last() == Some(name));
    let no = "the kernel does not name it; a module may bring it when it is first mounted";
    check(name, there, "the kernel has it", no)
}

fn tun() -> Check {
    let known = fs::read_to_string("/proc/misc").unwrap_or_default();
    let named = known.lines().any(|line| line.split_whitespace().last() == Some("tun"));
    let there = named || Path::new("/dev/net/tun").exists();
    let no = "launches that ask for egress fail here; the module is `tun`";
    check("tun", there, "sandboxes may be given egress", no)
}

fn fuse() -> Check {
    let there = Path::new("/dev/fuse").exists();
    check(
        "fuse",
        there,
        "/dev/fuse is there",
        "images are unpacked instead of being mounted lazily",
    )
}

/// Mounts nothing of anybody's: an empty store in a scratch directory, as hostd would serve it.
fn images() -> Check {
    let tried = || -> Result<MountMode, Failure> {
        let scratch =
            tempfile::tempdir().map_err(|error| Failure::io("scratch directory", &error))?;
        let config = MountConfig {
            state_dir: scratch.path().join("state"),
            cache_dir: scratch.path().join("cache"),
            cache_bytes_max: 1 << 20,
            store: wire_net::objects::open("mem://")?,
            domain: "doctor".to_owned(),
            by: MountBy::Auto,
        };
        runtime()?.block_on(async {
            let mounter = Mounter::start_with(config, Serving::Inside).await?;
            Ok(mounter.mode().clone())
        })
    };
    match tried() {
        Ok(MountMode::Lazy) => check("lazy images", true, "mounted lazily", ""),
        Ok(MountMode::LazyByLoop { why }) => {
            check("lazy images", true, &format!("mounted lazily by loop devices: {why}"), "")
        }
        Ok(MountMode::Unpacked { why }) => {
            check("lazy images", false, "", &format!("unpacked once a host: {why}"))
        }
        Err(failure) => check("lazy images", false, "", &failure.message()),
    }
}

fn io_uring() -> Check {
    let off = read_number("/proc/sys/kernel/io_uring_disabled");
    let there = off.is_some_and(|off| off == 0);
    check("io_uring", there, "the kernel allows it", "hostd falls back to epoll and threads")
}

fn read_number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn prove(flags: &ObjectsFlags) -> Result<(), Failure> {
    let url = match &flags.store {
        Some(url) => url.clone(),
        None => ClientFile::load(&flags.client)?.objects()?.to_owned(),
    };
    let report = runtime()?.block_on(async {
        let store = wire_net::objects::open(&url)?;
        wire_net::objects::prove(&store, usize::from(flags.rounds)).await
    })?;
    match flags.output.output {
        Form::Json => show::json(&report)?,
        Form::Table => {
            let pairs = [
                ("store", url.clone()),
                ("rounds", format!("{} of {} writers each", report.rounds, report.writers)),
                ("one winner", report.good.to_string()),
                ("several winners", report.doubled.to_string()),
                ("no winner", report.unwon.to_string()),
                ("winner overwritten", report.overwritten.to_string()),
                ("outcome unknown", report.unknown.to_string()),
                ("took", format!("{:.2} s", report.took.as_secs_f64())),
            ];
            show::one(flags.output, &report, &pairs)?;
        }
    }
    if report.holds() {
        return Ok(());
    }
    Err(Failure::new(Code::Storage, "compare-and-swap does not hold on this store")
        .hint("two leaders could both publish: choose a store whose conditional PUT holds"))
}
