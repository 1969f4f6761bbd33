//! Random runs: a seed draws a small fleet, its load and its faults, and the rules must hold.

use placer_core::{Policy, Select};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::{Fault, Options, Outcome, What, fleet};

/// Seconds after the last fault from which a fleet counts as healed (FAULTS, simulation gate), and a last span in which
/// it must serve.
const HEALED_S: u64 = 30;
const SERVES_S: u64 = 10;

/// The run that a seed draws.
#[must_use]
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "seconds")]
#[expect(clippy::cast_precision_loss, reason = "small numbers")]
pub fn options(seed: u64) -> Options {
    let mut rng = SmallRng::seed_from_u64(seed ^ 0x5157_4152_4d00);
    let hosts = rng.random_range(5..60);
    let slots = rng.random_range(8..64u16);
    let life_seconds = rng.random_range(1.0..6.0);
    let fill = rng.random_range(0.1..0.6);
    let rate = (hosts as f64 * f64::from(slots) / life_seconds * fill).min(150.0);
    let faults: Vec<Fault> = (0..rng.random_range(0..5)).map(|_| fault(&mut rng)).collect();
    let mut options = Options {
        seed,
        hosts,
        slots,
        cores: rng.random_range(1..8),
        aggregators: rng.random_range(1..4),
        skew_seconds: if rng.random_bool(0.3) { 600 } else { 0 },
        placers: rng.random_range(1..5),
        policy: Policy { select: Select { choices: rng.random_range(1..4) }, ..Policy::default() },
        rate,
        seconds: 0,
        warm_seconds: 4,
        life_seconds,
        start_us: rng.random_range(300..5_000),
        budget_ms: rng.random_range(2_000..10_000),
        beat_ms: rng.random_range(1_000..8_000),
        net_us: (20, rng.random_range(100..5_000)),
        loss: if rng.random_bool(0.5) { rng.random_range(0.0..0.05) } else { 0.0 },
        reply_loss: if rng.random_bool(0.3) { rng.random_range(0.0..0.01) } else { 0.0 },
        feed_late_us: rng.random_range(0..200_000),
        map_ms: rng.random_range(500..3_000),
        scan_ms: 16_000,
        hog: 0.0,
        named: if rng.random_bool(0.4) { rng.random_range(0.02..0.3) } else { 0.0 },
        faults,
        cancels_lie: false,
        swaps_blind: false,
        trace: false,
    };
    options.seconds = options.healed_s() as u64 + HEALED_S + SERVES_S;
    options
}

fn fault(rng: &mut SmallRng) -> Fault {
    let share = rng.random_range(0.02..0.5);
    let what = match rng.random_range(0..17) {
        0 => What::BlackHole(share),
        1 => What::Gray(share, rng.random_range(3..40)),
        2 => What::PortDead(share),
        3 => What::Silent(share),
        4 => What::Crash(share),
        5 => What::HostdDown(share),
        6 => What::Partition(share),
        7 => What::NoMaps,
        8 => What::NoFeed,
        9 => What::Outage,
        10 => What::Storm(share),
        11 => What::NoDatabase,
        12 => What::Flaky(share),
        13 => What::AggregatorKilled(rng.random_range(0..4)),
        14 => What::AggregatorStopped(rng.random_range(0..4)),
        15 => What::Swizzle(share),
        _ => What::Load(rng.random_range(1.0..8.0)),
    };
    let from_s = rng.random_range(0.0..4.0);
    Fault { from_s, to_s: from_s + rng.random_range(0.5..10.0), what }
}

/// Runs a seed.
///
/// # Errors
/// The rule that was broken, with the command that shows it again.
pub fn check(seed: u64) -> Result<Outcome, String> {
    check_run(&options(seed))
}

/// Runs a seed's run, perhaps with something changed.
///
/// # Errors
/// As [`check`].
pub fn check_run(options: &Options) -> Result<Outcome, String> {
    let seed = options.seed;
    let outcome = fleet::run(options);
    let again = || format!("; again: cargo run -p tests-sim --release -- replay {seed}");
    if let Some(broken) = &outcome.broken {
        return Err(format!("seed {seed}: {broken}{}", again()));
    }
    if outcome.missing > 0 {
        return Err(format!(
            "seed {seed}: healed, {} hosts that live are not in map {:?}{}",
            outcome.missing,
            outcome.version,
            again()
        ));
    }
    let healed = usize::try_from(options.seconds - SERVES_S).unwrap_or(0);
    let span = outcome.span(healed, usize::MAX);
    // What a lost reply costs is the client's to ask again: each loses one answer, and two in a row are rare.
    let forgiven = if options.reply_loss > 0.0 { 1 } else { 0 };
    if span.offered - span.started > span.offered / 10_000 + forgiven {
        return Err(format!(
            "seed {seed}: healed, {} of {} launches were started; ends: {:?}{}",
            span.started,
            span.offered,
            outcome.codes,
            again()
        ));
    }
    Ok(outcome)
}
