//! Real boxes through hostd over QUIC: latency one at a time, and whole lives a second.
//!
//! `cargo bench -p hostd --bench boxes -- [launches] [in flight] [seconds]`, as root. The latency is the client's, from
//! request to reply; the steps are hostd's own. Whole life: launch, run `true`, reap, refill.
#![allow(clippy::unwrap_used, clippy::print_stdout, dead_code, reason = "a bench")]

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/place/mod.rs"]
mod place;

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use common::{block_on, request, started};
use place::{Place, exited};
use wire::launch::Steps;

fn main() {
    place::main(&[("boxes", boxes)]);
}

fn number(at: usize, default: u64) -> u64 {
    let args = std::env::args().skip(1).filter(|arg| arg.bytes().all(|b| b.is_ascii_digit()));
    args.collect::<Vec<_>>().get(at).map_or(default, |arg| arg.parse().unwrap())
}

fn percentile(sorted: &[u64], percent: usize) -> f64 {
    sorted[(sorted.len() - 1) * percent / 100] as f64 / 1e3
}

fn show(name: &str, mut ns: Vec<u64>) {
    ns.sort_unstable();
    let [min, p50, p90, p99] = [0, 50, 90, 99].map(|percent| percentile(&ns, percent));
    println!(
        "{name:>10}: min {min:>7.0} us, p50 {p50:>7.0} us, p90 {p90:>7.0} us, p99 {p99:>7.0} us"
    );
}

fn boxes() {
    let (launches, in_flight, seconds) = (number(0, 300), number(1, 8), number(2, 3));
    let place = Place::new();
    block_on(async {
        let placer = place.placer().await;
        let (mut seen, mut steps): (Vec<u64>, Vec<Steps>) = (Vec::new(), Vec::new());
        for n in 0..launches {
            let asked = request(u128::from(n) + 1, "img", &["true"]);
            let begun = Instant::now();
            let answer = started(&placer, &asked).await;
            seen.push(u64::try_from(begun.elapsed().as_nanos()).unwrap());
            steps.push(answer.steps);
            exited(&placer, answer.sandbox).await;
            // The pool is filled again meanwhile: this is the latency of a warm one.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        println!("{launches} launches one at a time, pool warm");
        show("client", seen);
        show("total", steps.iter().map(|s| s.total_ns).collect());
        show("image", steps.iter().map(|s| s.image_ns).collect());
        show("box", steps.iter().map(|s| s.box_ns).collect());
        show("root", steps.iter().map(|s| s.root_ns).collect());
        show("exec", steps.iter().map(|s| s.exec_ns).collect());
        let (next, done) = (Cell::new(1u128 << 64), Cell::new(0u64));
        let until = Instant::now() + Duration::from_secs(seconds);
        let one = || async {
            while Instant::now() < until {
                next.set(next.get() + 1);
                let answer = started(&placer, &request(next.get(), "img", &["true"])).await;
                exited(&placer, answer.sandbox).await;
                done.set(done.get() + 1);
            }
        };
        futures::future::join_all((0..in_flight).map(|_| one())).await;
        let rate = done.get() as f64 / seconds as f64;
        println!("{in_flight} in flight: {rate:.0} whole lives a second");
    });
    place.end();
}
