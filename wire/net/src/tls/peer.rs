//! Names of peers, as certificates carry them.
//!
//! A certificate holds two DNS names: the peer's own, and its role's (`role-placer.volley`), which a client dials
//! when any placer will do.

use std::fmt;

use wire::{Code, Fault, HostId, seal::Role};

/// Longest tenant name that fits a DNS label after `tenant-`.
const TENANT_BYTES_MAX: usize = 56;

/// Who a certificate is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// A `hostd`.
    Host(HostId),
    /// A `placerd`, by its placer id.
    Placer(u64),
    /// A `heartbeatd`, by its aggregator id.
    Aggregator(u64),
    /// Someone who launches sandboxes.
    Client {
        /// For this tenant.
        tenant: String,
    },
    /// Someone who administers the fleet.
    Operator,
}

impl Peer {
    /// The role.
    #[must_use]
    pub const fn role(&self) -> Role {
        match self {
            Self::Host(_) => Role::Host,
            Self::Placer(_) => Role::Placer,
            Self::Aggregator(_) => Role::Aggregator,
            Self::Client { .. } => Role::Client,
            Self::Operator => Role::Operator,
        }
    }

    /// The id under which its datagrams are sealed; none for people.
    #[must_use]
    pub const fn sender_id(&self) -> Option<u64> {
        match self {
            Self::Host(HostId(id)) | Self::Placer(id) | Self::Aggregator(id) => Some(*id),
            Self::Client { .. } | Self::Operator => None,
        }
    }

    /// The tenant in whose name it acts, if it is a client.
    #[must_use]
    pub fn tenant(&self) -> Option<&str> {
        match self {
            Self::Client { tenant } => Some(tenant),
            _ => None,
        }
    }

    /// Checks that the name can stand in a certificate.
    ///
    /// # Errors
    /// [`Code::Config`] for a tenant whose name is no DNS label.
    pub fn check(&self) -> Result<(), Fault> {
        let Self::Client { tenant } = self else { return Ok(()) };
        let fits = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
        let length_fits = (1..=TENANT_BYTES_MAX).contains(&tenant.len());
        if length_fits && tenant.bytes().all(fits) && !tenant.ends_with('-') {
            return Ok(());
        }
        Err(Fault::new(
            Code::Config,
            format!(
                "tenant {tenant:?} cannot stand in a certificate: use 1 to {TENANT_BYTES_MAX} of a-z, 0-9 \
                 and '-', not ending in '-'"
            ),
        ))
    }

    /// Reads a name back out of a certificate.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let name = name.strip_suffix(".volley")?;
        if name == "operator" {
            return Some(Self::Operator);
        }
        let (kind, rest) = name.split_once('-')?;
        let id = || match rest.len() {
            16 if rest.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) => {
                u64::from_str_radix(rest, 16).ok()
            }
            _ => None,
        };
        match kind {
            "host" => id().map(|id| Self::Host(HostId(id))),
            "placer" => id().map(Self::Placer),
            "aggregator" => id().map(Self::Aggregator),
            "tenant" => {
                let peer = Self::Client { tenant: rest.to_owned() };
                peer.check().is_ok().then_some(peer)
            }
            _ => None,
        }
    }
}

/// The DNS name of a peer.
#[must_use]
pub fn server_name(peer: &Peer) -> String {
    match peer {
        Peer::Host(HostId(id)) => format!("host-{id:016x}.volley"),
        Peer::Placer(id) => format!("placer-{id:016x}.volley"),
        Peer::Aggregator(id) => format!("aggregator-{id:016x}.volley"),
        Peer::Client { tenant } => format!("tenant-{tenant}.volley"),
        Peer::Operator => "operator.volley".to_owned(),
    }
}

pub(crate) fn role_name(role: Role) -> &'static str {
    match role {
        Role::Host => "host",
        Role::Placer => "placer",
        Role::Aggregator => "aggregator",
        Role::Client => "client",
        Role::Operator => "operator",
    }
}

/// Whom a dialer wants to meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    /// This very peer.
    Peer(Peer),
    /// Anyone of this role.
    Role(Role),
}

impl Expected {
    /// The DNS name that the certificate must carry.
    #[must_use]
    pub fn server_name(&self) -> String {
        match self {
            Self::Peer(peer) => server_name(peer),
            Self::Role(role) => format!("role-{}.volley", role_name(*role)),
        }
    }
}

impl From<&Peer> for Expected {
    fn from(peer: &Peer) -> Self {
        Self::Peer(peer.clone())
    }
}

impl From<Role> for Expected {
    fn from(role: Role) -> Self {
        Self::Role(role)
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(id) => write!(f, "host {id}"),
            Self::Placer(id) => write!(f, "placer {id:016x}"),
            Self::Aggregator(id) => write!(f, "aggregator {id:016x}"),
            Self::Client { tenant } => write!(f, "client of tenant {tenant}"),
            Self::Operator => f.write_str("operator"),
        }
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Peer(peer) => peer.fmt(f),
            Self::Role(role) => write!(f, "any {}", role_name(*role)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn names_read_back_what_they_say(id: u64, tenant in "[a-z0-9-]{0,54}[a-z0-9]") {
            for peer in [
                Peer::Host(HostId(id)),
                Peer::Placer(id),
                Peer::Aggregator(id),
                Peer::Client { tenant },
                Peer::Operator,
            ] {
                prop_assert!(peer.check().is_ok());
                prop_assert_eq!(Peer::parse(&server_name(&peer)), Some(peer));
            }
        }

        #[test]
        fn any_text_is_a_peer_that_prints_the_same_or_none(text in ".{0,80}") {
            if let Some(peer) = Peer::parse(&text) {
                prop_assert_eq!(server_name(&peer), text);
            }
        }
    }

    #[test]
    fn tenants_that_are_no_label_are_refused() {
        for tenant in ["", "a.b", "A", "a_b", "a-", "tenänt", &"x".repeat(57)] {
            assert!(Peer::Client { tenant: tenant.to_owned() }.check().is_err(), "{tenant}");
        }
    }
}
