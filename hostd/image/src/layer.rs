//! One layer's bytes on their way to the tar reader: counted, unpacked, and held against their digests.
//!
//! What a layer is packed with is told by its first bytes, not by what a manifest calls it. A layer that grows beyond every
//! honest ratio is stopped while it grows. The digests are compared after the last byte, before anything is published.

use std::cell::RefCell;
use std::io::{self, BufRead, BufReader, Read};
use std::rc::Rc;

use sha2::{Digest, Sha256};

use crate::id::to_hex;
use crate::limits::{RATIO_FREE_BYTES, RATIO_MAX};
use crate::progress::Progress;
use crate::refuse::{PrepareError, Refusal, Rule};

/// What passed a point of the stream.
struct Tally {
    bytes: u64,
    hasher: Option<Sha256>,
}

type SharedTally = Rc<RefCell<Tally>>;

fn tally(hashes: bool) -> SharedTally {
    Rc::new(RefCell::new(Tally { bytes: 0, hasher: hashes.then(Sha256::new) }))
}

struct Counting<'a, R> {
    inner: R,
    tally: SharedTally,
    progress: Option<&'a dyn Progress>,
    /// What went in, for the ratio.
    input: Option<SharedTally>,
}

impl<R: Read> Read for Counting<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        let mut tally = self.tally.borrow_mut();
        tally.bytes += n as u64;
        if let Some(hasher) = &mut tally.hasher {
            hasher.update(&buffer[..n]);
        }
        if let Some(progress) = self.progress {
            progress.advance(n as u64);
            if progress.stopped() {
                return Err(io::Error::other("stopped"));
            }
        }
        if let Some(input) = &self.input {
            let input = input.borrow().bytes;
            if tally.bytes > RATIO_FREE_BYTES && tally.bytes / RATIO_MAX > input {
                let what = format!("{input} compressed bytes grew to {} and on", tally.bytes);
                return Err(Refusal::new(Rule::Ratio, b"", what).into());
            }
        }
        Ok(n)
    }
}

/// Errors of a decompressor are the input's fault.
struct Blaming<R>(R);

impl<R: Read> Read for Blaming<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|e| {
            let ours = e.get_ref().is_some_and(|inner| inner.is::<Refusal>());
            match e.kind() {
                _ if ours || e.raw_os_error().is_some() => e,
                io::ErrorKind::Interrupted => e,
                _ if e.to_string() == "stopped" => e,
                _ => Refusal::new(Rule::BrokenCompression, b"", e.to_string()).into(),
            }
        })
    }
}

/// Digests that a layer must have, as 64 hex digits.
#[derive(Debug, Clone, Default)]
pub(crate) struct Digests {
    /// Of the bytes as they come.
    pub(crate) packed: Option<String>,
    /// Of the tar.
    pub(crate) unpacked: Option<String>,
}

/// A layer being read.
pub(crate) struct Layer<'a> {
    reader: Box<dyn Read + 'a>,
    packed: SharedTally,
    unpacked: SharedTally,
    digests: Digests,
}

impl<'a> Layer<'a> {
    pub(crate) fn open(
        raw: Box<dyn Read + 'a>,
        digests: Digests,
        progress: &'a dyn Progress,
    ) -> io::Result<Self> {
        let packed = tally(digests.packed.is_some());
        let counting =
            Counting { inner: raw, tally: packed.clone(), progress: Some(progress), input: None };
        let mut buffered = BufReader::with_capacity(128 << 10, counting);
        let kind = Packing::of(buffered.fill_buf()?);
        let inner: Box<dyn Read + 'a> = match kind {
            Packing::None => Box::new(buffered),
            Packing::Gzip => Box::new(Blaming(flate2::bufread::MultiGzDecoder::new(buffered))),
            Packing::Zstd => Box::new(Blaming(zstd_decoder(buffered)?)),
        };
        // A plain tar is its own unpacked form: hashing it twice would say nothing new.
        let same = matches!(kind, Packing::None) && digests.packed == digests.unpacked;
        let unpacked = tally(digests.unpacked.is_some() && !same);
        let input = (!matches!(kind, Packing::None)).then(|| packed.clone());
        let reader = Box::new(Counting { inner, tally: unpacked.clone(), progress: None, input });
        let mut digests = digests;
        if same {
            digests.unpacked = None;
        }
        Ok(Self { reader, packed, unpacked, digests })
    }

    /// Reads what is left, and compares.
    pub(crate) fn finish(mut self) -> Result<(), PrepareError> {
        io::copy(&mut self.reader, &mut io::sink())
            .map_err(|e| PrepareError::read("the layer's end", e))?;
        drop(self.reader);
        check_digest(&self.packed, self.digests.packed.as_deref(), "the blob")?;
        check_digest(&self.unpacked, self.digests.unpacked.as_deref(), "the unpacked layer")
    }
}

impl Read for Layer<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buffer)
    }
}

fn zstd_decoder<'a, R: BufRead + 'a>(from: R) -> io::Result<impl Read + 'a> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(from)?;
    // 128 MiB of window, as `zstd --long` of a layer may need; more is an attack on memory.
    decoder.window_log_max(27)?;
    Ok(decoder)
}

fn check_digest(tally: &SharedTally, want: Option<&str>, what: &str) -> Result<(), PrepareError> {
    let Some(want) = want else { return Ok(()) };
    let Some(hasher) = tally.borrow_mut().hasher.take() else { return Ok(()) };
    let got = to_hex(&hasher.finalize());
    if got == want {
        return Ok(());
    }
    let what = format!("{what} is sha256:{got} and not what names it");
    Err(Refusal::new(Rule::Digest, want.as_bytes(), what).into())
}

/// What bytes are packed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    None,
    Gzip,
    Zstd,
}

impl Packing {
    pub(crate) fn of(first: &[u8]) -> Self {
        match first {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            // A skippable frame may come first.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }
}
