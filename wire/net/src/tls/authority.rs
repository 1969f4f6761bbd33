//! The fleet's own certificate authority, and the fleet keys of heartbeats.
//!
//! A directory holds `ca.pem`, `ca.key` and `fleet.key` (a line an epoch, newest last). Whoever has `ca.key` can
//! make any peer, so it belongs on no machine that runs a role; aggregators need `fleet.key` alone.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rand::{TryRngCore as _, rngs::OsRng};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _};
use wire::{
    Code, Fault,
    seal::{FleetKey, KeyEpoch, Role},
};

use super::{
    files::{self, Mode, broken},
    identity::{Identity, SenderKeys},
    peer::{Expected, Peer, server_name},
};

const CA: &str = "ca.pem";
const CA_KEY: &str = "ca.key";
const FLEET_KEY: &str = "fleet.key";

const HOUR: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(24 * 3_600);

/// When a certificate is good. Clocks that are off by less than an hour do no harm.
#[derive(Clone, Copy, Debug)]
pub struct Validity {
    /// From this moment.
    pub from: SystemTime,
    /// To this one.
    pub to: SystemTime,
}

impl Validity {
    /// From an hour ago, for so long from now on.
    #[must_use]
    pub fn lasting(time: Duration) -> Self {
        let now = SystemTime::now();
        Self { from: now - HOUR, to: now + time }
    }
}

/// The authority of one fleet.
#[derive(Debug)]
pub struct FleetAuthority {
    dir: Option<PathBuf>,
    ca: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    keys: Vec<FleetKey>,
}

fn internal(error: impl std::fmt::Display) -> Fault {
    Fault::new(Code::Internal, format!("a certificate could not be made: {error}"))
}

fn set_validity(params: &mut CertificateParams, validity: Validity) {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let since = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default();
    params.not_before = epoch + since(validity.from);
    params.not_after = epoch + since(validity.to);
}

fn draw_secret() -> Result<[u8; 32], Fault> {
    let mut secret = [0; 32];
    OsRng.try_fill_bytes(&mut secret).map_err(internal)?;
    Ok(secret)
}

impl FleetAuthority {
    /// Makes a new fleet in `dir`, which must not hold one.
    ///
    /// # Errors
    /// [`Code::Config`] if there is one, or the directory cannot be written.
    pub fn create(dir: &Path) -> Result<Self, Fault> {
        super::install_provider();
        if dir.join(CA).exists() || dir.join(CA_KEY).exists() {
            return Err(Fault::new(
                Code::Config,
                format!("{} already holds a fleet, which was left as it is", dir.display()),
            ));
        }
        let made = Self::unsaved()?;
        files::write(dir, CA_KEY, made.issuer.key().serialize_pem().as_bytes(), Mode::Private)?;
        write_fleet_keys(dir, &made.keys)?;
        files::write(dir, CA, files::pem("CERTIFICATE", &made.ca).as_bytes(), Mode::Public)?;
        Ok(Self { dir: Some(dir.to_owned()), ..made })
    }

    /// A fleet that lives as long as this value: for tests and benches.
    ///
    /// # Errors
    /// [`Code::Internal`] without randomness.
    pub fn unsaved() -> Result<Self, Fault> {
        super::install_provider();
        let secret = draw_secret()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        // The fleet's name tells its authority from another fleet's in error texts.
        params.distinguished_name.push(DnType::CommonName, fleet_name(&secret));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        set_validity(&mut params, Validity::lasting(3_650 * DAY));
        let key = KeyPair::generate().map_err(internal)?;
        let ca = params.self_signed(&key).map_err(internal)?.der().clone();
        let keys = vec![FleetKey { epoch: KeyEpoch(1), secret }];
        Ok(Self { dir: None, ca, issuer: Issuer::new(params, key), keys })
    }

    /// Loads the fleet of `dir`.
    ///
    /// # Errors
    /// [`Code::Config`], with the file that is missing, readable by others, or broken.
    pub fn load(dir: &Path) -> Result<Self, Fault> {
        super::install_provider();
        let ca = CertificateDer::from_pem_slice(&files::read(dir, CA, Mode::Public)?)
            .map_err(|error| broken(dir, CA, error))?;
        let pem = files::read(dir, CA_KEY, Mode::Private)?;
        let pem = String::from_utf8(pem).map_err(|error| broken(dir, CA_KEY, error))?;
        let key = KeyPair::from_pem(&pem).map_err(|error| broken(dir, CA_KEY, error))?;
        let issuer = Issuer::from_ca_cert_der(&ca, key).map_err(|error| broken(dir, CA, error))?;
        Ok(Self { dir: Some(dir.to_owned()), ca, issuer, keys: load_fleet_keys(dir)? })
    }

    /// A new identity, good for a year.
    ///
    /// # Errors
    /// [`Code::Config`] for a name that cannot stand in a certificate.
    pub fn issue(&self, peer: &Peer) -> Result<Identity, Fault> {
        self.issue_for(peer, Validity::lasting(365 * DAY))
    }

    /// A new identity, good for a time of the caller's choice.
    ///
    /// # Errors
    /// [`Code::Config`] for a name that cannot stand in a certificate.
    pub fn issue_for(&self, peer: &Peer, validity: Validity) -> Result<Identity, Fault> {
        peer.check()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, peer.to_string());
        let role = Expected::Role(peer.role()).server_name();
        for name in [server_name(peer), role] {
            params.subject_alt_names.push(SanType::DnsName(name.try_into().map_err(internal)?));
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if !matches!(peer.role(), Role::Client | Role::Operator) {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, validity);
        let key = KeyPair::generate().map_err(internal)?;
        let cert = params.signed_by(&key, &self.issuer).map_err(internal)?;
        let newest = self.newest_key();
        let beat = peer
            .sender_id()
            .map(|id| SenderKeys { epoch: newest.epoch, key: newest.sender(peer.role(), id) });
        Ok(Identity {
            peer: peer.clone(),
            cert: cert.der().clone(),
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            ca: self.ca.clone(),
            beat,
        })
    }

    /// The fleet keys, oldest first; never empty.
    #[must_use]
    pub fn keys(&self) -> &[FleetKey] {
        &self.keys
    }

    /// The key under which heartbeats are sealed now.
    ///
    /// # Panics
    /// Never: an authority has a key from its making.
    #[must_use]
    pub fn newest_key(&self) -> &FleetKey {
        self.keys.last().expect("loading refuses a file without keys")
    }

    /// Starts the next key epoch. Aggregators that load the file hand it on (PROTOCOL 3.4).
    ///
    /// # Errors
    /// [`Code::Config`] if `fleet.key` cannot be written; the old keys stay.
    pub fn rotate(&mut self) -> Result<KeyEpoch, Fault> {
        let epoch = KeyEpoch(self.newest_key().epoch.0 + 1);
        let mut keys = self.keys.clone();
        keys.push(FleetKey { epoch, secret: draw_secret()? });
        if let Some(dir) = &self.dir {
            write_fleet_keys(dir, &keys)?;
        }
        self.keys = keys;
        Ok(epoch)
    }

    /// Ends all key epochs but the newest; returns those that ended. Whoever still uses one of them is not heard any
    /// more: see that every host has moved first.
    ///
    /// # Errors
    /// [`Code::Config`] if `fleet.key` cannot be written; the old keys stay.
    pub fn prune(&mut self) -> Result<Vec<KeyEpoch>, Fault> {
        let newest = self.newest_key().clone();
        if let Some(dir) = &self.dir {
            write_fleet_keys(dir, std::slice::from_ref(&newest))?;
        }
        let old = std::mem::replace(&mut self.keys, vec![newest]);
        Ok(old.iter().rev().skip(1).rev().map(|key| key.epoch).collect())
    }

    /// The datagram key of a role, of the newest epoch; none for people.
    #[must_use]
    pub fn beat_key(&self, peer: &Peer) -> Option<SenderKeys> {
        let newest = self.newest_key();
        let id = peer.sender_id()?;
        Some(SenderKeys { epoch: newest.epoch, key: newest.sender(peer.role(), id) })
    }
}

fn fleet_name(secret: &[u8; 32]) -> String {
    let hash = blake3::derive_key("volley 2026-11 fleet name", secret);
    format!("volley fleet {}", files::hex(&hash[..4]))
}

/// The fleet keys that `dir` holds, oldest first; never empty. What an aggregator needs of a fleet.
///
/// # Errors
/// [`Code::Config`], with what is wrong with the file.
pub fn load_fleet_keys(dir: &Path) -> Result<Vec<FleetKey>, Fault> {
    let bytes = files::read(dir, FLEET_KEY, Mode::Private)?;
    let text = String::from_utf8(bytes).map_err(|error| broken(dir, FLEET_KEY, error))?;
    let mut keys = Vec::new();
    for (at, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let (epoch, secret) = files::parse_key_line(line)
            .ok_or_else(|| broken(dir, FLEET_KEY, format!("line {} is no key", at + 1)))?;
        let epoch = KeyEpoch(epoch);
        if keys.last().is_some_and(|last: &FleetKey| last.epoch >= epoch) {
            return Err(broken(dir, FLEET_KEY, format!("line {}: epochs must rise", at + 1)));
        }
        keys.push(FleetKey { epoch, secret });
    }
    if keys.is_empty() {
        return Err(broken(dir, FLEET_KEY, "it holds no key"));
    }
    Ok(keys)
}

fn write_fleet_keys(dir: &Path, keys: &[FleetKey]) -> Result<(), Fault> {
    let lines: String =
        keys.iter().map(|key| format!("{} {}\n", key.epoch.0, files::hex(&key.secret))).collect();
    files::write(dir, FLEET_KEY, lines.as_bytes(), Mode::Private)
}
