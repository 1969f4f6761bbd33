//! The mount without any mount: an image's tree written once a host into a directory.
//!
//! The fallback where the kernel has no EROFS, FUSE or overlay data layers. It costs what every pull costs, all bytes before
//! the first one is used, and is here because it works everywhere. The tree is written aside and renamed when it is whole and
//! on disk. All names are created exclusively, so that a stored tree that lies cannot write outside.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

use crate::deep::on_deep_stack;
use crate::erofs_read::{ErofsImage, Inode, InodeKind};
use crate::id::Hash;
use crate::index::{Damaged, FrameRef, Index};
use crate::limits::{CHUNK_BYTES, DEPTH_MAX};
use crate::manifest::Manifest;
use crate::store::{DomainStore, ImageError, runs};

/// Runs of frames that are fetched at once.
const FETCHES: usize = 6;

/// Part of a frame that goes into a file.
struct Piece {
    file: u32,
    file_at: u64,
    frame_at: u32,
    len: u32,
}

/// What is to be written once the bytes are there, and what is to be set once they are written.
#[derive(Default)]
struct Work {
    files: Vec<PathBuf>,
    /// By frame ordinal.
    pieces: HashMap<u32, Vec<Piece>>,
    /// Every path with its metadata, parents before children.
    metas: Vec<(PathBuf, Inode)>,
}

/// Writes an image's tree into `target`, which must be an empty directory.
pub(crate) async fn unpack(
    at: &DomainStore,
    manifest: &Manifest,
    target: &Path,
) -> Result<(), ImageError> {
    let (meta, index) = futures::try_join!(at.blob(manifest, &manifest.meta), at.index(manifest))?;
    let index = Arc::new(index);
    let (for_walk, root) = (index.clone(), target.to_owned());
    let work = on_deep_stack("unpack", move || Walk::run(&meta, &for_walk, root));
    let work = work.await.map_err(|e| ImageError::host("unpack", e))??;
    let work = Arc::new(work);
    let mut frames: Vec<(u32, FrameRef)> =
        work.pieces.keys().map(|n| (*n, index.frames[*n as usize])).collect();
    frames.sort_unstable_by_key(|(_, frame)| (frame.pack, frame.offset));
    let refs: Vec<FrameRef> = frames.iter().map(|(_, frame)| *frame).collect();
    let mut done = 0;
    let runs = runs(&refs).into_iter().map(|run| {
        let ordinals: Vec<u32> = frames[done..done + run.len()].iter().map(|(n, _)| *n).collect();
        done += run.len();
        (run.to_vec(), ordinals)
    });
    let runs: Vec<_> = runs.collect();
    futures::stream::iter(runs)
        .map(|(run, ordinals)| {
            let (index, work) = (index.clone(), work.clone());
            async move {
                let pack = index.packs[run[0].pack as usize].hash;
                let bytes = at.run(&pack, &run).await?;
                blocking(move || write_run(&work, &ordinals, &bytes)).await
            }
        })
        .buffer_unordered(FETCHES)
        .try_collect::<()>()
        .await?;
    let target = target.to_owned();
    blocking(move || finish(&work, &target)).await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    let lost = |_| ImageError::host("unpack", io::Error::other("the task was stopped"));
    tokio::task::spawn_blocking(work).await.map_err(lost)?
}

fn failed(path: &Path) -> impl Fn(io::Error) -> ImageError {
    move |e| ImageError::host(format!("write {}", path.display()), e)
}

struct Walk<'a> {
    image: ErofsImage<'a>,
    index: &'a Index,
    work: Work,
    /// First path of each inode with several names.
    links: HashMap<u64, PathBuf>,
}

impl<'a> Walk<'a> {
    /// Makes all names, writes small files, and plans the rest.
    fn run(meta: &'a [u8], index: &'a Index, target: PathBuf) -> Result<Work, ImageError> {
        let image = ErofsImage::open(meta)?;
        let root = image.root()?;
        let mut walk = Self { image, index, work: Work::default(), links: HashMap::new() };
        walk.work.metas.push((target.clone(), root.clone()));
        walk.dir(&root, &target, 0)?;
        Ok(walk.work)
    }

    fn dir(&mut self, dir: &Inode, path: &Path, depth: usize) -> Result<(), ImageError> {
        if depth > DEPTH_MAX {
            return Err(Damaged("directories deeper than any that was prepared").into());
        }
        for (name, nid) in self.image.entries(dir)? {
            let name: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(&name);
            let path = path.join(name);
            if let Some(first) = self.links.get(&nid) {
                fs::hard_link(first, &path).map_err(failed(&path))?;
                continue;
            }
            let inode = self.image.inode(nid)?;
            self.make(&inode, &path).map_err(failed(&path))?;
            if let InodeKind::Object { id, size } = inode.kind {
                self.plan(&id, size, &path)?;
            }
            if inode.nlink > 1 && inode.kind != InodeKind::Dir {
                self.links.insert(nid, path.clone());
            }
            self.work.metas.push((path.clone(), inode.clone()));
            if inode.kind == InodeKind::Dir {
                self.dir(&inode, &path, depth + 1)?;
            }
        }
        Ok(())
    }

    fn make(&self, inode: &Inode, path: &Path) -> io::Result<()> {
        let create = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        match &inode.kind {
            InodeKind::Dir => fs::create_dir(path),
            InodeKind::File(bytes) => create()?.write_all_at(bytes, 0),
            InodeKind::Object { size, .. } => create()?.set_len(*size),
            InodeKind::Symlink(target) => {
                let target: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(target);
                std::os::unix::fs::symlink(target, path)
            }
            InodeKind::Device { block, major, minor } => {
                let kind = if *block { FileType::BlockDevice } else { FileType::CharacterDevice };
                let dev = rustix::fs::makedev(*major, *minor);
                Ok(rustix::fs::mknodat(CWD, path, kind, Mode::RUSR, dev)?)
            }
            InodeKind::Fifo => Ok(rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::RUSR, 0)?),
        }
    }

    fn plan(&mut self, id: &Hash, size: u64, path: &Path) -> Result<(), ImageError> {
        let object = self.index.find(id).ok_or(Damaged("a file whose object is not indexed"))?;
        if object.size != size {
            return Err(Damaged("a file of another size than its object").into());
        }
        let too_many = |_| Damaged("too many files");
        let file = u32::try_from(self.work.files.len()).map_err(too_many)?;
        self.work.files.push(path.to_owned());
        for i in 0..object.chunks() {
            let file_at = i * CHUNK_BYTES as u64;
            let frame = if object.is_cut() {
                let at = object.first as usize + usize::try_from(i).unwrap_or(usize::MAX);
                *self.index.chunks.get(at).ok_or(Damaged("a chunk out of range"))?
            } else {
                object.first
            };
            let len = u32::try_from((size - file_at).min(CHUNK_BYTES as u64)).unwrap_or(0);
            let piece = Piece { file, file_at, frame_at: object.offset, len };
            self.work.pieces.entry(frame).or_default().push(piece);
        }
        Ok(())
    }
}

fn write_run(work: &Work, ordinals: &[u32], frames: &[Bytes]) -> Result<(), ImageError> {
    for (ordinal, bytes) in ordinals.iter().zip(frames) {
        for piece in work.pieces.get(ordinal).into_iter().flatten() {
            let path = &work.files[piece.file as usize];
            let start = piece.frame_at as usize;
            let part = bytes.get(start..start + piece.len as usize);
            let part = part.ok_or(Damaged("an object that passes the end of its frame"))?;
            // A hole stays one.
            if part.iter().all(|b| *b == 0) {
                continue;
            }
            let file = OpenOptions::new().write(true).open(path).map_err(failed(path))?;
            file.write_all_at(part, piece.file_at).map_err(failed(path))?;
        }
    }
    Ok(())
}

/// Sets owners, modes, xattrs and times, children before parents, and brings it all to disk.
fn finish(work: &Work, target: &Path) -> Result<(), ImageError> {
    for (path, inode) in work.metas.iter().rev() {
        set_meta(path, inode).map_err(failed(path))?;
    }
    let dir = File::open(target).map_err(failed(target))?;
    rustix::fs::syncfs(&dir).map_err(|e| failed(target)(e.into()))
}

fn set_meta(path: &Path, inode: &Inode) -> io::Result<()> {
    let meta = &inode.meta;
    let owner = rustix::fs::Uid::from_raw(meta.uid);
    let group = rustix::fs::Gid::from_raw(meta.gid);
    rustix::fs::chownat(CWD, path, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW)?;
    let symlink = matches!(inode.kind, InodeKind::Symlink(_));
    if !symlink {
        rustix::fs::chmodat(CWD, path, Mode::from_raw_mode(meta.mode.into()), AtFlags::empty())?;
    }
    for (name, value) in &meta.xattrs {
        rustix::fs::lsetxattr(path, &**name, value, XattrFlags::empty())?;
    }
    let time = Timespec { tv_sec: meta.mtime.secs, tv_nsec: i64::from(meta.mtime.nanos) };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(())
}
