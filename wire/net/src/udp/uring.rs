//! The faster engine: io_uring's multishot receive into provided buffers.
//!
//! One request stays armed; each datagram takes a buffer out of a ring that we share with the kernel and posts a
//! completion. Under load neither a system call nor a wake-up is paid a datagram. The kernel's part of the work runs
//! when this thread enters it (`DEFER_TASKRUN`), so the ring belongs to the thread that first receives.
//!
//! The unsafe parts rest on one invariant, which [`Shared`] and [`Uring::drop`] keep: memory that the kernel may write
//! (buffers and their ring) is neither moved nor freed before the kernel has said that the request is over.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    fmt, io, mem,
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    ptr::{self, NonNull},
    sync::atomic::{AtomicU16, Ordering},
    thread,
    time::Duration,
};

use io_uring::{
    IoUring, cqueue, opcode,
    types::{BufRingEntry, Fd, RecvMsgOut, SubmitArgs, Timespec},
};

use super::parts::{CONTROL_BYTES, Drops, NAME_BYTES, SLOT_BYTES, address};

/// Buffers: what may wait between two turns of the receiving thread. A power of two.
const BUFFERS: u16 = 1_024;
/// `io_uring_recvmsg_out`, name, control, payload; a multiple of 16.
const BUFFER_BYTES: usize = (16 + NAME_BYTES + CONTROL_BYTES + SLOT_BYTES).next_multiple_of(16);
const PAGE: usize = 4_096;
const GROUP: u16 = 0;
const RECEIVE: u64 = 1;
const CANCEL: u64 = 2;
/// A batch of fewer was all there was, so that the next may gather first.
const FULL: usize = 32;

const _: () = assert!(BUFFERS.is_power_of_two());

/// Memory that the kernel writes: the ring of free buffers, then the buffers.
struct Shared {
    start: NonNull<u8>,
    /// Entries handed to the kernel so far, modulo 2^16.
    tail: u16,
}

impl Shared {
    const RING_BYTES: usize = BUFFERS as usize * size_of::<BufRingEntry>();

    fn layout() -> io::Result<Layout> {
        let bytes = Self::RING_BYTES + BUFFERS as usize * BUFFER_BYTES;
        Layout::from_size_align(bytes, PAGE).map_err(io::Error::other)
    }

    fn new() -> io::Result<Self> {
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc_zeroed(Self::layout()?) };
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut shared = Self { start, tail: 0 };
        (0..BUFFERS).for_each(|id| shared.give_back(id));
        shared.publish();
        Ok(shared)
    }

    fn buffer(&self, id: u16) -> NonNull<u8> {
        assert!(id < BUFFERS, "the kernel gives back what it was given");
        // SAFETY: inside the allocation, by the assertion and the layout.
        unsafe { self.start.add(Self::RING_BYTES + id as usize * BUFFER_BYTES) }
    }

    /// Puts a buffer at the ring's end; the kernel sees it after [`Shared::publish`].
    fn give_back(&mut self, id: u16) {
        let slot = (self.tail & (BUFFERS - 1)) as usize;
        let addr = self.buffer(id).as_ptr() as u64;
        #[expect(clippy::cast_possible_truncation, reason = "about 1,300")]
        let len = BUFFER_BYTES as u32;
        // SAFETY: `slot` is below BUFFERS, so inside the ring, which is page-aligned and zeroed at first. The kernel
        // does not read an entry between its own head and our tail's publication, so nobody else touches this one.
        // Entry 0 also holds the tail, which the kernel only reads and these stores leave alone.
        unsafe {
            let entry = &mut *self.start.cast::<BufRingEntry>().add(slot).as_ptr();
            entry.set_addr(addr);
            entry.set_len(len);
            entry.set_bid(id);
        }
        self.tail = self.tail.wrapping_add(1);
    }

    /// Shows the kernel all buffers that were given back. Release: its acquire load sees the entries before it.
    fn publish(&self) {
        // SAFETY: `start` is the ring's first entry, so this is its tail field: aligned, inside the allocation,
        // written by us alone and read by the kernel atomically.
        let tail = unsafe {
            AtomicU16::from_ptr(BufRingEntry::tail(self.start.cast().as_ptr()).cast_mut())
        };
        tail.store(self.tail, Ordering::Release);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Ok(layout) = Self::layout() {
            // SAFETY: allocated by `new` with this layout; whoever drops this has seen the kernel finish with it.
            unsafe { dealloc(self.start.as_ptr(), layout) }
        }
    }
}

/// The engine.
pub(super) struct Uring {
    ring: mem::ManuallyDrop<IoUring>,
    shared: mem::ManuallyDrop<Shared>,
    /// What the request says of names and control messages; the kernel reads it when the request is armed.
    head: Box<libc::msghdr>,
    enabled: bool,
    armed: bool,
    /// The last turn took what there was.
    drained: bool,
}

// SAFETY: the pointers lead to memory that this value owns alone (`Shared`) or are null (`head`). The kernel refuses a
// second thread's use of an enabled ring with an error.
unsafe impl Send for Uring {}

impl fmt::Debug for Uring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Uring({BUFFERS} buffers, armed: {})", self.armed)
    }
}

impl Uring {
    /// Makes the ring, which tells whether this kernel and this process's limits allow it.
    pub(super) fn new() -> io::Result<Self> {
        let ring: IoUring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_r_disabled()
            .setup_cqsize(u32::from(BUFFERS) * 2)
            .build(8)?;
        let shared = Shared::new()?;
        // SAFETY: the memory is page-aligned, holds BUFFERS entries, and outlives the ring: see `drop`.
        unsafe {
            let start = shared.start.as_ptr() as u64;
            ring.submitter().register_buf_ring_with_flags(start, BUFFERS, GROUP, 0)?;
        }
        #[expect(clippy::cast_possible_truncation, reason = "28")]
        let name_len = NAME_BYTES as libc::socklen_t;
        let head = Box::new(libc::msghdr {
            msg_name: ptr::null_mut(),
            msg_namelen: name_len,
            msg_iov: ptr::null_mut(),
            msg_iovlen: 0,
            msg_control: ptr::null_mut(),
            msg_controllen: CONTROL_BYTES,
            msg_flags: 0,
        });
        Ok(Self {
            ring: mem::ManuallyDrop::new(ring),
            shared: mem::ManuallyDrop::new(shared),
            head,
            enabled: false,
            armed: false,
            drained: false,
        })
    }

    fn arm(&mut self, socket: &UdpSocket) -> io::Result<()> {
        if !self.enabled {
            self.ring.submitter().register_enable_rings()?;
            self.enabled = true;
        }
        let request =
            opcode::RecvMsgMulti::new(Fd(socket.as_raw_fd()), &raw const *self.head, GROUP)
                .build()
                .user_data(RECEIVE);
        // SAFETY: `head` is boxed and lives as long as the ring; buffers come from `shared`, which does too. The
        // socket is borrowed by the caller for as long as this engine is used, and the kernel holds it by itself.
        unsafe { self.ring.submission().push(&request).map_err(io::Error::other)? };
        self.armed = true;
        Ok(())
    }

    /// As [`super::Receiver::recv`]. After a small batch it waits for `gather` before it looks for the next.
    pub(super) fn recv(
        &mut self,
        socket: &UdpSocket,
        (timeout, gather): (Duration, Duration),
        drops: &mut Drops,
        mut each: impl FnMut(&[u8], SocketAddr),
    ) -> io::Result<usize> {
        if !self.armed {
            self.arm(socket)?;
        }
        if mem::take(&mut self.drained) && !gather.is_zero() {
            thread::sleep(gather);
        }
        if self.ring.completion().is_empty() {
            self.wait(timeout)?;
        }
        let mut got = 0;
        let mut failed = None;
        for entry in self.ring.completion() {
            if entry.user_data() != RECEIVE {
                continue;
            }
            if !cqueue::more(entry.flags()) {
                self.armed = false;
            }
            if entry.result() < 0 {
                // All buffers were in use: arming again goes on.
                if entry.result() != -libc::ENOBUFS {
                    failed = Some(io::Error::from_raw_os_error(-entry.result()));
                }
                continue;
            }
            let Some(id) = cqueue::buffer_select(entry.flags()) else { continue };
            let len = usize::try_from(entry.result()).unwrap_or(0).min(BUFFER_BYTES);
            // SAFETY: the kernel gave this buffer to us with the completion, wrote `len` bytes of it (all of it is
            // initialised, since it was zeroed), and does not touch it before it is given back below.
            let bytes = unsafe {
                std::slice::from_raw_parts(self.shared.buffer(id).as_ptr().cast_const(), len)
            };
            if let Ok(message) = RecvMsgOut::parse(bytes, &self.head) {
                drops.note(message.control_data());
                if let Some(from) = address(message.name_data()) {
                    each(message.payload_data(), from);
                    got += 1;
                }
            }
            self.shared.give_back(id);
        }
        self.shared.publish();
        self.drained = got > 0 && got < FULL;
        failed.map_or(Ok(got), Err)
    }

    fn wait(&mut self, timeout: Duration) -> io::Result<()> {
        let timeout = Timespec::from(timeout);
        let args = SubmitArgs::new().timespec(&timeout);
        match self.ring.submitter().submit_with_args(1, &args) {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Ends the request and waits until the kernel says so; false if it did not.
    fn disarm(&mut self) -> bool {
        if !self.armed {
            return true;
        }
        let cancel = opcode::AsyncCancel::new(RECEIVE).build().user_data(CANCEL);
        // SAFETY: a cancel refers to no memory.
        if unsafe { self.ring.submission().push(&cancel) }.is_err() {
            return false;
        }
        for _ in 0..16 {
            let timeout = Timespec::from(Duration::from_millis(100));
            let args = SubmitArgs::new().timespec(&timeout);
            let _ = self.ring.submitter().submit_with_args(1, &args);
            for entry in self.ring.completion() {
                if entry.user_data() == RECEIVE && !cqueue::more(entry.flags()) {
                    self.armed = false;
                }
            }
            if !self.armed {
                return true;
            }
        }
        false
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        let over = self.disarm();
        // SAFETY: neither is used again; the ring goes first, so that the kernel forgets the buffers before they are
        // freed. If the request did not end (another thread than the ring's own drops it), the buffers are leaked.
        unsafe {
            mem::ManuallyDrop::drop(&mut self.ring);
            if over {
                mem::ManuallyDrop::drop(&mut self.shared);
            }
        }
    }
}
