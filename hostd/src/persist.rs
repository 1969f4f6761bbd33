//! What a host must never forget: its incarnation and the seq numbers that it may have used (PROTOCOL 2.5, 2.6).
//!
//! One small text file, replaced whole: written beside, synced, renamed, directory synced. A lock file keeps two
//! daemons from one state directory. Left out: sandboxes, which are the journal's business.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use wire::{Code, Fault, HostId, Incarnation, Seq};

const FILE: &str = "host";
const LOCK: &str = "lock";

/// The state directory of a host, held by this process alone.
#[derive(Debug)]
pub(crate) struct Kept {
    dir: PathBuf,
    host: HostId,
    /// This start of the daemon.
    pub(crate) incarnation: Incarnation,
    /// Numbers below this may have been used.
    pub(crate) reserved: Seq,
    _lock: File,
}

fn storage(path: &Path, error: &io::Error) -> Fault {
    Fault::new(Code::Storage, format!("{}: {error}; nothing was changed", path.display()))
}

impl Kept {
    /// Locks the directory, reads what was kept, and begins a new incarnation.
    ///
    /// # Errors
    /// [`Code::Busy`] if another daemon has it, [`Code::Config`] if it is another host's, [`Code::Storage`].
    pub(crate) fn open(dir: &Path, host: HostId) -> Result<Self, Fault> {
        fs::create_dir_all(dir).map_err(|error| storage(dir, &error))?;
        let lock_path = dir.join(LOCK);
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(|error| storage(&lock_path, &error))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            let text = format!("{} is in use by another hostd; nothing was started", dir.display());
            Fault::new(Code::Busy, text)
        })?;
        let path = dir.join(FILE);
        let (incarnation, reserved) = match fs::read_to_string(&path) {
            Ok(text) => parse(&text, host, &path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => (Incarnation(0), Seq(1)),
            Err(error) => return Err(storage(&path, &error)),
        };
        let incarnation = Incarnation(incarnation.0 + 1);
        let mut kept = Self { dir: dir.to_owned(), host, incarnation, reserved, _lock: lock };
        kept.save(reserved)?;
        Ok(kept)
    }

    /// Reserves seq numbers below `to`.
    ///
    /// # Errors
    /// [`Code::Storage`]: nothing was reserved.
    pub(crate) fn reserve(&mut self, to: Seq) -> Result<(), Fault> {
        self.save(to)?;
        self.reserved = to;
        Ok(())
    }

    fn save(&mut self, reserved: Seq) -> Result<(), Fault> {
        let path = self.dir.join(FILE);
        let text =
            format!("host {}\nincarnation {}\nseq {}\n", self.host, self.incarnation.0, reserved.0);
        replace(&self.dir, &path, text.as_bytes()).map_err(|error| storage(&path, &error))
    }
}

fn replace(dir: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("new");
    let mut file = File::create(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    File::open(dir)?.sync_all()
}

fn parse(text: &str, host: HostId, path: &Path) -> Result<(Incarnation, Seq), Fault> {
    let field = |name: &str| {
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).map(str::trim)
    };
    let of = field("host").and_then(|id| id.parse::<HostId>().ok());
    if let Some(of) = of.filter(|of| *of != host) {
        let text = format!("{} is the state of {of}, not of {host}", path.display());
        return Err(Fault::new(Code::Config, text));
    }
    let number = |name: &str| field(name).and_then(|digits| digits.parse::<u64>().ok());
    match (of, number("incarnation"), number("seq")) {
        (Some(_), Some(incarnation), Some(seq)) => Ok((Incarnation(incarnation), Seq(seq))),
        _ => Err(Fault::new(
            Code::Storage,
            format!("{} is damaged: restore it, or give the host a new id", path.display()),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incarnations_rise_and_reservations_stay() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = Kept::open(dir.path(), HostId(1)).unwrap();
        assert_eq!((first.incarnation, first.reserved), (Incarnation(1), Seq(1)));
        first.reserve(Seq(500)).unwrap();
        assert_eq!(Kept::open(dir.path(), HostId(1)).unwrap_err().code, Code::Busy);
        drop(first);
        let second = Kept::open(dir.path(), HostId(1)).unwrap();
        assert_eq!((second.incarnation, second.reserved), (Incarnation(2), Seq(500)));
        drop(second);
        assert_eq!(Kept::open(dir.path(), HostId(2)).unwrap_err().code, Code::Config);
        fs::write(dir.path().join(FILE), "incarn").unwrap();
        assert_eq!(Kept::open(dir.path(), HostId(1)).unwrap_err().code, Code::Storage);
    }
}
