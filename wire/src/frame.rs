//! Frames: how calls, answers and byte streams share one QUIC stream.
//!
//! A frame is a kind (u8), three bytes of zero, a length (u32, little-endian) and that many bytes. The first frame of
//! a stream is a launch or a call; what may follow depends on it (PROTOCOL 7).

use crate::{codec::Malformed, limits::FRAME_BYTES_MAX};

/// Bytes before a frame's payload.
pub const HEADER_BYTES: usize = 8;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// [`crate::launch::LaunchHead`], then a [`crate::launch::LaunchRequest`].
    Launch = 1,
    /// A [`crate::launch::LaunchReply`].
    LaunchReply = 2,
    /// A [`crate::call::Call`].
    Call = 3,
    /// A [`crate::call::Answer`].
    Answer = 4,
    /// Input of the attached process.
    Stdin = 5,
    /// Its output.
    Stdout = 6,
    /// Its error output.
    Stderr = 7,
    /// Bytes of a file or a port.
    Data = 8,
    /// No more bytes in this direction. Empty.
    End = 9,
    /// The attached process ended: code (i32), why (u8).
    Exit = 10,
    /// The client's terminal has this size: rows (u16), columns (u16).
    Resize = 11,
    /// A signal for the attached process: number (u8).
    Signal = 12,
    /// Output was dropped before the next frame: bytes lost (u64).
    Lost = 13,
    /// From a placer to a host, before the call: the tenant in whose name it is made (UTF-8, at most
    /// [`crate::limits::NAME_BYTES_MAX`]; empty for an operator). A host answers `sandbox-not-found` for
    /// another tenant's sandbox (PROTOCOL 7.3).
    OnBehalf = 14,
    /// Opens a lane: a long-lived stream of many launches, so that what is ready together travels in one
    /// packet. Empty. What follows are [`Kind::LaneLaunch`] and [`Kind::LaneReply`] frames (PROTOCOL 7.7).
    Lane = 15,
    /// A launch on a lane: tag (u32), then the payload of a [`Kind::Launch`].
    LaneLaunch = 16,
    /// Its reply: tag (u32), then the payload of a [`Kind::LaunchReply`].
    LaneReply = 17,
}

/// Bytes of the tag before a lane's launches and replies.
pub const LANE_TAG_BYTES: usize = 4;

/// Splits the tag off a lane frame's payload.
///
/// # Errors
/// [`Malformed::Length`] if it is shorter than a tag.
pub fn lane_tag(payload: &[u8]) -> Result<(u32, &[u8]), Malformed> {
    let (tag, rest) = payload.split_first_chunk().ok_or(Malformed::Length)?;
    Ok((u32::from_le_bytes(*tag), rest))
}

impl Kind {
    const fn of(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Launch,
            2 => Self::LaunchReply,
            3 => Self::Call,
            4 => Self::Answer,
            5 => Self::Stdin,
            6 => Self::Stdout,
            7 => Self::Stderr,
            8 => Self::Data,
            9 => Self::End,
            10 => Self::Exit,
            11 => Self::Resize,
            12 => Self::Signal,
            13 => Self::Lost,
            14 => Self::OnBehalf,
            15 => Self::Lane,
            16 => Self::LaneLaunch,
            17 => Self::LaneReply,
            _ => return None,
        })
    }
}

/// A frame's header that was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the payload is.
    pub kind: Kind,
    /// Its bytes, at most [`FRAME_BYTES_MAX`].
    pub len: usize,
}

impl Header {
    /// Checks a header.
    ///
    /// # Errors
    /// [`Malformed`]: an unknown kind, a reserved byte that is not zero, or a length above the limit.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Malformed> {
        let [kind, r0, r1, r2, len @ ..] = *bytes;
        let kind = Kind::of(kind).ok_or(Malformed::Magic)?;
        if [r0, r1, r2] != [0; 3] {
            return Err(Malformed::Value);
        }
        let len = usize::try_from(u32::from_le_bytes(len)).map_err(|_| Malformed::Length)?;
        if len > FRAME_BYTES_MAX {
            return Err(Malformed::Length);
        }
        Ok(Self { kind, len })
    }

    /// The header as it travels.
    ///
    /// # Panics
    /// If `len` is above [`FRAME_BYTES_MAX`].
    #[must_use]
    pub fn bytes(self) -> [u8; HEADER_BYTES] {
        assert!(self.len <= FRAME_BYTES_MAX, "callers cut bulk data into frames");
        #[expect(clippy::cast_possible_truncation, reason = "asserted below 2^18")]
        let [l0, l1, l2, l3] = (self.len as u32).to_le_bytes();
        [self.kind as u8, 0, 0, 0, l0, l1, l2, l3]
    }
}
