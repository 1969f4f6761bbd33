//! The runtime of a host's thread: tokio-uring where io_uring works, else tokio's own, both single-threaded.
//!
//! This module alone knows of tokio-uring. Sockets go through tokio's readiness in both cases (quinn drives them);
//! what io_uring adds is file reads without a thread pool. Left out: work over several threads, which hosts get by
//! being dealt over threads.

use std::{cell::Cell, future::Future, io, os::fd::OwnedFd, os::unix::fs::FileExt};

use bytes::Bytes;
use tokio::task::{JoinHandle, LocalSet};

use crate::config::Engine;

/// Which runtime works here.
///
/// # Errors
/// When io_uring was asked for by name and does not work: why not.
pub(crate) fn probe(wanted: Engine) -> io::Result<Engine> {
    match wanted {
        Engine::Tokio => Ok(Engine::Tokio),
        Engine::TokioUring => try_uring().map(|()| Engine::TokioUring),
        Engine::Auto => match try_uring() {
            Ok(()) => Ok(Engine::TokioUring),
            Err(error) => {
                tracing::warn!(%error, "io_uring does not work here: running on plain tokio");
                Ok(Engine::Tokio)
            }
        },
    }
}

/// Sets a ring up and sends one operation through it: kernels and sandboxes refuse either.
fn try_uring() -> io::Result<()> {
    let runtime = tokio_uring::Runtime::new(&tokio_uring::builder())?;
    runtime.block_on(async { tokio_uring::no_op().await })
}

/// Runs a host's thread to its end.
///
/// # Errors
/// When no runtime can be built: out of descriptors or memory.
pub(crate) fn block_on<F: Future>(engine: Engine, future: F) -> io::Result<F::Output> {
    ENGINE.set(engine);
    if engine == Engine::TokioUring {
        return Ok(tokio_uring::Runtime::new(&tokio_uring::builder())?.block_on(future));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(LocalSet::new().block_on(&runtime, future))
}

thread_local! {
    /// What drives this thread, for files: they know no readiness.
    static ENGINE: Cell<Engine> = const { Cell::new(Engine::Tokio) };
}

/// Bytes of one read of a file.
const FILE_BYTES: usize = 128 * 1024;

enum AnyFile {
    Uring(tokio_uring::fs::File),
    Plain(std::sync::Arc<std::fs::File>),
}

impl AnyFile {
    fn new(fd: OwnedFd) -> Self {
        let file = std::fs::File::from(fd);
        match ENGINE.get() {
            Engine::TokioUring => Self::Uring(tokio_uring::fs::File::from_std(file)),
            Engine::Auto | Engine::Tokio => Self::Plain(std::sync::Arc::new(file)),
        }
    }
}

/// Reads a regular file from its beginning, without blocking the thread.
pub(crate) struct FileReader {
    file: AnyFile,
    at: u64,
}

impl FileReader {
    /// Takes over a file that is open for reading.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self { file: AnyFile::new(fd), at: 0 }
    }

    /// The next bytes; empty at the end.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) async fn next(&mut self) -> io::Result<Bytes> {
        let buffer = vec![0; FILE_BYTES];
        let (read, mut buffer) = match &self.file {
            AnyFile::Uring(file) => file.read_at(buffer, self.at).await,
            AnyFile::Plain(file) => {
                let (file, at) = (std::sync::Arc::clone(file), self.at);
                let read = tokio::task::spawn_blocking(move || {
                    let mut buffer = buffer;
                    (file.read_at(&mut buffer, at), buffer)
                });
                read.await.map_err(io::Error::other)?
            }
        };
        let len = read?;
        self.at += len as u64;
        buffer.truncate(len);
        Ok(buffer.into())
    }
}

/// Writes a regular file from its beginning, without blocking the thread.
pub(crate) struct FileWriter {
    file: AnyFile,
    at: u64,
}

impl FileWriter {
    /// Takes over a file that is open for writing.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self { file: AnyFile::new(fd), at: 0 }
    }

    /// Writes all of `bytes` behind what was written.
    ///
    /// # Errors
    /// What the kernel says, a full disk before all.
    pub(crate) async fn write(&mut self, bytes: Bytes) -> io::Result<()> {
        let len = bytes.len() as u64;
        match &self.file {
            AnyFile::Uring(file) => {
                let mut rest = bytes.to_vec();
                let mut at = self.at;
                while !rest.is_empty() {
                    let (wrote, back) = file.write_at(rest, at).submit().await;
                    let wrote = wrote?;
                    at += wrote as u64;
                    rest = back.get(wrote..).unwrap_or_default().to_vec();
                }
            }
            AnyFile::Plain(file) => {
                let (file, at) = (std::sync::Arc::clone(file), self.at);
                let write = tokio::task::spawn_blocking(move || file.write_all_at(&bytes, at));
                write.await.map_err(io::Error::other)??;
            }
        }
        self.at += len;
        Ok(())
    }
}

/// Starts a task on this thread.
pub(crate) fn spawn<F: Future + 'static>(future: F) -> JoinHandle<F::Output>
where
    F::Output: 'static,
{
    tokio::task::spawn_local(future)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_finds_a_runtime_that_runs_tasks() {
        let engine = probe(Engine::Auto).unwrap();
        if engine == Engine::Tokio {
            println!("skipped: the io_uring half, which this kernel refuses");
        }
        for engine in [engine, Engine::Tokio] {
            let answer = block_on(engine, async {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                spawn(async { 41 }).await.unwrap() + 1
            });
            assert_eq!(answer.unwrap(), 42);
        }
    }
}
