//! The portable engine: `recvmmsg`, a batch a system call.

use std::{
    fmt, io, mem,
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    ptr, thread,
    time::Duration,
};

use super::parts::{CONTROL_BYTES, Drops, NAME_BYTES, SLOT_BYTES, address};

/// Datagrams a system call at most.
const BATCH: usize = 64;

#[derive(Clone, Copy)]
struct Slot {
    bytes: [u8; SLOT_BYTES],
    name: [u8; NAME_BYTES],
    control: [u8; CONTROL_BYTES],
}

/// Buffers of one batch. `heads` and `vectors` point into `slots` and `vectors`, which never move: they are boxed, and
/// nothing gives out the boxes.
pub(super) struct Batch {
    slots: Box<[Slot]>,
    _vectors: Box<[libc::iovec]>,
    heads: Box<[libc::mmsghdr]>,
    timeout: Option<Duration>,
    /// The last turn took what there was, so that the next may gather first.
    drained: bool,
}

// SAFETY: the pointers lead only into boxes that this value owns alone, so they move with it between threads.
unsafe impl Send for Batch {}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Batch({} slots)", self.slots.len())
    }
}

impl Batch {
    pub(super) fn new() -> Self {
        let slot =
            Slot { bytes: [0; SLOT_BYTES], name: [0; NAME_BYTES], control: [0; CONTROL_BYTES] };
        let mut slots = vec![slot; BATCH].into_boxed_slice();
        let mut vectors: Box<[libc::iovec]> = slots
            .iter_mut()
            .map(|slot| libc::iovec {
                iov_base: slot.bytes.as_mut_ptr().cast(),
                iov_len: SLOT_BYTES,
            })
            .collect();
        let heads = slots.iter_mut().zip(&mut vectors).map(|(slot, vector)| libc::mmsghdr {
            msg_hdr: libc::msghdr {
                msg_name: slot.name.as_mut_ptr().cast(),
                msg_namelen: 0,
                msg_iov: ptr::from_mut(vector),
                msg_iovlen: 1,
                msg_control: slot.control.as_mut_ptr().cast(),
                msg_controllen: 0,
                msg_flags: 0,
            },
            msg_len: 0,
        });
        let heads = heads.collect();
        Self { slots, _vectors: vectors, heads, timeout: None, drained: false }
    }

    pub(super) fn recv(
        &mut self,
        socket: &UdpSocket,
        (timeout, gather): (Duration, Duration),
        drops: &mut Drops,
        mut each: impl FnMut(&[u8], SocketAddr),
    ) -> io::Result<usize> {
        if self.timeout != Some(timeout) {
            socket.set_read_timeout(Some(timeout))?;
            self.timeout = Some(timeout);
        }
        if mem::take(&mut self.drained) && !gather.is_zero() {
            thread::sleep(gather);
        }
        for head in &mut self.heads {
            #[expect(clippy::cast_possible_truncation, reason = "28")]
            let name_len = NAME_BYTES as libc::socklen_t;
            head.msg_hdr.msg_namelen = name_len;
            head.msg_hdr.msg_controllen = CONTROL_BYTES;
        }
        #[expect(clippy::cast_possible_truncation, reason = "64")]
        let batch = BATCH as libc::c_uint;
        // SAFETY: `heads` has BATCH entries whose pointers lead into boxes of this value with the lengths that stand
        // beside them (set by `new` and just above); we hold it mutably, so nobody else reads them meanwhile.
        let got = unsafe {
            let heads = self.heads.as_mut_ptr();
            libc::recvmmsg(socket.as_raw_fd(), heads, batch, libc::MSG_WAITFORONE, ptr::null_mut())
        };
        let Ok(got) = usize::try_from(got) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
                _ => Err(error),
            };
        };
        self.drained = got < BATCH / 2;
        for (head, slot) in self.heads.iter().zip(&self.slots).take(got) {
            let control_len = head.msg_hdr.msg_controllen.min(CONTROL_BYTES);
            drops.note(&slot.control[..control_len]);
            let len = (head.msg_len as usize).min(SLOT_BYTES);
            if let Some(from) = address(&slot.name) {
                each(&slot.bytes[..len], from);
            }
        }
        Ok(got)
    }
}
