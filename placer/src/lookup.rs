//! Capacity out of the store: both candidates of a launch are read by key before it is sent (`lookup = "store"`).
//!
//! Two hosts are drawn from the map, their words are read at once, and the better one is reserved in the table like any other
//! pick; refusals correct the table as ever. A store that does not answer in time costs that time: then the pick
//! is made from what the table knows. This mode needs no feed, and is what the feed is compared with.

use std::{rc::Rc, time::Duration};

use heartbeat::store::Store;
use placer_core::{Picked, Select};
use wire::{CapacityWord, HostId, ShapeId};

use crate::worker::Worker;

/// Longest wait for the store.
const READ: Duration = Duration::from_millis(250);

/// Pairs that are drawn when none has room.
const ROUNDS: usize = 4;

impl Worker {
    /// A pick out of the store; `None` where the table must do.
    pub(crate) async fn pick_from_store(
        self: &Rc<Self>,
        store: &dyn Store,
        shape: ShapeId,
    ) -> Option<Picked> {
        for _ in 0..ROUNDS {
            let pair = self.draw_pair()?;
            let words = match tokio::time::timeout(READ, store.words(pair)).await {
                Ok(Ok(words)) => words,
                Ok(Err(error)) => {
                    tracing::debug!(%error, "the store was not read; the table is used");
                    return None;
                }
                Err(_) => return None,
            };
            if let Some(picked) = self.reserve_better(pair, words, shape) {
                return Some(picked);
            }
        }
        None
    }

    /// Two distinct hosts of the map, or the same twice if it has but one.
    fn draw_pair(&self) -> Option<[HostId; 2]> {
        self.with_map(|map| {
            let len = map.len() as u64;
            let below = |len: u64| {
                usize::try_from((u64::from(self.draw()) * len) >> 32).unwrap_or_default()
            };
            let first = below(len);
            let second = below(len.saturating_sub(1));
            let second = if len > 1 && second >= first { second + 1 } else { second };
            (len > 0).then(|| [map.id(first), map.id(second)])
        })
    }

    fn reserve_better(
        &self,
        pair: [HostId; 2],
        words: [Option<CapacityWord>; 2],
        shape: ShapeId,
    ) -> Option<Picked> {
        self.decide(|_, table| {
            let mut rooms = Vec::with_capacity(2);
            for (host, word) in pair.into_iter().zip(words) {
                if let Some(word) = word {
                    table.feed(host, word);
                }
                // What is known now: the store's word, or a younger one of the host itself.
                let Some((Some(word), reserved)) = table.get(host) else { continue };
                let room = word.usable(shape).saturating_sub(reserved.count(shape));
                rooms.push((room, host));
            }
            rooms.sort_unstable_by_key(|(room, _)| std::cmp::Reverse(*room));
            let slots = rooms.into_iter().filter_map(|(_, host)| table.slot_of(host));
            let select = Select::default();
            slots.into_iter().find_map(|slot| select.pick_other(table, slot, shape, &[]))
        })
    }
}
