//! The image `shell`: this machine's own shell and core utilities, so that a first sandbox needs no network.
//!
//! Programs are copied with the libraries that `ldd` names, each at the path where the loader looks for it. The tree is
//! an ordinary root directory; preparing it is the image crate's part. Left out: anything that would need
//! configuration of the machine's (name service modules, locales).

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use wire::Code;

use crate::failure::Failure;

/// Programs that are copied where the machine has them. `sh` must be among them.
const PROGRAMS: &[&str] = &[
    "sh",
    "awk",
    "base64",
    "basename",
    "cat",
    "chmod",
    "chown",
    "cksum",
    "cp",
    "cut",
    "date",
    "dd",
    "df",
    "dirname",
    "du",
    "echo",
    "env",
    "expr",
    "false",
    "find",
    "grep",
    "head",
    "hostname",
    "id",
    "kill",
    "ln",
    "ls",
    "md5sum",
    "mkdir",
    "mknod",
    "mktemp",
    "mount",
    "mv",
    "nl",
    "nproc",
    "od",
    "paste",
    "printf",
    "ps",
    "pwd",
    "readlink",
    "realpath",
    "rm",
    "rmdir",
    "sed",
    "seq",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "stty",
    "sync",
    "tail",
    "tee",
    "test",
    "timeout",
    "touch",
    "tr",
    "true",
    "tty",
    "uname",
    "uniq",
    "unshare",
    "wc",
    "whoami",
    "xargs",
    "yes",
];

/// Where programs are looked for.
const FOLDERS: &[&str] = &["/bin", "/usr/bin", "/sbin", "/usr/sbin"];

/// Lays out the root directory at `root`, which must not exist. Returns the programs that are in it.
pub(super) fn lay_out(root: &Path) -> Result<Vec<String>, Failure> {
    let programs: Vec<_> = PROGRAMS.iter().filter_map(|name| Some((*name, find(name)?))).collect();
    if programs.first().is_none_or(|(name, _)| *name != "sh") {
        return Err(Failure::new(
            Code::Unsupported,
            "this machine has no `sh` to make an image of",
        ));
    }
    let fail = |error| Failure::io(root.display(), &error);
    for folder in ["bin", "etc", "root", "tmp", "proc", "sys", "dev", "usr", "var/tmp", "home"] {
        fs::create_dir_all(root.join(folder)).map_err(fail)?;
    }
    for folder in ["tmp", "var/tmp"] {
        let sticky = fs::Permissions::from_mode(0o1777);
        fs::set_permissions(root.join(folder), sticky).map_err(fail)?;
    }
    symlink("../bin", root.join("usr/bin")).map_err(fail)?;
    let passwd = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
    fs::write(root.join("etc/passwd"), passwd).map_err(fail)?;
    fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n").map_err(fail)?;

    let sources: Vec<_> = programs.iter().map(|(_, source)| source.as_path()).collect();
    for library in libraries(&sources)? {
        copy(&library, root)?;
    }
    for (name, source) in &programs {
        copy_to(source, &root.join("bin").join(name))?;
    }
    Ok(programs.into_iter().map(|(name, _)| name.to_owned()).collect())
}

fn find(name: &str) -> Option<PathBuf> {
    FOLDERS.iter().map(|folder| Path::new(folder).join(name)).find(|path| path.is_file())
}

/// All libraries of all programs, and the loader.
fn libraries(programs: &[&Path]) -> Result<BTreeSet<PathBuf>, Failure> {
    let output =
        Command::new("ldd").args(programs).env("LC_ALL", "C").output().map_err(|error| {
            Failure::io("cannot run `ldd`, which names a program's libraries", &error)
        })?;
    // Its status tells of static programs and scripts too, which need no library.
    Ok(parse_ldd(&String::from_utf8_lossy(&output.stdout)))
}

/// Paths out of `ldd`'s lines: `libc.so.6 => /lib/libc.so.6 (0x..)` and `/lib64/ld-linux-x86-64.so.2 (0x..)`.
fn parse_ldd(text: &str) -> BTreeSet<PathBuf> {
    text.lines()
        .filter(|line| line.starts_with(char::is_whitespace))
        .filter_map(|line| {
            let line = line.trim();
            let path = line.split_once(" => ").map_or(line, |(_, path)| path);
            let path = path.split(" (").next()?.trim();
            path.starts_with('/').then(|| PathBuf::from(path))
        })
        .collect()
}

/// Copies a file to the same path below `root`, following links.
fn copy(source: &Path, root: &Path) -> Result<(), Failure> {
    copy_to(source, &root.join(source.strip_prefix("/").unwrap_or(source)))
}

fn copy_to(source: &Path, target: &Path) -> Result<(), Failure> {
    let fail = |error| Failure::io(format!("{} -> {}", source.display(), target.display()), &error);
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent).map_err(fail)?;
    }
    fs::copy(source, target).map_err(fail)?;
    // No set-user-id programs: nothing in the image needs them.
    fs::set_permissions(target, fs::Permissions::from_mode(0o755)).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_names_libraries_and_the_loader() {
        let text = "/bin/sh:\n\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 \
                    (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n/bin/x:\n\tnot a dynamic executable\n\
                    \tlibmissing.so => not found\n";
        let paths: Vec<_> = parse_ldd(text).into_iter().collect();
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(paths, expected.map(PathBuf::from));
    }

    #[test]
    fn a_laid_out_root_runs_its_own_shell() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let root = scratch.path().join("root");
        let programs = lay_out(&root).expect("laid out");
        assert!(programs.iter().any(|name| name == "true"));
        if !rustix::process::geteuid().is_root() {
            println!("skipped: chroot needs root");
            return;
        }
        let run =
            Command::new("chroot").arg(&root).args(["/bin/sh", "-c", "id -u; ls /etc"]).output();
        let output = run.expect("chroot is there");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "0\ngroup\npasswd\n");
    }
}
