//! Admission: whether this host has room, decided here and nowhere else.
//!
//! All shapes share one budget of processor and memory, and one count of boxes. A slot is taken or refused at
//! once: nothing ever waits for capacity. What is reported may be less than what is there (`margin_percent`),
//! so that placers stop a little before the host is full; admission itself uses all of it.

use wire::{
    CapacityWord, Code, ShapeId, Stamp,
    capacity::slots_free,
    limits::{FREE_MAX, SHAPES_MAX},
};

use crate::shapes::Shapes;

/// An amount of what sandboxes share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Processor, in thousandths of a core.
    pub cpu_millis: u64,
    /// Memory.
    pub memory_bytes: u64,
}

/// The budget of a host and what is left of it.
#[derive(Clone, Debug)]
pub struct Admission {
    needs: [(u64, u64); SHAPES_MAX],
    whole: Resources,
    left: Resources,
    boxes_left: u32,
    boxes_max: u32,
    margin_percent: u8,
    /// Slots a shape of the empty host, and free ones: kept so that a look does not divide anew.
    total: [u16; SHAPES_MAX],
    free: [u16; SHAPES_MAX],
    /// Boxes a shape that are there or can be made in time, as far as that is less than anybody asks for.
    boxes: [u16; SHAPES_MAX],
    draining: bool,
    sick: bool,
    /// What is started could not be written down.
    full: bool,
}

impl Admission {
    /// Of an empty host.
    #[must_use]
    pub fn new(shapes: &Shapes, whole: Resources, boxes_max: u32, margin_percent: u8) -> Self {
        let mut this = Self {
            needs: shapes.needs(),
            whole,
            left: whole,
            boxes_left: boxes_max,
            boxes_max,
            margin_percent: margin_percent.min(100),
            total: [0; SHAPES_MAX],
            free: [0; SHAPES_MAX],
            boxes: [FREE_MAX; SHAPES_MAX],
            draining: false,
            sick: false,
            full: false,
        };
        this.count();
        this.total = this.free;
        this
    }

    /// Takes a slot, or says why not.
    ///
    /// # Errors
    /// [`Code::Draining`], or [`Code::NoCapacity`] (also of a sick host, whose word says so).
    pub fn take(&mut self, shape: ShapeId) -> Result<(), Code> {
        if self.draining {
            return Err(Code::Draining);
        }
        if self.sick || self.free[shape.index()] == 0 {
            return Err(Code::NoCapacity);
        }
        self.occupy(shape);
        Ok(())
    }

    /// Takes a slot for a sandbox that is there already, even beyond the budget: adoption never kills.
    pub fn occupy(&mut self, shape: ShapeId) {
        let (cpu, memory) = self.needs[shape.index()];
        self.left.cpu_millis = self.left.cpu_millis.saturating_sub(cpu);
        self.left.memory_bytes = self.left.memory_bytes.saturating_sub(memory);
        self.boxes_left = self.boxes_left.saturating_sub(1);
        self.count();
    }

    /// Gives a slot back. `live` are the slots a shape that stay taken: the budget is counted anew from them, so
    /// that an adoption beyond the budget leaves no debt and no credit behind.
    pub fn give(&mut self, live: &[u32; SHAPES_MAX]) {
        let sum = |part: fn(&(u64, u64)) -> u64| {
            self.needs.iter().zip(live).map(|(need, n)| part(need) * u64::from(*n)).sum::<u64>()
        };
        let (cpu, memory) = (sum(|need| need.0), sum(|need| need.1));
        self.left.cpu_millis = self.whole.cpu_millis.saturating_sub(cpu);
        self.left.memory_bytes = self.whole.memory_bytes.saturating_sub(memory);
        self.boxes_left = self.boxes_max.saturating_sub(live.iter().sum());
        self.count();
    }

    fn count(&mut self) {
        let boxes = u16::try_from(self.boxes_left).unwrap_or(FREE_MAX);
        self.free = slots_free(self.left.cpu_millis, self.left.memory_bytes, &self.needs)
            .map(|free| free.min(boxes));
    }

    /// Free slots a shape, margin not taken off.
    #[must_use]
    pub const fn free(&self) -> [u16; SHAPES_MAX] {
        self.free
    }

    /// Says how many boxes of a shape are there or can be made in time; `None`: as many as may be asked for.
    pub fn set_boxes(&mut self, shape: ShapeId, boxes: Option<u32>) {
        let boxes = boxes.map_or(FREE_MAX, |boxes| u16::try_from(boxes).unwrap_or(FREE_MAX));
        self.boxes[shape.index()] = boxes.min(FREE_MAX);
    }

    /// Says whether starts would fail for want of room to write them down. Nobody is told of free slots meanwhile; who
    /// asks all the same is not refused, because the next write may succeed.
    pub fn set_full(&mut self, full: bool) {
        self.full = full;
    }

    /// Whether it is so.
    #[must_use]
    pub const fn full(&self) -> bool {
        self.full
    }

    /// Free slots a shape as they are told: no more than there are boxes for, and margin taken off.
    #[must_use]
    pub fn told(&self) -> [u16; SHAPES_MAX] {
        if self.full {
            return [0; SHAPES_MAX];
        }
        let keep = u32::from(100 - self.margin_percent);
        let mut told = self.free;
        for (free, boxes) in told.iter_mut().zip(self.boxes) {
            *free = u16::try_from(u32::from(*free) * keep / 100).unwrap_or(*free).min(boxes);
        }
        told
    }

    /// Slots a shape of the empty host.
    #[must_use]
    pub const fn total(&self) -> [u16; SHAPES_MAX] {
        self.total
    }

    /// The true capacity word, as it goes with replies.
    #[must_use]
    pub fn word(&self, stamp: Stamp) -> CapacityWord {
        let flag = |up, flag| if up { flag } else { 0 };
        let flags =
            flag(self.draining, CapacityWord::DRAINING) | flag(self.sick, CapacityWord::SICK);
        CapacityWord::new(self.told(), flags, stamp)
    }

    /// Whether new work is refused for a drain.
    #[must_use]
    pub const fn draining(&self) -> bool {
        self.draining
    }

    /// Starts or ends a drain.
    pub fn set_draining(&mut self, draining: bool) {
        self.draining = draining;
    }

    /// Whether this host found itself unable to start sandboxes.
    #[must_use]
    pub const fn sick(&self) -> bool {
        self.sick
    }

    /// Says whether it can.
    pub fn set_sick(&mut self, sick: bool) {
        self.sick = sick;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WHOLE: Resources = Resources { cpu_millis: 4_000, memory_bytes: 8 << 30 };

    proptest! {
        /// Whatever is taken and given in whatever order, the sum never passes the budget, a slot that is told
        /// free can be taken, and an empty host is whole again.
        #[test]
        fn the_budget_is_never_passed(steps in prop::collection::vec((0u8..4, any::<bool>()), 0..200)) {
            let shapes = Shapes::default();
            let mut admission = Admission::new(&shapes, WHOLE, 10, 0);
            let mut live = [0u32; SHAPES_MAX];
            for (shape, take) in steps {
                let shape = ShapeId::new(shape).unwrap();
                let free = admission.free()[shape.index()];
                if take {
                    prop_assert_eq!(admission.take(shape).is_ok(), free > 0);
                    live[shape.index()] += u32::from(free > 0);
                } else if live[shape.index()] > 0 {
                    live[shape.index()] -= 1;
                    admission.give(&live);
                }
                let cpu: u64 = shapes.needs().iter().zip(live).map(|(need, n)| need.0 * u64::from(n)).sum();
                prop_assert!(cpu <= WHOLE.cpu_millis);
                prop_assert!(live.iter().sum::<u32>() <= 10);
            }
            for shape in ShapeId::all() {
                while live[shape.index()] > 0 {
                    live[shape.index()] -= 1;
                    admission.give(&live);
                }
            }
            prop_assert_eq!(admission.free(), admission.total());
        }

        /// Adoption beyond the budget refuses new work and leaves no debt when all is gone.
        #[test]
        fn adoption_beyond_the_budget_leaves_no_debt(adopted in prop::collection::vec(0u8..4, 0..40)) {
            let mut admission = Admission::new(&Shapes::default(), WHOLE, 10, 0);
            let mut live = [0u32; SHAPES_MAX];
            for &shape in &adopted {
                admission.occupy(ShapeId::new(shape).unwrap());
                live[usize::from(shape)] += 1;
            }
            for &shape in adopted.iter().rev() {
                live[usize::from(shape)] -= 1;
                admission.give(&live);
            }
            prop_assert_eq!(admission.free(), admission.total());
        }
    }

    #[test]
    fn no_more_is_told_than_there_are_boxes_for() {
        let mut admission = Admission::new(&Shapes::default(), WHOLE, 100, 25);
        let nano = ShapeId::new(0).unwrap();
        admission.set_boxes(nano, Some(3));
        assert_eq!((admission.told()[0], admission.free()[0]), (3, 16));
        assert_eq!(admission.told()[1], 3, "other shapes are told as they are");
        admission.set_boxes(nano, Some(70_000));
        assert_eq!(admission.told()[0], 12);
        admission.set_boxes(nano, Some(0));
        assert_eq!(admission.word(Stamp::default()).free(nano), 0);
        admission.set_boxes(nano, None);
        assert_eq!(admission.told()[0], 12);
    }

    #[test]
    fn a_full_disk_is_told_as_no_slots() {
        let mut admission = Admission::new(&Shapes::default(), WHOLE, 100, 0);
        let nano = ShapeId::new(0).unwrap();
        let before = admission.told();
        admission.set_full(true);
        assert_eq!((admission.told(), admission.full()), ([0; SHAPES_MAX], true));
        assert_eq!(admission.word(Stamp::default()).free(nano), 0);
        admission.take(nano).unwrap();
        admission.set_full(false);
        assert_eq!(admission.told()[0], before[0] - 1);
    }

    #[test]
    fn a_margin_is_kept_back_from_what_is_told_only() {
        let mut admission = Admission::new(&Shapes::default(), WHOLE, 100, 25);
        assert_eq!(admission.free()[0], 16);
        assert_eq!(admission.told()[0], 12);
        let nano = ShapeId::new(0).unwrap();
        (0..16).for_each(|_| admission.take(nano).unwrap());
        assert_eq!(admission.take(nano), Err(Code::NoCapacity));
        admission.set_draining(true);
        assert_eq!(admission.take(nano), Err(Code::Draining));
        assert!(admission.word(Stamp::default()).has(CapacityWord::DRAINING));
    }
}
