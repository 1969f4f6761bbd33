//! One box's way out: its device, a TCP stack that answers for the whole world, and the policy between the two.
//!
//! One task a box, which looks at all that is ready and waits for the rest. A packet is looked at before any stack sees
//! it; what policy refuses is answered at once, so that programs fail quickly instead of waiting. Time-outs, windows
//! and repetitions are smoltcp's. Left out: IPv6 and ping, which are refused or ignored.

use std::{
    future::Future,
    net::Ipv4Addr,
    os::fd::OwnedFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use futures::{StreamExt, stream::FuturesUnordered};
use simple_dns::RCODE;
use smoltcp::{
    iface::{Config, Interface, SocketSet},
    time::Instant as StackInstant,
    wire::{HardwareAddress, IpCidr},
};
use tokio::{io::unix::AsyncFd, sync::watch, time::Sleep};
use wire::network::{Protocol, Rule};

use crate::{
    BOX_ADDRESS, GATEWAY, PREFIX_BITS,
    bucket::Bucket,
    device::Tunnel,
    dns::{self, Asked, Found},
    limits::{MTU, PACKETS_A_TURN, QUESTIONS_MAX, TURNS_MAX},
    message::{random, watched},
    names, own,
    packet::{self, Flow, Refusal, Seen},
    policy::Policy,
    settings::Settings,
    sync::Counters,
    tcp::{Connections, Dialled},
    udp::Exchanges,
};

const NAME_PORT: u16 = 53;

type Answering = Pin<Box<dyn Future<Output = (Flow, Asked, Found)> + Send>>;

/// What a link is made of.
pub(crate) struct Parts {
    pub(crate) device: OwnedFd,
    pub(crate) ended: OwnedFd,
    pub(crate) rules: Vec<Rule>,
    pub(crate) settings: watch::Receiver<Arc<Settings>>,
    pub(crate) counters: Arc<Counters>,
}

struct Link {
    ready: AsyncFd<Arc<OwnedFd>>,
    device: Tunnel,
    stack: Interface,
    sockets: SocketSet<'static>,
    tcp: Connections,
    udp: Exchanges,
    questions: FuturesUnordered<Answering>,
    policy: Policy,
    bucket: Bucket,
    settings: watch::Receiver<Arc<Settings>>,
    counters: Arc<Counters>,
    timer: Pin<Box<Sleep>>,
    begun: Instant,
    scratch: Vec<u8>,
}

/// Carries a box's packets until the box has ended or its device is gone.
///
/// # Errors
/// What the kernel says of its descriptors.
pub(crate) async fn run(parts: Parts) -> std::io::Result<()> {
    let Parts { device, ended, rules, settings, counters } = parts;
    let device = Arc::new(device);
    let ended = watched(Arc::new(ended))?;
    let mut link = Link::new(Arc::clone(&device), rules, settings, counters)?;
    tokio::select! {
        _ = ended.readable() => {}
        () = std::future::poll_fn(|cx| link.poll(cx)) => {}
    }
    // Taking a network device down waits for the kernel: not on a thread that carries others' packets.
    drop(tokio::task::spawn_blocking(move || drop((link, device))));
    Ok(())
}

impl Link {
    fn new(
        fd: Arc<OwnedFd>,
        rules: Vec<Rule>,
        settings: watch::Receiver<Arc<Settings>>,
        counters: Arc<Counters>,
    ) -> std::io::Result<Self> {
        let begun = Instant::now();
        let ready = watched(Arc::clone(&fd))?;
        let mut device = Tunnel::new(fd);
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = random()?;
        let mut stack = Interface::new(config, &mut device, StackInstant::ZERO);
        stack.update_ip_addrs(|list| {
            let _ = list.push(IpCidr::new(GATEWAY.into(), PREFIX_BITS));
        });
        // To be every address: what a route over our own address leads to is taken as ours.
        let _ = stack.routes_mut().add_default_ipv4_route(GATEWAY);
        stack.set_any_ip(true);
        Ok(Self {
            ready,
            device,
            stack,
            sockets: SocketSet::new(Vec::new()),
            tcp: Connections::default(),
            udp: Exchanges::default(),
            questions: FuturesUnordered::new(),
            policy: Policy::new(rules),
            bucket: Bucket::new(begun),
            settings,
            counters,
            timer: Box::pin(tokio::time::sleep(std::time::Duration::ZERO)),
            begun,
            scratch: vec![0; MTU + 16],
        })
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn stack_now(&self) -> StackInstant {
        StackInstant::from_micros(
            i64::try_from(self.begun.elapsed().as_micros()).unwrap_or(i64::MAX),
        )
    }

    /// Does all that can be done now. Ends only with the device.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        for _ in 0..TURNS_MAX {
            let rate = self.settings.borrow().bytes_per_s;
            self.bucket.fill(rate, Instant::now());
            let Ok(mut busy) = self.take_packets(cx) else { return Poll::Ready(()) };
            busy |= self.dials(cx);
            busy |= self.answers(cx);
            self.turn_stack();
            busy |= self.tcp.pass(cx, &mut self.sockets, &mut self.bucket, &self.counters);
            busy |= self.take_datagrams(cx);
            self.turn_stack();
            if !busy {
                if self.arm_timer(cx) {
                    continue;
                }
                return Poll::Pending;
            }
        }
        // More to do, but not before others had their turn.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn turn_stack(&mut self) {
        let now = self.stack_now();
        self.stack.poll(now, &mut self.device, &mut self.sockets);
    }

    /// Sets the timer to what is next; returns whether that is now.
    fn arm_timer(&mut self, cx: &mut Context<'_>) -> bool {
        let second = std::time::Duration::from_secs(1);
        let stack = self.stack.poll_delay(self.stack_now(), &self.sockets);
        let stack = stack.map(|delay| std::time::Duration::from_micros(delay.total_micros()));
        let idle = (self.udp.len() > 0).then_some(second);
        let next = [stack, idle, self.bucket.wait()].into_iter().flatten().min();
        let Some(next) = next else { return false };
        if next.is_zero() {
            return true;
        }
        self.udp.expire();
        self.timer.as_mut().reset((Instant::now() + next).into());
        self.timer.as_mut().poll(cx).is_ready()
    }

    /// Takes packets from the device. An error: there is no device any more.
    fn take_packets(&mut self, cx: &mut Context<'_>) -> Result<bool, ()> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut busy = false;
        let mut gone = false;
        for _ in 0..PACKETS_A_TURN {
            let mut guard = match self.ready.poll_read_ready(cx) {
                Poll::Ready(Ok(guard)) => guard,
                Poll::Ready(Err(_)) => {
                    gone = true;
                    break;
                }
                Poll::Pending => break,
            };
            match self.device.read(&mut scratch) {
                Ok(length) => {
                    drop(guard);
                    self.packet(&scratch[..length]);
                    busy = true;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => guard.clear_ready(),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // The namespace is being taken down.
                Err(_) => {
                    gone = true;
                    break;
                }
            }
        }
        self.scratch = scratch;
        if gone { Err(()) } else { Ok(busy) }
    }

    fn packet(&mut self, bytes: &[u8]) {
        match packet::look(bytes, BOX_ADDRESS) {
            Seen::Syn(flow) => self.first_segment(flow, bytes),
            Seen::Segment(flow) if self.tcp.is_open(&flow) => self.device.push(bytes),
            // Of a connection that an earlier worker knew, or nobody.
            Seen::Segment(flow) if !self.tcp.has(&flow) => self.reply(packet::reset(bytes)),
            Seen::Segment(_) | Seen::Junk => {}
            Seen::Datagram(flow, payload) => {
                if flow.to == GATEWAY && flow.to_port == NAME_PORT {
                    self.question(flow, payload);
                } else {
                    self.datagram(flow, payload, bytes);
                }
            }
            Seen::Other => self.prohibit(bytes),
        }
    }

    fn reply(&mut self, packet: Option<Vec<u8>>) {
        if let Some(packet) = packet {
            self.device.send(&packet);
        }
    }

    fn prohibit(&mut self, bytes: &[u8]) {
        self.counters.refused();
        self.reply(packet::refused(bytes, GATEWAY, Refusal::Prohibited));
    }

    /// Whether policy, the guard and the kernel's routes let something pass.
    fn may_pass(&self, protocol: Protocol, flow: Flow) -> bool {
        self.policy.opens(protocol, flow.to, flow.to_port, self.now_ms())
            && !self.settings.borrow().guard.refuses(flow.to, flow.to_port, own::is_own(flow.to))
    }

    fn is_full(&self) -> bool {
        self.tcp.len() + self.udp.len() >= self.settings.borrow().connections_max
    }

    fn first_segment(&mut self, flow: Flow, bytes: &[u8]) {
        if self.tcp.is_open(&flow) {
            self.device.push(bytes);
        } else if self.tcp.has(&flow) {
            // Sent again while it is being dialled.
        } else if !self.may_pass(Protocol::Tcp, flow) {
            self.prohibit(bytes);
        } else if self.is_full() {
            self.counters.refused();
            self.reply(packet::reset(bytes));
        } else {
            self.tcp.dial(flow, bytes.to_vec());
        }
    }

    fn dials(&mut self, cx: &mut Context<'_>) -> bool {
        let done = self.tcp.poll_dials(cx, &mut self.sockets);
        let any = !done.is_empty();
        for dialled in done {
            match dialled {
                Dialled::Accepted(segment) => {
                    self.device.push(&segment);
                    // At once: the next first segment is for another socket.
                    self.turn_stack();
                }
                Dialled::Refused(segment) => self.reply(packet::reset(&segment)),
                Dialled::Unreachable(segment) => {
                    self.reply(packet::refused(&segment, GATEWAY, Refusal::Unreachable));
                }
            }
        }
        any
    }

    fn datagram(&mut self, flow: Flow, payload: &[u8], bytes: &[u8]) {
        if !self.may_pass(Protocol::Udp, flow) {
            return self.prohibit(bytes);
        }
        if !self.udp.has(&flow) {
            if self.is_full() {
                return self.prohibit(bytes);
            }
            if self.udp.begin(flow).is_err() {
                return self.reply(packet::refused(bytes, GATEWAY, Refusal::Unreachable));
            }
        }
        if !self.bucket.has_any() {
            return;
        }
        let sent = self.udp.send(&flow, payload);
        self.bucket.take(sent);
        self.counters.sent(sent);
    }

    fn take_datagrams(&mut self, cx: &mut Context<'_>) -> bool {
        let (device, counters, bucket) = (&mut self.device, &self.counters, &mut self.bucket);
        self.udp.receive(cx, &mut self.scratch, |flow, payload| {
            if bucket.has_any() {
                bucket.take(payload.len());
                counters.received(payload.len());
                device.send(&packet::datagram(flow, BOX_ADDRESS, payload));
            }
        })
    }

    /// A question to the name server that this link is.
    fn question(&mut self, flow: Flow, payload: &[u8]) {
        let Some(asked) = dns::read(payload) else { return };
        if !self.policy.resolves(&asked.name) {
            self.counters.refused();
            return self.answer(flow, &asked, &[], RCODE::Refused);
        }
        if !asked.addresses {
            // It exists; there is nothing of this kind.
            return self.answer(flow, &asked, &[], RCODE::NoError);
        }
        if self.questions.len() >= QUESTIONS_MAX {
            return self.answer(flow, &asked, &[], RCODE::ServerFailure);
        }
        let settings = Arc::clone(&self.settings.borrow());
        self.questions.push(Box::pin(async move {
            let found = names::resolve(&settings.resolvers, &asked.name).await;
            (flow, asked, found)
        }));
    }

    fn answers(&mut self, cx: &mut Context<'_>) -> bool {
        let mut busy = false;
        while let Poll::Ready(Some((flow, asked, found))) = self.questions.poll_next_unpin(cx) {
            busy = true;
            let now_ms = self.now_ms();
            let guard = Arc::clone(&self.settings.borrow());
            // Port 0 is no door: what is judged here is the address.
            let may = |ip: Ipv4Addr| !guard.guard.refuses(ip, 0, own::is_own(ip));
            let open: Vec<_> = found.addresses.iter().copied().filter(|(ip, _)| may(*ip)).collect();
            for (ip, ttl_s) in &open {
                self.policy.pin(&asked.name, *ip, *ttl_s, now_ms);
            }
            let rcode = if open.is_empty() && !found.addresses.is_empty() {
                // A name that was turned towards what is closed.
                self.counters.refused();
                RCODE::Refused
            } else {
                found.rcode
            };
            self.answer(flow, &asked, &open, rcode);
        }
        busy
    }

    fn answer(&mut self, flow: Flow, asked: &Asked, found: &[(Ipv4Addr, u32)], rcode: RCODE) {
        if let Some(payload) = dns::answer(asked, found, rcode) {
            self.device.send(&packet::datagram(flow, BOX_ADDRESS, &payload));
        }
    }
}
