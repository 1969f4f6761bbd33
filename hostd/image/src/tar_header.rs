//! Tar headers: the numbers, names and records before an entry's data.

use std::collections::BTreeMap;
use std::io;

use crate::limits::{PATH_BYTES_MAX, XATTR_BYTES_MAX};
use crate::refuse::{Refusal, Rule};
use crate::tree::{Meta, Time, Xattr};

/// Bytes of a block; headers are one, data are rounded up to them.
pub(crate) const BLOCK: usize = 512;

/// PAX records by key.
pub(crate) type Records = BTreeMap<Vec<u8>, Vec<u8>>;

pub(crate) fn broken(what: &str) -> io::Error {
    Refusal::new(Rule::BrokenTar, b"", what).into()
}

/// One header block.
pub(crate) struct Header<'a>(pub(crate) &'a [u8; BLOCK]);

impl Header<'_> {
    pub(crate) fn field(&self, at: usize, len: usize) -> &[u8] {
        &self.0[at..at + len]
    }

    pub(crate) fn kind(&self) -> u8 {
        self.0[156]
    }

    pub(crate) fn check_sum(&self) -> io::Result<()> {
        let said = self.number64(148, 8)?;
        let blank = |i: usize, b: u8| if (148..156).contains(&i) { b' ' } else { b };
        let sum: u64 = self.0.iter().enumerate().map(|(i, b)| u64::from(blank(i, *b))).sum();
        // Some old writers summed signed bytes.
        let signed: i64 =
            self.0.iter().enumerate().map(|(i, b)| i64::from(blank(i, *b).cast_signed())).sum();
        if sum != said && u64::try_from(signed) != Ok(said) {
            return Err(broken("a header with a wrong checksum: this is no tar, or it is damaged"));
        }
        Ok(())
    }

    pub(crate) fn path(&self) -> Vec<u8> {
        let name = cut_at_nul(self.field(0, 100));
        let prefix = cut_at_nul(self.field(345, 155));
        if self.field(257, 6) == b"ustar\0" && !prefix.is_empty() {
            [prefix, b"/", name].concat()
        } else {
            name.to_vec()
        }
    }

    /// A number in octal, or in base 256 when its first bit is set.
    fn number(&self, at: usize, len: usize) -> io::Result<i128> {
        let field = self.field(at, len);
        if field[0] & 0x80 != 0 {
            let negative = field[0] & 0x40 != 0;
            let first = i128::from(field[0] & 0x7f) - if negative { 0x80 } else { 0 };
            return Ok(field[1..].iter().fold(first, |n, b| n << 8 | i128::from(*b)));
        }
        let text = cut_at_nul(field).trim_ascii();
        let mut number = 0;
        for b in text {
            if !(b'0'..=b'7').contains(b) {
                return Err(broken("a header field that is no number"));
            }
            number = number << 3 | i128::from(b - b'0');
        }
        Ok(number)
    }

    pub(crate) fn number64(&self, at: usize, len: usize) -> io::Result<u64> {
        let number = u64::try_from(self.number(at, len)?).ok();
        // No file system has a file of 2^63 bytes, and sums of two sizes must not wrap.
        number.filter(|n| *n < 1 << 62).ok_or_else(|| broken("a number out of range"))
    }

    pub(crate) fn number32(&self, at: usize, len: usize) -> io::Result<u32> {
        u32::try_from(self.number(at, len)?).map_err(|_| broken("a number out of range"))
    }

    pub(crate) fn meta(&self, records: &Records, path: &[u8]) -> io::Result<Meta> {
        let id = |key: &[u8], at| match records.get(key) {
            Some(text) => decimal(text)
                .and_then(|n| u32::try_from(n).ok())
                .ok_or_else(|| broken("an owner that is no number")),
            None => self.number32(at, 8),
        };
        let mtime = match records.get(b"mtime".as_slice()) {
            Some(text) => parse_time(text).ok_or_else(|| broken("a time that is no number"))?,
            None => Time {
                secs: i64::try_from(self.number(136, 12)?).map_err(|_| broken("a time"))?,
                nanos: 0,
            },
        };
        let mode = u16::try_from(self.number32(100, 8)? & 0o7777).unwrap_or(0);
        Ok(Meta {
            mode,
            uid: id(b"uid", 108)?,
            gid: id(b"gid", 116)?,
            mtime,
            xattrs: xattrs(records, path)?,
        })
    }
}

/// The extended attributes among PAX records.
fn xattrs(records: &Records, path: &[u8]) -> io::Result<Vec<Xattr>> {
    let mut out: Vec<Xattr> = Vec::new();
    let mut bytes = 0;
    for (key, value) in records {
        let Some(name) = key.strip_prefix(b"SCHILY.xattr.") else { continue };
        bytes += name.len() + value.len() + 8;
        if bytes > XATTR_BYTES_MAX || name.len() > 255 || name.contains(&0) {
            let what = "extended attributes longer than a file can have";
            return Err(Refusal::new(Rule::Xattr, path, what).into());
        }
        out.push((name.into(), value.as_slice().into()));
    }
    Ok(out)
}

pub(crate) fn check_target(target: Vec<u8>, path: &[u8]) -> io::Result<Vec<u8>> {
    if target.is_empty() || target.len() > PATH_BYTES_MAX || target.contains(&0) {
        let what = "a symlink's target that is empty, too long, or has a NUL";
        return Err(Refusal::new(Rule::Path, path, what).into());
    }
    Ok(target)
}

pub(crate) fn cut_at_nul(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

pub(crate) fn decimal(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|n| *n < 1 << 62)
}

/// `-12.5` is 13 seconds before 1970 and half a second on.
fn parse_time(text: &[u8]) -> Option<Time> {
    let text = std::str::from_utf8(text).ok()?;
    let (negative, text) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let secs = i64::try_from(decimal(whole.as_bytes())?).ok()?;
    if !part.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let nanos: u32 = format!("{part:0<9.9}").parse().ok()?;
    Some(match (negative, nanos) {
        (false, _) => Time { secs, nanos },
        (true, 0) => Time { secs: -secs, nanos },
        (true, _) => Time { secs: -secs - 1, nanos: 1_000_000_000 - nanos },
    })
}

/// PAX records: `LENGTH KEY=VALUE\n`, where the length counts all of it.
pub(crate) fn parse_pax(mut bytes: &[u8]) -> io::Result<Records> {
    let bad = |what: &str| io::Error::from(Refusal::new(Rule::BrokenRecord, b"", what));
    let mut out = Records::new();
    while !bytes.is_empty() {
        let space = bytes.iter().take(20).position(|b| *b == b' ');
        let space = space.ok_or_else(|| bad("a PAX record without a length"))?;
        let len = decimal(&bytes[..space]).and_then(|n| usize::try_from(n).ok());
        let len = len.filter(|n| (space + 3..=bytes.len()).contains(n));
        let len = len.ok_or_else(|| bad("a PAX record with a wrong length"))?;
        let (record, rest) = bytes.split_at(len);
        let record = &record[space + 1..];
        let equals = record.iter().position(|b| *b == b'=');
        let equals = equals.filter(|at| *at > 0 && record.ends_with(b"\n"));
        let equals = equals.ok_or_else(|| bad("a PAX record without a key or an end"))?;
        let (key, value) = (&record[..equals], &record[equals + 1..record.len() - 1]);
        if out.insert(key.to_vec(), value.to_vec()).is_some() {
            return Err(bad("the same PAX key twice"));
        }
        bytes = rest;
    }
    Ok(out)
}
