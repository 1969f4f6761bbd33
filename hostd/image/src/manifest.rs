//! The manifest: the one small object that is an image, published after all that it names.
//!
//! JSON, so that a person can read what is stored, with unknown fields refused, so that a reader never ignores what a
//! newer writer meant. The image's id is the manifest's hash: whoever holds an id can check everything beneath it.

use serde::{Deserialize, Serialize};

use crate::id::{Hash, from_hex, hash_from_hex, to_hex};
use crate::index::{Damaged, FRAME_RECORD_BYTES, FrameRef, Head};
use crate::limits::{
    FORMAT_VERSION, FRAME_BYTES, MANIFEST_BYTES_MAX, META_BYTES_MAX, TABLE_BYTES_MAX,
    TABLE_INLINE_BYTES_MAX,
};

/// How to start what is in an image, as its OCI config says.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageConfig {
    /// Comes before the command.
    pub entrypoint: Vec<String>,
    /// The command when the launch gives none.
    pub cmd: Vec<String>,
    /// `NAME=value` each.
    pub env: Vec<String>,
    /// Where to start; empty means `/`.
    pub cwd: String,
    /// `user`, `user:group` or numbers; empty means root.
    pub user: String,
    /// Processor in OCI's words: `amd64`, `arm64`.
    pub arch: String,
    /// System in OCI's words: `linux`.
    pub os: String,
}

/// How much is in an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Totals {
    /// Inodes, directories included.
    pub files: u64,
    /// Bytes of regular files, sparse ones at full length, each inode once.
    pub bytes: u64,
    /// Bytes of its frames as they are stored, those that other images share included.
    pub stored: u64,
}

/// A long run of bytes in frames of [`FRAME_BYTES`], the last one shorter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlobRef {
    pub(crate) bytes: u64,
    pub(crate) table: Table,
}

/// The list of a blob's frames.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Table {
    Inline(Vec<FrameRef>),
    /// In a frame of its own.
    Stored {
        /// That frame.
        table: FrameRef,
        /// The blob's first frame: a mount needs no other.
        first: FrameRef,
    },
}

/// A manifest, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) domain: String,
    pub(crate) config: ImageConfig,
    pub(crate) totals: Totals,
    /// Packs of the metadata and the index; those of the objects stand in the index.
    pub(crate) packs: Vec<Hash>,
    pub(crate) meta: BlobRef,
    pub(crate) index: BlobRef,
    /// How many of what the index has: here too, so that it need not be asked.
    pub(crate) index_head: Head,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ManifestText {
    volley_image: u32,
    domain: String,
    config: ImageConfig,
    totals: Totals,
    packs: Vec<String>,
    meta: BlobText,
    index: BlobText,
    /// The first bytes of the index, in hex.
    index_head: String,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BlobText {
    bytes: u64,
    /// Frame records in hex.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    frames: String,
    /// One frame record in hex: the frame that holds the frame records.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    table: String,
    /// Beside a table: the blob's first frame record in hex.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    first: String,
}

impl BlobRef {
    /// Its first frame.
    pub(crate) fn first(&self) -> Option<&FrameRef> {
        match &self.table {
            Table::Inline(frames) => frames.first(),
            Table::Stored { first, .. } => Some(first),
        }
    }

    fn to_text(&self) -> BlobText {
        let hex = |frames: &[FrameRef]| {
            let mut bytes = Vec::new();
            frames.iter().for_each(|frame| frame.write(&mut bytes));
            to_hex(&bytes)
        };
        let mut text = BlobText { bytes: self.bytes, ..BlobText::default() };
        match &self.table {
            Table::Inline(frames) => text.frames = hex(frames),
            Table::Stored { table, first } => {
                text.table = hex(&[*table]);
                text.first = hex(&[*first]);
            }
        }
        text
    }

    fn from_text(text: &BlobText, packs: u32, bytes_max: u64) -> Result<Self, Damaged> {
        let parse = |hex: &str| from_hex(hex).ok_or(Damaged("a frame table that is no hex"));
        let table = if text.table.is_empty() {
            let bytes = parse(&text.frames)?;
            if bytes.len() > TABLE_INLINE_BYTES_MAX {
                return Err(Damaged("a frame table too long"));
            }
            Table::Inline(parse_table(&bytes, packs, text.bytes)?)
        } else {
            if !text.frames.is_empty() {
                return Err(Damaged("a frame table of a wrong kind"));
            }
            let record = |hex: &str| {
                let bytes = parse(hex)?;
                if bytes.len() != FRAME_RECORD_BYTES {
                    return Err(Damaged("a frame table of a wrong kind"));
                }
                FrameRef::parse(&bytes, packs)
            };
            let (table, first) = (record(&text.table)?, record(&text.first)?);
            if table.bytes as usize > TABLE_BYTES_MAX || first.bytes as usize != FRAME_BYTES {
                return Err(Damaged("a frame table too long"));
            }
            Table::Stored { table, first }
        };
        if text.bytes == 0 || text.bytes > bytes_max {
            return Err(Damaged("a blob empty or too long"));
        }
        Ok(Self { bytes: text.bytes, table })
    }
}

/// Frame records of a blob of `blob_bytes`: as many as it needs, and each of the right length.
pub(crate) fn parse_table(
    bytes: &[u8],
    packs: u32,
    blob_bytes: u64,
) -> Result<Vec<FrameRef>, Damaged> {
    if !bytes.len().is_multiple_of(FRAME_RECORD_BYTES) {
        return Err(Damaged("a frame table of a broken length"));
    }
    let frames = bytes.chunks_exact(FRAME_RECORD_BYTES).map(|b| FrameRef::parse(b, packs));
    let frames: Vec<_> = frames.collect::<Result<_, _>>()?;
    let full = FRAME_BYTES as u64;
    let mut left = blob_bytes;
    for frame in &frames {
        let want = left.min(full);
        if want == 0 || u64::from(frame.bytes) != want {
            return Err(Damaged("a frame table that does not fit its blob"));
        }
        left -= want;
    }
    if left == 0 { Ok(frames) } else { Err(Damaged("a frame table too short")) }
}

impl Manifest {
    /// Its stored form; `None` when it does not fit.
    pub(crate) fn encode(&self) -> Option<Vec<u8>> {
        let text = ManifestText {
            volley_image: FORMAT_VERSION,
            domain: self.domain.clone(),
            config: self.config.clone(),
            totals: self.totals,
            packs: self.packs.iter().map(|hash| to_hex(hash)).collect(),
            meta: self.meta.to_text(),
            index: self.index.to_text(),
            index_head: to_hex(&self.index_head.to_bytes()),
        };
        serde_json::to_vec(&text).ok().filter(|bytes| bytes.len() <= MANIFEST_BYTES_MAX)
    }

    /// Out of its stored form. That the bytes are those that the id names was checked before.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Damaged> {
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(Damaged("a manifest too long"));
        }
        let text: ManifestText =
            serde_json::from_slice(bytes).map_err(|_| Damaged("a manifest that does not parse"))?;
        if text.volley_image != FORMAT_VERSION {
            return Err(Damaged("a manifest of another format version"));
        }
        let packs = text.packs.iter().map(|hex| hash_from_hex(hex));
        let packs: Vec<_> = packs.collect::<Option<_>>().ok_or(Damaged("a pack without a hash"))?;
        let count = u32::try_from(packs.len()).map_err(|_| Damaged("too many packs"))?;
        let index = BlobRef::from_text(&text.index, count, crate::limits::INDEX_BYTES_MAX)?;
        let head = from_hex(&text.index_head).ok_or(Damaged("an index head that is no hex"))?;
        Ok(Self {
            domain: text.domain,
            config: text.config,
            totals: text.totals,
            meta: BlobRef::from_text(&text.meta, count, META_BYTES_MAX)?,
            index_head: Head::parse(&head, index.bytes)?,
            index,
            packs,
        })
    }
}
