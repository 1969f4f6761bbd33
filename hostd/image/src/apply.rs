//! Applies tar archives to a tree: the layers of an image, whiteouts included, or one flat archive.

use std::io::Read;

use crate::erofs::keeps_xattr;
use crate::limits::{ENTRIES_MAX, IMAGE_BYTES_MAX};
use crate::pack::Packer;
use crate::refuse::{PrepareError, Refusal, Rule};
use crate::tarball::{Entry, EntryKind, TarReader};
use crate::tree::{Children, Kind, Node, Tree};

/// Builds an image's tree and packs its files.
pub(crate) struct Applier<'p, 's> {
    pub(crate) tree: Tree,
    packer: &'p mut Packer<'s>,
    entries: u64,
    bytes: u64,
    /// Device nodes of number 0:0: overlayfs takes one for a whiteout.
    pub(crate) dropped: u64,
}

impl<'p, 's> Applier<'p, 's> {
    pub(crate) fn new(packer: &'p mut Packer<'s>) -> Self {
        Self { tree: Tree::new(), packer, entries: 0, bytes: 0, dropped: 0 }
    }

    /// Applies one archive. `layered` gives `.wh.` names their meaning. Gives back the stream, behind the archive's end.
    pub(crate) fn tar<R: Read>(&mut self, stream: R, layered: bool) -> Result<R, PrepareError> {
        let mut reader = TarReader::new(stream);
        self.tree.begin_layer();
        loop {
            let next = reader.next_entry().map_err(|e| PrepareError::read("the archive", e))?;
            let Some(entry) = next else { return Ok(reader.into_inner()) };
            if layered && self.whiteout(&entry)? {
                self.count(&entry.path, 0)?;
                continue;
            }
            self.entry(entry, &mut reader)?;
        }
    }

    fn entry<R: Read>(
        &mut self,
        entry: Entry,
        reader: &mut TarReader<R>,
    ) -> Result<(), PrepareError> {
        let Entry { path, kind, mut meta } = entry;
        meta.xattrs.retain(|(name, _)| keeps_xattr(name));
        let kind = match kind {
            EntryKind::Hardlink(target) => {
                self.count(&path, 0)?;
                return Ok(self.tree.hardlink(&path, &target)?);
            }
            EntryKind::File(size) => {
                self.count(&path, size)?;
                Kind::File(self.packer.add(&path, size, reader)?)
            }
            EntryKind::Dir => Kind::Dir(Children::new()),
            EntryKind::Symlink(target) => Kind::Symlink(target.into()),
            EntryKind::Device { block: false, major: 0, minor: 0 } => {
                self.dropped += 1;
                return Ok(());
            }
            EntryKind::Device { block, major, minor } => Kind::Device { block, major, minor },
            EntryKind::Fifo => Kind::Fifo,
        };
        self.node(&path, Node { meta, kind })
    }

    /// Adds what is no file of bytes, or whose bytes are packed.
    pub(crate) fn node(&mut self, path: &[u8], node: Node) -> Result<(), PrepareError> {
        if !matches!(node.kind, Kind::File(_)) {
            self.count(path, 0)?;
        }
        Ok(self.tree.add(path, node)?)
    }

    /// Packs a file's bytes.
    pub(crate) fn pack(
        &mut self,
        path: &[u8],
        size: u64,
        from: &mut dyn crate::pack::FileBytes,
    ) -> Result<Kind, PrepareError> {
        self.count(path, size)?;
        Ok(Kind::File(self.packer.add(path, size, from)?))
    }

    fn count(&mut self, path: &[u8], bytes: u64) -> Result<(), PrepareError> {
        self.entries += 1;
        if self.entries > ENTRIES_MAX {
            return Err(Refusal::new(Rule::TooManyEntries, path, "too many entries").into());
        }
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > IMAGE_BYTES_MAX {
            let what = format!("files of {} bytes", self.bytes);
            return Err(Refusal::new(Rule::TooLarge, path, what).into());
        }
        Ok(())
    }

    /// Applies the entry if it is a whiteout, and says whether it was.
    fn whiteout(&mut self, entry: &Entry) -> Result<bool, PrepareError> {
        let path = entry.path.strip_suffix(b"/").unwrap_or(&entry.path);
        let cut = path.iter().rposition(|b| *b == b'/');
        let (dir, name) = cut.map_or((&b""[..], path), |at| (&path[..at], &path[at + 1..]));
        let Some(hidden) = name.strip_prefix(b".wh.") else { return Ok(false) };
        match hidden {
            b".wh..opq" => self.tree.opaque(dir)?,
            // aufs kept its own things under such names; they were never files of the image.
            _ if hidden.starts_with(b".wh.") => {}
            _ => self.tree.whiteout(dir, hidden)?,
        }
        Ok(true)
    }
}
