//! What prepare refuses, by rule: hostile or broken input is turned away with the rule's name and the entry's.
//!
//! A refusal is an answer about the input, not a fault of ours: trying again gives the same. That is why it is a type of
//! its own inside [`PrepareError`].

use std::fmt;
use std::io;

/// The rules. Their names are stable: scripts and tests look at them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Rule {
    /// A path with a `..` component.
    DotDot,
    /// A path that begins with `/`.
    Absolute,
    /// A path, whiteout or hardlink whose ancestor is a symlink.
    ThroughSymlink,
    /// A path whose ancestor is there and is no directory.
    ThroughFile,
    /// The same path twice in one layer.
    Duplicate,
    /// A path, name or depth beyond what Linux takes; an empty name; a NUL.
    Path,
    /// A header that says one size and an extension that says another.
    SizeMismatch,
    /// A tar that breaks off, has a wrong checksum, or a field that is no number.
    BrokenTar,
    /// A PAX or GNU extension record that is broken or too long.
    BrokenRecord,
    /// A sparse map whose pieces overlap, pass the end, are too many, or of an unknown version.
    Sparse,
    /// A hardlink to nothing, to a directory or to itself.
    Hardlink,
    /// A whiteout without a name.
    Whiteout,
    /// More or longer extended attributes than a file can have.
    Xattr,
    /// An entry of a kind that is not a file system's.
    Kind,
    /// More entries than allowed.
    TooManyEntries,
    /// More bytes than allowed.
    TooLarge,
    /// Compressed data that grows beyond every honest ratio.
    Ratio,
    /// Compressed data that breaks off or does not decode.
    BrokenCompression,
    /// Bytes whose digest is not the one that names them.
    Digest,
    /// An image for another processor or system.
    Architecture,
    /// OCI or Docker JSON that is broken, too long, or lacks what is needed.
    Layout,
}

impl Rule {
    /// The rule's stable name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::DotDot => "dot-dot",
            Self::Absolute => "absolute-path",
            Self::ThroughSymlink => "through-symlink",
            Self::ThroughFile => "through-file",
            Self::Duplicate => "duplicate-entry",
            Self::Path => "path",
            Self::SizeMismatch => "size-mismatch",
            Self::BrokenTar => "broken-tar",
            Self::BrokenRecord => "broken-record",
            Self::Sparse => "sparse",
            Self::Hardlink => "hardlink",
            Self::Whiteout => "whiteout",
            Self::Xattr => "xattr",
            Self::Kind => "entry-kind",
            Self::TooManyEntries => "too-many-entries",
            Self::TooLarge => "too-large",
            Self::Ratio => "compression-ratio",
            Self::BrokenCompression => "broken-compression",
            Self::Digest => "digest-mismatch",
            Self::Architecture => "architecture",
            Self::Layout => "layout",
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One input turned away.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("refused by rule {rule}: {what}{}; nothing was published", entry_suffix(.entry))]
pub struct Refusal {
    /// Which rule.
    pub rule: Rule,
    /// Which entry or blob, escaped for printing; empty when none in particular.
    pub entry: String,
    /// What it was.
    pub what: String,
}

fn entry_suffix(entry: &str) -> String {
    if entry.is_empty() { String::new() } else { format!(" (entry {entry})") }
}

impl Refusal {
    pub(crate) fn new(rule: Rule, entry: &[u8], what: impl Into<String>) -> Self {
        let mut entry = entry.escape_ascii().to_string();
        // A hostile name is not printed at any length; what is left is ASCII, so that every index is a boundary.
        if entry.len() > 256 {
            entry.truncate(256);
            entry.push_str("...");
        }
        Self { rule, entry, what: what.into() }
    }
}

/// Why nothing was prepared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrepareError {
    /// The input was turned away.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// There is no such source.
    #[error(
        "no image source at {0:?}; give an OCI layout directory, a docker save archive, a rootfs tar or directory, or a registry reference"
    )]
    NoSource(String),
    /// A name that is none.
    #[error(transparent)]
    Name(#[from] crate::NameError),
    /// The source could not be read.
    #[error("could not read {what}: {source}; nothing was published, try again")]
    Read {
        /// What was being read.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The registry did not give it.
    #[error("registry: {0}; nothing was published")]
    Registry(String),
    /// The object store failed.
    #[error(
        "object store: {0}; the image is not published, preparing again uploads only what is missing"
    )]
    Store(#[from] object_store::Error),
    /// The prepare was stopped.
    #[error("stopped before the image was published; preparing again uploads only what is missing")]
    Stopped,
    /// The image does not fit into the format.
    #[error("too large for the format: {0}")]
    Format(String),
}

impl PrepareError {
    pub(crate) fn read(what: impl Into<String>, source: io::Error) -> Self {
        // The readers beneath say a refusal through `io::Error`, for that is what `Read` can return.
        match source.downcast::<Refusal>() {
            Ok(refusal) => Self::Refused(refusal),
            Err(source) => Self::Read { what: what.into(), source },
        }
    }

    /// The rule by which the input was refused, if it was.
    #[must_use]
    pub fn rule(&self) -> Option<Rule> {
        match self {
            Self::Refused(refusal) => Some(refusal.rule),
            _ => None,
        }
    }
}

impl From<Refusal> for io::Error {
    fn from(refusal: Refusal) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, refusal)
    }
}
