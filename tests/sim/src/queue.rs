//! What happens when: a heap of events by time, then by the order in which they were put.

use std::{
    cmp::{Ordering, Reverse},
    collections::BinaryHeap,
};

use crate::Micros;

/// Events to come.
#[derive(Debug)]
pub struct Queue<E> {
    heap: BinaryHeap<Reverse<Entry<E>>>,
    put: u64,
    now: Micros,
}

#[derive(Debug)]
struct Entry<E> {
    at: Micros,
    number: u64,
    event: E,
}

impl<E> PartialEq for Entry<E> {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl<E> Eq for Entry<E> {}

impl<E> PartialOrd for Entry<E> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> Ord for Entry<E> {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

impl<E> Default for Queue<E> {
    fn default() -> Self {
        Self { heap: BinaryHeap::new(), put: 0, now: 0 }
    }
}

impl<E> Queue<E> {
    /// The time of the event that was taken last.
    #[must_use]
    pub const fn now(&self) -> Micros {
        self.now
    }

    /// Puts an event; one of the past happens now.
    pub fn put(&mut self, at: Micros, event: E) {
        self.put += 1;
        self.heap.push(Reverse(Entry { at: at.max(self.now), number: self.put, event }));
    }

    /// Takes the next event up to `until`.
    pub fn take(&mut self, until: Micros) -> Option<E> {
        if self.heap.peek().is_none_or(|Reverse(next)| next.at > until) {
            self.now = self.now.max(until);
            return None;
        }
        let Reverse(next) = self.heap.pop()?;
        self.now = next.at;
        Some(next.event)
    }
}
