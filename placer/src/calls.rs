//! Calls besides launches: passed on to the host that must answer, or to all, or to an aggregator.
//!
//! A sandbox's id says where it is, so that no placer keeps a table of sandboxes. The host is told in whose name the call is
//! made and answers for that tenant's sandboxes only (PROTOCOL 7.3). A list is answered
//! by an aggregator, from records; one that asks for more asks every host, with bounded concurrency, in fleets of up to
//! `list_hosts_max` hosts (DESIGN.md).

use std::{rc::Rc, time::Duration};

use bytes::Bytes;
use futures::StreamExt;
use quinn::{RecvStream, SendStream};
use wire::{
    Code, Fault, HostId, LaunchId,
    call::{Answer, Call, SandboxRecord},
    frame::Kind,
    limits::FRAME_BYTES_MAX,
    seal::Role,
};
use wire_net::{
    quic,
    stream::{self, StreamLost},
    tls::Peer,
};

use crate::{known::Found, pool::Held, worker::Worker};

/// Longest wait for a connection to the host of a call.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longest wait for one host's list.
const ANSWER: Duration = Duration::from_secs(5);
/// Longest wait for an aggregator's answer: a drain is answered once it is in force.
const ADMIN: Duration = Duration::from_secs(20);
/// Hosts asked at once by one list.
const LIST_AT_ONCE: usize = 64;

impl Worker {
    /// Serves a stream that opened with a call.
    pub(crate) async fn call(
        self: &Rc<Self>,
        bytes: &Bytes,
        peer: &Peer,
        mut send: SendStream,
        recv: RecvStream,
    ) -> Result<(), StreamLost> {
        let call = Call::from_bytes(bytes)?;
        let answer = if let Call::Cancel { launch_id, host: HostId(0) } = call {
            self.cancel_anywhere(launch_id, peer).await.unwrap_or_else(Answer::Fault)
        } else if let Some(host) = call.host() {
            match self.pass_on(host, bytes, peer).await {
                Ok((to_host, from_host, held)) => {
                    self.metrics.calls.inc();
                    stream::splice((send, recv), (to_host, from_host)).await;
                    drop(held);
                    return Ok(());
                }
                Err(fault) => Answer::Fault(fault),
            }
        } else if call == Call::Hosts && *peer == Peer::Operator {
            self.metrics.calls.inc();
            return self.list_hosts(&mut send).await;
        } else {
            self.answer(&call, peer).await.unwrap_or_else(Answer::Fault)
        };
        stream::answer(&mut send, &answer).await?;
        let _ = send.finish();
        Ok(())
    }

    /// Cancels a launch of which the caller does not know the host (PROTOCOL 6.14).
    async fn cancel_anywhere(self: &Rc<Self>, id: LaunchId, peer: &Peer) -> Result<Answer, Fault> {
        let tenant = peer.tenant().unwrap_or_default();
        let mut found = self.known.find(id, tenant);
        if let Found::Joined(reply) = found {
            // Its outcome comes first: what is under way cannot be called back.
            let _ = reply.await;
            found = self.known.find(id, tenant);
        }
        let (known, cancelled) = match found {
            Found::Cancelled => (true, Ok(())),
            Found::At(host) => (true, self.cancel(id, tenant, host).await),
            Found::Joined(_) | Found::Nothing => (false, self.cancel_named(id, tenant).await),
        };
        if let Err(fault) = cancelled {
            let message = format!("launch {id} may run yet, the cancel was not answered: {fault}");
            return Err(Fault::new(Code::Unknown, message));
        }
        if !known {
            let message = format!(
                "this placer does not know launch {id}; if it was named, it is cancelled on its home hosts"
            );
            return Err(Fault::new(Code::NotFound, message));
        }
        self.known.cancelled(id);
        Ok(Answer::Done)
    }

    /// Opens a stream to the host and sends the call there, in the peer's name.
    async fn pass_on(
        self: &Rc<Self>,
        host: HostId,
        call: &Bytes,
        peer: &Peer,
    ) -> Result<(SendStream, RecvStream, Held), Fault> {
        let unreachable = |why: &dyn std::fmt::Display| {
            Fault::new(Code::HostUnreachable, format!("host {host} was not reached: {why}"))
        };
        let addr = self.addr_of(host).ok_or_else(|| {
            let message = format!("host {host} is not in the map, so there is no such sandbox");
            Fault::new(Code::SandboxNotFound, message)
        })?;
        let got = self.pool.get(host, addr.into(), PATIENCE).await;
        let link = got.map_err(|fault| unreachable(&fault))?;
        let held = link.hold();
        let (mut to_host, from_host) =
            link.connection.open_bi().await.map_err(|error| unreachable(&error))?;
        let asked = async {
            let tenant = peer.tenant().unwrap_or_default();
            stream::write_frame(&mut to_host, Kind::OnBehalf, tenant.as_bytes()).await?;
            stream::write_frame(&mut to_host, Kind::Call, call).await
        };
        asked.await.map_err(|lost| unreachable(&lost))?;
        Ok((to_host, from_host, held))
    }

    /// Answers a call that is no host's.
    async fn answer(self: &Rc<Self>, call: &Call, peer: &Peer) -> Result<Answer, Fault> {
        match call {
            Call::Ping => Ok(Answer::Done),
            Call::List { tenant, .. } => {
                if peer.tenant().is_some_and(|own| own != tenant) {
                    let message = format!("{peer} may list its own sandboxes only");
                    return Err(Fault::new(Code::Forbidden, message));
                }
                self.list(call, tenant).await
            }
            Call::ListRecorded { tenant, .. } => {
                // PROTOCOL 9.5.
                if peer.tenant().is_some_and(|own| own != tenant) {
                    let message = format!("{peer} may list its own sandboxes only");
                    return Err(Fault::new(Code::Forbidden, message));
                }
                self.ask_aggregators(call).await
            }
            Call::Hosts | Call::Host(_) | Call::Drain { .. } | Call::Undrain(_) => {
                if *peer != Peer::Operator {
                    let message = format!("{peer} is no operator; nothing was done");
                    return Err(Fault::new(Code::Forbidden, message));
                }
                if let Call::Host(_) = call {
                    return self.youngest(call).await;
                }
                self.ask_aggregators(call).await
            }
            _ => Err(Fault::new(Code::Internal, "a host's call was not passed on")),
        }
    }

    /// Asks all hosts for a tenant's sandboxes; hosts that do not answer are left out, unless all are.
    async fn list(self: &Rc<Self>, call: &Call, tenant: &str) -> Result<Answer, Fault> {
        let map = self.map();
        let hosts_max = self.shared.config.list_hosts_max;
        if map.len() > hosts_max {
            let message =
                format!("a list would ask {} hosts; this placer asks up to {hosts_max}", map.len());
            return Err(Fault::new(Code::Unsupported, message));
        }
        let hosts: Vec<HostId> = map.ids().collect();
        let mut answers = futures::stream::iter(hosts)
            .map(|host| self.list_of(host, call, tenant))
            .buffer_unordered(LIST_AT_ONCE);
        let mut records = Vec::new();
        let mut silent = None;
        let mut answered = map.is_empty();
        while let Some(answer) = answers.next().await {
            match answer {
                Ok(some) => {
                    answered = true;
                    records.extend(
                        some.into_iter()
                            .filter(|record| tenant.is_empty() || record.tenant == tenant),
                    );
                }
                Err(fault) => silent = Some(fault),
            }
        }
        match silent {
            Some(fault) if !answered => Err(fault),
            Some(fault) => {
                tracing::warn!(%fault, "a list is not complete");
                Ok(fitting(records))
            }
            None => Ok(fitting(records)),
        }
    }

    async fn list_of(
        self: &Rc<Self>,
        host: HostId,
        call: &Call,
        tenant: &str,
    ) -> Result<Vec<SandboxRecord>, Fault> {
        let gone = || Fault::new(Code::HostUnreachable, format!("host {host} did not answer"));
        let addr = self.addr_of(host).ok_or_else(gone)?;
        let asked = async {
            let link = self.pool.get(host, addr.into(), PATIENCE).await?;
            let _held = link.hold();
            stream::call_on_behalf(&link.connection, tenant, call).await
        };
        match tokio::time::timeout(ANSWER, asked).await.map_err(|_| gone())?? {
            Answer::Sandboxes(records) => Ok(records),
            _ => Err(gone()),
        }
    }

    /// Passes a call on to the first aggregator that answers.
    async fn ask_aggregators(self: &Rc<Self>, call: &Call) -> Result<Answer, Fault> {
        let mut last = Fault::new(Code::Unsupported, "this placer knows no aggregator's `admin`");
        for addr in &self.shared.config.admin {
            let asked = async {
                let endpoint = self.pool.endpoint(*addr)?;
                let connection = quic::connect(&endpoint, *addr, Role::Aggregator).await?;
                let answer = stream::call(&connection, call).await;
                connection.close(0u32.into(), b"done");
                answer
            };
            match tokio::time::timeout(ADMIN, asked).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(fault)) if fault.code != Code::Unreachable => return Err(fault),
                Ok(Err(fault)) => last = fault,
                Err(_) => {
                    let message = format!("the aggregator at {addr} did not answer");
                    last = Fault::new(Code::Unreachable, message);
                }
            }
        }
        Err(last)
    }
}

/// The newest records that fit into one frame.
fn fitting(mut records: Vec<SandboxRecord>) -> Answer {
    records.sort_unstable_by_key(|record| record.age_ms);
    loop {
        let count = records.len();
        let answer = Answer::Sandboxes(records);
        if answer.to_bytes().len() <= FRAME_BYTES_MAX {
            return answer;
        }
        let Answer::Sandboxes(too_many) = answer else { unreachable!("made above") };
        records = too_many;
        records.truncate(count / 2);
    }
}
