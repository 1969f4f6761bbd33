//! Keys and tags: who said a datagram.
//!
//! Every datagram ends in a keyed BLAKE3 tag over all that stands before it. The key belongs to one sender and
//! one key epoch: `derive(fleet key of the epoch, role, id)`. A stolen host key forges that host only.
//! Aggregators hold the fleet key and derive; hosts and placers hold just their own.

use core::fmt;

use crate::limits::TAG_BYTES;

/// Who holds a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Role {
    /// `hostd`, named by its host id.
    Host = 1,
    /// `placerd`, named by its placer id.
    Placer = 2,
    /// `heartbeatd`, named by its aggregator id.
    Aggregator = 3,
    /// A person or program that launches sandboxes, for one tenant.
    Client = 4,
    /// A person who administers the fleet.
    Operator = 5,
}

/// Which of the fleet's keys: grows at each rotation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyEpoch(pub u32);

/// The secret of one key epoch of a fleet. Held by aggregators and by `volley init`.
#[derive(Clone, PartialEq, Eq)]
pub struct FleetKey {
    /// The epoch it serves.
    pub epoch: KeyEpoch,
    /// 256 random bits.
    pub secret: [u8; 32],
}

/// One sender's key for one epoch.
#[derive(Clone, PartialEq, Eq)]
pub struct SenderKey(pub [u8; 32]);

impl fmt::Debug for FleetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FleetKey(epoch {})", self.epoch.0)
    }
}

impl fmt::Debug for SenderKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SenderKey(..)")
    }
}

impl FleetKey {
    /// The key of one sender.
    #[must_use]
    pub fn sender(&self, role: Role, id: u64) -> SenderKey {
        let mut material = [0u8; 45];
        material[..32].copy_from_slice(&self.secret);
        material[32..36].copy_from_slice(&self.epoch.0.to_le_bytes());
        material[36] = role as u8;
        material[37..].copy_from_slice(&id.to_le_bytes());
        SenderKey(blake3::derive_key("volley 2026-11 datagram sender key", &material))
    }
}

impl SenderKey {
    /// The tag over `said`.
    #[must_use]
    pub fn tag(&self, said: &[u8]) -> [u8; TAG_BYTES] {
        let hash = blake3::keyed_hash(&self.0, said);
        let mut tag = [0; TAG_BYTES];
        tag.copy_from_slice(&hash.as_bytes()[..TAG_BYTES]);
        tag
    }

    /// Whether `tag` is the tag over `said`, in time that does not depend on where they differ.
    #[must_use]
    pub fn verifies(&self, said: &[u8], tag: &[u8; TAG_BYTES]) -> bool {
        let ours = self.tag(said);
        ours.iter().zip(tag).fold(0, |different, (a, b)| different | (a ^ b)) == 0
    }

    /// Hides or reveals the key of `next` epoch under this one (PROTOCOL 3.4): an XOR with a keystream that is
    /// used once, since an epoch has one key a sender.
    #[must_use]
    pub fn wrap(&self, next: KeyEpoch, key: &[u8; 32]) -> [u8; 32] {
        let stream = blake3::Hasher::new_keyed(&self.0)
            .update(b"volley key wrap")
            .update(&next.0.to_le_bytes())
            .finalize();
        let mut wrapped = *key;
        wrapped.iter_mut().zip(stream.as_bytes()).for_each(|(byte, mask)| *byte ^= mask);
        wrapped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fleet(epoch: u32) -> FleetKey {
        FleetKey { epoch: KeyEpoch(epoch), secret: [7; 32] }
    }

    #[test]
    fn a_key_is_one_senders_of_one_role_and_epoch() {
        let key = fleet(1).sender(Role::Host, 5);
        assert_ne!(key, fleet(1).sender(Role::Host, 6));
        assert_ne!(key, fleet(1).sender(Role::Placer, 5));
        assert_ne!(key, fleet(2).sender(Role::Host, 5));
        assert!(key.verifies(b"said", &key.tag(b"said")));
        assert!(!key.verifies(b"Said", &key.tag(b"said")));
    }

    #[test]
    fn a_wrapped_key_comes_back_under_the_same_key_only() {
        let (old, new) = (fleet(1).sender(Role::Host, 5), fleet(2).sender(Role::Host, 5));
        let wrapped = old.wrap(KeyEpoch(2), &new.0);
        assert_ne!(wrapped, new.0);
        assert_eq!(old.wrap(KeyEpoch(2), &wrapped), new.0);
        assert_ne!(new.wrap(KeyEpoch(2), &wrapped), new.0);
    }
}
