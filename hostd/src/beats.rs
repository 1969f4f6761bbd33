//! The timer of a host: deadlines, heartbeats and what comes back for them. One task a host.

use std::{
    net::SocketAddr,
    path::PathBuf,
    rc::Rc,
    sync::{Arc, Mutex, PoisonError},
};

use hostd_core::beat::Obey;
use rand::{RngCore, SeedableRng, rngs::SmallRng};
use tokio::net::UdpSocket;
use tokio_util::sync::CancellationToken;
use wire::{Seq, limits::DATAGRAM_BYTES_MAX};
use wire_net::tls::SenderKeys;

use crate::{
    clock,
    host::HostCell,
    metrics::Metrics,
    metrics::count,
    persist::Kept,
    real,
    records::{self, Teller},
    runtime::spawn,
};

/// Counts are published this often.
const PUBLISH_MS: u64 = 1_000;

/// What the timer works with beside the host.
pub(crate) struct Timer {
    /// The host.
    pub(crate) cell: Rc<HostCell>,
    /// Where heartbeats leave from.
    pub(crate) socket: UdpSocket,
    /// What must never be forgotten.
    pub(crate) kept: Arc<Mutex<Kept>>,
    /// Where a new key is kept.
    pub(crate) identity: PathBuf,
    /// The process's counters.
    pub(crate) metrics: Metrics,
    /// Milliseconds between records of sandboxes; zero for none.
    pub(crate) records_ms: u64,
    /// When to end.
    pub(crate) stop: CancellationToken,
}

impl Timer {
    /// Keeps deadlines and sends heartbeats until the stop; the last heartbeat says so.
    pub(crate) async fn run(self) {
        let mut rng = SmallRng::from_os_rng();
        let (mut told, mut publish_ms) = (0, 0);
        let mut input = [0; DATAGRAM_BYTES_MAX + 1];
        let mut reserving = false;
        let mut teller = Teller::new(&self.cell, clock::now_ms(), self.records_ms);
        while !self.stop.is_cancelled() {
            let now_ms = clock::now_ms();
            self.cell.act(now_ms);
            self.beat(now_ms, rng.next_u64()).await;
            self.reserve(&mut reserving);
            for (datagram, to) in teller.due(&self.cell, now_ms) {
                records::sent(&self.cell, self.socket.send_to(&datagram, to).await);
            }
            if now_ms >= publish_ms {
                publish_ms = now_ms + PUBLISH_MS;
                self.metrics.publish(&self.cell.counts);
                real::tell_if_full(&self.cell, now_ms);
                if let Ok(real) = self.cell.real() {
                    real.forget(now_ms);
                    if let Some(images) = real.image_metrics.take() {
                        self.metrics.set_images(&images);
                    }
                }
                let running = i64::from(self.cell.core.borrow().running());
                self.metrics.add_running(running - told);
                told = running;
            }
            tokio::select! {
                () = self.cell.due(PUBLISH_MS) => {}
                received = self.socket.recv_from(&mut input) => {
                    if let Ok((len, from)) = received {
                        self.received(&input[..len], from);
                    }
                }
                () = self.stop.cancelled() => {}
            }
        }
        let now_ms = clock::now_ms();
        self.cell.beat.borrow_mut().handle_stop(now_ms);
        self.beat(now_ms, rng.next_u64()).await;
        self.metrics.publish(&self.cell.counts);
        self.metrics.add_running(-told);
    }

    async fn beat(&self, now_ms: u64, random: u64) {
        let mut out = [0; DATAGRAM_BYTES_MAX];
        let outgoing = {
            let mut core = self.cell.core.borrow_mut();
            let mut beat = self.cell.beat.borrow_mut();
            let running = core.running();
            let outgoing = beat.poll(now_ms, random, core.admission(), running, &mut out);
            core.set_next_seq(beat.next_seq());
            outgoing
        };
        let Some(outgoing) = outgoing else { return };
        match self.socket.send_to(&out[..outgoing.len], outgoing.to).await {
            Ok(_) => count(&self.cell.counts.heartbeats),
            Err(error) => {
                count(&self.cell.counts.heartbeats_unsent);
                tracing::debug!(%error, to = %outgoing.to, "a heartbeat was not sent");
            }
        }
    }

    fn received(&self, bytes: &[u8], from: SocketAddr) {
        let now_ms = clock::now_ms();
        let obeyed = self.cell.beat.borrow_mut().handle_datagram(now_ms, bytes);
        match obeyed {
            Ok(obey) => {
                count(&self.cell.counts.directives);
                self.obey(now_ms, obey);
            }
            Err(why) => {
                count(&self.cell.counts.directives_ignored);
                tracing::debug!(?why, %from, "a datagram was ignored");
            }
        }
    }

    fn obey(&self, now_ms: u64, obey: Obey) {
        if let Some(deadline_ms) = obey.drain_ms {
            let mut core = self.cell.core.borrow_mut();
            if !core.admission().draining() {
                tracing::info!(host = %self.cell.id, deadline_ms, "draining");
            }
            core.handle_drain(now_ms, deadline_ms);
        }
        if obey.resume {
            self.cell.core.borrow_mut().handle_undrain();
        }
        if let Some((epoch, key)) = obey.key {
            tracing::info!(host = %self.cell.id, epoch = epoch.0, "a new key epoch");
            let dir = self.identity.clone();
            let keys = SenderKeys { epoch, key };
            spawn(async move {
                let saved = tokio::task::spawn_blocking(move || keys.save(&dir)).await;
                if let Ok(Err(fault)) = saved {
                    tracing::error!(%fault, "the new key was not kept: issue it again before a restart");
                }
            });
        }
        self.cell.settle(now_ms);
    }

    /// Reserves more numbers long before the last is used, off this thread: it waits for the disk.
    fn reserve(&self, reserving: &mut bool) {
        let Some(to) = self.cell.beat.borrow().poll_reserve() else {
            *reserving = false;
            return;
        };
        if std::mem::replace(reserving, true) {
            return;
        }
        let (cell, kept) = (Rc::clone(&self.cell), Arc::clone(&self.kept));
        spawn(async move {
            match tokio::task::spawn_blocking(move || reserve(&kept, to)).await {
                Ok(Ok(())) => cell.beat.borrow_mut().handle_reserved(to),
                Ok(Err(fault)) => tracing::error!(%fault, "no seq numbers were reserved"),
                Err(error) => tracing::error!(%error, "no seq numbers were reserved"),
            }
        });
    }
}

/// Reserves numbers below `to`; waits for the disk.
pub(crate) fn reserve(kept: &Mutex<Kept>, to: Seq) -> Result<(), wire::Fault> {
    kept.lock().unwrap_or_else(PoisonError::into_inner).reserve(to)
}
