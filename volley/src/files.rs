//! `cp`: files and directories into and out of a sandbox.
//!
//! A place in a sandbox is `sb-...:/path`; `-` is this program's own input or output. Files keep their modes; owners are
//! not kept, since ids inside are the sandbox's own. What comes out of a sandbox is not trusted: names that would leave
//! the target, links and devices are never made here. On the way in a link to a file is copied as that file.
//! Left out: other links and special files, which are named and passed over.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Component, Path, PathBuf},
};

use clap::Args;
use futures::{Stream, StreamExt as _};
use tokio::io::AsyncRead;
use tokio_util::bytes::Bytes;
use volley_client::{FileRecord, Sandbox, SandboxId};
use wire::Code;

use crate::{
    client::{ClientFlags, Session},
    failure::Failure,
    terminal,
};

/// Directories within directories that are followed.
const DEPTH_MAX: usize = 64;

/// Bytes of a file that are in memory at a time.
const PIECE_BYTES: usize = 256 * 1024;

const TYPE_MASK: u32 = 0o170_000;
const TYPE_DIR: u32 = 0o040_000;
const TYPE_FILE: u32 = 0o100_000;

/// Flags of `volley cp`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  volley cp ./input sb-...:/work/input
  volley cp sb-...:/work/result.txt .
  tar c src | volley cp - sb-...:/tmp/src.tar
  volley cp sb-...:/var/log/app.log - | grep error")]
pub(crate) struct CopyFlags {
    #[command(flatten)]
    client: ClientFlags,
    /// A path, SANDBOX:/PATH, or - for standard input.
    #[arg(value_parser = place)]
    from: Place,
    /// A path, SANDBOX:/PATH, or - for standard output.
    #[arg(value_parser = place)]
    to: Place,
}

/// This program's own input or output, as a path.
const OWN: &str = "-";

/// One end of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Here(PathBuf),
    Inside(SandboxId, String),
}

fn place(text: &str) -> Result<Place, String> {
    let Some((sandbox, path)) = text.split_once(':') else { return Ok(Place::Here(text.into())) };
    match sandbox.parse() {
        Ok(id) if path.starts_with('/') => Ok(Place::Inside(id, path.to_owned())),
        Ok(_) => Err("paths in a sandbox are absolute: SANDBOX:/PATH".to_owned()),
        Err(_) => Ok(Place::Here(text.into())),
    }
}

/// `volley cp`.
pub(crate) fn copy(flags: &CopyFlags) -> Result<(), Failure> {
    let session;
    match (&flags.from, &flags.to) {
        (Place::Here(from), Place::Inside(id, to)) => {
            session = Session::open(&flags.client)?;
            let sandbox = session.client().sandbox(*id);
            session.block(copy_in(&sandbox, from, to))
        }
        (Place::Inside(id, from), Place::Here(to)) => {
            session = Session::open(&flags.client)?;
            let sandbox = session.client().sandbox(*id);
            session.block(copy_out(&sandbox, from, to))
        }
        _ => Err(Failure::new(
            Code::BadRequest,
            "one end of a copy is in a sandbox, the other is not",
        )
        .hint("write SANDBOX:/PATH for the one inside")),
    }
}

async fn copy_in(sandbox: &Sandbox, from: &Path, to: &str) -> Result<(), Failure> {
    if from == Path::new(OWN) {
        let input = terminal::input();
        let pieces = futures::stream::unfold(input, |mut input| async {
            let piece = input.recv().await?;
            Some((Ok::<_, Failure>(Bytes::from(piece)), input))
        });
        return sandbox.write_file_stream(to, 0o644, pieces).await;
    }
    let inside = sandbox.stat(to).await.ok();
    let into =
        inside.is_some_and(|record| record.mode & TYPE_MASK == TYPE_DIR) || to.ends_with('/');
    let name = from.file_name().map(|name| name.to_string_lossy().into_owned());
    let target = match name {
        Some(name) if into => join(to, &name),
        _ => to.to_owned(),
    };
    let mut todo = vec![(from.to_owned(), target, 0)];
    while let Some((from, to, depth)) = todo.pop() {
        let fail = |error| Failure::io(from.display(), &error);
        let meta = fs::metadata(&from).map_err(fail)?;
        if meta.is_dir() {
            check_depth(depth, &from.display().to_string())?;
            sandbox.make_dir(&to).await?;
            for entry in fs::read_dir(&from).map_err(fail)? {
                let entry = entry.map_err(fail)?;
                let link = entry.file_type().map_err(fail)?.is_symlink();
                if link && !entry.path().is_file() {
                    let at = entry.path();
                    eprintln!("volley: {} is a link to no file; passed over", at.display());
                    continue;
                }
                let name = entry.file_name().to_string_lossy().into_owned();
                todo.push((entry.path(), join(&to, &name), depth + 1));
            }
        } else if meta.is_file() {
            let file = tokio::fs::File::open(&from).await.map_err(fail)?;
            let mode = meta.permissions().mode() & 0o7777;
            sandbox.write_file_stream(&to, mode, pieces(file, &from)).await?;
        } else if depth == 0 {
            return Err(special(&from.display().to_string()));
        } else {
            eprintln!("volley: {} is no file or directory; passed over", from.display());
        }
    }
    Ok(())
}

/// What was named itself and cannot be copied.
fn special(at: &str) -> Failure {
    Failure::new(Code::BadRequest, format!("{at} is no file or directory; nothing was copied"))
        .hint(
            "name a file or a directory; of a device or a pipe, copy what it gives: `volley exec`",
        )
}

/// A file, piece by piece.
fn pieces(file: impl AsyncRead + Unpin, from: &Path) -> impl Stream<Item = Result<Bytes, Failure>> {
    let read = tokio_util::io::ReaderStream::with_capacity(file, PIECE_BYTES);
    read.map(move |piece| piece.map_err(|error| Failure::io(from.display(), &error)))
}

async fn copy_out(sandbox: &Sandbox, from: &str, to: &Path) -> Result<(), Failure> {
    let record = sandbox.stat(from).await?;
    if to == Path::new(OWN) {
        return show(sandbox, from, &record).await;
    }
    let name = from.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let target = if to.is_dir() && is_plain(name) { to.join(name) } else { to.to_owned() };
    let mut todo = vec![(from.to_owned(), record, target, 0)];
    while let Some((from, record, to, depth)) = todo.pop() {
        match record.mode & TYPE_MASK {
            TYPE_DIR => {
                check_depth(depth, &from)?;
                fs::create_dir_all(&to).map_err(|error| Failure::io(to.display(), &error))?;
                for record in sandbox.list_dir(&from).await? {
                    if is_plain(&record.name) {
                        let (from, to) = (join(&from, &record.name), to.join(&record.name));
                        todo.push((from, record, to, depth + 1));
                    } else {
                        eprintln!("volley: {from}: an entry's name is no name; passed over");
                    }
                }
            }
            TYPE_FILE => read_to(sandbox, &from, &record, &to).await?,
            _ if depth == 0 => return Err(special(&from)),
            _ => eprintln!("volley: {from} is no file or directory; passed over"),
        }
    }
    Ok(())
}

/// Writes a file to standard output.
async fn show(sandbox: &Sandbox, from: &str, record: &FileRecord) -> Result<(), Failure> {
    if record.mode & TYPE_MASK != TYPE_FILE {
        return Err(Failure::new(Code::BadRequest, format!("{from} is no file"))
            .hint("copy a directory to a directory"));
    }
    let mut pieces = std::pin::pin!(sandbox.read_file_stream(from).await?);
    while let Some(piece) = pieces.next().await {
        match io::stdout().write_all(&piece?) {
            // As any program in a pipe whose reader went away.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(141),
            done => done.map_err(|error| Failure::io("output", &error))?,
        }
    }
    io::stdout().flush().map_err(|error| Failure::io("output", &error))
}

/// Writes beside the target and renames, so that a copy that breaks off leaves the old file.
async fn read_to(
    sandbox: &Sandbox,
    from: &str,
    record: &FileRecord,
    to: &Path,
) -> Result<(), Failure> {
    let fail = |error| Failure::io(to.display(), &error);
    let folder =
        to.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(fail)?;
    let mut pieces = std::pin::pin!(sandbox.read_file_stream(from).await?);
    while let Some(piece) = pieces.next().await {
        file.write_all(&piece?).map_err(fail)?;
    }
    // No set-id bits: what a sandbox marks is not run with anybody's rights here.
    let mode = fs::Permissions::from_mode(record.mode & 0o777);
    file.as_file().set_permissions(mode).map_err(fail)?;
    file.persist(to).map(drop).map_err(|error| fail(error.error))
}

fn check_depth(depth: usize, at: &str) -> Result<(), Failure> {
    if depth <= DEPTH_MAX {
        return Ok(());
    }
    Err(Failure::new(Code::BadRequest, format!("{at}: more than {DEPTH_MAX} directories deep")))
}

fn join(folder: &str, name: &str) -> String {
    format!("{}/{name}", folder.trim_end_matches('/'))
}

/// Whether a name from a sandbox is one component that stays where it is put.
fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_here_or_inside() {
        let id: SandboxId = format!("sb-{:032x}", 7).parse().expect("an id");
        assert_eq!(place(&format!("{id}:/a")), Ok(Place::Inside(id, "/a".to_owned())));
        assert!(place(&format!("{id}:a")).is_err());
        assert_eq!(place("./a:b"), Ok(Place::Here("./a:b".into())));
    }

    #[test]
    fn names_that_leave_their_place_are_not_plain() {
        for name in ["", ".", "..", "a/b", "/a", "a/", "../a"] {
            assert!(!is_plain(name), "{name}");
        }
        assert!(is_plain("a") && is_plain("..a"));
    }
}
