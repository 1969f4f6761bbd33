//! The fleet's keys as an aggregator holds them: what it accepts, and which it moves hosts to.

use wire::seal::{FleetKey, KeyEpoch, Role, SenderKey};

/// Keys of one or more epochs. Every one is accepted; hosts are moved to the highest (PROTOCOL 3.4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRing {
    keys: Vec<FleetKey>,
}

impl KeyRing {
    /// A ring of `keys`, in any order. `None` without any: nothing could be verified.
    #[must_use]
    pub fn new(mut keys: Vec<FleetKey>) -> Option<Self> {
        keys.sort_by_key(|key| key.epoch);
        keys.dedup_by_key(|key| key.epoch);
        (!keys.is_empty()).then_some(Self { keys })
    }

    /// The epoch that every host shall use.
    #[must_use]
    pub fn target(&self) -> KeyEpoch {
        self.keys.last().map_or(KeyEpoch(0), |key| key.epoch)
    }

    /// A sender's key, if its epoch is accepted.
    #[must_use]
    pub fn sender(&self, role: Role, id: u64, epoch: KeyEpoch) -> Option<SenderKey> {
        self.keys.iter().find(|key| key.epoch == epoch).map(|key| key.sender(role, id))
    }

    /// Whether an epoch is accepted.
    #[must_use]
    pub fn accepts(&self, epoch: KeyEpoch) -> bool {
        self.keys.iter().any(|key| key.epoch == epoch)
    }
}
