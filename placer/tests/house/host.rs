//! A host that follows a script, over real QUIC.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use bytes::BytesMut;
use wire::{
    CapacityWord, Code, Fault, HostId, Incarnation, LaunchId, SandboxId, Seq, Stamp,
    call::{Answer, Call, SandboxRecord, State},
    frame::{Kind, LANE_TAG_BYTES},
    launch::{LaunchHead, LaunchReply, LaunchRequest, Refused, Started, Steps, VisibleAt},
};
use wire_net::{quic, stream};

/// What a scripted host does with a launch that it does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    Start,
    /// Starts it, and answers after so many milliseconds: a host that has work to do.
    StartIn(u64),
    Refuse,
    Fail(Code),
    /// Starts it, and does not answer.
    StartInSilence,
    /// Starts it, and drops the connection.
    StartAndDrop,
    /// Does nothing, and does not answer.
    Hang,
}

type Script = dyn Fn(usize) -> Act + Send + Sync;

/// A host that follows a script. It keeps the protocol: a known id gets the same answer.
pub struct Host {
    pub id: HostId,
    pub addr: SocketAddr,
    endpoint: quinn::Endpoint,
    script: Mutex<Arc<Script>>,
    launches: Mutex<HashMap<LaunchId, (Vec<u8>, LaunchReply)>>,
    tenants: Mutex<HashMap<u64, (LaunchId, String)>>,
    cancelled: Mutex<Vec<LaunchId>>,
    pub started: AtomicUsize,
    pub asked: AtomicUsize,
    beats: AtomicU64,
}

impl Host {
    pub fn new(id: HostId, endpoint: quinn::Endpoint) -> Self {
        Self {
            id,
            addr: endpoint.local_addr().unwrap(),
            endpoint,
            script: Mutex::new(Arc::new(|_| Act::Start)),
            launches: Mutex::default(),
            tenants: Mutex::default(),
            cancelled: Mutex::default(),
            started: AtomicUsize::new(0),
            asked: AtomicUsize::new(0),
            beats: AtomicU64::new(0),
        }
    }

    pub fn script(&self, script: impl Fn(usize) -> Act + Send + Sync + 'static) {
        *self.script.lock().unwrap() = Arc::new(script);
    }

    pub fn started(&self) -> usize {
        self.started.load(Ordering::SeqCst)
    }

    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    pub fn runs(&self, id: LaunchId) -> bool {
        let launches = self.launches.lock().unwrap();
        matches!(launches.get(&id), Some((_, LaunchReply::Started(_))))
    }

    pub fn word(&self, free: u16) -> CapacityWord {
        let seq = self.beats.fetch_add(1, Ordering::SeqCst) + 1;
        CapacityWord::new([free; 4], 0, Stamp::of(Seq(seq)))
    }

    /// Drops all connections, and listens no more.
    pub fn kill(&self) {
        self.endpoint.close(0u32.into(), b"killed");
    }

    /// Milliseconds that the next launch takes.
    fn delay_ms(&self) -> u64 {
        let script = Arc::clone(&self.script.lock().unwrap());
        match script(self.asked.load(Ordering::SeqCst)) {
            Act::StartIn(ms) => ms,
            _ => 0,
        }
    }

    fn decide(&self, payload: &[u8]) -> (Option<LaunchReply>, bool) {
        let (_, bytes) = LaunchHead::split(payload).unwrap();
        let request = LaunchRequest::from_bytes(bytes).unwrap();
        let id = request.launch_id;
        let at = self.asked.fetch_add(1, Ordering::SeqCst);
        let act = (Arc::clone(&self.script.lock().unwrap()))(at);
        let mut launches = self.launches.lock().unwrap();
        if self.cancelled.lock().unwrap().contains(&id) {
            let fault = Fault::new(Code::Cancelled, "it was cancelled");
            return (Some(LaunchReply::Failed(fault)), false);
        }
        if let Some((body, reply)) = launches.get(&id) {
            let known = body == bytes;
            let conflict = Fault::new(Code::Conflict, "another body");
            let reply = if known { reply.clone() } else { LaunchReply::Failed(conflict) };
            let silent = matches!(act, Act::Hang | Act::StartInSilence | Act::StartAndDrop);
            return (Some(reply).filter(|_| !silent), false);
        }
        let refused = LaunchReply::Refused(Refused { word: self.word(0), code: Code::NoCapacity });
        let (reply, answered, dropped) = match act {
            Act::Refuse => (refused, true, false),
            Act::Fail(code) => (LaunchReply::Failed(Fault::new(code, "as scripted")), true, false),
            Act::Start | Act::StartIn(_) => (self.start(&request), true, false),
            Act::StartInSilence => (self.start(&request), false, false),
            Act::StartAndDrop => (self.start(&request), false, true),
            Act::Hang => return (None, false),
        };
        launches.insert(id, (bytes.to_vec(), reply.clone()));
        (Some(reply).filter(|_| answered), dropped)
    }

    fn start(&self, request: &LaunchRequest) -> LaunchReply {
        let local = self.started.fetch_add(1, Ordering::SeqCst) as u64 + 1;
        let owner = (request.launch_id, request.tenant.clone());
        self.tenants.lock().unwrap().insert(local, owner);
        LaunchReply::Started(Started {
            sandbox: SandboxId { host: self.id, local },
            visible_at: VisibleAt {
                incarnation: Incarnation(1),
                seq: Seq(self.beats.load(Ordering::SeqCst) + 1),
            },
            word: self.word(500),
            steps: Steps::default(),
        })
    }

    fn call(&self, tenant: &str, call: &Call) -> Answer {
        match call {
            Call::Cancel { launch_id, .. } => {
                let mut launches = self.launches.lock().unwrap();
                let tenants = self.tenants.lock().unwrap();
                let foreign = |(id, owner): &(LaunchId, String)| id == launch_id && owner != tenant;
                if !tenant.is_empty() && tenants.values().any(foreign) {
                    return Answer::Fault(Fault::new(Code::SandboxNotFound, "no such launch"));
                }
                self.cancelled.lock().unwrap().push(*launch_id);
                if let Some((_, LaunchReply::Started(_))) = launches.remove(launch_id) {
                    self.started.fetch_sub(1, Ordering::SeqCst);
                }
                Answer::Done
            }
            Call::Inspect(sandbox) => match self.record(sandbox.local) {
                Some(record) if tenant.is_empty() || record.tenant == tenant => {
                    Answer::Sandbox(record)
                }
                _ => Answer::Fault(Fault::new(Code::SandboxNotFound, "no such sandbox")),
            },
            Call::List { tenant, .. } => {
                let locals: Vec<u64> = self.tenants.lock().unwrap().keys().copied().collect();
                let records = locals.into_iter().filter_map(|local| self.record(local));
                Answer::Sandboxes(records.filter(|record| record.tenant == *tenant).collect())
            }
            _ => Answer::Fault(Fault::new(Code::Unsupported, "not in this test")),
        }
    }

    fn record(&self, local: u64) -> Option<SandboxRecord> {
        let (launch_id, tenant) = self.tenants.lock().unwrap().get(&local)?.clone();
        Some(SandboxRecord {
            sandbox: SandboxId { host: self.id, local },
            launch_id,
            tenant,
            image: "test".into(),
            shape: 0,
            command: Vec::new(),
            labels: Vec::new(),
            state: State::Running,
            age_ms: 1,
            left_ms: 0,
            network: wire::launch::Network::None,
            published: Vec::new(),
        })
    }
}

pub async fn serve(host: Arc<Host>) {
    while let Some(incoming) = host.endpoint.accept().await {
        let host = Arc::clone(&host);
        tokio::spawn(async move {
            let Ok((connection, _)) = quic::accept(incoming).await else { return };
            while let Ok((send, recv)) = connection.accept_bi().await {
                tokio::spawn(serve_stream(Arc::clone(&host), connection.clone(), send, recv));
            }
        });
    }
}

async fn serve_stream(
    host: Arc<Host>,
    connection: quinn::Connection,
    send: quinn::SendStream,
    mut recv: quinn::RecvStream,
) {
    // Launches of one lane take their time side by side.
    let send = Arc::new(tokio::sync::Mutex::new(send));
    let mut scratch = BytesMut::new();
    let mut tenant = String::new();
    while let Ok(Some((kind, payload))) = stream::read_frame(&mut recv, &mut scratch).await {
        match kind {
            Kind::Lane => {}
            Kind::Launch | Kind::LaneLaunch => {
                let tag = if kind == Kind::Launch { 0 } else { LANE_TAG_BYTES };
                let delay = std::time::Duration::from_millis(host.delay_ms());
                let (reply, drop) = host.decide(&payload[tag..]);
                if drop {
                    connection.close(0u32.into(), b"dropped");
                    return;
                }
                match reply {
                    Some(reply) if kind == Kind::Launch => {
                        return stream::reply(&mut *send.lock().await, &reply).await.unwrap_or(());
                    }
                    Some(reply) => {
                        let send = Arc::clone(&send);
                        let tag = payload[..tag].to_vec();
                        let answer = async move {
                            let parts = [&tag[..], &reply.to_bytes()];
                            let mut send = send.lock().await;
                            let _ = stream::write_parts(&mut send, Kind::LaneReply, &parts).await;
                        };
                        if delay.is_zero() {
                            answer.await;
                        } else {
                            tokio::spawn(async move {
                                tokio::time::sleep(delay).await;
                                answer.await;
                            });
                        }
                    }
                    // The stream stays open: the host is silent, not gone.
                    None if kind == Kind::Launch => {
                        connection.closed().await;
                        return;
                    }
                    None => {}
                }
            }
            Kind::OnBehalf => tenant = String::from_utf8(payload.to_vec()).unwrap(),
            Kind::Call => {
                let answer = host.call(&tenant, &Call::from_bytes(&payload).unwrap());
                let mut send = send.lock().await;
                let _ = stream::answer(&mut send, &answer).await;
                let _ = send.finish();
                return;
            }
            other => panic!("a placer sent {other:?}"),
        }
    }
}
