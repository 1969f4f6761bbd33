//! Lives by the hundred thousand, and what they leave behind (FAULTS O6): memory, descriptors, mounts and groups of the
//! spawner, after a tenth of them and at the end.

#![allow(clippy::unwrap_used, reason = "a bench stops at the first surprise")]

use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::{Bench, Table, lives};

/// Lives between two looks.
const PART: usize = 2_000;

/// Lives at a time.
const IN_FLIGHT: usize = 8;

/// What a spawner holds.
#[derive(Clone, Copy, Debug)]
struct Held {
    memory_kib: u64,
    descriptors: u64,
    mounts: u64,
    groups: u64,
    slab_kib: u64,
}

/// Groups of this spawner's boxes in every hierarchy: beside the one that a parked box is in.
fn groups(pid: u32) -> u64 {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let Some(child) = children.split_whitespace().next() else { return 0 };
    let text = std::fs::read_to_string(format!("/proc/{child}/cgroup")).unwrap_or_default();
    let dirs = text.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let name = controllers.split(',').next()?;
        let (base, slot) = path.trim_start_matches('/').rsplit_once("/volley-").or_else(|| {
            path.trim_start_matches('/').strip_prefix("volley-").map(|slot| ("", slot))
        })?;
        let (hash, _) = slot.split_once("-slot-")?;
        let base = Path::new("/sys/fs/cgroup").join(name).join(base);
        Some((base, format!("volley-{hash}-slot-")))
    });
    let count = |(base, prefix): (PathBuf, String)| {
        let all = std::fs::read_dir(base).unwrap().flatten();
        all.filter(|e| e.file_name().to_string_lossy().starts_with(&prefix)).count() as u64
    };
    dirs.map(count).sum()
}

fn number_in(path: &str, name: &str) -> u64 {
    let text = std::fs::read_to_string(path).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix(name)).unwrap_or("0");
    line.split_whitespace().next().unwrap().parse().unwrap()
}

fn held(pid: u32) -> Held {
    let lines = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    Held {
        memory_kib: number_in(&format!("/proc/{pid}/status"), "VmRSS:"),
        descriptors: std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as u64,
        mounts: lines.lines().count() as u64,
        groups: groups(pid),
        slab_kib: number_in("/proc/meminfo", "SUnreclaim:"),
    }
}

/// Waits until the pool is full, so that looks compare.
fn settle(bench: &Bench) {
    loop {
        let pool = bench.runtime.block_on(bench.spawner.pool()).unwrap();
        if pool[0].parked == 32 && pool[0].running == 0 {
            // Namespaces are freed by the kernel a little later.
            std::thread::sleep(std::time::Duration::from_secs(1));
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

pub(crate) fn run(bench: &mut Bench, wanted: usize, table: &mut Table) {
    let begun = Instant::now();
    let mut done = 0;
    let mut early = None;
    while done < wanted {
        let part = PART.min(wanted - done);
        let (rate, _) = lives::live(bench, part, IN_FLIGHT);
        done += part;
        if early.is_none() && done * 10 >= wanted {
            settle(bench);
            early = Some(held(bench.spawner.pid()));
        }
        if done % (PART * 5) == 0 || done == wanted {
            println!("{done} lives, {rate:.0}/s, {:?}", held(bench.spawner.pid()));
        }
    }
    let time = begun.elapsed();
    settle(bench);
    let (early, late) = (early.unwrap(), held(bench.spawner.pid()));
    println!("after a tenth {early:?}\nat the end    {late:?}");
    #[expect(clippy::cast_precision_loss, reason = "some thousands")]
    let rate = wanted as f64 / time.as_secs_f64();
    table.add(&format!("{wanted} lives"), format!("{rate:.0}/s, {time:.0?}"), "", None);
    for (name, a, b) in [
        ("spawner's memory, KiB", early.memory_kib, late.memory_kib),
        ("its descriptors", early.descriptors, late.descriptors),
        ("its mounts", early.mounts, late.mounts),
    ] {
        let flat = b.saturating_sub(a) * 100 <= a;
        table.add(name, format!("{a} -> {b}"), "flat within 1 %", Some(flat));
    }
    // As many slots as were ever taken at once keep their groups: those parked and in flight, and those being made or
    // on their way out, as many again as are in flight.
    let most = 5 * (32 + 2 * IN_FLIGHT as u64 + 4);
    let said = format!("{} -> {}", early.groups, late.groups);
    let flat = early.groups > 0 && late.groups <= most;
    table.add(
        "its boxes' groups",
        said,
        &format!("at most {most}, whatever the lives"),
        Some(flat),
    );
    let said = format!("{} -> {}", early.slab_kib, late.slab_kib);
    table.add("unreclaimable slab of the machine, KiB", said, "", None);
}
