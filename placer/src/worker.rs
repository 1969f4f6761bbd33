//! One dispatching thread: what it owns, and what it looks after every tenth of a second.
//!
//! All of it belongs to one thread with a runtime of its own, so that it is `Rc` and `RefCell`: threads share the published map
//! and table, which nobody waits for, the table of known launches, and bounded queues.

use std::{
    cell::{Cell, RefCell},
    rc::{Rc, Weak},
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam::queue::ArrayQueue;
use heartbeat::store::Store;
use placer_core::{Dispatch, Fair, Micros, Reader, Report};
use rand::{RngCore, SeedableRng, rngs::SmallRng};
use tokio::sync::Notify;
use wire::{HostId, limits::LANE_LAUNCHES_MAX, map::HostAddr};
use wire_net::tls::Identity;

use crate::{
    Config, Map, Table,
    direct::{Arrived, Directs, TICK_US},
    fleet::Fleet,
    known::Known,
    metrics::WorkerMetrics,
    pool::{Deliver, Pool},
};

/// How often a thread looks after its connections and reports.
const TEND: Duration = Duration::from_millis(100);

/// Launches that wait on a thread, and those of one tenant: more are refused with the advice to slow down. A small launch
/// takes half a kilobyte.
const WAITING_MAX: usize = 8 * LANE_LAUNCHES_MAX;
const WAITING_EACH_MAX: usize = 2 * LANE_LAUNCHES_MAX;

/// How long a stop waits for launches under way.
const DRAIN: Duration = Duration::from_millis(700);

/// What all threads share.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) identity: Identity,
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) known: Arc<Known>,
    pub(crate) reports: Arc<ArrayQueue<Report>>,
    /// With `lookup = "store"`.
    pub(crate) store: Option<Arc<dyn Store>>,
}

fn deliver_to(worker: Weak<Worker>) -> Deliver {
    Rc::new(move |landed| {
        if let Some(worker) = worker.upgrade() {
            worker.landed(landed);
        }
    })
}

/// One thread's own.
pub(crate) struct Worker {
    pub(crate) shared: Arc<Shared>,
    pub(crate) metrics: WorkerMetrics,
    pub(crate) pool: Rc<Pool>,
    pub(crate) known: Arc<Known>,
    pub(crate) under_way: Cell<usize>,
    /// Launches that came and were not taken up yet.
    pub(crate) waiting: RefCell<Fair<Arrived>>,
    pub(crate) pump: Notify,
    pub(crate) directs: RefCell<Directs>,
    map: RefCell<Reader<Map>>,
    table: RefCell<Reader<Table>>,
    dispatch: RefCell<Dispatch>,
    rng: RefCell<SmallRng>,
    start: Instant,
}

impl Worker {
    /// A thread's state; `seed` is that of its picks.
    pub(crate) fn new(shared: Arc<Shared>, metrics: WorkerMetrics, seed: u64) -> Rc<Self> {
        let config = &shared.config;
        let (aperture, policy) = (config.aperture, config.policy());
        Rc::new_cyclic(|worker: &Weak<Self>| Self {
            pool: Rc::new(Pool::new(
                shared.identity.clone(),
                aperture,
                metrics.clone(),
                deliver_to(worker.clone()),
            )),
            waiting: RefCell::new(Fair::new(WAITING_MAX, WAITING_EACH_MAX)),
            pump: Notify::new(),
            directs: RefCell::default(),
            known: Arc::clone(&shared.known),
            under_way: Cell::new(0),
            map: RefCell::new(shared.fleet.map.reader()),
            table: RefCell::new(shared.fleet.table.reader()),
            dispatch: RefCell::new(Dispatch::new(policy, seed)),
            rng: RefCell::new(SmallRng::seed_from_u64(!seed)),
            start: Instant::now(),
            metrics,
            shared,
        })
    }

    /// Microseconds since the thread began.
    #[inline]
    pub(crate) fn now(&self) -> Micros {
        u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// The instant of [`Worker::now`].
    pub(crate) fn instant(&self, at: Micros) -> tokio::time::Instant {
        (self.start + Duration::from_micros(at)).into()
    }

    /// Decides something with the thread's memory and the table in use.
    #[inline]
    pub(crate) fn decide<T>(&self, decide: impl FnOnce(&mut Dispatch, &Table) -> T) -> T {
        decide(&mut self.dispatch.borrow_mut(), self.table.borrow_mut().get())
    }

    /// A random number.
    pub(crate) fn draw(&self) -> u32 {
        self.rng.borrow_mut().next_u32()
    }

    /// Looks at the map in use.
    #[inline]
    pub(crate) fn with_map<T>(&self, look: impl FnOnce(&Map) -> T) -> T {
        look(self.map.borrow_mut().get())
    }

    /// The map in use, for as long as it is wanted.
    pub(crate) fn map(&self) -> Arc<Map> {
        Arc::clone(self.map.borrow_mut().get())
    }

    /// Where launches reach a host.
    #[inline]
    pub(crate) fn addr_of(&self, host: HostId) -> Option<HostAddr> {
        self.with_map(|map| map.addr_of(host))
    }

    /// Waits a moment for launches under way: what is answered now need not be asked again.
    pub(crate) async fn drain(&self) {
        let deadline = Instant::now() + DRAIN;
        while self.under_way.get() > 0 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Looks after the deadlines of launches that have no task, for ever.
    pub(crate) async fn keep_time(self: Rc<Self>) {
        let mut ticks = tokio::time::interval(Duration::from_micros(TICK_US));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.tick(self.now());
        }
    }

    /// Looks after connections and reports, for ever.
    pub(crate) async fn tend(self: Rc<Self>) {
        let mut turns = tokio::time::interval(TEND);
        turns.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            turns.tick().await;
            self.pool.tend(Instant::now());
            let mut dispatch = self.dispatch.borrow_mut();
            while let Some(report) = dispatch.poll_report() {
                if self.shared.reports.push(report).is_err() {
                    self.metrics.reports_dropped.inc();
                }
            }
        }
    }
}
