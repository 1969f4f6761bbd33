//! Who publishes the map, and what each outcome of a PUT means.
//!
//! A lease in the store says who should publish; it only saves work. What makes it safe is the compare-and-swap on the
//! map's head: whoever's PUT names the head that is there wins, and nobody else does. So two leaders waste work
//! and corrupt nothing, and a leader that slept for a minute in mid-publish is fenced when it wakes (FAULTS M3).
//!
//! A PUT whose outcome is unknown may have landed, may land later, or never. The leader reads the head and compares
//! its nonce (PROTOCOL 5.4): its own means won; the old head means that the very same bytes are put again, so that it
//! does not matter which of the two lands; any other means lost.
//!
//! Who takes over another's head first learns of every host: all rows of the store, and the hosts that the head itself
//! names ([`Want::Scan`]). Otherwise the first map of a new leader would leave out whoever spoke to its neighbours only, as
//! the simulator showed after an outage of the database.
//!
//! `T` is whatever the object store needs to name the head that was read (an ETag).

use wire::map::{FORMAT, Head, MapVersion, PageRef};

/// Milliseconds that a lease lives. The holder renews it at a third.
pub const LEASE_MS: u64 = 10_000;

const RETRY_MS_MIN: u64 = 100;
const RETRY_MS_MAX: u64 = 5_000;

/// What the leader wants done next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want<T> {
    /// Take or renew the lease; then [`Leader::handle_lease`].
    Lease,
    /// Read the head; then [`Leader::handle_head`].
    Head,
    /// Take the hosts of the head that was read and of all the store's rows; then [`Leader::handle_scan`].
    Scan,
    /// Publish if there is anything new ([`Leader::propose`]); else ask again later.
    Publish,
    /// Put this head in place of `expected` (`None`: there is none yet); then [`Leader::handle_put`].
    Put {
        /// The head.
        head: Head,
        /// What it replaces.
        expected: Option<T>,
    },
    /// Nothing before this time.
    Wait(u64),
}

/// How a PUT went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put<T> {
    /// It replaced the head; this names the new one.
    Won(T),
    /// The head was another.
    Lost,
    /// No answer, or one that does not tell.
    Unknown,
}

#[derive(Clone, Debug)]
struct Base<T> {
    version: MapVersion,
    token: Option<T>,
    mine: bool,
    /// When it was read.
    read_ms: u64,
    /// All hosts were looked for since.
    scanned: bool,
}

#[derive(Clone, Debug)]
enum Phase<T> {
    /// The head has to be read.
    Blind,
    /// The head is known, and nothing is on its way.
    Ready(Base<T>),
    /// This head is to be put, or being put.
    Putting(Base<T>, Head),
    /// Its PUT had no outcome: the head has to be read.
    Checking(Base<T>, Head),
}

/// One aggregator's part in publishing.
#[derive(Clone, Debug)]
pub struct Leader<T> {
    phase: Phase<T>,
    lease_until_ms: u64,
    lease_ask_ms: u64,
    not_before_ms: u64,
    retry_ms: u64,
    /// PUTs that were lost to another publisher.
    pub lost: u64,
    /// PUTs whose outcome was unknown at first.
    pub unknown: u64,
}

impl<T: Clone> Default for Leader<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Clone> Leader<T> {
    /// One that knows nothing yet.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            phase: Phase::Blind,
            lease_until_ms: 0,
            lease_ask_ms: 0,
            not_before_ms: 0,
            retry_ms: RETRY_MS_MIN,
            lost: 0,
            unknown: 0,
        }
    }

    /// Whether it holds the lease.
    #[must_use]
    pub const fn leads(&self, now_ms: u64) -> bool {
        now_ms < self.lease_until_ms
    }

    /// What is to be done now.
    pub fn poll(&mut self, now_ms: u64) -> Want<T> {
        if now_ms >= self.lease_ask_ms {
            return Want::Lease;
        }
        if now_ms < self.not_before_ms {
            return Want::Wait(self.not_before_ms.min(self.lease_ask_ms));
        }
        match &self.phase {
            // What was begun is brought to its end even without a lease: the swap is what makes it safe.
            Phase::Checking(..) => Want::Head,
            Phase::Putting(base, head) => {
                Want::Put { head: head.clone(), expected: base.token.clone() }
            }
            _ if !self.leads(now_ms) => Want::Wait(self.lease_ask_ms),
            Phase::Blind => Want::Head,
            Phase::Ready(base) if base.scanned => Want::Publish,
            Phase::Ready(_) => Want::Scan,
        }
    }

    /// The lease was asked for: `Some(true)` is ours, `Some(false)` another's, `None` no answer.
    pub fn handle_lease(&mut self, asked_ms: u64, now_ms: u64, held: Option<bool>) {
        match held {
            Some(true) => {
                // Counted from before it was asked for: we give it up before the store does.
                self.lease_until_ms = asked_ms + LEASE_MS;
                self.lease_ask_ms = now_ms + LEASE_MS / 3;
            }
            Some(false) => {
                self.lease_until_ms = 0;
                self.lease_ask_ms = now_ms + LEASE_MS / 3;
                if matches!(self.phase, Phase::Ready(_)) {
                    self.phase = Phase::Blind;
                }
            }
            // A store that is away takes no lease from anybody: who holds one goes on publishing, and the swap
            // decides if somebody else does so too.
            None => {
                if self.leads(now_ms) {
                    self.lease_until_ms = now_ms + LEASE_MS;
                }
                self.lease_ask_ms = now_ms + LEASE_MS / 10;
            }
        }
    }

    /// The head was read: `Ok(None)` there is none yet, `Err` no answer.
    pub fn handle_head(&mut self, now_ms: u64, read: Result<Option<(&Head, T)>, ()>) {
        let Ok(found) = read else {
            self.back_off(now_ms);
            return;
        };
        let phase = std::mem::replace(&mut self.phase, Phase::Blind);
        let base = Base {
            version: found.as_ref().map_or(MapVersion::default(), |(head, _)| head.version),
            token: found.as_ref().map(|(_, token)| token.clone()),
            mine: false,
            read_ms: now_ms,
            scanned: false,
        };
        let as_old = |old: Base<T>| Base { mine: old.mine, scanned: old.scanned, ..base.clone() };
        self.phase = match phase {
            Phase::Checking(_, ours) if found.is_some_and(|(head, _)| head.nonce == ours.nonce) => {
                self.succeed();
                Phase::Ready(Base { mine: true, scanned: true, ..base })
            }
            // Not landed: the same bytes again, against the same head.
            Phase::Checking(old, ours) if old.version == base.version => {
                self.back_off(now_ms);
                Phase::Putting(as_old(old), ours)
            }
            Phase::Checking(..) => {
                self.lose(now_ms);
                Phase::Ready(base)
            }
            Phase::Ready(old) | Phase::Putting(old, _) if old.version == base.version => {
                Phase::Ready(as_old(old))
            }
            _ => Phase::Ready(base),
        };
    }

    /// A look for all hosts that began at `began_ms` is complete: the hosts of the head that was read, and all rows.
    /// Returns whether that was late enough.
    pub fn handle_scan(&mut self, began_ms: u64) -> bool {
        let Phase::Ready(base) = &mut self.phase else { return false };
        base.scanned |= began_ms >= base.read_ms;
        base.scanned
    }

    /// Makes the next head of `pages`, to be put at the next poll. Nothing unless the last want was to publish.
    pub fn propose(
        &mut self,
        pages: Vec<PageRef>,
        count: u64,
        nonce: [u8; 16],
        created_ms: u64,
    ) -> Option<MapVersion> {
        let Phase::Ready(base) = &self.phase else { return None };
        let previous = base.version;
        let epoch = if base.mine { previous.epoch } else { previous.epoch + 1 };
        let version = MapVersion { epoch, version: previous.version + 1 };
        let head = Head { format: FORMAT, version, previous, nonce, created_ms, count, pages };
        self.phase = Phase::Putting(base.clone(), head);
        Some(version)
    }

    /// The head was put. Returns the version that this publisher now knows to be published by itself.
    pub fn handle_put(&mut self, now_ms: u64, put: Put<T>) -> Option<MapVersion> {
        let phase = std::mem::replace(&mut self.phase, Phase::Blind);
        let Phase::Putting(base, head) = phase else {
            self.phase = phase;
            return None;
        };
        match put {
            Put::Won(token) => {
                let version = head.version;
                self.phase = Phase::Ready(Base {
                    version,
                    token: Some(token),
                    mine: true,
                    read_ms: now_ms,
                    scanned: true,
                });
                self.succeed();
                Some(version)
            }
            // An earlier try of the same bytes may be what is there now: the nonce tells.
            Put::Lost => {
                self.phase = Phase::Checking(base, head);
                None
            }
            Put::Unknown => {
                self.unknown += 1;
                self.phase = Phase::Checking(base, head);
                self.back_off(now_ms);
                None
            }
        }
    }

    /// The version of the head that was last known.
    #[must_use]
    pub const fn version(&self) -> Option<MapVersion> {
        match &self.phase {
            Phase::Blind => None,
            Phase::Ready(base) | Phase::Putting(base, _) | Phase::Checking(base, _) => {
                Some(base.version)
            }
        }
    }

    /// Whether the head that is published is this publisher's own.
    #[must_use]
    pub const fn published_here(&self) -> bool {
        matches!(&self.phase, Phase::Ready(base) if base.mine)
    }

    const fn succeed(&mut self) {
        self.retry_ms = RETRY_MS_MIN;
        self.not_before_ms = 0;
    }

    fn lose(&mut self, now_ms: u64) {
        self.lost += 1;
        // Somebody else publishes: ask who should before trying again.
        self.lease_ask_ms = now_ms;
        self.back_off(now_ms);
    }

    fn back_off(&mut self, now_ms: u64) {
        self.not_before_ms = now_ms + self.retry_ms;
        self.retry_ms = (self.retry_ms * 2).min(RETRY_MS_MAX);
    }
}
