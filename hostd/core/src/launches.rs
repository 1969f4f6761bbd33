//! What a host remembers of launch ids, so that the same launch is the same launch however often it is sent.
//!
//! PROTOCOL 6.1, 6.2, 6.6. An id is remembered while its sandbox lives and for [`REMEMBER_MS`] after that; never
//! less: at the bound, new launches are refused. Refusals of named launches are remembered for `BUDGET_MS_MAX`
//! (PROTOCOL 6.12), so that all placers go on to the same next home.

use std::collections::{HashMap, VecDeque};

use wire::{
    Code, Fault, LaunchId,
    hash::Seeded,
    launch::Started,
    limits::BUDGET_MS_MAX,
    rows::{Place, Rows},
};

use crate::limits::{LAUNCHES_MAX, REFUSALS_MAX, REMEMBER_MS};

/// The first half of the BLAKE3 hash of a request's bytes: says whether two are the same.
pub type BodyHash = [u8; 16];

/// What became of a launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Admitted; its box is being made.
    Claimed {
        /// Its sandbox.
        local: u64,
    },
    /// It was started, and may have ended since.
    Started(Started),
    /// It was tried and did not work.
    Failed(Box<Fault>),
    /// It was cancelled, perhaps before it came.
    Cancelled,
}

#[derive(Debug)]
struct Launch {
    body: BodyHash,
    fate: Fate,
    /// When it may be forgotten, if it is in the queue: while its sandbox lives, it is not.
    forget_at_ms: u64,
}

/// The launches that a host knows.
#[derive(Debug)]
pub struct Launches {
    /// In its queue are those whose time runs, in the order in which it runs out: each has the same time.
    known: Rows<Launch>,
    refused: HashMap<LaunchId, Code, Seeded>,
    refusals: VecDeque<(u64, LaunchId)>,
    launches_max: usize,
}

/// What is known of an id that comes again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Known<'a> {
    /// The same launch: this became of it.
    Same(&'a Fate),
    /// Another body under the same id.
    Conflict,
    /// It was refused before for this reason, and whoever asked has gone elsewhere.
    Refused(Code),
    /// Never seen.
    New,
}

impl Launches {
    /// None known yet.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            known: Rows::new(seed),
            refused: HashMap::with_hasher(Seeded::new(seed)),
            refusals: VecDeque::new(),
            launches_max: LAUNCHES_MAX,
        }
    }

    /// Lowers the bound, for tests and small machines.
    pub fn set_max(&mut self, launches_max: usize) {
        self.launches_max = launches_max.min(LAUNCHES_MAX);
    }

    /// What is known of an id.
    #[must_use]
    pub fn look(&self, id: &LaunchId, body: &BodyHash) -> Known<'_> {
        match self.launch(id) {
            // A cancel may come before what it cancels, so that it has no body to compare.
            Some(launch) if launch.fate == Fate::Cancelled => Known::Same(&launch.fate),
            Some(launch) if launch.body == *body => Known::Same(&launch.fate),
            Some(_) => Known::Conflict,
            None => self.refused.get(id).map_or(Known::New, |code| Known::Refused(*code)),
        }
    }

    /// An id will be looked at soon.
    pub fn warm(&self, id: &LaunchId) {
        self.known.warm(id);
    }

    /// Whether another one can be remembered.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.known.len() < self.launches_max
    }

    /// What became of an id.
    #[must_use]
    pub fn fate(&self, id: &LaunchId) -> Option<&Fate> {
        self.launch(id).map(|launch| &launch.fate)
    }

    fn launch(&self, id: &LaunchId) -> Option<&Launch> {
        self.known.get(self.known.find(id)?)
    }

    /// The hash of a launch's request.
    #[must_use]
    pub fn body(&self, id: &LaunchId) -> Option<BodyHash> {
        self.launch(id).map(|launch| launch.body)
    }

    /// Remembers a launch for as long as it lives. Where it is remembered holds until it is released.
    pub fn remember(&mut self, id: LaunchId, body: BodyHash, fate: Fate) -> Place {
        if let Some(place) = self.known.find(&id) {
            self.known.remove(place);
        }
        self.known.insert(id, Launch { body, fate, forget_at_ms: 0 })
    }

    /// What became of a launch that was not released yet.
    #[must_use]
    pub fn fate_at(&self, place: Place) -> Option<&Fate> {
        self.known.get(place).map(|launch| &launch.fate)
    }

    /// Changes what became of it.
    pub fn settle(&mut self, place: Place, fate: Fate) {
        if let Some(launch) = self.known.get_mut(place) {
            launch.fate = fate;
        }
    }

    /// Where a launch is remembered.
    #[must_use]
    pub fn place(&self, id: &LaunchId) -> Option<Place> {
        self.known.find(id)
    }

    /// Nothing was done for it after all: it was never known.
    pub fn drop_claim(&mut self, place: Place) {
        self.known.remove(place);
    }

    /// Its sandbox is gone or never came: from now on its time runs. Again starts it anew.
    pub fn release(&mut self, now_ms: u64, place: Place) {
        if let Some(launch) = self.known.get_mut(place) {
            launch.forget_at_ms = now_ms + REMEMBER_MS;
            self.known.line_up(place);
        }
    }

    /// Remembers that a named launch was refused. `false`: there is no room, and it must be asked again.
    pub fn refuse(&mut self, now_ms: u64, id: LaunchId, code: Code) -> bool {
        if self.refused.len() >= REFUSALS_MAX && !self.refused.contains_key(&id) {
            return false;
        }
        if self.refused.insert(id, code).is_none() {
            self.refusals.push_back((now_ms + u64::from(BUDGET_MS_MAX), id));
        }
        true
    }

    /// Forgets what is due.
    pub fn forget(&mut self, now_ms: u64) {
        while let Some((at_ms, place)) = self.first()
            && at_ms <= now_ms
        {
            self.known.remove(place);
        }
        while let Some(&(at_ms, id)) = self.refusals.front()
            && at_ms <= now_ms
        {
            self.refusals.pop_front();
            self.refused.remove(&id);
        }
    }

    /// When something is next due to be forgotten.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<u64> {
        let refusal = self.refusals.front().map(|(at_ms, _)| *at_ms);
        self.first().map(|(at_ms, _)| at_ms).into_iter().chain(refusal).min()
    }

    /// The launch that is forgotten next, and when.
    fn first(&self) -> Option<(u64, Place)> {
        let place = self.known.oldest()?;
        Some((self.known.get(place)?.forget_at_ms, place))
    }

    /// Ids that are remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.known.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: LaunchId = LaunchId([1; 16]);

    #[test]
    fn an_id_is_known_until_its_time_has_run() {
        let mut launches = Launches::new(1);
        assert_eq!(launches.look(&ID, &[1; 16]), Known::New);
        let place = launches.remember(ID, [1; 16], Fate::Claimed { local: 7 });
        launches.forget(u64::MAX);
        assert_eq!(launches.look(&ID, &[1; 16]), Known::Same(&Fate::Claimed { local: 7 }));
        assert_eq!(launches.look(&ID, &[2; 16]), Known::Conflict);
        launches.release(1_000, place);
        launches.forget(1_000 + REMEMBER_MS - 1);
        assert_eq!(launches.look(&ID, &[2; 16]), Known::Conflict);
        launches.forget(1_000 + REMEMBER_MS);
        assert!(launches.is_empty());
    }

    #[test]
    fn a_named_refusal_is_known_for_the_longest_budget() {
        let mut launches = Launches::new(1);
        launches.refuse(100, ID, Code::Draining);
        launches.forget(100 + u64::from(BUDGET_MS_MAX) - 1);
        assert_eq!(launches.look(&ID, &[1; 16]), Known::Refused(Code::Draining));
        launches.forget(100 + u64::from(BUDGET_MS_MAX));
        assert_eq!(launches.look(&ID, &[1; 16]), Known::New);
        assert!(launches.refused.is_empty() && launches.refusals.is_empty());
    }

    #[test]
    fn refusals_are_bounded_and_none_is_forgotten_early() {
        let mut launches = Launches::new(1);
        for n in 0..REFUSALS_MAX as u128 {
            assert!(launches.refuse(0, LaunchId(n.to_le_bytes()), Code::NoCapacity));
        }
        assert!(!launches.refuse(0, LaunchId([0xff; 16]), Code::NoCapacity));
        assert!(launches.refuse(0, LaunchId([0; 16]), Code::NoCapacity), "again");
        assert_eq!(launches.refusals.len(), REFUSALS_MAX);
    }
}
