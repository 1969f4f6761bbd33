//! Counts out of a role's `/metrics`.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

/// How much of an answer is read.
const BYTES_MAX: u64 = 4 << 20;
const TIMEOUT: Duration = Duration::from_secs(2);

/// A placer's counts.
#[derive(Clone, Copy, Debug)]
pub struct Attempts {
    /// Launches that ended, however.
    pub launches: f64,
    /// Requests that were sent to hosts for them.
    pub attempts: f64,
}

/// Asks a placer; `None` if it cannot be reached or does not say.
#[must_use]
pub fn attempts(ops: SocketAddr) -> Option<Attempts> {
    let text = fetch(ops)?;
    let launches = sum(&text, "placer_launches_total")?;
    let attempts = sum(&text, "placer_attempts_total")?;
    Some(Attempts { launches, attempts })
}

/// The body of `/metrics`.
#[must_use]
pub fn fetch(ops: SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&ops, TIMEOUT).ok()?;
    stream.set_read_timeout(Some(TIMEOUT)).ok()?;
    stream.set_write_timeout(Some(TIMEOUT)).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: ops\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.take(BYTES_MAX).read_to_string(&mut text).ok()?;
    Some(text.split_once("\r\n\r\n")?.1.to_owned())
}

/// Adds up a metric over its labels.
#[must_use]
pub fn sum(text: &str, name: &str) -> Option<f64> {
    let values = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let value = match rest.strip_prefix('{') {
            Some(labels) => labels.rsplit_once('}')?.1,
            None => rest.strip_prefix(' ')?,
        };
        value.split_whitespace().next()?.parse::<f64>().ok()
    });
    values.reduce(|sum, value| sum + value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_go_over_labels_and_take_no_other_name() {
        let text =
            "# TYPE a counter\na_total{host=\"}x\"} 3\na_total{host=\"y\"} 4 17\na_totals 9\nb 1\n";
        assert_eq!(sum(text, "a_total"), Some(7.0));
        assert_eq!(sum(text, "b"), Some(1.0));
        assert_eq!(sum(text, "c"), None);
    }
}
