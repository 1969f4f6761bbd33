//! Names of things: hosts, launches, sandboxes, images, buckets.
//!
//! Each id is its own type so that one never stands where another belongs. All but [`ImageId`] are made by
//! their owner out of randomness that it was given; nothing here draws any.

use core::{fmt, str::FromStr};

use rkyv::{Archive, Deserialize, Serialize};

use crate::limits;

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Archive, Serialize, Deserialize,
        )]
        #[rkyv(derive(Clone, Copy, Debug))]
        pub struct $name(pub u64);

        impl From<u64> for $name {
            fn from(value: u64) -> Self {
                Self(value)
            }
        }
    };
}

number_id! {
    /// A host: 64 random bits, drawn at its first start and kept with its state.
    HostId
}
number_id! {
    /// Grows by at least one at each start of a host's daemon; never two daemons share one.
    Incarnation
}
number_id! {
    /// Counts a host's heartbeats and never goes back, not even over restarts (PROTOCOL 2.6).
    Seq
}

impl HostId {
    /// The database partition that holds this host: its top bits.
    #[must_use]
    pub const fn bucket(self) -> BucketId {
        // The shift leaves BUCKET_BITS <= 16 bits, so that nothing is cut off.
        BucketId((self.0 >> (u64::BITS - limits::BUCKET_BITS)) as u16)
    }
}

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "h-{:016x}", self.0)
    }
}

impl FromStr for HostId {
    type Err = BadId;
    fn from_str(text: &str) -> Result<Self, BadId> {
        let digits = text.strip_prefix("h-").ok_or(BadId)?;
        if digits.len() != 16 {
            return Err(BadId);
        }
        u64::from_str_radix(digits, 16).map(HostId).map_err(|_| BadId)
    }
}

/// A partition of `capacity_by_host`, below [`limits::BUCKETS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BucketId(pub u16);

/// One launch, named by whoever asks for it. The same id is the same launch, however often it is sent.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Archive,
    Serialize,
    Deserialize,
)]
#[rkyv(derive(Clone, Copy, Debug))]
pub struct LaunchId(pub [u8; 16]);

impl fmt::Display for LaunchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        uuid::Uuid::from_bytes(self.0).fmt(f)
    }
}

impl FromStr for LaunchId {
    type Err = BadId;
    fn from_str(text: &str) -> Result<Self, BadId> {
        uuid::Uuid::parse_str(text).map(|id| LaunchId(id.into_bytes())).map_err(|_| BadId)
    }
}

/// A sandbox. It contains its host, so that any placer finds it without a table.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Archive, Serialize, Deserialize,
)]
#[rkyv(derive(Clone, Copy, Debug))]
pub struct SandboxId {
    /// Where it runs.
    pub host: HostId,
    /// Which of that host's: unique over all its incarnations.
    pub local: u64,
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sb-{:016x}{:016x}", self.host.0, self.local)
    }
}

impl FromStr for SandboxId {
    type Err = BadId;
    fn from_str(text: &str) -> Result<Self, BadId> {
        let digits = text.strip_prefix("sb-").ok_or(BadId)?;
        if digits.len() != 32 || !digits.is_ascii() {
            return Err(BadId);
        }
        let (host, local) = digits.split_at(16);
        let parse = |part| u64::from_str_radix(part, 16).map_err(|_| BadId);
        Ok(SandboxId { host: HostId(parse(host)?), local: parse(local)? })
    }
}

/// An image: the BLAKE3 hash of its manifest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Archive, Serialize, Deserialize)]
#[rkyv(derive(Clone, Copy))]
pub struct ImageId(pub [u8; 32]);

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImageId({self})")
    }
}

impl FromStr for ImageId {
    type Err = BadId;
    fn from_str(text: &str) -> Result<Self, BadId> {
        blake3::Hash::from_hex(text).map(|hash| ImageId(*hash.as_bytes())).map_err(|_| BadId)
    }
}

/// A text that is not an id of the wanted kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a valid id")]
pub struct BadId;

#[cfg(test)]
mod tests {
    use std::string::{String, ToString};

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ids_read_back_what_they_print(host: u64, local: u64, launch: [u8; 16], image: [u8; 32]) {
            let sandbox = SandboxId { host: HostId(host), local };
            prop_assert_eq!(sandbox.to_string().parse(), Ok(sandbox));
            prop_assert_eq!(HostId(host).to_string().parse(), Ok(HostId(host)));
            prop_assert_eq!(LaunchId(launch).to_string().parse(), Ok(LaunchId(launch)));
            prop_assert_eq!(ImageId(image).to_string().parse(), Ok(ImageId(image)));
            prop_assert!(HostId(host).bucket().0 < limits::BUCKETS);
        }

        #[test]
        fn any_text_is_an_id_or_an_error(text: String) {
            let _ = text.parse::<SandboxId>();
            let _ = text.parse::<HostId>();
            let _ = text.parse::<LaunchId>();
            let _ = text.parse::<ImageId>();
        }
    }
}
