//! `map`: the host map as it lies in the object store.
//!
//! Reads what a placer reads and checks it the same way, so that an operator sees what the fleet would adopt.
//! Left out: writing it. Only the leader's publisher does.

use std::sync::Arc;

use clap::{Args, Subcommand};
use futures::{StreamExt as _, TryStreamExt as _};
use serde::Serialize;
use wire::{
    Code, HostId,
    map::{Head, HostAddr, Page, PageRef, path},
};
use wire_net::objects::{self, object_store::ObjectStore};

use crate::{
    client::{ClientFile, ClientFlags},
    failure::Failure,
    role::runtime,
    show::{self, Output},
};

/// Pages fetched at a time.
const FETCHES: usize = 16;

/// `volley map ...`.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Shows the map's head, or all hosts in it.
    Show(ShowFlags),
    /// Fetches every page and checks it as a placer does.
    Verify(VerifyFlags),
}

/// Flags of `volley map show`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  volley map show\n  volley map show --hosts -o json")]
pub(crate) struct ShowFlags {
    #[command(flatten)]
    client: ClientFlags,
    #[command(flatten)]
    output: Output,
    /// The hosts instead of the head.
    #[arg(long)]
    hosts: bool,
}

/// Flags of `volley map verify`.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  volley map verify --objects s3://fleet/prod?region=eu-central-1"
)]
pub(crate) struct VerifyFlags {
    #[command(flatten)]
    client: ClientFlags,
    #[command(flatten)]
    output: Output,
}

/// A head, for programs.
#[derive(Debug, Serialize)]
struct Row {
    epoch: u64,
    version: u64,
    previous: (u64, u64),
    created: String,
    hosts: u64,
    pages: usize,
    bytes: u64,
}

impl From<&Head> for Row {
    fn from(head: &Head) -> Self {
        let created = i64::try_from(head.created_ms).ok();
        let created = created.and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
        Self {
            epoch: head.version.epoch,
            version: head.version.version,
            previous: (head.previous.epoch, head.previous.version),
            created: created.map_or_else(|| "-".to_owned(), |time| time.to_string()),
            hosts: head.count,
            pages: head.pages.len(),
            bytes: head.pages.iter().map(|page| u64::from(page.bytes)).sum(),
        }
    }
}

impl Row {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        vec![
            ("version", format!("{}.{}", self.epoch, self.version)),
            ("replaced", format!("{}.{}", self.previous.0, self.previous.1)),
            ("created", self.created.clone()),
            ("hosts", show::count(self.hosts)),
            ("pages", show::count(self.pages as u64)),
            ("size", show::bytes(self.bytes)),
        ]
    }
}

/// `volley map ...`.
pub(crate) fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Show(flags) if flags.hosts => hosts(&flags),
        Command::Show(flags) => {
            let (_, head) = fetch(&flags.client, false)?;
            let row = Row::from(&head);
            show::one(flags.output, &row, &row.pairs())
        }
        Command::Verify(flags) => {
            let (hosts, head) = fetch(&flags.client, true)?;
            let row = Row::from(&head);
            let mut pairs = row.pairs();
            let found = hosts.len() as u64;
            pairs.push(("verdict", format!("every page is whole; {} hosts", show::count(found))));
            show::one(flags.output, &row, &pairs)
        }
    }
}

fn hosts(flags: &ShowFlags) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct HostRow {
        host: String,
        addr: String,
    }
    let (hosts, _) = fetch(&flags.client, true)?;
    let rows: Vec<_> = hosts
        .into_iter()
        .map(|(host, addr)| HostRow { host: host.to_string(), addr: addr.to_string() })
        .collect();
    show::list(flags.output, &rows, ["HOST", "ADDRESS"], |row| [row.host.clone(), row.addr.clone()])
}

fn fetch(flags: &ClientFlags, pages: bool) -> Result<(Vec<(HostId, HostAddr)>, Head), Failure> {
    let file = ClientFile::load(flags)?;
    let store = objects::open(file.objects()?)?;
    runtime()?.block_on(async {
        let head = objects::read(&*store, &path::HEAD.into()).await?;
        let Some((bytes, _)) = head else {
            return Err(Failure::new(Code::NoHosts, "no map was published there yet")
                .hint("check --objects; a heartbeatd publishes the map with its first host"));
        };
        let head = Head::from_bytes(&bytes).map_err(|error| damaged("the head", error))?;
        let mut hosts = Vec::new();
        if pages {
            let fetches = futures::stream::iter(head.pages.clone())
                .map(|page| fetch_page(Arc::clone(&store), page))
                .buffered(FETCHES);
            hosts = fetches.try_concat().await?;
        }
        Ok((hosts, head))
    })
}

async fn fetch_page(
    store: Arc<dyn ObjectStore>,
    named: PageRef,
) -> Result<Vec<(HostId, HostAddr)>, Failure> {
    let name = path::page(&named.digest);
    let Some((bytes, _)) = objects::read(&*store, &name.as_str().into()).await? else {
        return Err(Failure::new(
            Code::Storage,
            format!("{name} is named by the head and not there"),
        ));
    };
    let page = Page::parse(&bytes, &named).map_err(|error| damaged(&name, error))?;
    Ok(page.hosts().collect())
}

fn damaged(what: &str, error: impl std::fmt::Display) -> Failure {
    Failure::new(Code::Storage, format!("{what} is damaged ({error}); placers keep their last map"))
        .hint("the next publication replaces it; if it does not, see heartbeatd's log")
}
