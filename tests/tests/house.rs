//! The order of the house: which crate may know which, and how large a file may grow.
//!
//! Directions are read from `cargo metadata` as declared, without building anything; development dependencies do
//! not count, except in cores and the simulator, which must stay free of the world even in tests' hands. Functions'
//! length is clippy's part (`too_many_lines`).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package};

/// What each crate of ours may depend on, of ours. Crates at the outside may have everything.
const MAY_KNOW: &[(&str, &[&str])] = &[
    ("wire", &[]),
    ("wire-net", &["wire"]),
    ("heartbeat-core", &["wire"]),
    ("placer-core", &["wire"]),
    ("hostd-core", &["wire"]),
    ("hostd-image", &["wire", "wire-net"]),
    ("hostd-sandbox", &["wire"]),
    ("hostd-egress", &["wire"]),
    ("volley-client", &["wire", "wire-net"]),
    ("heartbeat", &["wire", "wire-net", "heartbeat-core"]),
    // The store itself is heartbeat's: `lookup = "store"` reads capacity there (DESIGN 4.2).
    ("placer", &["wire", "wire-net", "placer-core", "heartbeat"]),
    ("hostd", &["wire", "wire-net", "hostd-core", "hostd-image", "hostd-sandbox", "hostd-egress"]),
    ("tests-sim", &["wire", "heartbeat-core", "placer-core", "hostd-core"]),
];

/// Crates at the outside.
const OUTSIDE: &[&str] = &["volley", "tests", "bench"];

/// Crates that decide and touch nothing.
const CORES: &[&str] = &["wire", "heartbeat-core", "placer-core", "hostd-core", "tests-sim"];

/// Packages that touch the world: never in a core.
const WORLDLY: &[&str] = &[
    "axum",
    "io-uring",
    "libc",
    "memmap2",
    "object_store",
    "oci-client",
    "quinn",
    "quinn-proto",
    "quinn-udp",
    "redb",
    "reqwest",
    "rustix",
    "rustls",
    "scylla",
    "socket2",
    "tokio",
    "tokio-uring",
    "tokio-util",
    "tracing-subscriber",
];

/// Words that read a clock, randomness, a file or a socket: never in the code of a core.
const WORLDLY_WORDS: &[&str] = &[
    "Instant::now",
    "SystemTime::now",
    "std::fs",
    "std::net::Udp",
    "std::net::Tcp",
    "thread::spawn",
    "thread::sleep",
    "rand::rng()",
    "OsRng",
    "from_os_rng",
];

/// Lines of a file: more wants a reason in its head, in the words `Longer than 500 lines`.
const FILE_LINES: usize = 500;

/// Lines of a file that no reason allows.
const FILE_LINES_NEVER: usize = 900;

fn house() -> Metadata {
    MetadataCommand::new().no_deps().exec().expect("cargo metadata works in the workspace")
}

fn names(package: &Package, kinds: &[DependencyKind]) -> BTreeSet<String> {
    let dependencies = package.dependencies.iter().filter(|dep| kinds.contains(&dep.kind));
    dependencies.map(|dep| dep.name.clone()).collect()
}

#[test]
fn crates_know_only_what_is_below_them() {
    let house = house();
    let ours: BTreeMap<_, _> =
        house.packages.iter().map(|package| (package.name.to_string(), package)).collect();
    let known: BTreeSet<_> =
        MAY_KNOW.iter().map(|(name, _)| *name).chain(OUTSIDE.iter().copied()).collect();
    for name in ours.keys() {
        assert!(known.contains(name.as_str()), "{name}: say in MAY_KNOW what it may depend on");
    }
    for (name, may_know) in MAY_KNOW {
        let package = ours.get(*name).unwrap_or_else(|| panic!("{name}: in MAY_KNOW, not a crate"));
        let kinds = if CORES.contains(name) {
            &[DependencyKind::Normal, DependencyKind::Build, DependencyKind::Development][..]
        } else {
            &[DependencyKind::Normal, DependencyKind::Build][..]
        };
        for dependency in names(package, kinds) {
            let ours = ours.contains_key(&dependency);
            let allowed = may_know.contains(&dependency.as_str()) || dependency == *name;
            assert!(!ours || allowed, "{name} must not depend on {dependency} (DESIGN 2)");
        }
    }
}

#[test]
fn cores_touch_nothing() {
    for package in house().packages {
        if !CORES.contains(&package.name.as_str()) {
            continue;
        }
        let all = names(&package, &[DependencyKind::Normal, DependencyKind::Build]);
        for worldly in WORLDLY {
            assert!(!all.contains(*worldly), "{}: {worldly} touches the world", package.name);
        }
        if package.name.as_str() == "tests-sim" {
            // Its program reads a clock to say how long it took; what is simulated does not.
            continue;
        }
        let folder = package.manifest_path.parent().expect("a manifest has a folder").join("src");
        for file in rust_files(folder.as_std_path()) {
            let text = read(&file);
            let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
            for (at, line) in code.lines().enumerate() {
                let line = line.split("//").next().unwrap_or_default();
                let found = WORLDLY_WORDS.iter().find(|word| line.contains(**word));
                assert!(found.is_none(), "{}:{}: {found:?} in a core", file.display(), at + 1);
            }
        }
    }
}

#[test]
fn files_say_what_they_are_for_and_stay_short() {
    let root = house().workspace_root;
    let mut wrong = Vec::new();
    let files = rust_files(root.as_std_path());
    assert!(files.len() > 50, "the walk sees the tree");
    for file in files {
        let text = read(&file);
        let shown = file.strip_prefix(&root).unwrap_or(&file).display();
        if !text.starts_with("//!") {
            wrong.push(format!("{shown}: does not open with `//!`"));
        }
        let lines = text.lines().count();
        let head: Vec<_> = text.lines().take_while(|line| line.starts_with("//!")).collect();
        let reason = head.join(" ").contains("Longer than 500 lines");
        if lines > FILE_LINES_NEVER || (lines > FILE_LINES && !reason) {
            wrong.push(format!("{shown}: {lines} lines"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_package_from_outside_has_its_reason() {
    let text = read(house().workspace_root.join("Cargo.toml").as_std_path());
    let section = text.split("[workspace.dependencies]").nth(1).expect("the section is there");
    let section = section.split("\n[").next().unwrap_or_default();
    let mut outside = 0;
    for line in section.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')) {
        if line.contains("path = ") {
            continue;
        }
        outside += 1;
        assert!(line.contains(" # "), "without a reason: {line}");
    }
    assert!(outside > 20, "the section was read");
}

#[test]
fn the_top_level_is_as_designed() {
    let root = house().workspace_root;
    let expected = ["bench", "heartbeat", "hostd", "placer", "tests", "volley", "wire"];
    let entries = fs::read_dir(&root).expect("the root can be read").filter_map(Result::ok);
    let folders: BTreeSet<_> = entries
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| !name.starts_with('.') && !name.starts_with("target"))
        .collect();
    assert_eq!(folders.into_iter().collect::<Vec<_>>(), expected);
    for file in ["README.md", "LICENSE", "Cargo.lock", ".ci/run"] {
        assert!(root.join(file).exists(), "{file} is missing");
    }
}

fn read(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of ours can be read") {
            let path = entry.expect("an entry can be read").path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.starts_with('.') || name.starts_with("target") {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}
