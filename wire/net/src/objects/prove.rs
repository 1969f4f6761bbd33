//! A trial of a store's compare-and-swap: many writers, one winner a round.
//!
//! The fleet's map is as safe as this. Some stores that speak S3 let several writers win (FAULTS M4); an operator
//! finds out with `volley doctor objects` before the fleet does.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::future::join_all;
use object_store::{ObjectStore, ObjectStoreExt as _, UpdateVersion, path::Path};
use rand::{TryRngCore as _, rngs::OsRng};
use wire::{Code, Fault};

use super::{Swap, fault, read, swap};

const WRITERS: usize = 16;

/// What a trial saw. [`CasReport::holds`] is the verdict.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct CasReport {
    /// Writers that raced in each round.
    pub writers: usize,
    /// Rounds; every other one creates an object, the rest replace one.
    pub rounds: usize,
    /// Rounds with exactly one winner, whose bytes were there afterwards.
    pub good: usize,
    /// Rounds in which more than one writer was told that it won.
    pub doubled: usize,
    /// Rounds that nobody won, though every writer was answered.
    pub unwon: usize,
    /// Rounds whose winner's bytes were not there afterwards.
    pub overwritten: usize,
    /// Swaps whose outcome stayed unknown.
    pub unknown: usize,
    /// What it took.
    pub took: Duration,
}

impl CasReport {
    /// Whether the store may hold a fleet's map.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.good == self.rounds
    }
}

/// Races 16 writers for `rounds` rounds on objects of its own, under `prove/`, and removes them.
///
/// # Errors
/// [`Code::Storage`] if the store does not serve.
pub async fn prove(store: &Arc<dyn ObjectStore>, rounds: usize) -> Result<CasReport, Fault> {
    let mut nonce = [0; 8];
    OsRng.try_fill_bytes(&mut nonce).map_err(|e| Fault::new(Code::Internal, e.to_string()))?;
    let nonce = u64::from_le_bytes(nonce);
    let started = Instant::now();
    let mut report = CasReport {
        writers: WRITERS,
        rounds,
        good: 0,
        doubled: 0,
        unwon: 0,
        overwritten: 0,
        unknown: 0,
        took: Duration::ZERO,
    };
    for pair in 0..rounds.div_ceil(2) {
        let path = Path::from(format!("prove/{nonce:016x}-{pair}"));
        let mut version = None;
        for round in (pair * 2)..rounds.min(pair * 2 + 2) {
            version = one_round(store, &path, version, (nonce, round), &mut report).await?;
        }
        let _ = store.delete(&path).await;
    }
    report.took = started.elapsed();
    Ok(report)
}

async fn one_round(
    store: &Arc<dyn ObjectStore>,
    path: &Path,
    expected: Option<UpdateVersion>,
    (nonce, round): (u64, usize),
    report: &mut CasReport,
) -> Result<Option<UpdateVersion>, Fault> {
    let bytes = |writer: usize| format!("{nonce:016x} {round} {writer}").into_bytes();
    let race = (0..WRITERS).map(|writer| {
        let (store, path, expected) = (Arc::clone(store), path.clone(), expected.clone());
        let bytes = bytes(writer).into();
        tokio::spawn(async move { swap(&*store, &path, expected, bytes).await })
    });
    let mut winners = Vec::new();
    let mut unknown = 0;
    for (writer, outcome) in join_all(race).await.into_iter().enumerate() {
        match outcome.map_err(|e| Fault::new(Code::Internal, e.to_string()))? {
            Ok(Swap::Won(_)) => winners.push(writer),
            Ok(Swap::Lost) => {}
            Err(_) => unknown += 1,
        }
    }
    report.unknown += unknown;
    let there = read(&**store, path).await?;
    let (there, version) = there.ok_or_else(|| {
        fault(&object_store::Error::Generic {
            store: "prove",
            source: "all writers were answered and no object is there".into(),
        })
    })?;
    match winners[..] {
        [winner] if there == bytes(winner) => report.good += 1,
        [_] => report.overwritten += 1,
        [] if unknown == 0 => report.unwon += 1,
        [] => {}
        _ => report.doubled += 1,
    }
    Ok(Some(version))
}
