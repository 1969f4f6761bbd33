//! The fleet's state outside any process: a trait with two real stores behind it.
//!
//! Queries are planned once, and there are no others: upsert a batch of one partition, read two words by key, scan in
//! parts, take the lease, keep drains, keep and read a partition of a tenant's sandboxes. All writes of one host are ordered by [`Row::written`], and a store keeps the
//! highest: so an older heartbeat never overwrites a newer one, whoever writes last (DESIGN 1, invariant 3).

pub mod embedded;
mod late;
pub mod listed;
mod place;
mod said;
pub mod scylla;

use std::sync::Arc;

use futures::future::BoxFuture;
use heartbeat_core::{Drain, Row, shard::upkeep::Silent, shard::writes::Batch};
use tokio_util::sync::CancellationToken;
use wire::{CapacityWord, Code, Fault, HostId};

/// Why a store did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The setting names no store.
    #[error("{0}")]
    Config(String),
    /// Another process has the file.
    #[error("{0} is open in another process, which goes on using it")]
    Busy(String),
    /// No tables yet.
    #[error("the store at {0} has no tables of ours: run `volley store init`")]
    NoSchema(String),
    /// It did not answer, or not in time. A write may have happened; writing again is safe.
    #[error("the store did not serve: {0}")]
    Away(String),
    /// What it holds cannot be read.
    #[error("the store holds what this build cannot read: {0}")]
    Broken(String),
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        let code = match &error {
            StoreError::Config(_) | StoreError::NoSchema(_) => Code::Config,
            StoreError::Busy(_) => Code::Busy,
            StoreError::Away(_) | StoreError::Broken(_) => Code::Storage,
        };
        Self::new(code, error.to_string())
    }
}

/// A future of a store.
pub type Doing<'a, T> = BoxFuture<'a, Result<T, StoreError>>;

/// The fleet's state.
pub trait Store: Send + Sync {
    /// Whether other aggregators write to it too, so that a scan tells something new.
    fn shared(&self) -> bool;

    /// Writes the rows of one partition. Acknowledged means written.
    fn upsert<'a>(&'a self, batch: &'a Batch) -> Doing<'a, ()>;

    /// Removes hosts, unless they have been heard of since.
    fn remove<'a>(&'a self, gone: &'a [Silent]) -> Doing<'a, ()>;

    /// The words of both candidates of a launch, at once.
    fn words(&self, hosts: [HostId; 2]) -> Doing<'_, [Option<CapacityWord>; 2]>;

    /// How many parts a scan has.
    fn scan_parts(&self) -> u32;

    /// All rows of one part.
    fn scan(&self, part: u32) -> Doing<'_, Vec<Row>>;

    /// Takes or renews the publisher's lease for `ttl_ms`; whether it is ours now.
    fn lease(&self, aggregator: u64, ttl_ms: u64) -> Doing<'_, bool>;

    /// All drains.
    fn drains(&self) -> Doing<'_, Vec<Drain>>;

    /// Makes a drain durable.
    fn set_drain<'a>(&'a self, drain: &'a Drain) -> Doing<'a, ()>;

    /// Ends one.
    fn clear_drain(&self, host: HostId) -> Doing<'_, ()>;

    /// Writes records of sandboxes, all of one tenant and partition ([`listed::Kept::partition`]). Newer ones stay
    /// (PROTOCOL 9.2), and each is gone `RECORD_LIVES_MS` after it was written.
    fn keep_sandboxes<'a>(&'a self, batch: &'a [listed::Kept]) -> Doing<'a, ()>;

    /// Up to `max` records of one partition of a tenant.
    fn sandboxes<'a>(
        &'a self,
        tenant: &'a str,
        partition: u8,
        max: usize,
    ) -> Doing<'a, Vec<listed::Kept>>;

    /// Checks that it is there and has what we need; what was found, for a person.
    fn check(&self) -> Doing<'_, String>;
}

/// Opens the store that a setting names: `embedded:///path` or `scylla://host:port[,host:port]/keyspace`.
///
/// # Errors
/// [`StoreError`].
pub async fn open(url: &str) -> Result<Arc<dyn Store>, StoreError> {
    match url.split_once("://") {
        Some(("embedded", path)) if path.starts_with('/') => {
            Ok(Arc::new(embedded::EmbeddedStore::open(path.as_ref())?))
        }
        Some(("scylla", place)) => Ok(Arc::new(scylla::ScyllaStore::open(place).await?)),
        _ => Err(bad(url)),
    }
}

/// Opens a store for an aggregator, which must come up without its database: one that does not answer is connected to in
/// the background, until `stop`. See [`StoreError::Away`].
///
/// # Errors
/// [`StoreError`], but for [`StoreError::Away`] of a database.
pub async fn open_or_wait(
    url: &str,
    stop: CancellationToken,
) -> Result<Arc<dyn Store>, StoreError> {
    match url.split_once("://") {
        Some(("scylla", place)) => {
            place::check(place)?;
            let place: Arc<str> = place.into();
            let open = move || {
                let place = Arc::clone(&place);
                async move {
                    let store: Arc<dyn Store> = Arc::new(scylla::ScyllaStore::open(&place).await?);
                    Ok(store)
                }
            };
            Ok(Arc::new(late::LateStore::open(open, stop).await?))
        }
        _ => open(url).await,
    }
}

/// Makes the tables of a store, where they are not there yet.
///
/// # Errors
/// [`StoreError`].
pub async fn init(url: &str, replicas: u32) -> Result<(), StoreError> {
    match url.split_once("://") {
        Some(("embedded", path)) if path.starts_with('/') => {
            embedded::EmbeddedStore::open(path.as_ref()).map(drop)
        }
        Some(("scylla", place)) => scylla::init(place, replicas).await,
        _ => Err(bad(url)),
    }
}

/// Opens a store and checks it; what was found, for a person.
///
/// # Errors
/// [`StoreError`].
pub async fn check(url: &str) -> Result<String, StoreError> {
    // Opening an embedded store makes it; looking at one must not.
    let file = url.strip_prefix("embedded://");
    if file.is_some_and(|file| file.starts_with('/') && !std::path::Path::new(file).exists()) {
        return Err(StoreError::NoSchema(url.to_owned()));
    }
    open(url).await?.check().await
}

fn bad(url: &str) -> StoreError {
    StoreError::Config(format!(
        "{url:?} names no store: use embedded:///path or scylla://host:port[,host:port]/keyspace"
    ))
}
