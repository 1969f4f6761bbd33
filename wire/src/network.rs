//! What a sandbox may reach and where it may be reached: rules as people write them, checked into types.
//!
//! One grammar for the command line, the wire and the host: `[tcp:|udp:]WHERE[:PORT[-PORT]]`, WHERE being an address,
//! `address/prefix`, a name, `*.name` (everything beneath it) or `any`. Left out: any decision. What an operator's host
//! refuses in spite of a rule is decided there.

use alloc::{
    string::{String, ToString},
    vec::Vec,
};
use core::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
    str::FromStr,
};

use rkyv::{Archive, Deserialize, Serialize};

use crate::limits::{PUBLISH_MAX, RULE_BYTES_MAX, RULES_MAX};

/// What a sandbox may reach.
#[derive(Clone, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub enum Network {
    /// Its own loopback.
    #[default]
    None,
    /// Outgoing connections by these rules ([`Rule`]); empty for everywhere but what its host refuses to all.
    Egress(Vec<String>),
}

impl Network {
    /// The rules, checked.
    ///
    /// # Errors
    /// Which rule is none, or that there are too many.
    pub fn rules(&self) -> Result<Vec<Rule>, RuleError> {
        match self {
            Self::None => Ok(Vec::new()),
            Self::Egress(list) if list.is_empty() => Ok(Vec::from([Rule::ANY])),
            Self::Egress(list) if list.len() > RULES_MAX => Err(RuleError::TooMany),
            Self::Egress(list) => list.iter().map(|text| text.parse()).collect(),
        }
    }
}

/// A port of a sandbox that is to be open on its host's own address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Clone, Copy, Debug))]
pub struct Publish {
    /// TCP port on the sandbox's loopback.
    pub port: u16,
    /// TCP port on the host; zero for any that is free and allowed.
    pub host_port: u16,
}

impl Publish {
    /// Checks a launch's list.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(list: &[Self]) -> Result<(), &'static str> {
        if list.len() > PUBLISH_MAX {
            return Err("more than 16 published ports");
        }
        if list.iter().any(|one| one.port == 0) {
            return Err("published port: a sandbox has no port 0");
        }
        let twice = |(at, one): (usize, &Self)| {
            one.host_port != 0 && list[..at].iter().any(|other| other.host_port == one.host_port)
        };
        if list.iter().enumerate().any(twice) {
            return Err("published ports: two want the same port of the host");
        }
        Ok(())
    }
}

impl FromStr for Publish {
    type Err = RuleError;

    /// `PORT`, or `HOST_PORT:PORT`.
    fn from_str(text: &str) -> Result<Self, RuleError> {
        let (host, inside) = text.split_once(':').unwrap_or(("0", text));
        let bad = || RuleError::Bad(text.to_string(), "ports are PORT or HOST_PORT:PORT");
        let port: u16 = inside.parse().map_err(|_| bad())?;
        let host_port = host.parse().map_err(|_| bad())?;
        if port == 0 {
            return Err(RuleError::Bad(text.to_string(), "a sandbox has no port 0"));
        }
        Ok(Self { port, host_port })
    }
}

/// A port that is open.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Published {
    /// TCP port on the sandbox's loopback.
    pub port: u16,
    /// Where it is reached, as `ip:port` of the host.
    pub address: String,
}

/// A rule that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// More than a launch may bring.
    #[error("more than {RULES_MAX} egress rules")]
    TooMany,
    /// Not of the grammar.
    #[error("{0}: {1}")]
    Bad(String, &'static str),
}

/// What a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP, what is meant where nothing is said.
    Tcp,
    /// UDP.
    Udp,
}

/// One thing that may be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// By which protocol.
    pub protocol: Protocol,
    /// Where.
    pub to: Destination,
    /// Ports, first and last.
    pub ports: (u16, u16),
}

/// Where a rule leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Everywhere.
    Any,
    /// Addresses.
    Net(Prefix),
    /// A name, in lower case.
    Name(String),
    /// All names beneath this one, which is not meant itself.
    Beneath(String),
}

impl Rule {
    /// TCP to everywhere.
    pub const ANY: Self =
        Self { protocol: Protocol::Tcp, to: Destination::Any, ports: (1, u16::MAX) };

    /// Its ports.
    #[must_use]
    pub const fn ports(&self) -> RangeInclusive<u16> {
        self.ports.0..=self.ports.1
    }

    /// Whether a name, in lower case and without a final dot, is one that it names.
    #[must_use]
    pub fn names(&self, name: &str) -> bool {
        match &self.to {
            Destination::Any => true,
            Destination::Net(_) => false,
            Destination::Name(own) => own == name,
            Destination::Beneath(own) => name
                .strip_suffix(own.as_str())
                .is_some_and(|head| head.len() > 1 && head.ends_with('.')),
        }
    }
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let bad = |why| RuleError::Bad(text.chars().take(80).collect(), why);
        if text.len() > RULE_BYTES_MAX {
            return Err(bad("longer than a rule can be"));
        }
        let (protocol, rest) = match text.split_once(':') {
            Some(("tcp", rest)) => (Protocol::Tcp, rest),
            Some(("udp", rest)) => (Protocol::Udp, rest),
            _ => (Protocol::Tcp, text),
        };
        let rest = rest.strip_prefix("name:").unwrap_or(rest);
        let (place, ports) = split_ports(rest).ok_or_else(|| bad("a bracket is not closed"))?;
        let ports = match ports {
            None => (1, u16::MAX),
            Some(ports) => ports_of(ports).ok_or_else(|| bad("ports are PORT or FIRST-LAST"))?,
        };
        let to = destination(place)
            .ok_or_else(|| bad("neither an address, address/prefix, a name, *.name nor any"))?;
        Ok(Self { protocol, to, ports })
    }
}

/// The place and what follows its colon. An IPv6 address with a port stands in brackets; one without may do without.
fn split_ports(text: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (place, after) = rest.split_once(']')?;
        return match after.strip_prefix(':') {
            Some(ports) => Some((place, Some(ports))),
            None => after.is_empty().then_some((place, None)),
        };
    }
    Some(match text.split_once(':') {
        Some((place, ports)) if !ports.contains(':') => (place, Some(ports)),
        _ => (text, None),
    })
}

fn ports_of(text: &str) -> Option<(u16, u16)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (first != 0 && first <= last).then_some((first, last))
}

fn destination(text: &str) -> Option<Destination> {
    if text == "any" {
        return Some(Destination::Any);
    }
    if let Ok(prefix) = text.parse() {
        return Some(Destination::Net(prefix));
    }
    if let Some(beneath) = text.strip_prefix("*.") {
        return name(beneath).map(Destination::Beneath);
    }
    name(text).map(Destination::Name)
}

/// A name in lower case, if it is one that DNS can hold and no number.
fn name(text: &str) -> Option<String> {
    let text = text.strip_suffix('.').unwrap_or(text);
    let label = |label: &str| {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        (1..=63).contains(&label.len()) && label.bytes().all(good)
    };
    let last = text.rsplit('.').next()?;
    let number = last.bytes().all(|byte| byte.is_ascii_digit());
    (text.len() <= 253 && text.split('.').all(label) && !number).then(|| text.to_ascii_lowercase())
}

/// Addresses that begin alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    net: IpAddr,
    bits: u8,
}

impl Prefix {
    /// Of its first address and the bits that count, cleared of those that do not.
    #[must_use]
    pub fn new(net: IpAddr, bits: u8) -> Option<Self> {
        let net = match net {
            IpAddr::V4(ip) if bits <= 32 => {
                IpAddr::V4(Ipv4Addr::from_bits(ip.to_bits() & mask4(bits)))
            }
            IpAddr::V6(ip) if bits <= 128 => {
                IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & mask6(bits)))
            }
            _ => return None,
        };
        Some(Self { net, bits })
    }

    /// Whether an address is in it. One of the other family never is.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        match (self.net, ip) {
            (IpAddr::V4(net), IpAddr::V4(ip)) => ip.to_bits() & mask4(self.bits) == net.to_bits(),
            (IpAddr::V6(net), IpAddr::V6(ip)) => ip.to_bits() & mask6(self.bits) == net.to_bits(),
            _ => false,
        }
    }

    /// Whether all of `other` is in it.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        self.bits <= other.bits && self.contains(other.net)
    }

    /// Its first address.
    #[must_use]
    pub const fn net(&self) -> IpAddr {
        self.net
    }
}

const fn mask4(bits: u8) -> u32 {
    if bits == 0 { 0 } else { u32::MAX << (32 - bits) }
}

const fn mask6(bits: u8) -> u128 {
    if bits == 0 { 0 } else { u128::MAX << (128 - bits) }
}

impl FromStr for Prefix {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let bad =
            || RuleError::Bad(text.chars().take(80).collect(), "no address or address/prefix");
        let (ip, bits) = match text.split_once('/') {
            Some((ip, bits)) => (ip, Some(bits.parse().map_err(|_| bad())?)),
            None => (text, None),
        };
        let ip: IpAddr = ip.parse().map_err(|_| bad())?;
        let whole = if ip.is_ipv4() { 32 } else { 128 };
        Self::new(ip, bits.unwrap_or(whole)).ok_or_else(bad)
    }
}

impl core::fmt::Display for Prefix {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}/{}", self.net, self.bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str) -> Rule {
        text.parse().unwrap()
    }

    // PROTOCOL 6.15
    #[test]
    fn rules_are_read_as_people_write_them() {
        let net = |text: &str| Destination::Net(text.parse().unwrap());
        let cases = [
            ("10.0.0.0/8:443", Protocol::Tcp, net("10.0.0.0/8"), (443, 443)),
            ("10.1.2.3", Protocol::Tcp, net("10.1.2.3/32"), (1, u16::MAX)),
            ("udp:192.0.2.1:123", Protocol::Udp, net("192.0.2.1"), (123, 123)),
            ("[2001:db8::/32]:80-90", Protocol::Tcp, net("2001:db8::/32"), (80, 90)),
            ("2001:db8::1", Protocol::Tcp, net("2001:db8::1"), (1, u16::MAX)),
            ("name:PyPI.org:443", Protocol::Tcp, Destination::Name("pypi.org".into()), (443, 443)),
            (
                "*.example.org.",
                Protocol::Tcp,
                Destination::Beneath("example.org".into()),
                (1, u16::MAX),
            ),
            ("any:443", Protocol::Tcp, Destination::Any, (443, 443)),
        ];
        for (text, protocol, to, ports) in cases {
            assert_eq!(rule(text), Rule { protocol, to, ports }, "{text}");
        }
    }

    #[test]
    fn what_is_no_rule_says_so() {
        for text in [
            "",
            ":443",
            "10.0.0.0/33",
            "10.0.0",
            "10.0.0.256",
            "a..b",
            "a b",
            "*",
            "*.",
            "x:0",
            "x:9-8",
            "x:70000",
            "[::1",
            "[::1]x",
            "ftp:x:1:2",
            "-.1",
            "a/8",
            "::1/129",
        ] {
            assert!(text.parse::<Rule>().is_err(), "{text:?} was taken");
        }
        let many = Network::Egress(alloc::vec!["any".into(); RULES_MAX + 1]);
        assert_eq!(many.rules(), Err(RuleError::TooMany));
    }

    #[test]
    fn names_match_whole_labels() {
        let beneath = rule("*.example.org");
        assert!(beneath.names("a.example.org") && beneath.names("a.b.example.org"));
        assert!(!beneath.names("example.org") && !beneath.names("badexample.org"));
        assert!(!beneath.names(".example.org"));
        assert!(
            rule("example.org").names("example.org") && !rule("example.org").names("a.example.org")
        );
        assert!(!rule("10.0.0.0/8").names("10.0.0.1"));
    }

    #[test]
    fn prefixes_hold_what_begins_alike() {
        let ten: Prefix = "10.9.9.9/8".parse().unwrap();
        assert_eq!(ten.to_string(), "10.0.0.0/8");
        assert!(ten.contains("10.255.0.1".parse().unwrap()));
        assert!(
            !ten.contains("11.0.0.1".parse().unwrap()) && !ten.contains("::a00:1".parse().unwrap())
        );
        assert!(
            ten.covers(&"10.1.0.0/16".parse().unwrap())
                && !ten.covers(&"0.0.0.0/0".parse().unwrap())
        );
        let all: Prefix = "0.0.0.0/0".parse().unwrap();
        assert!(all.contains("255.255.255.255".parse().unwrap()) && all.covers(&ten));
    }

    #[test]
    fn published_ports_are_one_or_two_numbers() {
        assert_eq!("80".parse(), Ok(Publish { port: 80, host_port: 0 }));
        assert_eq!("8080:80".parse(), Ok(Publish { port: 80, host_port: 8080 }));
        assert!("80:0".parse::<Publish>().is_err() && "x".parse::<Publish>().is_err());
        let twice = [Publish { port: 1, host_port: 9 }, Publish { port: 2, host_port: 9 }];
        assert!(Publish::check(&twice).is_err() && Publish::check(&twice[..1]).is_ok());
    }
}
