//! Offers launches to placers and notes what becomes of each.
//!
//! Each thread has a runtime, a socket and connections of its own, so that offering load shares no lock. A request is
//! encoded once; only its id changes.

use std::{
    sync::{
        Arc, Barrier, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use quinn::Endpoint;
use rand::{RngCore as _, SeedableRng as _, rngs::SmallRng};
use wire::{Code, Fault, launch::LaunchReply};
use wire_net::{stream::LaunchLost, tls::Identity};

use super::{
    Achieved, Load, Options, RolePid,
    lanes::LaneLink,
    pace::Pace,
    way::{Links, Template, connect},
};
use crate::{cpu::Meter, scrape};

/// What a run saw.
pub(super) struct Measured {
    pub(super) elapsed: Duration,
    pub(super) achieved: Achieved,
    pub(super) latency_us: Histogram<u64>,
    pub(super) cpu: Vec<(String, Duration)>,
    pub(super) attempts_a_launch: Option<f64>,
    pub(super) first_fault: Option<String>,
    pub(super) request_bytes: usize,
    pub(super) reply_bytes: usize,
}

/// When a run's phases are; fixed once all threads are connected.
#[derive(Clone, Copy)]
struct Window {
    from: Instant,
    to: Instant,
}

/// What all threads share: touched once a launch at most.
struct Shared {
    stop: AtomicBool,
    /// A thread could not connect: there is no run.
    failed: AtomicBool,
    left: AtomicU64,
    done: AtomicU64,
}

/// What one thread's tasks share; never contended, since they run on one thread.
pub(super) struct Own {
    pub(super) template: Template,
    window: Window,
    shared: Arc<Shared>,
    links: Links,
    pub(super) endpoint: Endpoint,
    seen: Mutex<Seen>,
    in_flight_max: usize,
}

pub(super) struct Seen {
    pub(super) rng: SmallRng,
    /// A request, into which each launch writes its id.
    pub(super) request: Vec<u8>,
    achieved: Achieved,
    latency_us: Histogram<u64>,
    last: Instant,
    pub(super) in_flight: usize,
    first_fault: Option<String>,
    reply_bytes: usize,
}

fn histogram() -> Result<Histogram<u64>, Fault> {
    Histogram::new_with_bounds(1, 300_000_000, 3)
        .map_err(|error| Fault::new(Code::Internal, error.to_string()))
}

pub(super) fn offer(options: &Options) -> Result<Measured, Fault> {
    let identity = Identity::load(&options.identity)?;
    let tenant = match (identity.peer.tenant(), &options.tenant) {
        (_, Some(tenant)) => tenant.clone(),
        (Some(tenant), None) => tenant.to_owned(),
        (None, None) => return Err(Fault::new(Code::Config, "an operator must say a tenant")),
    };
    let request_bytes = Template::new(options, tenant.clone())?.len();
    let shared = Arc::new(Shared {
        stop: AtomicBool::new(false),
        failed: AtomicBool::new(false),
        left: AtomicU64::new(if options.launches_max == 0 {
            u64::MAX
        } else {
            options.launches_max
        }),
        done: AtomicU64::new(0),
    });
    let barrier = Arc::new(Barrier::new(options.threads + 1));
    let window = Arc::new(Mutex::new(None));
    let threads: Vec<_> = (0..options.threads)
        .map(|at| {
            let (options, identity, tenant) = (options.clone(), identity.clone(), tenant.clone());
            let (shared, barrier, window) = (shared.clone(), barrier.clone(), window.clone());
            let name = format!("load-{at}");
            thread::Builder::new().name(name).spawn(move || {
                one_thread(&options, &identity, tenant, at, shared, &barrier, &window)
            })
        })
        .collect::<Result<_, _>>()
        .map_err(|error| Fault::new(Code::Internal, format!("no thread: {error}")))?;
    barrier.wait();
    let from = Instant::now() + options.warm_up;
    *lock(&window) = Some(Window { from, to: from + options.duration });
    barrier.wait();
    let (cpu, attempts_a_launch) = watch(options, &shared, from);
    let mut measured = Measured {
        elapsed: options.duration,
        achieved: Achieved::default(),
        latency_us: histogram()?,
        cpu,
        attempts_a_launch,
        first_fault: None,
        request_bytes,
        reply_bytes: 0,
    };
    let mut last = from;
    for thread in threads {
        let seen = thread
            .join()
            .map_err(|_| Fault::new(Code::Internal, "a thread that offered load panicked"))??;
        measured.add(&seen)?;
        last = last.max(seen.last);
    }
    if options.launches_max > 0 {
        measured.elapsed = (last - from).max(Duration::from_micros(1));
    }
    Ok(measured)
}

impl Measured {
    fn add(&mut self, seen: &Seen) -> Result<(), Fault> {
        let Achieved { started, refused, failed, unknown, unsent } = seen.achieved;
        self.achieved.started += started;
        self.achieved.refused += refused;
        self.achieved.failed += failed;
        self.achieved.unknown += unknown;
        self.achieved.unsent += unsent;
        self.reply_bytes = self.reply_bytes.max(seen.reply_bytes);
        self.first_fault = self.first_fault.take().or_else(|| seen.first_fault.clone());
        self.latency_us
            .add(&seen.latency_us)
            .map_err(|error| Fault::new(Code::Internal, error.to_string()))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits the run out on the caller's thread: progress, processor time, attempts. Ends the load.
fn watch(
    options: &Options,
    shared: &Shared,
    from: Instant,
) -> (Vec<(String, Duration)>, Option<f64>) {
    let bar = progress_bar(options);
    let sleep_until = |until: Instant| {
        while Instant::now() < until && !shared.stop.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(50).min(until - Instant::now().min(until)));
            bar.set_position(shared.done.load(Ordering::Relaxed));
        }
    };
    sleep_until(from);
    let mut pids = options.pids.clone();
    pids.push(RolePid { role: "bench".into(), pid: std::process::id() });
    let meter = Meter::start(pids);
    let counted = || options.placer_ops.and_then(scrape::attempts);
    let before = counted();
    sleep_until(from + options.duration);
    let cpu = meter.read();
    shared.stop.store(true, Ordering::Relaxed);
    let attempts = before.zip(counted()).and_then(|(before, after)| {
        let launches = after.launches - before.launches;
        (launches > 0.0).then(|| (after.attempts - before.attempts) / launches)
    });
    bar.finish_and_clear();
    (cpu, attempts)
}

fn progress_bar(options: &Options) -> ProgressBar {
    let bar = if options.launches_max == 0 {
        ProgressBar::new_spinner()
    } else {
        ProgressBar::new(options.launches_max)
    };
    let target =
        if options.progress { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    bar.set_draw_target(target);
    let style = "{spinner} {elapsed} {wide_bar} {pos} launches, {per_sec}";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar
}

fn one_thread(
    options: &Options,
    identity: &Identity,
    tenant: String,
    at: usize,
    shared: Arc<Shared>,
    barrier: &Barrier,
    window: &Mutex<Option<Window>>,
) -> Result<Seen, Fault> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Fault::new(Code::Internal, error.to_string()));
    // Whatever happens, the barriers are met: others wait there.
    let connected = runtime.and_then(|runtime| {
        let links = runtime.block_on(connect(options, identity))?;
        Ok((runtime, links))
    });
    if connected.is_err() {
        shared.failed.store(true, Ordering::Relaxed);
        shared.stop.store(true, Ordering::Relaxed);
    }
    barrier.wait();
    barrier.wait();
    let (runtime, (endpoint, links)) = connected?;
    let Some(window) = *lock(window) else { unreachable!("set between the barriers") };
    let template = Template::new(options, tenant)?;
    let request = template.bytes().to_vec();
    let own = Arc::new(Own {
        template,
        window,
        shared,
        links,
        endpoint,
        seen: Mutex::new(Seen {
            rng: SmallRng::from_os_rng(),
            request,
            achieved: Achieved::default(),
            latency_us: histogram()?,
            last: window.from,
            in_flight: 0,
            first_fault: None,
            reply_bytes: 0,
        }),
        in_flight_max: share(options.in_flight_max(), options.threads, at),
    });
    runtime.block_on(run(options, &own))?;
    drop(runtime);
    let own = Arc::into_inner(own)
        .ok_or_else(|| Fault::new(Code::Internal, "a task outlived its runtime"))?;
    Ok(own.seen.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// One thread's part of a count, such that all parts add up to it.
fn share(count: usize, threads: usize, at: usize) -> usize {
    count / threads + usize::from(at < count % threads)
}

async fn run(options: &Options, own: &Arc<Own>) -> Result<(), Fault> {
    let closed = matches!(options.load, Load::Closed { .. });
    let mut lanes: Vec<_> = match &own.links {
        Links::Streams(_) => Vec::new(),
        Links::Lanes(lanes) => (0..lanes.len())
            .map(|at| {
                let most = closed.then(|| share(own.in_flight_max, lanes.len(), at));
                let own = Arc::clone(own);
                tokio::spawn(async move {
                    if let Links::Lanes(lanes) = &own.links {
                        lanes[at].drive(&own, most).await;
                    }
                })
            })
            .collect(),
    };
    match (options.load, &own.links) {
        (Load::Closed { .. }, Links::Streams(_)) => {
            let workers: Vec<_> = (0..own.in_flight_max)
                .map(|at| tokio::spawn(closed_stream(Arc::clone(own), at)))
                .collect();
            for worker in workers {
                let _ = worker.await;
            }
        }
        (Load::Closed { .. }, Links::Lanes(_)) => {
            // What is not answered by then is unknown: a placer answers within the budget.
            let limit = own.window.to + own.patience();
            let all = futures::future::join_all(lanes.iter_mut());
            let _ = tokio::time::timeout_at(limit.into(), all).await;
        }
        (Load::Open { rate }, _) => {
            #[expect(clippy::cast_precision_loss, reason = "a few threads")]
            open(own, own.window.from - options.warm_up, rate / options.threads as f64).await?;
        }
    }
    if let Links::Lanes(lanes) = &own.links {
        own.seen().achieved.unknown += lanes.iter().map(LaneLink::under_way).sum::<u64>();
    }
    for lane in lanes.into_iter().filter(|lane| !lane.is_finished()) {
        lane.abort();
        let _ = lane.await;
    }
    Ok(())
}

async fn closed_stream(own: Arc<Own>, at: usize) {
    while own.take() {
        own.launch(at % own.links.len(), Instant::now()).await;
    }
}

async fn open(own: &Arc<Own>, start: Instant, rate: f64) -> Result<(), Fault> {
    let mut pace = Pace::start(start, rate)?;
    let mut turn = 0;
    'load: while !own.shared.failed.load(Ordering::Relaxed) {
        pace.tick().await?;
        let now = Instant::now();
        while pace.due() <= now {
            let due = pace.due();
            if due >= own.window.to || !own.take_one() {
                break 'load;
            }
            pace.advance();
            turn = (turn + 1) % own.links.len();
            own.send_or_count(turn, due);
        }
    }
    // What is under way may end: each is bounded by its budget.
    let limit = Instant::now() + own.patience();
    while lock(&own.seen).in_flight > 0 && Instant::now() < limit {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

impl Own {
    pub(super) fn seen(&self) -> MutexGuard<'_, Seen> {
        lock(&self.seen)
    }

    /// How long an answer may take.
    fn patience(&self) -> Duration {
        Duration::from_millis(u64::from(self.template.head.budget_ms) + 1_000)
    }

    /// Whether no more launches are wanted.
    pub(super) fn is_over(&self) -> bool {
        self.shared.stop.load(Ordering::Relaxed) || Instant::now() >= self.window.to
    }

    /// Starts a launch that is due, or counts that too many are in flight.
    fn send_or_count(self: &Arc<Self>, link: usize, due: Instant) {
        let mut seen = lock(&self.seen);
        if seen.in_flight >= self.in_flight_max {
            seen.achieved.unsent += u64::from(self.counts(due));
            return;
        }
        if let Links::Lanes(lanes) = &self.links {
            seen.in_flight += usize::from(lanes[link].send(self, &mut seen, due));
            return;
        }
        seen.in_flight += 1;
        drop(seen);
        let own = Arc::clone(self);
        tokio::spawn(async move {
            own.launch(link, due).await;
            lock(&own.seen).in_flight -= 1;
        });
    }

    /// Whether another launch may start, in a closed loop.
    pub(super) fn take(&self) -> bool {
        !self.is_over() && self.take_one()
    }

    /// Takes one launch out of a burst.
    fn take_one(&self) -> bool {
        let shared = &self.shared;
        let taken = shared.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            if left == u64::MAX { Some(left) } else { left.checked_sub(1) }
        });
        if taken == Ok(1) {
            // The last one of a burst: the watcher need not wait longer.
            shared.stop.store(true, Ordering::Relaxed);
        }
        taken.is_ok()
    }

    fn counts(&self, due: Instant) -> bool {
        (self.window.from..self.window.to).contains(&due)
    }

    /// One launch on a stream of its own.
    async fn launch(&self, link: usize, due: Instant) {
        let Links::Streams(links) = &self.links else { return };
        let link = &links[link];
        let mut id = [0; 16];
        lock(&self.seen).rng.fill_bytes(&mut id);
        let request = self.template.with(id);
        let sent = link.launch(self.template.head, &request);
        let outcome = match tokio::time::timeout(self.patience(), sent).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let fault = Fault::new(Code::Unknown, "no answer within the budget");
                Err(LaunchLost::Unknown(fault))
            }
        };
        let lost = outcome.is_err();
        self.note(&mut lock(&self.seen), Instant::now(), due, outcome);
        if lost {
            link.redial(&self.endpoint).await;
        }
    }

    /// Notes what became of a launch.
    pub(super) fn note(
        &self,
        seen: &mut Seen,
        now: Instant,
        due: Instant,
        outcome: Result<LaunchReply, LaunchLost>,
    ) {
        self.shared.done.fetch_add(1, Ordering::Relaxed);
        seen.last = now;
        if !self.counts(due) {
            return;
        }
        let fault = match outcome {
            Ok(LaunchReply::Started(started)) => {
                seen.achieved.started += 1;
                let us = u64::try_from(now.duration_since(due).as_micros()).unwrap_or(u64::MAX);
                seen.latency_us.saturating_record(us.max(1));
                if seen.reply_bytes == 0 {
                    seen.reply_bytes = LaunchReply::Started(started).to_bytes().len();
                }
                return;
            }
            Ok(LaunchReply::Refused(refused)) => {
                seen.achieved.refused += 1;
                Fault::new(refused.code, refused.code.name())
            }
            Ok(LaunchReply::Failed(fault)) => {
                // Exit status 5 is "no capacity" of any kind.
                match fault.code {
                    Code::Unknown => seen.achieved.unknown += 1,
                    code if code.exit() == 5 => seen.achieved.refused += 1,
                    _ => seen.achieved.failed += 1,
                }
                fault
            }
            Err(LaunchLost::Unknown(fault)) => {
                seen.achieved.unknown += 1;
                fault
            }
            Err(LaunchLost::NotSent(fault)) => {
                seen.achieved.unsent += 1;
                fault
            }
        };
        if seen.first_fault.is_none() {
            seen.first_fault = Some(format!("{}: {}", fault.code, fault.message));
        }
    }
}
