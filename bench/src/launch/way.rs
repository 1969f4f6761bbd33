//! What is sent and over what: the request, and connections to placers.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use quinn::{Connection, Endpoint};
use wire::{
    Code, Fault, LaunchId,
    launch::{LaunchHead, LaunchReply, LaunchRequest, Limits, Network},
    seal::Role,
};
use wire_net::{
    quic,
    stream::{self, LaunchLost},
    tls::Identity,
};

use super::{Carrier, Options, lanes::LaneLink};

/// A request whose id is put in anew each time.
pub(super) struct Template {
    bytes: Vec<u8>,
    id_at: usize,
    pub(super) head: LaunchHead,
}

impl Template {
    pub(super) fn new(options: &Options, tenant: String) -> Result<Self, Fault> {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let mut request = LaunchRequest {
            launch_id: LaunchId([0x55; 16]),
            tenant,
            image: options.image.clone(),
            shape: options.shape,
            command: options.command.clone(),
            env: Vec::new(),
            cwd: String::new(),
            user: String::new(),
            tty: false,
            stdin: false,
            limits: Limits { hard_ms: millis(options.lifetime), ..Limits::default() },
            network: Network::None,
            publish: vec![],
            labels: Vec::new(),
        };
        request.check()?;
        let bytes = request.to_bytes();
        request.launch_id = LaunchId([0xaa; 16]);
        let other = request.to_bytes();
        let id_at = bytes.iter().zip(&other).position(|(a, b)| a != b).unwrap_or(0);
        let differ = bytes.iter().zip(&other).filter(|(a, b)| a != b).count();
        if differ != 16 || bytes.len() != other.len() {
            return Err(Fault::new(Code::Internal, "a request does not hold its id in one place"));
        }
        let budget_ms = u32::try_from(options.budget.as_millis()).unwrap_or(u32::MAX);
        let head =
            LaunchHead { budget_ms: budget_ms.min(wire::limits::BUDGET_MS_MAX), named: false };
        Ok(Self { bytes, id_at, head })
    }

    /// Bytes of a request.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Where the id lies in a request.
    pub(super) fn id_in<'a>(&self, request: &'a mut [u8]) -> &'a mut [u8] {
        &mut request[self.id_at..self.id_at + 16]
    }

    /// The bytes of a request.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes of the request with this id.
    pub(super) fn with(&self, id: [u8; 16]) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[self.id_at..self.id_at + 16].copy_from_slice(&id);
        bytes
    }
}

/// The way to a placer for launches that have a stream each, dialled anew when it broke.
pub(super) struct Link {
    addr: SocketAddr,
    connection: Mutex<Connection>,
    dialling: tokio::sync::Mutex<()>,
}

impl Link {
    pub(super) async fn dial(endpoint: &Endpoint, addr: SocketAddr) -> Result<Self, Fault> {
        let connection = Mutex::new(quic::connect(endpoint, addr, Role::Placer).await?);
        Ok(Self { addr, connection, dialling: tokio::sync::Mutex::new(()) })
    }

    pub(super) fn connection(&self) -> Connection {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) async fn launch(
        &self,
        head: LaunchHead,
        request: &[u8],
    ) -> Result<LaunchReply, LaunchLost> {
        stream::launch(&self.connection(), head, request).await
    }

    /// Replaces a connection that broke; whoever comes second finds it replaced.
    pub(super) async fn redial(&self, endpoint: &Endpoint) {
        let _dialling = self.dialling.lock().await;
        if self.connection().close_reason().is_none() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        if let Ok(new) = quic::connect(endpoint, self.addr, Role::Placer).await {
            *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = new;
        }
    }
}

/// Ways to placers, by carrier.
pub(super) enum Links {
    Streams(Vec<Link>),
    Lanes(Vec<LaneLink>),
}

impl Links {
    pub(super) const fn len(&self) -> usize {
        match self {
            Self::Streams(links) => links.len(),
            Self::Lanes(links) => links.len(),
        }
    }
}

/// Dials as many ways as the load needs.
pub(super) async fn connect(
    options: &Options,
    identity: &Identity,
) -> Result<(Endpoint, Links), Fault> {
    let any = match options.placers[0] {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let endpoint = quic::dialer((any, 0).into(), identity)?;
    let placers = options.placers.iter().cycle().take(options.connections_each());
    let (mut streams, mut lanes) = (Vec::new(), Vec::new());
    for addr in placers {
        match options.carrier {
            Carrier::Stream => streams.push(Link::dial(&endpoint, *addr).await?),
            Carrier::Lane => lanes.push(LaneLink::dial(&endpoint, *addr).await?),
        }
    }
    let links = match options.carrier {
        Carrier::Stream => Links::Streams(streams),
        Carrier::Lane => Links::Lanes(lanes),
    };
    Ok((endpoint, links))
}
