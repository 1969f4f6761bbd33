//! Images out of a registry: manifests and blobs by oci-client, and every byte held against its digest here as well.
//!
//! Layers stream: what was received waits for the reader in a bounded queue, and the registry waits for the queue.

use std::io::{self, Read};

use bytes::Bytes;
use futures::StreamExt;
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::manifest::OciDescriptor;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use oci_spec::image::Digest;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use crate::limits::OCI_JSON_BYTES_MAX;
use crate::oci::{
    LayerSource, LayeredImage, bad, check_json, layered, parse_index, parse_manifest, pick,
};
use crate::refuse::PrepareError;

/// Parts of a layer that wait for the reader.
const QUEUE: usize = 32;

/// How to speak with a registry.
#[derive(Clone, Default)]
pub struct RegistryAccess {
    /// User and password or token; none for public images.
    pub login: Option<(String, String)>,
    /// Speak plain HTTP. For registries on this machine and in tests.
    pub plain_http: bool,
}

impl std::fmt::Debug for RegistryAccess {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let user = self.login.as_ref().map(|(user, _)| user);
        f.debug_struct("RegistryAccess")
            .field("user", &user)
            .field("plain_http", &self.plain_http)
            .finish()
    }
}

/// A registry, asked from a thread that may block.
pub(crate) struct Registry {
    client: Client,
    reference: Reference,
    auth: RegistryAuth,
    runtime: Handle,
}

fn failed(what: &str, error: impl std::fmt::Display) -> PrepareError {
    PrepareError::Registry(format!("{what}: {error}"))
}

const MANIFEST_TYPES: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

impl Registry {
    pub(crate) fn new(
        reference: &str,
        access: &RegistryAccess,
        runtime: Handle,
    ) -> Result<Self, PrepareError> {
        let reference: Reference = reference.parse().map_err(|e| failed(reference, e))?;
        let protocol = if access.plain_http { ClientProtocol::Http } else { ClientProtocol::Https };
        let client = Client::new(ClientConfig { protocol, ..ClientConfig::default() });
        let auth = match &access.login {
            Some((user, secret)) => RegistryAuth::Basic(user.clone(), secret.clone()),
            None => RegistryAuth::Anonymous,
        };
        Ok(Self { client, reference, auth, runtime })
    }

    /// The image for a processor, its layers still in the registry.
    pub(crate) fn image(&self, arch: &str) -> Result<LayeredImage, PrepareError> {
        let mut bytes = self.manifest(&self.reference)?;
        if is_index(&bytes)? {
            let index = parse_index(&bytes)?;
            let digest = pick(&index, arch)?.digest().clone();
            let reference = self.reference.clone_with_digest(digest.to_string());
            bytes = self.manifest(&reference)?;
            check_json(&bytes, &digest)?;
        }
        let manifest = parse_manifest(&bytes)?;
        let config = manifest.config();
        let mut raw = Vec::new();
        let reader = self.open(config.digest().as_ref(), config.size())?;
        reader
            .take(OCI_JSON_BYTES_MAX)
            .read_to_end(&mut raw)
            .map_err(|e| PrepareError::read("the image's config", e))?;
        check_json(&raw, config.digest())?;
        layered(&manifest, &raw, arch, |digest: &Digest| Ok(digest.to_string()))
    }

    fn manifest(&self, reference: &Reference) -> Result<Vec<u8>, PrepareError> {
        let pull = self.client.pull_manifest_raw(reference, &self.auth, &MANIFEST_TYPES);
        let (bytes, _) =
            self.runtime.block_on(pull).map_err(|e| failed(&reference.to_string(), e))?;
        if bytes.len() as u64 > OCI_JSON_BYTES_MAX {
            return Err(bad("a manifest longer than 4 MiB"));
        }
        if let Some(digest) = reference.digest() {
            check_json(&bytes, &digest.parse().map_err(|e| failed("the digest", e))?)?;
        }
        Ok(bytes.to_vec())
    }

    /// The bytes of a layer.
    pub(crate) fn layer(&self, layer: &LayerSource) -> Result<Box<dyn Read>, PrepareError> {
        let bytes = layer.bytes.unwrap_or(0);
        Ok(Box::new(self.open(&layer.name, bytes)?))
    }

    fn open(&self, digest: &str, bytes: u64) -> Result<Received, PrepareError> {
        let size = i64::try_from(bytes).unwrap_or(i64::MAX);
        let descriptor = OciDescriptor { digest: digest.to_owned(), size, ..Default::default() };
        let pull = self.client.pull_blob_stream(&self.reference, &descriptor);
        let mut stream = self.runtime.block_on(pull).map_err(|e| failed(digest, e))?.stream;
        let (sender, receiver) = mpsc::channel(QUEUE);
        self.runtime.spawn(async move {
            while let Some(part) = stream.next().await {
                // The reader gave up.
                if sender.send(part).await.is_err() {
                    return;
                }
            }
        });
        // No blob is longer than what names it says, whatever the registry sends.
        Ok(Received { receiver, part: Bytes::new(), left: bytes })
    }
}

fn is_index(bytes: &[u8]) -> Result<bool, PrepareError> {
    let json: serde_json::Value = serde_json::from_slice(bytes)
        .map_err(|e| bad(format!("a manifest that does not parse: {e}")))?;
    Ok(json.get("manifests").is_some())
}

/// What was received of a blob.
struct Received {
    receiver: mpsc::Receiver<io::Result<Bytes>>,
    part: Bytes,
    left: u64,
}

impl Read for Received {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.part.is_empty() {
            match self.receiver.blocking_recv() {
                Some(part) => self.part = part?,
                None => return Ok(0),
            }
        }
        let n = buffer.len().min(self.part.len());
        self.left = self.left.checked_sub(n as u64).ok_or_else(|| {
            io::Error::from(crate::Refusal::new(
                crate::Rule::Digest,
                b"",
                "a blob longer than what names it says",
            ))
        })?;
        buffer[..n].copy_from_slice(&self.part.split_to(n));
        Ok(n)
    }
}
