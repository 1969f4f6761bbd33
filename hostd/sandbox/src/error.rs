//! What can go wrong, by what a caller does about it.
//!
//! Refused: nothing was touched, another host may do it. Failed: this host tried and undid it.
//! Unknown: the spawner vanished in between; ask again by id. The three never mix.

use rkyv::{Archive, Deserialize, Serialize};

/// Why a claim was turned away before anything was touched.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Every slot is taken, or none became ready in time.
    #[error("no box of shape {shape} is free; nothing was started; try another host")]
    NoBox {
        /// Shape asked for.
        shape: String,
    },
    /// No such shape here.
    #[error("shape {shape} is not configured on this host; nothing was started")]
    NoShape {
        /// Shape asked for.
        shape: String,
    },
    /// A box of this id is live already.
    #[error("a sandbox of this id is running; nothing new was started")]
    Exists,
    /// Arguments and environment are longer than a packet, or layers too many.
    #[error("{what} is over the limit of {limit}; nothing was started; make it smaller")]
    TooLarge {
        /// What is too large.
        what: String,
        /// The limit.
        limit: u64,
    },
    /// The spawner's queue is full.
    #[error("the spawner is behind; nothing was started; try again or another host")]
    Busy,
    /// The spawner is shutting down.
    #[error("the spawner is shutting down; nothing was started")]
    Stopping,
}

/// Why something that was tried did not work. Whatever was made for it is gone again.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The program, or the interpreter that it names, is not in the image.
    #[error(
        "program {program} (or its interpreter) was not found; check the command and the image"
    )]
    NotFound {
        /// As asked for.
        program: String,
    },
    /// The program may not be executed.
    #[error("program {program} is not executable by this user; check its mode")]
    NotExecutable {
        /// As asked for.
        program: String,
    },
    /// Not a program for this machine.
    #[error("program {program} has no format that this machine runs; check its architecture")]
    BadFormat {
        /// As asked for.
        program: String,
    },
    /// The user is not in the image's `/etc/passwd` or `/etc/group`.
    #[error("user {user} is not known in the image; use a number or add it")]
    NoSuchUser {
        /// As asked for.
        user: String,
    },
    /// No live sandbox of this id.
    #[error("no sandbox of this id is running")]
    NoSandbox,
    /// No such exec, or it has ended.
    #[error("no such program is running in the sandbox")]
    NoExec,
    /// The box died in the middle.
    #[error("the box died during {what}; it is gone")]
    BoxDied {
        /// What was being done.
        what: String,
    },
    /// A system call failed.
    #[error("{what}: {}; what was half made is undone", std::io::Error::from_raw_os_error(*errno))]
    Os {
        /// What was being done.
        what: String,
        /// The error number.
        errno: i32,
    },
    /// The sandbox is in a state that does not allow this.
    #[error("the sandbox is {state}; nothing was done")]
    WrongState {
        /// Its state.
        state: String,
    },
}

impl Fault {
    pub(crate) fn os(what: &str, error: &std::io::Error) -> Self {
        Self::Os { what: what.to_owned(), errno: error.raw_os_error().unwrap_or(libc::EIO) }
    }

    /// The error number that a file operation gave, where it is one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Os { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}

/// The outcome of a claim, or of any other call, that is not success.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// Nothing was touched.
    #[error("{0}")]
    Refused(#[from] Refusal),
    /// Tried, failed, undone.
    #[error("{0}")]
    Failed(#[from] Fault),
    /// The spawner went away before it answered.
    #[error("the spawner went away before it answered ({why}); its boxes die with it")]
    Unknown {
        /// How that showed.
        why: String,
    },
}

/// Why no spawner could be had.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Not root, or without the capabilities of root.
    #[error("sandboxes need root (CAP_SYS_ADMIN); nothing was started; run hostd as root")]
    NeedsRoot,
    /// The one before is ending, for longer than we waited.
    #[error("a spawner of this state directory is ending and does not end; look at its process")]
    Ending,
    /// The kernel lacks something.
    #[error("the spawner could not start: {0}")]
    Setup(String),
    /// A spawner of another version holds the state directory.
    #[error("a spawner of protocol {theirs} holds {state_dir}, this is {ours}; drain it first")]
    Version {
        /// The state directory.
        state_dir: String,
        /// Its version.
        theirs: u32,
        /// Ours.
        ours: u32,
    },
    /// A configuration that cannot work.
    #[error("sandbox configuration: {0}")]
    Config(String),
    /// Input or output.
    #[error("{what}: {error}")]
    Io {
        /// What was being done.
        what: String,
        /// The error.
        error: std::io::Error,
    },
}
