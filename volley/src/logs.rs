//! `logs`: what a sandbox's command wrote, as far as its host keeps it.
//!
//! Output goes to standard output, error output to standard error, as the command wrote them. Left out: the command's
//! exit code; `wait` and `inspect` tell it.

use clap::Args;
use volley_client::SandboxId;

use crate::{
    attach::show_events,
    client::{ClientFlags, Session},
    failure::Failure,
};

/// Flags of `volley logs`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  volley logs sb-...\n  volley logs -f sb-... | grep error")]
pub(crate) struct Flags {
    #[command(flatten)]
    client: ClientFlags,
    /// Go on with what it writes until it ends.
    #[arg(short, long)]
    follow: bool,
    /// The sandbox.
    sandbox: SandboxId,
}

/// `volley logs`.
pub(crate) fn run(flags: &Flags) -> Result<(), Failure> {
    let session = Session::open(&flags.client)?;
    session.block(async {
        let events = session.client().sandbox(flags.sandbox).logs(flags.follow).await?;
        show_events(events, &mut 0).await.map(drop)
    })
}
