//! The shapes that a fleet offers: what one slot of each takes.

use wire::{ShapeId, limits::SHAPES_MAX};

use crate::admission::Resources;

/// One size of sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// What people call it.
    pub name: String,
    /// What a slot of it takes.
    pub need: Resources,
}

/// All shapes, by index. A fleet has the same table everywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shapes([Shape; SHAPES_MAX]);

const MIB: u64 = 1 << 20;

impl Default for Shapes {
    /// nano, small, medium, large.
    fn default() -> Self {
        let shape = |name: &str, cpu_millis, mib| Shape {
            name: name.to_owned(),
            need: Resources { cpu_millis, memory_bytes: mib * MIB },
        };
        Self([
            shape("nano", 250, 128),
            shape("small", 1_000, 512),
            shape("medium", 2_000, 2_048),
            shape("large", 4_000, 8_192),
        ])
    }
}

impl Shapes {
    /// Of four shapes; `None` if two have one name.
    #[must_use]
    pub fn new(shapes: [Shape; SHAPES_MAX]) -> Option<Self> {
        let twice = shapes
            .iter()
            .enumerate()
            .any(|(at, shape)| shapes[..at].iter().any(|other| other.name == shape.name));
        (!twice).then_some(Self(shapes))
    }

    /// A shape.
    #[must_use]
    pub const fn get(&self, shape: ShapeId) -> &Shape {
        &self.0[shape.index()]
    }

    /// The shape of a name.
    #[must_use]
    pub fn by_name(&self, name: &str) -> Option<ShapeId> {
        ShapeId::all().find(|shape| self.get(*shape).name == name)
    }

    /// All, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Shape> {
        self.0.iter()
    }

    /// Needs as `wire::capacity::slots_free` wants them.
    #[must_use]
    pub fn needs(&self) -> [(u64, u64); SHAPES_MAX] {
        [0, 1, 2, 3].map(|at: usize| (self.0[at].need.cpu_millis, self.0[at].need.memory_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_distinct_names_and_are_found_by_them() {
        let shapes = Shapes::default();
        assert_eq!(shapes.by_name("small"), ShapeId::new(1));
        assert_eq!(shapes.by_name("huge"), None);
        let twice = [0, 0, 1, 2].map(|at| shapes.0[at].clone());
        assert_eq!(Shapes::new(twice), None);
    }
}
