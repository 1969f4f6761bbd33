//! The binary from outside, without a fleet. That this file is here also makes `cargo test --workspace` build the binary
//! that the tests of whole fleets start.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::process::Command;

#[test]
fn the_version_is_the_packages() {
    let output = Command::new(env!("CARGO_BIN_EXE_volley")).arg("--version").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(said.trim(), format!("volley {}", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut help = Command::new(env!("CARGO_BIN_EXE_volley"));
    let mut child = help
        .args(["completion", "bash"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

/// A root with the machine's shell in it.
fn shell_root(root: &std::path::Path) {
    std::fs::create_dir_all(root.join("bin")).unwrap();
    std::fs::copy("/bin/sh", root.join("bin/sh")).unwrap();
    let told = Command::new("ldd").arg("/bin/sh").output().unwrap();
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    for library in told.split_whitespace().filter(|word| word.starts_with('/')) {
        let to = root.join(library.trim_start_matches('/'));
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(library, to).unwrap();
    }
}

#[test]
fn a_run_at_prepare_records_a_boot_pack() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: boxes need root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (root, store) = (dir.path().join("root"), dir.path().join("store"));
    shell_root(&root);
    std::fs::create_dir(&store).unwrap();
    let objects = format!("dir://{}", store.display());
    let volley = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_volley"));
        command.args(&words[..2]).args(["--tenant", "t", "--objects", &objects, "-o", "json"]);
        command.args(&words[2..]).output().unwrap()
    };
    let root = root.to_str().unwrap();
    let prepare = ["image", "prepare", "--name", "shell", root, "--run", "/bin/sh", "-c"];

    let done = volley(&[&prepare[..], &["echo heard"]].concat());
    let errors = String::from_utf8_lossy(&done.stderr).into_owned();
    if errors.contains("error[unsupported]") {
        println!("skipped: {errors}");
        return;
    }
    assert!(done.status.success() && errors.contains("heard"), "{done:?}");
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    let at = said.find("run-").expect("the boot pack's entry is named");
    let entry = said[at..].split('"').next().unwrap();
    assert!(said.contains("\"stopped\": false"), "{said}");
    let shown = volley(&["image", "inspect", "shell"]);
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains(entry) && shown.contains("\"default\""), "{shown}");

    // What ends in an error is no start that others would repeat.
    let failed = volley(&[&prepare[..], &["exit 3"]].concat());
    assert!(!failed.status.success(), "{failed:?}");
    assert!(String::from_utf8_lossy(&failed.stderr).contains("ended with code 3"), "{failed:?}");
}
