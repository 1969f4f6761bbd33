//! The clock of an open loop: how many launches are due, and since when.
//!
//! tokio's timers round up to a millisecond, which is longer than a launch; a timer of the kernel (`timerfd`) ticks
//! twice a millisecond. What is due at a tick counts from the tick's nominal time, however late we see it.

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
    ticks: u64,
    a_tick: f64,
    owed: f64,
}

fn fault(error: impl Into<io::Error>) -> Fault {
    Fault::new(Code::Internal, format!("the kernel's timer: {}", error.into()))
}

impl Pace {
    /// Starts ticking; `rate` launches a second.
    pub(super) fn start(rate: f64) -> Result<Self, Fault> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(fault)?;
        let tick = Timespec { tv_sec: 0, tv_nsec: i64::from(TICK.subsec_nanos()) };
        let spec = Itimerspec { it_interval: tick, it_value: tick };
        let start = Instant::now();
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &spec).map_err(fault)?;
        // SAFETY: the `AsyncFd` owns the fd, an open timer, which nothing closes or replaces before it is dropped.
        let timer = unsafe { AsyncFd::register_with_interest(timer, Interest::READABLE) };
        let timer = timer.map_err(fault)?;
        Ok(Self { timer, start, ticks: 0, a_tick: rate * TICK.as_secs_f64(), owed: 0.0 })
    }

    /// Waits for a tick, and says when the oldest unseen one was and how many launches are due since the last call.
    pub(super) async fn next(&mut self) -> Result<(Instant, u64), Fault> {
        let ticks = loop {
            let mut ready = self.timer.readable().await.map_err(fault)?;
            let mut count = [0; 8];
            let read = ready.try_io(|timer| Ok(rustix::io::read(timer.get_ref(), &mut count)?));
            match read {
                Ok(Ok(8)) => break u64::from_ne_bytes(count),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(fault(error)),
                Err(_would_block) => {}
            }
        };
        let oldest = self.ticks + 1;
        self.ticks += ticks;
        let since_start = TICK.saturating_mul(u32::try_from(oldest).unwrap_or(u32::MAX));
        #[expect(clippy::cast_precision_loss, reason = "ticks of one wake-up are few")]
        let due = self.owed + self.a_tick * ticks as f64;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "positive, and whole after the floor"
        )]
        let whole = due.floor() as u64;
        self.owed = due.fract();
        Ok((self.start + since_start, whole))
    }
}
