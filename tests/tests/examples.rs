//! The client library's examples, run as its documentation says, and commands that break off half-way.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::Signal;
use tests::fleet::{Fleet, Ran, can_box, signal};

#[test]
fn the_examples_of_the_client_library_do_what_they_say() {
    if !can_box() {
        return;
    }
    let fleet = Fleet::up(&["--hosts", "1", "--burst", "0"]);
    let launched = example(&fleet, "launch", &["sh", "-c", "echo from the example; exit 0"]);
    assert!(launched.assert_done().contains("from the example"), "{launched:?}");
    let exec = example(&fleet, "exec", &[]);
    let said = exec.assert_done();
    assert!(said.contains("hello, sandbox") && said.contains("bytes counted: 30"), "{exec:?}");

    interrupted(&fleet);
    assert_eq!(fleet.stop(), Some(0));
}

fn example(fleet: &Fleet, name: &str, command: &[&str]) -> Ran {
    let text = std::fs::read_to_string(fleet.client()).unwrap();
    let file: toml::Table = text.parse().unwrap();
    let placer = file["placers"][0].as_str().unwrap();
    let identity = file["identity"].as_str().unwrap();
    // Where CI built everything, the example is there already.
    let built =
        std::env::var_os("VOLLEY_BIN").map(|bin| PathBuf::from(bin).with_file_name("examples"));
    let mut run = match built.map(|folder| folder.join(name)).filter(|example| example.exists()) {
        Some(example) => Command::new(example),
        None => {
            let mut run = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            run.args(["run", "--quiet", "-p", "volley-client", "--example", name, "--"]);
            run
        }
    };
    run.args([placer, identity, "dev", "shell"]).args(command);
    Ran::of(&mut run)
}

/// Ctrl-C while a command runs is the command's.
fn interrupted(fleet: &Fleet) {
    let command = "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.05; done";
    let mut run = fleet.command(["run", "--image", "shell", "--", "sh", "-c", command]);
    let mut child = run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    signal(child.id(), Signal::INT);
    assert_eq!(lines.next().unwrap().unwrap(), "caught");
    let deadline = Instant::now() + Duration::from_secs(20);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "it does not end");
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(status.code(), Some(5));
}
