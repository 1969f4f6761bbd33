//! `watch`: changes of a file, or of what is in a directory, of a sandbox, a line each as they happen.
//!
//! Left out: directories beneath the watched one, as the host leaves them out.

use clap::Args;
use futures::StreamExt as _;
use volley_client::SandboxId;

use crate::{
    client::{ClientFlags, Session},
    failure::Failure,
    show::{self, Form, Output},
};

/// Flags of `volley watch`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  volley watch sb-...:/work
  volley watch -o json sb-...:/work/result.txt")]
pub(crate) struct Flags {
    #[command(flatten)]
    client: ClientFlags,
    #[command(flatten)]
    output: Output,
    /// SANDBOX:/PATH of a file or a directory.
    #[arg(value_parser = inside)]
    place: (SandboxId, String),
}

fn inside(text: &str) -> Result<(SandboxId, String), String> {
    let wanted = "what is watched is named SANDBOX:/PATH";
    let (sandbox, path) = text.split_once(':').ok_or(wanted)?;
    let sandbox = sandbox.parse().map_err(|_| wanted)?;
    if !path.starts_with('/') {
        return Err("paths in a sandbox are absolute: SANDBOX:/PATH".to_owned());
    }
    Ok((sandbox, path.to_owned()))
}

/// `volley watch`.
pub(crate) fn run(flags: &Flags) -> Result<(), Failure> {
    let session = Session::open(&flags.client)?;
    let (id, path) = &flags.place;
    session.block(async {
        let changes = session.client().sandbox(*id).watch(path).await?;
        let mut changes = std::pin::pin!(changes);
        while let Some(change) = changes.next().await {
            let change = change?;
            let name = String::from_utf8_lossy(&change.name);
            let line = if flags.output.output == Form::Json {
                serde_json::json!({ "kind": change.kind.name(), "name": name }).to_string()
            } else {
                // A name is the sandbox's own: what it says to a terminal is not obeyed.
                let plain = name.replace(char::is_control, " ");
                format!("{:<10} {plain}", change.kind.name())
            };
            show::print(&line)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_sandbox_and_an_absolute_path() {
        let id = SandboxId { host: wire::HostId(7), local: 9 };
        assert_eq!(inside(&format!("{id}:/a:b")), Ok((id, "/a:b".to_owned())));
        assert!(inside(&format!("{id}:a")).is_err());
        assert!(inside("/a").is_err());
    }
}
