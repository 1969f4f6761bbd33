//! IPv4 packets of a box: looking at what came, and writing what the link itself has to say.
//!
//! All parsing is smoltcp's checked views over bytes that a hostile program wrote. Left out: fragments (a box has no
//! reason to send them over a link of 64 KiB), IPv6, options.

use std::net::Ipv4Addr;

use smoltcp::{
    phy::ChecksumCapabilities,
    wire::{
        Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr, IpAddress, IpProtocol, Ipv4Packet,
        Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket, UdpRepr,
    },
};

/// Hops that what the link writes itself may take: it is the next one.
const HOPS: u8 = 64;

/// Bytes of the refused packet that an ICMP message repeats: headers and eight more.
const QUOTED_MAX: usize = 64;

/// One end of what passes to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Flow {
    /// The box's port.
    pub(crate) port: u16,
    /// Where to.
    pub(crate) to: Ipv4Addr,
    /// Which port there.
    pub(crate) to_port: u16,
}

/// What a packet is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Seen<'a> {
    /// A segment that begins a connection.
    Syn(Flow),
    /// Another segment.
    Segment(Flow),
    /// A datagram with its payload.
    Datagram(Flow, &'a [u8]),
    /// Something that no policy lets pass.
    Other,
    /// Not worth an answer.
    Junk,
}

/// Looks at a packet that came from the box.
pub(crate) fn look(bytes: &[u8], from: Ipv4Addr) -> Seen<'_> {
    let Ok(packet) = Ipv4Packet::new_checked(bytes) else { return Seen::Junk };
    // Its own kernel writes the source; another would have its answers go astray.
    let fragment = packet.more_frags() || packet.frag_offset() != 0;
    if packet.version() != 4 || packet.src_addr() != from || fragment {
        return Seen::Junk;
    }
    let header = usize::from(packet.header_len());
    let whole = usize::from(packet.total_len()).min(bytes.len());
    let Some(payload) = bytes.get(header..whole) else { return Seen::Junk };
    let to = packet.dst_addr();
    match packet.next_header() {
        IpProtocol::Tcp => {
            let Ok(segment) = TcpPacket::new_checked(payload) else { return Seen::Junk };
            let flow = Flow { port: segment.src_port(), to, to_port: segment.dst_port() };
            if segment.syn() && !segment.ack() && !segment.rst() {
                Seen::Syn(flow)
            } else {
                Seen::Segment(flow)
            }
        }
        IpProtocol::Udp => {
            let Ok(datagram) = UdpPacket::new_checked(payload) else { return Seen::Junk };
            let flow = Flow { port: datagram.src_port(), to, to_port: datagram.dst_port() };
            let length = usize::from(datagram.len());
            match payload.get(8..length) {
                Some(payload) => Seen::Datagram(flow, payload),
                None => Seen::Junk,
            }
        }
        // A device announces itself to groups; nobody is there.
        IpProtocol::Igmp => Seen::Junk,
        _ => Seen::Other,
    }
}

fn write(from: Ipv4Addr, to: Ipv4Addr, kind: IpProtocol, length: usize) -> (Vec<u8>, usize) {
    let header = Ipv4Repr {
        src_addr: from,
        dst_addr: to,
        next_header: kind,
        payload_len: length,
        hop_limit: HOPS,
    };
    let mut bytes = vec![0; header.buffer_len() + length];
    header.emit(&mut Ipv4Packet::new_unchecked(&mut bytes[..]), &ChecksumCapabilities::default());
    (bytes, header.buffer_len())
}

/// Says that there is no such connection: the answer to a segment. `None` to one that is itself a reset.
pub(crate) fn reset(bytes: &[u8]) -> Option<Vec<u8>> {
    let packet = Ipv4Packet::new_checked(bytes).ok()?;
    let segment = TcpPacket::new_checked(packet.payload()).ok()?;
    if segment.rst() {
        return None;
    }
    // RFC 9293, 3.5.2: with the number that the other side expects, or that it has sent.
    let (seq_number, ack_number) = if segment.ack() {
        (segment.ack_number(), None)
    } else {
        (TcpSeqNumber(0), Some(segment.seq_number() + segment.segment_len()))
    };
    let repr = TcpRepr {
        src_port: segment.dst_port(),
        dst_port: segment.src_port(),
        control: TcpControl::Rst,
        seq_number,
        ack_number,
        window_len: 0,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let (from, to) = (packet.dst_addr(), packet.src_addr());
    let (mut bytes, at) = write(from, to, IpProtocol::Tcp, repr.buffer_len());
    repr.emit(
        &mut TcpPacket::new_unchecked(&mut bytes[at..]),
        &IpAddress::Ipv4(from),
        &IpAddress::Ipv4(to),
        &ChecksumCapabilities::default(),
    );
    Some(bytes)
}

/// Why a packet went nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Policy.
    Prohibited,
    /// The far end, or the way there.
    Unreachable,
}

/// Says so, in the name of the gateway.
pub(crate) fn refused(bytes: &[u8], gateway: Ipv4Addr, why: Refusal) -> Option<Vec<u8>> {
    let packet = Ipv4Packet::new_checked(bytes).ok()?;
    let header = Ipv4Repr::parse(&packet, &ChecksumCapabilities::ignored()).ok()?;
    let payload = packet.payload();
    let repr = Icmpv4Repr::DstUnreachable {
        reason: match why {
            Refusal::Prohibited => Icmpv4DstUnreachable::CommProhibited,
            Refusal::Unreachable => Icmpv4DstUnreachable::HostUnreachable,
        },
        header,
        data: &payload[..payload.len().min(QUOTED_MAX)],
    };
    let to = packet.src_addr();
    let (mut bytes, at) = write(gateway, to, IpProtocol::Icmp, repr.buffer_len());
    let checksums = ChecksumCapabilities::default();
    repr.emit(&mut Icmpv4Packet::new_unchecked(&mut bytes[at..]), &checksums);
    Some(bytes)
}

/// A datagram to the box.
pub(crate) fn datagram(flow: Flow, to_box: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let repr = UdpRepr { src_port: flow.to_port, dst_port: flow.port };
    let length = repr.header_len() + payload.len();
    let (mut bytes, at) = write(flow.to, to_box, IpProtocol::Udp, length);
    repr.emit(
        &mut UdpPacket::new_unchecked(&mut bytes[at..]),
        &IpAddress::Ipv4(flow.to),
        &IpAddress::Ipv4(to_box),
        payload.len(),
        |buffer| buffer.copy_from_slice(payload),
        &ChecksumCapabilities::default(),
    );
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOX: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);
    const FAR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);
    const GATE: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);

    fn syn() -> Vec<u8> {
        let repr = TcpRepr {
            src_port: 4_000,
            dst_port: 443,
            control: TcpControl::Syn,
            seq_number: TcpSeqNumber(100),
            ack_number: None,
            window_len: 1_000,
            window_scale: Some(3),
            max_seg_size: Some(1_000),
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &[],
        };
        let (mut bytes, at) = write(BOX, FAR, IpProtocol::Tcp, repr.buffer_len());
        let mut packet = TcpPacket::new_unchecked(&mut bytes[at..]);
        repr.emit(&mut packet, &BOX.into(), &FAR.into(), &ChecksumCapabilities::default());
        bytes
    }

    #[test]
    fn what_comes_is_told_apart() {
        let flow = Flow { port: 4_000, to: FAR, to_port: 443 };
        assert_eq!(look(&syn(), BOX), Seen::Syn(flow));
        assert_eq!(look(&syn(), FAR), Seen::Junk, "a source that is not the box's");
        let back = Flow { port: 53, to: BOX, to_port: 9 };
        let bytes = datagram(Flow { port: 9, to: BOX, to_port: 53 }, FAR, b"hello");
        assert_eq!(
            look(&bytes, BOX),
            Seen::Datagram(Flow { to: FAR, to_port: 9, ..back }, b"hello")
        );
        let mut fragment = syn();
        fragment[6] |= 0x20;
        assert_eq!(look(&fragment, BOX), Seen::Junk);
    }

    #[test]
    fn a_refused_connection_is_answered_with_the_number_it_waits_for() {
        let answer = reset(&syn()).unwrap();
        let packet = Ipv4Packet::new_checked(&answer[..]).unwrap();
        assert_eq!((packet.src_addr(), packet.dst_addr()), (FAR, BOX));
        let segment = TcpPacket::new_checked(packet.payload()).unwrap();
        assert!(segment.rst() && segment.ack());
        assert_eq!(segment.ack_number(), TcpSeqNumber(101));
        assert_eq!(reset(&answer), None, "no reset for a reset");
        let told = refused(&syn(), GATE, Refusal::Prohibited).unwrap();
        let packet = Ipv4Packet::new_checked(&told[..]).unwrap();
        assert_eq!((packet.src_addr(), packet.next_header()), (GATE, IpProtocol::Icmp));
    }

    proptest::proptest! {
        #[test]
        fn junk_does_no_harm(
            bytes in proptest::collection::vec(0u8.., 0..200),
            at in 0usize..40,
            byte in 0u8..,
        ) {
            let mut near = syn();
            near[at] = byte;
            for bytes in [&bytes, &near] {
                let _ = look(bytes, BOX);
                let _ = reset(bytes);
                let _ = refused(bytes, GATE, Refusal::Unreachable);
            }
        }
    }
}
