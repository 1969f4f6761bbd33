//! A simulated fleet of heartbeat senders over real UDP: for tests and for the bench.
//!
//! Each host has its id, key, address and seq as a real one has, and obeys directives (drain, resume, interval, key
//! epoch). Many hosts share a few sockets, since a machine has only so many ports; the aggregator cannot tell.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use rand::{RngCore as _, SeedableRng as _, rngs::SmallRng};
use wire::{
    Code, Fault, HostId, Incarnation, Seq,
    datagram::Datagram,
    heartbeat::{Directive, Heartbeat},
    limits::DATAGRAM_BYTES_MAX,
    map::HostAddr,
    rendezvous,
    seal::{FleetKey, KeyEpoch, Role, SenderKey},
};
use wire_net::udp::{Receiver, ReceiverOptions, Sender};

/// What fleet to simulate.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How many hosts.
    pub hosts: usize,
    /// Draws their ids.
    pub seed: u64,
    /// The key that theirs are derived from.
    pub key: FleetKey,
    /// Datagram addresses of the aggregators.
    pub aggregators: Vec<SocketAddr>,
    /// Where the sockets are bound.
    pub bind: IpAddr,
    /// Sockets that the hosts share.
    pub sockets: usize,
    /// What each host says of its interval.
    pub interval_ms: u32,
}

impl Plan {
    /// A fleet on loopback.
    #[must_use]
    pub fn new(hosts: usize, key: FleetKey, aggregators: Vec<SocketAddr>) -> Self {
        Self {
            hosts,
            seed: 1,
            key,
            aggregators,
            bind: IpAddr::V4(Ipv4Addr::LOCALHOST),
            sockets: 16,
            interval_ms: 15_000,
        }
    }
}

/// One simulated host.
#[derive(Clone, Debug)]
pub struct SimHost {
    /// Its name.
    pub host: HostId,
    /// What it will say next, but for the seq.
    pub beat: Heartbeat,
    /// The epoch of its key.
    pub key_epoch: KeyEpoch,
    key: SenderKey,
    /// Which of the ranked aggregators it sends to.
    at: usize,
    ranked: Vec<SocketAddr>,
}

impl SimHost {
    /// The aggregator that it sends to.
    #[must_use]
    pub fn aggregator(&self) -> SocketAddr {
        self.ranked[self.at]
    }
}

/// The fleet.
pub struct FleetSender {
    /// Its hosts, by index.
    pub hosts: Vec<SimHost>,
    by_id: HashMap<HostId, usize>,
    sockets: Vec<(Receiver, Sender)>,
    /// Datagrams sent.
    pub sent: u64,
    /// Directives obeyed.
    pub directives: u64,
}

fn fault(error: &io::Error) -> Fault {
    Fault::new(Code::Internal, format!("the simulated fleet's socket failed: {error}"))
}

impl FleetSender {
    /// Makes the fleet; nothing is sent yet.
    ///
    /// # Errors
    /// If a socket cannot be bound.
    ///
    /// # Panics
    /// If the plan has no aggregator or no socket.
    pub fn new(plan: &Plan) -> Result<Self, Fault> {
        assert!(!plan.aggregators.is_empty() && plan.sockets > 0, "a fleet sends somewhere");
        let mut rng = SmallRng::seed_from_u64(plan.seed);
        let hosts: Vec<SimHost> = (0..plan.hosts)
            .map(|at| {
                let host = HostId(rng.next_u64());
                let [_, a, b, c] = u32::try_from(at).unwrap_or(u32::MAX).to_be_bytes();
                let beat = Heartbeat {
                    incarnation: Incarnation(1),
                    seq: Seq(0),
                    ip: Heartbeat::ip_bytes(IpAddr::V4(Ipv4Addr::new(10, a, b, c))),
                    port: 7_410,
                    free: [32, 16, 8, 4],
                    total: [32, 16, 8, 4],
                    running: 0,
                    interval_ms: plan.interval_ms,
                    flags: Heartbeat::NO_BOXES,
                };
                let ranked = rendezvous::ranked(host.bucket(), &plan.aggregators);
                let key = plan.key.sender(Role::Host, host.0);
                SimHost { host, beat, key_epoch: plan.key.epoch, key, at: 0, ranked }
            })
            .collect();
        let by_id = hosts.iter().enumerate().map(|(at, host)| (host.host, at)).collect();
        let sockets = (0..plan.sockets.min(plan.hosts.max(1)))
            .map(|_| {
                let receiver =
                    Receiver::bind(SocketAddr::new(plan.bind, 0), &ReceiverOptions::default())?;
                let sender = receiver.sender().map_err(|error| fault(&error))?;
                Ok((receiver, sender))
            })
            .collect::<Result<Vec<_>, Fault>>()?;
        Ok(Self { hosts, by_id, sockets, sent: 0, directives: 0 })
    }

    /// Leaves hosts to somebody else: real ones of these ids, say.
    pub fn leave_out(&mut self, others: &BTreeSet<HostId>) {
        self.hosts.retain(|sim| !others.contains(&sim.host));
        self.by_id = self.hosts.iter().enumerate().map(|(at, sim)| (sim.host, at)).collect();
    }

    /// Host and address of each, by id: what the map must say.
    #[must_use]
    pub fn addresses(&self) -> Vec<(HostId, HostAddr)> {
        let mut all: Vec<_> = self.hosts.iter().map(|sim| (sim.host, sim.beat.addr())).collect();
        all.sort_unstable_by_key(|(host, _)| *host);
        all
    }

    /// One heartbeat of every host, at `rate` a second.
    ///
    /// # Errors
    /// If a socket is broken.
    pub fn beat_all(&mut self, rate: u64) -> Result<(), Fault> {
        self.beat(0..self.hosts.len(), rate)
    }

    /// One heartbeat of some hosts, at `rate` a second.
    ///
    /// # Errors
    /// If a socket is broken.
    pub fn beat(&mut self, hosts: std::ops::Range<usize>, rate: u64) -> Result<(), Fault> {
        let (began, mut done) = (Instant::now(), 0u64);
        let mut out = [0; DATAGRAM_BYTES_MAX];
        let sockets = self.sockets.len();
        for at in hosts {
            let sim = &mut self.hosts[at];
            sim.beat.seq.0 += 1;
            let len = sim.beat.seal(sim.host, sim.key_epoch, &sim.key, &mut out);
            let to = sim.aggregator();
            self.sockets[at % sockets].1.push(&out[..len], to).map_err(|error| fault(&error))?;
            done += 1;
            if done.is_multiple_of(256) {
                self.flush()?;
                let due = Duration::from_secs_f64(done as f64 / rate.max(1) as f64);
                if let Some(early) = due.checked_sub(began.elapsed()) {
                    std::thread::sleep(early);
                }
            }
        }
        self.sent += done;
        self.flush()
    }

    fn flush(&mut self) -> Result<(), Fault> {
        self.sockets.iter_mut().try_for_each(|(_, sender)| sender.flush()).map_err(|e| fault(&e))
    }

    /// Moves hosts whose aggregator is dead to the next of their order.
    pub fn leave(&mut self, dead: SocketAddr) {
        for sim in &mut self.hosts {
            if sim.aggregator() == dead {
                sim.at = (sim.at + 1) % sim.ranked.len();
            }
        }
    }

    /// Sends to this aggregator alone from now on.
    pub fn retarget(&mut self, aggregator: SocketAddr) {
        self.hosts.iter_mut().for_each(|sim| (sim.at, sim.ranked) = (0, vec![aggregator]));
    }

    /// Takes the directives that have arrived and obeys them.
    ///
    /// # Errors
    /// If a socket is broken.
    pub fn take_directives(&mut self) -> Result<(), Fault> {
        let Self { hosts, by_id, sockets, directives, .. } = self;
        for (receiver, _) in sockets {
            loop {
                let obey = |bytes: &[u8], _| {
                    *directives += u64::from(obey(hosts, by_id, bytes).is_some());
                };
                let got = receiver.recv(Duration::from_micros(1), obey).map_err(|e| fault(&e))?;
                if got == 0 {
                    break;
                }
            }
        }
        Ok(())
    }
}

/// A directive that verifies under the host's own key is obeyed.
fn obey(hosts: &mut [SimHost], by_id: &HashMap<HostId, usize>, bytes: &[u8]) -> Option<()> {
    let datagram = Datagram::parse(bytes).ok()?;
    let sim = &mut hosts[*by_id.get(&HostId(datagram.sender.id))?];
    let (_, directive) = Directive::open(&datagram.verify(&sim.key)?).ok()?;
    match directive.drain {
        Directive::DRAIN => sim.beat.flags |= Heartbeat::DRAINING,
        Directive::RESUME => sim.beat.flags &= !Heartbeat::DRAINING,
        _ => {}
    }
    if directive.interval_ms > 0 {
        sim.beat.interval_ms = directive.interval_ms;
    }
    if directive.key_epoch > sim.key_epoch.0 {
        let epoch = KeyEpoch(directive.key_epoch);
        (sim.key, sim.key_epoch) = (SenderKey(sim.key.wrap(epoch, &directive.wrapped_key)), epoch);
    }
    Some(())
}
