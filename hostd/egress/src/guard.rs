//! What no sandbox reaches, whatever its rules say, unless the host's operator opened it.
//!
//! Tenants name where they want to go; the operator owns the machine and the networks round it. Everything that is not
//! the public internet is closed from the start: a fleet, its databases and its neighbours live in private ranges, and
//! metadata services in link-local ones. Left out: IPv6, to which boxes have no route.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use wire::network::Prefix;

/// Closed from the start (RFC 6890 and what clouds add).
const CLOSED: [(Ipv4Addr, u8); 16] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8), // "this network": Linux takes it for loopback
    (Ipv4Addr::new(10, 0, 0, 0), 8), // private
    (Ipv4Addr::new(100, 64, 0, 0), 10), // carriers' and overlays' NAT; a cloud's metadata (100.100.100.200)
    (Ipv4Addr::new(127, 0, 0, 0), 8),   // loopback
    (Ipv4Addr::new(168, 63, 129, 16), 32), // a cloud's host agent on a public address
    (Ipv4Addr::new(169, 254, 0, 0), 16), // link-local; metadata services (169.254.169.254)
    (Ipv4Addr::new(172, 16, 0, 0), 12), // private
    (Ipv4Addr::new(192, 0, 0, 0), 24),  // protocol assignments; a cloud's metadata (192.0.0.192)
    (Ipv4Addr::new(192, 0, 2, 0), 24),  // documentation
    (Ipv4Addr::new(192, 88, 99, 0), 24), // 6to4 relays
    (Ipv4Addr::new(192, 168, 0, 0), 16), // private
    (Ipv4Addr::new(198, 18, 0, 0), 15), // benchmarks; the boxes' own links
    (Ipv4Addr::new(198, 51, 100, 0), 24), // documentation
    (Ipv4Addr::new(203, 0, 113, 0), 24), // documentation
    (Ipv4Addr::new(224, 0, 0, 0), 4),   // multicast
    (Ipv4Addr::new(240, 0, 0, 0), 4),   // reserved, broadcast
];

/// The operator's word on destinations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Guard {
    /// Opened in spite of what is closed from the start.
    pub(crate) allow: Vec<Prefix>,
    /// Closed in spite of everything.
    pub(crate) deny: Vec<Prefix>,
    /// The fleet's own doors that this host knows: closed in spite of everything. An unspecified address means all
    /// addresses of the machine.
    pub(crate) doors: Vec<SocketAddr>,
}

impl Guard {
    /// Whether nothing may pass to this address and port. `own`: the address is one of the machine's.
    pub(crate) fn refuses(&self, ip: Ipv4Addr, port: u16, own: bool) -> bool {
        let ip = IpAddr::V4(ip);
        let door = |door: &SocketAddr| {
            door.port() == port && (door.ip() == ip || (own && door.ip().is_unspecified()))
        };
        let holds = |list: &[Prefix]| list.iter().any(|prefix| prefix.contains(ip));
        if self.doors.iter().any(door) || holds(&self.deny) {
            return true;
        }
        if holds(&self.allow) {
            return false;
        }
        own || closed().any(|prefix| prefix.contains(ip))
    }

    /// Whether nothing of a range can be reached, so that a rule about it is a mistake to be told.
    pub(crate) fn closes(&self, range: &Prefix) -> bool {
        let covers = |list: &[Prefix]| list.iter().any(|prefix| prefix.covers(range));
        let touches = |prefix: &Prefix| prefix.covers(range) || range.covers(prefix);
        if covers(&self.deny) {
            return true;
        }
        !self.allow.iter().any(touches) && closed().any(|prefix| prefix.covers(range))
    }
}

fn closed() -> impl Iterator<Item = Prefix> {
    CLOSED.iter().filter_map(|(net, bits)| Prefix::new(IpAddr::V4(*net), *bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefixes(list: &[&str]) -> Vec<Prefix> {
        list.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn ip(text: &str) -> Ipv4Addr {
        text.parse().unwrap()
    }

    #[test]
    fn only_the_public_internet_is_open_from_the_start() {
        let guard = Guard::default();
        for text in [
            "0.0.0.0",
            "10.1.2.3",
            "100.100.100.200",
            "127.0.0.1",
            "127.255.0.1",
            "169.254.169.254",
            "172.31.0.1",
            "192.168.1.1",
            "198.18.0.1",
            "224.0.0.251",
            "255.255.255.255",
            "168.63.129.16",
            "192.0.0.192",
        ] {
            assert!(guard.refuses(ip(text), 80, false), "{text} is open");
        }
        for text in ["1.1.1.1", "172.15.0.1", "172.32.0.1", "100.63.0.1", "11.0.0.1", "8.8.8.8"] {
            assert!(!guard.refuses(ip(text), 80, false), "{text} is closed");
            assert!(guard.refuses(ip(text), 80, true), "{text} is the machine's own");
        }
    }

    #[test]
    fn the_operator_opens_and_closes_and_the_fleets_doors_stay_shut() {
        let guard = Guard {
            allow: prefixes(&["10.1.0.0/16", "8.8.8.8"]),
            deny: prefixes(&["10.1.9.0/24", "9.0.0.0/8"]),
            doors: vec!["10.1.0.5:7500".parse().unwrap(), "0.0.0.0:7600".parse().unwrap()],
        };
        assert!(!guard.refuses(ip("10.1.0.1"), 80, false));
        assert!(!guard.refuses(ip("10.1.0.1"), 80, true), "opened, although the machine's own");
        assert!(guard.refuses(ip("10.2.0.1"), 80, false));
        assert!(
            guard.refuses(ip("10.1.9.1"), 80, false) && guard.refuses(ip("9.1.1.1"), 80, false)
        );
        assert!(guard.refuses(ip("10.1.0.5"), 7500, false));
        assert!(!guard.refuses(ip("10.1.0.5"), 7501, false));
        assert!(guard.refuses(ip("10.1.0.1"), 7600, true));
        assert!(!guard.refuses(ip("10.1.0.1"), 7600, false), "another machine's port");
    }

    #[test]
    fn rules_that_can_reach_nothing_are_known() {
        let range = |text: &str| text.parse::<Prefix>().unwrap();
        let guard = Guard { allow: prefixes(&["10.1.0.0/16"]), ..Guard::default() };
        assert!(guard.closes(&range("10.2.0.0/16")) && guard.closes(&range("127.0.0.1")));
        assert!(!guard.closes(&range("10.0.0.0/8")), "a part of it is open");
        assert!(!guard.closes(&range("10.1.1.0/24")) && !guard.closes(&range("0.0.0.0/0")));
        let guard = Guard { deny: prefixes(&["8.0.0.0/8"]), ..Guard::default() };
        assert!(guard.closes(&range("8.8.8.8")) && !guard.closes(&range("8.0.0.0/7")));
    }
}
