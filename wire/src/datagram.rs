//! The envelope of every datagram: a prefix that names the sender, a body, a tag.
//!
//! ```text
//! 0        3      4         5      6          8           16            20         len-16    len
//! | "VLY"  | kind | version | role | body len | sender id | key epoch   | body ... | tag     |
//! ```
//! Numbers are little-endian. [`Datagram::parse`] checks the frame, [`Datagram::verify`] the tag, and only then may
//! the body be read: the types are in that order ([`Datagram`], then [`Verified`]).

use crate::{
    codec::Malformed,
    limits::{DATAGRAM_BYTES_MAX, TAG_BYTES},
    seal::{KeyEpoch, Role, SenderKey},
};

/// Bytes of the prefix.
pub const PREFIX_BYTES: usize = 20;

/// Bytes that a body may have.
pub const BODY_BYTES_MAX: usize = DATAGRAM_BYTES_MAX - PREFIX_BYTES - TAG_BYTES;

const MAGIC: &[u8; 3] = b"VLY";
const VERSION: u8 = 1;

/// What a datagram is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Host to aggregator: [`crate::heartbeat::Heartbeat`].
    Heartbeat = 1,
    /// Aggregator to host: [`crate::heartbeat::Directive`].
    Directive = 2,
    /// Placer to aggregator: [`crate::report::FailureReport`].
    FailureReport = 3,
    /// Placer to aggregator: [`crate::feed::Subscribe`].
    Subscribe = 4,
    /// Aggregator to placer: [`crate::feed`] entries.
    Feed = 5,
    /// Host to aggregator: [`crate::records::Records`].
    Records = 6,
}

impl Kind {
    const fn of(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Heartbeat,
            2 => Self::Directive,
            3 => Self::FailureReport,
            4 => Self::Subscribe,
            5 => Self::Feed,
            6 => Self::Records,
            _ => return None,
        })
    }
}

const fn role_of(byte: u8) -> Option<Role> {
    Some(match byte {
        1 => Role::Host,
        2 => Role::Placer,
        3 => Role::Aggregator,
        4 => Role::Client,
        5 => Role::Operator,
        _ => return None,
    })
}

/// Who a datagram is from (or to, where an aggregator answers under its peer's key).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sender {
    /// The role whose key seals it.
    pub role: Role,
    /// The id whose key seals it.
    pub id: u64,
    /// The epoch of that key.
    pub key_epoch: KeyEpoch,
}

/// A datagram whose frame is right and whose sender is an allegation.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<'a> {
    /// What it is about.
    pub kind: Kind,
    /// Who it claims to be from.
    pub sender: Sender,
    said: &'a [u8],
    tag: &'a [u8; TAG_BYTES],
}

/// The body of a datagram whose tag was right: bytes of a known sender, still to be checked as a record.
#[derive(Clone, Copy, Debug)]
pub struct Verified<'a> {
    /// What it is about.
    pub kind: Kind,
    /// Who it is from.
    pub sender: Sender,
    /// The record's bytes.
    pub body: &'a [u8],
}

impl<'a> Datagram<'a> {
    /// Checks length, magic, version, kind and role.
    ///
    /// # Errors
    /// [`Malformed`], by rule.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        if bytes.len() > DATAGRAM_BYTES_MAX {
            return Err(Malformed::Length);
        }
        let (said, tag) = bytes.split_last_chunk::<TAG_BYTES>().ok_or(Malformed::Length)?;
        let (prefix, body) = said.split_first_chunk::<PREFIX_BYTES>().ok_or(Malformed::Length)?;
        let [v, l, y, kind, version, role, len0, len1, sender @ .., e0, e1, e2, e3] = *prefix;
        if [v, l, y] != *MAGIC {
            return Err(Malformed::Magic);
        }
        if version != VERSION {
            return Err(Malformed::Version);
        }
        let kind = Kind::of(kind).ok_or(Malformed::Magic)?;
        if usize::from(u16::from_le_bytes([len0, len1])) != body.len() {
            return Err(Malformed::Length);
        }
        let sender = Sender {
            role: role_of(role).ok_or(Malformed::Value)?,
            id: u64::from_le_bytes(sender),
            key_epoch: KeyEpoch(u32::from_le_bytes([e0, e1, e2, e3])),
        };
        Ok(Self { kind, sender, said, tag })
    }

    /// Checks the tag under the alleged sender's key; `None` if it is another's.
    #[must_use]
    pub fn verify(&self, key: &SenderKey) -> Option<Verified<'a>> {
        key.verifies(self.said, self.tag).then_some(Verified {
            kind: self.kind,
            sender: self.sender,
            body: &self.said[PREFIX_BYTES..],
        })
    }
}

/// Writes a datagram into `out` with the body that `fill` puts; returns its length in bytes.
///
/// # Panics
/// If `fill` says more than [`BODY_BYTES_MAX`].
pub fn seal(
    kind: Kind,
    sender: Sender,
    key: &SenderKey,
    out: &mut [u8; DATAGRAM_BYTES_MAX],
    fill: impl FnOnce(&mut [u8]) -> usize,
) -> usize {
    let body_len = fill(&mut out[PREFIX_BYTES..DATAGRAM_BYTES_MAX - TAG_BYTES]);
    assert!(body_len <= BODY_BYTES_MAX, "a body fits its datagram");
    #[expect(clippy::cast_possible_truncation, reason = "asserted below 1,200")]
    let len = (body_len as u16).to_le_bytes();
    out[..3].copy_from_slice(MAGIC);
    out[3..8].copy_from_slice(&[kind as u8, VERSION, sender.role as u8, len[0], len[1]]);
    out[8..16].copy_from_slice(&sender.id.to_le_bytes());
    out[16..PREFIX_BYTES].copy_from_slice(&sender.key_epoch.0.to_le_bytes());
    let said_len = PREFIX_BYTES + body_len;
    let tag = key.tag(&out[..said_len]);
    out[said_len..said_len + TAG_BYTES].copy_from_slice(&tag);
    said_len + TAG_BYTES
}
