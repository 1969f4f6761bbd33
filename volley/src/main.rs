//! `volley`: the front door. One binary, every role as a subcommand, `volley dev`, the operator's and user's commands.
//!
//! A command group is a file here; what it does beyond words and tables is in the crate of its role. Processes of
//! hostd are this binary too (the spawner of boxes, the holder of lazy images and its worker): they must be told apart
//! before any thread or runtime exists, which is why they come first.

// Doc comments of flags are the help that people read in a terminal, not links.
#![allow(rustdoc::broken_intra_doc_links, rustdoc::invalid_html_tags)]

mod attach;
mod bench;
mod cli;
mod client;
mod config;
mod dev;
mod doctor;
mod failure;
mod files;
mod host;
mod image;
mod init;
mod logs;
mod map;
mod port;
mod rehearse;
mod role;
mod run;
mod sandbox;
mod show;
mod store;
mod terminal;
mod watch;

use std::process::ExitCode;

fn main() -> ExitCode {
    hostd::main_if_asked();
    wire_net::tls::install_provider();
    cli::main()
}
