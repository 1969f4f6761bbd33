//! What a caller asks for and what it gets back: shapes, limits, programs, roots, running boxes.
//!
//! Plain values, no IO. Left out: how any of it is done (`spawner`, `inside`).

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rkyv::{Archive, Deserialize, Serialize};

/// A sandbox's id, as `wire` carries it.
pub type SandboxId = [u8; 16];

/// The most layers of a root, both kinds together.
pub const LAYERS_MAX: usize = 48;
/// The most slots of a spawner: the uid ranges end below 2^31 with the default base.
pub const SLOTS_MAX: u32 = 8192;
/// User ids a box has.
pub const UIDS_A_BOX: u32 = 65_536;
/// Exit records kept until [`crate::Spawner::forget`]; the oldest goes first.
pub const EXITS_MAX: usize = 8192;

/// A size of box that the pool keeps parked.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Name, as requests give it.
    pub name: String,
    /// CPU in thousandths of a core.
    pub cpu_millis: u32,
    /// Memory, the box's tmpfs included.
    pub memory_bytes: u64,
    /// Processes and threads, the box's init included.
    pub pids: u32,
    /// Parked boxes to keep ready.
    pub parked: u32,
}

/// Limits of one sandbox that differ from its shape's, and those that shapes do not have.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// CPU in thousandths of a core; `None`: the shape's.
    pub cpu_millis: Option<u32>,
    /// Memory; `None`: the shape's.
    pub memory_bytes: Option<u64>,
    /// Processes and threads; `None`: the shape's.
    pub pids: Option<u32>,
    /// Bytes that the box may write to its root (a sized tmpfs, charged to its memory too).
    pub disk_bytes: u64,
    /// Files that the box may make in its root.
    pub inodes: u64,
    /// Open files a process.
    pub open_files: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            cpu_millis: None,
            memory_bytes: None,
            pids: None,
            disk_bytes: 512 << 20,
            inodes: 100_000,
            open_files: 16_384,
        }
    }
}

/// A terminal's size.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct TtySize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// One program to run in a box.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Program and arguments; a name without `/` is looked for along `PATH`.
    pub argv: Vec<String>,
    /// Environment, `NAME=value` each. `PATH` and `HOME` are added where absent.
    pub env: Vec<String>,
    /// Working directory; made where absent. Empty means `/`.
    pub cwd: String,
    /// `""` (root), `name`, `uid`, `name:group`, `uid:gid`, as an image config has it.
    pub user: String,
    /// A terminal in place of the three pipes.
    pub tty: Option<TtySize>,
    /// Whether stdin is a pipe from the caller (else `/dev/null`). Ignored with a terminal.
    pub stdin: bool,
}

impl Program {
    /// A program with these arguments, as root in `/`, with no stdin.
    #[must_use]
    pub fn new<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Self {
        Self {
            argv: argv.into_iter().map(Into::into).collect(),
            env: Vec::new(),
            cwd: String::new(),
            user: String::new(),
            tty: None,
            stdin: false,
        }
    }
}

/// What a box's root is made of.
///
/// Each descriptor is a directory or a mount of the caller's mount namespace (`O_PATH` is enough), or,
/// on kernels from 6.15, a detached mount. They are cloned, never changed.
#[derive(Debug, Default)]
pub struct RootSpec {
    /// Read-only layers, the topmost first. Shown through the box's uid range.
    pub lowers: Vec<OwnedFd>,
    /// Data-only layers beneath them (overlayfs `datadir+`): objects that `lowers` point at by
    /// `trusted.overlay.redirect`. Turns `metacopy` and `redirect_dir` on.
    pub data_lowers: Vec<OwnedFd>,
}

impl RootSpec {
    /// A root of directories by path, as `hostd-image` names them: topmost first.
    ///
    /// # Errors
    /// What opening a directory gives.
    pub fn layered<P: AsRef<std::path::Path>>(
        lowers: &[P],
        data_lowers: &[P],
    ) -> std::io::Result<Self> {
        use rustix::fs::{Mode, OFlags};
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |path: &P| Ok(rustix::fs::open(path.as_ref(), flags, Mode::empty())?);
        Ok(Self {
            lowers: lowers.iter().map(open).collect::<std::io::Result<_>>()?,
            data_lowers: data_lowers.iter().map(open).collect::<std::io::Result<_>>()?,
        })
    }

    /// A root of one directory.
    ///
    /// # Errors
    /// What opening the directory gives.
    pub fn directory(path: impl AsRef<std::path::Path>) -> std::io::Result<Self> {
        Self::layered(&[path], &[])
    }
}

/// A claim: whose box, of which shape, with what root and program.
#[derive(Debug)]
pub struct ClaimSpec {
    /// Id; must not be that of a live box.
    pub id: SandboxId,
    /// Name of a configured shape.
    pub shape: String,
    /// Root.
    pub root: RootSpec,
    /// Main program. The sandbox ends when it does.
    pub program: Program,
    /// Host name inside; empty: `sandbox`.
    pub hostname: String,
    /// Limits.
    pub limits: Limits,
    /// A way out of its network namespace; `None`: loopback only, which costs nothing.
    pub network: Option<BoxNetwork>,
}

/// The network device of a box that has one: whoever asks for its other end ([`crate::Spawner::tunnel`]) is its whole
/// network.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct BoxNetwork {
    /// The box's address.
    pub address: [u8; 4],
    /// Bits of its network.
    pub prefix_bits: u8,
    /// Its gateway and name server.
    pub gateway: [u8; 4],
    /// Bytes of a packet at most.
    pub mtu: u32,
}

/// The outer end of a box's network device.
#[derive(Debug)]
pub struct Tunnel {
    /// The TUN device: one packet a read or write. It does not block.
    pub device: OwnedFd,
    /// Readable once the box has ended: close the device then.
    pub ended: OwnedFd,
}

/// When each step of a claim was done: nanoseconds of `CLOCK_MONOTONIC` (one clock for all processes
/// of the machine). 0 where a step did not happen.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Steps {
    /// The caller sent the claim.
    pub claim_sent: u64,
    /// The spawner read it.
    pub received: u64,
    /// A parked box was at hand (later than `received` where the pool was empty).
    pub box_found: u64,
    /// The overlay was composed and the claim sent on to the box.
    pub composed: u64,
    /// The box read it.
    pub woken: u64,
    /// Root, `/proc`, `/dev` and `/sys` stood in place.
    pub mounted: u64,
    /// The new root covers the parking root and is entered.
    pub pivoted: u64,
    /// Second filter, landlock and capabilities done.
    pub confined: u64,
    /// `execve` of the main program succeeded.
    pub executed: u64,
    /// The answer reached the caller.
    pub answered: u64,
}

/// A claimed, running sandbox.
#[derive(Debug)]
pub struct Running {
    /// Id.
    pub id: SandboxId,
    /// The box's init, as the host numbers it.
    pub pid: u32,
    /// The box's slot: its uid range starts at `uid_base + slot * 65,536`.
    pub slot: u32,
    /// Host ends of the program's stdio.
    pub stdio: Stdio,
    /// When each step was done. All 0 for an adopted box.
    pub steps: Steps,
}

/// Host ends of a program's stdio. Blocking descriptors; set `O_NONBLOCK` for polling.
#[derive(Debug, Default)]
pub struct Stdio {
    /// Write end of stdin. For the main program the spawner keeps a copy for adoption, so closing
    /// this one is no end of file: use [`crate::Spawner::close_stdin`].
    pub stdin: Option<OwnedFd>,
    /// Read end of stdout.
    pub stdout: Option<OwnedFd>,
    /// Read end of stderr.
    pub stderr: Option<OwnedFd>,
    /// Terminal's master, in place of the three. Resize with `TIOCSWINSZ` on it.
    pub pty: Option<OwnedFd>,
}

/// A program started by `exec` in a running sandbox.
#[derive(Debug)]
pub struct Executed {
    /// Number of this exec, for [`crate::Spawner::signal`] and [`Event::ExecExited`].
    pub exec: u64,
    /// Host ends of its stdio. Nobody else holds them.
    pub stdio: Stdio,
}

/// How a program ended.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExitStatus {
    /// Exit code, where it exited.
    pub code: Option<i32>,
    /// Signal, where one ended it.
    pub signal: Option<i32>,
    /// Whether the kernel killed something in the box for want of memory.
    pub oom: bool,
}

/// What a box has used.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// CPU time, nanoseconds.
    pub cpu_ns: u64,
    /// Memory now.
    pub memory_bytes: u64,
    /// Most memory at once.
    pub memory_peak_bytes: u64,
    /// Processes and threads now.
    pub pids: u64,
    /// Processes that the kernel killed for want of memory.
    pub oom_kills: u64,
    /// Bytes of the writable layer in use; 0 once the box has ended.
    pub disk_bytes: u64,
}

/// A live box, as [`crate::Spawner::running`] lists it for adoption.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Live {
    /// Id.
    pub id: SandboxId,
    /// Shape.
    pub shape: String,
    /// The box's init, as the host numbers it.
    pub pid: u32,
    /// Slot.
    pub slot: u32,
    /// Whether it is paused.
    pub paused: bool,
    /// `CLOCK_MONOTONIC` nanoseconds at which its program was started.
    pub started_ns: u64,
}

/// A box that has ended.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Exited {
    /// Id.
    pub id: SandboxId,
    /// Shape.
    pub shape: String,
    /// How the main program ended.
    pub status: ExitStatus,
    /// What it had used.
    pub stats: Stats,
}

/// What the spawner says of its own accord.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A sandbox has ended and nothing of it is left. Repeated to the next hostd until
    /// [`crate::Spawner::forget`].
    Exited(Exited),
    /// A program started by `exec` has ended.
    ExecExited {
        /// Sandbox.
        id: SandboxId,
        /// Number of the exec.
        exec: u64,
        /// How it ended.
        status: ExitStatus,
    },
    /// A shape has just run out of parked boxes, or has one again.
    Pool(PoolState),
    /// The spawner is gone, and every box with it. The last event.
    Gone,
}

/// Boxes of one shape.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct PoolState {
    /// Shape.
    pub shape: String,
    /// Parked and ready.
    pub parked: u32,
    /// Claimed or running.
    pub running: u32,
    /// Boxes of any shape that can still be made in time: slots that are left, or none while boxes fail to be made.
    pub slots_left: u32,
}

/// A file operation inside a box. Paths are the box's own; its root is the box's root.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub enum FileOp {
    /// Opens a regular file for reading; the answer carries the descriptor.
    Read {
        /// Path.
        path: String,
    },
    /// Makes or empties a regular file and opens it for writing; the answer carries the descriptor.
    Write {
        /// Path.
        path: String,
        /// Permission bits of a new file.
        mode: u32,
        /// Keep what is there and write behind it.
        append: bool,
    },
    /// What is at a path; a symlink is not followed.
    Stat {
        /// Path.
        path: String,
    },
    /// Entries of a directory, at most [`crate::ENTRIES_MAX`].
    List {
        /// Path.
        path: String,
    },
    /// Makes a directory, parents included; one that exists is no error.
    MakeDirectory {
        /// Path.
        path: String,
        /// Permission bits.
        mode: u32,
    },
    /// Removes a file, or a directory.
    Remove {
        /// Path.
        path: String,
        /// With everything in it.
        recursive: bool,
    },
    /// Tells changes of a file, or of a directory's entries. The answer is [`FileAnswer::Open`] with a
    /// pipe of records: one byte (`c` made, `m` written, `a` attributes, `f` moved away, `t` moved here,
    /// `d` removed, `o` some were lost), the entry's name (empty for the path itself), a zero byte.
    /// It ends when what is watched is gone; close it to stop.
    Watch {
        /// Path.
        path: String,
    },
    /// Renames.
    Rename {
        /// From.
        from: String,
        /// To.
        to: String,
    },
}

/// The kind of a file.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Device, socket or pipe.
    Other,
}

/// What is known of a file.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct FileStat {
    /// Name within its directory, or the path asked for.
    pub name: String,
    /// Kind.
    pub kind: FileKind,
    /// Permission bits.
    pub mode: u32,
    /// Owner, as the box numbers it.
    pub uid: u32,
    /// Group, as the box numbers it.
    pub gid: u32,
    /// Length.
    pub size: u64,
    /// Modification time, nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Target, for a symlink.
    pub target: Option<String>,
}

/// The answer to a [`FileOp`].
#[derive(Debug)]
pub enum FileAnswer {
    /// An open regular file.
    Open(OwnedFd),
    /// What is there.
    Stat(FileStat),
    /// Entries, sorted by name.
    List(Vec<FileStat>),
    /// Done.
    Done,
}

/// How a spawner is set up. The first hostd to start it decides; a later one joins it as it is, but
/// brings its own shapes.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Directory of its socket and lock. Its path is the spawner's identity.
    pub state_dir: String,
    /// Shapes.
    pub shapes: Vec<Shape>,
    /// Most boxes at once, parked ones included (at most [`SLOTS_MAX`]).
    pub slots: u32,
    /// First user id of slot 0.
    pub uid_base: u32,
    /// Binary whose `main` calls [`crate::main_if_asked`]; empty: the running one.
    pub exe: String,
    /// Where cgroups are mounted.
    pub cgroup_root: String,
    /// Seconds without a hostd and without a running sandbox after which the spawner ends.
    pub linger_s: u64,
    /// Longest that a claim waits for a box where none is parked but a slot is left.
    pub claim_wait_ms: u64,
}

impl Config {
    /// Defaults around a state directory.
    #[must_use]
    pub fn new(state_dir: impl Into<PathBuf>, shapes: Vec<Shape>) -> Self {
        Self {
            state_dir: state_dir.into().to_string_lossy().into_owned(),
            shapes,
            slots: 1024,
            uid_base: 0x2000_0000,
            exe: String::new(),
            cgroup_root: "/sys/fs/cgroup".into(),
            linger_s: 60,
            claim_wait_ms: 2000,
        }
    }

    /// Name of the spawner's cgroup in every hierarchy: `volley-` and a hash of the state directory.
    #[must_use]
    pub fn group_name(&self) -> String {
        let hash = self.state_dir.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        format!("volley-{:08x}", (hash >> 32) ^ (hash & 0xffff_ffff))
    }
}
