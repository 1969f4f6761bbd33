//! x
fn main() {
    let first: u64 = std::env::args().nth(2).and_then(|s| s.parse().ok()).unwrap_or(1);
    let n: u64 = std::env::args().nth(3).and_then(|s| s.parse().ok()).unwrap_or(1);
    let t = std::time::Instant::now();
    let mut bad = 0;
    for seed in first..first + n {
        match tests_sim::swarm::check(seed) {
            Ok(o) => {
                if n < 5 {
                    println!(
                        "{seed} events {} attempts {:.3} {:?}",
                        o.events,
                        o.attempts_a_launch(),
                        o.codes
                    )
                }
            }
            Err(e) => {
                bad += 1;
                println!("{e}")
            }
        }
    }
    println!("{n} seeds, {bad} bad, {:?}", t.elapsed());
}
