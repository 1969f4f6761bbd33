//! TCP of one box: each connection is dialled first and accepted after, so that a program sees what is true.
//!
//! A first segment that policy refuses, or that nobody answers for, is refused in turn; one that is dialled becomes a
//! smoltcp socket when the far end has accepted. From then on bytes pass between the two windows, and what one side
//! cannot take holds the other back. Left out: urgent data, and options beyond window scaling.

use std::{
    collections::HashMap,
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
};

use smoltcp::{
    iface::{SocketHandle, SocketSet},
    socket::tcp::{Socket, SocketBuffer, State},
    wire::IpListenEndpoint,
};
use tokio::net::{TcpSocket, TcpStream};

use crate::{
    bucket::Bucket,
    limits::{CONNECT_MAX, SILENCE_MS_MAX, WINDOW_BYTES},
    packet::Flow,
    sync::Counters,
};

type Dial = Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>>;

/// Where a connection stands.
enum Stage {
    /// Being dialled; the first segment waits.
    Dialling(Dial, Vec<u8>),
    Open(Open),
}

struct Open {
    socket: SocketHandle,
    stream: TcpStream,
    /// The box will send no more, and the far end knows.
    box_ended: bool,
    /// The far end will send no more, and the box knows.
    far_ended: bool,
}

/// What came of a dial.
pub(crate) enum Dialled {
    /// Accepted: this first segment goes to smoltcp now.
    Accepted(Vec<u8>),
    /// Refused by the far end.
    Refused(Vec<u8>),
    /// Not reached.
    Unreachable(Vec<u8>),
}

/// Connections of one box.
#[derive(Default)]
pub(crate) struct Connections(HashMap<Flow, Stage>);

impl Connections {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether a first segment is of a connection that is known: a repetition, or its socket's affair.
    pub(crate) fn has(&self, flow: &Flow) -> bool {
        self.0.contains_key(flow)
    }

    /// Whether segments of it go to smoltcp.
    pub(crate) fn is_open(&self, flow: &Flow) -> bool {
        matches!(self.0.get(flow), Some(Stage::Open(_)))
    }

    /// Dials for a first segment.
    pub(crate) fn dial(&mut self, flow: Flow, segment: Vec<u8>) {
        let dial = async move {
            let to = SocketAddr::from((flow.to, flow.to_port));
            let stream = tokio::time::timeout(CONNECT_MAX, TcpSocket::new_v4()?.connect(to))
                .await
                .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
            stream.set_nodelay(true)?;
            // A far end that vanished is found out some time, with nobody sending.
            rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
            Ok(stream)
        };
        self.0.insert(flow, Stage::Dialling(Box::pin(dial), segment));
    }

    /// Looks at all dials; returns those that came to an end.
    pub(crate) fn poll_dials(
        &mut self,
        cx: &mut Context<'_>,
        sockets: &mut SocketSet<'static>,
    ) -> Vec<Dialled> {
        let mut done = Vec::new();
        let mut gone = Vec::new();
        for (flow, stage) in &mut self.0 {
            let Stage::Dialling(dial, segment) = stage else { continue };
            let Poll::Ready(outcome) = dial.as_mut().poll(cx) else { continue };
            let segment = std::mem::take(segment);
            match outcome.and_then(|stream| Ok((listen(*flow, sockets)?, stream))) {
                Ok((socket, stream)) => {
                    *stage =
                        Stage::Open(Open { socket, stream, box_ended: false, far_ended: false });
                    done.push(Dialled::Accepted(segment));
                }
                Err(error) => {
                    gone.push(*flow);
                    done.push(match error.kind() {
                        io::ErrorKind::ConnectionRefused => Dialled::Refused(segment),
                        _ => Dialled::Unreachable(segment),
                    });
                }
            }
        }
        for flow in gone {
            self.0.remove(&flow);
        }
        done
    }

    /// Passes bytes both ways; returns whether anything was done.
    pub(crate) fn pass(
        &mut self,
        cx: &mut Context<'_>,
        sockets: &mut SocketSet<'static>,
        bucket: &mut Bucket,
        counters: &Counters,
    ) -> bool {
        let mut busy = false;
        self.0.retain(|_, stage| {
            let Stage::Open(open) = stage else { return true };
            let socket = sockets.get_mut::<Socket<'_>>(open.socket);
            // Whatever the socket had to say before this state was sent by then.
            // One that still listens was given a first segment that smoltcp did not take.
            if matches!(socket.state(), State::Closed | State::TimeWait | State::Listen) {
                open.end(socket.state());
                sockets.remove(open.socket);
                busy = true;
                return false;
            }
            busy |= open.outward(cx, socket, bucket, counters);
            busy |= open.inward(cx, socket, bucket, counters);
            true
        });
        busy
    }
}

/// A socket that accepts exactly the first segment that is given to it next.
fn listen(flow: Flow, sockets: &mut SocketSet<'static>) -> io::Result<SocketHandle> {
    let buffer = || SocketBuffer::new(vec![0; WINDOW_BYTES]);
    let mut socket = Socket::new(buffer(), buffer());
    socket.set_nagle_enabled(false);
    // Packets are taken in batches, and one acknowledgement goes for each batch.
    socket.set_ack_delay(None);
    socket.set_timeout(Some(smoltcp::time::Duration::from_millis(SILENCE_MS_MAX)));
    let at = IpListenEndpoint { addr: Some(flow.to.into()), port: flow.to_port };
    socket.listen(at).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    Ok(sockets.add(socket))
}

/// What one try to pass bytes came to.
enum Tried {
    Passed(usize),
    /// The descriptor was not as ready as it seemed, and now says so.
    Again,
    /// Whoever polls is woken when there is more to do.
    Waits,
    Broken,
}

/// Tries once, if the far end's descriptor is ready for it.
fn tried<E>(
    ready: Poll<io::Result<()>>,
    pass: impl FnOnce() -> Result<io::Result<usize>, E>,
) -> Tried {
    match ready {
        Poll::Pending => return Tried::Waits,
        Poll::Ready(Err(_)) => return Tried::Broken,
        Poll::Ready(Ok(())) => {}
    }
    match pass() {
        Ok(Ok(length)) => Tried::Passed(length),
        Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => Tried::Again,
        _ => Tried::Broken,
    }
}

/// What a socket's buffer is told of a try: bytes that are done with, and how it went.
fn told(tried: io::Result<usize>) -> (usize, io::Result<usize>) {
    (*tried.as_ref().unwrap_or(&0), tried)
}

impl Open {
    /// From the box to the far end.
    fn outward(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut Socket<'static>,
        bucket: &mut Bucket,
        counters: &Counters,
    ) -> bool {
        let mut busy = false;
        while socket.can_recv() && bucket.has_any() {
            let stream = &self.stream;
            let sent = tried(stream.poll_write_ready(cx), || {
                socket.recv(|bytes| told(stream.try_write(&bytes[..bucket.at_most(bytes.len())])))
            });
            match sent {
                Tried::Passed(length) => {
                    bucket.take(length);
                    counters.sent(length);
                    busy = true;
                }
                Tried::Again => {}
                Tried::Waits => break,
                Tried::Broken => {
                    socket.abort();
                    return true;
                }
            }
        }
        let ended =
            !socket.may_recv() && !matches!(socket.state(), State::Listen | State::SynReceived);
        if ended && !self.box_ended {
            self.box_ended = true;
            let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Write);
            busy = true;
        }
        busy
    }

    /// From the far end to the box.
    fn inward(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut Socket<'static>,
        bucket: &mut Bucket,
        counters: &Counters,
    ) -> bool {
        let mut busy = false;
        while socket.can_send() && !self.far_ended && bucket.has_any() {
            let stream = &self.stream;
            let read = tried(stream.poll_read_ready(cx), || {
                socket.send(|room| match bucket.at_most(room.len()) {
                    0 => told(Err(io::ErrorKind::WouldBlock.into())),
                    most => told(stream.try_read(&mut room[..most])),
                })
            });
            match read {
                Tried::Passed(0) => {
                    self.far_ended = true;
                    socket.close();
                    busy = true;
                }
                Tried::Passed(length) => {
                    bucket.take(length);
                    counters.received(length);
                    busy = true;
                }
                Tried::Again => {}
                Tried::Waits => break,
                Tried::Broken => {
                    socket.abort();
                    return true;
                }
            }
        }
        busy
    }

    /// The box's side is over: the far end hears of a reset by a reset.
    fn end(&self, state: State) {
        if state == State::Closed && !(self.box_ended && self.far_ended) {
            let at_once = Some(std::time::Duration::ZERO);
            let _ = rustix::net::sockopt::set_socket_linger(&self.stream, at_once);
        }
    }
}
