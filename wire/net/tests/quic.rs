//! Two ends over the loopback: who may meet whom, and what goes over a connection.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, SystemTime},
};

use bytes::BytesMut;
use wire::{
    CapacityWord, Code, Fault, HostId, LaunchId,
    call::{Answer, Call},
    frame::Kind,
    launch::{LaunchHead, LaunchReply, Refused},
    seal::Role,
};
use wire_net::{
    quic, stream,
    tls::{FleetAuthority, Identity, Peer, Validity},
};

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const HOST: Peer = Peer::Host(HostId(7));
const HOUR: Duration = Duration::from_secs(3_600);

struct Fleet {
    _dir: tempfile::TempDir,
    authority: FleetAuthority,
}

impl Fleet {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = FleetAuthority::create(dir.path()).unwrap();
        Self { _dir: dir, authority }
    }

    fn issue(&self, peer: &Peer) -> Identity {
        self.authority.issue(peer).unwrap()
    }
}

/// A host that answers each call with `Done` and each launch with a refusal.
async fn serve(identity: &Identity) -> SocketAddr {
    let endpoint = quic::listen(ANY, identity, &[Role::Placer, Role::Operator]).unwrap();
    let addr = endpoint.local_addr().unwrap();
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            tokio::spawn(async move {
                let Ok((connection, _)) = quic::accept(incoming).await else { return };
                while let Ok((mut send, mut recv)) = connection.accept_bi().await {
                    let mut scratch = BytesMut::new();
                    match stream::read_frame(&mut recv, &mut scratch).await {
                        Ok(Some((Kind::Call, bytes))) => {
                            Call::from_bytes(&bytes).unwrap();
                            stream::answer(&mut send, &Answer::Done).await.unwrap();
                            let _ = send.finish();
                        }
                        Ok(Some((Kind::Launch, bytes))) => {
                            let (head, request) = LaunchHead::split(&bytes).unwrap();
                            assert_eq!((head.budget_ms, request), (250, &b"request"[..]));
                            stream::reply(&mut send, &refusal()).await.unwrap();
                        }
                        other => panic!("{other:?}"),
                    }
                }
            });
        }
    });
    addr
}

fn refusal() -> LaunchReply {
    LaunchReply::Refused(Refused { word: CapacityWord(3), code: Code::NoCapacity })
}

/// Dials, and asks for something: a refused client certificate shows at the first stream only.
async fn ask(us: &Identity, addr: SocketAddr, them: &Peer) -> Result<Answer, Fault> {
    let endpoint = quic::dialer(ANY, us).unwrap();
    let connection = quic::connect(&endpoint, addr, them).await?;
    stream::call(&connection, &Call::Ping).await
}

#[tokio::test]
async fn a_placer_calls_and_launches_on_a_host() {
    let fleet = Fleet::new();
    let addr = serve(&fleet.issue(&HOST)).await;
    let placer = fleet.issue(&Peer::Placer(1));
    assert_eq!(ask(&placer, addr, &HOST).await, Ok(Answer::Done));

    let endpoint = quic::dialer(ANY, &placer).unwrap();
    let connection = quic::connect(&endpoint, addr, Role::Host).await.unwrap();
    let head = LaunchHead { budget_ms: 250, named: false };
    let reply = stream::launch(&connection, head, b"request").await.unwrap();
    assert_eq!(reply, refusal());
    // A cancel whose answer is lost may have been done.
    connection.close(0u32.into(), b"");
    let cancel = Call::Cancel { launch_id: LaunchId::default(), host: HostId(7) };
    let lost = stream::call(&connection, &cancel).await.unwrap_err();
    assert_eq!(lost.code, Code::Unreachable, "nothing was sent: {lost}");
}

/// The second dial resumes the session by its ticket; the listener still knows who it is.
#[tokio::test]
async fn a_resumed_session_has_the_same_peer() {
    let fleet = Fleet::new();
    let endpoint = quic::listen(ANY, &fleet.issue(&HOST), &[Role::Placer]).unwrap();
    let addr = endpoint.local_addr().unwrap();
    let dialer = quic::dialer(ANY, &fleet.issue(&Peer::Placer(9))).unwrap();
    for _ in 0..3 {
        let accepting = async { quic::accept(endpoint.accept().await.unwrap()).await.unwrap() };
        let (connection, (accepted, peer)) =
            tokio::join!(quic::connect(&dialer, addr, &HOST), accepting);
        let connection = connection.unwrap();
        assert_eq!(peer, Peer::Placer(9));
        // A round trip brings the ticket.
        let answering = async {
            let (mut send, mut recv) = accepted.accept_bi().await.unwrap();
            stream::expect_frame(&mut recv, Kind::Call).await.unwrap();
            stream::answer(&mut send, &Answer::Done).await.unwrap();
        };
        let (answer, ()) = tokio::join!(stream::call(&connection, &Call::Ping), answering);
        assert_eq!(answer, Ok(Answer::Done));
    }
}

#[tokio::test]
async fn splicing_passes_bytes_ends_and_resets() {
    let fleet = Fleet::new();
    let endpoint = quic::listen(ANY, &fleet.issue(&HOST), &[Role::Placer]).unwrap();
    let addr = endpoint.local_addr().unwrap();
    let dialer = quic::dialer(ANY, &fleet.issue(&Peer::Placer(9))).unwrap();
    let accepting = async { quic::accept(endpoint.accept().await.unwrap()).await.unwrap().0 };
    let (near, far) = tokio::join!(quic::connect(&dialer, addr, &HOST), accepting);
    let near = near.unwrap();
    // What the near end writes on its first stream comes out of its second, by way of the far end.
    let splicing = tokio::spawn(async move {
        let (one, two) = (far.accept_bi().await.unwrap(), far.accept_bi().await.unwrap());
        let passed = stream::splice(one, two).await;
        (passed, far)
    });
    let (mut send, mut recv) = near.open_bi().await.unwrap();
    send.write_all(b"x").await.unwrap();
    let (mut back_send, mut back_recv) = near.open_bi().await.unwrap();
    back_send.write_all(b"y").await.unwrap();
    let bytes = vec![7; 300_000];
    let writing = async {
        send.write_all(&bytes).await.unwrap();
        send.finish().unwrap();
    };
    let (got, ()) = tokio::join!(back_recv.read_to_end(400_000), writing);
    assert_eq!(got.unwrap().len(), 300_001);
    back_send.reset(5u32.into()).unwrap();
    let ended = recv.read_to_end(10).await.unwrap_err();
    let reset = quinn::ReadError::Reset(5u32.into());
    assert!(matches!(ended, quinn::ReadToEndError::Read(error) if error == reset));
    let ((there, back), _far) = splicing.await.unwrap();
    assert_eq!(there, 300_001);
    assert!(back <= 1);
}

#[tokio::test]
async fn another_fleet_is_refused_both_ways() {
    let (ours, theirs) = (Fleet::new(), Fleet::new());
    let addr = serve(&ours.issue(&HOST)).await;
    let fault = ask(&theirs.issue(&Peer::Placer(1)), addr, &HOST).await.unwrap_err();
    assert_eq!(fault.code, Code::Unauthenticated, "{fault}");
    assert!(fault.message.contains("another fleet"), "{fault}");
}

#[tokio::test]
async fn a_role_that_is_not_served_is_forbidden() {
    let fleet = Fleet::new();
    let addr = serve(&fleet.issue(&HOST)).await;
    let tenant = Peer::Client { tenant: "acme".into() };
    for stranger in [tenant, Peer::Host(HostId(8)), Peer::Aggregator(1)] {
        let fault = ask(&fleet.issue(&stranger), addr, &HOST).await.unwrap_err();
        assert_eq!(fault.code, Code::Forbidden, "{stranger}: {fault}");
    }
}

#[tokio::test]
async fn another_host_than_the_dialled_one_is_refused() {
    let fleet = Fleet::new();
    let addr = serve(&fleet.issue(&HOST)).await;
    let placer = fleet.issue(&Peer::Placer(1));
    let fault = ask(&placer, addr, &Peer::Host(HostId(8))).await.unwrap_err();
    assert_eq!(fault.code, Code::Unauthenticated, "{fault}");
    assert!(fault.message.contains("another peer answers"), "{fault}");
}

#[tokio::test]
async fn certificates_out_of_their_time_are_refused_with_the_reason() {
    let fleet = Fleet::new();
    let now = SystemTime::now();
    let expired = Validity { from: now - 3 * HOUR, to: now - HOUR };
    let early = Validity { from: now + HOUR, to: now + 3 * HOUR };
    let issue = |peer: &Peer, validity| fleet.authority.issue_for(peer, validity).unwrap();
    let placer = Peer::Placer(1);

    let addr = serve(&fleet.issue(&HOST)).await;
    let fault = ask(&issue(&placer, expired), addr, &HOST).await.unwrap_err();
    assert_eq!(fault.code, Code::Unauthenticated, "{fault}");
    assert!(fault.message.contains("our certificate has expired"), "{fault}");

    let addr = serve(&issue(&HOST, expired)).await;
    let fault = ask(&fleet.issue(&placer), addr, &HOST).await.unwrap_err();
    assert!(fault.message.contains("the peer's certificate has expired"), "{fault}");

    let addr = serve(&issue(&HOST, early)).await;
    let fault = ask(&fleet.issue(&placer), addr, &HOST).await.unwrap_err();
    assert_eq!(fault.code, Code::Clock, "{fault}");

    // On disk the same is told before anything is dialled.
    for (validity, code) in [(expired, Code::Unauthenticated), (early, Code::Clock)] {
        let dir = tempfile::tempdir().unwrap();
        issue(&placer, validity).save(dir.path()).unwrap();
        assert_eq!(Identity::load(dir.path()).unwrap_err().code, code);
    }
}

#[tokio::test]
async fn a_busy_port_and_a_dead_one_say_so() {
    let fleet = Fleet::new();
    let identity = fleet.issue(&HOST);
    let holder = std::net::UdpSocket::bind(ANY).unwrap();
    let addr = holder.local_addr().unwrap();
    let error = quic::listen(addr, &identity, &[Role::Placer]).unwrap_err();
    assert_eq!(Fault::from(error).code, Code::Busy);
    drop(holder);
    let fault = ask(&fleet.issue(&Peer::Placer(1)), addr, &HOST).await.unwrap_err();
    assert_eq!(fault.code, Code::Unreachable, "{fault}");
}

#[test]
fn an_identity_reads_back_and_guards_its_keys() {
    use std::os::unix::fs::PermissionsExt;
    let fleet = Fleet::new();
    let dir = tempfile::tempdir().unwrap();
    let identity = fleet.issue(&HOST);
    identity.save(dir.path()).unwrap();
    let loaded = Identity::load(dir.path()).unwrap();
    assert_eq!((&loaded.peer, &loaded.beat), (&HOST, &identity.beat));
    let key = fleet.authority.newest_key().sender(Role::Host, 7);
    assert_eq!(loaded.beat.unwrap().key, key);

    for name in ["key.pem", "beat.key"] {
        let path = dir.path().join(name);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        let fault = Identity::load(dir.path()).unwrap_err();
        assert_eq!(fault.code, Code::Config);
        assert!(fault.message.contains(name) && fault.message.contains("chmod 600"), "{fault}");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
    }
}

#[test]
fn a_fleet_reads_back_and_its_keys_rotate() {
    let dir = tempfile::tempdir().unwrap();
    let mut made = FleetAuthority::create(dir.path()).unwrap();
    assert_eq!(FleetAuthority::create(dir.path()).unwrap_err().code, Code::Config);
    let first = made.newest_key().clone();
    made.rotate().unwrap();
    let loaded = FleetAuthority::load(dir.path()).unwrap();
    assert_eq!(loaded.keys(), made.keys());
    assert_eq!(loaded.keys()[0], first);
    assert_eq!(loaded.newest_key().epoch.0, 2);
    assert!(loaded.issue(&Peer::Client { tenant: "no.dots".into() }).is_err());
}
