//! Where an image comes from, and how that is told from what a user typed.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::layer::Packing;
use crate::refuse::PrepareError;
use crate::tarball::TarReader;

/// A source of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A directory in OCI layout: `index.json` and `blobs/`.
    OciLayout(PathBuf),
    /// What `docker save`, `podman save` or `skopeo copy ... oci-archive:` wrote, packed or not.
    Archive(PathBuf),
    /// A root file system as one tar, packed or not.
    RootfsTar(PathBuf),
    /// A root file system as a directory.
    RootfsDir(PathBuf),
    /// A reference in a registry.
    Registry(String),
}

impl Source {
    /// Tells what was meant. A prefix settles it: `oci:`, `archive:`, `tar:`, `dir:`, `docker://`. Without one, a path
    /// that exists is looked at, and anything else is taken for a registry reference if it can be one.
    ///
    /// # Errors
    /// [`PrepareError::NoSource`] when it is nothing, [`PrepareError::Read`] when it cannot be looked at.
    pub fn detect(text: &str) -> Result<Self, PrepareError> {
        if let Some(reference) = text.strip_prefix("docker://") {
            return Ok(Self::Registry(reference.to_owned()));
        }
        type Make = fn(PathBuf) -> Source;
        let made: [(&str, Make); 4] = [
            ("oci:", Self::OciLayout),
            ("archive:", Self::Archive),
            ("tar:", Self::RootfsTar),
            ("dir:", Self::RootfsDir),
        ];
        for (prefix, make) in made {
            if let Some(path) = text.strip_prefix(prefix) {
                let path = PathBuf::from(path);
                return if path.exists() { Ok(make(path)) } else { Err(no_source(text)) };
            }
        }
        let path = Path::new(text);
        match path.metadata() {
            Ok(meta) if meta.is_dir() => {
                let layout = path.join("index.json").is_file() && path.join("blobs").is_dir();
                let make = if layout { Self::OciLayout } else { Self::RootfsDir };
                Ok(make(path.to_owned()))
            }
            Ok(_) => detect_file(path).map_err(|e| PrepareError::read(text, e)),
            Err(_) if looks_like_reference(text) => Ok(Self::Registry(text.to_owned())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(no_source(text)),
            Err(e) => Err(PrepareError::read(text, e)),
        }
    }

    /// A name for an image that was given none: the file's or the reference's own.
    #[must_use]
    pub fn default_name(&self) -> Option<String> {
        let path = match self {
            Self::Registry(reference) => return Some(reference.clone()),
            Self::OciLayout(p) | Self::Archive(p) | Self::RootfsTar(p) | Self::RootfsDir(p) => p,
        };
        let name = path.file_name()?.to_str()?;
        let ends = [".tar.gz", ".tgz", ".tar.zst", ".tar"];
        let name = ends.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        crate::id::check_image_name(name).ok().map(|()| name.to_owned())
    }
}

fn no_source(text: &str) -> PrepareError {
    PrepareError::NoSource(text.to_owned())
}

fn looks_like_reference(text: &str) -> bool {
    let pathlike = text.starts_with(['/', '.', '~', '-']) || text.ends_with(".tar");
    !pathlike && text.parse::<oci_client::Reference>().is_ok()
}

/// Opens a file, unpacked on the way if it is packed.
pub(crate) fn open_unpacked(path: &Path) -> io::Result<Box<dyn Read>> {
    let mut file = File::open(path)?;
    let mut first = Vec::new();
    (&mut file).take(4).read_to_end(&mut first)?;
    let file = io::Cursor::new(first.clone()).chain(file);
    let buffered = io::BufReader::with_capacity(128 << 10, file);
    Ok(match Packing::of(&first) {
        Packing::None => Box::new(buffered),
        Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(buffered)),
        Packing::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(buffered)?),
    })
}

/// Names at the top that only archives of images have.
const OF_ARCHIVES: [&str; 5] =
    ["blobs", "oci-layout", "index.json", "manifest.json", "repositories"];
/// Names at the top that root file systems have and archives of images do not.
const OF_ROOTS: [&str; 18] = [
    "bin", "boot", "dev", "etc", "home", "lib", "lib32", "lib64", "media", "mnt", "opt", "proc",
    "root", "run", "sbin", "sys", "usr", "var",
];
/// Entries that are looked at: whoever has as many with none of those names is a root file system of a kind.
const ENTRIES_LOOKED_AT: usize = 4_096;

/// Tells an archive of an image from a root file system by the first name that only one of them has.
fn detect_file(path: &Path) -> io::Result<Source> {
    let mut reader = TarReader::new(open_unpacked(path)?);
    for _ in 0..ENTRIES_LOOKED_AT {
        let Some(entry) = reader.next_entry()? else { break };
        let name = String::from_utf8_lossy(&entry.path);
        let name = name.trim_start_matches("./").trim_end_matches('/');
        let head = name.split('/').next().unwrap_or_default();
        let stem = head.split('.').next().unwrap_or_default();
        let hex = stem.len() == 64 && stem.bytes().all(|b| b.is_ascii_hexdigit());
        if hex || OF_ARCHIVES.contains(&head) {
            return Ok(Source::Archive(path.to_owned()));
        }
        if OF_ROOTS.contains(&head) {
            break;
        }
    }
    Ok(Source::RootfsTar(path.to_owned()))
}
