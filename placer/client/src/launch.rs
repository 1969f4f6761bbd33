//! One launch from the client's side: send, and hold on to the id until the outcome is known.
//!
//! What was not sent may go to any placer. What was sent and not answered is asked again: of any placer if the launch is
//! named (PROTOCOL 6.11), else only of the placer that has it, with a budget of zero: it tells what became of the launch
//! and starts nothing (6.13), so that one that was restarted meanwhile does not start a second sandbox.

use std::time::{Duration, Instant};

use wire::{
    Code, Fault, LaunchId,
    launch::{LaunchHead, LaunchReply, Started},
    limits::BUDGET_MS_MAX,
};
use wire_net::stream::LaunchLost;

use crate::{Client, LaunchError, LaunchSpec, Sandbox};

/// Wait between two askings for an unknown outcome.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// What the placer may add for its way: the client waits so much longer than it told the placer.
const GRACE: Duration = Duration::from_millis(500);

/// A sandbox that runs, with what its host told of the start.
#[derive(Clone, Debug)]
pub struct Launched {
    /// The sandbox.
    pub sandbox: Sandbox,
    /// The launch that it came from.
    pub launch_id: LaunchId,
    /// Where the time went, and the host's capacity after it.
    pub started: Started,
}

/// The way on after an attempt.
enum Next {
    AnyPlacer(Fault),
    SamePlacer(Fault),
}

impl Client {
    /// Launches a sandbox and waits until its program was executed.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn launch(&self, spec: LaunchSpec) -> Result<Sandbox, LaunchError> {
        self.launch_timed(spec).await.map(|launched| launched.sandbox)
    }

    /// As [`Client::launch`], with the host's figures.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn launch_timed(&self, spec: LaunchSpec) -> Result<Launched, LaunchError> {
        let (request, named, budget) = spec.into_parts(&self.inner.tenant);
        request.check().map_err(LaunchError::NotStarted)?;
        let budget = budget.unwrap_or(self.inner.budget);
        let limit = Duration::from_millis(u64::from(BUDGET_MS_MAX));
        let deadline = Instant::now() + budget.min(limit);
        let launch_id = request.launch_id;
        let bytes = request.to_bytes();
        let mut pinned = None;
        let mut sent = None;
        loop {
            let attempt = self.attempt(&bytes, named, pinned, deadline).await;
            let (at, fault) = match attempt {
                (_, Ok(LaunchReply::Started(started))) => {
                    let sandbox = self.sandbox(started.sandbox);
                    return Ok(Launched { sandbox, launch_id, started });
                }
                // A placer's unknown is an answer too: it has spent the budget on the same host already.
                (_, Ok(reply)) => return Err(not_started(launch_id, reply, sent)),
                (at, Err(Next::SamePlacer(fault))) => {
                    sent = Some(fault.clone());
                    (at, fault)
                }
                (at, Err(Next::AnyPlacer(fault))) => (at, fault),
            };
            let denied =
                matches!(fault.code, Code::Unauthenticated | Code::Forbidden | Code::Clock);
            let now = Instant::now();
            if denied || now + ASK_AGAIN >= deadline {
                return Err(match sent {
                    Some(fault) => LaunchError::Unknown { launch_id, fault },
                    None => LaunchError::Unreachable(fault),
                });
            }
            pinned = if sent.is_some() && !named { at } else { None };
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    /// One try, at the pinned placer or the next in turn; also says which it was.
    async fn attempt(
        &self,
        request: &[u8],
        named: bool,
        pinned: Option<usize>,
        deadline: Instant,
    ) -> (Option<usize>, Result<LaunchReply, Next>) {
        let reached = match pinned {
            Some(at) => self.open_to(at).await.map(|open| (at, open)),
            None => self.open_link().await,
        };
        let (at, open) = match reached {
            Ok(reached) => reached,
            Err(fault) => return (pinned, Err(Next::AnyPlacer(fault))),
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let left_ms = u32::try_from(left.as_millis()).unwrap_or(BUDGET_MS_MAX).max(1);
        let budget_ms = if pinned.is_some() { 0 } else { left_ms };
        let head = LaunchHead { budget_ms, named };
        let launch = async { open.lane.launch(head, request)?.await };
        let reply = match tokio::time::timeout(left + GRACE, launch).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(LaunchLost::NotSent(fault))) => Err(Next::AnyPlacer(fault)),
            Ok(Err(LaunchLost::Unknown(fault))) => Err(Next::SamePlacer(fault)),
            Err(_) => {
                let message = "the placer did not answer within the budget";
                Err(Next::SamePlacer(Fault::new(Code::Unknown, message)))
            }
        };
        (Some(at), reply)
    }
}

/// Sorts an answer that is no start. After an earlier try was lost, only an answer that holds for every placer says that
/// nothing was started: the launch's own fault, or the refusal of all its homes.
fn not_started(launch_id: LaunchId, reply: LaunchReply, sent: Option<Fault>) -> LaunchError {
    let fault = match reply {
        LaunchReply::Failed(fault) => fault,
        LaunchReply::Refused(refused) => Fault::new(refused.code, "no host took the launch"),
        LaunchReply::Started(_) => unreachable!("sorted by the caller"),
    };
    let of_this_placer = matches!(
        fault.code,
        Code::HostUnreachable
            | Code::BudgetSpent
            | Code::Overloaded
            | Code::NoHosts
            | Code::Unreachable
            | Code::Internal
    );
    match sent {
        _ if fault.code == Code::Unknown => LaunchError::Unknown { launch_id, fault },
        Some(_) if of_this_placer => LaunchError::Unknown { launch_id, fault },
        _ => LaunchError::NotStarted(fault),
    }
}
