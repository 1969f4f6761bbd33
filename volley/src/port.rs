//! `port`: a local TCP port that leads to a port in a sandbox; or where a sandbox's published ports are.
//!
//! Each connection is a stream through a placer to the sandbox's host. Left out: any port that is open to others than
//! this machine unless it is asked for.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use clap::Args;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::sync::CancellationToken;
use volley_client::{Sandbox, SandboxId};

use crate::{
    client::{ClientFlags, Session},
    failure::Failure,
    role::watch_signals,
    show,
};

/// Connections at a time.
const CONNECTIONS_MAX: usize = 1_024;

/// Flags of `volley port`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  volley port sb-... 8080            127.0.0.1:8080 leads to port 8080 of the sandbox
  volley port sb-... 9000:8080       127.0.0.1:9000 leads to it
  volley port sb-...                 what `run --publish` opened on the host's own address")]
pub(crate) struct Flags {
    #[command(flatten)]
    client: ClientFlags,
    /// Local address to listen on.
    #[arg(long, value_name = "IP", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    bind: IpAddr,
    /// The sandbox.
    sandbox: SandboxId,
    /// Port of the sandbox, or LOCAL:PORT; LOCAL 0 takes any that is free. Without it, published ports are listed.
    #[arg(value_name = "[LOCAL:]PORT", value_parser = ports)]
    ports: Option<(u16, u16)>,
}

fn ports(text: &str) -> Result<(u16, u16), String> {
    let (local, inside) = text.split_once(':').unwrap_or((text, text));
    let number = |text: &str| text.parse().map_err(|_| format!("{text}: no port"));
    match (number(local)?, number(inside)?) {
        (_, 0) => Err("a sandbox has no port 0".to_owned()),
        ports => Ok(ports),
    }
}

/// `volley port`.
pub(crate) fn run(flags: &Flags) -> Result<(), Failure> {
    let session = Session::open(&flags.client)?;
    session.block(async {
        let sandbox = session.client().sandbox(flags.sandbox);
        // A sandbox that is not there is told now, not with the first connection.
        let record = sandbox.inspect().await?;
        let Some((local, inside)) = flags.ports else {
            if record.published.is_empty() {
                eprintln!(
                    "volley: no port of it is published (`run --publish`); `volley port {} PORT` \
                     leads to one from here",
                    flags.sandbox
                );
            }
            for open in &record.published {
                show::print(&format!("{} leads to port {}", open.address, open.port))?;
            }
            return Ok(());
        };
        let local = SocketAddr::new(flags.bind, local);
        let fail = |error| Failure::io(format!("cannot listen on {local}"), &error);
        let listener = TcpListener::bind(local).await.map_err(fail)?;
        let at = listener.local_addr().map_err(fail)?;
        show::print(&format!("{at} leads to port {inside} of {}; Ctrl-C ends it", flags.sandbox))?;
        let stop = CancellationToken::new();
        watch_signals(stop.clone())?;
        tokio::select! {
            () = stop.cancelled() => Ok(()),
            failure = serve(&listener, &sandbox, inside) => Err(failure),
        }
    })
}

async fn serve(listener: &TcpListener, sandbox: &Sandbox, inside: u16) -> Failure {
    let free = std::sync::Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = std::sync::Arc::clone(&free).acquire_owned().await else {
            return Failure::new(wire::Code::Internal, "the count of connections was closed");
        };
        let socket = match listener.accept().await {
            Ok((socket, _)) => socket,
            Err(error) => return Failure::io("cannot accept", &error),
        };
        let sandbox = sandbox.clone();
        tokio::spawn(async move {
            if let Err(failure) = pass(socket, &sandbox, inside).await {
                // The next connection may find what this one did not.
                eprintln!("volley: a connection failed: {}", failure.message());
            }
            drop(place);
        });
    }
}

async fn pass(mut socket: TcpStream, sandbox: &Sandbox, inside: u16) -> Result<(), Failure> {
    let mut remote = sandbox.forward_port(inside).await?.into_io();
    // A connection that breaks is the affair of its two ends.
    let _ = copy_bidirectional(&mut socket, &mut remote).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_one_or_two_numbers() {
        assert_eq!(ports("80"), Ok((80, 80)));
        assert_eq!(ports("0:80"), Ok((0, 80)));
        assert!(ports("80:0").is_err() && ports("x").is_err() && ports("70000").is_err());
    }
}
