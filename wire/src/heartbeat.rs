//! The heartbeat of a host, and the directive that may answer it.
//!
//! Both have a fixed size and alignment 1, so that they are read where the socket put them. Sealing and opening
//! go through [`Heartbeat::seal`] and [`open`]; there is no way to a [`Heartbeat`] from outside that skips the tag.

use core::net::{IpAddr, Ipv6Addr};

use rkyv::{Archive, Deserialize, Serialize};

use crate::{
    capacity::{CapacityWord, Stamp},
    codec::{self, Malformed},
    datagram::{self, Kind, Sender, Verified},
    id::{HostId, Incarnation, Seq},
    limits::{DATAGRAM_BYTES_MAX, HEARTBEAT_INTERVAL_MS_RANGE, SHAPES_MAX},
    map::HostAddr,
    seal::{KeyEpoch, Role, SenderKey},
};

/// What a host says of itself. The host id is the datagram's sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Clone, Copy, Debug))]
pub struct Heartbeat {
    /// This start of the daemon.
    pub incarnation: Incarnation,
    /// This heartbeat.
    pub seq: Seq,
    /// Where launches go: an IPv6 address, or an IPv4 one mapped into it.
    pub ip: [u8; 16],
    /// Where launches go: the QUIC port. Zero is malformed.
    pub port: u16,
    /// Free slots a shape, margin already taken off.
    pub free: [u16; SHAPES_MAX],
    /// Slots a shape of the empty host.
    pub total: [u16; SHAPES_MAX],
    /// Sandboxes that run.
    pub running: u32,
    /// Milliseconds until the next heartbeat unless something changes.
    pub interval_ms: u32,
    /// [`Heartbeat::DRAINING`] and the like. Unknown bits are kept and ignored.
    pub flags: u16,
}

impl Heartbeat {
    /// Takes no new work.
    pub const DRAINING: u16 = 1;
    /// Cannot start sandboxes.
    pub const SICK: u16 = 2;
    /// Is stopping: the last heartbeat of its incarnation.
    pub const STOPPING: u16 = 4;
    /// Runs no real sandboxes (`--boxes none`): figures must say so.
    pub const NO_BOXES: u16 = 8;
    /// Wants a directive, even an empty one: how a host learns that its aggregator is there (PROTOCOL 3.5).
    pub const ASK: u16 = 16;

    /// The word that a placer gets.
    #[must_use]
    pub fn word(&self) -> CapacityWord {
        let flag = |bit, flag| if self.flags & bit != 0 { flag } else { 0 };
        let flags = flag(Self::DRAINING | Self::STOPPING, CapacityWord::DRAINING)
            | flag(Self::SICK, CapacityWord::SICK);
        CapacityWord::new(self.free, flags, Stamp::of(self.seq))
    }

    /// Where launches go.
    #[must_use]
    pub fn addr(&self) -> HostAddr {
        HostAddr { ip: Ipv6Addr::from(self.ip).to_canonical(), port: self.port }
    }

    /// An address as the record carries it.
    #[must_use]
    pub fn ip_bytes(ip: IpAddr) -> [u8; 16] {
        match ip {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        }
    }

    /// Writes the datagram; returns its length in bytes.
    pub fn seal(
        &self,
        host: HostId,
        key_epoch: KeyEpoch,
        key: &SenderKey,
        out: &mut [u8; DATAGRAM_BYTES_MAX],
    ) -> usize {
        let sender = Sender { role: Role::Host, id: host.0, key_epoch };
        datagram::seal(Kind::Heartbeat, sender, key, out, |body| codec::put(self, body))
    }
}

/// A heartbeat out of a verified datagram.
///
/// # Errors
/// [`Malformed`]: not a heartbeat of a host, or a field out of bounds.
pub fn open(datagram: &Verified<'_>) -> Result<(HostId, Heartbeat), Malformed> {
    if datagram.kind != Kind::Heartbeat || datagram.sender.role != Role::Host {
        return Err(Malformed::Magic);
    }
    let body = codec::view::<ArchivedHeartbeat>(datagram.body)?;
    let heartbeat = Heartbeat {
        incarnation: Incarnation(body.incarnation.0.to_native()),
        seq: Seq(body.seq.0.to_native()),
        ip: body.ip,
        port: body.port.to_native(),
        free: body.free.map(|count| count.to_native()),
        total: body.total.map(|count| count.to_native()),
        running: body.running.to_native(),
        interval_ms: body.interval_ms.to_native(),
        flags: body.flags.to_native(),
    };
    let interval_fits = HEARTBEAT_INTERVAL_MS_RANGE.contains(&u64::from(heartbeat.interval_ms));
    if heartbeat.port == 0 || !interval_fits {
        return Err(Malformed::Value);
    }
    Ok((HostId(datagram.sender.id), heartbeat))
}

/// What an aggregator tells a host, when there is something to say. Sealed under the host's own key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Clone, Copy, Debug))]
pub struct Directive {
    /// The heartbeat that it answers; others are stale (PROTOCOL 3.2).
    pub incarnation: Incarnation,
    /// The heartbeat that it answers.
    pub seq: Seq,
    /// One of [`Directive::KEEP`], [`Directive::DRAIN`], [`Directive::RESUME`].
    pub drain: u8,
    /// With a drain: milliseconds left until what still runs is stopped; zero for never.
    pub drain_deadline_ms: u64,
    /// New time between heartbeats in milliseconds; zero keeps the old.
    pub interval_ms: u32,
    /// New key epoch; zero keeps the old.
    pub key_epoch: u32,
    /// The key of that epoch, wrapped under the key that seals this (PROTOCOL 3.4).
    pub wrapped_key: [u8; 32],
}

impl Directive {
    /// Nothing about draining.
    pub const KEEP: u8 = 0;
    /// Take no new work.
    pub const DRAIN: u8 = 1;
    /// Take work again.
    pub const RESUME: u8 = 2;

    /// One that says nothing yet, in answer to a heartbeat.
    #[must_use]
    pub const fn answering(incarnation: Incarnation, seq: Seq) -> Self {
        Self {
            incarnation,
            seq,
            drain: Self::KEEP,
            drain_deadline_ms: 0,
            interval_ms: 0,
            key_epoch: 0,
            wrapped_key: [0; 32],
        }
    }

    /// Whether it would change nothing.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.drain == Self::KEEP && self.interval_ms == 0 && self.key_epoch == 0
    }

    /// Writes the datagram; returns its length in bytes.
    pub fn seal(
        &self,
        host: HostId,
        key_epoch: KeyEpoch,
        key: &SenderKey,
        out: &mut [u8; DATAGRAM_BYTES_MAX],
    ) -> usize {
        let sender = Sender { role: Role::Host, id: host.0, key_epoch };
        datagram::seal(Kind::Directive, sender, key, out, |body| codec::put(self, body))
    }

    /// A directive out of a verified datagram.
    ///
    /// # Errors
    /// [`Malformed`]: not a directive, or a field out of bounds.
    pub fn open(datagram: &Verified<'_>) -> Result<(HostId, Self), Malformed> {
        if datagram.kind != Kind::Directive || datagram.sender.role != Role::Host {
            return Err(Malformed::Magic);
        }
        let body = codec::view::<ArchivedDirective>(datagram.body)?;
        let directive = Self {
            incarnation: Incarnation(body.incarnation.0.to_native()),
            seq: Seq(body.seq.0.to_native()),
            drain: body.drain,
            drain_deadline_ms: body.drain_deadline_ms.to_native(),
            interval_ms: body.interval_ms.to_native(),
            key_epoch: body.key_epoch.to_native(),
            wrapped_key: body.wrapped_key,
        };
        let interval_ms = u64::from(directive.interval_ms);
        let interval_fits = interval_ms == 0 || HEARTBEAT_INTERVAL_MS_RANGE.contains(&interval_ms);
        if directive.drain > Self::RESUME || !interval_fits {
            return Err(Malformed::Value);
        }
        Ok((HostId(datagram.sender.id), directive))
    }
}
