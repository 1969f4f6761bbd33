//! Whether an address is one of this machine's, by the kernel's own routing.
//!
//! Asked over a netlink socket for each new connection: a host's addresses change (a tenant's published address, a
//! failover), and whatever the kernel would deliver locally, broadcast or drop must not be dialled for a box. An address
//! that the kernel cannot answer for is treated as the machine's own.

use std::{io, net::Ipv4Addr};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with, sockopt,
};

const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const NLM_F_REQUEST: u16 = 1;
const RTA_DST: u16 = 1;
/// The one type of route that leads to another machine.
const RTN_UNICAST: u8 = 1;

/// Whether the kernel would keep packets to this address on the machine.
pub(crate) fn is_own(ip: Ipv4Addr) -> bool {
    route_type(ip).map_or(true, |kind| kind != Some(RTN_UNICAST))
}

/// The type of the route to an address; `None` where there is none.
fn route_type(ip: Ipv4Addr) -> io::Result<Option<u8>> {
    let flags = SocketFlags::CLOEXEC;
    let family = AddressFamily::NETLINK;
    // The default protocol of the family is routes.
    let socket = socket_with(family, SocketType::RAW, flags, None)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(ANSWER_WAIT))?;
    let mut request = Vec::with_capacity(36);
    request.extend_from_slice(&36_u32.to_ne_bytes());
    request.extend_from_slice(&RTM_GETROUTE.to_ne_bytes());
    request.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    // rtmsg: IPv4, a destination of 32 bits, nothing else said.
    request.extend_from_slice(&[2, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    request.extend_from_slice(&8_u16.to_ne_bytes());
    request.extend_from_slice(&RTA_DST.to_ne_bytes());
    request.extend_from_slice(&ip.octets());
    send(&socket, &request, SendFlags::empty())?;
    let mut answer = [0_u8; 4096];
    let (length, _) = recv(&socket, &mut answer, RecvFlags::empty())?;
    let answer = &answer[..length.min(4096)];
    let kind = answer.get(4..6).map(|two| u16::from_ne_bytes([two[0], two[1]]));
    if kind != Some(RTM_NEWROUTE) {
        return Ok(None);
    }
    // Behind the header: family, lengths, tos, table, protocol, scope, type.
    Ok(answer.get(16 + 7).copied())
}

/// The kernel answers at once; this only bounds a bug.
const ANSWER_WAIT: std::time::Duration = std::time::Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_own_addresses_are_known() {
        assert!(is_own(Ipv4Addr::LOCALHOST) && is_own(Ipv4Addr::new(127, 9, 9, 9)));
        assert!(is_own(Ipv4Addr::new(224, 0, 0, 1)) && is_own(Ipv4Addr::BROADCAST));
        let routed = route_type(Ipv4Addr::new(1, 1, 1, 1)).unwrap();
        match routed {
            Some(kind) => assert_eq!(is_own(Ipv4Addr::new(1, 1, 1, 1)), kind != RTN_UNICAST),
            None => println!("skipped: the half about other machines, this one has no route"),
        }
    }
}
