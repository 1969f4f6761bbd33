//! One box's policy: its rules, and the addresses that it has resolved for names that it may reach.
//!
//! A rule about a name opens an address only once this host's resolver gave that address for the name, for the ports of
//! the rule, and for a bounded time. So a name cannot be turned towards something else by a box's own resolver, and an
//! address is judged by the guard both when it is resolved and when it is connected to (rebinding). Time is given.

use std::{collections::HashMap, net::Ipv4Addr};

use wire::network::{Destination, Protocol, Rule};

use crate::limits::{PIN_MS_GRACE, PIN_MS_MIN, PINS_MAX};

/// What one box may reach.
#[derive(Debug)]
pub(crate) struct Policy {
    rules: Vec<Rule>,
    /// By address and index of the rule: until when.
    pins: HashMap<(Ipv4Addr, usize), u64>,
}

impl Policy {
    /// By these rules.
    pub(crate) fn new(rules: Vec<Rule>) -> Self {
        Self { rules, pins: HashMap::new() }
    }

    /// Whether a rule opens an address and port. The guard is asked beside this.
    pub(crate) fn opens(&self, protocol: Protocol, ip: Ipv4Addr, port: u16, now_ms: u64) -> bool {
        let opens = |(index, rule): (usize, &Rule)| {
            rule.protocol == protocol
                && rule.ports().contains(&port)
                && match &rule.to {
                    Destination::Any => true,
                    Destination::Net(prefix) => prefix.contains(ip.into()),
                    Destination::Name(_) | Destination::Beneath(_) => {
                        self.pins.get(&(ip, index)).is_some_and(|until| *until > now_ms)
                    }
                }
        };
        self.rules.iter().enumerate().any(opens)
    }

    /// Whether a name (lower case, no final dot) may be resolved.
    pub(crate) fn resolves(&self, name: &str) -> bool {
        self.rules.iter().any(|rule| rule.names(name))
    }

    /// A name was resolved to an address: opens it for the ports of the rules that name it.
    pub(crate) fn pin(&mut self, name: &str, ip: Ipv4Addr, ttl_s: u32, now_ms: u64) {
        let keep_ms = (u64::from(ttl_s) * 1_000 + PIN_MS_GRACE).max(PIN_MS_MIN);
        for (index, rule) in self.rules.iter().enumerate() {
            let by_name = matches!(rule.to, Destination::Name(_) | Destination::Beneath(_));
            if !by_name || !rule.names(name) {
                continue;
            }
            if self.pins.len() >= PINS_MAX {
                self.pins.retain(|_, until| *until > now_ms);
            }
            if self.pins.len() >= PINS_MAX
                && let Some(soonest) =
                    self.pins.iter().min_by_key(|(_, until)| **until).map(|(key, _)| *key)
            {
                self.pins.remove(&soonest);
            }
            let until = self.pins.entry((ip, index)).or_default();
            *until = (*until).max(now_ms + keep_ms);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(rules: &[&str]) -> Policy {
        Policy::new(rules.iter().map(|text| text.parse().unwrap()).collect())
    }

    const A: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
    const B: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

    #[test]
    fn addresses_open_by_range_port_and_protocol() {
        let policy = policy(&["192.0.2.1:443", "udp:192.0.2.0/24:53"]);
        assert!(policy.opens(Protocol::Tcp, A, 443, 0));
        assert!(!policy.opens(Protocol::Tcp, A, 444, 0) && !policy.opens(Protocol::Tcp, B, 443, 0));
        assert!(policy.opens(Protocol::Udp, B, 53, 0) && !policy.opens(Protocol::Tcp, B, 53, 0));
        assert!(!policy.resolves("example.org"));
    }

    #[test]
    fn a_name_opens_only_what_was_resolved_for_it_and_for_a_while() {
        let mut policy = policy(&["example.org:443", "*.other.net:80"]);
        assert!(policy.resolves("example.org") && policy.resolves("a.other.net"));
        assert!(!policy.resolves("example.com") && !policy.resolves("other.net"));
        assert!(!policy.opens(Protocol::Tcp, A, 443, 0));
        policy.pin("example.org", A, 100, 1_000);
        assert!(policy.opens(Protocol::Tcp, A, 443, 1_000));
        assert!(!policy.opens(Protocol::Tcp, A, 80, 1_000), "the port of another rule");
        assert!(!policy.opens(Protocol::Tcp, B, 443, 1_000));
        assert!(policy.opens(Protocol::Tcp, A, 443, 1_000 + 129_999));
        assert!(!policy.opens(Protocol::Tcp, A, 443, 1_000 + 130_000));
        policy.pin("evil.net", B, 100, 1_000);
        assert!(!policy.opens(Protocol::Tcp, B, 443, 1_000));
    }

    #[test]
    fn pins_are_bounded_and_the_newest_stay() {
        let mut policy = policy(&["*.x.net"]);
        for n in 0..u32::try_from(PINS_MAX).unwrap() + 10 {
            policy.pin("a.x.net", Ipv4Addr::from_bits(n), 60, u64::from(n));
        }
        assert_eq!(policy.pins.len(), PINS_MAX);
        assert!(!policy.opens(Protocol::Tcp, Ipv4Addr::from_bits(0), 1, 10_000));
        assert!(policy.opens(Protocol::Tcp, Ipv4Addr::from_bits(4_100), 1, 10_000));
    }
}
