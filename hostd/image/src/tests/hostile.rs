//! The hostile corpus (FAULTS I5): every archive is refused by its rule, quickly, in little memory, and nothing is published.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use object_store::ObjectStore;

use super::support::memory;
use crate::{Rule, Source};

/// A header block, of which a field may be wrong.
struct Raw {
    block: [u8; 512],
}

/// In octal, or in base 256 when that is too short.
fn put_number(field: &mut [u8], number: u64) {
    if number < 1 << 33 {
        field[..11].copy_from_slice(format!("{number:011o}").as_bytes());
    } else {
        field[0] = 0x80;
        field[4..].copy_from_slice(&number.to_be_bytes());
    }
}

impl Raw {
    fn new(name: &str, kind: u8, size: u64) -> Self {
        let mut block = [0; 512];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[100..107].copy_from_slice(b"0000644");
        block[108..115].copy_from_slice(b"0000000");
        block[116..123].copy_from_slice(b"0000000");
        put_number(&mut block[124..136], size);
        block[136..147].copy_from_slice(b"00000000000");
        block[156] = kind;
        block[257..265].copy_from_slice(b"ustar\x0000");
        Self { block }
    }

    fn link(mut self, to: &str) -> Self {
        self.block[157..157 + to.len()].copy_from_slice(to.as_bytes());
        self
    }

    fn set(mut self, at: usize, bytes: &[u8]) -> Self {
        self.block[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn bytes(mut self) -> Vec<u8> {
        self.block[148..156].fill(b' ');
        let sum: u32 = self.block.iter().map(|b| u32::from(*b)).sum();
        self.block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        self.block.to_vec()
    }
}

fn file(name: &str, bytes: &[u8]) -> Vec<u8> {
    [Raw::new(name, b'0', bytes.len() as u64).bytes(), padded(bytes)].concat()
}

fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

fn symlink(name: &str, to: &str) -> Vec<u8> {
    Raw::new(name, b'2', 0).link(to).bytes()
}

fn hardlink(name: &str, to: &str) -> Vec<u8> {
    Raw::new(name, b'1', 0).link(to).bytes()
}

fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    let mut body = Vec::new();
    for (key, value) in records {
        let rest = format!(" {key}={value}\n");
        let mut len = rest.len() + 1;
        while format!("{len}").len() + rest.len() != len {
            len += 1;
        }
        body.extend_from_slice(format!("{len}{rest}").as_bytes());
    }
    pax_raw(&body)
}

fn pax_raw(body: &[u8]) -> Vec<u8> {
    [Raw::new("pax", b'x', body.len() as u64).bytes(), padded(body)].concat()
}

fn archive(parts: &[Vec<u8>]) -> Vec<u8> {
    [parts.concat(), vec![0; 1024]].concat()
}

fn sparse(size: u64, pieces: &[(u64, u64)], stored: &[u8]) -> Vec<u8> {
    let mut raw = Raw::new("s", b'S', stored.len() as u64).set(257, b"ustar  \0");
    for (i, (at, len)) in pieces.iter().enumerate() {
        put_number(&mut raw.block[386 + 24 * i..][..12], *at);
        put_number(&mut raw.block[398 + 24 * i..][..12], *len);
    }
    put_number(&mut raw.block[483..495], size);
    [raw.bytes(), padded(stored)].concat()
}

/// What it is, the rule that refuses it, and its bytes.
type Case = (&'static str, Rule, Vec<u8>);

fn corpus() -> Vec<Case> {
    [of_paths(), of_headers(), of_content()].concat()
}

/// Paths that lead elsewhere.
fn of_paths() -> Vec<Case> {
    vec![
        ("..", Rule::DotDot, archive(&[file("a/../../etc/passwd", b"x")])),
        ("absolute", Rule::Absolute, archive(&[file("/etc/passwd", b"x")])),
        (
            "absolute in pax",
            Rule::Absolute,
            archive(&[pax(&[("path", "/etc/x")]), file("x", b"x")]),
        ),
        (
            "through a symlink",
            Rule::ThroughSymlink,
            archive(&[symlink("a", "/etc"), file("a/x", b"x")]),
        ),
        (
            "hardlink through one",
            Rule::ThroughSymlink,
            archive(&[symlink("a", "/etc"), hardlink("b", "a/passwd")]),
        ),
        ("hardlink to ..", Rule::DotDot, archive(&[hardlink("b", "../../etc/passwd")])),
        ("hardlink to absolute", Rule::Absolute, archive(&[hardlink("b", "/etc/passwd")])),
        ("hardlink to nothing", Rule::Hardlink, archive(&[hardlink("b", "c")])),
        ("through a file", Rule::ThroughFile, archive(&[file("a", b""), file("a/x", b"x")])),
        ("twice", Rule::Duplicate, archive(&[file("a", b"1"), file("a", b"2")])),
        (
            "twice by other words",
            Rule::Duplicate,
            archive(&[file("a/b", b"1"), file("a//./b", b"2")]),
        ),
    ]
}

/// Headers that contradict themselves.
fn of_headers() -> Vec<Case> {
    let mut half = file("f", &[7; 2000]);
    half.truncate(1024);
    let mut wrong_sum = file("f", b"x");
    wrong_sum[150] ^= 1;
    vec![
        ("pax size", Rule::SizeMismatch, archive(&[pax(&[("size", "1")]), file("a", b"22")])),
        (
            "link with data",
            Rule::SizeMismatch,
            archive(&[Raw::new("a", b'2', 5).link("b").bytes(), padded(b"12345")]),
        ),
        (
            "two pax headers",
            Rule::BrokenTar,
            archive(&[pax(&[("uid", "1")]), pax(&[("uid", "2")]), file("a", b"")]),
        ),
        (
            "pax key twice",
            Rule::BrokenRecord,
            archive(&[pax(&[("uid", "1"), ("uid", "2")]), file("a", b"")]),
        ),
        ("pax length", Rule::BrokenRecord, archive(&[pax_raw(b"99 uid=1\n"), file("a", b"")])),
        ("pax without end", Rule::BrokenRecord, archive(&[pax_raw(b"8 uid=12"), file("a", b"")])),
        ("huge record", Rule::BrokenRecord, archive(&[Raw::new("p", b'x', 1 << 33).bytes()])),
        ("breaks off", Rule::BrokenTar, half),
        ("no end", Rule::BrokenTar, file("a", b"x")),
        ("checksum", Rule::BrokenTar, archive(&[wrong_sum])),
        (
            "negative size",
            Rule::BrokenTar,
            archive(&[Raw::new("a", b'0', 0).set(124, &[0xff; 12]).bytes()]),
        ),
        (
            "device with a letter",
            Rule::BrokenTar,
            archive(&[Raw::new("a", b'3', 0).set(329, b"zz").bytes()]),
        ),
        ("volume header", Rule::Kind, archive(&[Raw::new("a", b'V', 0).bytes()])),
    ]
}

/// Names, attributes and maps that no file has.
fn of_content() -> Vec<Case> {
    let deep = pax(&[("path", &"d/".repeat(1500))]);
    let long = pax(&[("path", &"x".repeat(300))]);
    let many_xattrs = pax(&[("SCHILY.xattr.user.a", &"v".repeat(70_000))]);
    vec![
        ("deep", Rule::Path, archive(&[deep, file("a", b"")])),
        ("long name", Rule::Path, archive(&[long, file("a", b"")])),
        ("NUL in a name", Rule::Path, archive(&[pax(&[("path", "a\0b")]), file("a", b"")])),
        ("empty symlink", Rule::Path, archive(&[symlink("a", "")])),
        ("xattrs", Rule::Xattr, archive(&[many_xattrs, file("a", b"")])),
        (
            "sparse overlap",
            Rule::Sparse,
            archive(&[sparse(4096, &[(0, 600), (512, 424)], &[1; 1024])]),
        ),
        ("sparse past the end", Rule::Sparse, archive(&[sparse(100, &[(0, 512)], &[1; 512])])),
        ("sparse size", Rule::Sparse, archive(&[sparse(4096, &[(0, 512)], &[1; 1024])])),
        (
            "sparse 0.1",
            Rule::Sparse,
            archive(&[pax(&[("GNU.sparse.map", "0,1")]), file("a", b"x")]),
        ),
        ("sparse bomb", Rule::TooLarge, archive(&[sparse(7 << 40, &[(0, 512)], &[1; 512])])),
        ("a root that is a file", Rule::Kind, archive(&[file(".", b"x")])),
    ]
}

async fn rule_of(dir: &Path, bytes: &[u8]) -> Option<Rule> {
    let path = dir.join("hostile.tar");
    fs::write(&path, bytes).unwrap();
    let store = memory();
    let done =
        crate::prepare(store.clone(), "test", "x", Source::RootfsTar(path), Arc::new(())).await;
    let left: Vec<_> = store.list(None).try_collect::<Vec<_>>().await.unwrap();
    let published = left.iter().any(|o| !o.location.as_ref().starts_with("pack/"));
    assert_eq!(published, done.is_ok(), "published although refused");
    done.err().and_then(|error| error.rule())
}

#[tokio::test]
async fn the_corpus_is_refused_by_rule() {
    let dir = tempfile::tempdir().unwrap();
    for (name, rule, bytes) in corpus() {
        let started = Instant::now();
        assert_eq!(rule_of(dir.path(), &bytes).await, Some(rule), "{name}");
        assert!(started.elapsed() < Duration::from_secs(10), "{name}");
    }
}

#[tokio::test]
async fn whiteouts_follow_the_same_rules() {
    let mut tree = crate::tree::Tree::new();
    let link = crate::tree::Kind::Symlink(b"/etc"[..].into());
    let meta = crate::tree::Meta::default();
    tree.add(b"a", crate::tree::Node { meta, kind: link }).unwrap();
    tree.begin_layer();
    assert_eq!(tree.whiteout(b"a", b"passwd").unwrap_err().rule, Rule::ThroughSymlink);
    assert_eq!(tree.whiteout(b"../..", b"x").unwrap_err().rule, Rule::DotDot);
}

#[tokio::test]
async fn compression_bombs_are_stopped_while_they_grow() {
    let dir = tempfile::tempdir().unwrap();
    // Two terabytes of zeros, said by frames that repeat.
    let frame = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    let head = zstd::bulk::compress(&Raw::new("zeros", b'0', 2 << 40).bytes(), 1).unwrap();
    let mut bomb = head;
    (0..32_768).for_each(|_| bomb.extend_from_slice(&frame));
    let started = Instant::now();
    assert_eq!(rule_of(dir.path(), &bomb).await, Some(Rule::Ratio));
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(&Raw::new("zeros", b'0', 1 << 30).bytes()).unwrap();
    (0..320).for_each(|_| gzip.write_all(&[0; 1 << 20]).unwrap());
    gzip.write_all(&[0; 1024]).unwrap();
    assert_eq!(rule_of(dir.path(), &gzip.finish().unwrap()).await, Some(Rule::Ratio));
    println!("both bombs: {:?}", started.elapsed());
    // Data that is no gzip after its head.
    assert_eq!(
        rule_of(dir.path(), &[0x1f, 0x8b, 8, 0, 1, 2, 3]).await,
        Some(Rule::BrokenCompression)
    );
}

#[tokio::test]
async fn large_holes_cost_little() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("holes.tar");
    let size = 1u64 << 32;
    let holes = archive(&[sparse(size, &[(size / 2, 512)], &[1; 512])]);
    fs::write(&path, holes).unwrap();
    let started = Instant::now();
    let store = memory();
    let done = super::support::prepared(&store, "x", Source::RootfsTar(path)).await;
    assert_eq!(done.bytes, size);
    assert!(done.new_bytes < 100_000, "{done:?}");
    println!("4 GiB of hole: {:?}", started.elapsed());
}

mod mutated {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

        /// Whatever is done to an archive, it is read to an end, without a panic.
        #[test]
        fn archives(which: prop::sample::Index, flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6), cut: prop::sample::Index) {
            let corpus = corpus();
            let (_, _, mut bytes) = corpus[which.index(corpus.len())].clone();
            for (at, byte) in flips {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            bytes.truncate(cut.index(bytes.len()) + 1);
            let mut reader = crate::tarball::TarReader::new(bytes.as_slice());
            let mut read = 0u64;
            while let Ok(Some(_)) = reader.next_entry() {
                let mut buffer = [0; 4096];
                while let Ok(n) = std::io::Read::read(&mut reader, &mut buffer) {
                    read += n as u64;
                    if n == 0 || read > 1 << 24 {
                        break;
                    }
                }
                if read > 1 << 24 {
                    break;
                }
            }
        }

        /// Whatever is done to a manifest or an index, it is decoded or refused, without a panic.
        #[test]
        fn stored_forms(bytes in prop::collection::vec(any::<u8>(), 0..300), flip in any::<prop::sample::Index>(), bit in 0..8u8) {
            let _ = crate::manifest::Manifest::decode(&bytes);
            let _ = crate::index::Index::decode(&bytes);
            let _ = crate::erofs_read::ErofsImage::open(&bytes).and_then(|image| image.root());
            let mut good = crate::index::Index::default().encode().unwrap();
            let at = flip.index(good.len());
            good[at] ^= 1 << bit;
            let _ = crate::index::Index::decode(&good);
        }
    }
}

/// Set for the process in which the corpus is refused alone.
const ALONE: &str = "VOLLEY_HOSTILE_ALONE";

/// What FAULTS I5 asks for: 64 MiB and ten seconds for all of it. In a process of its own, for memory is a process's; its
/// peak is what the kernel says of it, code and all.
#[test]
fn the_corpus_takes_little_memory_and_time() {
    if std::env::var_os(ALONE).is_some() {
        return;
    }
    let started = Instant::now();
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--test-threads", "1", "--exact", "--nocapture"]);
    for name in ["the_corpus_is_refused_by_rule", "whiteouts_follow_the_same_rules", "the_peak"] {
        command.arg(format!("tests::hostile::{name}"));
    }
    let done = command.env(ALONE, "1").output().unwrap();
    let took = started.elapsed();
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{said}");
    let peak = said.split("peak_kib=").nth(1).and_then(|rest| rest.split_whitespace().next());
    let peak_kib: u64 = peak.unwrap().parse().unwrap();
    println!("the corpus was refused in {took:?} and {peak_kib} KiB");
    assert!(peak_kib < 64 << 10, "{peak_kib} KiB");
    assert!(took < Duration::from_secs(10), "{took:?}");
}

/// Says the process's peak; named to run last of those above.
#[test]
fn the_peak() {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    println!("peak_kib={kib}");
    assert!(kib > 0);
}
