//! The images that are compared: one program, in ever larger surroundings.
//!
//! The program is this machine's Python with the modules that it imports, some ten megabytes. Around it lie nothing, two
//! gigabytes in 59,000 files, a sparse file of 20 GB, or a million small files. Left out: real packages; the script
//! `bench/images/python-large.sh` makes an image of those.

use std::{
    fs, io,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use wire::{Code, Fault};

/// What is run: it imports a good part of the standard library, and says so.
pub(super) const PROGRAM: &str = "import asyncio, json, email.mime.text, xml.etree.ElementTree, decimal, argparse, \
    logging.config, concurrent.futures, unittest, csv, tarfile, zipfile, http.client, difflib, dataclasses; print('ready')";

/// What is run in the smallest image: a dozen starts of a static shell's own tools, and a look at what lies there.
pub(super) const SHELL_PROGRAM: &str = "for n in 0 1 2 3; do a=$(/bin/busybox cat /share/$n | /bin/busybox wc -c); \
    b=$(/bin/busybox md5sum /share/$n); done; c=$(/bin/busybox ls -l /share); echo ready";

/// Files beside the shell, and their bytes: with it, ten megabytes.
const SHARED: (u64, usize) = (64, 120 << 10);

/// Lays out a userland of a static shell at `root`; `None` where this machine has none.
pub(super) fn userland(root: &Path) -> Result<Option<()>, Fault> {
    let fault = |error| io_fault("the small userland", &error);
    let shell = ["/bin/busybox", "/usr/bin/busybox"].into_iter().map(Path::new);
    // One that needs libraries does not run here, nor in a root of its own.
    let is_static = |path: &&Path| {
        let told = Command::new("ldd").arg(path).output();
        path.exists()
            && told.is_ok_and(|told| !String::from_utf8_lossy(&told.stdout).contains("=>"))
    };
    let Some(shell) = { shell }.find(is_static) else { return Ok(None) };
    fs::create_dir_all(root.join("bin")).map_err(fault)?;
    fs::create_dir_all(root.join("share")).map_err(fault)?;
    fs::copy(shell, root.join("bin/busybox")).map_err(fault)?;
    for n in 0..SHARED.0 {
        fs::write(root.join(format!("share/{n}")), bytes_of(n, SHARED.1)).map_err(fault)?;
    }
    Ok(Some(()))
}

const LAY_OUT: &str = include_str!("program.py");

/// Files of the large image, as many as a real one of a gigabyte and a half had.
const LARGE_FILES: u64 = 59_000;

pub(super) fn io_fault(what: &str, error: &io::Error) -> Fault {
    Fault::new(Code::Internal, format!("{what}: {error}"))
}

/// Lays out the program at `root`; gives the interpreter's path in it.
pub(super) fn program(root: &Path) -> Result<PathBuf, Fault> {
    let python = ["/usr/bin/python3", "python3"];
    let mut last = String::new();
    for python in python {
        let done = Command::new(python)
            .args(["-I", "-S", "-c", LAY_OUT])
            .arg(root)
            .arg(PROGRAM)
            .stdin(Stdio::null())
            .output();
        match done {
            Ok(done) if done.status.success() => {
                let path = String::from_utf8_lossy(&done.stdout).trim().to_owned();
                return Ok(PathBuf::from(path));
            }
            Ok(done) => last = String::from_utf8_lossy(&done.stderr).into_owned(),
            Err(error) => last = error.to_string(),
        }
    }
    Err(Fault::new(Code::Unsupported, format!("this machine has no Python to run: {last}")))
}

/// Bytes of which two thirds compress, as in real images.
pub(super) fn bytes_of(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for (n, piece) in out.chunks_mut(8).enumerate() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Pages of noise, of text, of text.
        let word = if n / 512 % 3 == 0 { state } else { 0x2020_6f6c_6c65_6820 ^ (state & 0xff) };
        piece.copy_from_slice(&word.to_le_bytes()[..piece.len()]);
    }
    out
}

/// Adds files until there are about `bytes`.
pub(super) fn pad(root: &Path, bytes: u64) -> Result<u64, Fault> {
    let fault = |error| io_fault("the large image", &error);
    let len_of = |n: u64| match n % 100 {
        // Mostly small, some libraries.
        0 => 40 * bytes / LARGE_FILES,
        n => bytes * n / LARGE_FILES / 83,
    };
    for n in 0..LARGE_FILES {
        let dir = root.join(format!("data/{}", n % 512));
        if n < 512 {
            fs::create_dir_all(&dir).map_err(fault)?;
        }
        let len = usize::try_from(len_of(n)).unwrap_or(usize::MAX);
        fs::write(dir.join(n.to_string()), bytes_of(n, len)).map_err(fault)?;
    }
    Ok((0..LARGE_FILES).map(len_of).sum())
}

/// A tar of a tree and of so many small files behind it: a million files need not be made to be prepared.
pub(super) fn many(path: &Path, program: &Path, files: u64) -> Result<(), Fault> {
    let fault = |error| io_fault("the image of many files", &error);
    let file = fs::File::create(path).map_err(fault)?;
    let mut out = tar::Builder::new(io::BufWriter::new(file));
    out.append_dir_all(".", program).map_err(fault)?;
    for n in 0..files {
        let text = format!("file {n}");
        let mut header = tar::Header::new_ustar();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        let name = format!("many/{}/{n}", n / 1000);
        out.append_data(&mut header, name, text.as_bytes()).map_err(fault)?;
    }
    out.into_inner().and_then(|mut out| out.flush()).map_err(fault)
}

/// Bytes and files of a tree, holes counted in full.
pub(super) fn measure(root: &Path) -> (u64, u64) {
    let (mut bytes, mut files) = (0, 0);
    let mut left = vec![root.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            files += 1;
            if meta.is_dir() {
                left.push(entry.path());
            } else {
                bytes += meta.len();
            }
        }
    }
    (bytes, files)
}
