//! Calls: what is asked on a stream besides launches, and the answers.
//!
//! A stream opens with one call. A call that names a sandbox goes to that sandbox's host, so a placer reads
//! just the first frame and then passes bytes both ways. What streams (attach, logs, files, ports) goes on in
//! [`crate::frame`] frames after the answer.
//!
//! Longer than 500 lines: two lists, of what can be asked and of what is answered, which are read side by side.

#![expect(missing_docs, reason = "rkyv's derive makes undocumented types of variants with fields")]

use alloc::{string::String, vec::Vec};

use rkyv::{Archive, Deserialize, Serialize};

use crate::{
    capacity::CapacityWord,
    codec::{self, Malformed},
    fault::Fault,
    id::{HostId, LaunchId, SandboxId},
    limits::{CALL_BYTES_MAX, FRAME_BYTES_MAX},
    network::{Network, Published},
};

/// The process that a sandbox was launched with, among those that [`Call::Attach`] can name.
pub const MAIN_PROCESS: u32 = 0;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum Call {
    /// End a launch whose outcome is not known: kill it if it runs, and never start it later.
    Cancel {
        /// The launch.
        launch_id: LaunchId,
        /// The host that it was sent to.
        host: HostId,
    },
    /// What is known of one sandbox. Answer: [`Answer::Sandbox`].
    Inspect(SandboxId),
    /// Sandboxes, newest first. Answer: [`Answer::Sandboxes`].
    List {
        /// Those of this tenant; empty for all (operators only).
        tenant: String,
        /// Those that have all of these labels.
        labels: Vec<(String, String)>,
        /// Those that have ended as well, while they are remembered.
        ended: bool,
    },
    /// Start another process in a sandbox and attach to it. Answer: [`Answer::Process`], then frames.
    Exec(ExecRequest),
    /// Attach to a process. Answer: [`Answer::Process`], then frames.
    Attach {
        /// The sandbox.
        sandbox: SandboxId,
        /// [`MAIN_PROCESS`], or what an exec answered.
        process: u32,
        /// Output already seen, in bytes since the process's start.
        offset: u64,
        /// Wait for more output and for the exit; else just what there is.
        follow: bool,
    },
    /// Wait for a sandbox's end. Answer: [`Answer::Exited`].
    Wait(SandboxId),
    /// Send a signal to a process, or end the sandbox. Answer: [`Answer::Done`].
    Kill {
        /// The sandbox.
        sandbox: SandboxId,
        /// Signal number for the main process; zero ends the sandbox with all that is in it.
        signal: u8,
    },
    /// Freeze. Answer: [`Answer::Done`].
    Pause(SandboxId),
    /// Thaw. Answer: [`Answer::Done`].
    Resume(SandboxId),
    /// Set new timeouts, counted from now. Answer: [`Answer::Done`].
    Extend {
        /// The sandbox.
        sandbox: SandboxId,
        /// Milliseconds to live; zero keeps the old.
        hard_ms: u64,
        /// Idle milliseconds; zero keeps the old.
        idle_ms: u64,
    },
    /// What it uses. Answer: [`Answer::Stats`].
    Stats(SandboxId),
    /// Something with its files.
    File {
        /// The sandbox.
        sandbox: SandboxId,
        /// What.
        op: FileOp,
    },
    /// A TCP port inside. Answer: [`Answer::Done`], then [`crate::frame::Kind::Data`] frames both ways.
    Port {
        /// The sandbox.
        sandbox: SandboxId,
        /// The port, on its loopback.
        port: u16,
    },
    /// All hosts (operators). Answer: frames of [`Answer::Hosts`], ascending by host, then an end (PROTOCOL 7.8).
    Hosts,
    /// Quiesce a host (operators). Answer: [`Answer::Done`] once the flag is durable.
    Drain {
        /// The host.
        host: HostId,
        /// Milliseconds until what still runs is stopped; zero for never.
        deadline_ms: u64,
        /// For those who look later.
        message: String,
    },
    /// End a drain (operators). Answer: [`Answer::Done`].
    Undrain(HostId),
    /// Nothing: is anybody there? Answer: [`Answer::Done`].
    Ping,
    /// One host (operators). Answer: [`Answer::Hosts`] of one.
    Host(HostId),
    /// Sandboxes as their hosts last said them to aggregators, newest first: no host is asked. Answer:
    /// [`Answer::Listed`].
    ListRecorded {
        /// Those of this tenant. MUST NOT be empty.
        tenant: String,
        /// Those that have all of these labels.
        labels: Vec<(String, String)>,
        /// Those that have ended as well, while they are remembered.
        ended: bool,
    },
}

impl Call {
    /// The host that must answer, if just one can.
    #[must_use]
    pub const fn host(&self) -> Option<HostId> {
        match self {
            Self::Cancel { host, .. } => Some(*host),
            Self::Inspect(sandbox)
            | Self::Attach { sandbox, .. }
            | Self::Exec(ExecRequest { sandbox, .. })
            | Self::Wait(sandbox)
            | Self::Kill { sandbox, .. }
            | Self::Pause(sandbox)
            | Self::Resume(sandbox)
            | Self::Extend { sandbox, .. }
            | Self::Stats(sandbox)
            | Self::File { sandbox, .. }
            | Self::Port { sandbox, .. } => Some(sandbox.host),
            Self::List { .. }
            | Self::ListRecorded { .. }
            | Self::Hosts
            | Self::Drain { .. }
            | Self::Undrain(_)
            | Self::Host(_)
            | Self::Ping => None,
        }
    }

    /// The call's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        codec::write(self)
    }

    /// Checks and copies out a call.
    ///
    /// # Errors
    /// [`Malformed`] if it is none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Malformed> {
        codec::read(bytes, CALL_BYTES_MAX)
    }
}

/// Another process in a running sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct ExecRequest {
    /// Where.
    pub sandbox: SandboxId,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Added to the sandbox's environment.
    pub env: Vec<(String, String)>,
    /// Working directory; empty for the sandbox's own.
    pub cwd: String,
    /// As in a launch; empty for the sandbox's own.
    pub user: String,
    /// A terminal of rows and columns instead of pipes.
    pub tty: Option<(u16, u16)>,
    /// Standard input stays open; else it is empty.
    pub stdin: bool,
}

/// What is done with files. Paths are absolute, inside the sandbox, and followed inside it.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum FileOp {
    /// Answer: [`Answer::Done`], then data frames and an end frame.
    Read(String),
    /// The caller sends data frames and an end frame; answer: [`Answer::Done`] once all is written.
    Write {
        /// The file, made or truncated.
        path: String,
        /// Permission bits of a new file.
        mode: u32,
    },
    /// Answer: [`Answer::Files`].
    List(String),
    /// Answer: [`Answer::Files`] of one.
    Stat(String),
    /// With parents. Answer: [`Answer::Done`].
    MakeDir(String),
    /// A file or a whole directory. Answer: [`Answer::Done`].
    Remove(String),
    /// Answer: [`Answer::Done`].
    Rename {
        /// The old path.
        from: String,
        /// The new path.
        to: String,
    },
    /// A file, or a directory without those beneath it. Answer: [`Answer::Done`], then a data frame a change
    /// ([`FileChange`]), and an end frame when what is watched is gone.
    Watch(String),
}

/// One change of what is watched. A data frame holds the kind's letter and then the name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileChange {
    /// What happened.
    pub kind: ChangeKind,
    /// The name within the watched directory, as bytes; empty for what is watched itself.
    pub name: Vec<u8>,
}

/// What happened to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    /// It was made.
    Created,
    /// It was removed.
    Removed,
    /// Its bytes changed.
    Modified,
    /// Its mode, owner, times or attributes changed.
    Attributes,
    /// It was moved away from this name.
    MovedFrom,
    /// It was moved to this name.
    MovedTo,
    /// So much happened that some of it is not told: look again.
    Missed,
}

impl ChangeKind {
    /// Every kind with its letter on the wire.
    pub const ALL: [(Self, u8, &'static str); 7] = [
        (Self::Created, b'c', "created"),
        (Self::Removed, b'd', "removed"),
        (Self::Modified, b'm', "modified"),
        (Self::Attributes, b'a', "attributes"),
        (Self::MovedFrom, b'f', "moved-from"),
        (Self::MovedTo, b't', "moved-to"),
        (Self::Missed, b'o', "missed"),
    ];

    /// Its name for people and programs.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(kind, ..)| *kind == self).map_or("", |(_, _, name)| name)
    }
}

impl FileChange {
    /// Checks the payload of a data frame.
    ///
    /// # Errors
    /// [`Malformed`]: empty, a kind that is none, or a name longer than a name can be.
    pub fn from_frame_bytes(payload: &[u8]) -> Result<Self, Malformed> {
        let (letter, name) = payload.split_first().ok_or(Malformed::Length)?;
        let kind = ChangeKind::ALL.iter().find(|(_, l, _)| l == letter).ok_or(Malformed::Value)?.0;
        if name.len() > 255 || name.contains(&b'/') {
            return Err(Malformed::Value);
        }
        Ok(Self { kind, name: name.to_vec() })
    }
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum Answer {
    /// It was done.
    Done,
    /// It was not done.
    Fault(Fault),
    /// To [`Call::Inspect`].
    Sandbox(SandboxRecord),
    /// To [`Call::List`].
    Sandboxes(Vec<SandboxRecord>),
    /// To [`Call::Exec`] and [`Call::Attach`]: the process, to attach to it again.
    Process(u32),
    /// To [`Call::Wait`].
    Exited(Exit),
    /// To [`Call::Stats`].
    Stats(Stats),
    /// To [`FileOp::List`] and [`FileOp::Stat`].
    Files(Vec<FileRecord>),
    /// To [`Call::Hosts`] and [`Call::Host`].
    Hosts(Vec<HostRecord>),
    /// To [`Call::ListRecorded`]: the newest that fit, and whether there are more.
    Listed {
        /// The records.
        listed: Vec<crate::records::Listed>,
        /// Whether others were left out for want of room.
        more: bool,
    },
}

impl Answer {
    /// The answer's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        codec::write(self)
    }

    /// Checks and copies out an answer.
    ///
    /// # Errors
    /// [`Malformed`] if it is none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Malformed> {
        codec::read(bytes, FRAME_BYTES_MAX)
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Clone, Copy, Debug))]
pub struct Exit {
    /// Its own code, or 128 plus the signal that ended it.
    pub code: i32,
    /// Why it ended.
    pub why: ExitWhy,
}

impl Exit {
    /// The payload of a [`crate::frame::Kind::Exit`] frame: code (i32, little-endian), why (u8).
    #[must_use]
    pub const fn frame_bytes(self) -> [u8; 5] {
        let [c0, c1, c2, c3] = self.code.to_le_bytes();
        [c0, c1, c2, c3, self.why as u8]
    }

    /// Checks the payload of an exit frame.
    ///
    /// # Errors
    /// [`Malformed`]: another length, or a reason that is none.
    pub fn from_frame_bytes(payload: &[u8]) -> Result<Self, Malformed> {
        let [c0, c1, c2, c3, why]: [u8; 5] = payload.try_into().map_err(|_| Malformed::Length)?;
        let why = ExitWhy::of(why).ok_or(Malformed::Value)?;
        Ok(Self { code: i32::from_le_bytes([c0, c1, c2, c3]), why })
    }
}

/// Why a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Clone, Copy, Debug))]
#[repr(u8)]
pub enum ExitWhy {
    /// It returned.
    Returned,
    /// A signal of its own or of a caller.
    Signalled,
    /// It ran out of memory.
    OutOfMemory,
    /// Its hard deadline passed.
    Deadline,
    /// It was idle too long.
    Idle,
    /// A caller ended the sandbox.
    Killed,
    /// The host lost it: a crash of the platform, or a drain's deadline.
    Lost,
}

impl ExitWhy {
    const ALL: [Self; 7] = [
        Self::Returned,
        Self::Signalled,
        Self::OutOfMemory,
        Self::Deadline,
        Self::Idle,
        Self::Killed,
        Self::Lost,
    ];

    fn of(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|why| *why as u8 == byte)
    }

    /// As messages and lists say it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Returned => "returned",
            Self::Signalled => "signalled",
            Self::OutOfMemory => "out-of-memory",
            Self::Deadline => "deadline",
            Self::Idle => "idle",
            Self::Killed => "killed",
            Self::Lost => "lost",
        }
    }
}

/// Where a sandbox stands. Nothing else exists (DESIGN 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Clone, Copy, Debug))]
pub enum State {
    /// Admitted, not yet executed.
    Claimed,
    /// Executed.
    Running,
    /// Frozen.
    Paused,
    /// Ended.
    Stopped(Exit),
}

/// What is known of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct SandboxRecord {
    /// Its name.
    pub sandbox: SandboxId,
    /// The launch that it came from.
    pub launch_id: LaunchId,
    /// Whose it is.
    pub tenant: String,
    /// The image as it was asked for.
    pub image: String,
    /// Index of its shape.
    pub shape: u8,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Metadata.
    pub labels: Vec<(String, String)>,
    /// Where it stands.
    pub state: State,
    /// Milliseconds since it was admitted, by its host's clock.
    pub age_ms: u64,
    /// Milliseconds until its hard deadline; zero for none.
    pub left_ms: u64,
    /// What it may reach.
    pub network: Network,
    /// Its ports that are open on its host.
    pub published: Vec<Published>,
}

/// What a sandbox uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Clone, Copy, Debug))]
pub struct Stats {
    /// Processor time, in nanoseconds.
    pub cpu_ns: u64,
    /// Memory in use, in bytes.
    pub memory_bytes: u64,
    /// Most memory that was in use, in bytes.
    pub memory_peak_bytes: u64,
    /// Its limit, in bytes.
    pub memory_limit_bytes: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Bytes written to its root.
    pub disk_bytes: u64,
    /// Bytes received on its network.
    pub net_in_bytes: u64,
    /// Bytes sent on its network.
    pub net_out_bytes: u64,
    /// Log bytes that were dropped for want of room.
    pub log_lost_bytes: u64,
}

/// A file inside a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct FileRecord {
    /// Its name, without its directory.
    pub name: String,
    /// Type and permission bits, as `stat` gives them.
    pub mode: u32,
    /// Owner, as seen inside.
    pub uid: u32,
    /// Group, as seen inside.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Where a symlink points.
    pub target: String,
}

/// What the capacity service knows of a host.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct HostRecord {
    /// Its name.
    pub host: HostId,
    /// Where launches go, as `ip:port`.
    pub addr: String,
    /// `alive`, `suspect`, `quarantined`, `draining`, `drained` or `dead`.
    pub state: String,
    /// Its capacity.
    pub word: CapacityWord,
    /// Slots a shape when empty.
    pub total: [u16; 4],
    /// Sandboxes that run.
    pub running: u32,
    /// Milliseconds since its last heartbeat, by the aggregator's clock.
    pub age_ms: u64,
    /// Why it drains.
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_reads_back_and_what_is_none_is_refused() {
        for (kind, letter, name) in ChangeKind::ALL {
            let change = FileChange::from_frame_bytes(&[letter, b'x']);
            assert_eq!(change, Ok(FileChange { kind, name: b"x".to_vec() }));
            assert_eq!(kind.name(), name);
        }
        assert_eq!(FileChange::from_frame_bytes(b""), Err(Malformed::Length));
        assert_eq!(FileChange::from_frame_bytes(b"zx"), Err(Malformed::Value));
        assert_eq!(FileChange::from_frame_bytes(b"c../x"), Err(Malformed::Value));
        assert_eq!(FileChange::from_frame_bytes(&[b'c'; 257]), Err(Malformed::Value));
    }

    #[test]
    fn an_exit_frame_reads_back_and_others_are_refused() {
        for why in ExitWhy::ALL {
            let exit = Exit { code: -7, why };
            assert_eq!(Exit::from_frame_bytes(&exit.frame_bytes()), Ok(exit));
        }
        assert_eq!(Exit::from_frame_bytes(&[0, 0, 0, 0, 7]), Err(Malformed::Value));
        assert_eq!(Exit::from_frame_bytes(&[0; 4]), Err(Malformed::Length));
    }
}
