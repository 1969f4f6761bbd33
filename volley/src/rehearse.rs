//! `image prepare --run`: one run of a command on this machine, and the boot pack that comes of it.
//!
//! The run itself is hostd's (`hostd::rehearse`); here is what a person sees of it. Left out: preparing, which `image` does.

use std::{io::Write as _, sync::Arc, time::Duration};

use serde::Serialize;
use wire::Code;

use crate::{failure::Failure, role::runtime, show};

/// What a run at prepare recorded.
#[derive(Debug, Serialize)]
pub(crate) struct BootPack {
    entry: String,
    pages_bytes: u64,
    stored_bytes: u64,
    /// Whether the command was stopped when its time was up.
    stopped: bool,
}

impl BootPack {
    /// What was recorded, in a line.
    pub(crate) fn line(&self) -> String {
        let (pages, stored) = (show::bytes(self.pages_bytes), show::bytes(self.stored_bytes));
        let stopped = if self.stopped { "; the command was stopped" } else { "" };
        format!("boot pack {}: {pages} of pages, {stored} stored{stopped}", self.entry)
    }
}

/// Runs a command of an image that was just prepared.
pub(crate) fn rehearse(
    objects: &str,
    tenant: &str,
    id: &str,
    command: &[String],
    at_most: Duration,
) -> Result<BootPack, Failure> {
    let store = wire_net::objects::open(objects)?;
    let dir = tempfile::Builder::new().prefix("volley-run").tempdir();
    let dir = dir.map_err(|error| Failure::io("a directory for the run", &error))?;
    // What it says is for the person who watches; standard output has the summary.
    let said = |bytes: &[u8]| drop(std::io::stderr().write_all(bytes));
    let done = runtime()?.block_on(async {
        let id = hostd_image::resolve(Arc::clone(&store), tenant, id).await?;
        let run = (at_most, Arc::new(said) as hostd::Said);
        hostd::rehearse(store, tenant, id, command, run, dir.path()).await.map_err(Failure::from)
    });
    let done = done.map_err(|failure| match failure.code() {
        Code::Unsupported | Code::Privilege => {
            failure.hint("the image is prepared; its first run on a host records the boot pack")
        }
        _ => failure.hint(
            "the image is prepared and has no boot pack of this command; run it again with --run",
        ),
    })?;
    Ok(BootPack {
        entry: done.entry,
        pages_bytes: done.boot.bytes,
        stored_bytes: done.boot.stored,
        stopped: done.ended.is_none(),
    })
}
