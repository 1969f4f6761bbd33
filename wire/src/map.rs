//! The host map: which hosts there are and where launches reach them.
//!
//! A small [`Head`] names immutable [`Page`]s by digest. Each page covers a fixed range of ids, so that a refresh
//! fetches only pages whose digest changed. A host costs 12 bytes where the page's hosts are IPv4 on one port; wider
//! rows carry ports and IPv6 where a host of the page needs them. Capacity is not here: the map changes when hosts
//! come and go, capacity with every launch.
//!
//! ```text
//! page:  | "VMP1" | row kind u8 | 0 u8 | port u16 | count u32 | 0 u32 | rows, by ascending id ... |
//! row:   | id u64 | IPv4 [4] |            or | id | IPv4 | port u16 |   or | id | IPv6 [16] | port |
//! ```

use alloc::vec::Vec;
use core::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use rkyv::{Archive, Deserialize, Serialize};

use crate::{
    codec::{self, Malformed},
    id::HostId,
    limits::{HOSTS_MAX, MAP_PAGE_HOSTS_MAX, MAP_PAGES_MAX},
};

/// Where launches reach a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostAddr {
    /// Its address; an IPv4 one is never hidden in IPv6.
    pub ip: IpAddr,
    /// Its QUIC port.
    pub port: u16,
}

impl From<HostAddr> for SocketAddr {
    fn from(addr: HostAddr) -> Self {
        Self::new(addr.ip, addr.port)
    }
}

impl fmt::Display for HostAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        SocketAddr::from(*self).fmt(f)
    }
}

/// BLAKE3 of a page's bytes; also its name in the object store.
pub type Digest = [u8; 32];

/// Version of the map's format that this build writes, and the newest that it reads.
pub const FORMAT: u32 = 1;

/// Names one version of the map. Higher wins: first the epoch, then the version.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Archive,
    Serialize,
    Deserialize,
)]
#[rkyv(derive(Clone, Copy, Debug))]
pub struct MapVersion {
    /// Grows when leadership changes hands.
    pub epoch: u64,
    /// Grows with each publication.
    pub version: u64,
}

/// What a publisher puts with compare-and-swap, and readers fetch first.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Head {
    /// [`FORMAT`].
    pub format: u32,
    /// This version.
    pub version: MapVersion,
    /// The one it replaced.
    pub previous: MapVersion,
    /// Drawn for this publication: tells a publisher whether a PUT of unknown outcome was its own.
    pub nonce: [u8; 16],
    /// Milliseconds since 1970 by the publisher's clock: for people, never compared.
    pub created_ms: u64,
    /// Hosts in all pages.
    pub count: u64,
    /// Pages by ascending range; ranges cover all ids without gap or overlap.
    pub pages: Vec<PageRef>,
}

/// One page as its head names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Clone, Copy, Debug))]
pub struct PageRef {
    /// First id of the page's range.
    pub first: u64,
    /// Last id of the page's range.
    pub last: u64,
    /// Hosts in it.
    pub count: u32,
    /// Bytes of it.
    pub bytes: u32,
    /// Its name.
    pub digest: Digest,
}

/// Largest head in bytes: pages at their most, and the rest.
pub const HEAD_BYTES_MAX: usize = 256 + MAP_PAGES_MAX * 64;

impl Head {
    /// The head's bytes, with a digest of its own in front: a flipped bit never yields another head.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let body = codec::write(self);
        let mut bytes = Vec::with_capacity(32 + body.len());
        bytes.extend_from_slice(blake3::hash(&body).as_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    /// Checks a head: digest, format, counts, and that the ranges cover all ids in order.
    ///
    /// # Errors
    /// [`Malformed`], by rule.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Malformed> {
        let (digest, body) = bytes.split_first_chunk::<32>().ok_or(Malformed::Length)?;
        if blake3::hash(body) != *digest {
            return Err(Malformed::Value);
        }
        let head: Self = codec::read(body, HEAD_BYTES_MAX)?;
        if head.format != FORMAT {
            return Err(Malformed::Version);
        }
        let count: u64 = head.pages.iter().map(|page| u64::from(page.count)).sum();
        if head.pages.len() > MAP_PAGES_MAX || count != head.count || count > HOSTS_MAX as u64 {
            return Err(Malformed::Value);
        }
        let mut next = Some(0);
        for page in &head.pages {
            let in_order = next == Some(page.first) && page.first <= page.last;
            if !in_order || page.count as usize > MAP_PAGE_HOSTS_MAX {
                return Err(Malformed::Value);
            }
            next = page.last.checked_add(1);
        }
        if next.is_some() {
            return Err(Malformed::Value);
        }
        Ok(head)
    }
}

const MAGIC: [u8; 4] = *b"VMP1";
const PAGE_HEAD_BYTES: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
enum RowKind {
    V4 = 0,
    V4Port = 1,
    V6Port = 2,
}

impl RowKind {
    const fn bytes(self) -> usize {
        match self {
            Self::V4 => 12,
            Self::V4Port => 14,
            Self::V6Port => 26,
        }
    }

    const fn of(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::V4),
            1 => Some(Self::V4Port),
            2 => Some(Self::V6Port),
            _ => None,
        }
    }
}

/// A page that was checked: rows in ascending order of id, inside the range that its head gives.
#[derive(Clone, Copy, Debug)]
pub struct Page<'a> {
    kind: RowKind,
    port: u16,
    rows: &'a [u8],
}

impl<'a> Page<'a> {
    /// Checks a page's bytes against what the head says of it.
    ///
    /// # Errors
    /// [`Malformed`]: other bytes than the digest's, or rows that break the format.
    pub fn parse(bytes: &'a [u8], named: &PageRef) -> Result<Self, Malformed> {
        if bytes.len() != named.bytes as usize {
            return Err(Malformed::Length);
        }
        if blake3::hash(bytes) != named.digest {
            return Err(Malformed::Value);
        }
        let (head, rows) = bytes.split_first_chunk::<PAGE_HEAD_BYTES>().ok_or(Malformed::Length)?;
        let [m0, m1, m2, m3, kind, zero, p0, p1, c0, c1, c2, c3, zeros @ ..] = *head;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(Malformed::Magic);
        }
        let kind = RowKind::of(kind).ok_or(Malformed::Version)?;
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        if zero != 0 || zeros != [0; 4] || count != named.count {
            return Err(Malformed::Value);
        }
        if rows.len() != count as usize * kind.bytes() {
            return Err(Malformed::Length);
        }
        let page = Self { kind, port: u16::from_le_bytes([p0, p1]), rows };
        page.check_rows(named)?;
        Ok(page)
    }

    fn check_rows(&self, named: &PageRef) -> Result<(), Malformed> {
        let mut least = Some(named.first);
        for (HostId(id), addr) in self.hosts() {
            let in_order = least.is_some_and(|least| id >= least) && id <= named.last;
            if !in_order || addr.port == 0 {
                return Err(Malformed::Value);
            }
            least = id.checked_add(1);
        }
        Ok(())
    }

    /// The hosts, by ascending id.
    pub fn hosts(&self) -> impl ExactSizeIterator<Item = (HostId, HostAddr)> + 'a {
        let (kind, port) = (self.kind, self.port);
        self.rows.chunks_exact(kind.bytes()).map(move |row| read_row(kind, port, row))
    }

    /// Writes the page of `hosts`, which must be in ascending order of id, in the narrowest rows that hold them.
    ///
    /// # Panics
    /// With more than [`MAP_PAGE_HOSTS_MAX`] hosts.
    #[must_use]
    pub fn encode(hosts: &[(HostId, HostAddr)]) -> Vec<u8> {
        assert!(hosts.len() <= MAP_PAGE_HOSTS_MAX, "a page holds its hosts");
        let port = hosts.first().map_or(0, |(_, addr)| addr.port);
        let kind = hosts.iter().map(|(_, addr)| row_kind(*addr, port)).max().unwrap_or(RowKind::V4);
        let mut bytes = Vec::with_capacity(PAGE_HEAD_BYTES + hosts.len() * kind.bytes());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&[kind as u8, 0]);
        bytes.extend_from_slice(&port.to_le_bytes());
        #[expect(clippy::cast_possible_truncation, reason = "asserted above")]
        bytes.extend_from_slice(&(hosts.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        for &(id, addr) in hosts {
            bytes.extend_from_slice(&id.0.to_le_bytes());
            match (kind, addr.ip) {
                (RowKind::V6Port, IpAddr::V6(ip)) => bytes.extend_from_slice(&ip.octets()),
                (RowKind::V6Port, IpAddr::V4(ip)) => {
                    bytes.extend_from_slice(&ip.to_ipv6_mapped().octets());
                }
                (_, IpAddr::V4(ip)) => bytes.extend_from_slice(&ip.octets()),
                (_, IpAddr::V6(_)) => unreachable!("the widest host decides the row kind"),
            }
            if kind != RowKind::V4 {
                bytes.extend_from_slice(&addr.port.to_le_bytes());
            }
        }
        bytes
    }
}

const fn row_kind(addr: HostAddr, port: u16) -> RowKind {
    match addr.ip {
        IpAddr::V4(_) if addr.port == port => RowKind::V4,
        IpAddr::V4(_) => RowKind::V4Port,
        IpAddr::V6(_) => RowKind::V6Port,
    }
}

fn read_row(kind: RowKind, page_port: u16, row: &[u8]) -> (HostId, HostAddr) {
    fn take<const N: usize>(row: &[u8], at: usize) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(&row[at..at + N]);
        out
    }
    let id = HostId(u64::from_le_bytes(take(row, 0)));
    let (ip, port) = match kind {
        RowKind::V4 => (IpAddr::V4(Ipv4Addr::from(take::<4>(row, 8))), page_port),
        RowKind::V4Port => {
            (IpAddr::V4(Ipv4Addr::from(take::<4>(row, 8))), u16::from_le_bytes(take(row, 12)))
        }
        RowKind::V6Port => {
            let ip = Ipv6Addr::from(take::<16>(row, 8)).to_canonical();
            (ip, u16::from_le_bytes(take(row, 24)))
        }
    };
    (id, HostAddr { ip, port })
}

/// Where maps are in the object store.
pub mod path {
    use alloc::{format, string::String};

    use super::Digest;

    /// The one object that changes.
    pub const HEAD: &str = "map/head";

    /// A page, named by its digest.
    #[must_use]
    pub fn page(digest: &Digest) -> String {
        format!("map/page/{}", blake3::Hash::from_bytes(*digest).to_hex())
    }
}
