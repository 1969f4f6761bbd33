//! The caller's terminal while a process of a sandbox has it: raw mode, its size, its input.
//!
//! Raw mode ends when [`Raw`] is dropped, on every way out. Input is read on a thread of its own, since a read of
//! a terminal cannot be given up; the thread ends with the process. Left out: detach keys; a second terminal can
//! `volley attach` at any time, and closing this one ends just the attachment.

use std::io::{IsTerminal as _, Read as _, stdin, stdout};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::sync::mpsc;

use crate::failure::Failure;

/// Bytes of input read at a time.
const INPUT_BYTES: usize = 16 * 1024;

/// The terminal in raw mode, until dropped.
pub(crate) struct Raw {
    before: Termios,
}

impl Raw {
    /// Switches the terminal at standard input to raw mode; `None` where there is none.
    pub(crate) fn enter() -> Result<Option<Self>, Failure> {
        if !stdin().is_terminal() {
            return Ok(None);
        }
        let fail = |error: rustix::io::Errno| Failure::io("terminal", &error.into());
        let before = tcgetattr(stdin()).map_err(fail)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &raw).map_err(fail)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Nothing can be done about a terminal that went away.
        let _ = tcsetattr(stdin(), OptionalActions::Drain, &self.before);
    }
}

/// Rows and columns of the terminal, or the classic ones where there is none.
pub(crate) fn size() -> (u16, u16) {
    let size = tcgetwinsize(stdout()).or_else(|_| tcgetwinsize(stdin()));
    size.map_or((24, 80), |size| (size.ws_row.max(1), size.ws_col.max(1)))
}

/// Standard input, piece by piece, until its end.
pub(crate) fn input() -> mpsc::Receiver<Vec<u8>> {
    let (to, from) = mpsc::channel(4);
    std::thread::spawn(move || {
        let mut buffer = vec![0; INPUT_BYTES];
        let mut stdin = stdin().lock();
        loop {
            match stdin.read(&mut buffer) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return,
                Ok(read) => {
                    if to.blocking_send(buffer[..read].to_vec()).is_err() {
                        return;
                    }
                }
            }
        }
    });
    from
}
