//! How many boxes of each shape are in each state, and which are ready: kept as boxes change, so that
//! a launch looks at no list of all boxes. Boxes whose network namespace is their own are told from those that got one
//! that was there (`nets`): only in the former may a device be made.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::boxes::State;

/// All shapes.
pub(super) struct Tally(RefCell<Vec<Rc<OfShape>>>);

#[derive(Default)]
struct OfShape {
    /// Of boxes in a network that was there, and in one of their own.
    kinds: [OfKind; 2],
}

#[derive(Default)]
struct OfKind {
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
        of.kinds.iter().flat_map(|k| states.iter().map(|s| k.counts[*s as usize].get())).sum()
    }

    /// Boxes of a shape that have a network of their own and can be had, now or soon.
    pub(super) fn own_networks(&self, shape: usize) -> usize {
        let own = &self.0.borrow()[shape].kinds[1];
        [State::Preparing, State::Parked].iter().map(|s| own.counts[*s as usize].get()).sum()
    }

    /// Boxes of all shapes in a state.
    pub(super) fn total(&self, state: State) -> usize {
        let all = self.0.borrow();
        all.iter().flat_map(|s| &s.kinds).map(|k| k.counts[state as usize].get()).sum()
    }

    /// A parked box of a shape: the one parked last, whose memory is warmest. One with a network of its own if that is
    /// asked for, and else only if there is no other.
    pub(super) fn ready(&self, shape: usize, own_network: bool) -> Option<u32> {
        let [shared, own] = &self.0.borrow()[shape].kinds;
        let last = |kind: &OfKind| kind.ready.borrow().last().copied();
        if own_network { last(own) } else { last(shared).or_else(|| last(own)) }
    }
}

/// One box's entry in the tally.
pub(super) struct Entry {
    of: Rc<OfShape>,
    kind: usize,
    slot: u32,
    state: State,
}

impl Entry {
    /// Enters a new box, as `Preparing`.
    pub(super) fn new(tally: &Rc<Tally>, shape: usize, slot: u32, own_network: bool) -> Self {
        let of = Rc::clone(&tally.0.borrow()[shape]);
        let kind = usize::from(own_network);
        let entry = Self { of, kind, slot, state: State::Preparing };
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
        let of = &self.of.kinds[self.kind];
        let count = &of.counts[self.state as usize];
        count.set(count.get() + 1);
        if self.state == State::Parked {
            of.ready.borrow_mut().push(self.slot);
        }
    }

    fn remove(&self) {
        let of = &self.of.kinds[self.kind];
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
        let mut a = Entry::new(&tally, 1, 7, false);
        let mut b = Entry::new(&tally, 1, 8, true);
        assert_eq!(tally.total(State::Preparing), 2);
        a.enter(State::Parked);
        b.enter(State::Parked);
        assert_eq!((tally.ready(0, false), tally.ready(1, false)), (None, Some(7)));
        assert_eq!((tally.ready(1, true), tally.own_networks(1)), (Some(8), 1));
        a.enter(State::Starting);
        assert_eq!(tally.ready(1, false), Some(8), "for want of another");
        a.enter(State::Parked);
        b.enter(State::Starting);
        assert_eq!((tally.ready(1, false), tally.ready(1, true)), (Some(7), None));
        assert_eq!(tally.count(1, &[State::Parked, State::Starting]), 2);
        drop(a);
        assert_eq!((tally.ready(1, false), tally.total(State::Parked)), (None, 0));
        assert_eq!(b.state(), State::Starting);
    }
}
