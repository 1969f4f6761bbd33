//! A stream a round trip.

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use quinn::Connection;

use super::Shape;

/// Connections to the echoes behind a relay, taken in turn.
#[derive(Clone)]
pub(super) struct Hosts {
    connections: Arc<[Connection]>,
    turn: Arc<AtomicUsize>,
}

impl Hosts {
    pub(super) fn new(connections: Vec<Connection>) -> Self {
        Self { connections: connections.into(), turn: Arc::default() }
    }

    fn next(&self) -> Option<&Connection> {
        let at = self.turn.fetch_add(1, Ordering::Relaxed);
        self.connections.get(at % self.connections.len().max(1))
    }
}

pub(super) async fn answer_all(connection: Connection, hosts: Hosts, shape: Shape) {
    while let Ok((mut send, mut recv)) = connection.accept_bi().await {
        let hosts = hosts.clone();
        tokio::spawn(async move {
            let Ok(request) = recv.read_to_end(shape.request).await else { return };
            let reply = match hosts.next() {
                Some(host) => trip(host, request, shape).await,
                None => Some(vec![0; shape.reply]),
            };
            if let Some(reply) = reply {
                let _ = send.write_chunk(reply.into()).await;
                let _ = send.finish();
            }
        });
    }
}

async fn trip(connection: &Connection, request: Vec<u8>, shape: Shape) -> Option<Vec<u8>> {
    let (mut send, mut recv) = connection.open_bi().await.ok()?;
    send.write_chunk(request.into()).await.ok()?;
    let _ = send.finish();
    recv.read_to_end(shape.reply).await.ok()
}

/// One of those in flight; returns when the connection breaks.
pub(super) async fn offer(connection: &Connection, shape: Shape, done: &AtomicU64) {
    while trip(connection, vec![0; shape.request], shape).await.is_some() {
        done.fetch_add(1, Ordering::Relaxed);
    }
}
