//! `image`: prepare images for every host, and show those that there are.
//!
//! Preparing reads a source on this machine and writes to the fleet's object store; no daemon takes part. A tenant's images
//! are his trust domain: nothing is shared with, or seen by, another's. Left out: pushing images anywhere else.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use clap::{Args, Subcommand};
use hostd_image::{ImageError, PrepareError, PrepareSpec, RegistryAccess, Rule, Source};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use wire::Code;

use crate::{
    client::{ClientFile, ClientFlags},
    failure::Failure,
    rehearse::{BootPack, rehearse},
    role::runtime,
    show::{self, Output},
};

/// `volley image ...`.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Prepares an image so that every host can start it in the same time.
    Prepare(PrepareFlags),
    /// Lists images.
    Ls(ListFlags),
    /// Shows all that is known of an image.
    Inspect(InspectFlags),
    /// Removes an image's name; its bytes go with the sweeps after.
    Rm(RemoveFlags),
    /// Sweeps the store: images without a name, packs without an image, after a time of grace.
    Gc(SweepFlags),
}

/// Flags of `volley image prepare`.
#[derive(Args, Debug)]
#[command(after_help = "\
Sources: an OCI layout directory, what `docker save` wrote, a root file system as tar or directory, a reference in a
registry. A prefix settles what is meant: oci:, archive:, tar:, dir:, docker://.
Examples:
  volley image prepare ./rootfs --name debian
  volley image prepare archive:python.tar --name python:3.12
  volley image prepare docker://docker.io/library/busybox:latest --name busybox
  volley image prepare ./rootfs --name py --run python3 -c 'import json'
With --run the command is run once here, as root, in a sandbox without a network, and what it reads becomes the image's
boot pack: hosts then bring that in one stream, the first one too. A command that does not end is stopped after --run-for;
one that ends in an error leaves no boot pack.")]
pub(crate) struct PrepareFlags {
    #[command(flatten)]
    client: ClientFlags,
    #[command(flatten)]
    output: Output,
    /// Name of the image; default: the source's own.
    #[arg(short, long, value_name = "NAME")]
    name: Option<String>,
    /// Processor of the hosts, in OCI's words.
    #[arg(long, value_name = "ARCH", default_value = hostd_image::host_arch())]
    arch: String,
    /// User at the registry; the password is in VOLLEY_REGISTRY_PASSWORD.
    #[arg(long, value_name = "USER")]
    registry_user: Option<String>,
    /// Speak plain HTTP to the registry (one on this machine).
    #[arg(long)]
    plain_http: bool,
    /// Time that the command of --run has; what it reads after that is not noted.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    run_for: Duration,
    /// Where the image comes from.
    source: String,
    /// Run a command of the image once and record its boot pack; all words behind it are the command's. Without any: the
    /// image's own command.
    #[arg(long, value_name = "COMMAND", num_args = 0.., allow_hyphen_values = true)]
    run: Option<Vec<String>>,
}

/// Flags of `volley image rm`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  volley image rm python:3.12")]
pub(crate) struct RemoveFlags {
    #[command(flatten)]
    client: ClientFlags,
    /// Its name.
    name: String,
}

/// Flags of `volley image gc`.
#[derive(Args, Debug)]
#[command(after_help = "\
A sweep marks what nothing needs; a later sweep removes what was marked longer ago than the grace.
Example:
  volley image gc --grace 24h")]
pub(crate) struct SweepFlags {
    #[command(flatten)]
    client: ClientFlags,
    #[command(flatten)]
    output: Output,
    /// Time that must pass between mark and removal: longer than any prepare takes.
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = humantime::parse_duration)]
    grace: Duration,
}

/// Flags of `volley image ls`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  volley image ls -o json")]
pub(crate) struct ListFlags {
    #[command(flatten)]
    client: ClientFlags,
    #[command(flatten)]
    output: Output,
}

/// Flags of `volley image inspect`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  volley image inspect shell")]
pub(crate) struct InspectFlags {
    #[command(flatten)]
    client: ClientFlags,
    #[command(flatten)]
    output: Output,
    /// Name or id.
    image: String,
}

/// `volley image ...`.
pub(crate) fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Prepare(flags) => prepare(&flags),
        Command::Ls(flags) => list(&flags),
        Command::Inspect(flags) => inspect(&flags),
        Command::Rm(flags) => remove(&flags),
        Command::Gc(flags) => sweep(&flags),
    }
}

/// An image that was prepared.
#[derive(Debug, Serialize)]
pub(crate) struct Prepared {
    name: String,
    id: String,
    files: u64,
    bytes: u64,
    new_bytes: u64,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    boot_pack: Option<BootPack>,
}

impl Prepared {
    /// What was done, in a line.
    pub(crate) fn line(&self) -> String {
        format!(
            "{}  {}  {} files, {}, {} new, {:.2} s",
            self.name,
            self.id,
            show::count(self.files),
            show::bytes(self.bytes),
            show::bytes(self.new_bytes),
            self.seconds
        ) + &self.boot_pack.as_ref().map(|pack| format!("\n{}", pack.line())).unwrap_or_default()
    }
}

/// Prepares `source` for a tenant.
pub(crate) fn prepare_into(
    objects: &str,
    spec: PrepareSpec,
    access: RegistryAccess,
    quiet: bool,
) -> Result<Prepared, Failure> {
    let runtime = runtime()?;
    let bar = Arc::new(Bar::new(quiet));
    let summary = runtime.block_on(async {
        let store = wire_net::objects::open(objects)?;
        let watched = Arc::clone(&bar);
        let interrupted = tokio::spawn(async move {
            if tokio::signal::ctrl_c().await.is_ok() {
                watched.stop.store(true, Ordering::Relaxed);
            }
        });
        let done = hostd_image::prepare_with(store, spec, access, Arc::clone(&bar) as _).await;
        interrupted.abort();
        done.map_err(Failure::from)
    });
    bar.finish();
    let summary = summary?;
    if summary.dropped > 0 {
        eprintln!(
            "volley: {} device nodes 0:0 were left out: they mean `deleted`",
            summary.dropped
        );
    }
    Ok(Prepared {
        name: summary.name,
        id: summary.id.to_string(),
        files: summary.files,
        bytes: summary.bytes,
        new_bytes: summary.new_bytes,
        seconds: summary.seconds,
        boot_pack: None,
    })
}

fn prepare(flags: &PrepareFlags) -> Result<(), Failure> {
    let file = ClientFile::load(&flags.client)?;
    let source = Source::detect(&flags.source)?;
    let name = flags.name.clone().or_else(|| source.default_name()).ok_or_else(|| {
        Failure::new(Code::Config, "the source gives no name to the image").hint("give --name NAME")
    })?;
    let tenant = tenant(&file)?;
    let spec = PrepareSpec { domain: tenant.clone(), name, source, arch: flags.arch.clone() };
    let password = || std::env::var("VOLLEY_REGISTRY_PASSWORD").unwrap_or_default();
    let access = RegistryAccess {
        login: flags.registry_user.clone().map(|user| (user, password())),
        plain_http: flags.plain_http,
    };
    let json = flags.output.output == show::Form::Json;
    let mut prepared = prepare_into(file.objects()?, spec, access, json)?;
    if let Some(command) = &flags.run {
        let run = rehearse(file.objects()?, &tenant, &prepared.id, command, flags.run_for);
        prepared.boot_pack = Some(run?);
    }
    if json { show::json(&prepared) } else { show::print(&prepared.line()) }
}

fn list(flags: &ListFlags) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct Row {
        name: String,
        id: String,
        files: u64,
        bytes: u64,
        stored_bytes: u64,
    }
    let file = ClientFile::load(&flags.client)?;
    let store = wire_net::objects::open(file.objects()?)?;
    let images = runtime()?.block_on(hostd_image::list(store, &tenant(&file)?))?;
    let rows: Vec<_> = images
        .into_iter()
        .map(|image| Row {
            name: image.name,
            id: image.id.to_string(),
            files: image.totals.files,
            bytes: image.totals.bytes,
            stored_bytes: image.totals.stored,
        })
        .collect();
    show::list(flags.output, &rows, ["NAME", "ID", "FILES", "SIZE", "STORED"], |row| {
        [
            row.name.clone(),
            row.id[..16].to_owned(),
            show::count(row.files),
            show::bytes(row.bytes),
            show::bytes(row.stored_bytes),
        ]
    })
}

fn inspect(flags: &InspectFlags) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct BootPack {
        entry: String,
        stored_bytes: u64,
        age_seconds: u64,
    }
    #[derive(Serialize)]
    struct Row {
        id: String,
        files: u64,
        bytes: u64,
        stored_bytes: u64,
        meta_bytes: u64,
        index_bytes: u64,
        boot_packs: Vec<BootPack>,
        config: hostd_image::ImageConfig,
    }
    let file = ClientFile::load(&flags.client)?;
    let store = wire_net::objects::open(file.objects()?)?;
    let tenant = tenant(&file)?;
    let inspected = hostd_image::inspect(store, &tenant, &flags.image);
    let image = runtime()?.block_on(inspected)?;
    let (config, totals) = (image.config, image.totals);
    let boot_pack = |pack: hostd_image::BootRow| BootPack {
        entry: pack.entry,
        stored_bytes: pack.stored,
        age_seconds: pack.written.elapsed().map_or(0, |age| age.as_secs()),
    };
    let boot_packs: Vec<_> = image.boot_packs.into_iter().map(boot_pack).collect();
    let told = |pack: &BootPack| {
        let age = humantime::format_duration(Duration::from_secs(pack.age_seconds));
        format!("{} ({}, {age} old)", pack.entry, show::bytes(pack.stored_bytes))
    };
    let boot_lines: Vec<_> = boot_packs.iter().map(told).collect();
    let pairs = [
        ("id", image.id.to_string()),
        ("files", show::count(totals.files)),
        ("size", show::bytes(totals.bytes)),
        ("stored", show::bytes(totals.stored)),
        ("metadata", show::bytes(image.meta_bytes)),
        ("index", show::bytes(image.index_bytes)),
        ("boot packs", show::or_dash(&boot_lines.join(", "))),
        ("system", format!("{}/{}", config.os, config.arch)),
        ("entrypoint", show::or_dash(&config.entrypoint.join(" "))),
        ("command", show::or_dash(&config.cmd.join(" "))),
        ("user", show::or_dash(&config.user)),
        ("directory", show::or_dash(&config.cwd)),
        ("environment", show::or_dash(&config.env.join(" "))),
    ];
    let row = Row {
        id: image.id.to_string(),
        files: totals.files,
        bytes: totals.bytes,
        stored_bytes: totals.stored,
        meta_bytes: image.meta_bytes,
        index_bytes: image.index_bytes,
        boot_packs,
        config,
    };
    show::one(flags.output, &row, &pairs)
}

fn remove(flags: &RemoveFlags) -> Result<(), Failure> {
    let file = ClientFile::load(&flags.client)?;
    let store = wire_net::objects::open(file.objects()?)?;
    let tenant = tenant(&file)?;
    runtime()?.block_on(hostd_image::remove_name(store, &tenant, &flags.name))?;
    show::print(&flags.name)
}

fn sweep(flags: &SweepFlags) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct Row {
        kept: u64,
        waiting: u64,
        removed: u64,
        removed_bytes: u64,
    }
    let file = ClientFile::load(&flags.client)?;
    let store = wire_net::objects::open(file.objects()?)?;
    let swept = runtime()?.block_on(hostd_image::gc(store, flags.grace))?;
    let row = Row {
        kept: swept.kept,
        waiting: swept.waiting,
        removed: swept.removed,
        removed_bytes: swept.removed_bytes,
    };
    let pairs = [
        ("needed", show::count(row.kept)),
        ("marked, not removed yet", show::count(row.waiting)),
        ("removed", format!("{}, {}", show::count(row.removed), show::bytes(row.removed_bytes))),
    ];
    show::one(flags.output, &row, &pairs)
}

fn tenant(file: &ClientFile) -> Result<String, Failure> {
    file.tenant.clone().ok_or_else(|| {
        Failure::new(Code::Config, "it is not said whose image it is")
            .hint("give --tenant TENANT, or a client file that names one")
    })
}

impl From<PrepareError> for Failure {
    fn from(error: PrepareError) -> Self {
        let code = match &error {
            PrepareError::Refused(refusal) if refusal.rule == Rule::Architecture => {
                Code::ImageArchitecture
            }
            PrepareError::Refused(_) => Code::ImageBroken,
            PrepareError::NoSource(_) => Code::NotFound,
            PrepareError::Name(_) => Code::BadRequest,
            PrepareError::Store(_) => Code::Storage,
            PrepareError::Stopped => Code::Cancelled,
            PrepareError::Registry(_) => Code::Unreachable,
            _ => Code::Internal,
        };
        let failure = Self::new(code, error.to_string());
        match code {
            Code::ImageBroken => {
                failure.hint("build the image anew; the rule's name says what is wrong")
            }
            Code::NotFound => {
                failure.hint("check the path; a prefix says what it is: oci:, archive:, tar:, dir:")
            }
            Code::Internal => {
                failure.hint("check that the source can be read whole, then try again")
            }
            Code::Cancelled => failure.hint("prepare it again when you like"),
            Code::Unreachable => failure
                .hint("check the reference and the registry; --registry-user for private images"),
            _ => failure,
        }
    }
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        let code = match &error {
            error if error.is_not_found() => Code::ImageNotFound,
            ImageError::Name(_) => Code::BadRequest,
            ImageError::Damaged(_) => Code::ImageBroken,
            ImageError::Store(_) => Code::Storage,
            _ => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}

/// A prepare's progress on the terminal.
struct Bar {
    bar: ProgressBar,
    stop: AtomicBool,
}

impl Bar {
    fn new(quiet: bool) -> Self {
        let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
        Self { bar, stop: AtomicBool::new(false) }
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl hostd_image::Progress for Bar {
    fn begin(&self, what: &str, bytes: Option<u64>) {
        let template = match bytes {
            Some(_) => "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
            None => "{spinner} {msg} {bytes}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style.progress_chars("=> "));
        }
        self.bar.set_position(0);
        match bytes {
            Some(bytes) => self.bar.set_length(bytes),
            None => self.bar.unset_length(),
        }
        self.bar.set_message(what.to_owned());
    }

    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}
