//! QUIC endpoints, with settings for tiny messages inside a data centre, in one place.
//!
//! Why these values: DESIGN.md. A listener names the roles that it serves; a dialer names the peer that it wants.
//! Left out: 0-RTT, which would need a replay guard and saves latency but no work (NUMBERS).

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use quinn::{
    AckFrequencyConfig, ClientConfig, Connection, Endpoint, EndpointConfig, IdleTimeout,
    ServerConfig, TokioRuntime, TransportConfig, VarInt, congestion::CubicConfig,
};
use socket2::{Domain, Protocol, Socket, Type};
use wire::{
    Code, Fault,
    limits::{FRAME_BYTES_MAX, PLACER_STREAMS_MAX, STREAMS_MAX},
    seal::Role,
};

use crate::{
    NetError,
    tls::{self, Expected, Identity, Peer},
    udp::set_buffers,
};

/// Bytes of kernel buffer each way of an endpoint's socket.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// A connection is lost after so long without a packet.
const IDLE: Duration = Duration::from_secs(20);
/// Dialers keep their connections warm by a packet this often.
const KEEP_ALIVE: Duration = Duration::from_secs(6);
/// Until measured: three of these pass before a first packet is sent again.
const INITIAL_RTT: Duration = Duration::from_millis(50);
/// A burst of small launches to one host leaves at once.
const INITIAL_WINDOW_BYTES: u64 = 1 << 20;
/// One stream may have a whole frame under way, and a second behind it.
#[expect(clippy::cast_possible_truncation, reason = "asserted: 2^19")]
const STREAM_WINDOW_BYTES: u32 = 2 * FRAME_BYTES_MAX as u32;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// First packets that wait for [`accept`], and all bytes that may wait with them.
const INCOMING_MAX: usize = 8_192;
const INCOMING_BYTES_MAX: u64 = 32 << 20;
/// A dial gives up after this.
const CONNECT: Duration = Duration::from_secs(5);
/// Packets that may come before one acknowledgement leaves.
const ACK_AFTER_PACKETS: u32 = 10;
/// A launch is acknowledged by its reply and a reply by the next launch, if that comes in time: with a thousand hosts it comes after some
/// 25 ms, and a packet only to acknowledge costs as much as a launch. What is lost is noticed so much later.
const ACK_DELAY_MAX: Duration = Duration::from_millis(25);

const _: () = assert!(FRAME_BYTES_MAX <= 1 << 18);

/// What a peer may have open on one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A host, or another daemon that asks little.
    Host,
    /// A placer, which multiplexes everybody's launches.
    Placer,
    /// A client or an operator.
    Client,
}

impl Class {
    /// The class of a peer.
    #[must_use]
    pub const fn of(role: Role) -> Self {
        match role {
            Role::Host | Role::Aggregator => Self::Host,
            Role::Placer => Self::Placer,
            Role::Client | Role::Operator => Self::Client,
        }
    }

    /// Bidirectional streams that it may have open at once.
    #[must_use]
    pub const fn streams_max(self) -> u32 {
        match self {
            Self::Placer => PLACER_STREAMS_MAX,
            Self::Host | Self::Client => STREAMS_MAX,
        }
    }
}

/// Transport settings of both ends.
#[must_use]
pub fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(ACK_AFTER_PACKETS));
    acks.max_ack_delay(Some(ACK_DELAY_MAX));
    let mut congestion = CubicConfig::default();
    congestion.initial_window(INITIAL_WINDOW_BYTES);
    let idle = IdleTimeout::try_from(IDLE).ok();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_MAX))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .send_window(u64::from(CONNECTION_WINDOW_BYTES))
        .max_idle_timeout(idle)
        .initial_rtt(INITIAL_RTT)
        .ack_frequency_config(Some(acks))
        .congestion_controller_factory(Arc::new(congestion))
        // Streams hold one small message: turns between them cost more than they share.
        .send_fairness(false);
    transport
}

fn bind(addr: SocketAddr, shared: bool) -> Result<std::net::UdpSocket, NetError> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))
        .map_err(|error| NetError::Socket("a UDP socket", error))?;
    if shared {
        socket.set_reuse_port(true).map_err(|error| NetError::Socket("SO_REUSEPORT", error))?;
    }
    socket.bind(&addr.into()).map_err(|error| NetError::bind(addr, error))?;
    set_buffers(&socket, SOCKET_BUFFER_BYTES);
    socket.set_nonblocking(true).map_err(|error| NetError::Socket("O_NONBLOCK", error))?;
    Ok(socket.into())
}

fn endpoint(
    socket: std::net::UdpSocket,
    server: Option<ServerConfig>,
) -> Result<Endpoint, NetError> {
    Endpoint::new(EndpointConfig::default(), server, socket, Arc::new(TokioRuntime))
        .map_err(|error| NetError::Socket("a QUIC endpoint", error))
}

fn server(identity: &Identity, roles: &[Role]) -> Result<ServerConfig, NetError> {
    let crypto = tls::server_config(identity, roles).map_err(NetError::Identity)?;
    let mut server = ServerConfig::with_crypto(Arc::new(crypto));
    server.transport_config(Arc::new(transport()));
    server.max_incoming(INCOMING_MAX).incoming_buffer_size_total(INCOMING_BYTES_MAX);
    // Nobody roams in a data centre, and a path probe is work that an attacker could ask for.
    server.migration(false);
    Ok(server)
}

/// Listens for peers of these roles, inside a tokio runtime. The endpoint can dial as well ([`connect`]).
///
/// # Errors
/// [`NetError::Busy`] if another process has the port; else what the kernel or the identity refused.
pub fn listen(addr: SocketAddr, identity: &Identity, roles: &[Role]) -> Result<Endpoint, NetError> {
    listen_with(addr, identity, roles, false)
}

/// As [`listen`], on a port that several endpoints of this process share: the kernel spreads connections over them,
/// one a core. A busy port of the same user is then not noticed, so bind the first with [`listen`] to probe.
///
/// # Errors
/// As [`listen`].
pub fn listen_shared(
    addr: SocketAddr,
    identity: &Identity,
    roles: &[Role],
) -> Result<Endpoint, NetError> {
    listen_with(addr, identity, roles, true)
}

fn listen_with(
    addr: SocketAddr,
    identity: &Identity,
    roles: &[Role],
    shared: bool,
) -> Result<Endpoint, NetError> {
    let server = server(identity, roles)?;
    let mut endpoint = endpoint(bind(addr, shared)?, Some(server))?;
    endpoint.set_default_client_config(client(identity)?);
    tracing::debug!(%addr, ?roles, "listening");
    Ok(endpoint)
}

fn client(identity: &Identity) -> Result<ClientConfig, NetError> {
    let crypto = tls::client_config(identity).map_err(NetError::Identity)?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    let mut transport = transport();
    transport.keep_alive_interval(Some(KEEP_ALIVE));
    config.transport_config(Arc::new(transport));
    Ok(config)
}

/// An endpoint that only dials, inside a tokio runtime. Bind `0.0.0.0:0` or `[::]:0` unless the route matters.
///
/// # Errors
/// What the kernel or the identity refused.
pub fn dialer(addr: SocketAddr, identity: &Identity) -> Result<Endpoint, NetError> {
    let mut endpoint = endpoint(bind(addr, false)?, None)?;
    endpoint.set_default_client_config(client(identity)?);
    Ok(endpoint)
}

/// Dials a peer (or, given a [`Role`], anyone of that role) and checks that it is the one.
///
/// # Errors
/// [`Code::Unreachable`]: nobody answered. [`Code::Unauthenticated`], [`Code::Clock`]: by its or our certificate.
/// Our own certificate may also be refused after this returned; the first stream then fails ([`tls::explain`]).
pub async fn connect(
    endpoint: &Endpoint,
    addr: SocketAddr,
    expected: impl Into<Expected>,
) -> Result<Connection, Fault> {
    let expected = expected.into();
    let lost = |what: &dyn std::fmt::Display, code| {
        Fault::new(code, format!("{expected} at {addr} was not reached: {what}"))
    };
    let connecting = endpoint
        .connect(addr, &expected.server_name())
        .map_err(|error| lost(&error, Code::Unreachable))?;
    match tokio::time::timeout(CONNECT, connecting).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(error)) => {
            let fault = tls::explain(&error);
            Err(lost(&fault, fault.code))
        }
        Err(_) => Err(lost(&"no answer within 5 s", Code::Unreachable)),
    }
}

/// Handshakes of this process that wait for their peer's next packet.
static HANDSHAKES: AtomicUsize = AtomicUsize::new(0);

/// Beyond, a peer has to show first that it receives at its address, which costs us no memory (FAULTS Q4).
const HANDSHAKES_UNPROVEN_MAX: usize = 1_024;
/// Beyond, nobody is let in until some have ended.
const HANDSHAKES_MAX: usize = 4_096;

struct Handshake;

impl Handshake {
    /// Counts one, and says how many there are with it. A count of nothing else, hence relaxed.
    fn begin() -> (Self, usize) {
        (Self, HANDSHAKES.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        HANDSHAKES.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Finishes an incoming handshake, says who it is, and grants the streams of its class. Among very many handshakes at
/// once a peer is asked to prove its address first; it comes again by itself.
///
/// # Errors
/// Why there is no connection: for a log at debug level, since anybody can cause it.
pub async fn accept(incoming: quinn::Incoming) -> Result<(Connection, Peer), Fault> {
    let (_handshake, under_way) = Handshake::begin();
    if under_way > HANDSHAKES_MAX {
        incoming.refuse();
        return Err(Fault::new(Code::Overloaded, "too many handshakes at once; it was refused"));
    }
    if under_way > HANDSHAKES_UNPROVEN_MAX && incoming.may_retry() {
        let _ = incoming.retry();
        return Err(Fault::new(Code::Overloaded, "asked to prove its address"));
    }
    let connection = incoming.await.map_err(|error| tls::explain(&error))?;
    let peer = tls::peer_of(&connection)?;
    let streams = Class::of(peer.role()).streams_max();
    if streams != STREAMS_MAX {
        connection.set_max_concurrent_bi_streams(VarInt::from_u32(streams));
    }
    Ok((connection, peer))
}
