//! The rules of the simulation gate, held while a run goes on.
//!
//! At most one sandbox a launch id; acknowledged means running or reported; versions only rise; no host over its
//! admission; every sandbox owned or reaped. That a healed fleet serves is looked at by whoever reads the [`crate::Outcome`].

use std::collections::{BTreeMap, BTreeSet};

use wire::{HostId, LaunchId, SandboxId, map::MapVersion};

use crate::{Micros, SECOND, caller::Caller};

/// A rule that was broken, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken(pub String);

/// How a launch ended for whoever asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// It runs, there.
    Started(SandboxId),
    /// It does not run.
    Failed,
    /// Nobody knows.
    Unknown,
    /// Nothing was done for this sending of a named launch.
    Nothing,
}

/// What is known from above, where the parts cannot see.
#[derive(Debug, Default)]
pub struct Rules {
    live: BTreeMap<LaunchId, SandboxId>,
    executed: BTreeSet<LaunchId>,
    ended: BTreeMap<LaunchId, SandboxId>,
    told: BTreeMap<LaunchId, (Micros, Told)>,
    on_host: BTreeMap<HostId, u32>,
    versions: Vec<MapVersion>,
}

impl Rules {
    /// A host has admitted a launch: at most one sandbox a launch id, and no host over its admission.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn begun(&mut self, id: LaunchId, on: SandboxId, slots: u32) -> Result<(), Broken> {
        if let Some((_, told @ (Told::Failed | Told::Started(_)))) = self.told.get(&id) {
            return Err(Broken(format!("launch {id} begins on {on} after it ended as {told:?}")));
        }
        if Caller::names(id) && self.executed.contains(&id) {
            return Err(Broken(format!("named launch {id} ran before and begins again on {on}")));
        }
        if let Some(other) = self.live.insert(id, on) {
            return Err(Broken(format!("launch {id} has two sandboxes: {other} and {on}")));
        }
        let count = self.on_host.entry(on.host).or_default();
        *count += 1;
        if *count > slots {
            return Err(Broken(format!("{} holds {count} sandboxes of {slots}", on.host)));
        }
        Ok(())
    }

    /// Its program was executed: once in all its time, or once more after the first was surely ended.
    pub fn executed(&mut self, id: LaunchId) {
        self.executed.insert(id);
    }

    /// A sandbox is gone: its end, a kill, or its machine's crash.
    pub fn gone(&mut self, id: LaunchId, on: SandboxId) {
        if self.live.get(&id) == Some(&on) {
            self.live.remove(&id);
            self.ended.insert(id, on);
            if let Some(count) = self.on_host.get_mut(&on.host) {
                *count -= 1;
            }
        }
    }

    /// A host ends a sandbox that nobody seems to own.
    ///
    /// # Errors
    /// [`Broken`], if somebody was told that it runs.
    pub fn reaped(&self, id: LaunchId, on: SandboxId) -> Result<(), Broken> {
        match self.told.get(&id) {
            Some((at, Told::Started(told))) if *told == on => Err(Broken(format!(
                "{on} of launch {id} is reaped, and was acknowledged at {at} us"
            ))),
            _ => Ok(()),
        }
    }

    /// Whoever asked was told: acknowledged means that it runs, or ran and ended since.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn told(&mut self, now: Micros, id: LaunchId, told: Told) -> Result<(), Broken> {
        if let Told::Started(sandbox) = told {
            let is = self.live.get(&id) == Some(&sandbox) && self.executed.contains(&id);
            let was = self.ended.get(&id) == Some(&sandbox);
            if !is && !was {
                return Err(Broken(format!(
                    "launch {id} was acknowledged as {sandbox}, and is not"
                )));
            }
        }
        if let (Told::Failed, Some(on)) = (told, self.live.get(&id)) {
            return Err(Broken(format!("launch {id} was told to have failed, and runs as {on}")));
        }
        // A named launch is told twice, and whoever was told that it runs owns it.
        let started = matches!(self.told.get(&id), Some((_, Told::Started(_))));
        if !started && told != Told::Nothing {
            self.told.insert(id, (now, told));
        }
        Ok(())
    }

    /// A placer follows another map.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn adopted(&mut self, placer: usize, version: MapVersion) -> Result<(), Broken> {
        if self.versions.len() <= placer {
            self.versions.resize(placer + 1, MapVersion::default());
        }
        if version <= self.versions[placer] {
            let had = self.versions[placer];
            return Err(Broken(format!("placer {placer} went from map {had:?} to {version:?}")));
        }
        self.versions[placer] = version;
        Ok(())
    }

    /// Every sandbox is owned, or reaped once its launch's time and the grace are over.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn owned(&self, now: Micros, grace: Micros) -> Result<(), Broken> {
        for (id, sandbox) in &self.live {
            let Some((at, told)) = self.told.get(id) else { continue };
            let owned = matches!(told, Told::Started(on) if on == sandbox);
            if !owned && *at + grace < now {
                let since = (now - at) / SECOND;
                return Err(Broken(format!(
                    "{sandbox} of launch {id} runs, and its owner was told {told:?} {since} s ago"
                )));
            }
        }
        Ok(())
    }

    /// Sandboxes that take a slot.
    #[must_use]
    pub fn live(&self) -> usize {
        self.live.len()
    }
}
