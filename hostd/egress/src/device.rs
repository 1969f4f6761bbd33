//! The box's network device as smoltcp's: packets that came in a queue, packets that go straight into the descriptor.
//!
//! Left out: waiting. A device takes what is written or drops it, and TCP sends again.

use std::{collections::VecDeque, os::fd::OwnedFd, sync::Arc};

use smoltcp::{
    phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken},
    time::Instant,
};

use crate::limits::MTU;

/// The device.
pub(crate) struct Tunnel {
    fd: Arc<OwnedFd>,
    came: VecDeque<Vec<u8>>,
    scratch: Vec<u8>,
    /// Packets that the device did not take.
    pub(crate) dropped: u64,
}

impl Tunnel {
    pub(crate) fn new(fd: Arc<OwnedFd>) -> Self {
        Self { fd, came: VecDeque::new(), scratch: vec![0; MTU], dropped: 0 }
    }

    /// The next packet that the box sent, at the front of `scratch`.
    pub(crate) fn read(&self, scratch: &mut [u8]) -> std::io::Result<usize> {
        Ok(rustix::io::read(&*self.fd, scratch)?)
    }

    /// A packet for smoltcp. Copied, because most are small and the buffer that they came in is not.
    pub(crate) fn push(&mut self, packet: &[u8]) {
        self.came.push_back(packet.to_vec());
    }

    /// Sends a packet of the link's own.
    pub(crate) fn send(&mut self, packet: &[u8]) {
        if rustix::io::write(&*self.fd, packet).is_err() {
            self.dropped += 1;
        }
    }
}

/// A packet that came.
pub(crate) struct Came(Vec<u8>);

/// A place for a packet that goes.
pub(crate) struct Goes<'a>(&'a mut Tunnel);

impl RxToken for Came {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Goes<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut scratch = std::mem::take(&mut self.0.scratch);
        if scratch.len() < length {
            scratch.resize(length, 0);
        }
        let result = f(&mut scratch[..length]);
        self.0.send(&scratch[..length]);
        self.0.scratch = scratch;
        result
    }
}

impl Device for Tunnel {
    type RxToken<'a> = Came;
    type TxToken<'a> = Goes<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Came, Goes<'_>)> {
        let packet = self.came.pop_front()?;
        Some((Came(packet), Goes(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Goes<'_>> {
        Some(Goes(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut all = DeviceCapabilities::default();
        all.medium = Medium::Ip;
        all.max_transmission_unit = MTU;
        // What came was made by the kernel on this machine and crossed no wire.
        all.checksum.ipv4 = Checksum::Tx;
        all.checksum.tcp = Checksum::Tx;
        all.checksum.udp = Checksum::Tx;
        all
    }
}
