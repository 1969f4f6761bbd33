//! The host map as a placer keeps it: one flat private file that is mapped read-only.
//!
//! ```text
//! | magic u64 | epoch u64 | version u64 | count u64 | kind u8, 0 u8, port u16, 0 u32 | 0 [24] | ids u64 ... | addresses ... |
//! ```
//! Then 32 bytes of BLAKE3 over all of it: the pages were checked when they were fetched, this catches a disk that
//! lies or a file that was cut. An address has 4 bytes where all hosts are IPv4 on one port, else 18 (IPv6 or mapped, port).
//! Ids ascend, and being random they are found by interpolation in a few steps.
//!
//! Left out: files. The daemon writes [`encode`]'s bytes to a private file, maps it and opens a [`MapView`] over it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use wire::{
    HostId,
    codec::Malformed,
    limits::HOSTS_MAX,
    map::{HostAddr, MapVersion},
};

const MAGIC: [u8; 8] = *b"VLYMAP\0\x01";
const HEADER_BYTES: usize = 64;
const DIGEST_BYTES: usize = 32;
const NARROW_BYTES: usize = 4;
const WIDE_BYTES: usize = 18;
const NARROW: u8 = 0;
const WIDE: u8 = 1;

/// Interpolation steps before the search halves: ids of a hostile fleet may lie anyhow.
const INTERPOLATIONS_MAX: u32 = 4;

/// A map that was checked.
#[derive(Debug)]
pub struct MapView<B> {
    bytes: B,
    version: MapVersion,
    len: usize,
    kind: u8,
    port: u16,
}

/// Writes a map. `hosts` ascend by id.
///
/// # Panics
/// If they do not, or are more than [`HOSTS_MAX`].
#[must_use]
pub fn encode(version: MapVersion, hosts: &[(HostId, HostAddr)]) -> Vec<u8> {
    encode_from(version, || hosts.iter().copied())
}

/// As [`encode`], of hosts that lie in pieces: `hosts` gives them as often as it is asked, by ascending id.
///
/// # Panics
/// As [`encode`].
#[must_use]
pub fn encode_from<I>(version: MapVersion, hosts: impl Fn() -> I) -> Vec<u8>
where
    I: Iterator<Item = (HostId, HostAddr)>,
{
    let (mut count, mut last, mut ascend) = (0, None, true);
    let port = hosts().next().map_or(0, |(_, addr)| addr.port);
    let mut narrow = true;
    for (host, addr) in hosts() {
        count += 1;
        ascend &= last.is_none_or(|last| last < host);
        last = Some(host);
        narrow &= addr.ip.is_ipv4() && addr.port == port;
    }
    assert!(count <= HOSTS_MAX, "a map holds its hosts");
    assert!(ascend, "ids ascend");
    let address_bytes = if narrow { NARROW_BYTES } else { WIDE_BYTES };
    let len = HEADER_BYTES + count * (8 + address_bytes) + DIGEST_BYTES;
    let mut bytes = Vec::with_capacity(len);
    bytes.extend_from_slice(&MAGIC);
    for number in [version.epoch, version.version, count as u64] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(&[if narrow { NARROW } else { WIDE }, 0]);
    bytes.extend_from_slice(&if narrow { port } else { 0 }.to_le_bytes());
    bytes.resize(HEADER_BYTES, 0);
    for (host, _) in hosts() {
        bytes.extend_from_slice(&host.0.to_le_bytes());
    }
    for (_, addr) in hosts() {
        match addr.ip {
            IpAddr::V4(ip) if narrow => bytes.extend_from_slice(&ip.octets()),
            IpAddr::V4(ip) => bytes.extend_from_slice(&ip.to_ipv6_mapped().octets()),
            IpAddr::V6(ip) => bytes.extend_from_slice(&ip.octets()),
        }
        if !narrow {
            bytes.extend_from_slice(&addr.port.to_le_bytes());
        }
    }
    let digest = blake3::hash(&bytes);
    bytes.extend_from_slice(digest.as_bytes());
    bytes
}

fn number(bytes: &[u8], at: usize) -> u64 {
    let mut out = [0; 8];
    out.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(out)
}

impl<B: AsRef<[u8]>> MapView<B> {
    /// Checks all of a map once: length, digest, ascending ids, ports.
    ///
    /// # Errors
    /// [`Malformed`], by rule. Then the last good map stays.
    pub fn open(bytes: B) -> Result<Self, Malformed> {
        let all = bytes.as_ref();
        if all.len() < HEADER_BYTES + DIGEST_BYTES {
            return Err(Malformed::Length);
        }
        if all[..8] != MAGIC {
            return Err(Malformed::Magic);
        }
        let version = MapVersion { epoch: number(all, 8), version: number(all, 16) };
        let len = usize::try_from(number(all, 24)).map_err(|_| Malformed::Length)?;
        let (kind, port) = (all[32], u16::from_le_bytes([all[34], all[35]]));
        let address_bytes = match kind {
            NARROW => NARROW_BYTES,
            WIDE => WIDE_BYTES,
            _ => return Err(Malformed::Version),
        };
        if len > HOSTS_MAX || all.len() != HEADER_BYTES + len * (8 + address_bytes) + DIGEST_BYTES {
            return Err(Malformed::Length);
        }
        let (said, digest) = all.split_at(all.len() - DIGEST_BYTES);
        if blake3::hash(said).as_bytes() != digest {
            return Err(Malformed::Value);
        }
        let view = Self { bytes, version, len, kind, port };
        let ascend = view.ids().is_sorted_by(|a, b| a < b);
        if !ascend || (0..len).any(|at| view.addr(at).port == 0) {
            return Err(Malformed::Value);
        }
        Ok(view)
    }

    /// Which map it is.
    #[must_use]
    pub const fn version(&self) -> MapVersion {
        self.version
    }

    /// Hosts in it.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no host.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn id_bytes(&self) -> &[[u8; 8]] {
        self.bytes.as_ref()[HEADER_BYTES..HEADER_BYTES + 8 * self.len].as_chunks().0
    }

    /// Ids, ascending.
    pub fn ids(&self) -> impl ExactSizeIterator<Item = HostId> {
        self.id_bytes().iter().map(|id| HostId(u64::from_le_bytes(*id)))
    }

    /// Hosts and addresses, by ascending id.
    pub fn hosts(&self) -> impl ExactSizeIterator<Item = (HostId, HostAddr)> {
        self.ids().enumerate().map(|(at, id)| (id, self.addr(at)))
    }

    /// The id at an index.
    ///
    /// # Panics
    /// Beyond [`MapView::len`].
    #[must_use]
    pub fn id(&self, at: usize) -> HostId {
        HostId(u64::from_le_bytes(self.id_bytes()[at]))
    }

    /// The address at an index.
    ///
    /// # Panics
    /// Beyond [`MapView::len`].
    #[must_use]
    pub fn addr(&self, at: usize) -> HostAddr {
        let addresses = &self.bytes.as_ref()[HEADER_BYTES + 8 * self.len..];
        if self.kind == NARROW {
            let ip = addresses.as_chunks::<NARROW_BYTES>().0[at];
            return HostAddr { ip: IpAddr::V4(Ipv4Addr::from(ip)), port: self.port };
        }
        let [ip @ .., p0, p1] = addresses.as_chunks::<WIDE_BYTES>().0[at];
        HostAddr { ip: Ipv6Addr::from(ip).to_canonical(), port: u16::from_le_bytes([p0, p1]) }
    }

    /// The index of a host.
    #[must_use]
    pub fn find(&self, host: HostId) -> Option<usize> {
        let ids = self.id_bytes();
        let at = |index: usize| u64::from_le_bytes(ids[index]);
        let (mut low, mut high) = (0, self.len); // It is in low..high, if anywhere.
        let (mut least, mut most) = (0, u64::MAX);
        for step in 0.. {
            if low >= high || host.0 < least || host.0 > most {
                return None;
            }
            let guess = if step < INTERPOLATIONS_MAX {
                let (span, into) = (most - least, host.0 - least);
                let share = u128::from(into) * ((high - low) as u128) / (u128::from(span) + 1);
                low + usize::try_from(share).unwrap_or(0)
            } else {
                low + (high - low) / 2
            };
            match at(guess).cmp(&host.0) {
                std::cmp::Ordering::Equal => return Some(guess),
                std::cmp::Ordering::Less => (low, least) = (guess + 1, at(guess) + 1),
                std::cmp::Ordering::Greater => (high, most) = (guess, at(guess) - 1),
            }
        }
        None
    }

    /// The index of the first host whose id is not below this.
    #[must_use]
    pub fn lower_bound(&self, host: HostId) -> usize {
        self.id_bytes().partition_point(|id| u64::from_le_bytes(*id) < host.0)
    }

    /// Where launches reach a host.
    #[must_use]
    pub fn addr_of(&self, host: HostId) -> Option<HostAddr> {
        self.find(host).map(|at| self.addr(at))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn addr(id: u64, wide: bool) -> HostAddr {
        let [a, b, c, d, rest @ ..] = id.to_be_bytes();
        let port = 1 + u16::from_be_bytes([rest[0], rest[1]]) / 2;
        if wide && id.is_multiple_of(3) {
            return HostAddr { ip: Ipv6Addr::from(u128::from(id) << 64 | 1).into(), port };
        }
        HostAddr { ip: Ipv4Addr::new(a, b, c, d).into(), port: if wide { port } else { 7 } }
    }

    proptest! {
        #[test]
        fn every_host_is_found_where_it_was_put_and_no_other(
            ids: std::collections::BTreeSet<u64>, near: u64, wide: bool, others: Vec<u64>,
        ) {
            // Some evenly spread, some in a row: interpolation must find both.
            let row = (0..200).map(|at| near.wrapping_add(at));
            let ids: std::collections::BTreeSet<u64> = ids.into_iter().chain(row).collect();
            let hosts: Vec<_> = ids.iter().map(|id| (HostId(*id), addr(*id, wide))).collect();
            let version = MapVersion { epoch: 2, version: 9 };
            let map = MapView::open(encode(version, &hosts)).unwrap();
            prop_assert_eq!((map.version(), map.len()), (version, hosts.len()));
            prop_assert!(map.hosts().eq(hosts.iter().copied()));
            for (at, (host, addr)) in hosts.iter().enumerate() {
                prop_assert_eq!(map.find(*host), Some(at));
                prop_assert_eq!(map.addr_of(*host), Some(*addr));
            }
            for other in others {
                prop_assert_eq!(map.find(HostId(other)).is_some(), ids.contains(&other));
            }
        }
    }

    /// FAULTS M1, for the placer's own copy.
    #[test]
    fn every_flipped_bit_and_every_truncation_is_noticed() {
        for wide in [false, true] {
            let hosts: Vec<_> = (1..9).map(|id| (HostId(id << 40), addr(id << 40, wide))).collect();
            let good = encode(MapVersion { epoch: 1, version: 1 }, &hosts);
            assert!(MapView::open(&good).is_ok());
            for len in 0..good.len() {
                assert!(MapView::open(&good[..len]).is_err());
            }
            for bit in 0..good.len() * 8 {
                let mut bad = good.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                assert!(MapView::open(bad).is_err(), "bit {bit}");
            }
        }
    }
}
