//! The capacity feed: aggregators push every change to the placers that asked.
//!
//! A placer subscribes by datagram and renews; an aggregator answers to the address that the subscription came
//! from, sealed under the placer's key. A feed datagram is a head and up to [`ENTRIES_MAX`] entries of 16 bytes.
//! A lost one is repaired by the host's next heartbeat.

use rkyv::{Archive, Deserialize, Serialize};

use crate::{
    capacity::CapacityWord,
    codec::{self, Malformed},
    datagram::{self, BODY_BYTES_MAX, Kind, Sender, Verified},
    id::HostId,
    limits::DATAGRAM_BYTES_MAX,
    seal::{KeyEpoch, Role, SenderKey},
};

/// Milliseconds that a subscription lives without renewal; placers renew at a third of it.
pub const SUBSCRIPTION_MS: u64 = 30_000;

const HEAD_BYTES: usize = 16;
const ENTRY_BYTES: usize = 16;

/// Entries of one datagram.
pub const ENTRIES_MAX: usize = (BODY_BYTES_MAX - HEAD_BYTES) / ENTRY_BYTES;

/// A placer's wish for the feed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Clone, Copy, Debug))]
pub struct Subscribe {
    /// Grows with each subscription of this placer, over restarts too (its clock serves): older ones are replays.
    pub seq: u64,
    /// One to be sent every host once, zero for changes only, two to end the subscription.
    pub want: u8,
}

impl Subscribe {
    /// Changes only.
    pub const CHANGES: u8 = 0;
    /// Every host once, then changes.
    pub const EVERYTHING: u8 = 1;
    /// Nothing more.
    pub const END: u8 = 2;

    /// Writes the datagram; returns its length in bytes.
    pub fn seal(
        &self,
        placer: u64,
        key_epoch: KeyEpoch,
        key: &SenderKey,
        out: &mut [u8; DATAGRAM_BYTES_MAX],
    ) -> usize {
        let sender = Sender { role: Role::Placer, id: placer, key_epoch };
        datagram::seal(Kind::Subscribe, sender, key, out, |body| codec::put(self, body))
    }

    /// A subscription, and the placer it is from, out of a verified datagram.
    ///
    /// # Errors
    /// [`Malformed`]: not a subscription of a placer, or a field out of bounds.
    pub fn open(datagram: &Verified<'_>) -> Result<(u64, Self), Malformed> {
        if datagram.kind != Kind::Subscribe || datagram.sender.role != Role::Placer {
            return Err(Malformed::Magic);
        }
        let body = codec::view::<ArchivedSubscribe>(datagram.body)?;
        let subscribe = Self { seq: body.seq.to_native(), want: body.want };
        if subscribe.want > Self::END {
            return Err(Malformed::Value);
        }
        Ok((datagram.sender.id, subscribe))
    }
}

/// Writes a feed datagram for `placer`; returns its length in bytes.
///
/// `aggregator` and `seq` let the placer count what was lost on the way.
///
/// # Panics
/// With more than [`ENTRIES_MAX`] entries.
pub fn seal(
    aggregator: u64,
    seq: u64,
    entries: &[(HostId, CapacityWord)],
    (placer, key_epoch, key): (u64, KeyEpoch, &SenderKey),
    out: &mut [u8; DATAGRAM_BYTES_MAX],
) -> usize {
    assert!(entries.len() <= ENTRIES_MAX, "a feed datagram holds its entries");
    let sender = Sender { role: Role::Placer, id: placer, key_epoch };
    datagram::seal(Kind::Feed, sender, key, out, |body| {
        body[..8].copy_from_slice(&aggregator.to_le_bytes());
        body[8..HEAD_BYTES].copy_from_slice(&seq.to_le_bytes());
        let slots = body[HEAD_BYTES..].chunks_exact_mut(ENTRY_BYTES);
        for (slot, (host, word)) in slots.zip(entries) {
            slot[..8].copy_from_slice(&host.0.to_le_bytes());
            slot[8..].copy_from_slice(&word.0.to_le_bytes());
        }
        HEAD_BYTES + entries.len() * ENTRY_BYTES
    })
}

/// A feed datagram that was checked.
#[derive(Clone, Copy, Debug)]
pub struct Feed<'a> {
    /// Who sent it.
    pub aggregator: u64,
    /// Counts this aggregator's datagrams to this placer.
    pub seq: u64,
    entries: &'a [u8],
}

impl<'a> Feed<'a> {
    /// A feed out of a verified datagram.
    ///
    /// # Errors
    /// [`Malformed`]: not a feed, or a length that is not whole entries.
    pub fn open(datagram: &Verified<'a>) -> Result<Self, Malformed> {
        if datagram.kind != Kind::Feed || datagram.sender.role != Role::Placer {
            return Err(Malformed::Magic);
        }
        let (head, entries) =
            datagram.body.split_first_chunk::<HEAD_BYTES>().ok_or(Malformed::Length)?;
        if !entries.len().is_multiple_of(ENTRY_BYTES) {
            return Err(Malformed::Length);
        }
        let [aggregator @ .., s0, s1, s2, s3, s4, s5, s6, s7] = *head;
        Ok(Self {
            aggregator: u64::from_le_bytes(aggregator),
            seq: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
            entries,
        })
    }

    /// Host and word of each entry.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = (HostId, CapacityWord)> + 'a {
        self.entries.as_chunks::<ENTRY_BYTES>().0.iter().map(|entry| {
            let [host @ .., w0, w1, w2, w3, w4, w5, w6, w7] = *entry;
            let word = u64::from_le_bytes([w0, w1, w2, w3, w4, w5, w6, w7]);
            (HostId(u64::from_le_bytes(host)), CapacityWord(word))
        })
    }
}
