//! Named launches: the way of a launch id that may reach several placers.
//!
//! Two placers with different views of capacity would pick different hosts for one id. For a named launch nobody picks: its
//! home hosts follow from the id and the map, and the hosts' own answers, which they repeat, decide how far to go
//! (PROTOCOL 6.11, 6.12). Placers whose maps differ by a few hosts agree on nearly all ids. The price is balance:
//! one choice instead of two.

use std::{rc::Rc, time::Duration};

use placer_core::Outcome;
use wire::{
    Code, Fault, HostId, LaunchId,
    launch::{LaunchReply, Refused},
};

use crate::{
    Map,
    dispatch::{Asked, Ended},
    loader::lower_bound,
    worker::Worker,
};

/// Homes of one launch that are tried.
const HOMES_MAX: u32 = 16;

const HOME_KEY: &[u8; 32] = b"volley home\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// The point whose host at or above is the launch's `index`-th home.
fn point(id: LaunchId, index: u32) -> u64 {
    let mut said = [0; 20];
    said[..16].copy_from_slice(&id.0);
    said[16..].copy_from_slice(&index.to_le_bytes());
    let hash = blake3::keyed_hash(HOME_KEY, &said);
    let mut point = [0; 8];
    point.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(point)
}

/// The launch's home hosts, in order.
fn homes(map: &Map, id: LaunchId) -> Vec<HostId> {
    let mut homes = Vec::new();
    if map.is_empty() {
        return homes;
    }
    for index in 0..4 * HOMES_MAX {
        let at = lower_bound(map, point(id, index));
        let host = map.id(if at == map.len() { 0 } else { at });
        if !homes.contains(&host) {
            homes.push(host);
        }
        if homes.len() == HOMES_MAX as usize {
            break;
        }
    }
    homes
}

impl Worker {
    /// Drives a named launch: home by home, on only after an answer that it does not run there.
    pub(crate) async fn drive_named(self: &Rc<Self>, asked: &Asked<'_>) -> Ended {
        let homes = self.with_map(|map| homes(map, asked.id));
        let budget = Duration::from_millis(u64::from(asked.head.budget_ms));
        let deadline = tokio::time::Instant::now() + budget;
        let mut refused = 0;
        let mut last: Option<Fault> = None;
        for host in &homes {
            match self.ask_until(asked, *host, deadline).await {
                Ok(LaunchReply::Started(started)) => {
                    self.decide(|_, table| table.correct(*host, started.word));
                    return Ended { outcome: Outcome::Started(started), host: Some(*host) };
                }
                Ok(LaunchReply::Refused(Refused { word, .. })) => {
                    self.metrics.refusals.inc();
                    self.decide(|_, table| table.correct(*host, word));
                    refused += 1;
                }
                Ok(LaunchReply::Failed(fault))
                    if placer_core::launch::is_of_the_launch(fault.code) =>
                {
                    return Ended { outcome: Outcome::Failed(fault), host: None };
                }
                Ok(LaunchReply::Failed(fault)) => last = Some(fault),
                Err(true) => {
                    let message =
                        format!("home host {host} was asked and did not answer; it may run there");
                    let fault = Fault::new(Code::Unknown, message);
                    return Ended { outcome: Outcome::Failed(fault), host: Some(*host) };
                }
                Err(false) => {
                    let message = format!(
                        "home host {host} of this named launch cannot be reached; this placer sent nothing"
                    );
                    return Ended::failed(Code::HostUnreachable, message);
                }
            }
        }
        match last {
            _ if homes.is_empty() => {
                Ended::failed(Code::NoHosts, "the fleet has no hosts; nothing was started")
            }
            Some(fault) => Ended { outcome: Outcome::Failed(fault), host: None },
            None => Ended::failed(
                Code::NoCapacity,
                format!("none of its {refused} home hosts has room; nothing was started"),
            ),
        }
    }
}

impl Worker {
    /// Cancels a named launch wherever it may be. Another tenant's is not found, and left as it is.
    pub(crate) async fn cancel_named(
        self: &Rc<Self>,
        id: LaunchId,
        tenant: &str,
    ) -> Result<(), Fault> {
        let homes = self.with_map(|map| homes(map, id));
        let cancels = homes.iter().map(|host| self.cancel(id, tenant, *host));
        let results = futures::future::join_all(cancels).await;
        let not_here = |fault: &Fault| fault.code == Code::SandboxNotFound;
        results
            .into_iter()
            .filter_map(Result::err)
            .find(|fault| !not_here(fault))
            .map_or(Ok(()), Err)
    }
}
