//! Launches by id: those under way, and those that ended a moment ago.
//!
//! The same id again, over whatever connection, joins the launch under way or gets the same answer; it never starts a
//! second one. A launch of unknown outcome stays pinned to its host, and a cancelled one stays cancelled. What failed is
//! forgotten at once, so that it may be tried again. The table is bounded: each thread drops its oldest ended entries, and a launch dropped here is
//! still known to its host.

use std::{
    cell::RefCell,
    collections::{VecDeque, hash_map::RandomState},
    hash::BuildHasher,
    sync::Arc,
};

use dashmap::{DashMap, Entry};
use tokio::sync::oneshot;
use wire::{
    HostId, LaunchId,
    hash::Seeded,
    launch::{LaunchReply, Started},
};

/// Repetitions that wait for one launch; more are told to come again.
const JOINED_MAX: usize = 1_024;

/// Tells one body from another: 64 bits under a key that only this process has, so that nobody can look for two that agree.
pub(crate) type BodyDigest = u64;

#[derive(Debug)]
struct Launch {
    digest: BodyDigest,
    /// Hash of the tenant's name: others do not find it.
    tenant: u64,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    UnderWay(Vec<oneshot::Sender<LaunchReply>>),
    Started(Started),
    /// It may run there or not: no other host may get it.
    Pinned(HostId),
    Cancelled,
}

/// What is known of an id that comes in.
#[derive(Debug)]
pub(crate) enum Entered {
    /// Nothing: it is under way now, and ends with [`KnownHere::leave`].
    New,
    /// It is under way: the reply comes here. An error means that it was given up with its thread.
    Joined(oneshot::Receiver<LaunchReply>),
    /// It runs.
    Started(Started),
    /// Ask this host only. It is under way now, and ends with [`KnownHere::leave`].
    Pinned(HostId),
    /// It was cancelled.
    Cancelled,
    /// Another body has this id.
    Conflict,
    /// Too many wait for it.
    Crowded,
    /// Nothing, and nothing was asked to be started.
    Nothing,
}

/// What is known of a launch that is to be cancelled.
#[derive(Debug)]
pub(crate) enum Found {
    Joined(oneshot::Receiver<LaunchReply>),
    At(HostId),
    Cancelled,
    Nothing,
}

/// How a launch ended, as far as it is remembered.
#[derive(Debug)]
pub(crate) enum Left {
    Started(Started),
    Failed,
    Pinned(HostId),
}

/// All threads' launches by id.
#[derive(Debug)]
pub(crate) struct Known {
    launches: DashMap<LaunchId, Launch, Seeded>,
    /// For names and bodies, which strangers choose at any length.
    names: RandomState,
}

impl Default for Known {
    fn default() -> Self {
        let names = RandomState::new();
        let seed = names.hash_one("ids");
        Self { launches: DashMap::with_hasher(Seeded::new(seed)), names }
    }
}

/// One thread's door to them: it knows which entries it must drop one day.
#[derive(Debug)]
pub(crate) struct KnownHere {
    all: Arc<Known>,
    ended: RefCell<VecDeque<LaunchId>>,
    ended_max: usize,
}

impl KnownHere {
    /// A thread's door; it keeps `ended_max` launches that have ended.
    pub(crate) fn new(all: Arc<Known>, ended_max: usize) -> Self {
        Self { all, ended: RefCell::default(), ended_max }
    }

    /// A launch comes in; with `start`, one that is not known is under way from now on.
    pub(crate) fn enter(
        &self,
        id: LaunchId,
        tenant: u64,
        digest: BodyDigest,
        start: bool,
    ) -> Entered {
        match self.all.launches.entry(id) {
            Entry::Vacant(vacant) => {
                if !start {
                    return Entered::Nothing;
                }
                vacant.insert(Launch { digest, tenant, stage: Stage::UnderWay(Vec::new()) });
                Entered::New
            }
            Entry::Occupied(mut occupied) => {
                let launch = occupied.get_mut();
                if launch.digest != digest {
                    return Entered::Conflict;
                }
                match &mut launch.stage {
                    Stage::Started(started) => Entered::Started(*started),
                    Stage::Cancelled => Entered::Cancelled,
                    Stage::Pinned(host) => {
                        let host = *host;
                        launch.stage = Stage::UnderWay(Vec::new());
                        Entered::Pinned(host)
                    }
                    Stage::UnderWay(joined) if joined.len() >= JOINED_MAX => Entered::Crowded,
                    Stage::UnderWay(joined) => {
                        let (sender, receiver) = oneshot::channel();
                        joined.push(sender);
                        Entered::Joined(receiver)
                    }
                }
            }
        }
    }

    /// A launch that was under way has ended; those who joined get its reply.
    pub(crate) fn leave(&self, id: LaunchId, left: Left, reply: &LaunchReply) {
        let remembered = match left {
            Left::Started(started) => Some(Stage::Started(started)),
            Left::Pinned(host) => Some(Stage::Pinned(host)),
            Left::Failed => None,
        };
        let kept = remembered.is_some();
        // No guard is held beyond this: dropping an old entry below may want the same shard.
        let stage = match remembered {
            Some(stage) => {
                let Some(mut launch) = self.all.launches.get_mut(&id) else { return };
                std::mem::replace(&mut launch.stage, stage)
            }
            None => match self.all.launches.remove(&id) {
                Some((_, launch)) => launch.stage,
                None => return,
            },
        };
        if let Stage::UnderWay(joined) = stage {
            for waiting in joined {
                // Who waited may have gone.
                let _ = waiting.send(reply.clone());
            }
        }
        if kept {
            self.remember(id);
        }
    }

    /// As [`KnownHere::leave`], for a launch that runs.
    pub(crate) fn leave_started(&self, id: LaunchId, started: Started) {
        self.leave(id, Left::Started(started), &LaunchReply::Started(started));
    }

    /// What a tenant's name is known by.
    pub(crate) fn hash(&self, tenant: &str) -> u64 {
        self.all.names.hash_one(tenant)
    }

    /// The digest of a request's bytes.
    pub(crate) fn digest(&self, request: &[u8]) -> BodyDigest {
        self.all.names.hash_one(request)
    }

    /// Looks for a launch that `tenant` (an operator, if empty) wants to cancel.
    pub(crate) fn find(&self, id: LaunchId, tenant: &str) -> Found {
        let Some(mut launch) = self.all.launches.get_mut(&id) else { return Found::Nothing };
        if !tenant.is_empty() && launch.tenant != self.hash(tenant) {
            return Found::Nothing;
        }
        match &mut launch.stage {
            Stage::UnderWay(joined) => {
                let (sender, receiver) = oneshot::channel();
                joined.push(sender);
                Found::Joined(receiver)
            }
            Stage::Started(started) => Found::At(started.sandbox.host),
            Stage::Pinned(host) => Found::At(*host),
            Stage::Cancelled => Found::Cancelled,
        }
    }

    /// A launch was cancelled where it was: the same id again is told so.
    pub(crate) fn cancelled(&self, id: LaunchId) {
        if let Some(mut launch) = self.all.launches.get_mut(&id)
            && !matches!(launch.stage, Stage::UnderWay(_))
        {
            launch.stage = Stage::Cancelled;
        }
    }

    fn remember(&self, id: LaunchId) {
        let mut ended = self.ended.borrow_mut();
        ended.push_back(id);
        if ended.len() > self.ended_max
            && let Some(oldest) = ended.pop_front()
        {
            let over = |_: &_, launch: &Launch| !matches!(launch.stage, Stage::UnderWay(_));
            self.all.launches.remove_if(&oldest, over);
        }
    }
}

#[cfg(test)]
mod tests {
    use wire::{Code, Fault};

    use super::*;

    const ID: LaunchId = LaunchId([7; 16]);
    const ACME: u64 = 5;

    fn known(ended_max: usize) -> KnownHere {
        KnownHere::new(Arc::default(), ended_max)
    }

    fn failed() -> LaunchReply {
        LaunchReply::Failed(Fault::new(Code::NoCapacity, "full"))
    }

    #[test]
    fn a_repeated_id_joins_and_gets_the_same_reply() {
        let known = known(8);
        assert!(matches!(known.enter(ID, ACME, 1, true), Entered::New));
        assert!(matches!(known.enter(ID, ACME, 2, true), Entered::Conflict));
        let Entered::Joined(mut joined) = known.enter(ID, ACME, 1, false) else { panic!() };
        known.leave(ID, Left::Failed, &failed());
        assert_eq!(joined.try_recv().unwrap(), failed());
        assert!(matches!(known.enter(ID, ACME, 2, true), Entered::New), "what failed is forgotten");
    }

    #[test]
    fn a_launch_that_nobody_knows_is_not_started_by_asking() {
        let known = known(8);
        assert!(matches!(known.enter(ID, ACME, 1, false), Entered::Nothing));
        assert!(matches!(known.enter(ID, ACME, 1, true), Entered::New));
    }

    #[test]
    fn an_unknown_launch_stays_on_its_host() {
        let known = known(8);
        assert!(matches!(known.enter(ID, ACME, 1, true), Entered::New));
        known.leave(ID, Left::Pinned(HostId(3)), &failed());
        assert!(matches!(known.enter(ID, ACME, 1, false), Entered::Pinned(HostId(3))));
        assert!(matches!(known.enter(ID, ACME, 1, true), Entered::Joined(_)));
    }

    #[test]
    fn a_cancelled_launch_is_told_so_and_others_do_not_find_it() {
        let known = known(8);
        assert!(matches!(known.enter(ID, known.hash("acme"), 1, true), Entered::New));
        known.leave(ID, Left::Pinned(HostId(3)), &failed());
        assert!(matches!(known.find(ID, "other"), Found::Nothing));
        assert!(matches!(known.find(ID, ""), Found::At(HostId(3))));
        assert!(matches!(known.find(ID, "acme"), Found::At(HostId(3))));
        known.cancelled(ID);
        assert!(matches!(known.enter(ID, ACME, 1, true), Entered::Cancelled));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let known = known(2);
        // More than there are shards, so that some are met twice.
        for at in 0..=u8::MAX {
            let id = LaunchId([at; 16]);
            assert!(matches!(known.enter(id, ACME, 1, true), Entered::New));
            known.leave(id, Left::Pinned(HostId(1)), &failed());
        }
        assert_eq!(known.all.launches.len(), 2);
    }
}
