//! The one tar reader: strict, streaming, and without a second opinion.
//!
//! Escapes hide where two readers of one archive disagree (a PAX size against a ustar size, a doubled header, data after a
//! link). So what is ambiguous is refused by rule instead of settled. PAX (with sparse 1.0), GNU long names, GNU sparse
//! files and base-256 numbers are read; volume headers, multi-volume parts and PAX sparse 0.x are refused. A crate's reader
//! is not used, for it settles those cases silently; the tests use one to write archives.

use std::io::{self, Read};

use crate::limits::{SPARSE_PIECES_MAX, TAR_RECORD_BYTES_MAX};
use crate::pack::FileBytes;
use crate::refuse::{Refusal, Rule};
use crate::tar_header::{
    BLOCK, Header, Records, broken, check_target, cut_at_nul, decimal, parse_pax,
};
use crate::tree::Meta;

/// From here on, an 11-digit octal field cannot say the size.
const USTAR_SIZE_END: u64 = 1 << 33;

/// What an entry is, apart from its name and its metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EntryKind {
    /// A regular file of so many bytes, holes included.
    File(u64),
    Dir,
    Symlink(Vec<u8>),
    Hardlink(Vec<u8>),
    Device {
        block: bool,
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: EntryKind,
    pub(crate) meta: Meta,
}

/// Reads entries one after another; the data of the last one through [`Read`].
pub(crate) struct TarReader<R> {
    inner: R,
    globals: Records,
    /// Bytes of the current entry's data that are still in the archive.
    stored: u64,
    /// Zeros that follow it up to the next block.
    padding: u64,
    /// Logical length of the current file, and how much of it was read.
    size: u64,
    at: u64,
    /// Where the stored bytes lie in a sparse file, the next last; `None` for an ordinary one.
    pieces: Option<Vec<(u64, u64)>>,
    path: Vec<u8>,
    /// Bytes taken from the stream so far.
    taken: u64,
}

/// What the extension headers before an entry said.
#[derive(Default)]
struct Extensions {
    pax: Records,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    any: bool,
}

impl<R: Read> TarReader<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self {
            inner,
            globals: Records::new(),
            stored: 0,
            padding: 0,
            size: 0,
            at: 0,
            pieces: None,
            path: Vec::new(),
            taken: 0,
        }
    }

    /// The stream beneath, for what follows the archive's end.
    pub(crate) fn into_inner(self) -> R {
        self.inner
    }

    /// Where in the stream the current entry's data begin, before any of them is read.
    pub(crate) fn data_at(&self) -> u64 {
        self.taken
    }

    /// The next entry, or `None` at the end mark.
    pub(crate) fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        self.skip_data()?;
        let mut extensions = Extensions::default();
        loop {
            let Some(block) = self.read_header()? else {
                if extensions.any {
                    return Err(broken("an extension header without an entry after it"));
                }
                return Ok(None);
            };
            let header = Header(&block);
            header.check_sum()?;
            match header.kind() {
                b'x' => {
                    let pax = parse_pax(&self.record(&header)?)?;
                    if extensions.any && !extensions.pax.is_empty() {
                        return Err(broken("two PAX headers before one entry"));
                    }
                    extensions.pax = pax;
                }
                b'g' => {
                    let pax = parse_pax(&self.record(&header)?)?;
                    if pax.keys().any(|k| k == b"path" || k == b"linkpath" || k == b"size") {
                        return Err(broken("a global PAX header sets a path or a size"));
                    }
                    self.globals.extend(pax);
                    continue;
                }
                b'L' => extensions.long_name = Some(self.long_text(&header)?),
                b'K' => extensions.long_link = Some(self.long_text(&header)?),
                _ => return self.entry(&header, extensions).map(Some),
            }
            extensions.any = true;
        }
    }

    fn entry(&mut self, header: &Header<'_>, ext: Extensions) -> io::Result<Entry> {
        let mut records = self.globals.clone();
        records.extend(ext.pax);
        let text = |key: &[u8]| records.get(key).filter(|v| !v.is_empty());
        let path = text(b"GNU.sparse.name").or_else(|| text(b"path")).cloned();
        let path = path.or(ext.long_name).unwrap_or_else(|| header.path());
        let link = text(b"linkpath").cloned().or(ext.long_link);
        let link = link.unwrap_or_else(|| cut_at_nul(header.field(157, 100)).to_vec());
        let stored = self.size_of(header, &records, &path)?;
        self.path.clone_from(&path);
        self.begin_data(stored);
        let mut meta = header.meta(&records, &path)?;
        let kind = match header.kind() {
            0 if path.ends_with(b"/") => EntryKind::Dir,
            0 | b'0' | b'7' => EntryKind::File(self.sparse_pax(&records, &path)?),
            b'S' => EntryKind::File(self.sparse_gnu(header, &path)?),
            b'1' => EntryKind::Hardlink(link),
            b'2' => {
                meta.mode = 0o777;
                EntryKind::Symlink(check_target(link, &path)?)
            }
            kind @ (b'3' | b'4') => EntryKind::Device {
                block: kind == b'4',
                major: header.number32(329, 8)?,
                minor: header.number32(337, 8)?,
            },
            b'5' => EntryKind::Dir,
            b'6' => EntryKind::Fifo,
            kind => {
                let what = format!("an entry of kind {:?}", char::from(kind));
                return Err(Refusal::new(Rule::Kind, &path, what).into());
            }
        };
        if stored > 0 && !matches!(kind, EntryKind::File(_)) {
            let what = "data after an entry that has none";
            return Err(Refusal::new(Rule::SizeMismatch, &path, what).into());
        }
        Ok(Entry { path, kind, meta })
    }

    /// The stored size, on which header and extension must agree.
    fn size_of(&self, header: &Header<'_>, records: &Records, path: &[u8]) -> io::Result<u64> {
        let said = header.number64(124, 12)?;
        let Some(text) = records.get(b"size".as_slice()) else { return Ok(said) };
        let size = decimal(text).ok_or_else(|| broken("a PAX size that is no number"))?;
        // Writers put 0 or all sevens into the field when it is too short for the number.
        let cannot_say = size >= USTAR_SIZE_END && (said == 0 || said == USTAR_SIZE_END - 1);
        if said != size && !cannot_say {
            let what = format!("the header says {said} bytes and its PAX record {size}");
            return Err(Refusal::new(Rule::SizeMismatch, path, what).into());
        }
        Ok(size)
    }

    fn begin_data(&mut self, stored: u64) {
        self.stored = stored;
        self.padding = stored.wrapping_neg() % BLOCK as u64;
        self.size = stored;
        self.at = 0;
        self.pieces = None;
    }

    /// Skips what is left of the current entry's data.
    fn skip_data(&mut self) -> io::Result<()> {
        let mut buffer = [0u8; 16 << 10];
        let mut left = self.stored + self.padding;
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            self.fill(&mut buffer[..want])?;
            left -= want as u64;
        }
        self.begin_data(0);
        Ok(())
    }

    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.inner.read_exact(buffer).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                Refusal::new(Rule::BrokenTar, &self.path, "the archive breaks off").into()
            }
            _ => e,
        })?;
        self.taken += buffer.len() as u64;
        Ok(())
    }

    /// The next header block; `None` at the end mark, which is a block of zeros.
    fn read_header(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        let mut block = [0u8; BLOCK];
        self.fill(&mut block)?;
        Ok(if block == [0u8; BLOCK] { None } else { Some(block) })
    }

    /// The data of an extension header.
    fn record(&mut self, header: &Header<'_>) -> io::Result<Vec<u8>> {
        let size = header.number64(124, 12)?;
        if size > TAR_RECORD_BYTES_MAX {
            let what = format!("an extension record of {size} bytes");
            return Err(Refusal::new(Rule::BrokenRecord, b"", what).into());
        }
        self.begin_data(size);
        let mut out = vec![0u8; usize::try_from(size).unwrap_or(usize::MAX)];
        self.fill(&mut out)?;
        self.stored = 0;
        self.skip_data()?;
        Ok(out)
    }

    fn long_text(&mut self, header: &Header<'_>) -> io::Result<Vec<u8>> {
        Ok(cut_at_nul(&self.record(header)?).to_vec())
    }

    /// The map of an old GNU sparse file: four pieces in the header, 21 in each block that follows.
    fn sparse_gnu(&mut self, header: &Header<'_>, path: &[u8]) -> io::Result<u64> {
        let mut pieces = Vec::new();
        let mut add = |h: &Header<'_>, at: usize, count: usize| -> io::Result<()> {
            for at in (0..count).map(|i| at + i * 24) {
                if h.field(at, 1) != [0] {
                    pieces.push((h.number64(at, 12)?, h.number64(at + 12, 12)?));
                }
            }
            if pieces.len() > SPARSE_PIECES_MAX {
                return Err(Refusal::new(Rule::Sparse, path, "too many pieces").into());
            }
            Ok(())
        };
        add(header, 386, 4)?;
        let mut more = header.field(482, 1) != [0];
        while more {
            let mut block = [0u8; BLOCK];
            self.fill(&mut block)?;
            let next = Header(&block);
            add(&next, 0, 21)?;
            more = next.field(504, 1) != [0];
        }
        self.set_pieces(pieces, header.number64(483, 12)?, path)
    }

    /// The map of a PAX sparse file (version 1.0), which begins its data; other files have none.
    fn sparse_pax(&mut self, records: &Records, path: &[u8]) -> io::Result<u64> {
        if !records.keys().any(|k| k.starts_with(b"GNU.sparse.")) {
            return Ok(self.size);
        }
        let bad = |what: &str| io::Error::from(Refusal::new(Rule::Sparse, path, what));
        let number = |key: &str| records.get(key.as_bytes()).and_then(|v| decimal(v));
        if number("GNU.sparse.major") != Some(1) || number("GNU.sparse.minor") != Some(0) {
            return Err(bad("a sparse map of a version other than 1.0"));
        }
        let size = number("GNU.sparse.realsize").ok_or_else(|| bad("no size"))?;
        let mut used = 0;
        let count = self.sparse_number(&mut used, path)?;
        let count = usize::try_from(count).ok().filter(|n| *n <= SPARSE_PIECES_MAX);
        let mut pieces = Vec::new();
        for _ in 0..count.ok_or_else(|| bad("too many pieces"))? {
            pieces
                .push((self.sparse_number(&mut used, path)?, self.sparse_number(&mut used, path)?));
        }
        let rest = (BLOCK - used % BLOCK) % BLOCK;
        self.take_stored(&mut vec![0u8; rest], path)?;
        self.set_pieces(pieces, size, path)
    }

    fn sparse_number(&mut self, used: &mut usize, path: &[u8]) -> io::Result<u64> {
        let mut text = Vec::new();
        loop {
            let mut byte = [0u8];
            self.take_stored(&mut byte, path)?;
            *used += 1;
            match byte[0] {
                b'\n' => break,
                b'0'..=b'9' if text.len() < 20 => text.push(byte[0]),
                _ => return Err(Refusal::new(Rule::Sparse, path, "a map that is no number").into()),
            }
        }
        let number = decimal(&text);
        number.ok_or_else(|| Refusal::new(Rule::Sparse, path, "a map that is no number").into())
    }

    fn take_stored(&mut self, buffer: &mut [u8], path: &[u8]) -> io::Result<()> {
        let Some(left) = self.stored.checked_sub(buffer.len() as u64) else {
            return Err(Refusal::new(Rule::Sparse, path, "a map longer than its file").into());
        };
        self.fill(buffer)?;
        self.stored = left;
        Ok(())
    }

    fn set_pieces(
        &mut self,
        mut pieces: Vec<(u64, u64)>,
        size: u64,
        path: &[u8],
    ) -> io::Result<u64> {
        let mut end = 0u64;
        let mut total = 0u64;
        for (at, len) in &pieces {
            let next = at.checked_add(*len).filter(|next| *at >= end && *next <= size);
            end = next.ok_or_else(|| {
                Refusal::new(Rule::Sparse, path, "pieces that overlap or pass the end")
            })?;
            total += len;
        }
        if total != self.stored {
            let what = format!("pieces of {total} bytes with {} stored", self.stored);
            return Err(Refusal::new(Rule::Sparse, path, what).into());
        }
        pieces.retain(|(_, len)| *len > 0);
        pieces.reverse();
        self.pieces = Some(pieces);
        self.size = size;
        Ok(size)
    }
}

impl<R: Read> Read for TarReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.size - self.at).unwrap_or(usize::MAX);
        let mut want = buffer.len().min(left);
        if want == 0 {
            return Ok(0);
        }
        if let Some(pieces) = &mut self.pieces {
            let hole_end = pieces.last().map_or(self.size, |(at, _)| *at);
            if self.at < hole_end {
                let hole = usize::try_from(hole_end - self.at).unwrap_or(usize::MAX);
                let zeros = want.min(hole);
                buffer[..zeros].fill(0);
                self.at += zeros as u64;
                return Ok(zeros);
            }
            if let Some((at, len)) = pieces.last_mut() {
                want = want.min(usize::try_from(*len).unwrap_or(usize::MAX));
                *at += want as u64;
                *len -= want as u64;
                if *len == 0 {
                    pieces.pop();
                }
            }
        }
        self.fill(&mut buffer[..want])?;
        self.stored -= want as u64;
        self.at += want as u64;
        Ok(want)
    }
}

impl<R: Read> FileBytes for TarReader<R> {
    fn zeros_ahead(&mut self) -> u64 {
        let Some(pieces) = &self.pieces else { return 0 };
        pieces.last().map_or(self.size, |(at, _)| *at).saturating_sub(self.at)
    }

    fn skip_zeros(&mut self, bytes: u64) -> io::Result<()> {
        debug_assert!(bytes <= self.zeros_ahead());
        self.at += bytes;
        Ok(())
    }
}
