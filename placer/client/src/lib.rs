//! Volley's client: launches sandboxes and works in them, over QUIC, from any program on tokio.
//!
//! A [`Client`] holds connections to a few placers. [`Client::launch`] gives a [`Sandbox`]; what a sandbox does goes
//! through any placer to its host, since its id says where it is. Outcomes are typed: a launch that was *not started* is
//! another thing than one that is *unknown* ([`LaunchError`]).
//!
//! ```no_run
//! use volley_client::{Client, ConnectOptions, LaunchSpec};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Client::connect(ConnectOptions {
//!     placers: vec!["127.0.0.1:7420".parse()?],
//!     identity: "fleet/tenant-acme".into(),
//!     ..ConnectOptions::default()
//! })
//! .await?;
//! let sandbox = client.launch(LaunchSpec::new("busybox").command(["sleep", "60"])).await?;
//! let output = sandbox.exec(["sh", "-c", "id; exit 7"]).await?.output().await?;
//! assert_eq!(output.exit.code, 7);
//! sandbox.kill().await?;
//! # Ok(())
//! # }
//! ```
//!
//! Left out: HTTP (the front door speaks it), and preparing images.
#![forbid(unsafe_code)]

mod connect;
mod error;
mod files;
mod launch;
mod port;
mod process;
mod sandbox;
mod spec;

pub use connect::{Client, ConnectOptions, Recorded};
pub use error::{CallError, LaunchError};
pub use launch::Launched;
pub use port::PortStream;
pub use process::{Event, Output, Process, Stdin};
pub use sandbox::Sandbox;
pub use spec::{ExecSpec, LaunchSpec, draw_id};
pub use wire::{
    Code, Fault, HostId, LaunchId, SandboxId,
    call::{
        ChangeKind, Exit, ExitWhy, FileChange, FileRecord, HostRecord, SandboxRecord, State, Stats,
    },
    launch::{Limits, Network, Publish, Started, Steps},
    network::{Published, Rule, RuleError},
    records::Listed,
};
