//! The image's tree in memory: where layers are applied, whiteouts included, before anything is written.
//!
//! Names are bytes. A path never follows a symlink: the tree has no `..` and refuses an ancestor that is a symlink, so that
//! what an entry says is where it lies. A name remembers the layer that put it there, because a whiteout hides only what
//! lies below. Left out: file contents, which are in packs by then.

use std::collections::BTreeMap;

use crate::id::Hash;
use crate::limits::{DEPTH_MAX, ENTRIES_MAX, NAME_BYTES_MAX, PATH_BYTES_MAX};
use crate::refuse::{Refusal, Rule};

/// Seconds and nanoseconds since 1970; may be before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Time {
    pub(crate) secs: i64,
    /// Below 1,000,000,000.
    pub(crate) nanos: u32,
}

/// One extended attribute: its full name and its value.
pub(crate) type Xattr = (Box<[u8]>, Box<[u8]>);

/// What every inode has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Meta {
    /// The low twelve bits: permissions, setuid, setgid, sticky.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Time,
    /// Sorted by name, each once.
    pub(crate) xattrs: Vec<Xattr>,
}

/// Where a regular file's bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    /// Here.
    Inline(Box<[u8]>),
    /// In packs.
    Object { id: Hash, size: u64 },
}

/// Place of a node in its tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct NodeIx(u32);

impl NodeIx {
    pub(crate) const ROOT: Self = Self(0);

    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Dir(Children),
    File(Content),
    Symlink(Box<[u8]>),
    Device { block: bool, major: u32, minor: u32 },
    Fifo,
}

/// A directory's entries, in byte order.
pub(crate) type Children = BTreeMap<Box<[u8]>, Name>;

/// One name in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Name {
    pub(crate) node: NodeIx,
    layer: u32,
    /// Said by an entry of its own, not only as an ancestor of one.
    explicit: bool,
}

/// An inode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) meta: Meta,
    pub(crate) kind: Kind,
}

/// A file system.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
    layer: u32,
    root_explicit: bool,
}

/// Cuts a path into its names. The root is no name at all.
pub(crate) fn split_path(path: &[u8]) -> Result<Vec<&[u8]>, Refusal> {
    if path.first() == Some(&b'/') {
        return Err(Refusal::new(Rule::Absolute, path, "the path begins with '/'"));
    }
    if path.len() > PATH_BYTES_MAX {
        return Err(Refusal::new(Rule::Path, path, "the path is longer than 4,095 bytes"));
    }
    let mut names = Vec::new();
    for name in path.split(|b| *b == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err(Refusal::new(Rule::DotDot, path, "the path goes up by '..'")),
            _ if name.len() > NAME_BYTES_MAX => {
                return Err(Refusal::new(Rule::Path, path, "a name is longer than 255 bytes"));
            }
            _ if name.contains(&0) => {
                return Err(Refusal::new(Rule::Path, path, "a name contains a NUL"));
            }
            _ => names.push(name),
        }
    }
    if names.len() > DEPTH_MAX {
        return Err(Refusal::new(Rule::Path, path, "the path is deeper than 1,024 names"));
    }
    Ok(names)
}

impl Tree {
    pub(crate) fn new() -> Self {
        let meta = Meta { mode: 0o755, ..Meta::default() };
        let root = Node { meta, kind: Kind::Dir(Children::new()) };
        Self { nodes: vec![root], layer: 0, root_explicit: false }
    }

    /// What follows lies above what was added until now.
    pub(crate) fn begin_layer(&mut self) {
        self.layer += 1;
        self.root_explicit = false;
    }

    pub(crate) fn node(&self, ix: NodeIx) -> &Node {
        &self.nodes[ix.index()]
    }

    /// Nodes ever made, those no longer reachable included: indexes are below it.
    pub(crate) fn nodes_len(&self) -> usize {
        self.nodes.len()
    }

    /// The entries of a directory; nothing for anything else.
    pub(crate) fn children(&self, ix: NodeIx) -> Option<&Children> {
        match &self.node(ix).kind {
            Kind::Dir(children) => Some(children),
            _ => None,
        }
    }

    /// Adds one entry, replacing what a lower layer had there.
    pub(crate) fn add(&mut self, path: &[u8], node: Node) -> Result<(), Refusal> {
        let names = split_path(path)?;
        let Some((last, ancestors)) = names.split_last() else {
            return self.set_root(path, node);
        };
        let parent = self.walk_making(path, ancestors)?;
        let layer = self.layer;
        let Some(old) = self.children(parent).and_then(|c| c.get(*last)).copied() else {
            let node = self.push(path, node)?;
            self.put(parent, last, Name { node, layer, explicit: true });
            return Ok(());
        };
        let merges =
            matches!((&self.node(old.node).kind, &node.kind), (Kind::Dir(_), Kind::Dir(_)));
        if old.layer == layer && (!merges || old.explicit) {
            // A directory said twice in the same words is not ambiguous, and common tools write it.
            if merges && self.node(old.node).meta == node.meta {
                return Ok(());
            }
            return Err(Refusal::new(Rule::Duplicate, path, "the layer has this path twice"));
        }
        if merges {
            self.nodes[old.node.index()].meta = node.meta;
            self.put(parent, last, Name { node: old.node, layer, explicit: true });
        } else {
            let node = self.push(path, node)?;
            self.put(parent, last, Name { node, layer, explicit: true });
        }
        Ok(())
    }

    /// Gives an existing inode one more name.
    pub(crate) fn hardlink(&mut self, path: &[u8], target: &[u8]) -> Result<(), Refusal> {
        let refuse = |what: &str| Refusal::new(Rule::Hardlink, path, what);
        let target_names = split_path(target)?;
        let Some(node) = self.find(target, &target_names)? else {
            return Err(refuse("it links to a path that is not there"));
        };
        if matches!(self.node(node).kind, Kind::Dir(_)) {
            return Err(refuse("it links to a directory"));
        }
        let names = split_path(path)?;
        if names == target_names {
            return Err(refuse("it links to itself"));
        }
        let Some((last, ancestors)) = names.split_last() else {
            return Err(refuse("the root is a hardlink"));
        };
        let parent = self.walk_making(path, ancestors)?;
        let layer = self.layer;
        let old = self.children(parent).and_then(|c| c.get(*last));
        if old.is_some_and(|old| old.layer == layer) {
            return Err(Refusal::new(Rule::Duplicate, path, "the layer has this path twice"));
        }
        self.put(parent, last, Name { node, layer, explicit: true });
        Ok(())
    }

    /// Applies `.wh.NAME`: hides what lower layers have at `dir/name`.
    pub(crate) fn whiteout(&mut self, dir: &[u8], name: &[u8]) -> Result<(), Refusal> {
        if matches!(name, b"" | b"." | b"..") {
            return Err(Refusal::new(Rule::Whiteout, dir, "a whiteout without a name"));
        }
        let names = split_path(dir)?;
        let Some(dir_ix) = self.find_dir(dir, &names)? else { return Ok(()) };
        let Some(old) = self.children(dir_ix).and_then(|c| c.get(name)).copied() else {
            return Ok(());
        };
        let keeps = self.remove_lower(old.node);
        if old.layer != self.layer && !keeps {
            self.children_mut(dir_ix).remove(name);
        }
        Ok(())
    }

    /// Applies `.wh..wh..opq`: hides all that lower layers have in `dir`.
    pub(crate) fn opaque(&mut self, dir: &[u8]) -> Result<(), Refusal> {
        let names = split_path(dir)?;
        if let Some(ix) = self.find_dir(dir, &names)? {
            self.remove_lower(ix);
        }
        Ok(())
    }

    /// Removes what lies in `dir` from lower layers. Says whether anything of this layer is left in it.
    fn remove_lower(&mut self, dir: NodeIx) -> bool {
        let Kind::Dir(children) = &mut self.nodes[dir.index()].kind else { return false };
        let mut children = std::mem::take(children);
        let layer = self.layer;
        children.retain(|_, name| {
            let keeps = self.remove_lower(name.node);
            name.layer == layer || keeps
        });
        let keeps = !children.is_empty();
        self.nodes[dir.index()].kind = Kind::Dir(children);
        keeps
    }

    fn set_root(&mut self, path: &[u8], node: Node) -> Result<(), Refusal> {
        if !matches!(node.kind, Kind::Dir(_)) {
            return Err(Refusal::new(Rule::Kind, path, "the root is not a directory"));
        }
        if self.root_explicit && self.nodes[0].meta != node.meta {
            return Err(Refusal::new(Rule::Duplicate, path, "the layer has its root twice"));
        }
        self.root_explicit = true;
        self.nodes[0].meta = node.meta;
        Ok(())
    }

    fn push(&mut self, path: &[u8], node: Node) -> Result<NodeIx, Refusal> {
        let ix = u32::try_from(self.nodes.len()).ok().filter(|n| u64::from(*n) < ENTRIES_MAX);
        let Some(ix) = ix else {
            return Err(Refusal::new(Rule::TooManyEntries, path, "the image has too many entries"));
        };
        self.nodes.push(node);
        Ok(NodeIx(ix))
    }

    fn put(&mut self, dir: NodeIx, name: &[u8], entry: Name) {
        let children = self.children_mut(dir);
        match children.get_mut(name) {
            Some(old) => *old = entry,
            None => {
                children.insert(name.into(), entry);
            }
        }
    }

    fn children_mut(&mut self, dir: NodeIx) -> &mut Children {
        match &mut self.nodes[dir.index()].kind {
            Kind::Dir(children) => children,
            // Every caller has it from `walk_making` or `find_dir`, which return directories only.
            _ => unreachable!("not a directory"),
        }
    }

    /// Goes down to a directory, making the ones that are missing.
    fn walk_making(&mut self, path: &[u8], names: &[&[u8]]) -> Result<NodeIx, Refusal> {
        let mut at = NodeIx::ROOT;
        for name in names {
            at = match self.step(path, at, name)? {
                Some(next) => next,
                None => {
                    let meta = Meta { mode: 0o755, ..Meta::default() };
                    let made = self.push(path, Node { meta, kind: Kind::Dir(Children::new()) })?;
                    let layer = self.layer;
                    self.put(at, name, Name { node: made, layer, explicit: false });
                    made
                }
            };
        }
        Ok(at)
    }

    /// One step down to a directory that is there, or `None` when nothing is.
    fn step(&self, path: &[u8], at: NodeIx, name: &[u8]) -> Result<Option<NodeIx>, Refusal> {
        let Some(next) = self.children(at).and_then(|c| c.get(name)) else { return Ok(None) };
        match &self.node(next.node).kind {
            Kind::Dir(_) => Ok(Some(next.node)),
            Kind::Symlink(_) => {
                let what = format!("the path goes through the symlink {}", name.escape_ascii());
                Err(Refusal::new(Rule::ThroughSymlink, path, what))
            }
            _ => {
                let what = format!("{} is not a directory", name.escape_ascii());
                Err(Refusal::new(Rule::ThroughFile, path, what))
            }
        }
    }

    fn find_dir(&self, path: &[u8], names: &[&[u8]]) -> Result<Option<NodeIx>, Refusal> {
        let mut at = NodeIx::ROOT;
        for name in names {
            match self.step(path, at, name)? {
                Some(next) => at = next,
                None => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    fn find(&self, path: &[u8], names: &[&[u8]]) -> Result<Option<NodeIx>, Refusal> {
        let Some((last, ancestors)) = names.split_last() else { return Ok(Some(NodeIx::ROOT)) };
        let Some(parent) = self.find_dir(path, ancestors)? else { return Ok(None) };
        Ok(self.children(parent).and_then(|c| c.get(*last)).map(|name| name.node))
    }
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;
