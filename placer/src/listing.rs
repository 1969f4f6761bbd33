//! All hosts of the fleet, from all aggregators that answer, each host once.
//!
//! Every aggregator knows every host: those that it hears itself at once, the others as of its last scan. So the lists
//! are merged, and of two records of one host the younger is said. Lists ascend by host (PROTOCOL 7.8), so that a merge
//! holds a frame of each and no more, however large the fleet is. An aggregator that breaks off is left out; the
//! others know its hosts too.

use std::{collections::VecDeque, net::SocketAddr, rc::Rc, time::Duration};

use futures::{StreamExt as _, stream::FuturesUnordered};
use quinn::{Connection, SendStream};
use wire::{
    Code, Fault,
    call::{Answer, Call, HostRecord},
    seal::Role,
};
use wire_net::{
    listing::{self, HostList, RECORDS},
    quic,
    stream::{self, StreamLost},
};

use crate::worker::Worker;

/// Longest wait for a first aggregator's list.
const FIRST: Duration = Duration::from_secs(20);
/// Longest wait for the others' after that: one that is dead must not hold the list up.
const OTHERS: Duration = Duration::from_secs(1);
/// Longest wait for the next frame of a list.
const NEXT: Duration = Duration::from_secs(10);

/// One aggregator's list.
struct Source {
    addr: SocketAddr,
    connection: Connection,
    list: HostList,
}

impl Worker {
    /// Answers with all hosts.
    pub(crate) async fn list_hosts(
        self: &Rc<Self>,
        send: &mut SendStream,
    ) -> Result<(), StreamLost> {
        let mut sources = match self.ask_for_hosts().await {
            Ok(sources) => sources,
            Err(fault) => {
                stream::answer(send, &Answer::Fault(fault)).await?;
                let _ = send.finish();
                return Ok(());
            }
        };
        let said = say_merged(&mut sources, send).await;
        for source in sources {
            source.connection.close(0u32.into(), b"done");
        }
        said
    }

    /// Answers for one host, as the aggregator that heard it last has it.
    pub(crate) async fn youngest(self: &Rc<Self>, call: &Call) -> Result<Answer, Fault> {
        let ask = async |addr: SocketAddr, connection: Connection| {
            let answer = stream::call(&connection, call).await;
            connection.close(0u32.into(), b"done");
            match answer? {
                Answer::Hosts(records) => Ok(records),
                _ => Err(Fault::new(Code::BadRequest, format!("{addr} did not answer by a host"))),
            }
        };
        let records = self.ask_all(ask).await?.into_iter().flatten();
        let youngest = records.min_by_key(|record| record.age_ms);
        Ok(Answer::Hosts(youngest.into_iter().collect()))
    }

    /// The lists of those who answer.
    async fn ask_for_hosts(self: &Rc<Self>) -> Result<Vec<Source>, Fault> {
        self.ask_all(async |addr, connection| {
            let list = HostList::open(&connection).await?;
            Ok(Source { addr, connection, list })
        })
        .await
    }

    /// Asks all aggregators at once, and gives back what those said who did not fail.
    async fn ask_all<T>(
        self: &Rc<Self>,
        ask: impl AsyncFn(SocketAddr, Connection) -> Result<T, Fault>,
    ) -> Result<Vec<T>, Fault> {
        let ask = async |addr: SocketAddr| {
            let endpoint = self.pool.endpoint(addr)?;
            ask(addr, quic::connect(&endpoint, addr, Role::Aggregator).await?).await
        };
        let mut asked: FuturesUnordered<_> =
            self.shared.config.admin.iter().map(|addr| ask(*addr)).collect();
        let (mut sources, mut said_no) = (Vec::new(), false);
        let mut last = Fault::new(Code::Unsupported, "this placer knows no aggregator's `admin`");
        loop {
            let patience = if sources.is_empty() { FIRST } else { OTHERS };
            match tokio::time::timeout(patience, asked.next()).await {
                Ok(Some(Ok(source))) => sources.push(source),
                // What an aggregator says about the question counts more than that another one is dead.
                Ok(Some(Err(fault))) if fault.code == Code::Unreachable && said_no => {}
                Ok(Some(Err(fault))) => {
                    said_no = fault.code != Code::Unreachable;
                    last = fault;
                }
                Ok(None) => break,
                Err(_) if sources.is_empty() => {
                    last = Fault::new(Code::Unreachable, "no aggregator answered within 20 s");
                    break;
                }
                Err(_) => break,
            }
        }
        if sources.is_empty() { Err(last) } else { Ok(sources) }
    }
}

async fn say_merged(sources: &mut [Source], send: &mut SendStream) -> Result<(), StreamLost> {
    let mut merge = Merge::of(sources.len());
    let (mut out, mut said) = (Vec::new(), false);
    loop {
        while let Some(at) = merge.wants() {
            let next = tokio::time::timeout(NEXT, sources[at].list.next()).await;
            match next {
                Ok(Ok(Some(records))) => merge.take(at, records),
                Ok(Ok(None)) => merge.end(at, true),
                Ok(Err(_)) | Err(_) => {
                    tracing::warn!(addr = %sources[at].addr, "an aggregator's list of hosts broke off");
                    merge.end(at, false);
                }
            }
        }
        // All that broke off: what was said is no whole list, and must not end as one.
        if merge.is_broken() {
            return Err(StreamLost::Truncated);
        }
        let more = merge.pop(RECORDS - out.len(), &mut out);
        if out.len() == RECORDS || (!more && (!out.is_empty() || !said)) {
            listing::say(send, std::mem::take(&mut out)).await?;
            said = true;
        }
        if !more {
            return listing::end(send).await;
        }
    }
}

/// Lists that ascend by host, made into one.
struct Merge {
    lists: Vec<Part>,
}

#[derive(Default)]
struct Part {
    records: VecDeque<HostRecord>,
    ended: bool,
    whole: bool,
}

impl Merge {
    fn of(lists: usize) -> Self {
        Self { lists: (0..lists).map(|_| Part::default()).collect() }
    }

    /// A list whose next records must be known before anything else is.
    fn wants(&self) -> Option<usize> {
        self.lists.iter().position(|part| part.records.is_empty() && !part.ended)
    }

    fn take(&mut self, at: usize, records: Vec<HostRecord>) {
        self.lists[at].records.extend(records);
    }

    fn end(&mut self, at: usize, whole: bool) {
        (self.lists[at].ended, self.lists[at].whole) = (true, whole);
    }

    /// Whether every list has ended, and none as it should.
    fn is_broken(&self) -> bool {
        self.lists.iter().all(|part| part.ended && !part.whole)
    }

    /// Moves up to `max` hosts over, as far as they are certain; whether there may be more.
    fn pop(&mut self, max: usize, out: &mut Vec<HostRecord>) -> bool {
        for _ in 0..max {
            if self.wants().is_some() {
                return true;
            }
            let heads = self.lists.iter().filter_map(|part| part.records.front());
            let Some(host) = heads.map(|record| record.host).min() else { return false };
            let same = self.lists.iter_mut().filter_map(|part| {
                let first = part.records.front()?.host == host;
                first.then(|| part.records.pop_front())?
            });
            out.extend(same.min_by_key(|record| record.age_ms));
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use wire::{CapacityWord, HostId};

    use super::*;

    fn record(host: u64, age_ms: u64) -> HostRecord {
        HostRecord {
            host: HostId(host),
            addr: String::new(),
            state: "alive".to_owned(),
            word: CapacityWord(0),
            total: [0; 4],
            running: 0,
            age_ms,
            message: String::new(),
        }
    }

    proptest! {
        /// PROTOCOL 7.8: "each host once, as the one that heard it last has it".
        #[test]
        fn each_host_is_said_once_as_the_last_to_hear_it_has_it(
            lists in proptest::collection::vec(
                proptest::collection::btree_map(0u64..60, 0u64..1_000, 0..50), 1..4),
            frame in 1usize..9,
        ) {
            let mut wanted = std::collections::BTreeMap::new();
            for (host, age_ms) in lists.iter().flatten() {
                let best = wanted.entry(*host).or_insert(*age_ms);
                *best = (*best).min(*age_ms);
            }
            let mut merge = Merge::of(lists.len());
            let mut left: Vec<Vec<_>> = lists
                .iter()
                .map(|list| list.iter().map(|(host, age_ms)| record(*host, *age_ms)).collect())
                .collect();
            let mut out = Vec::new();
            loop {
                while let Some(at) = merge.wants() {
                    let len = frame.min(left[at].len());
                    let part: Vec<_> = left[at].drain(..len).collect();
                    if part.is_empty() { merge.end(at, true) } else { merge.take(at, part) }
                }
                if !merge.pop(frame, &mut out) {
                    break;
                }
            }
            let said: Vec<_> = out.iter().map(|record| (record.host.0, record.age_ms)).collect();
            prop_assert_eq!(said, wanted.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_list_is_whole_if_one_of_them_is() {
        let mut merge = Merge::of(2);
        merge.end(0, false);
        assert!(!merge.is_broken());
        merge.end(1, true);
        assert!(!merge.is_broken());
        merge.end(1, false);
        assert!(merge.is_broken());
    }
}
