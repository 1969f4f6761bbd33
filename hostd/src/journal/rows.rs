//! Rows of the journal as bytes: fixed fields, then the request. What is read is checked, since a disk can lie.

use hostd_core::BodyHash;
use wire::{
    Code, Fault, ImageId, LaunchId,
    call::{Exit, ExitWhy},
};

/// Where a sandbox stood when its row was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// It was being started: it may have run or not.
    Claimed,
    /// It ran.
    Running,
    /// It had ended, at that time in ms.
    Ended(u64, Exit),
}

/// One sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    /// Its launch.
    pub(crate) launch_id: LaunchId,
    /// Hash of its request.
    pub(crate) body: BodyHash,
    /// Index of its shape.
    pub(crate) shape: u8,
    /// When it was admitted, in ms of the boot clock.
    pub(crate) admitted_ms: u64,
    /// When it must end; zero for never.
    pub(crate) hard_at_ms: u64,
    /// Idle milliseconds; zero for ever.
    pub(crate) idle_ms: u64,
    /// Its image, if known yet.
    pub(crate) image: ImageId,
    /// Where it stands.
    pub(crate) stage: Stage,
    /// Its ports that are open: the host's, its own.
    pub(crate) published: Vec<(u16, u16)>,
    /// Its request.
    pub(crate) request: Vec<u8>,
}

const ROW_VERSION: u8 = 2;
/// Without published ports.
const ROW_VERSION_1: u8 = 1;
const ROW_HEAD: usize = 1 + 16 + 16 + 1 + 8 * 3 + 32 + 1 + 8 + 5;

impl Row {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(ROW_HEAD + self.request.len());
        bytes.push(ROW_VERSION);
        bytes.extend_from_slice(&self.launch_id.0);
        bytes.extend_from_slice(&self.body);
        bytes.push(self.shape);
        for number in [self.admitted_ms, self.hard_at_ms, self.idle_ms] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&self.image.0);
        let none = Exit { code: 0, why: ExitWhy::Returned };
        let (stage, ended_ms, exit) = match self.stage {
            Stage::Claimed => (0, 0, none),
            Stage::Running => (1, 0, none),
            Stage::Ended(at_ms, exit) => (2, at_ms, exit),
        };
        bytes.push(stage);
        bytes.extend_from_slice(&ended_ms.to_le_bytes());
        bytes.extend_from_slice(&exit.frame_bytes());
        // At most `PUBLISH_MAX`.
        bytes.push(u8::try_from(self.published.len()).unwrap_or(0));
        for (host_port, port) in self.published.iter().take(usize::from(u8::MAX)) {
            bytes.extend_from_slice(&host_port.to_le_bytes());
            bytes.extend_from_slice(&port.to_le_bytes());
        }
        bytes.extend_from_slice(&self.request);
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes;
        let [version] = take(&mut rest)?;
        if version != ROW_VERSION && version != ROW_VERSION_1 {
            return None;
        }
        let launch_id = LaunchId(take(&mut rest)?);
        let body = take(&mut rest)?;
        let [shape] = take(&mut rest)?;
        let admitted_ms = u64::from_le_bytes(take(&mut rest)?);
        let hard_at_ms = u64::from_le_bytes(take(&mut rest)?);
        let idle_ms = u64::from_le_bytes(take(&mut rest)?);
        let image = ImageId(take(&mut rest)?);
        let [stage] = take(&mut rest)?;
        let ended_ms = u64::from_le_bytes(take(&mut rest)?);
        let exit = Exit::from_frame_bytes(&take::<5>(&mut rest)?).ok()?;
        let stage = match stage {
            0 => Stage::Claimed,
            1 => Stage::Running,
            2 => Stage::Ended(ended_ms, exit),
            _ => return None,
        };
        let mut published = Vec::new();
        if version == ROW_VERSION {
            let [count] = take(&mut rest)?;
            for _ in 0..count {
                let host_port = u16::from_le_bytes(take(&mut rest)?);
                published.push((host_port, u16::from_le_bytes(take(&mut rest)?)));
            }
        }
        let request = rest.to_vec();
        Some(Self {
            launch_id,
            body,
            shape,
            admitted_ms,
            hard_at_ms,
            idle_ms,
            image,
            stage,
            published,
            request,
        })
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(*head)
}

/// What became of a launch of which no sandbox is left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Past {
    /// It was cancelled.
    Cancelled,
    /// It failed.
    Failed(BodyHash, Fault),
    /// It is named and was refused for this reason.
    Refused(Code),
}

impl Past {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Cancelled => vec![0],
            Self::Failed(body, fault) => {
                let mut bytes = vec![1];
                bytes.extend_from_slice(body);
                bytes.extend_from_slice(&(fault.code as u16).to_le_bytes());
                bytes.extend_from_slice(fault.message.as_bytes());
                bytes
            }
            Self::Refused(code) => {
                let [low, high] = (*code as u16).to_le_bytes();
                vec![2, low, high]
            }
        }
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes;
        match take(&mut rest)? {
            [0] => Some(Self::Cancelled),
            [1] => {
                let body = take(&mut rest)?;
                let code = code(&mut rest)?;
                let message = String::from_utf8(rest.to_vec()).ok()?;
                Some(Self::Failed(body, Fault::new(code, message)))
            }
            [2] => code(&mut rest).map(Self::Refused),
            _ => None,
        }
    }
}

fn code(rest: &mut &[u8]) -> Option<Code> {
    let number = u16::from_le_bytes(take(rest)?);
    Code::ALL.iter().copied().find(|code| *code as u16 == number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_any_bytes_are_rows_or_nothing() {
        let bytes = Row {
            launch_id: LaunchId([1; 16]),
            body: [2; 16],
            shape: 3,
            admitted_ms: 4,
            hard_at_ms: 5,
            idle_ms: 6,
            image: ImageId([7; 32]),
            stage: Stage::Running,
            published: vec![(8_080, 80)],
            request: vec![8; 100],
        }
        .to_bytes();
        assert_eq!(Row::from_bytes(&bytes).unwrap().published, [(8_080, 80)]);
        for cut in 0..ROW_HEAD {
            assert_eq!(Row::from_bytes(&bytes[..cut]), None);
        }
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x55;
            let _ = Row::from_bytes(&flipped);
        }
    }
}
