//! What an operator sets for all boxes of a host, as hostd says it and as links use it.

use std::net::SocketAddr;

use rkyv::{Archive, Deserialize, Serialize};
use wire::network::{Destination, Network, Prefix, RuleError};

use crate::{
    guard::Guard,
    limits::{CONNECTIONS_DEFAULT, CONNECTIONS_MAX},
};

/// An operator's settings. Text, as they stand in a file; checked by [`EgressSettings::check`].
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct EgressSettings {
    /// Ranges that are open in spite of being private, link-local, loopback or the machine's own.
    pub allow: Vec<String>,
    /// Ranges that are closed in spite of everything.
    pub deny: Vec<String>,
    /// The fleet's doors, `ip:port` each, that stay shut whatever `allow` says.
    pub doors: Vec<String>,
    /// Name servers, `ip:port` each; empty: the machine's.
    pub resolvers: Vec<String>,
    /// Connections of one box.
    pub connections_max: u32,
    /// Bytes a second of one box, both directions together; zero for no bound.
    pub bytes_per_s: u64,
}

impl Default for EgressSettings {
    fn default() -> Self {
        Self {
            allow: Vec::new(),
            deny: Vec::new(),
            doors: Vec::new(),
            resolvers: Vec::new(),
            connections_max: CONNECTIONS_DEFAULT,
            bytes_per_s: 0,
        }
    }
}

/// A setting or a rule that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// A range or a rule that is none.
    #[error("{0}")]
    Rule(#[from] RuleError),
    /// An address with port that is none.
    #[error("{0}: write it as ip:port")]
    Address(String),
    /// Out of bounds.
    #[error("egress connections: {0} is not between 1 and {CONNECTIONS_MAX}")]
    Connections(u32),
    /// A rule whose every address is closed on this host.
    #[error(
        "egress to {0} is closed by this host's operator (egress_allow opens ranges); nothing was started"
    )]
    Closed(Prefix),
    /// A rule about IPv6.
    #[error("egress to {0}: sandboxes have no IPv6 yet; nothing was started")]
    Ipv6(Prefix),
}

/// The same, checked.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) guard: Guard,
    pub(crate) resolvers: Vec<SocketAddr>,
    pub(crate) connections_max: usize,
    pub(crate) bytes_per_s: u64,
}

impl EgressSettings {
    /// Checks them.
    ///
    /// # Errors
    /// Which one cannot be.
    pub fn check(&self) -> Result<(), PolicyError> {
        self.checked().map(|_| ())
    }

    pub(crate) fn checked(&self) -> Result<Settings, PolicyError> {
        let prefixes = |list: &[String]| -> Result<Vec<Prefix>, PolicyError> {
            list.iter().map(|text| text.parse().map_err(PolicyError::from)).collect()
        };
        let addresses = |list: &[String]| -> Result<Vec<SocketAddr>, PolicyError> {
            let address =
                |text: &String| text.parse().map_err(|_| PolicyError::Address(text.clone()));
            list.iter().map(address).collect()
        };
        if self.connections_max == 0 || self.connections_max > CONNECTIONS_MAX {
            return Err(PolicyError::Connections(self.connections_max));
        }
        let resolvers = match addresses(&self.resolvers)? {
            list if list.is_empty() => crate::names::of_machine(),
            list => list,
        };
        Ok(Settings {
            guard: Guard {
                allow: prefixes(&self.allow)?,
                deny: prefixes(&self.deny)?,
                doors: addresses(&self.doors)?,
            },
            resolvers,
            connections_max: usize::try_from(self.connections_max).unwrap_or(1),
            bytes_per_s: self.bytes_per_s,
        })
    }

    /// Looks whether a launch's rules can be kept here: one that can reach nothing is told before anything starts.
    ///
    /// # Errors
    /// Which rule, and why.
    pub fn admits(&self, network: &Network) -> Result<(), PolicyError> {
        let settings = self.checked()?;
        for rule in network.rules()? {
            if let Destination::Net(range) = &rule.to {
                if range.net().is_ipv6() {
                    return Err(PolicyError::Ipv6(*range));
                }
                if settings.guard.closes(range) {
                    return Err(PolicyError::Closed(*range));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_that_reach_nothing_are_refused_by_name() {
        let settings = EgressSettings { allow: vec!["10.7.0.0/16".into()], ..Default::default() };
        let egress = |text: &str| Network::Egress(vec![text.into()]);
        settings.admits(&egress("10.7.1.1:443")).unwrap();
        settings.admits(&egress("pypi.org:443")).unwrap();
        settings.admits(&Network::None).unwrap();
        assert!(matches!(
            settings.admits(&egress("169.254.169.254:80")),
            Err(PolicyError::Closed(_))
        ));
        assert!(matches!(settings.admits(&egress("[2001:db8::1]:80")), Err(PolicyError::Ipv6(_))));
        assert!(matches!(settings.admits(&egress("a b")), Err(PolicyError::Rule(_))));
    }

    #[test]
    fn settings_that_cannot_be_are_told() {
        let bad = |settings: EgressSettings| settings.check().unwrap_err();
        bad(EgressSettings { allow: vec!["10.0.0.0/40".into()], ..Default::default() });
        bad(EgressSettings { resolvers: vec!["1.1.1.1".into()], ..Default::default() });
        bad(EgressSettings { connections_max: 0, ..Default::default() });
        EgressSettings::default().check().unwrap();
    }
}
