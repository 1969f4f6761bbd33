//! Reading and writing the files of an identity: private ones with mode 0600, all of them whole or not at all.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

use wire::{Code, Fault};

/// Who may read a file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Private,
    Public,
}

/// Writes a file beside its place, makes it durable, and renames it there.
pub(super) fn write(dir: &Path, name: &str, bytes: &[u8], mode: Mode) -> Result<(), Fault> {
    let place = dir.join(name);
    let beside = dir.join(format!(".{name}.new"));
    let done = (|| -> io::Result<()> {
        fs::create_dir_all(dir)?;
        let _ = fs::remove_file(&beside);
        let bits = if mode == Mode::Private { 0o600 } else { 0o644 };
        let mut file =
            fs::OpenOptions::new().write(true).create_new(true).mode(bits).open(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, &place)?;
        fs::File::open(dir)?.sync_all()
    })();
    done.map_err(|error| {
        let _ = fs::remove_file(&beside);
        Fault::new(Code::Config, format!("{} cannot be written: {error}", place.display()))
    })
}

/// Reads a file; a private one must not be readable by others.
pub(super) fn read(dir: &Path, name: &str, mode: Mode) -> Result<Vec<u8>, Fault> {
    let place = dir.join(name);
    let fault = |error: io::Error| {
        Fault::new(Code::Config, format!("{} cannot be read: {error}", place.display()))
    };
    if mode == Mode::Private {
        let bits = fs::metadata(&place).map_err(fault)?.permissions().mode() & 0o777;
        if bits & 0o077 != 0 {
            return Err(Fault::new(
                Code::Config,
                format!(
                    "{} has mode {bits:04o}, so that others can read a private key: chmod 600 it",
                    place.display()
                ),
            ));
        }
    }
    fs::read(&place).map_err(fault)
}

pub(super) fn broken(dir: &Path, name: &str, why: impl std::fmt::Display) -> Fault {
    Fault::new(Code::Config, format!("{} is broken: {why}", dir.join(name).display()))
}

/// Lower-case hex of a secret.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Reads a line `epoch hex`, as `fleet.key` and `beat.key` hold them.
pub(super) fn parse_key_line(line: &str) -> Option<(u32, [u8; 32])> {
    let (epoch, key) = line.trim().split_once(' ')?;
    let key = blake3::Hash::from_hex(key.trim()).ok()?;
    Some((epoch.parse().ok()?, *key.as_bytes()))
}

/// Base64 of RFC 7468, 64 characters a line.
pub(super) fn pem(label: &str, der: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in der.chunks(48) {
        for group in line.chunks(3) {
            let byte = |at: usize| u32::from(group.get(at).copied().unwrap_or(0));
            let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
            for digit in 0..4 {
                let at = (bits >> (18 - 6 * digit) & 63) as usize;
                text.push(if digit <= group.len() { DIGITS[at] as char } else { '=' });
            }
        }
        text.push('\n');
    }
    text + "-----END " + label + "-----\n"
}
