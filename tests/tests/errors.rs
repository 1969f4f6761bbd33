//! Bad input without a fleet: each mistake gives one clear error with a code, a hint and the right exit status.

use std::{fs, path::Path, process::Command};

use tests::fleet::{Ran, volley};

fn run(args: &[&str], home: &Path) -> Ran {
    let mut command = Command::new(volley());
    command.args(args).env("HOME", home).env_remove("XDG_STATE_HOME").env_remove("VOLLEY_CLIENT");
    Ran::of(&mut command)
}

#[test]
fn help_has_examples_and_every_command_has_help() {
    let home = tempfile::tempdir().unwrap();
    let help = run(&["--help"], home.path());
    assert!(help.assert_done().contains("Examples:"));
    for command in ["dev", "run", "exec", "ls", "host", "image", "bench", "init", "hostd"] {
        let help = run(&[command, "--help"], home.path());
        assert!(help.assert_done().contains("Usage: volley"), "{command}");
    }
    assert!(run(&["completion", "bash"], home.path()).assert_done().contains("volley"));
}

#[test]
fn unknown_flags_and_commands_are_usage_errors() {
    let home = tempfile::tempdir().unwrap();
    for args in [&["ls", "--nope"][..], &["nope"], &["run", "--image"], &["kill"], &["wait", "x"]] {
        let ran = run(args, home.path());
        assert_eq!(ran.code, Some(2), "{ran:?}");
        assert!(ran.stderr.starts_with("error[usage]: "), "{ran:?}");
        assert!(ran.stderr.contains("--help"), "{ran:?}");
    }
}

#[test]
fn unknown_settings_name_file_and_line_flag_or_variable() {
    let home = tempfile::tempdir().unwrap();
    for role in ["hostd", "heartbeatd", "placerd"] {
        let file = home.path().join(format!("{role}.toml"));
        fs::write(&file, "# settings\nlisten = \"127.0.0.1:0\"\nlisen = \"127.0.0.1:0\"\n")
            .unwrap();
        let ran = run(&[role, "--config", file.to_str().unwrap()], home.path());
        ran.assert_error("config", 2);
        assert!(ran.stderr.contains(&format!("{}:3:1: ", file.display())), "{ran:?}");
        assert!(ran.stderr.contains("lisen"), "{ran:?}");

        let ran = run(&[role, "--set", "lisen=1"], home.path());
        ran.assert_error("config", 2);
        assert!(ran.stderr.contains("--set lisen: "), "{ran:?}");

        let variable = format!("VOLLEY_{}_LISEN", role.to_uppercase());
        let mut command = Command::new(volley());
        let ran = Ran::of(command.arg(role).env(&variable, "1"));
        ran.assert_error("config", 2);
        assert!(ran.stderr.contains(&format!("{variable}: ")), "{ran:?}");
    }
}

#[test]
fn a_client_without_a_fleet_is_told_how_to_get_one() {
    let home = tempfile::tempdir().unwrap();
    let ran = run(&["ls"], home.path());
    ran.assert_error("config", 2);
    assert!(ran.stderr.contains("volley dev"), "{ran:?}");

    let file = home.path().join("client.toml");
    fs::write(&file, "placer = [\"127.0.0.1:1\"]\n").unwrap();
    let ran = run(&["ls", "--client", file.to_str().unwrap()], home.path());
    ran.assert_error("config", 2);
    assert!(ran.stderr.contains(&format!("{}:1:1: ", file.display())), "{ran:?}");

    let ran = run(&["ls", "--client", "/nonexistent.toml"], home.path());
    ran.assert_error("not-found", 3);
}

#[test]
fn a_placer_that_is_not_there_is_unreachable() {
    let home = tempfile::tempdir().unwrap();
    let fleet = home.path().join("fleet");
    let made = run(&["init", fleet.to_str().unwrap(), "--tenant", "acme"], home.path());
    assert!(made.assert_done().contains("tenant-acme"));
    let identity = fleet.join("tenant-acme");
    // Port 1 of loopback: nobody listens there.
    let args = ["ls", "--placer", "127.0.0.1:1", "--identity", identity.to_str().unwrap()];
    run(&args, home.path()).assert_error("unreachable", 1);
}

#[test]
fn a_fleet_is_never_made_over_another() {
    let home = tempfile::tempdir().unwrap();
    let fleet = home.path().join("fleet");
    let fleet = fleet.to_str().unwrap();
    let first = run(&["init", fleet, "--hosts", "2"], home.path());
    assert_eq!(first.assert_done().matches("hostd.toml").count(), 2);
    let key = fs::read(home.path().join("fleet/fleet/ca.key")).unwrap();
    run(&["init", fleet], home.path()).assert_error("config", 2);
    let more = run(&["init", fleet, "--hosts", "1"], home.path());
    assert_eq!(more.assert_done().matches("hostd.toml").count(), 1);
    assert_eq!(fs::read(home.path().join("fleet/fleet/ca.key")).unwrap(), key);
    run(&["init", fleet, "--tenant", "Not A Name"], home.path()).assert_error("config", 2);
}

#[test]
fn sources_that_are_no_images_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let objects = format!("dir://{}", home.path().join("objects").display());
    let common = ["--objects", &objects, "--tenant", "acme"];
    let prepare = |source: &str, more: &[&str]| {
        let args = [&["image", "prepare", source][..], &common, more].concat();
        run(&args, home.path())
    };
    prepare("/nonexistent/rootfs", &[]).assert_error("not-found", 3);

    // A tar that breaks off in its second entry.
    let mut header = vec![0u8; 512];
    header[..5].copy_from_slice(b"hello");
    header[100..107].copy_from_slice(b"0000644");
    header[108..115].copy_from_slice(b"0000000");
    header[116..123].copy_from_slice(b"0000000");
    header[124..135].copy_from_slice(b"00000010000");
    header[136..147].copy_from_slice(b"00000000000");
    header[148..156].copy_from_slice(b"        ");
    header[156] = b'0';
    header[257..263].copy_from_slice(b"ustar\0");
    header[263..265].copy_from_slice(b"00");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let broken = home.path().join("broken.tar");
    fs::write(&broken, [&header[..], &[7u8; 100]].concat()).unwrap();
    let ran = prepare(broken.to_str().unwrap(), &["--name", "broken"]);
    ran.assert_error("image-broken", 1);
    let listed = run(&[&["image", "ls", "-o", "json"][..], &common].concat(), home.path());
    assert_eq!(listed.assert_done().trim(), "[]", "nothing was published");

    let root = home.path().join("root");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::write(root.join("bin/x"), "x").unwrap();
    prepare(root.to_str().unwrap(), &["--name", "NOT A NAME"]).assert_error("bad-request", 2);
    let ran = prepare(root.to_str().unwrap(), &["--name", "small", "-o", "json"]);
    let summary: serde_json::Value = serde_json::from_str(ran.assert_done()).unwrap();
    assert_eq!(summary["name"], "small");
    let ran = run(&[&["image", "inspect", "none"][..], &common].concat(), home.path());
    ran.assert_error("image-not-found", 3);
}

#[test]
fn stores_are_proved_and_checked() {
    let home = tempfile::tempdir().unwrap();
    let objects = format!("dir://{}", home.path().join("objects").display());
    let args = ["doctor", "objects", "--objects", &objects, "--rounds", "10", "-o", "json"];
    let ran = run(&args, home.path());
    let report: serde_json::Value = serde_json::from_str(ran.assert_done()).unwrap();
    assert_eq!(report["good"], 10, "{report}");
    run(&["doctor", "objects", "ftp://x"], home.path()).assert_error("config", 2);
    run(&["map", "show", "--objects", &objects], home.path()).assert_error("no-hosts", 5);

    let store = format!("embedded://{}", home.path().join("store").display());
    let path = store.trim_start_matches("embedded://");
    // A look makes nothing.
    run(&["store", "check", &store], home.path()).assert_error("config", 2);
    assert!(!std::path::Path::new(path).exists());
    let nowhere = home.path().join("no-fleet");
    let nowhere = nowhere.to_str().unwrap();
    for keys in ["--rotate-key", "--prune-keys"] {
        run(&["init", nowhere, keys], home.path()).assert_error("config", 2);
    }
    for what in ["init", "check"] {
        let ran = run(&["store", what, &store], home.path());
        assert_eq!(ran.assert_done().matches(path).count(), 1, "said once: {ran:?}");
    }
    run(&["store", "check", "postgres://x"], home.path()).assert_error("config", 2);
    assert!(run(&["doctor"], home.path()).assert_done().contains("cgroups"));
}
