//! A launch: what is asked, and the three ways in which a host answers.
//!
//! `Started`, `Refused` and `Failed` are different types, because they lead to different deeds (PROTOCOL 6); the
//! fourth outcome, unknown, is the absence of an answer and has no type here. The budget is not part of the
//! request: it shrinks at each hop, so it travels beside it ([`LaunchHead`]) and a placer forwards the request's
//! bytes as they came.

use alloc::{format, string::String, vec::Vec};

use rkyv::{Archive, Deserialize, Serialize};

pub use crate::network::{Network, Publish};
use crate::{
    capacity::{CapacityWord, ShapeId},
    codec::{self, Malformed},
    fault::{Code, Fault},
    id::{Incarnation, LaunchId, SandboxId, Seq},
    limits::{BUDGET_MS_MAX, CALL_BYTES_MAX, NAME_BYTES_MAX, STRINGS_MAX},
};

/// What is to run, and within which bounds.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct LaunchRequest {
    /// Names this launch; the same id again is the same launch.
    pub launch_id: LaunchId,
    /// Whose it is. Must be the tenant of the client's certificate.
    pub tenant: String,
    /// An image: its id (64 hex digits) or a name of the tenant's.
    pub image: String,
    /// Index of the shape, below [`crate::limits::SHAPES_MAX`].
    pub shape: u8,
    /// Program and arguments; empty for the image's own.
    pub command: Vec<String>,
    /// Added to, or replacing, the image's environment.
    pub env: Vec<(String, String)>,
    /// Working directory; empty for the image's own.
    pub cwd: String,
    /// `name`, `uid` or `uid:gid`; empty for the image's own.
    pub user: String,
    /// A terminal instead of pipes.
    pub tty: bool,
    /// Standard input is kept open for an attached client; else it is empty.
    pub stdin: bool,
    /// Bounds beyond the shape's.
    pub limits: Limits,
    /// What it may reach.
    pub network: Network,
    /// Its ports that are to be open on the host's own address.
    pub publish: Vec<Publish>,
    /// Metadata to list and filter by.
    pub labels: Vec<(String, String)>,
}

/// Bounds of one sandbox beyond those of its shape. Zero means the host's default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Clone, Copy, Debug))]
pub struct Limits {
    /// Milliseconds after which it is killed.
    pub hard_ms: u64,
    /// Milliseconds without input, output or calls after which it is killed.
    pub idle_ms: u64,
    /// Bytes that it may write to its root.
    pub disk_bytes: u64,
    /// Bytes of its log that are kept, newest last.
    pub log_bytes: u64,
    /// Processes and threads.
    pub pids: u32,
    /// Open files a process.
    pub open_files: u32,
}

/// A host's answer to a launch.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum LaunchReply {
    /// It runs.
    Started(Started),
    /// The host has no room, or takes none in: nothing was started, try another.
    Refused(Refused),
    /// It was tried and did not work; nothing of it is left.
    Failed(Fault),
}

impl LaunchReply {
    /// The reply's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        codec::write(self)
    }

    /// Checks and copies out a reply.
    ///
    /// # Errors
    /// [`Malformed`] if it is none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Malformed> {
        codec::read(bytes, CALL_BYTES_MAX)
    }
}

/// The sandbox runs: its program was executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Clone, Copy, Debug))]
pub struct Started {
    /// Its name.
    pub sandbox: SandboxId,
    /// The first heartbeat that counts it: a placer's reservation ends with that one.
    pub visible_at: VisibleAt,
    /// The host's capacity after it.
    pub word: CapacityWord,
    /// Where the time went.
    pub steps: Steps,
}

/// A heartbeat of a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Clone, Copy, Debug))]
pub struct VisibleAt {
    /// Of this start of the daemon.
    pub incarnation: Incarnation,
    /// And this count.
    pub seq: Seq,
}

/// Nanoseconds that a launch spent on the host, by step. Zero where a step was not needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Clone, Copy, Debug))]
pub struct Steps {
    /// Mounting the image, if this host had not.
    pub image_ns: u64,
    /// Making or taking a parked box.
    pub box_ns: u64,
    /// Composing the root and swapping into it.
    pub root_ns: u64,
    /// From there to the program's first instruction.
    pub exec_ns: u64,
    /// From the request's arrival to the reply.
    pub total_ns: u64,
}

/// Not here, not now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Clone, Copy, Debug))]
pub struct Refused {
    /// The host's true capacity, which corrects the placer's table.
    pub word: CapacityWord,
    /// [`Code::NoCapacity`], [`Code::Draining`] or [`Code::Overloaded`].
    pub code: Code,
}

/// What travels before a request's bytes: the milliseconds that are left for it in the low 31 bits (u32,
/// little-endian), and whether the launch is [named](Self::named) in the highest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchHead {
    /// Milliseconds left, at most [`BUDGET_MS_MAX`].
    pub budget_ms: u32,
    /// The id may reach other placers as well: it was given by a caller, or its outcome there is not known. Such a
    /// launch goes to its home hosts in order instead of the best of two picks (PROTOCOL 6.11).
    pub named: bool,
}

impl LaunchHead {
    /// Bytes of it.
    pub const BYTES: usize = 4;
    const NAMED: u32 = 1 << 31;

    /// The head of a launch whose id only its sender knows.
    #[must_use]
    pub const fn new(budget_ms: u32) -> Self {
        Self { budget_ms, named: false }
    }

    /// Splits a launch frame's payload into head and request bytes.
    ///
    /// # Errors
    /// [`Malformed::Length`] if it is short or long, [`Malformed::Value`] for a budget out of bounds.
    pub fn split(payload: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let (head, request) = payload.split_first_chunk().ok_or(Malformed::Length)?;
        let head = u32::from_le_bytes(*head);
        let budget_ms = head & !Self::NAMED;
        if request.len() > CALL_BYTES_MAX {
            return Err(Malformed::Length);
        }
        if budget_ms > BUDGET_MS_MAX {
            return Err(Malformed::Value);
        }
        Ok((Self { budget_ms, named: head & Self::NAMED != 0 }, request))
    }

    /// The head as it travels.
    #[must_use]
    pub const fn bytes(self) -> [u8; Self::BYTES] {
        (self.budget_ms | if self.named { Self::NAMED } else { 0 }).to_le_bytes()
    }
}

impl LaunchRequest {
    /// The request's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        codec::write(self)
    }

    /// Checks and copies out a request.
    ///
    /// # Errors
    /// [`Malformed`] if it is no request, or one that breaks [`LaunchRequest::check`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Malformed> {
        let request: Self = codec::read(bytes, CALL_BYTES_MAX)?;
        request.check().map_err(|_| Malformed::Value)?;
        Ok(request)
    }

    /// The archived request in place: what a placer needs to route it, without a copy.
    ///
    /// # Errors
    /// [`Malformed`] if it is no request.
    pub fn access(bytes: &[u8]) -> Result<&ArchivedLaunchRequest, Malformed> {
        codec::access::<ArchivedLaunchRequest>(bytes, CALL_BYTES_MAX)
    }

    /// Checks what its type does not.
    ///
    /// # Errors
    /// [`Code::BadRequest`], with the field that is wrong.
    pub fn check(&self) -> Result<(), Fault> {
        let bad = |what: &str| Err(Fault::new(Code::BadRequest, what));
        if ShapeId::new(self.shape).is_none() {
            return bad("no such shape");
        }
        if self.image.is_empty() || self.image.len() > NAME_BYTES_MAX {
            return bad("image: empty or longer than 128 bytes");
        }
        if self.tenant.is_empty() || self.tenant.len() > NAME_BYTES_MAX {
            return bad("tenant: empty or longer than 128 bytes");
        }
        if self.user.len() > NAME_BYTES_MAX {
            return bad("user: longer than 128 bytes");
        }
        if self.command.len() + self.env.len() + self.labels.len() > STRINGS_MAX {
            return bad("more than 1,024 arguments, environment entries and labels");
        }
        let has_nul = |text: &String| text.as_bytes().contains(&0);
        let env_bad = |(name, value): &(String, String)| {
            name.is_empty() || name.contains('=') || has_nul(name) || has_nul(value)
        };
        if self.command.iter().any(has_nul) || has_nul(&self.cwd) || self.env.iter().any(env_bad) {
            return bad("a zero byte, or an environment name that is empty or holds '='");
        }
        self.network.rules().map_err(|e| Fault::new(Code::BadRequest, format!("egress: {e}")))?;
        Publish::check(&self.publish).or_else(bad)
    }
}
