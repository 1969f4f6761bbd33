//! The harness against a placer whose every answer is known: what it counts is what happened.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use bench::launch::{Carrier, Load, Options, RolePid, run};
use bytes::BytesMut;
use quinn::{Connection, Endpoint};
use wire::{
    CapacityWord, Code, HostId, SandboxId,
    frame::Kind,
    launch::{LaunchHead, LaunchReply, LaunchRequest, Refused, Started, Steps, VisibleAt},
    seal::Role,
};
use wire_net::{
    lane::LaneServer,
    quic, stream,
    tls::{FleetAuthority, Peer},
};

/// Refuses every tenth launch and starts the others; counts those that it saw.
#[derive(Clone, Default)]
struct Placer {
    seen: Arc<AtomicU64>,
}

impl Placer {
    fn decide(&self, payload: &[u8]) -> LaunchReply {
        let (head, request) = LaunchHead::split(payload).unwrap();
        assert!(head.budget_ms > 0);
        let request = LaunchRequest::from_bytes(request).unwrap();
        assert_eq!((request.tenant.as_str(), request.image.as_str()), ("acme", "img"));
        let seen = self.seen.fetch_add(1, Ordering::Relaxed);
        if seen % 10 == 9 {
            return LaunchReply::Refused(Refused { word: CapacityWord(0), code: Code::NoCapacity });
        }
        LaunchReply::Started(Started {
            sandbox: SandboxId { host: HostId(1), local: seen },
            visible_at: VisibleAt::default(),
            word: CapacityWord(0),
            steps: Steps::default(),
        })
    }

    async fn serve(self, connection: Connection) {
        while let Ok((mut send, mut recv)) = connection.accept_bi().await {
            let placer = self.clone();
            tokio::spawn(async move {
                match stream::read_frame(&mut recv, &mut BytesMut::new()).await.unwrap() {
                    Some((Kind::Launch, payload)) => {
                        let _ = stream::reply(&mut send, &placer.decide(&payload)).await;
                    }
                    Some((Kind::Lane, _)) => {
                        let mut lane = LaneServer::new(send, recv);
                        let replies = lane.replies();
                        while let Ok(Some((tag, payload))) = lane.next().await {
                            replies.reply(tag, &placer.decide(&payload));
                        }
                    }
                    other => panic!("{other:?}"),
                }
            });
        }
    }

    async fn listen(self, endpoint: Endpoint) {
        while let Some(incoming) = endpoint.accept().await {
            let placer = self.clone();
            tokio::spawn(async move {
                if let Ok((connection, _)) = quic::accept(incoming).await {
                    placer.serve(connection).await;
                }
            });
        }
    }
}

/// A placer on a thread of its own, and options that lead to it.
fn start() -> (tempfile::TempDir, Placer, Options) {
    let dir = tempfile::tempdir().unwrap();
    let authority = FleetAuthority::unsaved().unwrap();
    let tenant = Peer::Client { tenant: "acme".into() };
    authority.issue(&tenant).unwrap().save(dir.path()).unwrap();
    let identity = authority.issue(&Peer::Placer(1)).unwrap();
    let placer = Placer::default();
    let (tell, told) = mpsc::channel();
    let serving = placer.clone();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
            let endpoint = quic::listen(any, &identity, &[Role::Client]).unwrap();
            tell.send(endpoint.local_addr().unwrap()).unwrap();
            serving.listen(endpoint).await;
        });
    });
    let options = Options {
        placers: vec![told.recv().unwrap()],
        identity: dir.path().to_owned(),
        image: "img".into(),
        load: Load::Closed { in_flight: 20 },
        duration: Duration::from_millis(400),
        warm_up: Duration::ZERO,
        ceiling: Duration::ZERO,
        progress: false,
        ..Options::default()
    };
    (dir, placer, options)
}

#[test]
fn a_burst_is_counted_to_the_last_launch() {
    for carrier in [Carrier::Lane, Carrier::Stream] {
        let (_dir, placer, mut options) = start();
        options = Options {
            launches_max: 1_000,
            threads: 2,
            duration: Duration::from_secs(60),
            carrier,
            pids: vec![RolePid { role: "gone".into(), pid: u32::MAX }],
            ..options
        };
        let report = run(&options).unwrap();
        assert_eq!(placer.seen.load(Ordering::Relaxed), 1_000);
        assert_eq!((report.achieved.started, report.achieved.refused), (900, 100), "{carrier:?}");
        assert_eq!(report.achieved.failed + report.achieved.unknown + report.achieved.unsent, 0);
        assert!(report.seconds < 60.0, "a burst ends with its last launch");
        assert!(report.latency_us.p50 > 0 && report.latency_us.p50 <= report.latency_us.max);
        assert_eq!(report.first_fault.as_deref(), Some("no-capacity: no-capacity"));
        assert_eq!(report.cpu[0].role, "gone");
        assert!(report.cpu[1].us_a_launch > 0.0, "the bench's own time is told");
    }
}

#[test]
fn an_open_loop_offers_what_it_was_told() {
    let (_dir, _placer, options) = start();
    let report = run(&Options { load: Load::Open { rate: 1_000.0 }, ..options }).unwrap();
    let all = report.achieved.started + report.achieved.refused + report.achieved.unsent;
    // Due in the window, give or take the ticks at its edges.
    assert!((390..=410).contains(&all), "{report:?}");
}

#[test]
fn ceilings_are_measured_with_the_bytes_of_the_run() {
    for carrier in [Carrier::Lane, Carrier::Stream] {
        let (_dir, _placer, options) = start();
        let ceiling = Duration::from_millis(200);
        let report = run(&Options { ceiling, carrier, hosts: 3, ..options }).unwrap();
        let ceiling = report.ceiling.unwrap();
        assert!(ceiling.echo_per_second > 0.0 && ceiling.relay_per_second > 0.0);
        assert!(ceiling.request_bytes > 100 && ceiling.reply_bytes > 50);
        assert!(report.to_string().contains("bare quinn relay"));
    }
}

#[test]
fn a_placer_that_is_not_there_is_an_error_and_not_a_figure() {
    let (_dir, _placer, options) = start();
    let nobody = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let placers = vec![nobody.local_addr().unwrap()];
    assert_eq!(run(&Options { placers, ..options }).unwrap_err().code, Code::Unreachable);
}
