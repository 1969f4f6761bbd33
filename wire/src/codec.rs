//! The only door between bytes and records: rkyv with checked access.
//!
//! Records of fixed size are read where they lie, after a check of their exact length (PROTOCOL 1.3: rkyv reads
//! a longer slice from its end, so that a length that is not checked lets an attacker choose the view).
//! Records of variable size are checked and copied out.

use alloc::vec::Vec;
use core::mem::size_of;

use rkyv::{
    Archive, Deserialize, Portable, Serialize,
    api::{
        high::{HighDeserializer, HighSerializer, HighValidator},
        low::{LowSerializer, LowValidator},
    },
    bytecheck::CheckBytes,
    rancor::{Error, Failure},
    ser::{
        allocator::{ArenaHandle, SubAllocator},
        writer::Buffer,
    },
    util::AlignedVec,
};

/// Bytes that are not a record of the wanted kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Shorter or longer than the record is.
    #[error("wrong length")]
    Length,
    /// Does not begin as the record does.
    #[error("wrong magic or kind")]
    Magic,
    /// A version that this build does not speak.
    #[error("unknown version")]
    Version,
    /// A field has a value outside its limits, or its bytes are no value at all.
    #[error("field out of bounds")]
    Value,
}

/// Reads a record of fixed size in place.
///
/// # Errors
/// [`Malformed::Length`] or [`Malformed::Value`].
pub fn view<T>(bytes: &[u8]) -> Result<&T, Malformed>
where
    T: Portable + for<'a> CheckBytes<LowValidator<'a, Failure>>,
{
    if bytes.len() != size_of::<T>() {
        return Err(Malformed::Length);
    }
    rkyv::api::low::access::<T, Failure>(bytes).map_err(|_| Malformed::Value)
}

/// Writes a record of fixed size to the front of `out`; returns its length in bytes.
///
/// # Panics
/// If `out` is shorter than the record: callers own buffers of [`crate::limits::DATAGRAM_BYTES_MAX`].
pub fn put<T>(value: &T, out: &mut [u8]) -> usize
where
    T: for<'a> Serialize<LowSerializer<Buffer<'a>, SubAllocator<'a>, Failure>>,
{
    let size = size_of::<T::Archived>();
    let writer = Buffer::from(&mut out[..size]);
    let alloc = SubAllocator::new(&mut []); // Records of fixed size need no scratch.
    let done = rkyv::api::low::to_bytes_in_with_alloc::<_, _, Failure>(value, writer, alloc);
    assert!(done.is_ok(), "a record of fixed size fits a buffer of that size");
    size
}

/// Checks `bytes` and copies the record out.
///
/// # Errors
/// [`Malformed::Length`] above `bytes_max`, else [`Malformed::Value`].
pub fn read<T>(bytes: &[u8], bytes_max: usize) -> Result<T, Malformed>
where
    T: Archive,
    T::Archived:
        for<'a> CheckBytes<HighValidator<'a, Error>> + Deserialize<T, HighDeserializer<Error>>,
{
    if bytes.len() > bytes_max {
        return Err(Malformed::Length);
    }
    rkyv::from_bytes::<T, Error>(bytes).map_err(|_| Malformed::Value)
}

/// Checks `bytes` and reads the record where it lies.
///
/// # Errors
/// [`Malformed::Length`] above `bytes_max`, else [`Malformed::Value`].
pub fn access<T>(bytes: &[u8], bytes_max: usize) -> Result<&T, Malformed>
where
    T: Portable + for<'a> CheckBytes<HighValidator<'a, Error>>,
{
    if bytes.len() > bytes_max {
        return Err(Malformed::Length);
    }
    rkyv::access::<T, Error>(bytes).map_err(|_| Malformed::Value)
}

/// Writes a record of any size.
///
/// # Panics
/// Never for the records of this crate, which have no fallible parts.
#[must_use]
pub fn write(
    value: &impl for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, Error>>,
) -> Vec<u8> {
    match rkyv::to_bytes::<Error>(value) {
        Ok(bytes) => bytes.into_vec(),
        Err(error) => unreachable!("records have no fallible parts: {error}"),
    }
}

/// What processes of one build say to one another over sockets that keep packets whole: any record, coded by [`write()`]
/// and checked on its way in. Such a socket bounds the length, and there is a version and no compatibility.
pub trait Message: Sized {
    /// Bytes of this message.
    fn encode(&self) -> Vec<u8>;

    /// Checks bytes from outside into a message.
    fn decode(bytes: &[u8]) -> Option<Self>;
}

impl<T> Message for T
where
    T: Archive + for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, Error>>,
    T::Archived:
        for<'a> CheckBytes<HighValidator<'a, Error>> + Deserialize<T, HighDeserializer<Error>>,
{
    fn encode(&self) -> Vec<u8> {
        write(self)
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        read(bytes, usize::MAX).ok()
    }
}
