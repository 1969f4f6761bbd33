//! The clock of an open loop: which launches are due.
//!
//! tokio's timers round up to a millisecond, which is longer than a launch; a timer of the kernel (`timerfd`) ticks
//! twice a millisecond. A launch is due at the tick at or after its place in an even schedule, and counts from that
//! tick's nominal time, however late we see it.

use std::{
    io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::io::{Interest, unix::AsyncFd};
use wire::{Code, Fault};

const TICK: Duration = Duration::from_micros(500);

pub(super) struct Pace {
    timer: AsyncFd<OwnedFd>,
    start: Instant,
    rate: f64,
    next: u64,
}

fn fault(error: impl Into<io::Error>) -> Fault {
    Fault::new(Code::Internal, format!("the kernel's timer: {}", error.into()))
}

impl Pace {
    /// Starts ticking: `rate` launches a second, from `start` on.
    pub(super) fn start(start: Instant, rate: f64) -> Result<Self, Fault> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(fault)?;
        let tick = Timespec { tv_sec: 0, tv_nsec: i64::from(TICK.subsec_nanos()) };
        let spec = Itimerspec { it_interval: tick, it_value: tick };
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &spec).map_err(fault)?;
        // SAFETY: the `AsyncFd` owns the fd, an open timer, which nothing closes or replaces before it is dropped.
        let timer = unsafe { AsyncFd::register_with_interest(timer, Interest::READABLE) };
        Ok(Self { timer: timer.map_err(fault)?, start, rate, next: 0 })
    }

    /// When the next launch is due.
    pub(super) fn due(&self) -> Instant {
        #[expect(clippy::cast_precision_loss, reason = "counts of a bench are far below 2^52")]
        let ticks = ((self.next + 1) as f64 / (self.rate * TICK.as_secs_f64())).ceil();
        self.start + TICK.mul_f64(ticks)
    }

    /// Goes on to the launch after it.
    pub(super) fn advance(&mut self) {
        self.next += 1;
    }

    /// Waits for a tick.
    pub(super) async fn tick(&mut self) -> Result<(), Fault> {
        loop {
            let mut ready = self.timer.readable().await.map_err(fault)?;
            let mut count = [0; 8];
            let read = ready.try_io(|timer| Ok(rustix::io::read(timer.get_ref(), &mut count)?));
            match read {
                Ok(Ok(8)) => return Ok(()),
                Ok(Ok(_)) | Err(_) => {}
                Ok(Err(error)) => return Err(fault(error)),
            }
        }
    }
}
