//! Packing: bytes become frames, frames become packs, and what is stored already is not stored again.
//!
//! Small objects are packed together in the order in which they come, which is path order within a layer, because what
//! lies together is read together. Everything is found by hash: an object or a frame that an earlier image of the domain
//! has is pointed at where it lies. What a later layer hides stays packed: finding out would take a second pass over
//! compressed layers, and the next version of the image has it again anyway.

use std::collections::HashMap;
use std::io::{self, Read};

use crate::id::{Domain, Hash};
use crate::index::{FrameRef, Index, ObjectRef, PackRef};
use crate::limits::{
    CHUNK_BYTES, FRAME_BYTES, FRAME_BYTES_MAX, INLINE_BYTES_MAX, PACK_BYTES, TABLE_BYTES_MAX,
    TABLE_INLINE_BYTES_MAX,
};
use crate::manifest::{BlobRef, Table};
use crate::refuse::{PrepareError, Refusal, Rule};
use crate::tree::Content;

/// zstd level: 3 halves a Python userland at several hundred MB/s; higher ones halve the speed for a few per cent.
const ZSTD_LEVEL: i32 = 3;

/// Takes finished packs. It may block: that is what bounds memory.
pub(crate) trait PackSink {
    fn put(&mut self, hash: Hash, bytes: Vec<u8>) -> Result<(), PrepareError>;
}

/// A file's bytes as a source gives them. A source that knows its holes need not make zeros of them.
pub(crate) trait FileBytes: Read {
    /// How many zeros surely come next.
    fn zeros_ahead(&mut self) -> u64 {
        0
    }

    /// Passes over that many of the zeros that [`FileBytes::zeros_ahead`] promised.
    fn skip_zeros(&mut self, _bytes: u64) -> io::Result<()> {
        Ok(())
    }
}

impl FileBytes for &[u8] {}

/// What earlier images of the domain have.
#[derive(Default)]
pub(crate) struct Known {
    frames: HashMap<Hash, (PackRef, FrameRef)>,
    /// Frame and offset of each object that is not cut; cut ones are found by their chunks.
    objects: HashMap<Hash, (Hash, u32)>,
    /// Frames of metadata and indexes, with the packs that they are in.
    blobs: HashMap<Hash, (Hash, FrameRef)>,
}

impl Known {
    /// Learns where an image's metadata or index lies.
    pub(crate) fn learn_blob(&mut self, packs: &[Hash], frames: &[FrameRef]) {
        for frame in frames {
            // A manifest's frames are checked against its packs.
            self.blobs.entry(frame.hash).or_insert((packs[frame.pack as usize], *frame));
        }
    }

    /// Parts with what only the metadata's writer needs.
    pub(crate) fn take_blobs(&mut self) -> HashMap<Hash, (Hash, FrameRef)> {
        std::mem::take(&mut self.blobs)
    }

    pub(crate) fn learn(&mut self, index: &Index) {
        for frame in &index.frames {
            // `Index::decode` checked the ordinal.
            let pack = index.packs[frame.pack as usize];
            self.frames.entry(frame.hash).or_insert((pack, *frame));
        }
        for object in index.objects.iter().filter(|object| !object.is_cut()) {
            let frame = index.frames[object.first as usize].hash;
            self.objects.entry(object.id).or_insert((frame, object.offset));
        }
    }
}

/// Writes frames one after another into packs.
struct PackWriter {
    domain: Domain,
    zstd: zstd::bulk::Compressor<'static>,
    packs: Vec<PackRef>,
    by_hash: HashMap<Hash, u32>,
    /// The pack being written, and its ordinal once it has one.
    bytes: Vec<u8>,
    ordinal: Option<u32>,
    /// Bytes of the packs written here.
    written: u64,
}

impl PackWriter {
    fn new(domain: &Domain) -> Result<Self, PrepareError> {
        let zstd = zstd::bulk::Compressor::new(ZSTD_LEVEL)
            .map_err(|e| PrepareError::read("the zstd library", e))?;
        Ok(Self {
            domain: domain.clone(),
            zstd,
            packs: Vec::new(),
            by_hash: HashMap::new(),
            bytes: Vec::new(),
            ordinal: None,
            written: 0,
        })
    }

    fn push_pack(&mut self, pack: PackRef) -> Result<u32, PrepareError> {
        let too_many = |_| PrepareError::Format("more than 2^32 packs".to_owned());
        let ordinal = u32::try_from(self.packs.len()).map_err(too_many)?;
        self.packs.push(pack);
        Ok(ordinal)
    }

    /// The ordinal of a pack that another image wrote.
    fn import(&mut self, pack: PackRef) -> Result<u32, PrepareError> {
        if let Some(ordinal) = self.by_hash.get(&pack.hash) {
            return Ok(*ordinal);
        }
        let ordinal = self.push_pack(pack)?;
        self.by_hash.insert(pack.hash, ordinal);
        Ok(ordinal)
    }

    fn write(
        &mut self,
        hash: Hash,
        frame: &[u8],
        sink: &mut dyn PackSink,
    ) -> Result<FrameRef, PrepareError> {
        debug_assert!(!frame.is_empty() && frame.len() <= FRAME_BYTES_MAX);
        let ordinal = match self.ordinal {
            Some(ordinal) => ordinal,
            None => self.push_pack(PackRef { hash: [0; 32], bytes: 0 })?,
        };
        self.ordinal = Some(ordinal);
        let packed =
            self.zstd.compress(frame).map_err(|e| PrepareError::read("the zstd library", e))?;
        let offset = self.bytes.len();
        let stored: &[u8] = if packed.len() < frame.len() { &packed } else { frame };
        self.bytes.extend_from_slice(stored);
        let number = |n| u32::try_from(n).map_err(|_| PrepareError::Format("a frame".to_owned()));
        let made = FrameRef {
            hash,
            pack: ordinal,
            offset: number(offset)?,
            stored: number(stored.len())?,
            bytes: number(frame.len())?,
        };
        if self.bytes.len() >= PACK_BYTES {
            self.flush(sink)?;
        }
        Ok(made)
    }

    fn flush(&mut self, sink: &mut dyn PackSink) -> Result<(), PrepareError> {
        let Some(ordinal) = self.ordinal.take() else { return Ok(()) };
        let bytes = std::mem::take(&mut self.bytes);
        let hash = self.domain.hash(&bytes);
        let too_long = |_| PrepareError::Format("a pack too long".to_owned());
        let len = u32::try_from(bytes.len()).map_err(too_long)?;
        self.packs[ordinal as usize] = PackRef { hash, bytes: len };
        self.written += u64::from(len);
        sink.put(hash, bytes)
    }
}

/// Packs the contents of files.
pub(crate) struct Packer<'a> {
    domain: Domain,
    known: Known,
    writer: PackWriter,
    sink: &'a mut dyn PackSink,
    frames: Vec<FrameRef>,
    frame_by_hash: HashMap<Hash, u32>,
    objects: HashMap<Hash, ObjectRef>,
    chunks: Vec<u32>,
    /// Small objects that wait for their frame, and the frame.
    waiting: Vec<ObjectRef>,
    waiting_bytes: Vec<u8>,
    buffer: Vec<u8>,
}

impl<'a> Packer<'a> {
    pub(crate) fn new(
        domain: &Domain,
        known: Known,
        sink: &'a mut dyn PackSink,
    ) -> Result<Self, PrepareError> {
        Ok(Self {
            domain: domain.clone(),
            known,
            writer: PackWriter::new(domain)?,
            sink,
            frames: Vec::new(),
            frame_by_hash: HashMap::new(),
            objects: HashMap::new(),
            chunks: Vec::new(),
            waiting: Vec::new(),
            waiting_bytes: Vec::new(),
            buffer: Vec::new(),
        })
    }

    /// Takes a file's bytes: exactly `size` of them.
    pub(crate) fn add(
        &mut self,
        path: &[u8],
        size: u64,
        from: &mut dyn FileBytes,
    ) -> Result<Content, PrepareError> {
        let first = size.min(CHUNK_BYTES as u64);
        self.fill(path, first, from)?;
        if size <= INLINE_BYTES_MAX {
            return Ok(Content::Inline(self.buffer.as_slice().into()));
        }
        let id = if size <= CHUNK_BYTES as u64 {
            self.add_whole()?
        } else {
            self.add_cut(path, size, from)?
        };
        Ok(Content::Object { id, size })
    }

    fn fill(
        &mut self,
        path: &[u8],
        size: u64,
        from: &mut dyn FileBytes,
    ) -> Result<(), PrepareError> {
        self.buffer.resize(usize::try_from(size).unwrap_or(CHUNK_BYTES), 0);
        from.read_exact(&mut self.buffer).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                Refusal::new(Rule::BrokenTar, path, "the file is shorter than it said").into()
            }
            _ => PrepareError::read(path.escape_ascii().to_string(), e),
        })
    }

    /// The buffer is one object.
    fn add_whole(&mut self) -> Result<Hash, PrepareError> {
        let id = self.domain.hash(&self.buffer);
        if self.objects.contains_key(&id) {
            return Ok(id);
        }
        let size = self.buffer.len() as u64;
        let mut object = ObjectRef { id, size, first: 0, offset: 0 };
        if let Some((frame, offset)) = self.known.objects.get(&id).copied()
            && let Some(first) = self.known_frame(&frame)?
        {
            self.objects.insert(id, ObjectRef { first, offset, ..object });
            return Ok(id);
        }
        if self.buffer.len() >= FRAME_BYTES {
            let bytes = std::mem::take(&mut self.buffer);
            object.first = self.frame(id, &bytes)?;
            self.buffer = bytes;
        } else {
            if self.waiting_bytes.len() + self.buffer.len() > FRAME_BYTES {
                self.close_waiting()?;
            }
            object.offset = u32::try_from(self.waiting_bytes.len()).unwrap_or(0);
            self.waiting_bytes.extend_from_slice(&self.buffer);
            self.waiting.push(object);
        }
        self.objects.insert(id, object);
        Ok(id)
    }

    /// The buffer is the first chunk of an object.
    fn add_cut(
        &mut self,
        path: &[u8],
        size: u64,
        from: &mut dyn FileBytes,
    ) -> Result<Hash, PrepareError> {
        let mut list = self.domain.list_hasher();
        let mut chunks = Vec::new();
        let mut left = size;
        loop {
            let hash = self.domain.hash(&self.buffer);
            list.update(&hash);
            let bytes = std::mem::take(&mut self.buffer);
            let frame = self.frame(hash, &bytes)?;
            chunks.push(frame);
            self.buffer = bytes;
            left -= self.buffer.len() as u64;
            if self.buffer.len() == CHUNK_BYTES && self.buffer.iter().all(|b| *b == 0) {
                // The same chunk again, without making it: a hole of a terabyte is a second's work.
                let again = from.zeros_ahead().min(left) / CHUNK_BYTES as u64;
                from.skip_zeros(again * CHUNK_BYTES as u64)
                    .map_err(|e| PrepareError::read(path.escape_ascii().to_string(), e))?;
                (0..again).for_each(|_| {
                    list.update(&hash);
                    chunks.push(frame);
                });
                left -= again * CHUNK_BYTES as u64;
            }
            if left == 0 {
                break;
            }
            self.fill(path, left.min(CHUNK_BYTES as u64), from)?;
        }
        let id = *list.finalize().as_bytes();
        if !self.objects.contains_key(&id) {
            let too_many = |_| PrepareError::Format("more than 2^32 chunks".to_owned());
            let first = u32::try_from(self.chunks.len()).map_err(too_many)?;
            self.chunks.extend_from_slice(&chunks);
            self.objects.insert(id, ObjectRef { id, size, first, offset: 0 });
        }
        Ok(id)
    }

    fn push_frame(&mut self, frame: FrameRef) -> Result<u32, PrepareError> {
        let too_many = |_| PrepareError::Format("more than 2^32 frames".to_owned());
        let ordinal = u32::try_from(self.frames.len()).map_err(too_many)?;
        self.frames.push(frame);
        self.frame_by_hash.insert(frame.hash, ordinal);
        Ok(ordinal)
    }

    /// The ordinal of a frame that is here or in an earlier image.
    fn known_frame(&mut self, hash: &Hash) -> Result<Option<u32>, PrepareError> {
        if let Some(ordinal) = self.frame_by_hash.get(hash) {
            return Ok(Some(*ordinal));
        }
        let Some((pack, frame)) = self.known.frames.get(hash).copied() else { return Ok(None) };
        let pack = self.writer.import(pack)?;
        self.push_frame(FrameRef { pack, ..frame }).map(Some)
    }

    /// The ordinal of a frame of these bytes, which are written if nothing has them.
    fn frame(&mut self, hash: Hash, bytes: &[u8]) -> Result<u32, PrepareError> {
        if let Some(ordinal) = self.known_frame(&hash)? {
            return Ok(ordinal);
        }
        let frame = self.writer.write(hash, bytes, self.sink)?;
        self.push_frame(frame)
    }

    fn close_waiting(&mut self) -> Result<(), PrepareError> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let mut bytes = std::mem::take(&mut self.waiting_bytes);
        let ordinal = self.frame(self.domain.hash(&bytes), &bytes)?;
        bytes.clear();
        self.waiting_bytes = bytes;
        for object in self.waiting.drain(..) {
            self.objects.insert(object.id, ObjectRef { first: ordinal, ..object });
        }
        Ok(())
    }

    /// The index of all that was added, and the bytes that had to be stored for it.
    pub(crate) fn finish(mut self) -> Result<(Index, u64), PrepareError> {
        self.close_waiting()?;
        self.writer.flush(self.sink)?;
        let mut objects: Vec<_> = self.objects.into_values().collect();
        objects.sort_unstable_by_key(|object| object.id);
        let index =
            Index { packs: self.writer.packs, frames: self.frames, objects, chunks: self.chunks };
        Ok((index, self.writer.written))
    }
}

/// Writes blobs, the metadata and the index, into packs of their own: the manifest lists these few.
pub(crate) struct BlobWriter<'a> {
    writer: PackWriter,
    sink: &'a mut dyn PackSink,
    known: HashMap<Hash, (Hash, FrameRef)>,
    buffer: Vec<u8>,
    frames: Vec<FrameRef>,
    bytes: u64,
    /// Stored bytes of all frames, those that were known included.
    stored: u64,
}

impl<'a> BlobWriter<'a> {
    /// `known` is what [`Known::take_blobs`] gave.
    pub(crate) fn new(
        domain: &Domain,
        known: HashMap<Hash, (Hash, FrameRef)>,
        sink: &'a mut dyn PackSink,
    ) -> Result<Self, PrepareError> {
        let writer = PackWriter::new(domain)?;
        Ok(Self {
            writer,
            sink,
            known,
            buffer: Vec::new(),
            frames: Vec::new(),
            bytes: 0,
            stored: 0,
        })
    }

    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> Result<(), PrepareError> {
        while !bytes.is_empty() {
            let take = bytes.len().min(FRAME_BYTES - self.buffer.len());
            self.buffer.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.buffer.len() == FRAME_BYTES {
                self.close_frame()?;
            }
        }
        Ok(())
    }

    fn close_frame(&mut self) -> Result<(), PrepareError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let hash = self.writer.domain.hash(&self.buffer);
        let frame = match self.known.get(&hash).copied() {
            Some((hash, frame)) => {
                let pack = self.writer.import(PackRef { hash, bytes: 0 })?;
                FrameRef { pack, ..frame }
            }
            None => self.writer.write(hash, &self.buffer, self.sink)?,
        };
        self.frames.push(frame);
        self.stored += u64::from(frame.stored);
        self.bytes += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Ends one blob; the next may follow.
    pub(crate) fn end_blob(&mut self) -> Result<BlobRef, PrepareError> {
        self.close_frame()?;
        let frames = std::mem::take(&mut self.frames);
        let bytes = std::mem::take(&mut self.bytes);
        let mut table = Vec::new();
        frames.iter().for_each(|frame| frame.write(&mut table));
        if table.len() <= TABLE_INLINE_BYTES_MAX {
            return Ok(BlobRef { bytes, table: Table::Inline(frames) });
        }
        if table.len() > TABLE_BYTES_MAX {
            return Err(PrepareError::Format("the metadata of this image is too long".to_owned()));
        }
        let first = frames[0];
        let table = self.writer.write(self.writer.domain.hash(&table), &table, self.sink)?;
        Ok(BlobRef { bytes, table: Table::Stored { table, first } })
    }

    /// Stored bytes of all frames so far, those that were known included.
    pub(crate) fn stored(&self) -> u64 {
        self.stored
    }

    /// The packs of all blobs, and the bytes that had to be stored for them.
    pub(crate) fn finish(mut self) -> Result<(Vec<Hash>, u64), PrepareError> {
        self.writer.flush(self.sink)?;
        Ok((self.writer.packs.iter().map(|pack| pack.hash).collect(), self.writer.written))
    }
}
