//! Who is at the other end: the fleet's certificate authority, identities, and mutual TLS 1.3.
//!
//! A fleet has one authority ([`FleetAuthority`]) that signs every certificate; a peer's name stands in its
//! certificate as a DNS name ([`Peer`], PROTOCOL 8.1), so that rustls itself checks that a dialled host is that
//! host. Left out: revocation lists and intermediate authorities. A lost certificate is outlived (they last a year)
//! or ended by a new authority.

mod authority;
mod files;
mod identity;
mod peer;
mod verify;

pub use authority::{FleetAuthority, Validity, load_fleet_keys};
pub use identity::{Identity, SenderKeys};
pub use peer::{Expected, Peer, server_name};
pub(crate) use verify::{client_config, server_config};
pub use verify::{explain, peer_of};

/// What ALPN negotiates.
pub const ALPN: &[u8] = b"volley/1";

/// Makes `ring` the process's one crypto provider. Every entry into this crate calls it; call it first in `main`.
pub fn install_provider() {
    // A second install is refused, and is the same provider: nothing else of this tree installs one.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
