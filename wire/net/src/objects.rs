//! Object stores: where the host map and the images are.
//!
//! A store is named by a URL ([`open`]): a directory with a compare-and-swap of our own, S3 or what speaks like it,
//! or memory. The map's safety rests on [`swap`], so [`prove`] tries a store before it is trusted. An outcome that
//! nobody saw is [`SwapUnknown`], never an error or a success.

mod dir;
mod prove;

use std::{
    collections::HashMap,
    path::Path as FsPath,
    sync::{Arc, LazyLock, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use object_store::{
    ClientOptions, Error, ObjectStore, ObjectStoreExt as _, PutMode, RetryConfig,
    aws::AmazonS3Builder, memory::InMemory, path::Path, prefix::PrefixStore,
};
use wire::{Code, Fault};

pub use dir::{DirStore, HASHED_BYTES_MAX};
pub use object_store::{self, UpdateVersion};
pub use prove::{CasReport, prove};

/// A request is given up after this; a conditional one is then of unknown outcome.
const REQUEST: Duration = Duration::from_secs(20);
const CONNECT: Duration = Duration::from_secs(2);
/// Short: the callers have better retries, which know what they want.
const RETRIES_MAX: usize = 2;
const RETRY: Duration = Duration::from_secs(5);

/// Opens the store that a URL names:
/// - `dir:///var/lib/volley/objects`
/// - `s3://bucket/prefix?endpoint=http://127.0.0.1:9000&region=us-east-1`, keys from `AWS_ACCESS_KEY_ID` and
///   `AWS_SECRET_ACCESS_KEY` or what else AWS clients look at
/// - `mem://` (new each time) or `mem://name` (one a name in this process)
///
/// # Errors
/// [`Code::Config`] for a URL that names no store, [`Code::Storage`] if a directory cannot be made.
pub fn open(url: &str) -> Result<Arc<dyn ObjectStore>, Fault> {
    crate::tls::install_provider();
    match url.split_once("://") {
        Some(("dir", path)) if path.starts_with('/') => {
            Ok(Arc::new(DirStore::open(FsPath::new(path))?))
        }
        Some(("mem", "")) => Ok(Arc::new(InMemory::new())),
        Some(("mem", name)) => Ok(memory(name)),
        Some(("s3", rest)) => open_s3(url, rest),
        _ => {
            Err(bad_url(url, "use dir:///path, s3://bucket/prefix?endpoint=..&region=.. or mem://"))
        }
    }
}

fn bad_url(url: &str, why: impl std::fmt::Display) -> Fault {
    Fault::new(Code::Config, format!("{url:?} names no object store: {why}"))
}

fn memory(name: &str) -> Arc<InMemory> {
    static STORES: LazyLock<Mutex<HashMap<String, Arc<InMemory>>>> = LazyLock::new(Mutex::default);
    let mut stores = STORES.lock().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(stores.entry(name.to_owned()).or_default())
}

fn open_s3(url: &str, rest: &str) -> Result<Arc<dyn ObjectStore>, Fault> {
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
    if bucket.is_empty() {
        return Err(bad_url(url, "it has no bucket"));
    }
    let mut builder = AmazonS3Builder::from_env().with_bucket_name(bucket);
    let mut plain_http = false;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        builder = match pair.split_once('=') {
            Some(("endpoint", endpoint)) => {
                plain_http = endpoint.starts_with("http://");
                builder.with_endpoint(endpoint)
            }
            Some(("region", region)) => builder.with_region(region),
            _ => return Err(bad_url(url, format!("unknown setting {pair:?}"))),
        };
    }
    let client = ClientOptions::new()
        .with_allow_http(plain_http)
        .with_timeout(REQUEST)
        .with_connect_timeout(CONNECT);
    let retry =
        RetryConfig { max_retries: RETRIES_MAX, retry_timeout: RETRY, ..RetryConfig::default() };
    let store = builder
        .with_client_options(client)
        .with_retry(retry)
        .build()
        .map_err(|error| bad_url(url, error))?;
    if prefix.is_empty() {
        return Ok(Arc::new(store));
    }
    let prefix = Path::parse(prefix).map_err(|error| bad_url(url, error))?;
    Ok(Arc::new(PrefixStore::new(store, prefix)))
}

/// An object store's error with a code to act on.
#[must_use]
pub fn fault(error: &Error) -> Fault {
    let code = match error {
        Error::NotFound { .. } => Code::NotFound,
        Error::InvalidPath { .. } => Code::BadRequest,
        _ => Code::Storage,
    };
    Fault::new(code, format!("object store: {error}"))
}

/// An object's bytes and the version to swap it by; `None` if there is no such object.
///
/// # Errors
/// [`Code::Storage`].
pub async fn read(
    store: &dyn ObjectStore,
    path: &Path,
) -> Result<Option<(Bytes, UpdateVersion)>, Fault> {
    match store.get(path).await {
        Ok(got) => {
            let version =
                UpdateVersion { e_tag: got.meta.e_tag.clone(), version: got.meta.version.clone() };
            let bytes = got.bytes().await.map_err(|error| fault(&error))?;
            Ok(Some((bytes, version)))
        }
        Err(Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(fault(&error)),
    }
}

/// The outcome of a compare-and-swap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Swap {
    /// The object has our bytes, in this version.
    Won(UpdateVersion),
    /// Another version than the expected one was there; ours was not written.
    Lost,
}

/// A swap that may have happened or not, or may still happen: read the object and look for your own bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the swap may have happened or not: {0}")]
pub struct SwapUnknown(pub Fault);

/// Writes an object if it is still in the version `expected` (`None`: if there is none).
///
/// `bytes` must be this writer's alone (hold a nonce): after a lost reply, bytes that equal ours tell that we won,
/// for a store or its client may have answered a retry of the very request that won with "precondition failed".
///
/// # Errors
/// [`SwapUnknown`] if the store did not answer, and asking again did not settle it.
pub async fn swap(
    store: &dyn ObjectStore,
    path: &Path,
    expected: Option<UpdateVersion>,
    bytes: Bytes,
) -> Result<Swap, SwapUnknown> {
    let mode = expected.clone().map_or(PutMode::Create, PutMode::Update);
    let error = match store.put_opts(path, bytes.clone().into(), mode.into()).await {
        Ok(put) => return Ok(Swap::Won(UpdateVersion { e_tag: put.e_tag, version: put.version })),
        Err(error) => error,
    };
    let refused = matches!(
        error,
        Error::Precondition { .. } | Error::AlreadyExists { .. } | Error::NotFound { .. }
    );
    let there = read(store, path).await.map_err(|_| SwapUnknown(fault(&error)))?;
    match there {
        Some((there, version)) if there == bytes => Ok(Swap::Won(version)),
        _ if refused => Ok(Swap::Lost),
        // Another's version is there, so ours can no longer be written.
        Some((_, version)) if expected.as_ref().is_none_or(|old| *old != version) => Ok(Swap::Lost),
        // What was there is there: our request may be under way yet.
        _ => Err(SwapUnknown(fault(&error))),
    }
}
