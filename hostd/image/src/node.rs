//! Node numbers of the FUSE tree, derived from what they are, so that a server that was restarted needs no table.
//!
//! `/o/<image>/<xx>/<object>` are the objects as the image's overlay looks for them, `/m/<image>` its metadata. An object has
//! one number whichever image it is reached through: the kernel keeps its pages once. The number has 61 bits of the id; two objects of
//! one domain that share them would be taken for each other after a restart, which only that domain's owner can bring about.

use wire::ImageId;

use crate::id::Hash;

/// A node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Node {
    Root,
    /// `/o`
    Objects,
    /// `/m`
    Metas,
    /// `/o/<image>`
    ImageDir(ImageKey),
    /// `/o/<image>/<xx>`
    Shelf(ImageKey, u8),
    /// `/m/<image>`
    Meta(ImageKey),
    /// `/o/<image>/<xx>/<object>`, of whatever image
    Object(ObjectKey),
}

/// The first 53 bits of an image's id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ImageKey(u64);

/// The first 61 bits of an object's id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ObjectKey(u64);

fn first_bits(hash: &Hash) -> u64 {
    u64::from_be_bytes([hash[0], hash[1], hash[2], hash[3], hash[4], hash[5], hash[6], hash[7]])
}

impl ImageKey {
    pub(crate) fn of(id: ImageId) -> Self {
        Self(first_bits(&id.0) >> 11)
    }
}

impl ObjectKey {
    pub(crate) fn of(id: &Hash) -> Self {
        Self(first_bits(id) >> 3)
    }

    /// The smallest id with this key.
    pub(crate) fn first(self) -> Hash {
        let mut hash = [0; 32];
        hash[..8].copy_from_slice(&(self.0 << 3).to_be_bytes());
        hash
    }
}

const TAG_SHIFT: u32 = 61;
const BODY: u64 = (1 << TAG_SHIFT) - 1;

impl Node {
    pub(crate) fn number(self) -> u64 {
        let tagged = |tag: u64, body: u64| tag << TAG_SHIFT | body;
        match self {
            Self::Root => 1,
            Self::Objects => 2,
            Self::Metas => 3,
            Self::ImageDir(ImageKey(key)) => tagged(1, key),
            Self::Shelf(ImageKey(key), xx) => tagged(2, key << 8 | u64::from(xx)),
            Self::Meta(ImageKey(key)) => tagged(3, key),
            Self::Object(ObjectKey(key)) => tagged(4, key),
        }
    }

    pub(crate) fn from_number(number: u64) -> Option<Self> {
        let body = number & BODY;
        Some(match (number >> TAG_SHIFT, body) {
            (0, 1) => Self::Root,
            (0, 2) => Self::Objects,
            (0, 3) => Self::Metas,
            (1, _) => Self::ImageDir(ImageKey(body)),
            (2, _) => Self::Shelf(ImageKey(body >> 8), body.to_le_bytes()[0]),
            (3, _) => Self::Meta(ImageKey(body)),
            (4, _) => Self::Object(ObjectKey(body)),
            _ => return None,
        })
    }

    pub(crate) fn is_dir(self) -> bool {
        !matches!(self, Self::Meta(_) | Self::Object(_))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn numbers_say_what_they_are(hash: [u8; 32], xx: u8, other: u64) {
            let (image, object) = (ImageKey::of(ImageId(hash)), ObjectKey::of(&hash));
            let nodes = [
                Node::Root, Node::Objects, Node::Metas, Node::ImageDir(image),
                Node::Shelf(image, xx), Node::Meta(image), Node::Object(object),
            ];
            let mut numbers: Vec<_> = nodes.iter().map(|node| node.number()).collect();
            for (node, number) in nodes.iter().zip(&numbers) {
                prop_assert_eq!(Node::from_number(*number), Some(*node));
            }
            numbers.sort_unstable();
            numbers.dedup();
            prop_assert_eq!(numbers.len(), nodes.len());
            prop_assert!(object.first() <= hash);
            prop_assert_eq!(ObjectKey::of(&object.first()), object);
            let _ = Node::from_number(other);
        }
    }
}
