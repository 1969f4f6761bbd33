//! `store`: the fleet's database, made and checked.
//!
//! heartbeatd uses what `init` made and never changes a schema itself, so that its account needs no right to.
//! Left out: backups; the database's own tools do them, and hosts' heartbeats fill an empty one again.

use clap::{Args, Subcommand};
use heartbeat::store::StoreError;

use crate::{failure::Failure, role::runtime, show::print};

/// `volley store ...`.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Makes the schema; what is there already stays.
    Init(InitFlags),
    /// Says what the database is, and whether it serves.
    Check(CheckFlags),
}

/// Flags of `volley store init`.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  volley store init scylla://db1:9042,db2:9042/volley --replicas 3"
)]
pub(crate) struct InitFlags {
    /// Copies of each row, for a new keyspace.
    #[arg(long, value_name = "COUNT", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=16))]
    replicas: u32,
    /// embedded:///path or scylla://host:port[,host:port]/keyspace.
    store: String,
}

/// Flags of `volley store check`.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  volley store check embedded:///var/lib/volley/heartbeatd/store"
)]
pub(crate) struct CheckFlags {
    /// embedded:///path or scylla://host:port[,host:port]/keyspace.
    store: String,
}

/// `volley store ...`.
pub(crate) fn run(command: Command) -> Result<(), Failure> {
    let runtime = runtime()?;
    match command {
        Command::Init(flags) => {
            runtime
                .block_on(heartbeat::store::init(&flags.store, flags.replicas))
                .map_err(fault)?;
            print("the schema is there")?;
            // A keyspace with more copies than nodes is made without complaint, and serves nobody.
            let said = runtime.block_on(heartbeat::store::check(&flags.store)).map_err(fault)?;
            print(&said)
        }
        Command::Check(flags) => {
            let said = runtime.block_on(heartbeat::store::check(&flags.store)).map_err(fault)?;
            print(&said)
        }
    }
}

fn fault(error: StoreError) -> Failure {
    let hint = match &error {
        StoreError::Away(why) if !why.contains("Not enough nodes") => {
            "is it up, and is this its address for queries (CQL, usually port 9042)?"
        }
        StoreError::NoSchema(_) => "run `volley store init` with the same URL",
        _ => return wire::Fault::from(error).into(),
    };
    Failure::from(wire::Fault::from(error)).hint(hint)
}
