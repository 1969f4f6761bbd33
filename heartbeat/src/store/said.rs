//! A row as both stores keep it: one value of fixed size, besides the key and the word.
//!
//! One value rather than a column a field, because a Cassandra cell costs about as much as all of these bytes: rows a
//! second is what the store is for. Version first, then the fields in the order of [`Row`], little-endian.

use heartbeat_core::Row;
use wire::{CapacityWord, HostId, Incarnation, Seq};

/// Bytes of a row.
pub(super) const ROW_BYTES: usize = 62;
const ROW_VERSION: u8 = 1;

/// The host is the key, and not in it.
pub(super) fn write_row(row: &Row) -> [u8; ROW_BYTES] {
    let mut bytes = [0; ROW_BYTES];
    let mut at = 0;
    let mut put = |part: &[u8]| {
        bytes[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    };
    put(&[ROW_VERSION]);
    put(&row.incarnation.0.to_le_bytes());
    put(&row.seq.0.to_le_bytes());
    put(&[row.revision]);
    put(&row.ip);
    put(&row.port.to_le_bytes());
    put(&row.word.0.to_le_bytes());
    row.total.iter().for_each(|total| put(&total.to_le_bytes()));
    put(&row.running.to_le_bytes());
    put(&row.interval_ms.to_le_bytes());
    put(&[u8::from(row.says_draining), u8::from(row.no_boxes)]);
    debug_assert_eq!(at, ROW_BYTES);
    bytes
}

/// `None` for bytes that are no row of a version that we know.
pub(super) fn read_row(host: HostId, bytes: &[u8]) -> Option<Row> {
    fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
        let (first, rest) = bytes.split_first_chunk::<N>()?;
        *bytes = rest;
        Some(*first)
    }
    let mut rest = bytes;
    let rest = &mut rest;
    if bytes.len() != ROW_BYTES || take::<1>(rest)? != [ROW_VERSION] {
        return None;
    }
    Some(Row {
        host,
        incarnation: Incarnation(u64::from_le_bytes(take(rest)?)),
        seq: Seq(u64::from_le_bytes(take(rest)?)),
        revision: take::<1>(rest)?[0],
        ip: take(rest)?,
        port: u16::from_le_bytes(take(rest)?),
        word: CapacityWord(u64::from_le_bytes(take(rest)?)),
        total: [
            u16::from_le_bytes(take(rest)?),
            u16::from_le_bytes(take(rest)?),
            u16::from_le_bytes(take(rest)?),
            u16::from_le_bytes(take(rest)?),
        ],
        running: u32::from_le_bytes(take(rest)?),
        interval_ms: u32::from_le_bytes(take(rest)?),
        says_draining: take::<1>(rest)?[0] != 0,
        no_boxes: take::<1>(rest)?[0] != 0,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn row(host: u64, seq: u64) -> Row {
        Row {
            host: HostId(host),
            incarnation: Incarnation(3),
            seq: Seq(seq),
            revision: 0,
            ip: [7; 16],
            port: 9,
            word: CapacityWord(seq),
            total: [1, 2, 3, 4],
            running: 5,
            interval_ms: 1_000,
            says_draining: false,
            no_boxes: true,
        }
    }

    proptest! {
        #[test]
        fn a_row_reads_back_and_no_bytes_panic(
            host: u64, seq: u64, revision: u8, word: u64, junk in proptest::collection::vec(any::<u8>(), 0..80),
        ) {
            let row = Row { revision, word: CapacityWord(word), ..row(host, seq) };
            prop_assert_eq!(read_row(HostId(host), &write_row(&row)), Some(row));
            let _ = read_row(HostId(host), &junk);
        }
    }
}
