//! A sandbox's record as both stores keep it, and where it lies: by tenant, and within one in a few partitions.

use wire::{SandboxId, call::SandboxRecord, codec, records::Records};

/// Partitions of one tenant: a large tenant's rows lie on as many places, and a small one's list is as many reads.
pub const PARTITIONS: u8 = 16;

/// A record with what orders and ages it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Of the datagram that said it.
    pub version: u64,
    /// When it was said, by the clock of the aggregator that heard it, in ms since 1970.
    pub heard_ms: u64,
    /// The record.
    pub record: SandboxRecord,
}

/// The partition of a sandbox within its tenant's.
#[must_use]
pub fn partition(id: SandboxId) -> u8 {
    let mixed = (id.host.0 ^ id.local.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    u8::try_from(mixed >> 60).unwrap_or(0) % PARTITIONS
}

impl Kept {
    /// Its partition.
    #[must_use]
    pub fn partition(&self) -> u8 {
        partition(self.record.sandbox)
    }

    /// Its bytes: when it was heard, then the datagram of one record that said it.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let records = Records { version: self.version, records: vec![self.record.clone()] };
        let mut bytes = self.heard_ms.to_le_bytes().to_vec();
        bytes.extend(codec::write(&records));
        bytes
    }

    /// `None` for bytes that this build cannot read, or that are of another sandbox.
    #[must_use]
    pub fn from_bytes(id: SandboxId, bytes: &[u8]) -> Option<Self> {
        let (heard_ms, body) = bytes.split_first_chunk()?;
        let Records { version, mut records } = Records::read(id.host, body).ok()?;
        let record = records.pop().filter(|record| record.sandbox == id && records.is_empty())?;
        Some(Self { version, heard_ms: u64::from_le_bytes(*heard_ms), record })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use wire::{HostId, LaunchId, call::State};

    use super::*;

    pub(crate) fn record(host: u64, local: u64, tenant: &str) -> SandboxRecord {
        SandboxRecord {
            sandbox: SandboxId { host: HostId(host), local },
            launch_id: LaunchId([1; 16]),
            tenant: tenant.to_owned(),
            image: "shell".to_owned(),
            shape: 1,
            command: vec!["sh".to_owned()],
            labels: vec![("job".to_owned(), "42".to_owned())],
            state: State::Running,
            age_ms: 5,
            left_ms: 6,
            network: wire::launch::Network::default(),
            published: Vec::new(),
        }
    }

    #[test]
    fn a_kept_record_reads_back_as_its_own_sandbox_only() {
        let kept = Kept { version: 3, heard_ms: 9, record: record(7, 2, "acme") };
        let bytes = kept.to_bytes();
        assert_eq!(Kept::from_bytes(kept.record.sandbox, &bytes), Some(kept.clone()));
        let other = SandboxId { local: 3, ..kept.record.sandbox };
        assert_eq!(Kept::from_bytes(other, &bytes), None);
        assert_eq!(Kept::from_bytes(kept.record.sandbox, &bytes[..20]), None);
    }

    #[test]
    fn sandboxes_of_one_host_spread_over_partitions() {
        let of = |local: u64| partition(SandboxId { host: HostId(7), local: (5 << 40) | local });
        let mut seen = [0; PARTITIONS as usize];
        (0..1_600).for_each(|local| seen[usize::from(of(local))] += 1);
        assert!(seen.iter().all(|count| (50..200).contains(count)), "{seen:?}");
    }
}
