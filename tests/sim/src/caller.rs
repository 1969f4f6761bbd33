//! Who asks a host: a placer and its number for a launch. The number says the launch's id, so that no table has to.

use wire::LaunchId;

/// Whoever waits for an answer: a placer, and its number for the launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Index of the placer.
    pub placer: usize,
    /// The placer's number for the launch.
    pub key: u64,
    /// Budget that it sent.
    pub budget_ms: u32,
}

impl Caller {
    /// Numbers of named launches.
    pub const NAMED: u64 = 1 << 62;
    /// Numbers of the second sending of a named launch.
    pub const SECOND: u64 = 1 << 63;

    /// Whether the launch is named.
    #[must_use]
    pub const fn is_named(&self) -> bool {
        self.key & Self::NAMED != 0
    }

    /// The launch's id: both sendings of a named one have the same.
    #[must_use]
    pub fn launch_id(key: u64) -> LaunchId {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&(key & !Self::SECOND).to_be_bytes());
        LaunchId(id)
    }

    /// Whether it is the id of a named launch.
    #[must_use]
    pub fn names(id: LaunchId) -> bool {
        u64::from_be_bytes(*id.0.first_chunk().unwrap_or(&[0; 8])) & Self::NAMED != 0
    }
}
