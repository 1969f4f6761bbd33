//! What a placer reports of a host that did not take a launch as its word promised.

use rkyv::{Archive, Deserialize, Serialize};

use crate::{
    capacity::CapacityWord,
    codec::{self, Malformed},
    datagram::{self, Kind, Sender, Verified},
    id::HostId,
    limits::DATAGRAM_BYTES_MAX,
    seal::{KeyEpoch, Role, SenderKey},
};

/// One placer's news of one host. Capacity reports correct a word now; health reports make a host suspect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Clone, Copy, Debug))]
pub struct FailureReport {
    /// The host it is about.
    pub host: HostId,
    /// Grows with each report of this placer.
    pub seq: u64,
    /// [`FailureReport::CAPACITY`] or [`FailureReport::HEALTH`].
    pub about: u8,
    /// With a capacity report: the word that came with the refusal.
    pub word: CapacityWord,
    /// With a health report: launches that failed since the last one.
    pub failures: u32,
    /// With a health report: the code of the newest, as [`crate::fault::Code`] numbers it.
    pub code: u16,
}

impl FailureReport {
    /// The host refused; its true word is here.
    pub const CAPACITY: u8 = 1;
    /// The host failed launches, or did not answer.
    pub const HEALTH: u8 = 2;

    /// Writes the datagram; returns its length in bytes.
    pub fn seal(
        &self,
        placer: u64,
        key_epoch: KeyEpoch,
        key: &SenderKey,
        out: &mut [u8; DATAGRAM_BYTES_MAX],
    ) -> usize {
        let sender = Sender { role: Role::Placer, id: placer, key_epoch };
        datagram::seal(Kind::FailureReport, sender, key, out, |body| codec::put(self, body))
    }

    /// A report, and the placer it is from, out of a verified datagram.
    ///
    /// # Errors
    /// [`Malformed`]: not a report of a placer, or a field out of bounds.
    pub fn open(datagram: &Verified<'_>) -> Result<(u64, Self), Malformed> {
        if datagram.kind != Kind::FailureReport || datagram.sender.role != Role::Placer {
            return Err(Malformed::Magic);
        }
        let body = codec::view::<ArchivedFailureReport>(datagram.body)?;
        let report = Self {
            host: HostId(body.host.0.to_native()),
            seq: body.seq.to_native(),
            about: body.about,
            word: CapacityWord(body.word.0.to_native()),
            failures: body.failures.to_native(),
            code: body.code.to_native(),
        };
        if report.about != Self::CAPACITY && report.about != Self::HEALTH {
            return Err(Malformed::Value);
        }
        Ok((datagram.sender.id, report))
    }
}
