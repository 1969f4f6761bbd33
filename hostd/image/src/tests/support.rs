//! What the tests share: a store in memory, trees to make and to compare.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use object_store::ObjectStore;
use object_store::memory::InMemory;

use crate::{MountBy, MountConfig, Mounter, Serving, Source, Summary};

pub(super) fn memory() -> Arc<dyn ObjectStore> {
    Arc::new(InMemory::new())
}

pub(super) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

pub(super) async fn prepared(store: &Arc<dyn ObjectStore>, name: &str, source: Source) -> Summary {
    crate::prepare(store.clone(), "test", name, source, Arc::new(())).await.unwrap()
}

pub(super) async fn mounter(store: &Arc<dyn ObjectStore>, dir: &Path, unpack: bool) -> Mounter {
    let config = MountConfig {
        state_dir: dir.join("state"),
        cache_dir: dir.join("cache"),
        cache_bytes_max: 1 << 30,
        store: store.clone(),
        domain: "test".to_owned(),
        by: MountBy::Auto,
    };
    let serving = if unpack { Serving::Unpack } else { Serving::Inside };
    Mounter::start_with(config, serving).await.unwrap()
}

/// Everything that an ordinary program can see of a tree, a line a path.
pub(super) fn snapshot(root: &Path) -> BTreeMap<Vec<u8>, String> {
    let mut out = BTreeMap::new();
    let mut inodes = HashMap::new();
    walk(root, root, true, &mut out, &mut inodes);
    out
}

/// The same without what is in files of more than 2 KiB.
pub(super) fn snapshot_without_bytes(root: &Path) -> BTreeMap<Vec<u8>, String> {
    let mut out = BTreeMap::new();
    let mut inodes = HashMap::new();
    walk(root, root, false, &mut out, &mut inodes);
    out
}

fn walk(
    root: &Path,
    path: &Path,
    bytes: bool,
    out: &mut BTreeMap<Vec<u8>, String>,
    inodes: &mut HashMap<u64, Vec<u8>>,
) {
    let meta = fs::symlink_metadata(path).unwrap();
    let key = path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec();
    let kind = meta.file_type();
    let mut line = format!(
        "{:o} {}:{} {}.{:09}",
        meta.mode(),
        meta.uid(),
        meta.gid(),
        meta.mtime(),
        meta.mtime_nsec()
    );
    if kind.is_symlink() {
        line += &format!(" -> {}", fs::read_link(path).unwrap().display());
    } else if kind.is_file() {
        line += &format!(" {}", meta.len());
        if bytes || meta.len() <= 2048 {
            let bytes = fs::read(path).unwrap();
            assert_eq!(bytes.len() as u64, meta.len());
            line += &format!(" {}", blake3::hash(&bytes).to_hex());
        }
    } else if !kind.is_dir() {
        line += &format!(" dev {:x}", meta.rdev());
    }
    if !kind.is_dir() {
        line += &format!(" links {}", meta.nlink());
        if meta.nlink() > 1 {
            let first = inodes.entry(meta.ino()).or_insert_with(|| key.clone());
            line += &format!(" with {}", first.escape_ascii());
        }
    }
    if !kind.is_symlink() {
        line += &xattrs(path);
    }
    out.insert(key, line);
    if kind.is_dir() {
        let mut paths: Vec<_> = fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).collect();
        paths.sort_unstable();
        for path in paths {
            walk(root, &path, bytes, out, inodes);
        }
    }
}

fn xattrs(path: &Path) -> String {
    let mut list = vec![0; 64 << 10];
    let len = rustix::fs::llistxattr(path, &mut list).unwrap_or(0);
    let mut names: Vec<&[u8]> = list[..len].split(|b| *b == 0).filter(|n| !n.is_empty()).collect();
    names.sort_unstable();
    let mut out = String::new();
    for name in names {
        let mut value = vec![0; 64 << 10];
        let len = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
        out += &format!(" {}={}", name.escape_ascii(), value[..len].escape_ascii());
    }
    out
}

/// Fails with the first difference, not with two whole trees.
pub(super) fn assert_same(want: &BTreeMap<Vec<u8>, String>, got: &BTreeMap<Vec<u8>, String>) {
    for (path, line) in want {
        assert_eq!(Some(line), got.get(path), "{}", path.escape_ascii());
    }
    let more: Vec<_> = got.keys().filter(|key| !want.contains_key(*key)).collect();
    assert!(more.is_empty(), "there is more: {more:?}");
}

/// A tree with one of everything that root can make.
pub(super) fn make_varied(root: &Path) {
    use rustix::fs::{CWD, FileType, Mode, XattrFlags};
    let write = |name: &str, bytes: &[u8]| fs::write(root.join(name), bytes).unwrap();
    fs::create_dir_all(root.join("etc/deep/er")).unwrap();
    fs::create_dir_all(root.join("many")).unwrap();
    write("etc/passwd", b"root:x:0:0::/:/bin/sh\n");
    write("etc/empty", b"");
    write("small", &noise(1, 2048));
    write("edge", &noise(2, 2049));
    write("medium", &noise(3, 300_000));
    write("exact", &noise(4, 1 << 20));
    write("large", &noise(5, (3 << 20) + 17));
    write("same-as-large", &noise(5, (3 << 20) + 17));
    write("zeros", &vec![0; 5 << 20]);
    for i in 0..700u16 {
        write(
            &format!("many/file-with-a-longer-name-{i:05}"),
            &noise(100 + u64::from(i), 10 + 7 * usize::from(i)),
        );
    }
    write(&"n".repeat(255), b"a long name");
    fs::hard_link(root.join("medium"), root.join("etc/hard")).unwrap();
    fs::hard_link(root.join("medium"), root.join("etc/deep/harder")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", root.join("link")).unwrap();
    std::os::unix::fs::symlink("x".repeat(3000), root.join("long-link")).unwrap();
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.set_len(40 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"in the middle", 17 << 20).unwrap();
    let mode = Mode::from_raw_mode(0o640);
    rustix::fs::mknodat(CWD, root.join("fifo"), FileType::Fifo, mode, 0).unwrap();
    if is_root() {
        let dev = rustix::fs::makedev(300, 70_000);
        rustix::fs::mknodat(CWD, root.join("dev"), FileType::CharacterDevice, mode, dev).unwrap();
        rustix::fs::mknodat(CWD, root.join("blk"), FileType::BlockDevice, mode, 0x0800).unwrap();
        std::os::unix::fs::chown(root.join("small"), Some(1234), Some(4_000_000_000)).unwrap();
        std::os::unix::fs::lchown(root.join("link"), Some(7), Some(8)).unwrap();
        let set = |name: &str, key: &str, value: &[u8]| {
            rustix::fs::lsetxattr(root.join(name), key, value, XattrFlags::empty()).unwrap();
        };
        set("small", "user.note", b"\0binary\n=\xff");
        set("large", "trusted.thing", &[7; 2000]);
        set("etc", "user.dir", b"1");
        set("etc/empty", "security.capability", b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    }
    for (name, mode) in [("small", 0o4755), ("edge", 0o000), ("etc/deep", 0o1777), ("many", 0o700)]
    {
        rustix::fs::chmod(root.join(name), Mode::from_raw_mode(mode)).unwrap();
    }
    let times = [
        ("small", -5, 999_999_999),
        ("many", 1_700_000_000, 123_456_789),
        ("link", 3, 1),
        ("etc", 0, 0),
    ];
    for (name, secs, nanos) in times {
        let time = rustix::fs::Timespec { tv_sec: secs, tv_nsec: nanos };
        let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::utimensat(CWD, root.join(name), &times, flags).unwrap();
    }
}

/// Bytes that do not compress, the same for the same seed.
pub(super) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}
