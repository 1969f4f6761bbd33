//! Lanes: replies find their launches whatever their order, and a broken lane leaves nobody waiting.

#![allow(clippy::unwrap_used, reason = "outside of test functions as well")]

use std::{net::Ipv4Addr, sync::Arc};

use futures::future::join_all;
use rand::{Rng, SeedableRng, rngs::SmallRng, seq::SliceRandom};
use wire::{
    Code, Fault, HostId,
    frame::Kind,
    launch::{LaunchHead, LaunchReply},
    limits::LANE_LAUNCHES_MAX,
    seal::Role,
};
use wire_net::{
    lane::{Lane, LaneServer},
    quic, stream,
    stream::LaunchLost,
    tls::{FleetAuthority, Peer},
};

/// A lane and its other end, over real QUIC.
async fn pair() -> (Lane, LaneServer, quinn::Connection) {
    let authority = FleetAuthority::unsaved().unwrap();
    let host = authority.issue(&Peer::Host(HostId(5))).unwrap();
    let placer = authority.issue(&Peer::Placer(1)).unwrap();
    let any = (Ipv4Addr::LOCALHOST, 0).into();
    let listener = quic::listen(any, &host, &[Role::Placer]).unwrap();
    let addr = listener.local_addr().unwrap();
    let accepted = tokio::spawn(async move {
        let (connection, _) = quic::accept(listener.accept().await.unwrap()).await.unwrap();
        let (send, mut recv) = connection.accept_bi().await.unwrap();
        let opened = stream::expect_frame(&mut recv, Kind::Lane).await.unwrap();
        assert!(opened.is_empty());
        (LaneServer::new(send, recv), connection, listener)
    });
    let dialer = quic::dialer(any, &placer).unwrap();
    let connection = quic::connect(&dialer, addr, &Peer::Host(HostId(5))).await.unwrap();
    let lane = Lane::open(&connection).await.unwrap();
    let (server, theirs, listener) = accepted.await.unwrap();
    // Endpoints end with their last handle.
    tokio::spawn(async move {
        theirs.closed().await;
        drop((listener, dialer));
    });
    (lane, server, connection)
}

/// An answer that says which request it answers.
fn echo(request: &[u8]) -> LaunchReply {
    LaunchReply::Failed(Fault::new(Code::Internal, String::from_utf8(request.to_vec()).unwrap()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_reply_finds_its_launch_in_any_order_and_after_dropped_futures() {
    let seed = rand::rngs::SmallRng::from_os_rng().random();
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let (lane, mut server, _connection) = pair().await;
    let replies = server.replies();
    let served = tokio::spawn(async move {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut held = Vec::new();
        while let Some((tag, payload)) = server.next().await.unwrap() {
            held.push((tag, payload));
            if held.len() >= rng.random_range(1..64) {
                held.shuffle(&mut rng);
                for (tag, payload) in held.drain(..) {
                    let (head, request) = LaunchHead::split(&payload).unwrap();
                    assert_eq!(head.budget_ms, 7);
                    replies.reply(tag, &echo(request));
                }
            }
        }
    });
    let lane = Arc::new(lane);
    let mut waiting = Vec::new();
    for at in 0..5_000u32 {
        // Of all sizes, so that frames lie across chunks.
        let request = format!("{at} {}", "x".repeat(rng.random_range(0..3_000)));
        let reply = loop {
            match lane.launch(LaunchHead::new(7), request.as_bytes()) {
                Ok(reply) => break reply,
                // Bytes wait for the peer, as they may.
                Err(LaunchLost::NotSent(fault)) if fault.code == Code::Overloaded => {
                    tokio::task::yield_now().await;
                }
                Err(lost) => panic!("{lost}"),
            }
        };
        match rng.random_range(0..10) {
            0 => drop(reply),
            _ => waiting.push((request, reply)),
        }
        if waiting.len() > 200 {
            let (request, reply) = waiting.swap_remove(rng.random_range(0..waiting.len()));
            // Those that the server holds back come with later ones.
            tokio::select! {
                reply = reply => assert_eq!(reply.unwrap(), echo(request.as_bytes())),
                () = tokio::task::yield_now() => {}
            }
        }
    }
    // What the server still holds goes out when enough have come.
    let pushing = {
        let lane = Arc::clone(&lane);
        tokio::spawn(async move {
            loop {
                drop(lane.launch(LaunchHead::new(7), b"push"));
                tokio::task::yield_now().await;
            }
        })
    };
    for (request, reply) in waiting {
        assert_eq!(reply.await.unwrap(), echo(request.as_bytes()));
    }
    pushing.abort();
    served.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_lane_leaves_everything_outstanding_unknown_and_takes_no_more() {
    let (lane, server, connection) = pair().await;
    let waiting: Vec<_> = (0..50).map(|_| lane.launch(LaunchHead::new(7), b"x").unwrap()).collect();
    connection.close(0u32.into(), b"broken");
    for lost in join_all(waiting).await {
        assert!(matches!(lost, Err(LaunchLost::Unknown(_))), "{lost:?}");
    }
    assert!(!lane.is_open());
    assert!(matches!(lane.launch(LaunchHead::new(7), b"x"), Err(LaunchLost::NotSent(_))));
    drop(server);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lane_takes_so_many_launches_and_no_more() {
    let (lane, _server, _connection) = pair().await;
    let full: Vec<_> =
        (0..LANE_LAUNCHES_MAX).map(|_| lane.launch(LaunchHead::new(7), b"x").unwrap()).collect();
    let Err(LaunchLost::NotSent(fault)) = lane.launch(LaunchHead::new(7), b"x") else { panic!() };
    assert_eq!((fault.code, full.len()), (Code::Overloaded, LANE_LAUNCHES_MAX));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_answers_what_nobody_asked_ends_the_lane() {
    let (lane, server, _connection) = pair().await;
    let waiting = lane.launch(LaunchHead::new(7), b"x").unwrap();
    server.replies().reply(99, &echo(b"y"));
    assert!(matches!(waiting.await, Err(LaunchLost::Unknown(_))));
    assert!(!lane.is_open());
}
