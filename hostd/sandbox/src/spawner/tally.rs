//! How many boxes of each shape are in each state, and which are ready: kept as boxes change, so that
//! a launch looks at no list of all boxes.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::boxes::State;

/// All shapes.
pub(super) struct Tally(RefCell<Vec<Rc<OfShape>>>);

#[derive(Default)]
struct OfShape {
    counts: [Cell<usize>; State::ALL.len()],
    ready: RefCell<Vec<u32>>,
}

impl Tally {
    pub(super) fn new(shapes: usize) -> Rc<Self> {
        let tally = Rc::new(Self(RefCell::new(Vec::new())));
        tally.grow(shapes);
        tally
    }

    /// Makes room for so many shapes.
    pub(super) fn grow(&self, shapes: usize) {
        self.0.borrow_mut().resize_with(shapes, Rc::default);
    }

    /// Boxes of a shape in any of some states.
    pub(super) fn count(&self, shape: usize, states: &[State]) -> usize {
        let of = &self.0.borrow()[shape];
        states.iter().map(|s| of.counts[*s as usize].get()).sum()
    }

    /// Boxes of all shapes in a state.
    pub(super) fn total(&self, state: State) -> usize {
        self.0.borrow().iter().map(|s| s.counts[state as usize].get()).sum()
    }

    /// A parked box of a shape: the one parked last, whose memory is warmest.
    pub(super) fn ready(&self, shape: usize) -> Option<u32> {
        self.0.borrow()[shape].ready.borrow().last().copied()
    }
}

/// One box's entry in the tally.
pub(super) struct Entry {
    of: Rc<OfShape>,
    slot: u32,
    state: State,
}

impl Entry {
    /// Enters a new box, as `Preparing`.
    pub(super) fn new(tally: &Rc<Tally>, shape: usize, slot: u32) -> Self {
        let of = Rc::clone(&tally.0.borrow()[shape]);
        let entry = Self { of, slot, state: State::Preparing };
        entry.add();
        entry
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    pub(super) fn enter(&mut self, state: State) {
        self.remove();
        self.state = state;
        self.add();
    }

    fn add(&self) {
        let of = &self.of;
        let count = &of.counts[self.state as usize];
        count.set(count.get() + 1);
        if self.state == State::Parked {
            of.ready.borrow_mut().push(self.slot);
        }
    }

    fn remove(&self) {
        let of = &self.of;
        let count = &of.counts[self.state as usize];
        count.set(count.get() - 1);
        if self.state == State::Parked {
            let mut ready = of.ready.borrow_mut();
            // From the end, where a claim has just taken it.
            if let Some(at) = ready.iter().rposition(|s| *s == self.slot) {
                ready.remove(at);
            }
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_follow_states() {
        let tally = Tally::new(2);
        let mut a = Entry::new(&tally, 1, 7);
        let mut b = Entry::new(&tally, 1, 8);
        assert_eq!(tally.total(State::Preparing), 2);
        a.enter(State::Parked);
        b.enter(State::Parked);
        assert_eq!((tally.ready(0), tally.ready(1)), (None, Some(8)));
        b.enter(State::Starting);
        assert_eq!(tally.ready(1), Some(7));
        assert_eq!(tally.count(1, &[State::Parked, State::Starting]), 2);
        drop(a);
        assert_eq!((tally.ready(1), tally.total(State::Parked)), (None, 0));
        assert_eq!(b.state(), State::Starting);
    }
}
