//! How stale may capacity be? Choices against staleness against fill.
//!
//! Ten placers share a fleet; a host's word reaches them all at once every `staleness` seconds (at once, for zero), as from
//! a bulletin board. Launches go through placer-core's table and selection and hostd-core's admission; messages take no
//! time, so that what is seen is the age of the word alone. Replies carry the host's word, as they do in Volley. Two
//! more columns: Volley as it is (two choices, a word every 15 s and whenever a quarter is crossed), and what
//! a poll of all hosts gives that replies do not correct (E2B's best of 3 on polls of 20 s).
//!
//! The theory to compare with is Mitzenmacher, "How useful is old information?" (2000): with fresh words two choices take
//! most of what there is to gain; with old ones many choices run to the same few hosts, and fewer are better.

use std::{
    cmp::Reverse, collections::BinaryHeap, fmt::Write as _, path::Path, sync::atomic::AtomicU64,
};

use hostd_core::{Admission, Resources, Shapes};
use placer_core::{
    Adopter, CapacityTable, Dispatch, Launch, MapView, Pick, Policy, Select, Step, launch,
    map::encode, sync::zeroed, table::words_for,
};
use plotters::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use wire::{
    CapacityWord, Code, HostId, Incarnation, SandboxId, Seq, Stamp,
    launch::{LaunchReply, Refused, Started, Steps, VisibleAt},
    limits::{ATTEMPTS_MAX, SHAPES_MAX},
    map::{HostAddr, MapVersion},
};

use crate::shape;

/// Choices of the grid.
pub const CHOICES: [usize; 5] = [1, 2, 3, 4, 8];
/// Seconds of staleness.
pub const STALE_S: [u64; 5] = [0, 1, 5, 15, 60];
/// Percent of the slots that are taken, in the mean.
pub const FILLS: [u32; 3] = [50, 80, 95];

const HOSTS: usize = 1_000;
const SLOTS: u64 = 32;
const PLACERS: usize = 10;
const LIFE_S: f64 = 30.0;

/// One point of the grid.
#[derive(Clone, Copy, Debug)]
pub struct Cell {
    /// Candidates a pick.
    pub choices: usize,
    /// Seconds between two words of a host.
    pub stale_s: u64,
    /// Percent of slots taken.
    pub fill: u32,
    /// Whose rules.
    pub rules: Rules,
}

/// Whose rules a cell follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// Volley's launches; a word only every so often.
    Board,
    /// The same, and a word when a quarter of a host's capacity is crossed.
    Quarters,
    /// Picks that count what they place, and are corrected by polls alone.
    Polls,
}

/// What a cell came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Point {
    /// Refusals a launch message.
    pub refused: f64,
    /// Messages a launch.
    pub attempts: f64,
    /// Launches that found no host, of all.
    pub failed: f64,
    /// Sandboxes on the fullest host, over the mean, averaged over time.
    pub max_over_mean: f64,
}

#[derive(Clone)]
struct OneHost {
    admission: Admission,
    live: u32,
    seq: u64,
    told_free: u16,
}

impl OneHost {
    fn word(&self) -> CapacityWord {
        self.admission.word(Stamp::of(Seq(self.seq)))
    }

    /// The quarter that its free slots are in; none and all are quarters of their own, as in hostd-core.
    fn quarter(free: u16) -> u64 {
        match u64::from(free) {
            0 => 0,
            SLOTS => 5,
            free => 1 + free * 4 / SLOTS,
        }
    }
}

struct Board {
    hosts: Vec<OneHost>,
    dispatches: Vec<Dispatch>,
    ids: Vec<HostId>,
    tables: Vec<CapacityTable<Vec<AtomicU64>>>,
    rng: SmallRng,
    ends: BinaryHeap<Reverse<(u64, usize)>>,
}

impl Board {
    fn new(seed: u64, choices: usize) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut ids: Vec<HostId> = (0..HOSTS).map(|_| HostId(rng.random())).collect();
        ids.sort_unstable();
        let addr = HostAddr { ip: [10, 0, 0, 1].into(), port: 1 };
        let rows: Vec<_> = ids.iter().map(|id| (*id, addr)).collect();
        let Ok(map) = MapView::open(encode(MapVersion { epoch: 1, version: 1 }, &rows)) else {
            unreachable!("what was encoded opens")
        };
        let table = |_| {
            let table = CapacityTable::create(zeroed(words_for(HOSTS)), 1);
            let adopted = Adopter::new(&table).adopt::<_, Vec<u8>, _>(&table, None, &map);
            assert!(adopted.is_ok(), "a table of that size");
            table
        };
        let whole = Resources { cpu_millis: SLOTS * 250, memory_bytes: SLOTS << 30 };
        let admission = Admission::new(&Shapes::default(), whole, 1 << 10, 0);
        let host = OneHost { admission, live: 0, seq: 1, told_free: 0 };
        let policy = Policy { select: Select { choices }, ..Policy::default() };
        Self {
            hosts: vec![host; HOSTS],
            ids,
            dispatches: (0..PLACERS as u64).map(|at| Dispatch::new(policy, seed + at)).collect(),
            tables: (0..PLACERS).map(table).collect(),
            rng,
            ends: BinaryHeap::new(),
        }
    }

    fn tell(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        host.seq += 1;
        host.told_free = host.admission.told()[shape().index()];
        let word = host.word();
        self.tables.iter().for_each(|table| _ = table.feed(self.ids[at], word));
    }

    fn changed(&mut self, at: usize, cell: Cell) {
        let host = &self.hosts[at];
        let free = host.admission.told()[shape().index()];
        let crossed = OneHost::quarter(free) != OneHost::quarter(host.told_free);
        if cell.stale_s == 0 || cell.rules == Rules::Quarters && crossed {
            self.tell(at);
        }
    }

    /// A host is asked; whether it takes the launch, and its word then.
    fn ask(&mut self, now: u64, host: HostId) -> (bool, usize) {
        let at = self.ids.binary_search(&host).unwrap_or(0);
        let taken = self.hosts[at].admission.take(shape()).is_ok();
        if taken {
            self.hosts[at].live += 1;
            let life = -LIFE_S * (1.0 - self.rng.random::<f64>()).ln();
            self.ends.push(Reverse((now + micros(life), at)));
        }
        (taken, at)
    }

    /// One launch by placer-core's rules: messages that were sent, and whether it runs.
    fn launch(&mut self, now: u64, cell: Cell) -> (u32, bool) {
        let placer = self.rng.random_range(0..PLACERS);
        if cell.rules == Rules::Polls {
            return self.launch_by_poll(now, placer, cell);
        }
        let mut launch = Launch::new(now, shape(), 10_000, &mut self.dispatches[placer]);
        loop {
            let step = launch.poll(now, &self.tables[placer], &mut self.dispatches[placer]);
            let Step::Send { host, .. } = step else {
                while self.dispatches[placer].poll_report().is_some() {}
                let runs = matches!(step, Step::Done(launch::Outcome::Started(_)));
                return (launch.attempts(), runs);
            };
            let (taken, at) = self.ask(now, host);
            let (word, seq) = (self.hosts[at].word(), self.hosts[at].seq);
            let reply = if taken {
                LaunchReply::Started(Started {
                    sandbox: SandboxId { host, local: now },
                    visible_at: VisibleAt { incarnation: Incarnation(1), seq: Seq(seq + 1) },
                    word,
                    steps: Steps::default(),
                })
            } else {
                LaunchReply::Refused(Refused { word, code: Code::NoCapacity })
            };
            let dispatch = &mut self.dispatches[placer];
            launch.handle_reply(now, host, reply, &self.tables[placer], dispatch);
            if taken {
                self.changed(at, cell);
            }
        }
    }

    /// The same by polls: it counts what it placed itself until the next one, and a refusal as a full host.
    fn launch_by_poll(&mut self, now: u64, placer: usize, cell: Cell) -> (u32, bool) {
        let mut excluded = Vec::new();
        for attempt in 0..ATTEMPTS_MAX {
            let select = Select { choices: cell.choices };
            let pick = select.pick(&self.tables[placer], &mut self.rng, shape(), &excluded);
            let Pick::Picked(picked) = pick else { return (attempt, false) };
            let host = picked.reservation.host;
            let (taken, _) = self.ask(now, host);
            let table = &self.tables[placer];
            if let Some((Some(known), _)) = table.get(host) {
                let left = |free: u16| if taken { free.saturating_sub(1) } else { 0 };
                table
                    .correct(host, CapacityWord::new(known.free_all().map(left), 0, known.stamp()));
            }
            table.release(picked.reservation);
            if taken {
                return (attempt + 1, true);
            }
            excluded.push(host);
        }
        (ATTEMPTS_MAX, false)
    }

    fn end(&mut self, until: u64, cell: Cell) {
        while let Some(&Reverse((when, at))) = self.ends.peek()
            && when <= until
        {
            self.ends.pop();
            let host = &mut self.hosts[at];
            host.live -= 1;
            let mut lives = [0; SHAPES_MAX];
            lives[shape().index()] = host.live;
            host.admission.give(&lives);
            self.changed(at, cell);
        }
    }

    fn max_over_mean(&self) -> f64 {
        let lives = || self.hosts.iter().map(|host| host.live);
        let most = lives().max().unwrap_or(0);
        f64::from(most) * f64::from(u32::try_from(HOSTS).unwrap_or(1))
            / f64::from(lives().sum::<u32>().max(1))
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "microseconds")]
fn micros(seconds: f64) -> u64 {
    (seconds * 1e6) as u64
}

/// Runs one cell.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "rates")]
pub fn point(cell: Cell) -> Point {
    let mut board = Board::new(u64::from(cell.fill), cell.choices);
    let wait_s = LIFE_S / (HOSTS as f64 * SLOTS as f64 * f64::from(cell.fill) / 100.0);
    let warm_s = 3 * 30;
    let end = micros((warm_s + 2 * cell.stale_s.max(30)) as f64);
    let period = micros(cell.stale_s as f64).max(1_000_000);
    let (mut now, mut told, mut looked) = (0, 0, 0);
    let (mut launches, mut failed, mut sent, mut refused) = (0u64, 0u64, 0u64, 0u64);
    let mut balance = (0.0, 0u32);
    while now < end {
        now += micros(-wait_s * (1.0 - board.rng.random::<f64>()).ln());
        board.end(now, cell);
        if now >= told {
            (0..HOSTS).for_each(|at| board.tell(at));
            told += period;
        }
        let (messages, runs) = board.launch(now, cell);
        if now < micros(warm_s as f64) {
            continue;
        }
        launches += 1;
        failed += u64::from(!runs);
        sent += u64::from(messages);
        refused += u64::from(messages - u32::from(runs));
        if now >= looked {
            balance = (balance.0 + board.max_over_mean(), balance.1 + 1);
            looked = now + 1_000_000;
        }
    }
    Point {
        refused: refused as f64 / sent.max(1) as f64,
        attempts: sent as f64 / launches.max(1) as f64,
        failed: failed as f64 / launches.max(1) as f64,
        max_over_mean: balance.0 / f64::from(balance.1.max(1)),
    }
}

/// Runs the grid and writes `staleness.md` and `staleness.png` into `dir`.
///
/// # Errors
/// In words, if a file cannot be written.
pub fn write(dir: &Path) -> Result<(), String> {
    let points: Vec<(Cell, Point)> = cells().map(|cell| (cell, point(cell))).collect();
    let more = FILLS.map(|fill| (point(volley(fill)), point(peer(fill))));
    let text = table(&points, &more);
    std::fs::write(dir.join("staleness.md"), text).map_err(|why| why.to_string())?;
    plot(&points, &dir.join("staleness.png")).map_err(|why| why.to_string())
}

fn cells() -> impl Iterator<Item = Cell> {
    FILLS.into_iter().flat_map(|fill| {
        STALE_S.into_iter().flat_map(move |stale_s| {
            CHOICES.into_iter().map(move |choices| Cell {
                choices,
                stale_s,
                fill,
                rules: Rules::Board,
            })
        })
    })
}

/// Two choices, a word every 15 s and when a quarter is crossed.
#[must_use]
pub const fn volley(fill: u32) -> Cell {
    Cell { choices: 2, stale_s: 15, fill, rules: Rules::Quarters }
}

/// Best of three on polls of all hosts every 20 s.
#[must_use]
pub const fn peer(fill: u32) -> Cell {
    Cell { choices: 3, stale_s: 20, fill, rules: Rules::Polls }
}

fn table(points: &[(Cell, Point)], more: &[(Point, Point)]) -> String {
    let mut text = format!(
        "# Choices against staleness\n\n\
         Written by `cargo run -p tests-sim --release -- grid`: {HOSTS} hosts of {SLOTS} slots, {PLACERS} placers, \
         sandboxes of {LIFE_S} s in the mean, words of all hosts every `staleness` seconds, replies that carry \
         the host's word. A cell says: refused messages in percent / messages a launch / launches that found no host \
         in percent / fullest host over the mean.\n\n\
         ![refusals](staleness.png)\n\nThe picture: refused messages (%) over staleness (s), one panel for each fill \
         (50, 80, 95 %), one line for each k: 1 grey, 2 blue, 3 green, 4 orange, 8 red.\n"
    );
    for (fill, (volley, peer)) in FILLS.into_iter().zip(more) {
        let _ = write!(text, "\n## {fill} % full\n\n| staleness |");
        CHOICES.iter().for_each(|choices| _ = write!(text, " k = {choices} |"));
        let _ = writeln!(text, "\n|---|{}", "---|".repeat(CHOICES.len()));
        for stale_s in STALE_S {
            let _ = write!(text, "| {stale_s} s |");
            let row =
                points.iter().filter(|(cell, _)| (cell.fill, cell.stale_s) == (fill, stale_s));
            row.for_each(|(_, point)| _ = write!(text, " {} |", cell_text(point)));
            text.push('\n');
        }
        let _ = write!(
            text,
            "\n- Volley (k = 2, a word every 15 s and when a quarter is crossed): {}\n\
             - best of 3 on polls of 20 s that replies do not correct (E2B): {}\n",
            cell_text(volley),
            cell_text(peer)
        );
    }
    text.push_str(READING);
    text
}

const READING: &str = "\n## What it says\n\n\
    With fresh words the second choice takes most of the gain and the eighth little more, as the theory has it \
    (Mitzenmacher, How useful is old information?, 2000). With old words more choices run to the same few hosts: from 5 s on \
    eight choices are refused more often than two. Replies that carry the host's word save most of \
    what age costs up to 80 %; at 95 % on old words nothing does, and hosts that speak up when a quarter is crossed \
    are what helps. So: k = 2, words with every reply, a heartbeat at each quarter.\n";

fn cell_text(point: &Point) -> String {
    format!(
        "{:.2} / {:.3} / {:.2} / {:.2}",
        point.refused * 100.0,
        point.attempts,
        point.failed * 100.0,
        point.max_over_mean
    )
}

const WIDTH: i32 = 420;
const HEIGHT: i32 = 300;
const MARGIN: i32 = 44;

fn plot(points: &[(Cell, Point)], path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let size = (u32::try_from(3 * WIDTH)?, u32::try_from(HEIGHT)?);
    let area = BitMapBackend::new(path, size).into_drawing_area();
    area.fill(&WHITE)?;
    let colours = [RGBColor(120, 120, 120), BLUE, GREEN, RGBColor(230, 130, 0), RED];
    for (panel, fill) in FILLS.into_iter().enumerate() {
        let left = WIDTH * i32::try_from(panel)? + MARGIN;
        let of_panel = || points.iter().filter(move |(cell, _)| cell.fill == fill);
        let most = of_panel().map(|(_, point)| point.refused * 100.0).fold(0.1, f64::max);
        let (bottom, height) = (HEIGHT - MARGIN, HEIGHT - 2 * MARGIN);
        let step = (WIDTH - 2 * MARGIN) / (i32::try_from(STALE_S.len())? - 1);
        #[expect(clippy::cast_possible_truncation, reason = "pixels")]
        let y = |refused: f64| bottom - (refused / most * f64::from(height)) as i32;
        for quarter in 0..=4 {
            let value = most * f64::from(quarter) / 4.0;
            let ends = vec![(left, y(value)), (left + WIDTH - 2 * MARGIN, y(value))];
            area.draw(&PathElement::new(ends, RGBColor(220, 220, 220)))?;
            digits(
                &area,
                (left - 34, y(value) - 5),
                &if most < 1.0 { format!("{value:.2}") } else { format!("{value:.1}") },
            )?;
        }
        for (at, stale_s) in STALE_S.into_iter().enumerate() {
            let x = left + step * i32::try_from(at)?;
            digits(&area, (x - 4, bottom + 10), &stale_s.to_string())?;
        }
        digits(&area, (left, 14), &format!("{fill}%"))?;
        for (choices, colour) in CHOICES.into_iter().zip(colours) {
            let line: Vec<(i32, i32)> = of_panel()
                .filter(|(cell, _)| cell.choices == choices)
                .zip(0..)
                .map(|((_, point), at)| (left + step * at, y(point.refused * 100.0)))
                .collect();
            area.draw(&PathElement::new(line.clone(), colour.stroke_width(2)))?;
            for dot in line {
                area.draw(&Circle::new(dot, 3, colour.filled()))?;
            }
        }
    }
    area.present()?;
    Ok(())
}

type Area<'a> = DrawingArea<BitMapBackend<'a>, plotters::coord::Shift>;

/// Digits of three by five squares: fonts would be a system's business.
fn digits(area: &Area<'_>, at: (i32, i32), text: &str) -> Result<(), Box<dyn std::error::Error>> {
    const GLYPHS: [(char, [u8; 5]); 12] = [
        ('0', [7, 5, 5, 5, 7]),
        ('1', [2, 6, 2, 2, 7]),
        ('2', [7, 1, 7, 4, 7]),
        ('3', [7, 1, 7, 1, 7]),
        ('4', [5, 5, 7, 1, 1]),
        ('5', [7, 4, 7, 1, 7]),
        ('6', [7, 4, 7, 5, 7]),
        ('7', [7, 1, 1, 1, 1]),
        ('8', [7, 5, 7, 5, 7]),
        ('9', [7, 5, 7, 1, 7]),
        ('.', [0, 0, 0, 0, 2]),
        ('%', [5, 1, 2, 4, 5]),
    ];
    for (place, letter) in (0..).zip(text.chars()) {
        let rows =
            GLYPHS.iter().find(|(glyph, _)| *glyph == letter).map_or([0; 5], |(_, rows)| *rows);
        for (row, bits) in (0..).zip(rows) {
            for column in (0..3).filter(|column| bits & (4 >> column) != 0) {
                let (x, y) = (at.0 + place * 8 + column * 2, at.1 + row * 2);
                area.draw(&Rectangle::new([(x, y), (x + 2, y + 2)], BLACK.filled()))?;
            }
        }
    }
    Ok(())
}
