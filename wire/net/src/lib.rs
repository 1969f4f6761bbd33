//! How Volley's messages travel: UDP in batches, QUIC, mutual TLS, object stores.
//!
//! The only crate that opens a socket or an object store, so that everything about the outside (buffer sizes,
//! transport settings, certificates, compare-and-swap) has one place. What is said is `wire`'s business, what it
//! leads to the cores'. DESIGN.md beside this crate says what was measured and why it is so.

pub mod lane;
pub mod listing;
pub mod objects;
pub mod ops;
pub mod quic;
pub mod stream;
pub mod tls;
pub mod udp;

use std::{io, net::SocketAddr};

use wire::{Code, Fault};

/// Why something could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Another process holds the port.
    #[error("{0} is in use by another process, so nothing listens there for us")]
    Busy(SocketAddr),
    /// The address cannot be bound.
    #[error("{0} cannot be bound: {1}")]
    Bind(SocketAddr, io::Error),
    /// The kernel refused something after the bind.
    #[error("{0}: {1}")]
    Socket(&'static str, io::Error),
    /// The identity cannot serve.
    #[error("{0}")]
    Identity(Fault),
}

impl NetError {
    pub(crate) fn bind(addr: SocketAddr, error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::AddrInUse => Self::Busy(addr),
            _ => Self::Bind(addr, error),
        }
    }
}

impl From<NetError> for Fault {
    fn from(error: NetError) -> Self {
        let message = error.to_string();
        match error {
            NetError::Busy(_) => Self::new(Code::Busy, message),
            NetError::Bind(_, error) if error.kind() == io::ErrorKind::PermissionDenied => {
                Self::new(Code::Privilege, message)
            }
            NetError::Bind(..) => Self::new(Code::Config, message),
            NetError::Socket(..) => Self::new(Code::Internal, message),
            NetError::Identity(fault) => fault,
        }
    }
}
