//! Named launches as placerd carries them out: `placer_core::Named` says which home is asked next, this asks it.

use std::rc::Rc;

use placer_core::{Named, Step, named::homes};
use wire::{
    Code, Fault, HostId, LaunchId,
    launch::{LaunchReply, Refused},
};

use crate::{
    dispatch::{Asked, Ended, News},
    worker::Worker,
};

impl Worker {
    /// Drives a named launch to its end.
    pub(crate) async fn drive_named(self: &Rc<Self>, asked: &Asked<'_>) -> Ended {
        let homes = self.with_map(|map| homes(map, asked.id));
        let mut named = Named::new(self.now(), homes, asked.head.budget_ms);
        loop {
            match named.poll(self.now()) {
                Step::Send { host, budget_ms, .. } => {
                    self.metrics.attempts.inc();
                    let deadline = self.instant(named.deadline());
                    let sent = self.send(asked, host, budget_ms);
                    match tokio::time::timeout_at(deadline, sent).await {
                        Ok(News::Reply(reply)) => {
                            self.learn(host, &reply);
                            named.handle_reply(self.now(), host, reply);
                        }
                        Ok(News::NotSent(_) | News::Cancelled(_)) => {
                            named.handle_unsent(self.now(), host);
                        }
                        Ok(News::Lost) => named.handle_lost(self.now(), host),
                        Err(_) => {}
                    }
                }
                Step::Wait { until } => tokio::time::sleep_until(self.instant(until)).await,
                Step::Cancel { .. } => debug_assert!(false, "a named launch cancels nothing"),
                Step::Done(outcome) => return Ended { outcome, host: named.host() },
            }
        }
    }

    /// Takes the capacity out of an answer.
    fn learn(&self, host: HostId, reply: &LaunchReply) {
        let word = match reply {
            LaunchReply::Started(started) => started.word,
            LaunchReply::Refused(Refused { word, .. }) => {
                self.metrics.refusals.inc();
                *word
            }
            LaunchReply::Failed(_) => return,
        };
        self.decide(|_, table| table.correct(host, word));
    }

    /// Cancels a named launch wherever it may be. Another tenant's is not found, and left as it is.
    pub(crate) async fn cancel_named(
        self: &Rc<Self>,
        id: LaunchId,
        tenant: &str,
    ) -> Result<(), Fault> {
        let homes = self.with_map(|map| homes(map, id));
        let cancels = homes.iter().map(|host| self.cancel(id, tenant, *host));
        let results = futures::future::join_all(cancels).await;
        let not_here = |fault: &Fault| fault.code == Code::SandboxNotFound;
        results
            .into_iter()
            .filter_map(Result::err)
            .find(|fault| !not_here(fault))
            .map_or(Ok(()), Err)
    }
}
