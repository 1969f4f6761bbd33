//! What is said between hostd and the spawner, and between the spawner and a box. rkyv, checked.
//!
//! A request has a number and gets one answer with that number; events have number 0. What a box
//! says is untrusted: its init is ours, but it has been near a hostile program.

use rkyv::{Archive, Deserialize, Serialize};

use crate::error::{Fault, Refusal};
use crate::spec::{
    BoxNetwork, Event, ExitStatus, Exited, FileOp, FileStat, Limits, Live, PoolState, Program,
    SandboxId, Shape, Stats, Steps,
};

/// Version of everything in this file. A hostd joins only a spawner of its own version.
pub(crate) const PROTOCOL: u32 = 6;

/// hostd to spawner.
#[derive(Archive, Serialize, Deserialize, Debug)]
pub(crate) struct Request {
    pub(crate) number: u64,
    pub(crate) ask: Ask,
}

#[derive(Archive, Serialize, Deserialize, Debug)]
pub(crate) enum Ask {
    Hello,
    /// Descriptors: `lowers` layers, then `data_lowers`.
    Claim(Box<Claim>),
    Exec {
        id: SandboxId,
        program: Program,
    },
    Signal {
        id: SandboxId,
        exec: u64,
        signal: i32,
    },
    Kill {
        id: SandboxId,
    },
    Freeze {
        id: SandboxId,
        frozen: bool,
    },
    CloseStdin {
        id: SandboxId,
    },
    Stats {
        id: SandboxId,
    },
    File {
        id: SandboxId,
        op: FileOp,
    },
    Connect {
        id: SandboxId,
        port: u16,
    },
    /// Answer carries the box's network device, and its process.
    Tunnel {
        id: SandboxId,
    },
    /// Answer carries the host ends of the main program's stdio.
    Stdio {
        id: SandboxId,
    },
    Forget {
        id: SandboxId,
    },
    Pool,
    Shapes(Vec<Shape>),
    Shutdown {
        kill: bool,
    },
}

#[derive(Archive, Serialize, Deserialize, Debug)]
pub(crate) struct Claim {
    pub(crate) id: SandboxId,
    pub(crate) shape: String,
    pub(crate) lowers: u32,
    pub(crate) data_lowers: u32,
    pub(crate) program: Program,
    pub(crate) hostname: String,
    pub(crate) limits: Limits,
    pub(crate) network: Option<BoxNetwork>,
    pub(crate) sent_ns: u64,
}

/// Spawner to hostd.
#[derive(Archive, Serialize, Deserialize, Debug)]
pub(crate) struct Reply {
    pub(crate) number: u64,
    pub(crate) answer: Answer,
}

/// Which stdio descriptors a packet carries, in this order.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct StdioFds {
    pub(crate) stdin: bool,
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
    pub(crate) pty: bool,
}

#[derive(Archive, Serialize, Deserialize, Debug)]
pub(crate) enum Answer {
    /// One descriptor: a memory file with a [`Census`], which may be longer than a packet.
    Welcome {
        protocol: u32,
        pid: u32,
    },
    Started {
        pid: u32,
        slot: u32,
        steps: Steps,
        stdio: StdioFds,
    },
    Executed {
        exec: u64,
        stdio: StdioFds,
    },
    Stdio(StdioFds),
    Stats(Stats),
    Pool(Vec<PoolState>),
    File(FileResult),
    /// One descriptor: a connected socket.
    Connected,
    /// Two descriptors: device, process.
    Tunnel,
    Done,
    Refused(Refusal),
    Failed(Fault),
    Event(Event),
}

#[derive(Archive, Serialize, Deserialize, Debug)]
pub(crate) enum FileResult {
    /// One descriptor: the file.
    Open,
    Stat(FileStat),
    /// One descriptor: a memory file that holds an archived `Vec<FileStat>`.
    List,
    Done,
}

/// Spawner to box.
#[derive(Archive, Serialize, Deserialize, Debug)]
pub(crate) enum ToBox {
    /// The uid map is written: go on parking.
    Mapped,
    /// Descriptors: the root mount, `parts` mounts that it was made from, then stdin, stdout, stderr
    /// where there is no terminal; at last, with a network, a node of `/dev/net/tun`.
    Claim {
        program: Program,
        hostname: String,
        limits: Limits,
        network: Option<BoxNetwork>,
        parts: u32,
    },
    /// Descriptors as above, without the root.
    Exec {
        number: u64,
        program: Program,
    },
    Signal {
        number: u64,
        exec: u64,
        signal: i32,
    },
    File {
        number: u64,
        op: FileOp,
    },
    Connect {
        number: u64,
        port: u16,
    },
    Tunnel {
        number: u64,
    },
}

/// Box to spawner.
#[derive(Archive, Serialize, Deserialize, Debug)]
pub(crate) enum FromBox {
    /// Parked.
    Ready,
    /// Could not be parked.
    Unfit {
        why: Fault,
    },
    /// The main program runs. One descriptor with a terminal: its master.
    Started {
        steps: Steps,
    },
    /// It could not be started.
    NotStarted {
        why: Fault,
    },
    /// One descriptor with a terminal.
    Executed {
        number: u64,
    },
    NotDone {
        number: u64,
        why: Fault,
    },
    Signalled {
        number: u64,
    },
    File {
        number: u64,
        result: FileResult,
    },
    Connected {
        number: u64,
    },
    /// One descriptor: the network device.
    Tunnel {
        number: u64,
    },
    ExecExited {
        number: u64,
        status: ExitStatus,
    },
    /// The main program ended; the box follows.
    MainExited {
        status: ExitStatus,
    },
}

/// Everybody that a spawner knows.
#[derive(Archive, Serialize, Deserialize, Debug, Default)]
pub(crate) struct Census {
    pub(crate) live: Vec<Live>,
    pub(crate) exited: Vec<Exited>,
}

impl FromBox {
    /// The question that this answers.
    pub(crate) fn number(&self) -> Option<u64> {
        match self {
            Self::Executed { number }
            | Self::NotDone { number, .. }
            | Self::Signalled { number }
            | Self::File { number, .. }
            | Self::Connected { number }
            | Self::Tunnel { number } => Some(*number),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use wire::codec::Message as _;

    use super::*;

    #[test]
    fn messages_survive_and_junk_does_not() {
        let ask = Ask::Exec { id: [3; 16], program: Program::new(["sh", "-c", "true"]) };
        let bytes = Request { number: 9, ask }.encode();
        let back = Request::decode(&bytes).unwrap();
        assert_eq!(back.number, 9);
        assert!(matches!(back.ask, Ask::Exec { id, .. } if id == [3; 16]));
        for cut in 0..bytes.len() {
            // No panic; a cut packet may only ever decode to something well-formed.
            let _ = Request::decode(&bytes[..cut]);
        }
        assert!(FromBox::decode(&[]).is_none());
    }
}
