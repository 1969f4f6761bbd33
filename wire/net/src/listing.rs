//! Lists of hosts, which are longer than a frame.
//!
//! PROTOCOL 7.8: `Answer` frames of records that ascend by host, then `End`. A reader takes one frame at a time, so that
//! whoever passes a list of a million hosts on holds a frame of it and no more. Left out: what is done with two
//! lists that name the same host, which is the placer's part.

use bytes::BytesMut;
use quinn::{Connection, RecvStream, SendStream};
use wire::{
    Fault, HostId,
    call::{Answer, Call, HostRecord},
    codec::Malformed,
    frame::Kind,
};

use crate::stream::{self, StreamLost};

/// Records of one frame: each takes up to about 300 bytes with its message.
pub const RECORDS: usize = 500;

/// A list of hosts that is being read.
#[derive(Debug)]
pub struct HostList {
    recv: RecvStream,
    first: Option<Vec<HostRecord>>,
    last: Option<HostId>,
    ended: bool,
    scratch: BytesMut,
}

impl HostList {
    /// Asks for all hosts.
    ///
    /// # Errors
    /// The peer's fault, or why it did not answer.
    pub async fn open(connection: &Connection) -> Result<Self, Fault> {
        let (answer, mut send, recv) = stream::open(connection, &Call::Hosts).await?;
        let _ = send.finish();
        let Answer::Hosts(first) = answer else {
            return Err(broken("hosts were not answered by hosts"));
        };
        let scratch = BytesMut::new();
        Ok(Self { recv, first: Some(first), last: None, ended: false, scratch })
    }

    /// The next records, by host; `None` after the last.
    ///
    /// # Errors
    /// Why the list broke off. What was read stands.
    pub async fn next(&mut self) -> Result<Option<Vec<HostRecord>>, Fault> {
        if self.ended {
            return Ok(None);
        }
        let records = match self.first.take() {
            Some(first) => first,
            None => match stream::read_frame(&mut self.recv, &mut self.scratch).await? {
                Some((Kind::Answer, bytes)) => {
                    match Answer::from_bytes(&bytes).map_err(StreamLost::Malformed)? {
                        Answer::Hosts(records) => records,
                        Answer::Fault(fault) => return Err(fault),
                        _ => return Err(broken("hosts went on as something else")),
                    }
                }
                Some((Kind::End, _)) => {
                    self.ended = true;
                    return Ok(None);
                }
                Some((kind, _)) => return Err(StreamLost::Unexpected(kind).into()),
                // Without its end it may be half of a list.
                None => return Err(StreamLost::Truncated.into()),
            },
        };
        for record in &records {
            if self.last.is_some_and(|last| last >= record.host) {
                return Err(StreamLost::Malformed(Malformed::Value).into());
            }
            self.last = Some(record.host);
        }
        Ok(Some(records))
    }

    /// All that is left of it.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub async fn all(mut self) -> Result<Vec<HostRecord>, Fault> {
        let mut all = Vec::new();
        while let Some(records) = self.next().await? {
            all.extend(records);
        }
        Ok(all)
    }
}

fn broken(what: &str) -> Fault {
    Fault::new(wire::Code::BadRequest, what)
}

/// Says some of the hosts of a list. One frame: [`RECORDS`] at most.
///
/// # Errors
/// [`StreamLost::Write`].
pub async fn say(send: &mut SendStream, records: Vec<HostRecord>) -> Result<(), StreamLost> {
    debug_assert!(records.len() <= RECORDS, "a frame has a bound");
    stream::answer(send, &Answer::Hosts(records)).await
}

/// Says that a list is complete.
///
/// # Errors
/// [`StreamLost::Write`].
pub async fn end(send: &mut SendStream) -> Result<(), StreamLost> {
    stream::write_frame(send, Kind::End, &[]).await?;
    let _ = send.finish();
    Ok(())
}
