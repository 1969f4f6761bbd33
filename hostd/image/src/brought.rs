//! Bytes that a boot pack brought before they were asked for, and those that it will bring in a moment.
//!
//! A read of what is on its way waits for it instead of fetching it a second time: the link is what a cold start is
//! short of. It waits only as long as the pack makes progress. Left out: where packs come from (`push`).

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

/// Bytes of all packs that are kept for reads. One that has no room is pushed all the same.
const BROUGHT_BYTES_MAX: usize = 256 << 20;

/// A pack that has brought nothing for this long is not waited for.
pub(crate) const PATIENCE: Duration = Duration::from_millis(250);

/// A piece of a node.
#[derive(Debug, Clone)]
enum Piece {
    Here(Bytes),
    Promised { len: usize, part: usize, progress: watch::Receiver<usize> },
}

impl Piece {
    fn len(&self) -> usize {
        match self {
            Self::Here(bytes) => bytes.len(),
            Self::Promised { len, .. } => *len,
        }
    }
}

/// How a stretch of a read can be answered.
#[derive(Debug)]
pub(crate) enum Cover {
    Here(Bytes),
    /// Comes with a part of a pack.
    Promised {
        at: u64,
        end: u64,
        wait: Wait,
    },
    /// Nobody brings it.
    Gap {
        at: u64,
        end: u64,
    },
}

/// What a read waits for.
#[derive(Debug)]
pub(crate) struct Wait {
    part: usize,
    progress: watch::Receiver<usize>,
}

impl Wait {
    /// Returns when the part is here, or is not to be waited for any more.
    pub(crate) async fn done(mut self) {
        while *self.progress.borrow_and_update() <= self.part {
            match tokio::time::timeout(PATIENCE, self.progress.changed()).await {
                Ok(Ok(())) => {}
                // The pack failed, or makes no progress.
                _ => return,
            }
        }
    }
}

#[derive(Debug, Default)]
struct Shelf {
    nodes: HashMap<u64, BTreeMap<u64, Piece>>,
    bytes: usize,
    /// The pack that was promised last: its last part, and how far it is.
    coming: Option<(usize, watch::Receiver<usize>)>,
}

impl Shelf {
    fn remove(&mut self, node: u64, at: u64) {
        if let Some(pieces) = self.nodes.get_mut(&node) {
            if let Some(piece) = pieces.remove(&at) {
                self.bytes -= piece.len();
            }
            if pieces.is_empty() {
                self.nodes.remove(&node);
            }
        }
    }
}

/// By node and offset.
#[derive(Debug, Default)]
pub(crate) struct Brought {
    shelf: Mutex<Shelf>,
}

impl Brought {
    fn lock(&self) -> MutexGuard<'_, Shelf> {
        // The shelf is whole between any two statements that hold the lock.
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what a pack's parts will bring: node, place, length and part. `false` when there is no room to keep it.
    pub(crate) fn promise(
        &self,
        spans: impl Iterator<Item = (u64, u64, usize, usize)> + Clone,
        progress: &watch::Receiver<usize>,
    ) -> bool {
        let mut shelf = self.lock();
        let all: usize = spans.clone().map(|(_, _, len, _)| len).sum();
        if shelf.bytes + all > BROUGHT_BYTES_MAX {
            return false;
        }
        let last = spans.clone().map(|(_, _, _, part)| part).max();
        shelf.coming = last.map(|last| (last, progress.clone()));
        for (node, at, len, part) in spans {
            let pieces = shelf.nodes.entry(node).or_default();
            // What another pack brought already is as good.
            if let Entry::Vacant(place) = pieces.entry(at) {
                place.insert(Piece::Promised { len, part, progress: progress.clone() });
                shelf.bytes += len;
            }
        }
        true
    }

    /// A piece that was promised is here.
    pub(crate) fn keep(&self, node: u64, at: u64, bytes: Bytes) {
        let mut shelf = self.lock();
        if let Some(piece) = shelf.nodes.get_mut(&node).and_then(|pieces| pieces.get_mut(&at))
            && piece.len() == bytes.len()
        {
            *piece = Piece::Here(bytes);
        }
    }

    /// A piece is needed no more, or does not come.
    pub(crate) fn remove(&self, pieces: impl Iterator<Item = (u64, u64)>) {
        let mut shelf = self.lock();
        pieces.for_each(|(node, at)| shelf.remove(node, at));
    }

    /// The first part on its way that brings anything of a node, if one does: with it comes the node's size.
    pub(crate) fn first_of(&self, node: u64) -> Option<Wait> {
        let shelf = self.lock();
        let pieces = shelf.nodes.get(&node)?.values();
        let promised = pieces.filter_map(|piece| match piece {
            Piece::Promised { part, progress, .. } => Some((part, progress)),
            Piece::Here(_) => None,
        });
        let (part, progress) = promised.min_by_key(|(part, _)| **part)?;
        Some(Wait { part: *part, progress: progress.clone() })
    }

    /// The last part of the pack that was promised last, if that is still on its way.
    pub(crate) fn last(&self) -> Option<Wait> {
        let shelf = self.lock();
        let (last, progress) = shelf.coming.as_ref()?;
        let comes = *progress.borrow() <= *last && progress.has_changed().is_ok();
        comes.then(|| Wait { part: *last, progress: progress.clone() })
    }

    /// How the bytes from `at` up to `end` can be answered, in order.
    pub(crate) fn cover(&self, node: u64, at: u64, end: u64) -> Vec<Cover> {
        let shelf = self.lock();
        let Some(pieces) = shelf.nodes.get(&node) else { return vec![Cover::Gap { at, end }] };
        let mut out = Vec::new();
        let mut at = at;
        while at < end {
            let piece = pieces
                .range(..=at)
                .next_back()
                .filter(|(start, piece)| **start + piece.len() as u64 > at);
            let Some((start, piece)) = piece else {
                let next = pieces.range(at..).next().map_or(end, |(next, _)| end.min(*next));
                out.push(Cover::Gap { at, end: next });
                at = next;
                continue;
            };
            let until = end.min(start + piece.len() as u64);
            match piece {
                Piece::Here(bytes) => {
                    let place = |n: u64| usize::try_from(n - start).unwrap_or(usize::MAX);
                    out.push(Cover::Here(bytes.slice(place(at)..place(until))));
                }
                Piece::Promised { part, progress, .. } => {
                    let wait = Wait { part: *part, progress: progress.clone() };
                    out.push(Cover::Promised { at, end: until, wait });
                }
            }
            at = until;
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(covers: &[Cover]) -> Vec<String> {
        let line = |cover: &Cover| match cover {
            Cover::Here(bytes) => format!("here {}", bytes.len()),
            Cover::Promised { at, end, .. } => format!("promised {at}-{end}"),
            Cover::Gap { at, end } => format!("gap {at}-{end}"),
        };
        covers.iter().map(line).collect()
    }

    #[tokio::test]
    async fn a_read_is_cut_into_what_is_here_what_comes_and_the_rest() {
        let brought = Brought::default();
        let (parts, progress) = watch::channel(0);
        let spans = [(7, 4096, 4096, 0), (7, 8192, 100, 1), (8, 0, 10, 1)];
        assert!(brought.promise(spans.into_iter(), &progress));
        brought.keep(7, 4096, Bytes::from(vec![1; 4096]));
        let covers = brought.cover(7, 0, 9000);
        let want = ["gap 0-4096", "here 4096", "promised 8192-8292", "gap 8292-9000"];
        assert_eq!(told(&covers), want);
        assert_eq!(told(&brought.cover(9, 5, 6)), ["gap 5-6"]);
        let Some(Cover::Promised { wait, .. }) = covers.into_iter().nth(2) else { panic!() };
        // Ends when the part comes, and when the pack fails.
        parts.send(2).unwrap();
        wait.done().await;
        let Cover::Promised { wait, .. } = brought.cover(8, 0, 5).remove(0) else { panic!() };
        drop(parts);
        wait.done().await;
        brought.remove([(7, 4096), (7, 8192), (8, 0)].into_iter());
        assert_eq!(told(&brought.cover(7, 0, 9000)), ["gap 0-9000"]);
        assert_eq!(brought.lock().bytes, 0);
    }
}
