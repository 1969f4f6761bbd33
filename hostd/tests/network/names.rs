//! A name server of the test, which says what it is told to.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::{Arc, Mutex},
};

type Zone = Arc<Mutex<HashMap<String, Vec<Ipv4Addr>>>>;

pub(crate) struct NameServer {
    address: SocketAddr,
    zone: Zone,
    asked: Arc<Mutex<Vec<String>>>,
}

impl NameServer {
    pub(crate) fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let server = Self { address, zone: Zone::default(), asked: Arc::default() };
        let (zone, asked) = (Arc::clone(&server.zone), Arc::clone(&server.asked));
        std::thread::spawn(move || {
            let mut bytes = [0; 2_048];
            while let Ok((length, from)) = socket.recv_from(&mut bytes) {
                let Some(answer) = answer(&bytes[..length], &zone, &asked) else { continue };
                let _ = socket.send_to(&answer, from);
            }
        });
        server
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn set(&self, name: &str, addresses: &[Ipv4Addr]) {
        self.zone.lock().unwrap().insert(name.into(), addresses.to_vec());
    }

    /// Names that were asked for.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

/// The question with addresses behind it, by hand: the test is not to share a parser with what it tests.
fn answer(question: &[u8], zone: &Zone, asked: &Mutex<Vec<String>>) -> Option<Vec<u8>> {
    let mut name = Vec::new();
    let mut at = 12;
    loop {
        let length = usize::from(*question.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        name.push(String::from_utf8_lossy(question.get(at..at + length)?).to_lowercase());
        at += length;
    }
    let name = name.join(".");
    asked.lock().unwrap().push(name.clone());
    let found = zone.lock().unwrap().get(&name).cloned();
    let (count, rcode) = found.as_ref().map_or((0, 3), |found| (found.len(), 0));
    let mut answer = question.get(..at + 4)?.to_vec();
    answer[2..12].copy_from_slice(&[0x81, 0x80 | rcode, 0, 1, 0, 0, 0, 0, 0, 0]);
    answer[7] = u8::try_from(count).unwrap();
    for ip in found.unwrap_or_default() {
        answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend_from_slice(&ip.octets());
    }
    Some(answer)
}
