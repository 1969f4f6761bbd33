//! Watching a file or directory: inotify events of a box, told as records on a pipe.
//!
//! A record is one byte for the kind (see [`crate::FileOp::Watch`]), the name, and a zero byte. The
//! watcher is a child of the box's init and ends when the reader closes, when what it watches is
//! gone, or with the box. Left out: directories beneath.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};

/// A watch that is set up: changes from here on are told.
pub(super) struct Watch {
    events: OwnedFd,
    told: OwnedFd,
}

/// Begins; returns the reader's end too.
pub(super) fn begin(path: &std::path::Path) -> io::Result<(Watch, OwnedFd)> {
    let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    let wanted = WatchFlags::CREATE
        | WatchFlags::DELETE
        | WatchFlags::MODIFY
        | WatchFlags::ATTRIB
        | WatchFlags::MOVE
        | WatchFlags::DELETE_SELF
        | WatchFlags::MOVE_SELF;
    inotify::add_watch(&events, path, wanted)?;
    let (reader, told) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    Ok((Watch { events, told }, reader))
}

fn kind_of(flags: ReadFlags) -> u8 {
    let kinds = [
        (ReadFlags::QUEUE_OVERFLOW, b'o'),
        (ReadFlags::CREATE, b'c'),
        (ReadFlags::MODIFY, b'm'),
        (ReadFlags::ATTRIB, b'a'),
        (ReadFlags::MOVED_FROM, b'f'),
        (ReadFlags::MOVED_TO, b't'),
        (ReadFlags::MOVE_SELF, b'f'),
    ];
    kinds.iter().find(|(flag, _)| flags.contains(*flag)).map_or(b'd', |(_, kind)| *kind)
}

impl Watch {
    /// Tells changes until there is nobody to tell or nothing to watch. A reader that is slow makes this
    /// wait, and the kernel's bounded queue overflow, which is told.
    pub(super) fn run(self) {
        // This child of init needs nothing but these two; its parent's would keep pipes open.
        let keep = [self.events.as_raw_fd(), self.told.as_raw_fd()];
        close_all_but(keep);
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        loop {
            let mut ready = [
                PollFd::from_borrowed_fd(self.events.as_fd(), PollFlags::IN),
                // Wants nothing: told of the error that a closed reader is.
                PollFd::from_borrowed_fd(self.told.as_fd(), PollFlags::empty()),
            ];
            if poll(&mut ready, None).is_err() || !ready[1].revents().is_empty() {
                return;
            }
            let mut reader = inotify::Reader::new(&self.events, &mut buffer);
            loop {
                let event = match reader.next() {
                    Ok(event) => event,
                    Err(rustix::io::Errno::AGAIN) => break,
                    Err(_) => return,
                };
                if event.events().contains(ReadFlags::IGNORED) {
                    return;
                }
                let name = event.file_name().map_or(&b""[..], std::ffi::CStr::to_bytes);
                let record = [&[kind_of(event.events())][..], name, &[0]].concat();
                // Shorter than PIPE_BUF: whole or not at all.
                if rustix::io::write(&self.told, &record).is_err() {
                    return;
                }
            }
        }
    }
}

fn close_all_but(mut keep: [i32; 2]) {
    keep.sort_unstable();
    let mut first = 3;
    for fd in keep {
        if fd > first {
            // SAFETY: takes no pointer. What is closed belongs to values of init's that this child never
            // uses or drops: it leaves through `_exit`.
            unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) };
        }
        first = fd + 1;
    }
    let _ = crate::sys::close_from(first.unsigned_abs());
}
