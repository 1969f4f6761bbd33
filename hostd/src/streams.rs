//! Calls that go on in frames after their answer: processes, files, ports (PROTOCOL 7.4, 7.5).

use std::rc::Rc;

use bytes::BytesMut;
use quinn::{RecvStream, SendStream};
use wire::{
    Code, Fault, SandboxId,
    call::{Answer, ExecRequest},
    frame::Kind,
};
use wire_net::stream::{self, StreamLost};

use crate::{
    calls::{Who, find, find_used},
    clock,
    host::{Backend, HostCell},
    note::Note,
    process::{Next, Process},
    real, runtime,
};

/// Where a reader attaches.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At {
    /// To which process.
    pub(crate) process: u32,
    /// Bytes already seen.
    pub(crate) offset: u64,
    /// Whether to wait for more.
    pub(crate) follow: bool,
}

/// One kind and a name of up to 255 bytes: a box whose watcher sends longer ones is not believed.
const WATCH_RECORD_BYTES_MAX: usize = 257;

/// What is left to answer: nothing, if the stream has had all that it gets.
type Served = Result<Option<Answer>, Fault>;

/// Starts another process and attaches to it.
pub(crate) async fn exec(
    cell: &Rc<HostCell>,
    who: &Who,
    request: ExecRequest,
    send: &mut SendStream,
    recv: &mut RecvStream,
) -> Served {
    let note = find_used(cell, who, request.sandbox)?;
    let process = real::exec(cell, &note, request).await?;
    let at = At { process: process.number, offset: 0, follow: true };
    follow(cell, &note, process, at, send, recv).await;
    Ok(None)
}

/// Attaches to a process.
pub(crate) async fn attach(
    cell: &Rc<HostCell>,
    who: &Who,
    id: SandboxId,
    at: At,
    send: &mut SendStream,
    recv: &mut RecvStream,
) -> Served {
    let note = find(cell, who, id)?;
    cell.core.borrow_mut().handle_used(clock::now_ms(), id.local);
    if matches!(cell.backend, Backend::None { .. }) {
        return attach_to_nothing(&note, at, send).await;
    }
    let process = note.processes.borrow().get(at.process);
    let process = process.ok_or_else(|| {
        Fault::new(Code::NotFound, format!("no process {} in this sandbox is known", at.process))
    })?;
    follow(cell, &note, process, at, send, recv).await;
    Ok(None)
}

/// A no-op sandbox says nothing and ends.
async fn attach_to_nothing(note: &Note, at: At, send: &mut SendStream) -> Served {
    let said = async {
        stream::answer(send, &Answer::Process(at.process)).await?;
        if at.follow {
            let exit = note.exit.wait().await;
            stream::write_frame(send, Kind::Exit, &exit.frame_bytes()).await?;
        }
        Ok::<(), StreamLost>(())
    };
    let _ = said.await;
    Ok(None)
}

async fn follow(
    cell: &Rc<HostCell>,
    note: &Rc<Note>,
    process: Rc<Process>,
    at: At,
    send: &mut SendStream,
    recv: &mut RecvStream,
) {
    if stream::answer(send, &Answer::Process(process.number)).await.is_err() {
        return;
    }
    let input = feed(cell, note, &process, recv);
    let output = show(&process, at, send);
    tokio::pin!(input, output);
    tokio::select! {
        _ = &mut output => {}
        // Input may end long before output does.
        () = &mut input => drop(output.await),
    }
}

/// Sends output, and at last the exit.
async fn show(process: &Rc<Process>, at: At, send: &mut SendStream) -> Result<(), StreamLost> {
    let mut offset = at.offset;
    let reader = at.follow.then(|| process.add_reader(offset));
    loop {
        let next = process.ring.borrow().at(offset);
        match next {
            Next::Lost(bytes) => {
                stream::write_frame(send, Kind::Lost, &bytes.to_le_bytes()).await?;
                offset += bytes;
            }
            Next::Chunk(kind, bytes) => {
                stream::write_frame(send, kind, &bytes).await?;
                offset += bytes.len() as u64;
            }
            Next::Nothing if process.is_over() || !at.follow => break,
            Next::Nothing => {
                tokio::select! {
                    () = process.more(offset) => {}
                    _ = send.stopped() => return Ok(()),
                }
            }
        }
        if let Some(reader) = &reader {
            reader.took(offset);
        }
    }
    if let Some(exit) = process.exit.get().filter(|_| process.is_over()) {
        stream::write_frame(send, Kind::Exit, &exit.frame_bytes()).await?;
    }
    Ok(())
}

/// Takes input, resizes and signals until the client sends no more.
async fn feed(cell: &Rc<HostCell>, note: &Rc<Note>, process: &Rc<Process>, recv: &mut RecvStream) {
    let mut scratch = BytesMut::new();
    while let Ok(Some((kind, payload))) = stream::read_frame(recv, &mut scratch).await {
        cell.core.borrow_mut().handle_used(clock::now_ms(), note.id.local);
        match (kind, &payload[..]) {
            (Kind::Stdin, bytes) => {
                if let Some(input) = process.input()
                    && input.write_all(bytes).await.is_err()
                {
                    process.close_input();
                }
            }
            (Kind::End, _) => real::end_input(cell, note, process).await,
            (Kind::Resize, &[r0, r1, c0, c1]) => {
                let (rows, cols) = (u16::from_le_bytes([r0, r1]), u16::from_le_bytes([c0, c1]));
                real::resize(process, rows, cols);
            }
            (Kind::Signal, &[signal]) => {
                if let Err(fault) = real::signal(cell, note, process.exec, signal).await {
                    tracing::debug!(%fault, "a signal was not sent");
                }
            }
            _ => return,
        }
    }
}

/// Sends a file.
pub(crate) async fn read_file(
    cell: &Rc<HostCell>,
    who: &Who,
    id: SandboxId,
    path: String,
    send: &mut SendStream,
) -> Served {
    let note = find_used(cell, who, id)?;
    let mut file = runtime::FileReader::new(real::open_read(cell, &note, path).await?);
    let said = async {
        stream::answer(send, &Answer::Done).await?;
        loop {
            match file.next().await {
                Ok(bytes) if bytes.is_empty() => break,
                Ok(bytes) => stream::write_frame(send, Kind::Data, &bytes).await?,
                Err(error) => {
                    // The reader must not take half of a file for all of it.
                    tracing::warn!(%error, "a file of a sandbox could not be read to its end");
                    let _ = send.reset(stream::BROKEN);
                    return Ok(());
                }
            }
        }
        stream::write_frame(send, Kind::End, &[]).await
    };
    let _: Result<(), StreamLost> = said.await;
    Ok(None)
}

/// Takes a file.
pub(crate) async fn write_file(
    cell: &Rc<HostCell>,
    who: &Who,
    id: SandboxId,
    path: String,
    mode: u32,
    recv: &mut RecvStream,
) -> Result<Answer, Fault> {
    let note = find_used(cell, who, id)?;
    let mut file = runtime::FileWriter::new(real::open_write(cell, &note, path, mode).await?);
    let mut scratch = BytesMut::new();
    loop {
        match stream::read_frame(recv, &mut scratch).await {
            Ok(Some((Kind::Data, bytes))) => file.write(bytes).await.map_err(|error| {
                real::os_fault("write the file; what was written before stays", &error)
            })?,
            Ok(Some((Kind::End, _))) => return Ok(Answer::Done),
            Ok(Some((kind, _))) => {
                let text = format!("a {kind:?} frame inside a file; what was written before stays");
                return Err(Fault::new(Code::BadRequest, text));
            }
            Ok(None) | Err(_) => {
                let text = "the file's end never came; what was written before stays";
                return Err(Fault::new(Code::BadRequest, text));
            }
        }
    }
}

/// Tells changes of files until there is nobody to tell, or nothing to watch (PROTOCOL 7.5).
pub(crate) async fn watch(
    cell: &Rc<HostCell>,
    who: &Who,
    id: SandboxId,
    path: String,
    send: &mut SendStream,
) -> Served {
    let note = find_used(cell, who, id)?;
    let told = real::watch(cell, &note, path).await?;
    let said = async {
        stream::answer(send, &Answer::Done).await?;
        // The box writes whole records, but a read may end within one.
        let mut begun = BytesMut::new();
        loop {
            let read = tokio::select! {
                read = told.read() => read,
                // Who closes the stream stops watching; the box's end notices by the pipe.
                _ = send.stopped() => return Ok(()),
            };
            match read {
                Ok(bytes) if !bytes.is_empty() => begun.extend_from_slice(&bytes),
                _ => break,
            }
            while let Some(end) = begun.iter().position(|byte| *byte == 0) {
                let record = begun.split_to(end + 1);
                stream::write_frame(send, Kind::Data, &record[..end]).await?;
            }
            if begun.len() > WATCH_RECORD_BYTES_MAX {
                break;
            }
        }
        stream::write_frame(send, Kind::End, &[]).await
    };
    let _: Result<(), StreamLost> = said.await;
    Ok(None)
}

/// Passes a TCP port's bytes both ways.
pub(crate) async fn port(
    cell: &Rc<HostCell>,
    who: &Who,
    id: SandboxId,
    port: u16,
    send: &mut SendStream,
    recv: &mut RecvStream,
) -> Served {
    let note = find_used(cell, who, id)?;
    let socket = real::connect(cell, &note, port).await?;
    let local = note.id.local;
    let used = || cell.core.borrow_mut().handle_used(clock::now_ms(), local);
    if stream::answer(send, &Answer::Done).await.is_err() {
        return Ok(None);
    }
    let outward = async {
        loop {
            match socket.read().await {
                Ok(bytes) if !bytes.is_empty() => {
                    used();
                    stream::write_frame(send, Kind::Data, &bytes).await?;
                }
                _ => break,
            }
        }
        stream::write_frame(send, Kind::End, &[]).await
    };
    let inward = async {
        let mut scratch = BytesMut::new();
        loop {
            match stream::read_frame(recv, &mut scratch).await {
                Ok(Some((Kind::Data, bytes))) => {
                    used();
                    if socket.write_all(&bytes).await.is_err() {
                        return;
                    }
                }
                Ok(Some((Kind::End, _))) => {
                    let _ = rustix::net::shutdown(socket.fd(), rustix::net::Shutdown::Write);
                    return;
                }
                // The client is gone: end both ways, so that the other half does not wait for ever.
                _ => {
                    let _ = rustix::net::shutdown(socket.fd(), rustix::net::Shutdown::Both);
                    return;
                }
            }
        }
    };
    let (_, ()): (Result<(), StreamLost>, ()) = futures::join!(outward, inward);
    Ok(None)
}
