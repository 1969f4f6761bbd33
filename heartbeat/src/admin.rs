//! Operators' calls, over QUIC: hosts, drain, undrain, ping; and tenants' lists of sandboxes.
//!
//! Placers may call as well (PROTOCOL 8.3): they pass on what operators, and for lists tenants, ask of them. A list of
//! hosts goes on over as many `Answer` frames as it needs, and an `End` frame closes it (PROTOCOL 7.8).

use std::{sync::Arc, time::Duration};

use bytes::BytesMut;
use heartbeat_core::{Drain, shard::upkeep::Seen};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wire::{
    Code, Fault, HostId,
    call::{Answer, Call, HostRecord},
    frame::Kind,
    limits::NAME_BYTES_MAX,
};
use wire_net::{
    listing::{self, RECORDS},
    quic,
    stream::{self, StreamLost},
};

use crate::{hub::Drains, recorded, shards::Shards, shards::wall_ms, store::Store};

/// A caller that sends nothing is let go after this.
const PATIENCE: Duration = Duration::from_secs(10);

/// What calls are answered from.
#[derive(Clone)]
pub(crate) struct Admin {
    pub(crate) shards: Shards,
    pub(crate) drains: Arc<Drains>,
    pub(crate) store: Arc<dyn Store>,
}

impl Admin {
    /// Serves until `stop`.
    pub(crate) async fn serve(self, endpoint: quinn::Endpoint, stop: CancellationToken) {
        let tasks = TaskTracker::new();
        loop {
            let incoming = tokio::select! {
                () = stop.cancelled() => break,
                incoming = endpoint.accept() => incoming,
            };
            let Some(incoming) = incoming else { break };
            let (admin, stop) = (self.clone(), stop.clone());
            tasks.spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = admin.serve_peer(incoming) => {}
                }
            });
        }
        endpoint.close(0u32.into(), b"stopping");
        tasks.close();
        tasks.wait().await;
        let _ = tokio::time::timeout(Duration::from_millis(200), endpoint.wait_idle()).await;
    }

    async fn serve_peer(self, incoming: quinn::Incoming) {
        let (connection, peer) = match quic::accept(incoming).await {
            Ok(accepted) => accepted,
            Err(fault) => {
                tracing::debug!(%fault, "a caller was turned away");
                return;
            }
        };
        tracing::debug!(%peer, "calls");
        while let Ok((send, recv)) = connection.accept_bi().await {
            let admin = self.clone();
            tokio::spawn(async move { admin.serve_call(send, recv).await });
        }
    }

    async fn serve_call(self, mut send: quinn::SendStream, mut recv: quinn::RecvStream) {
        let mut scratch = BytesMut::new();
        let read = tokio::time::timeout(PATIENCE, stream::read_frame(&mut recv, &mut scratch));
        let call = match read.await {
            Ok(Ok(Some((Kind::Call, bytes)))) => Call::from_bytes(&bytes),
            _ => {
                let _ = recv.stop(stream::BROKEN);
                return;
            }
        };
        let answer = match call {
            Ok(Call::Hosts) => {
                // A caller that has gone needs no answer.
                let _ = self.say_hosts(&mut send).await;
                return;
            }
            Ok(call) => self.answer(call).await,
            Err(error) => {
                Answer::Fault(Fault::new(Code::BadRequest, format!("the call is {error}")))
            }
        };
        let _ = stream::answer(&mut send, &answer).await;
        let _ = send.finish();
    }

    async fn answer(&self, call: Call) -> Answer {
        let done = match call {
            Call::Ping => Ok(()),
            Call::Host(host) => {
                return self
                    .host(host)
                    .await
                    .map_or_else(Answer::Fault, |record| Answer::Hosts(vec![record]));
            }
            Call::ListRecorded { tenant, labels, ended } => {
                let listed = recorded::list(&*self.store, &tenant, &labels, ended).await;
                return listed.unwrap_or_else(Answer::Fault);
            }
            Call::Drain { host, deadline_ms, message } => {
                self.drain(host, deadline_ms, message).await
            }
            Call::Undrain(host) => self.undrain(host).await,
            _ => Err(Fault::new(Code::BadRequest, "an aggregator does not answer this call")),
        };
        done.map_or_else(Answer::Fault, |()| Answer::Done)
    }

    async fn host(&self, host: HostId) -> Result<HostRecord, Fault> {
        let seen = self.shards.seen_of(host).await.ok_or_else(|| {
            Fault::new(Code::HostNotFound, format!("no host {host} is known here"))
        })?;
        let message = self.drains.known().remove(&host).map_or_else(String::new, |d| d.message);
        Ok(record(&seen, message))
    }

    /// Of a host that is known, or of one that left and whose drain did not.
    async fn undrain(&self, host: HostId) -> Result<(), Fault> {
        if !self.drains.known().contains_key(&host) {
            self.host(host).await?;
        }
        Ok(self.drains.clear(host).await?)
    }

    async fn drain(&self, host: HostId, deadline_ms: u64, message: String) -> Result<(), Fault> {
        if message.len() > NAME_BYTES_MAX {
            let said = format!("the message is longer than {NAME_BYTES_MAX} bytes");
            return Err(Fault::new(Code::BadRequest, said));
        }
        self.host(host).await?;
        Ok(self.drains.set(Drain { host, deadline_ms, since_ms: wall_ms(), message }).await?)
    }

    async fn say_hosts(&self, send: &mut quinn::SendStream) -> Result<(), StreamLost> {
        let drains = self.drains.known();
        let message =
            |host| drains.get(&host).map_or_else(String::new, |drain| drain.message.clone());
        let seen = self.shards.seen().await;
        let record = |seen: &Seen| record(seen, message(seen.row.host));
        // No host at all is a list too: one empty frame of it.
        listing::say(send, seen.iter().take(RECORDS).map(record).collect()).await?;
        for part in seen.get(RECORDS..).unwrap_or_default().chunks(RECORDS) {
            listing::say(send, part.iter().map(record).collect()).await?;
        }
        listing::end(send).await
    }
}

fn record(seen: &Seen, message: String) -> HostRecord {
    HostRecord {
        host: seen.row.host,
        addr: seen.row.addr().to_string(),
        state: seen.standing.name().to_owned(),
        word: seen.row.word,
        total: seen.row.total,
        running: seen.row.running,
        age_ms: seen.age_ms,
        message,
    }
}
