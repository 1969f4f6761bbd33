//! Writes the EROFS image of a tree: metadata, small files, and for larger ones a pointer to their object.
//!
//! Two passes. The first gives every inode its place, the second writes from front to back, so that an image of a million
//! files never lies in memory. A directory's blocks come right before its children's inodes, which are together in name
//! order: `ls -l` reads one run of bytes, and so does the lazy reader.

use crate::erofs::{
    BLOCK, BLOCK_LEN, DIRENT_BYTES, HOLE, INCOMPAT_CHUNKED, INODE_BYTES, Layout, MAGIC, S_IFBLK,
    S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG, SLOT, SUPER_AT, SUPER_BYTES, XATTR_HEAD_BYTES,
    dirent_kind, encode_device, round_up, xattr_prefix,
};
use crate::id::{Hash, to_hex};
use crate::limits::META_BYTES_MAX;
use crate::manifest::Totals;
use crate::refuse::PrepareError;
use crate::tree::{Content, Kind, Node, NodeIx, Tree};

/// The xattr that says that a file's bytes lie in another layer.
pub(crate) const METACOPY: &[u8] = b"trusted.overlay.metacopy";
/// The xattr that says where.
pub(crate) const REDIRECT: &[u8] = b"trusted.overlay.redirect";

/// Where an object lies in the data-only layer.
pub(crate) fn object_path(id: &Hash) -> String {
    let hex = to_hex(id);
    format!("/{}/{hex}", &hex[..2])
}

/// One inode's place and form.
#[derive(Clone, Copy)]
struct Place {
    at: u64,
    /// First block of its data.
    block: u64,
    layout: Layout,
    size: u64,
    nlink: u32,
}

enum Step {
    Inode(NodeIx),
    Blocks(NodeIx),
}

/// The first pass's result.
pub(crate) struct Plan<'a> {
    tree: &'a Tree,
    places: Vec<Option<Place>>,
    parents: Vec<NodeIx>,
    steps: Vec<Step>,
    end: u64,
    totals: Totals,
}

/// Writes `tree` through `out`, and counts what is in it.
pub(crate) fn write(
    tree: &Tree,
    out: &mut dyn FnMut(&[u8]) -> Result<(), PrepareError>,
) -> Result<Totals, PrepareError> {
    let plan = Plan::new(tree)?;
    let mut writer = Writer { at: 0, out };
    writer.bytes(&plan.superblock()?)?;
    for step in &plan.steps {
        match step {
            Step::Inode(ix) => {
                let place = plan.place(*ix);
                writer.pad_to(place.at)?;
                writer.bytes(&plan.inode(*ix)?)?;
            }
            Step::Blocks(ix) => {
                let place = plan.place(*ix);
                writer.pad_to(place.block * BLOCK)?;
                let data = plan.data(*ix);
                let len = data.len() - plan.tail_len(&place);
                writer.bytes(&data[..len])?;
            }
        }
    }
    writer.pad_to(plan.end)?;
    Ok(plan.totals)
}

struct Writer<'a> {
    at: u64,
    out: &'a mut dyn FnMut(&[u8]) -> Result<(), PrepareError>,
}

impl Writer<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> Result<(), PrepareError> {
        self.at += bytes.len() as u64;
        (self.out)(bytes)
    }

    fn pad_to(&mut self, to: u64) -> Result<(), PrepareError> {
        const ZEROS: [u8; 4096] = [0; 4096];
        while self.at < to {
            let len = usize::try_from(to - self.at).unwrap_or(ZEROS.len()).min(ZEROS.len());
            self.bytes(&ZEROS[..len])?;
        }
        Ok(())
    }
}

impl<'a> Plan<'a> {
    fn new(tree: &'a Tree) -> Result<Self, PrepareError> {
        let mut plan = Self {
            tree,
            places: vec![None; tree.nodes_len()],
            parents: vec![NodeIx::ROOT; tree.nodes_len()],
            steps: Vec::new(),
            end: (SUPER_AT + SUPER_BYTES) as u64,
            totals: Totals::default(),
        };
        plan.place_inode(NodeIx::ROOT);
        let mut stack = vec![NodeIx::ROOT];
        while let Some(dir) = stack.pop() {
            plan.place_blocks(dir);
            let Some(children) = tree.children(dir) else { continue };
            let first = stack.len();
            for name in children.values() {
                if let Some(place) = &mut plan.places[name.node.index()] {
                    place.nlink += 1;
                    continue;
                }
                plan.place_inode(name.node);
                if tree.children(name.node).is_some() {
                    plan.parents[name.node.index()] = dir;
                    stack.push(name.node);
                } else {
                    plan.place_blocks(name.node);
                }
            }
            stack[first..].reverse();
        }
        plan.end = round_up(plan.end, BLOCK);
        if plan.end > META_BYTES_MAX {
            return Err(PrepareError::Format("the metadata of this image is too long".to_owned()));
        }
        Ok(plan)
    }

    fn place(&self, ix: NodeIx) -> Place {
        // Every node that is reached from the root was placed by `new`.
        self.places[ix.index()].unwrap_or_else(|| unreachable!("a node without a place"))
    }

    fn place_inode(&mut self, ix: NodeIx) {
        let node = self.tree.node(ix);
        let (size, tail) = match &node.kind {
            Kind::Dir(_) => {
                let size = self.dir_len(ix);
                (size, size % BLOCK)
            }
            Kind::Symlink(target) => (target.len() as u64, target.len() as u64),
            Kind::File(Content::Inline(bytes)) => (bytes.len() as u64, bytes.len() as u64),
            Kind::File(Content::Object { size, .. }) => (*size, 0),
            Kind::Device { .. } | Kind::Fifo => (0, 0),
        };
        let head = INODE_BYTES + xattr_bytes(node);
        let mut at = round_up(self.end, SLOT);
        let layout = match &node.kind {
            Kind::File(Content::Object { .. }) => Layout::Chunks,
            _ if tail > 0 && head + tail <= BLOCK => Layout::Inline,
            _ => Layout::Plain,
        };
        // An inline tail must lie in one block, and an inode is easier to read when it does.
        let together = if layout == Layout::Inline { head + tail } else { INODE_BYTES };
        if at % BLOCK + together > BLOCK {
            at = round_up(at, BLOCK);
        }
        let after = match layout {
            Layout::Inline => tail,
            Layout::Chunks => 4,
            Layout::Plain => 0,
        };
        self.end = at + head + after;
        let nlink = match &node.kind {
            Kind::Dir(children) => {
                let dirs = children.values().filter(|c| self.tree.children(c.node).is_some());
                2 + u32::try_from(dirs.count()).unwrap_or(u32::MAX - 2)
            }
            _ => 1,
        };
        self.totals.files += 1;
        if matches!(node.kind, Kind::File(_)) {
            self.totals.bytes = self.totals.bytes.saturating_add(size);
        }
        self.places[ix.index()] = Some(Place { at, block: 0, layout, size, nlink });
        self.steps.push(Step::Inode(ix));
    }

    fn place_blocks(&mut self, ix: NodeIx) {
        let mut place = self.place(ix);
        let len = match place.layout {
            Layout::Chunks => 0,
            Layout::Plain | Layout::Inline => place.size - self.tail_len(&place) as u64,
        };
        if len == 0 {
            return;
        }
        place.block = self.end.div_ceil(BLOCK);
        self.end = round_up(place.block * BLOCK + len, BLOCK);
        self.places[ix.index()] = Some(place);
        self.steps.push(Step::Blocks(ix));
    }

    /// Bytes that follow the inode.
    fn tail_len(&self, place: &Place) -> usize {
        let tail = if place.layout == Layout::Inline { place.size % BLOCK } else { 0 };
        usize::try_from(tail).unwrap_or(0)
    }

    /// A directory's names with those of itself and its parent, in byte order.
    fn names(&self, dir: NodeIx) -> Vec<(&'a [u8], NodeIx)> {
        let mut names: Vec<(&[u8], NodeIx)> = vec![(b".", dir), (b"..", self.parents[dir.index()])];
        let children = self.tree.children(dir).into_iter().flatten();
        names.extend(children.map(|(name, entry)| (name.as_ref(), entry.node)));
        names.sort_unstable_by_key(|(name, _)| *name);
        names
    }

    fn dir_len(&self, dir: NodeIx) -> u64 {
        let mut full = 0;
        let mut used = 0;
        for (name, _) in self.names(dir) {
            let need = (DIRENT_BYTES + name.len()) as u64;
            if used + need > BLOCK {
                full += BLOCK;
                used = 0;
            }
            used += need;
        }
        full + used
    }

    fn dir_data(&self, dir: NodeIx) -> Vec<u8> {
        let names = self.names(dir);
        let mut out = Vec::new();
        let mut rest = names.as_slice();
        while !rest.is_empty() {
            let mut used = 0;
            let count = rest.iter().take_while(|(name, _)| {
                used += DIRENT_BYTES + name.len();
                used <= BLOCK_LEN
            });
            let (block, after) = rest.split_at(count.count());
            rest = after;
            let mut name_at = block.len() * DIRENT_BYTES;
            for (name, ix) in block {
                let nid = self.place(*ix).at / SLOT;
                out.extend_from_slice(&nid.to_le_bytes());
                out.extend_from_slice(&u16::try_from(name_at).unwrap_or(0).to_le_bytes());
                out.extend_from_slice(&[dirent_kind(mode_of(self.tree.node(*ix))), 0]);
                name_at += name.len();
            }
            block.iter().for_each(|(name, _)| out.extend_from_slice(name));
            if !rest.is_empty() {
                out.resize(out.len().next_multiple_of(BLOCK_LEN), 0);
            }
        }
        out
    }

    fn data(&self, ix: NodeIx) -> Vec<u8> {
        match &self.tree.node(ix).kind {
            Kind::Dir(_) => self.dir_data(ix),
            Kind::Symlink(target) => target.to_vec(),
            Kind::File(Content::Inline(bytes)) => bytes.to_vec(),
            _ => Vec::new(),
        }
    }

    /// The inode, its xattrs, and what follows it.
    fn inode(&self, ix: NodeIx) -> Result<Vec<u8>, PrepareError> {
        let node = self.tree.node(ix);
        let place = self.place(ix);
        let xattr_len = xattr_bytes(node);
        let icount = if xattr_len == 0 { 0 } else { (xattr_len - XATTR_HEAD_BYTES) / 4 + 1 };
        let icount = u16::try_from(icount)
            .map_err(|_| PrepareError::Format("a file with too many xattrs".to_owned()))?;
        let chunk_bits = chunk_bits(place.size);
        let union = match &node.kind {
            Kind::Device { major, minor, .. } => encode_device(*major, *minor),
            Kind::File(Content::Object { .. }) => chunk_bits - 12,
            _ => u32::try_from(place.block)
                .map_err(|_| PrepareError::Format("too much metadata".to_owned()))?,
        };
        let meta = &node.meta;
        let mut out = Vec::new();
        out.extend_from_slice(&(1 | place.layout.code() << 1).to_le_bytes());
        out.extend_from_slice(&icount.to_le_bytes());
        out.extend_from_slice(&mode_of(node).to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&place.size.to_le_bytes());
        out.extend_from_slice(&union.to_le_bytes());
        let ino = u32::try_from(ix.index()).unwrap_or(0).wrapping_add(1);
        for n in [ino, meta.uid, meta.gid] {
            out.extend_from_slice(&n.to_le_bytes());
        }
        out.extend_from_slice(&meta.mtime.secs.to_le_bytes());
        for n in [meta.mtime.nanos, place.nlink] {
            out.extend_from_slice(&n.to_le_bytes());
        }
        out.resize(out.len() + 16, 0);
        debug_assert_eq!(out.len() as u64, INODE_BYTES);
        write_xattrs(node, &mut out);
        match place.layout {
            Layout::Chunks => out.extend_from_slice(&HOLE.to_le_bytes()),
            Layout::Inline => {
                let data = self.data(ix);
                out.extend_from_slice(&data[data.len() - self.tail_len(&place)..]);
            }
            Layout::Plain => {}
        }
        Ok(out)
    }

    fn superblock(&self) -> Result<Vec<u8>, PrepareError> {
        let mut out = vec![0; SUPER_AT];
        let too_much =
            |_| PrepareError::Format("the metadata of this image is too long".to_owned());
        let blocks = u32::try_from(self.end / BLOCK).map_err(too_much)?;
        let root = u16::try_from(self.place(NodeIx::ROOT).at / SLOT).unwrap_or(0);
        out.extend_from_slice(&MAGIC.to_le_bytes());
        out.extend_from_slice(&[0; 8]); // no checksum: every frame has its hash; no compatible features
        out.extend_from_slice(&[12, 0]); // block bits, no extra slots
        out.extend_from_slice(&root.to_le_bytes());
        out.extend_from_slice(&self.totals.files.to_le_bytes());
        out.extend_from_slice(&[0; 12]); // build time: the same tree gives the same bytes
        out.extend_from_slice(&blocks.to_le_bytes());
        out.extend_from_slice(&[0; 8]); // metadata and shared xattrs begin at block 0
        out.extend_from_slice(&[0; 16]); // uuid
        out.extend_from_slice(b"volley\0\0\0\0\0\0\0\0\0\0");
        out.extend_from_slice(&INCOMPAT_CHUNKED.to_le_bytes());
        out.resize(SUPER_AT + SUPER_BYTES, 0);
        Ok(out)
    }
}

fn mode_of(node: &Node) -> u16 {
    let kind = match &node.kind {
        Kind::Dir(_) => S_IFDIR,
        Kind::File(_) => S_IFREG,
        Kind::Symlink(_) => S_IFLNK,
        Kind::Device { block: true, .. } => S_IFBLK,
        Kind::Device { block: false, .. } => S_IFCHR,
        Kind::Fifo => S_IFIFO,
    };
    kind | node.meta.mode & 0o7777
}

/// The smallest chunk, as a power of two, of which one covers the file.
fn chunk_bits(size: u64) -> u32 {
    (u64::BITS - size.saturating_sub(1).leading_zeros()).clamp(12, 12 + 31)
}

/// The xattrs of a node as they are written, our own two included.
fn xattrs_of(node: &Node) -> Vec<(&[u8], std::borrow::Cow<'_, [u8]>)> {
    let own = node.meta.xattrs.iter().map(|(name, value)| (&**name, (&**value).into()));
    let mut out: Vec<_> = own.collect();
    if let Kind::File(Content::Object { id, .. }) = &node.kind {
        out.push((METACOPY, Vec::new().into()));
        out.push((REDIRECT, object_path(id).into_bytes().into()));
    }
    out
}

fn xattr_bytes(node: &Node) -> u64 {
    let each = |(name, value): &(&[u8], std::borrow::Cow<'_, [u8]>)| {
        let name = xattr_prefix(name).map_or(0, |(_, rest)| rest.len());
        round_up((4 + name + value.len()) as u64, 4)
    };
    let sum: u64 = xattrs_of(node).iter().map(each).sum();
    if sum == 0 { 0 } else { XATTR_HEAD_BYTES + sum }
}

fn write_xattrs(node: &Node, out: &mut Vec<u8>) {
    let xattrs = xattrs_of(node);
    if xattrs.is_empty() {
        return;
    }
    out.resize(out.len() + usize::try_from(XATTR_HEAD_BYTES).unwrap_or(12), 0);
    for (name, value) in xattrs {
        // `keeps_xattr` let in only names with a prefix; sizes were bounded by XATTR_BYTES_MAX.
        let Some((index, rest)) = xattr_prefix(name) else { continue };
        out.push(u8::try_from(rest.len()).unwrap_or(u8::MAX));
        out.push(index);
        out.extend_from_slice(&u16::try_from(value.len()).unwrap_or(u16::MAX).to_le_bytes());
        out.extend_from_slice(rest);
        out.extend_from_slice(&value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
}
