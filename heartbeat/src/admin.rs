//! Operators' calls, over QUIC: hosts, drain, undrain, ping.
//!
//! Placers may call as well (PROTOCOL 8.3): they pass on what operators ask of them. A list of hosts that does not fit
//! one frame goes on in more `Answer` frames after the first, and an `End` frame closes it.

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
use wire_net::{quic, stream};

use crate::{hub::Drains, shards::Shards, shards::wall_ms};

/// Records of one answer frame: each takes up to about 300 bytes with its message.
const RECORDS: usize = 500;
/// A caller that sends nothing is let go after this.
const PATIENCE: Duration = Duration::from_secs(10);

/// What calls are answered from.
#[derive(Clone)]
pub(crate) struct Admin {
    pub(crate) shards: Shards,
    pub(crate) drains: Arc<Drains>,
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
        let answers = match call {
            Ok(call) => self.answer(call).await,
            Err(error) => {
                vec![Answer::Fault(Fault::new(Code::BadRequest, format!("the call is {error}")))]
            }
        };
        let more = answers.len() > 1;
        for answer in answers {
            if stream::answer(&mut send, &answer).await.is_err() {
                return;
            }
        }
        if more {
            let _ = stream::write_frame(&mut send, Kind::End, &[]).await;
        }
        let _ = send.finish();
    }

    async fn answer(&self, call: Call) -> Vec<Answer> {
        let done = match call {
            Call::Ping => Ok(()),
            Call::Hosts => return self.hosts().await,
            Call::Drain { host, deadline_ms, message } => {
                self.drain(host, deadline_ms, message).await
            }
            Call::Undrain(host) => self.drains.clear(host).await.map_err(Fault::from),
            _ => Err(Fault::new(Code::BadRequest, "an aggregator does not answer this call")),
        };
        vec![done.map_or_else(Answer::Fault, |()| Answer::Done)]
    }

    async fn drain(&self, host: HostId, deadline_ms: u64, message: String) -> Result<(), Fault> {
        if message.len() > NAME_BYTES_MAX {
            let said = format!("the message is longer than {NAME_BYTES_MAX} bytes");
            return Err(Fault::new(Code::BadRequest, said));
        }
        if !self.shards.seen().await.iter().any(|seen| seen.row.host == host) {
            return Err(Fault::new(Code::HostNotFound, format!("no host {host} is known here")));
        }
        Ok(self.drains.set(Drain { host, deadline_ms, since_ms: wall_ms(), message }).await?)
    }

    async fn hosts(&self) -> Vec<Answer> {
        let drains = self.drains.known();
        let message =
            |host| drains.get(&host).map_or_else(String::new, |drain| drain.message.clone());
        let seen = self.shards.seen().await;
        let mut answers: Vec<Answer> = seen
            .chunks(RECORDS)
            .map(|part| {
                let record = |seen: &Seen| record(seen, message(seen.row.host));
                Answer::Hosts(part.iter().map(record).collect())
            })
            .collect();
        if answers.is_empty() {
            answers.push(Answer::Hosts(Vec::new()));
        }
        answers
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
