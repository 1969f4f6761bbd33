//! Ways out of boxes: what a launch may ask for, and keeping the egress worker and its boxes together.
//!
//! The worker outlives hostd. It is looked at twice a second: boxes that it does not carry (it was killed, or is new)
//! are given to it again, with a device that their init has kept. Nothing of this is touched by launches without egress.

use std::{cell::RefCell, collections::HashSet, rc::Rc, time::Duration};

use hostd_egress::{Egress, EgressConfig, EgressError, PolicyError};
use hostd_sandbox::{BoxNetwork, ClaimError, Fault as BoxFault};
use wire::{
    Code, Fault, SandboxId,
    call::State,
    launch::{LaunchRequest, Network},
};

use super::{Real, box_id, claim_fault};
use crate::{
    host::{Backend, HostCell},
    note::Note,
};

/// How often the worker is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// The worker, where the operator wants one.
#[derive(Debug)]
pub(super) struct Ways {
    config: Option<EgressConfig>,
    worker: RefCell<Option<Rc<Egress>>>,
}

impl Ways {
    /// Joins or starts the worker; where egress is off, ends one that an earlier start left.
    pub(super) async fn open(
        dir: std::path::PathBuf,
        config: Option<EgressConfig>,
    ) -> Result<Self, Fault> {
        let worker = match &config {
            None => {
                Egress::end(&dir).await;
                None
            }
            Some(config) => Some(Rc::new(connect(config).await?)),
        };
        Ok(Self { config, worker: RefCell::new(worker) })
    }

    /// What a launch's box gets.
    ///
    /// # Errors
    /// Why it is refused: nothing was started.
    pub(super) fn admit(&self, network: &Network) -> Result<Option<BoxNetwork>, Fault> {
        if *network == Network::None {
            return Ok(None);
        }
        let Some(config) = &self.config else {
            let text = "this host's operator lets no sandbox reach out (egress = \"off\"); nothing was started";
            return Err(Fault::new(Code::Forbidden, text));
        };
        config.settings.admits(network).map_err(|error| {
            let code = match error {
                PolicyError::Closed(_) => Code::Forbidden,
                PolicyError::Ipv6(_) => Code::Unsupported,
                _ => Code::BadRequest,
            };
            Fault::new(code, error.to_string())
        })?;
        Ok(Some(BoxNetwork {
            address: hostd_egress::BOX_ADDRESS.octets(),
            prefix_bits: hostd_egress::PREFIX_BITS,
            gateway: hostd_egress::GATEWAY.octets(),
            mtu: hostd_egress::MTU,
        }))
    }

    async fn worker(&self) -> Result<Rc<Egress>, Fault> {
        let there = self.worker.borrow().clone();
        match (there, &self.config) {
            (Some(worker), _) => Ok(worker),
            (None, Some(config)) => {
                let worker = Rc::new(connect(config).await?);
                *self.worker.borrow_mut() = Some(Rc::clone(&worker));
                Ok(worker)
            }
            (None, None) => Err(Fault::new(Code::Internal, "egress is off")),
        }
    }

    fn lost(&self, worker: &Rc<Egress>) {
        self.worker.borrow_mut().take_if(|there| Rc::ptr_eq(there, worker));
    }

    /// Ends the worker with the sandboxes.
    pub(super) async fn stop(&self) {
        let worker = self.worker.borrow_mut().take();
        if let Some(worker) = worker {
            let _ = worker.shutdown().await;
        }
    }
}

async fn connect(config: &EgressConfig) -> Result<Egress, Fault> {
    let fault = |error: EgressError| Fault::new(Code::BoxFailed, error.to_string());
    Egress::connect_or_start(config).await.map(|(worker, _)| worker).map_err(fault)
}

impl Real {
    /// Has a running box's packets carried by its launch's rules. One that has ended needs nobody to.
    ///
    /// # Errors
    /// Why they are not.
    pub(super) async fn carry(&self, id: SandboxId, network: &Network) -> Result<(), Fault> {
        let Network::Egress(rules) = network else { return Ok(()) };
        for last in [false, true] {
            let tunnel = match self.spawner()?.tunnel(box_id(id)).await {
                Ok(tunnel) => tunnel,
                // Its program was executed and has ended: it reaches nothing any more, and it did run.
                Err(ClaimError::Failed(BoxFault::NoSandbox | BoxFault::BoxDied { .. })) => {
                    return Ok(());
                }
                Err(error) => return Err(claim_fault(&error)),
            };
            let worker = self.ways.worker().await?;
            match worker.open(box_id(id), rules.clone(), tunnel.device, tunnel.ended).await {
                Ok(()) => return Ok(()),
                Err(EgressError::Gone(_)) if !last => self.ways.lost(&worker),
                Err(error) => return Err(Fault::new(Code::BoxFailed, error.to_string())),
            }
        }
        Ok(())
    }

    /// Bytes that a box got and sent by egress.
    pub(super) async fn egress_usage(&self, id: SandboxId) -> (u64, u64) {
        let worker = self.ways.worker.borrow().clone();
        let Some(worker) = worker else { return (0, 0) };
        match worker.usage(box_id(id)).await {
            Ok(Some(usage)) => (usage.received, usage.sent),
            _ => (0, 0),
        }
    }
}

/// Sandboxes that run and may reach out.
fn reaching(cell: &HostCell) -> Vec<(Rc<Note>, Network)> {
    let core = cell.core.borrow();
    let runs = core.sandboxes().filter(|sandbox| sandbox.state == State::Running);
    runs.filter_map(|sandbox| {
        let request = LaunchRequest::access(&sandbox.note.request).ok()?;
        let none = matches!(request.network, wire::network::ArchivedNetwork::None);
        if none {
            return None;
        }
        let request = LaunchRequest::from_bytes(&sandbox.note.request).ok()?;
        Some((Rc::clone(&sandbox.note), request.network))
    })
    .collect()
}

/// Keeps the worker alive and its boxes with it, from the adoption on.
pub(super) async fn keep(cell: Rc<HostCell>) {
    let Backend::Real(real) = &cell.backend else { return };
    if real.ways.config.is_none() {
        return;
    }
    while !real.stopping.get() {
        match real.ways.worker().await {
            Err(fault) => tracing::error!(%fault, "no egress worker: sandboxes reach nothing"),
            Ok(worker) => match worker.boxes().await {
                Err(error) => {
                    tracing::error!(%error, "the egress worker is lost: starting another");
                    real.ways.lost(&worker);
                    // Soon, but not as fast as one that dies at once could be started.
                    tokio::time::sleep(LOOK / 10).await;
                    continue;
                }
                Ok(carried) => {
                    let carried: HashSet<_> = carried.into_iter().collect();
                    for (note, network) in reaching(&cell) {
                        if !carried.contains(&box_id(note.id))
                            && let Err(fault) = real.carry(note.id, &network).await
                        {
                            tracing::debug!(id = %note.id, %fault, "a sandbox is not carried");
                        }
                    }
                }
            },
        }
        tokio::time::sleep(LOOK).await;
    }
}
