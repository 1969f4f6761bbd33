//! One peer's certificate, private key and heartbeat key, as a directory holds them.

use std::{path::Path, time::SystemTime};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use wire::{
    Code, Fault,
    seal::{KeyEpoch, SenderKey},
};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::{
    files::{self, Mode, broken},
    peer::{Peer, server_name},
};

const CERT: &str = "cert.pem";
const KEY: &str = "key.pem";
const CA: &str = "ca.pem";
const BEAT_KEY: &str = "beat.key";

/// The key under which a role seals its datagrams, and the epoch it is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SenderKeys {
    /// The epoch.
    pub epoch: KeyEpoch,
    /// The key.
    pub key: SenderKey,
}

impl SenderKeys {
    /// Loads `beat.key`.
    ///
    /// # Errors
    /// [`Code::Config`], with what is wrong with the file.
    pub fn load(dir: &Path) -> Result<Self, Fault> {
        let bytes = files::read(dir, BEAT_KEY, Mode::Private)?;
        let line = std::str::from_utf8(&bytes).ok().and_then(files::parse_key_line);
        let (epoch, key) = line.ok_or_else(|| broken(dir, BEAT_KEY, "it is no key"))?;
        Ok(Self { epoch: KeyEpoch(epoch), key: SenderKey(key) })
    }

    /// Writes `beat.key`, durably: called again when a directive brings a new epoch.
    ///
    /// # Errors
    /// [`Code::Config`] if it cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), Fault> {
        let line = format!("{} {}\n", self.epoch.0, files::hex(&self.key.0));
        files::write(dir, BEAT_KEY, line.as_bytes(), Mode::Private)
    }
}

/// Who we are.
#[derive(Debug)]
pub struct Identity {
    /// Our name.
    pub peer: Peer,
    pub(super) cert: CertificateDer<'static>,
    pub(super) key: PrivateKeyDer<'static>,
    pub(super) ca: CertificateDer<'static>,
    /// What our datagrams are sealed with; none for people.
    pub beat: Option<SenderKeys>,
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self {
            peer: self.peer.clone(),
            cert: self.cert.clone(),
            key: self.key.clone_key(),
            ca: self.ca.clone(),
            beat: self.beat.clone(),
        }
    }
}

impl Identity {
    /// Loads `cert.pem`, `key.pem`, `ca.pem` and, for a role, `beat.key`, and checks that they are good now.
    ///
    /// # Errors
    /// [`Code::Config`] for a file that is missing, readable by others, or broken; [`Code::Unauthenticated`] for a
    /// certificate that has expired; [`Code::Clock`] for one that is not good yet.
    pub fn load(dir: &Path) -> Result<Self, Fault> {
        super::install_provider();
        let cert = CertificateDer::from_pem_slice(&files::read(dir, CERT, Mode::Public)?)
            .map_err(|error| broken(dir, CERT, error))?;
        let key = PrivateKeyDer::from_pem_slice(&files::read(dir, KEY, Mode::Private)?)
            .map_err(|error| broken(dir, KEY, error))?;
        let ca = CertificateDer::from_pem_slice(&files::read(dir, CA, Mode::Public)?)
            .map_err(|error| broken(dir, CA, error))?;
        let peer = peer_in(&cert).map_err(|fault| broken(dir, CERT, fault))?;
        check_time(&cert, SystemTime::now())?;
        let beat = peer.sender_id().map(|_| SenderKeys::load(dir)).transpose()?;
        Ok(Self { peer, cert, key, ca, beat })
    }

    /// Writes the files, private ones with mode 0600.
    ///
    /// # Errors
    /// [`Code::Config`] if the directory cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), Fault> {
        files::write(
            dir,
            KEY,
            files::pem("PRIVATE KEY", self.key.secret_der()).as_bytes(),
            Mode::Private,
        )?;
        if let Some(beat) = &self.beat {
            beat.save(dir)?;
        }
        files::write(dir, CA, files::pem("CERTIFICATE", &self.ca).as_bytes(), Mode::Public)?;
        files::write(dir, CERT, files::pem("CERTIFICATE", &self.cert).as_bytes(), Mode::Public)
    }
}

/// The peer that a certificate names first.
pub(super) fn peer_in(cert: &CertificateDer<'_>) -> Result<Peer, Fault> {
    let fault = |what: &str| Fault::new(Code::Unauthenticated, what.to_owned());
    let (_, cert) = X509Certificate::from_der(cert).map_err(|_| fault("it is no certificate"))?;
    let names = cert.subject_alternative_name().ok().flatten();
    let mut peers =
        names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
            GeneralName::DNSName(name) => Peer::parse(name),
            _ => None,
        });
    peers.next().ok_or_else(|| fault("the certificate names no peer of a fleet"))
}

fn check_time(cert: &CertificateDer<'_>, now: SystemTime) -> Result<(), Fault> {
    let Ok((_, parsed)) = X509Certificate::from_der(cert) else { return Ok(()) };
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let now = i64::try_from(now).unwrap_or(i64::MAX);
    let validity = parsed.validity();
    let peer = peer_in(cert).map(|peer| server_name(&peer)).unwrap_or_default();
    if now < validity.not_before.timestamp() {
        return Err(Fault::new(
            Code::Clock,
            format!(
                "the certificate of {peer} is good from {} on, which this machine's clock has not reached",
                validity.not_before
            ),
        ));
    }
    if now > validity.not_after.timestamp() {
        return Err(Fault::new(
            Code::Unauthenticated,
            format!("the certificate of {peer} expired on {}", validity.not_after),
        ));
    }
    Ok(())
}
