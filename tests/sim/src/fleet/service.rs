//! How the capacity service of the simulated world hears, asks its stores, and says what it knows.

use std::rc::Rc;

use rand::Rng;

use super::{Event, World};
use crate::{
    Micros, SECOND,
    check::Broken,
    control::{Aggregator, Question},
    stores::{Answer, MapFile},
};

/// When an aggregator gives a question up.
const GIVEN_UP_US: Micros = 2 * SECOND;
/// What the slowest of the lost questions are late by: they are carried out after all, by then perhaps against what came since.
const LATE_US_MAX: Micros = 8 * SECOND;

/// What ails a store.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Ails {
    /// It answers nothing, and does nothing.
    pub(super) away: bool,
    /// Share of questions that end without an outcome.
    pub(super) flaky: f64,
}

impl World {
    /// An aggregator hears a heartbeat, if it is there to hear.
    pub(super) fn heard(&mut self, aggregator: usize, host: usize, bytes: &[u8]) {
        let now = self.queue.now();
        let here = &mut self.service[aggregator];
        if here.awake()
            && let Some(answer) = here.heard(now, bytes)
        {
            self.datagram(|| Event::Directive(host, answer.clone()));
        }
    }

    pub(super) fn tick(&mut self) {
        let now = self.queue.now();
        for at in 0..self.service.len() {
            if !self.service[at].awake() {
                continue;
            }
            for words in self.service[at].tick(now, &mut self.noted) {
                for placer in 0..self.placers.len() {
                    if self.weather.feed && self.rng.random_bool(1.0 - self.weather.loss) {
                        let at = now + self.net() + self.options.feed_late_us;
                        self.queue.put(at, Event::Feed(placer, Rc::clone(&words)));
                    }
                }
            }
            self.put_questions(at);
        }
        self.queue.put(now + super::TICK_US, Event::Tick);
    }

    /// A placer asks every aggregator that is there for all words.
    pub(super) fn subscribe(&mut self, placer: usize) {
        let at = self.queue.now() + 2 * self.net() + self.options.feed_late_us;
        for aggregator in self.service.iter().filter(|aggregator| aggregator.awake()) {
            self.queue.put(at, Event::Feed(placer, aggregator.everything()));
        }
    }

    pub(super) fn scan(&mut self, aggregator: usize) {
        let now = self.queue.now();
        if self.service[aggregator].awake() {
            self.service[aggregator].scan_turn(now);
            self.put_questions(aggregator);
        }
        self.queue.put(now + self.options.scan_ms * 1_000, Event::Scan(aggregator));
    }

    /// Sends what an aggregator asks: it arrives and is answered, or one of the two is lost, or it arrives when nobody
    /// waits for it any more.
    fn put_questions(&mut self, aggregator: usize) {
        let now = self.queue.now();
        for question in self.service[aggregator].take_questions() {
            let ails = if question.ask.of_database() {
                self.weather.database
            } else {
                self.weather.objects
            };
            let takes = self.net() + self.rng.random_range(1_000..20_000);
            if !ails.away && !self.rng.random_bool(ails.flaky) {
                self.queue.put(now + takes, Event::Asked(question, true));
                continue;
            }
            match self.rng.random_range(0..3) {
                0 | 1 if ails.away => {}
                0 => self.queue.put(now + takes, Event::Asked(question.clone(), false)),
                1 => {
                    let late = self.rng.random_range(takes..LATE_US_MAX);
                    self.queue.put(now + late, Event::Asked(question.clone(), false));
                }
                _ => {}
            }
            self.queue.put(now + GIVEN_UP_US, Event::Answered(question, None));
        }
    }

    /// A question has reached its store.
    pub(super) fn asked(&mut self, question: Question, answers: bool) -> Result<(), Broken> {
        let answer = self.stores.serve(self.queue.now(), question.from, &question.ask)?;
        if answers {
            let at = self.queue.now() + self.net();
            self.queue.put(at, Event::Answered(question, Some(answer)));
        }
        Ok(())
    }

    /// An answer, or the end of waiting for it, has reached an aggregator.
    pub(super) fn answered(&mut self, question: Question, answer: Option<Answer>) {
        let (now, from) = (self.queue.now(), question.from);
        let here = &mut self.service[from];
        if !here.up || here.life != question.life {
            return;
        }
        if here.stopped {
            here.held.push((question, answer));
            return;
        }
        here.answered(now, &question, answer, &mut self.noted);
        self.put_questions(from);
    }

    /// An aggregator is killed or started, stopped or woken.
    pub(super) fn fault_of_service(&mut self, at: usize, killed: bool, begins: bool) {
        let now = self.queue.now();
        let aggregators = self.service.len();
        let here: &mut Aggregator = &mut self.service[at % aggregators];
        if killed {
            if here.up == begins {
                here.restart(now, !begins);
            }
        } else {
            here.stopped = begins && here.up;
            if !here.stopped {
                for (question, answer) in std::mem::take(&mut here.held) {
                    here.answered(now, &question, answer, &mut self.noted);
                }
            }
        }
        self.put_questions(at % aggregators);
    }

    /// Every placer looks for a newer map. Now and then an older one comes after a newer, as from a stale cache: it must not be
    /// adopted.
    pub(super) fn look_for_maps(&mut self) {
        let now = self.queue.now();
        for placer in 0..self.placers.len() {
            let stale = self.rng.random_bool(0.1);
            let found: Option<MapFile> = self.stores.map(stale);
            if let Some(file) = found.filter(|_| !self.weather.objects.away) {
                let at = now + 10_000 + self.rng.random_range(0..500_000);
                self.queue.put(at, Event::Map(placer, file));
            }
        }
        self.queue.put(now + self.options.map_ms * 1_000, Event::Publish);
    }
}
