//! A dev fleet without sandboxes: placement, certificates, listing, draining and errors, which need no root.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{fs, process::Command};

use tests::fleet::{Fleet, Ran, volley};

#[test]
fn a_fleet_without_sandboxes_places_and_says_so() {
    let fleet = Fleet::up(&["--boxes", "none", "--hosts", "3", "--burst", "300"]);
    let said = fleet.said.join("\n");
    assert!(said.contains("launches/sec"), "{said}");
    assert!(said.contains("--boxes none"), "every figure says that nothing ran: {said}");

    let hosts = fleet.run(["host", "ls", "-o", "json"]);
    let hosts: serde_json::Value = serde_json::from_str(hosts.assert_done()).unwrap();
    let hosts = hosts.as_array().unwrap();
    assert_eq!(hosts.len(), 3);
    assert!(hosts.iter().all(|host| host["state"] == "alive"), "{hosts:?}");
    let table = fleet.run(["host", "ls"]);
    assert!(table.assert_done().starts_with("HOST"), "{table:?}");
    assert_eq!(table.stdout.lines().count(), 4);

    let map = fleet.run(["map", "verify", "-o", "json"]);
    let map: serde_json::Value = serde_json::from_str(map.assert_done()).unwrap();
    assert_eq!(map["hosts"], 3);

    drains(&fleet, hosts[0]["host"].as_str().unwrap());
    strangers(&fleet);
    taken(&fleet);

    let state = fleet.state().to_owned();
    let client = fleet.client();
    let pids: Vec<_> =
        ["hostd", "heartbeatd", "placerd"].iter().flat_map(|role| fleet.pids(role)).collect();
    assert_eq!(pids.len(), 5);
    assert_eq!(fleet.stop(), Some(0));
    assert!(!client.exists(), "the client file goes with the fleet");
    for pid in pids {
        assert!(!fs::exists(format!("/proc/{pid}")).unwrap(), "{pid} runs on; {}", state.display());
    }
}

/// A drained host takes nothing, and goes on when it is resumed.
fn drains(fleet: &Fleet, host: &str) {
    let drained = fleet.run(["host", "drain", host, "--message", "a test", "--monitor"]);
    let _ = drained.assert_done();
    let shown = fleet.run(["host", "inspect", host, "-o", "json"]);
    let shown: serde_json::Value = serde_json::from_str(shown.assert_done()).unwrap();
    assert_eq!((&shown["state"], &shown["message"]), (&"drained".into(), &"a test".into()));
    let _ = fleet.run(["host", "resume", host]).assert_done();
    for what in ["drain", "resume", "inspect"] {
        fleet.run(["host", what, "h-00000000000000ff"]).assert_error("host-not-found", 3);
    }
    fleet.run(["host", "ls", "--state", "tired"]).assert_error("usage", 2);
}

/// Certificates of another fleet, and of the wrong role.
fn strangers(fleet: &Fleet) {
    let scratch = tempfile::tempdir().unwrap();
    let other = scratch.path().join("other");
    let mut init = Command::new(volley());
    let made = Ran::of(init.arg("init").arg(&other).args(["--tenant", "dev"]));
    let _ = made.assert_done();
    let identity = other.join("tenant-dev");
    let ran = fleet.run(["ls", "--identity", identity.to_str().unwrap()]);
    ran.assert_error("unauthenticated", 4);

    let tenant = fleet.state().join("tenant-dev");
    fleet.run(["host", "ls", "--identity", tenant.to_str().unwrap()]).assert_error("forbidden", 4);
    fleet.run(["ls", "--tenant", "somebody"]).assert_error("forbidden", 4);
    let nowhere = format!("sb-{:032x}", 7);
    let ran = fleet.run(["inspect", &nowhere]);
    assert!(matches!(ran.code, Some(1 | 3)), "{ran:?}");
}

/// What another process holds is not taken.
fn taken(fleet: &Fleet) {
    let store = format!("embedded://{}", fleet.state().join("store").display());
    fleet.run(["store", "check", &store]).assert_error("busy", 1);

    let mut second = Command::new(volley());
    let ran =
        Ran::of(second.arg("dev").arg("--state").arg(fleet.state()).args(["--boxes", "none"]));
    ran.assert_error("busy", 1);

    let config = fs::read_dir(fleet.state().join("config")).unwrap().flatten();
    let placerd = config.map(|entry| entry.path()).find(|path| path.ends_with("placerd.toml"));
    let scratch = tempfile::tempdir().unwrap();
    let mut again = Command::new(volley());
    again.arg("placerd").arg("--config").arg(placerd.unwrap()).arg("--state").arg(scratch.path());
    Ran::of(&mut again).assert_error("busy", 1);
}
