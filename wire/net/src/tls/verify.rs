//! TLS both ways: rustls's own checks, then the role; and what its errors mean to a person.
//!
//! The role is checked inside the handshake, so that a peer of the wrong role never opens a stream.

use std::sync::Arc;

use quinn::{
    ConnectionError,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rustls::{
    DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    pki_types::{CertificateDer, UnixTime},
    server::{
        WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    version::TLS13,
};
use wire::{Code, Fault, seal::Role};

use super::{
    ALPN,
    identity::{Identity, peer_in},
    peer::Peer,
};

/// Tickets a handshake: one suffices, since a ticket of a resumed session comes with a new one.
const TICKETS: usize = 1;

/// Sessions that a dialer remembers: the hosts outside a placer's aperture.
const SESSIONS_MAX: usize = 16_384;

/// rustls's verifier of clients, and our rule about roles.
#[derive(Debug)]
struct RoleVerifier {
    inner: Arc<dyn ClientCertVerifier>,
    allowed: Box<[Role]>,
}

impl ClientCertVerifier for RoleVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        cert: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.inner.verify_client_cert(cert, intermediates, now)?;
        let role = peer_in(cert).map(|peer| peer.role());
        if role.is_ok_and(|role| self.allowed.contains(&role)) {
            return Ok(verified);
        }
        // Its alert is `access_denied`.
        Err(rustls::CertificateError::ApplicationVerificationFailure.into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

fn broken(error: impl std::fmt::Display) -> Fault {
    Fault::new(Code::Config, format!("the identity cannot be used: {error}"))
}

fn roots(identity: &Identity) -> Result<Arc<RootCertStore>, Fault> {
    let mut roots = RootCertStore::empty();
    roots.add(identity.ca.clone()).map_err(broken)?;
    Ok(Arc::new(roots))
}

/// TLS of a listener that serves peers of these roles.
pub(crate) fn server_config(
    identity: &Identity,
    allowed: &[Role],
) -> Result<QuicServerConfig, Fault> {
    super::install_provider();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let inner =
        WebPkiClientVerifier::builder_with_provider(roots(identity)?, Arc::clone(&provider))
            .build()
            .map_err(broken)?;
    let verifier = RoleVerifier { inner, allowed: allowed.into() };
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(broken)?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(vec![identity.cert.clone()], identity.key.clone_key())
        .map_err(broken)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.ticketer = rustls::crypto::ring::Ticketer::new().map_err(broken)?;
    config.send_tls13_tickets = TICKETS;
    QuicServerConfig::try_from(config).map_err(broken)
}

/// TLS of a dialer.
pub(crate) fn client_config(identity: &Identity) -> Result<QuicClientConfig, Fault> {
    super::install_provider();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(broken)?
        .with_root_certificates(roots(identity)?)
        .with_client_auth_cert(vec![identity.cert.clone()], identity.key.clone_key())
        .map_err(broken)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = rustls::client::Resumption::in_memory_sessions(SESSIONS_MAX);
    QuicClientConfig::try_from(config).map_err(broken)
}

/// Who is at the other end of a connection.
///
/// # Errors
/// [`Code::Unauthenticated`] if its certificate names no peer: never on a connection made by [`crate::quic`].
pub fn peer_of(connection: &quinn::Connection) -> Result<Peer, Fault> {
    let identity = connection.peer_identity();
    let certs =
        identity.as_ref().and_then(|any| any.downcast_ref::<Vec<CertificateDer<'static>>>());
    let cert = certs.and_then(|certs| certs.first()).ok_or_else(|| {
        Fault::new(Code::Unauthenticated, "the peer showed no certificate, so nothing was done")
    })?;
    peer_in(cert)
}

/// What a lost connection means, with the code that its user acts on.
#[must_use]
pub fn explain(error: &ConnectionError) -> Fault {
    let (ours, code, reason) = match error {
        ConnectionError::TransportError(error) => (true, error.code, error.reason.clone()),
        ConnectionError::ConnectionClosed(close) => {
            (false, close.error_code, String::from_utf8_lossy(&close.reason).into_owned())
        }
        ConnectionError::TimedOut => {
            return Fault::new(Code::Unreachable, "no answer within the time for it");
        }
        other => return Fault::new(Code::Unreachable, format!("the connection ended: {other}")),
    };
    match alert_of(code) {
        Some(alert) => explain_alert(ours, alert, &reason),
        None => Fault::new(Code::Unreachable, format!("the connection ended: {error}")),
    }
}

/// The TLS alert in a QUIC error code (RFC 9001 4.8: 0x0100 plus the alert).
fn alert_of(code: quinn::TransportErrorCode) -> Option<u8> {
    let code = u64::from(code);
    (code & !0xff == 0x0100).then(|| code.to_le_bytes()[0])
}

/// Alerts by RFC 8446 6.2. `ours` says that we refused the peer, else the peer refused us.
fn explain_alert(ours: bool, alert: u8, reason: &str) -> Fault {
    let whose = if ours { "the peer's" } else { "our" };
    let (code, what) = match alert {
        48 | 51 => (Code::Unauthenticated, format!("{whose} certificate is of another fleet")),
        45 if reason.contains("NotValidYet") || reason.contains("not valid yet") => (
            Code::Clock,
            format!("{whose} certificate is not good yet: one of the two clocks is off"),
        ),
        45 => (
            Code::Unauthenticated,
            format!("{whose} certificate has expired by the clock of the one who checked it"),
        ),
        49 => (Code::Forbidden, format!("{whose} certificate's role may not do this here")),
        116 => (Code::Unauthenticated, format!("{whose} certificate was not shown")),
        42 if ours && reason.contains("not valid for name") => (
            Code::Unauthenticated,
            "another peer answers there than the one that was dialled".into(),
        ),
        120 => (Code::Unauthenticated, "the peer does not speak volley/1".into()),
        _ => (
            Code::Unauthenticated,
            format!("{whose} certificate was refused (alert {alert}: {reason})"),
        ),
    };
    Fault::new(code, format!("{what}, so the connection was not made"))
}
