//! Launches by id: those under way, and those that ended a moment ago.
//!
//! The same id again, over whatever connection, joins the launch under way or gets the same answer; it never starts a
//! second one. A launch of unknown outcome stays pinned to its host, and a cancelled one stays cancelled. What failed is
//! forgotten at once, so that it may be tried again. The table is bounded: it lies in shards, each of which drops its oldest ended
//! launches, and a launch dropped here is still known to its host.
//!
//! A launch costs a few cache misses here and little else, so that its row is looked up once: whoever entered it holds its [`Seat`].

use std::{
    collections::hash_map::RandomState,
    hash::BuildHasher,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crossbeam::utils::CachePadded;
use tokio::sync::oneshot;
use wire::{
    HostId, LaunchId,
    hash::Seeded,
    launch::{LaunchReply, Started},
    rows::{Place, Rows},
};

/// Shards: so many that two threads seldom meet in one.
const SHARDS: usize = 64;

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
    /// Nothing: it is under way now, and ends with [`Known::leave`].
    New(Seat),
    /// It is under way: the reply comes here. An error means that it was given up with its thread.
    Joined(oneshot::Receiver<LaunchReply>),
    /// It runs.
    Started(Started),
    /// Ask this host only. It is under way now, and ends with [`Known::leave`].
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

/// Where a launch under way is known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seat {
    shard: usize,
    place: Place,
}

/// Launches whose ids fall into one shard. Those that have ended are in the rows' queue.
#[derive(Debug)]
struct Shard {
    launches: Rows<Launch>,
    ended: usize,
}

/// All threads' launches by id.
#[derive(Debug)]
pub(crate) struct Known {
    shards: Box<[CachePadded<Mutex<Shard>>]>,
    /// Draws the shard; not the seed of the shards themselves.
    draw: Seeded,
    /// For names and bodies, which strangers choose at any length.
    names: RandomState,
    /// Ended launches that a shard keeps.
    ended_max: usize,
}

impl Known {
    /// Keeps some `ended_max` launches that have ended, at least one a shard.
    pub(crate) fn new(ended_max: usize) -> Self {
        let names = RandomState::new();
        let shard = |at: usize| {
            let launches = Rows::new(names.hash_one(at));
            CachePadded::new(Mutex::new(Shard { launches, ended: 0 }))
        };
        Self {
            shards: (0..SHARDS).map(shard).collect(),
            draw: Seeded::new(names.hash_one("ids")),
            names,
            ended_max: ended_max.div_ceil(SHARDS),
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "a remainder of 64")]
    fn shard_of(&self, id: &LaunchId) -> usize {
        (self.draw.hash_one(id) % SHARDS as u64) as usize
    }

    fn shard(&self, at: usize) -> MutexGuard<'_, Shard> {
        // Nothing panics under the lock.
        self.shards[at].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A launch will come in soon.
    pub(crate) fn warm(&self, id: &LaunchId) {
        self.shard(self.shard_of(id)).launches.warm(id);
    }

    /// A launch comes in; with `start`, one that is not known is under way from now on.
    pub(crate) fn enter(
        &self,
        id: LaunchId,
        tenant: u64,
        digest: BodyDigest,
        start: bool,
    ) -> Entered {
        let at = self.shard_of(&id);
        let shard = &mut *self.shard(at);
        let Some(place) = shard.launches.find(&id) else {
            if !start {
                return Entered::Nothing;
            }
            // Here and not when one ends: its room is this launch's, and is in the cache now.
            if shard.ended >= self.ended_max {
                shard.drop_oldest();
            }
            let launch = Launch { digest, tenant, stage: Stage::UnderWay(Vec::new()) };
            return Entered::New(Seat { shard: at, place: shard.launches.insert(id, launch) });
        };
        let Some(launch) = shard.launches.get_mut(place) else { return Entered::Nothing };
        if launch.digest != digest {
            return Entered::Conflict;
        }
        match &mut launch.stage {
            Stage::Started(started) => Entered::Started(*started),
            Stage::Cancelled => Entered::Cancelled,
            Stage::Pinned(host) => {
                let host = *host;
                launch.stage = Stage::UnderWay(Vec::new());
                shard.launches.step_out(place);
                shard.ended -= 1;
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

    /// A launch that was under way has ended; those who joined get its reply.
    pub(crate) fn leave(&self, id: LaunchId, left: Left, reply: &LaunchReply) {
        let remembered = match left {
            Left::Started(started) => Some(Stage::Started(started)),
            Left::Pinned(host) => Some(Stage::Pinned(host)),
            Left::Failed => None,
        };
        let shard = self.shard_of(&id);
        let place = self.shard(shard).launches.find(&id);
        let Some(place) = place else { return };
        for waiting in self.end(Seat { shard, place }, remembered) {
            // Who waited may have gone.
            let _ = waiting.send(reply.clone());
        }
    }

    /// As [`Known::leave`], for a launch that runs and was new.
    pub(crate) fn leave_started(&self, seat: Seat, started: Started) {
        for waiting in self.end(seat, Some(Stage::Started(started))) {
            let _ = waiting.send(LaunchReply::Started(started));
        }
    }

    /// Ends what is under way; returns who joined.
    fn end(&self, seat: Seat, stage: Option<Stage>) -> Vec<oneshot::Sender<LaunchReply>> {
        let Seat { shard, place } = seat;
        let shard = &mut *self.shard(shard);
        let Some(launch) = shard.launches.get_mut(place) else { return Vec::new() };
        let Stage::UnderWay(joined) = &mut launch.stage else { return Vec::new() };
        let joined = std::mem::take(joined);
        match stage {
            Some(stage) => {
                launch.stage = stage;
                shard.launches.line_up(place);
                shard.ended += 1;
            }
            None => {
                shard.launches.remove(place);
            }
        }
        joined
    }

    /// What a tenant's name is known by.
    pub(crate) fn hash(&self, tenant: &str) -> u64 {
        self.names.hash_one(tenant)
    }

    /// The digest of a request's bytes.
    pub(crate) fn digest(&self, request: &[u8]) -> BodyDigest {
        self.names.hash_one(request)
    }

    /// Looks for a launch that `tenant` (an operator, if empty) wants to cancel.
    pub(crate) fn find(&self, id: LaunchId, tenant: &str) -> Found {
        let shard = &mut *self.shard(self.shard_of(&id));
        let place = shard.launches.find(&id);
        let Some(launch) = place.and_then(|place| shard.launches.get_mut(place)) else {
            return Found::Nothing;
        };
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
        let shard = &mut *self.shard(self.shard_of(&id));
        let place = shard.launches.find(&id);
        if let Some(launch) = place.and_then(|place| shard.launches.get_mut(place))
            && !matches!(launch.stage, Stage::UnderWay(_))
        {
            launch.stage = Stage::Cancelled;
        }
    }
}

impl Shard {
    fn drop_oldest(&mut self) {
        if let Some(oldest) = self.launches.oldest() {
            self.launches.remove(oldest);
            self.ended -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use wire::{Code, Fault};

    use super::*;

    const ID: LaunchId = LaunchId([7; 16]);
    const ACME: u64 = 5;

    fn failed() -> LaunchReply {
        LaunchReply::Failed(Fault::new(Code::NoCapacity, "full"))
    }

    #[test]
    fn a_repeated_id_joins_and_gets_the_same_reply() {
        let known = Known::new(8);
        assert!(matches!(known.enter(ID, ACME, 1, true), Entered::New(_)));
        assert!(matches!(known.enter(ID, ACME, 2, true), Entered::Conflict));
        let Entered::Joined(mut joined) = known.enter(ID, ACME, 1, false) else { panic!() };
        known.leave(ID, Left::Failed, &failed());
        assert_eq!(joined.try_recv().unwrap(), failed());
        assert!(
            matches!(known.enter(ID, ACME, 2, true), Entered::New(_)),
            "what failed is forgotten"
        );
    }

    #[test]
    fn a_launch_that_nobody_knows_is_not_started_by_asking() {
        let known = Known::new(8);
        assert!(matches!(known.enter(ID, ACME, 1, false), Entered::Nothing));
        assert!(matches!(known.enter(ID, ACME, 1, true), Entered::New(_)));
    }

    #[test]
    fn an_unknown_launch_stays_on_its_host() {
        let known = Known::new(8);
        assert!(matches!(known.enter(ID, ACME, 1, true), Entered::New(_)));
        known.leave(ID, Left::Pinned(HostId(3)), &failed());
        assert!(matches!(known.enter(ID, ACME, 1, false), Entered::Pinned(HostId(3))));
        assert!(matches!(known.enter(ID, ACME, 1, true), Entered::Joined(_)));
    }

    #[test]
    fn a_cancelled_launch_is_told_so_and_others_do_not_find_it() {
        let known = Known::new(8);
        assert!(matches!(known.enter(ID, known.hash("acme"), 1, true), Entered::New(_)));
        known.leave(ID, Left::Pinned(HostId(3)), &failed());
        assert!(matches!(known.find(ID, "other"), Found::Nothing));
        assert!(matches!(known.find(ID, ""), Found::At(HostId(3))));
        assert!(matches!(known.find(ID, "acme"), Found::At(HostId(3))));
        known.cancelled(ID);
        assert!(matches!(known.enter(ID, ACME, 1, true), Entered::Cancelled));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let known = Known::new(2 * SHARDS);
        let id = |n: u16| LaunchId(u128::from(n).to_le_bytes());
        for n in 0..10_000 {
            assert!(matches!(known.enter(id(n), ACME, 1, true), Entered::New(_)));
            known.leave(id(n), Left::Pinned(HostId(1)), &failed());
        }
        let kept = |n: &u16| matches!(known.find(id(*n), ""), Found::At(_));
        assert_eq!((0..10_000).filter(kept).count(), 2 * SHARDS);
        assert!(kept(&9_999), "the newest stay");
        assert!((0..5_000).all(|n| !kept(&n)), "the oldest go");
    }

    #[test]
    fn a_launch_that_is_under_way_again_is_not_dropped() {
        let known = Known::new(1);
        assert!(matches!(known.enter(ID, ACME, 1, true), Entered::New(_)));
        known.leave(ID, Left::Pinned(HostId(3)), &failed());
        assert!(matches!(known.enter(ID, ACME, 1, true), Entered::Pinned(_)));
        for n in 0..1_000u128 {
            let other = LaunchId(n.to_le_bytes());
            let Entered::New(seat) = known.enter(other, ACME, 1, true) else { panic!() };
            known.end(seat, Some(Stage::Pinned(HostId(1))));
        }
        assert!(matches!(known.enter(ID, ACME, 1, true), Entered::Joined(_)));
    }
}
