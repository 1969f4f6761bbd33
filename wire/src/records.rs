//! What hosts say of their sandboxes beside heartbeats: so that a tenant's list asks no host.
//!
//! A host sends the records that changed since it last said them, some to a datagram, and all of them from time to time
//! (PROTOCOL 9). Nothing waits for them: a list is eventually right, and a single sandbox is asked of its host.
//! What is long (command, labels) is cut, so that every record fits a datagram.
//! Left out: acknowledgements. What is lost is said again with the next whole round.

use alloc::{string::String, vec::Vec};

use rkyv::{Archive, Deserialize, Serialize};

use crate::{
    call::SandboxRecord,
    codec::{self, Malformed},
    datagram::{self, BODY_BYTES_MAX, Kind, Sender, Verified},
    id::HostId,
    launch::Network,
    limits::{DATAGRAM_BYTES_MAX, NAME_BYTES_MAX},
    seal::{KeyEpoch, Role, SenderKey},
};

/// Bytes of the command that a record keeps: what a list shows of it.
pub const COMMAND_BYTES_MAX: usize = 96;
/// Bytes of all labels of a record, `STRING_BYTES` for each string included. Labels beyond are found by asking hosts only.
pub const LABELS_BYTES_MAX: usize = 384;
/// Published ports that a record keeps.
pub const PUBLISHED_MAX: usize = 3;
/// Bytes of one: its port and an address, the longest of which has 47.
const PUBLISHED_BYTES: usize = 80;
/// Bytes that the archive takes for a string beside its own, padding included.
const STRING_BYTES: usize = 8;
/// Bytes of a record of empty strings and lists, rounded up.
const RECORD_BYTES: usize = 128;
/// Bytes of [`Records`] without records, rounded up.
const FRAME_BYTES: usize = 32;

const _: () = assert!(
    RECORD_BYTES
        + 2 * (NAME_BYTES_MAX + STRING_BYTES)
        + COMMAND_BYTES_MAX
        + STRING_BYTES
        + LABELS_BYTES_MAX
        + PUBLISHED_MAX * PUBLISHED_BYTES
        + FRAME_BYTES
        <= BODY_BYTES_MAX
);

/// One datagram of records.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Records {
    /// Grows with every datagram of a host, also over restarts: of two records of one sandbox the one with the higher
    /// version is newer (PROTOCOL 9.2).
    pub version: u64,
    /// The records.
    pub records: Vec<SandboxRecord>,
}

/// The version of the `nth` datagram of records after the heartbeat before `next_seq`.
#[must_use]
pub const fn version(next_seq: crate::Seq, nth: u16) -> u64 {
    // Seq numbers neither repeat nor go back (PROTOCOL 2.6); 2^47 of them are some millennia.
    (next_seq.0 << 16) | nth as u64
}

/// Cuts `text` to at most `bytes_max` bytes, at a character's end.
fn cut(text: &mut String, bytes_max: usize) {
    if text.len() > bytes_max {
        let end = (0..=bytes_max).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(end);
    }
}

/// Cuts what is long, and leaves out what a list does not show: rules of the network.
#[must_use]
pub fn bounded(mut record: SandboxRecord) -> SandboxRecord {
    cut(&mut record.tenant, NAME_BYTES_MAX);
    cut(&mut record.image, NAME_BYTES_MAX);
    let mut command = record.command.join(" ");
    cut(&mut command, COMMAND_BYTES_MAX);
    record.command = Vec::new();
    record.command.push(command);
    let mut left = LABELS_BYTES_MAX;
    let fit = |(name, value): &&(String, String)| {
        let bytes = name.len() + value.len() + 4 * STRING_BYTES;
        let fits = bytes <= left;
        left = left.saturating_sub(bytes);
        fits
    };
    let count = record.labels.iter().take_while(fit).count();
    record.labels.truncate(count);
    record.network = Network::default();
    record.published.truncate(PUBLISHED_MAX);
    record.published.iter_mut().for_each(|one| cut(&mut one.address, 48));
    record
}

/// At most so many bytes of an archive.
fn bytes_of(record: &SandboxRecord) -> usize {
    let string = |text: &String| text.len() + 2 * STRING_BYTES;
    let labels: usize =
        record.labels.iter().map(|(name, value)| string(name) + string(value)).sum();
    let command: usize = record.command.iter().map(string).sum();
    // Tenant and image are counted without their heads, which stand in the record.
    RECORD_BYTES
        + record.published.len() * PUBLISHED_BYTES
        + record.tenant.len()
        + record.image.len()
        + STRING_BYTES * 2
        + labels
        + command
}

impl Records {
    /// Takes records off `from` while they fit one datagram. They must be [`bounded`].
    #[must_use]
    pub fn take(version: u64, from: &mut Vec<SandboxRecord>) -> Self {
        let mut left = BODY_BYTES_MAX - FRAME_BYTES;
        let fit = |record: &&SandboxRecord| {
            let bytes = bytes_of(record);
            let fits = bytes <= left;
            left = left.saturating_sub(bytes);
            fits
        };
        // One alone always fits, if it is bounded.
        let count = from.iter().take_while(fit).count().max(1).min(from.len());
        Self { version, records: from.drain(..count).collect() }
    }

    /// Writes the datagram; returns its length in bytes, or nothing if it is too long for one.
    pub fn seal(
        &self,
        host: HostId,
        key_epoch: KeyEpoch,
        key: &SenderKey,
        out: &mut [u8; DATAGRAM_BYTES_MAX],
    ) -> Option<usize> {
        let bytes = codec::write(self);
        if bytes.len() > BODY_BYTES_MAX {
            return None;
        }
        let sender = Sender { role: Role::Host, id: host.0, key_epoch };
        Some(datagram::seal(Kind::Records, sender, key, out, |body| {
            body[..bytes.len()].copy_from_slice(&bytes);
            bytes.len()
        }))
    }

    /// Records out of a verified datagram.
    ///
    /// # Errors
    /// [`Malformed`]: not records of a host.
    pub fn open(datagram: &Verified<'_>) -> Result<(HostId, Self), Malformed> {
        if datagram.kind != Kind::Records || datagram.sender.role != Role::Host {
            return Err(Malformed::Magic);
        }
        let host = HostId(datagram.sender.id);
        Ok((host, Self::read(host, datagram.body)?))
    }

    /// Records out of the body of a datagram of that host, which has been verified.
    ///
    /// # Errors
    /// [`Malformed`]: no records, or one of another host's sandbox (PROTOCOL 9.3).
    pub fn read(host: HostId, body: &[u8]) -> Result<Self, Malformed> {
        let this: Self = codec::read(body, BODY_BYTES_MAX)?;
        let theirs = |record: &SandboxRecord| record.sandbox.host == host;
        let named = |record: &SandboxRecord| {
            let tenant = record.tenant.as_bytes();
            !tenant.is_empty() && tenant.len() <= NAME_BYTES_MAX && !tenant.contains(&0)
        };
        if !this.records.iter().all(|record| theirs(record) && named(record)) {
            return Err(Malformed::Value);
        }
        Ok(this)
    }
}

/// A record as a list tells it.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Listed {
    /// What its host said, its times brought forward to now.
    pub record: SandboxRecord,
    /// Milliseconds since the host said so.
    pub heard_ms: u64,
}

#[cfg(test)]
mod tests {
    use alloc::{string::ToString, vec};
    use std::format;

    use super::*;
    use crate::{LaunchId, SandboxId, Seq, call::State, network::Published, seal::FleetKey};

    fn record(local: u64, long: usize) -> SandboxRecord {
        let text = |len: usize| "\u{fc}".repeat(len / 2);
        SandboxRecord {
            sandbox: SandboxId { host: HostId(7), local },
            launch_id: LaunchId([1; 16]),
            tenant: "acme".to_string(),
            image: text(long),
            shape: 1,
            command: vec!["sh".to_string(), text(long)],
            labels: (0..long).map(|n| (format!("name{n}"), format!("value{n}"))).collect(),
            state: State::Running,
            age_ms: 5,
            left_ms: 6,
            network: Network::default(),
            published: (0..long)
                .map(|port| Published { port: 1, address: format!("{:>47}", port) })
                .collect(),
        }
    }

    #[test]
    fn the_longest_record_fits_a_datagram_alone_and_short_ones_share_it() {
        let key = FleetKey { epoch: KeyEpoch(1), secret: [9; 32] }.sender(Role::Host, 7);
        let mut out = [0; DATAGRAM_BYTES_MAX];
        for long in [0, 1, 3, 50, 127, 1000, 20_000] {
            let mut many: Vec<_> = (0..9).map(|n| bounded(record(n, long))).collect();
            let mut seen = 0;
            while !many.is_empty() {
                let records = Records::take(version(Seq(3), 4), &mut many);
                let len = records.seal(HostId(7), KeyEpoch(1), &key, &mut out).unwrap();
                let datagram = datagram::Datagram::parse(&out[..len]).unwrap();
                let (host, read) = Records::open(&datagram.verify(&key).unwrap()).unwrap();
                assert_eq!((host, &read), (HostId(7), &records));
                seen += records.records.len();
                if long == 0 {
                    assert!(
                        records.records.len() >= 5 || many.is_empty(),
                        "{}",
                        records.records.len()
                    );
                }
            }
            assert_eq!(seen, 9);
        }
    }

    #[test]
    fn a_host_speaks_of_its_own_sandboxes_only() {
        // PROTOCOL 9.3.
        let records = Records { version: 1, records: vec![record(1, 2)] };
        let body = codec::write(&records);
        assert_eq!(Records::read(HostId(7), &body), Ok(records));
        assert_eq!(Records::read(HostId(8), &body), Err(Malformed::Value));
    }

    #[test]
    fn versions_grow_with_heartbeats_and_within() {
        // PROTOCOL 9.2.
        assert!(version(Seq(4), 0) > version(Seq(3), u16::MAX));
        assert!(version(Seq(3), 1) > version(Seq(3), 0));
    }
}
