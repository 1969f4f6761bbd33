//! A store that may not be there yet.
//!
//! An aggregator that starts while its database is away must hear hosts and feed placers all the same. So connecting goes
//! on behind it, with back-off and for as long as it takes; until then every question is answered [`StoreError::Away`],
//! which every caller knows from outages. What no waiting mends (a setting, missing tables) is said at the start, if
//! the database answers at all by then.

use std::{sync::Arc, time::Duration};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use futures::FutureExt as _;
use heartbeat_core::{
    Drain, Row,
    shard::{upkeep::Silent, writes::Batch},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use wire::{CapacityWord, HostId};

use super::{Doing, Store, StoreError, listed::Kept};

/// A database that is up answers within this; an aggregator then starts with all that it holds.
const PATIENCE: Duration = Duration::from_secs(3);
/// First and longest pause between two tries. Ten seconds is what a fleet's aggregators may come back later than their
/// database, and seldom enough not to hinder it.
const PAUSE: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(10);

type Opened = Option<Result<Arc<dyn Store>, StoreError>>;

/// See the module.
pub(super) struct LateStore {
    opened: watch::Receiver<Opened>,
}

impl LateStore {
    /// Opens with `open`, again and again until it succeeds or `stop`; returns after the first success, or a few seconds.
    ///
    /// # Errors
    /// What waiting does not mend.
    pub(super) async fn open<F, D>(open: F, stop: CancellationToken) -> Result<Self, StoreError>
    where
        F: Fn() -> D + Send + Sync + 'static,
        D: Future<Output = Result<Arc<dyn Store>, StoreError>> + Send,
    {
        let (tell, mut opened) = watch::channel(None);
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = connect(open, tell) => {}
            }
        });
        let answered =
            opened.wait_for(|opened| !matches!(opened, None | Some(Err(StoreError::Away(_)))));
        if let Ok(Ok(answer)) = tokio::time::timeout(PATIENCE, answered).await
            && let Some(Err(error)) = &*answer
        {
            return Err(error.clone());
        }
        Ok(Self { opened })
    }

    fn store(&self) -> Result<Arc<dyn Store>, StoreError> {
        match &*self.opened.borrow() {
            Some(opened) => opened.clone(),
            None => Err(StoreError::Away("it has not answered yet".to_owned())),
        }
    }
}

/// Tries until `open` succeeds, and tells each outcome.
async fn connect<F, D>(open: F, tell: watch::Sender<Opened>)
where
    F: Fn() -> D,
    D: Future<Output = Result<Arc<dyn Store>, StoreError>>,
{
    let pauses = ExponentialBuilder::default()
        .with_min_delay(PAUSE)
        .with_max_delay(PAUSE_MAX)
        .with_jitter()
        .without_max_times();
    let mut said = None;
    for pause in pauses.build() {
        let opened = open().await;
        let error = opened.as_ref().err().cloned();
        tell.send_replace(Some(opened));
        let Some(error) = error else {
            if said.is_some() {
                tracing::info!("the store is there");
            }
            return;
        };
        if said.as_ref() != Some(&error) {
            tracing::warn!(%error, "the store is not open yet; trying again");
        }
        said = Some(error);
        tokio::time::sleep(pause).await;
    }
}

impl Store for LateStore {
    fn shared(&self) -> bool {
        true
    }

    fn upsert<'a>(&'a self, batch: &'a Batch) -> Doing<'a, ()> {
        async move { self.store()?.upsert(batch).await }.boxed()
    }

    fn remove<'a>(&'a self, gone: &'a [Silent]) -> Doing<'a, ()> {
        async move { self.store()?.remove(gone).await }.boxed()
    }

    fn words(&self, hosts: [HostId; 2]) -> Doing<'_, [Option<CapacityWord>; 2]> {
        async move { self.store()?.words(hosts).await }.boxed()
    }

    /// One until it is there: to scan it fails, as it must.
    fn scan_parts(&self) -> u32 {
        self.store().map_or(1, |store| store.scan_parts())
    }

    fn scan(&self, part: u32) -> Doing<'_, Vec<Row>> {
        async move { self.store()?.scan(part).await }.boxed()
    }

    fn lease(&self, aggregator: u64, ttl_ms: u64) -> Doing<'_, bool> {
        async move { self.store()?.lease(aggregator, ttl_ms).await }.boxed()
    }

    fn drains(&self) -> Doing<'_, Vec<Drain>> {
        async move { self.store()?.drains().await }.boxed()
    }

    fn set_drain<'a>(&'a self, drain: &'a Drain) -> Doing<'a, ()> {
        async move { self.store()?.set_drain(drain).await }.boxed()
    }

    fn clear_drain(&self, host: HostId) -> Doing<'_, ()> {
        async move { self.store()?.clear_drain(host).await }.boxed()
    }

    fn keep_sandboxes<'a>(&'a self, batch: &'a [Kept]) -> Doing<'a, ()> {
        async move { self.store()?.keep_sandboxes(batch).await }.boxed()
    }

    fn sandboxes<'a>(&'a self, tenant: &'a str, partition: u8, max: usize) -> Doing<'a, Vec<Kept>> {
        async move { self.store()?.sandboxes(tenant, partition, max).await }.boxed()
    }

    fn check(&self) -> Doing<'_, String> {
        async move { self.store()?.check().await }.boxed()
    }
}
