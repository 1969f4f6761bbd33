//! A dev fleet with real sandboxes, as a user sees it: run, exec, logs, files, limits of what is there, and the end.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tests::fleet::{Fleet, Ran, can_box, volley};

#[test]
fn a_user_runs_things_in_real_sandboxes() {
    if !can_box() {
        return;
    }
    let fleet = Fleet::up(&["--hosts", "2", "--burst", "50"]);
    let said = fleet.said.join("\n");
    assert!(said.contains("uid=0(root)") && said.contains("launches/sec"), "{said}");

    run_passes_on(&fleet);
    terminal(&fleet);
    detached(&fleet);
    followed(&fleet);
    idle(&fleet);
    files(&fleet);
    refusals(&fleet);
    network(&fleet);

    let traces = Traces::of(&fleet);
    assert_eq!(fleet.stop(), Some(0));
    traces.assert_gone();
}

/// Whatever a stopped fleet could leave: processes, cgroups, mounts.
#[derive(Debug)]
struct Traces {
    processes: Vec<u32>,
    cgroups: Vec<PathBuf>,
    state: String,
}

impl Traces {
    /// Of a fleet that is up.
    fn of(fleet: &Fleet) -> Self {
        let processes = fleet.processes();
        let mut cgroups: Vec<_> = processes.iter().flat_map(|pid| cgroups(*pid)).collect();
        cgroups.sort();
        cgroups.dedup();
        assert!(processes.len() > 6, "roles, spawners and parked boxes: {processes:?}");
        assert!(!cgroups.is_empty(), "boxes are in cgroups");
        Self { processes, cgroups, state: fleet.state().display().to_string() }
    }

    fn assert_gone(&self) {
        let alive: Vec<_> = self.processes.iter().filter(|pid| runs(**pid)).collect();
        assert!(alive.is_empty(), "processes run on: {alive:?}");
        let left: Vec<_> = self.cgroups.iter().filter(|group| group.exists()).collect();
        assert!(left.is_empty(), "cgroups are left: {left:?}");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let left: Vec<_> = mounts.lines().filter(|line| line.contains(&self.state)).collect();
        assert!(left.is_empty(), "mounts are left: {left:?}");
    }
}

/// A zombie that its new parent has not reaped yet is gone.
fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
}

/// The groups of boxes that a process is in.
fn cgroups(pid: u32) -> Vec<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let group = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?.to_owned(), parts.next()?);
        path.contains("/volley-").then(|| {
            let first = controllers.split(',').next().unwrap_or_default().to_owned();
            Path::new("/sys/fs/cgroup").join(first).join(path.trim_start_matches('/'))
        })
    };
    text.lines().filter_map(group).filter(|path| path.exists()).collect()
}

fn run_passes_on(fleet: &Fleet) {
    let command = ["sh", "-c", "id; cat /proc/1/comm; exit 7"];
    let ran = fleet.run([&["run", "--image", "shell", "--"][..], &command].concat());
    assert_eq!(ran.code, Some(7), "{ran:?}");
    assert!(ran.stdout.starts_with("uid=0(root) gid=0(root)"), "{ran:?}");
    assert_eq!(ran.stdout.lines().count(), 2, "{ran:?}");

    let env = ["run", "--image", "shell", "-e", "A=b c", "-w", "/tmp", "--", "sh", "-c"];
    let ran = fleet.run([&env[..], &["echo \"$A\"; pwd; echo err >&2"]].concat());
    assert_eq!((ran.assert_done(), ran.stderr.as_str()), ("b c\n/tmp\n", "err\n"));

    let mut piped = fleet.command(["run", "-i", "--image", "shell", "--", "sort", "-n"]);
    let piped = piped.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"10\n9\n1\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "1\n9\n10\n", "{output:?}");

    let ran = fleet.run(["run", "--image", "shell", "--", "sh", "-c", "kill -9 $$"]);
    assert_eq!(ran.code, Some(137), "{ran:?}");
}

/// A way out and a way in, as far as a machine without a network can show it.
fn network(fleet: &Fleet) {
    let run = |flags: &[&str], line: &str| {
        fleet.run([&["run", "--image", "shell"], flags, &["--", "sh", "-c", line]].concat())
    };
    let asks = run(&["--egress", "example.org:443"], "cat /etc/resolv.conf");
    assert!(asks.assert_done().starts_with("nameserver 198.18.0.1\n"), "{asks:?}");
    // Programs that end before anybody could carry their packets have run all the same, once.
    for _ in 0..5 {
        let _ = run(&["--egress", "example.org:443"], "exit 0").assert_done();
    }
    let closed = run(&["--egress", "169.254.169.254:80"], "true");
    assert_eq!(closed.code, Some(4), "{closed:?}");
    assert!(closed.stderr.contains("error[forbidden]"), "{closed:?}");
    assert_eq!(run(&["--egress", "a b"], "true").code, Some(2));

    let up = run(&["-d", "--publish", "80"], "sleep 100");
    let id = up.assert_done().trim().to_owned();
    let at = up.stderr.split_whitespace().find(|word| word.starts_with("127.0.0.1:")).unwrap();
    std::net::TcpStream::connect(at).unwrap();
    let said = fleet.run(["port", &id]);
    assert_eq!(said.assert_done(), format!("{at} leads to port 80\n"));
    assert!(fleet.run(["ls", "--fresh"]).assert_done().contains(at), "ls shows it");
    let port = at.rsplit(':').next().unwrap();
    let taken = run(&["--publish", &format!("{port}:80")], "true");
    assert!(taken.stderr.contains("error[busy]"), "{taken:?}");
    assert_eq!(fleet.run(["kill", &id]).assert_done().trim(), id);
    fleet.run(["wait", &id]);
    assert!(std::net::TcpStream::connect(at).is_err(), "the port went with its sandbox");
}

/// A shell on a terminal, under `script`, which has one to give.
fn terminal(fleet: &Fleet) {
    // Its size is set before `volley` runs, as a user's terminal has one.
    let shell =
        format!("stty rows 33 cols 101; {} run -it --image shell -- sh", volley().display());
    let mut script = Command::new("script");
    script.args(["--quiet", "--return", "--command", &shell, "/dev/null"]);
    let script = script.env("VOLLEY_CLIENT", fleet.client());
    let script = script.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let Ok(mut child) = script.spawn() else {
        println!("skipped: no `script` to have a terminal from");
        return;
    };
    let mut stdin = child.stdin.take().unwrap();
    // The size comes a moment after the shell: it is asked for until it is there.
    let sized = "while [ \"$(stty size)\" != '33 101' ]; do sleep 0.05; done";
    stdin.write_all(format!("tty; {sized}; echo $((6 * 7)); exit 3\n").as_bytes()).unwrap();
    // Its end would end the terminal before the shell has answered.
    let output = child.wait_with_output().unwrap();
    drop(stdin);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("/dev/pts/") && said.contains("42"), "{output:?}");
    assert_eq!(output.status.code(), Some(3), "{output:?}");
}

fn detached(fleet: &Fleet) {
    let command = "echo out; echo err >&2; trap 'exit 3' TERM; while :; do sleep 0.05; done";
    let args = ["run", "-d", "--image", "shell", "-l", "job=42", "--", "sh", "-c", command];
    let ran = fleet.run(args);
    let id = ran.assert_done().trim().to_owned();
    assert!(id.starts_with("sb-"), "{id}");

    // As hosts say it beside their heartbeats: soon.
    let recorded = (0..100).find_map(|_| {
        let list = fleet.run(["ls", "-l", "job=42", "-o", "json"]);
        let list: serde_json::Value = serde_json::from_str(list.assert_done()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(100));
        list.as_array().is_some_and(|rows| rows.len() == 1).then(|| list[0].clone())
    });
    let recorded = recorded.expect("a list from records is right within ten seconds");
    assert_eq!(
        (recorded["sandbox"].as_str(), recorded["state"].as_str()),
        (Some(&*id), Some("running"))
    );
    assert!(recorded["heard_ms"].as_u64().unwrap() < 10_000, "{recorded}");

    let list = fleet.run(["ls", "--fresh", "-l", "job=42", "-o", "json"]);
    let list: serde_json::Value = serde_json::from_str(list.assert_done()).unwrap();
    assert_eq!(list[0]["sandbox"], id.as_str());
    assert_eq!(list[0]["state"], "running");
    assert_eq!(list[0]["labels"][0][1], "42");
    assert_eq!(list.as_array().unwrap().len(), 1, "{list}");

    let ran = fleet.run(["exec", &id, "--", "sh", "-c", "echo inside; exit 4"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(4), "inside\n"), "{ran:?}");
    let ran = fleet.run(["exec", &id, "--", "no-such-program"]);
    ran.assert_error("command-not-found", 3);

    let _ = fleet.run(["pause", &id]).assert_done();
    let paused = fleet.run(["inspect", &id, "-o", "json"]);
    let paused: serde_json::Value = serde_json::from_str(paused.assert_done()).unwrap();
    assert_eq!(paused["state"], "paused");
    let _ = fleet.run(["resume", &id]).assert_done();

    let stats = fleet.run(["stats", &id, "-o", "json"]);
    let stats: serde_json::Value = serde_json::from_str(stats.assert_done()).unwrap();
    assert!(stats[0]["pids"].as_u64().unwrap() >= 1, "{stats}");

    let logs = fleet.run(["logs", &id]);
    assert_eq!((logs.assert_done(), logs.stderr.as_str()), ("out\n", "err\n"));

    let _ = fleet.run(["kill", "--signal", "TERM", &id]).assert_done();
    let waited = fleet.run(["wait", &id, "-o", "json"]);
    let waited: serde_json::Value = serde_json::from_str(waited.assert_done()).unwrap();
    assert_eq!(waited[0]["code"], 3, "{waited}");

    let ran = fleet.run(["run", "-d", "--image", "shell", "--", "sleep", "1000"]);
    let id = ran.assert_done().trim().to_owned();
    let _ = fleet.run(["kill", &id]).assert_done();
    let waited = fleet.run(["wait", &id, "-o", "json"]);
    let waited: serde_json::Value = serde_json::from_str(waited.assert_done()).unwrap();
    assert_eq!(waited[0]["why"], "killed", "{waited}");

    let ran = fleet.run(["run", "--image", "shell", "--timeout", "300ms", "--", "sleep", "1000"]);
    assert_eq!(ran.code, Some(137), "{ran:?}");
    assert!(ran.stderr.contains("its time was over"), "{ran:?}");
}

/// `logs -f`, `attach` and `port`, while a sandbox runs and after it.
fn followed(fleet: &Fleet) {
    let lines = "echo one; until [ -e /tmp/go ]; do sleep 0.05; done; echo two; exit 4";
    let ran = fleet.run(["run", "-d", "--image", "shell", "--", "sh", "-c", lines]);
    let id = ran.assert_done().trim().to_owned();
    let mut logs = fleet.command(["logs", "-f", &id]);
    let mut logs = logs.stdout(Stdio::piped()).spawn().unwrap();
    let mut said = std::io::BufReader::new(logs.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut said, &mut line).unwrap();
    assert_eq!(line, "one\n");

    let none = fleet.run(["port", &id]);
    assert_eq!((none.assert_done(), none.stderr.contains("no port")), ("", true), "{none:?}");
    let mut port = fleet.command(["port", &id, "0:9"]);
    let mut port = port.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut leads = std::io::BufReader::new(port.stdout.take().unwrap());
    line.clear();
    std::io::BufRead::read_line(&mut leads, &mut line).unwrap();
    let at = line.split_whitespace().next().unwrap();
    let mut closed = std::net::TcpStream::connect(at).unwrap();
    // Whoever connects sees the end of it, by a close or a reset, and `port` goes on.
    let _ = std::io::Read::read(&mut closed, &mut [0; 8]);
    tests::fleet::signal(port.id(), rustix::process::Signal::INT);
    let ended = port.wait_with_output().unwrap();
    let why = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success() && why.contains("nothing listens on port 9"), "{why}");

    let _ = fleet.run(["exec", &id, "--", "sh", "-c", "echo > /tmp/go"]).assert_done();
    line.clear();
    std::io::Read::read_to_string(&mut said, &mut line).unwrap();
    assert_eq!((line.as_str(), logs.wait().unwrap().success()), ("two\n", true));
    let rest = fleet.run(["attach", "--offset", "4", &id]);
    assert_eq!((rest.code, rest.stdout.as_str()), (Some(4), "two\n"), "{rest:?}");
    let late = fleet.run(["exec", &id, "--", "true"]);
    late.assert_error("wrong-state", 1);
    assert!(late.stderr.contains("has ended (returned 4)"), "{late:?}");
}

/// Idle timeouts: kept, and extended.
fn idle(fleet: &Fleet) {
    let run = |idle: &str| {
        let ran =
            fleet.run(["run", "-d", "--image", "shell", "--idle", idle, "--", "sleep", "1000"]);
        ran.assert_done().trim().to_owned()
    };
    let (short, long) = (run("1500ms"), run("1500ms"));
    let _ = fleet.run(["extend", "--idle", "1h", &long]).assert_done();
    let waited = fleet.run(["wait", &short, "-o", "json"]);
    let waited: serde_json::Value = serde_json::from_str(waited.assert_done()).unwrap();
    assert_eq!(waited[0]["why"], "idle", "{waited}");
    let inspected = fleet.run(["inspect", &long, "-o", "json"]);
    assert!(inspected.assert_done().contains("running"), "{inspected:?}");
    let _ = fleet.run(["kill", &long]).assert_done();
}

fn files(fleet: &Fleet) {
    let ran = fleet.run(["run", "-d", "--image", "shell", "--", "sleep", "1000"]);
    let id = ran.assert_done().trim().to_owned();
    let scratch = tempfile::tempdir().unwrap();
    let local = scratch.path().join("in");
    fs::create_dir(&local).unwrap();
    fs::write(local.join("a"), "first\n").unwrap();
    fs::write(local.join("b"), vec![7u8; 600_000]).unwrap();
    std::os::unix::fs::symlink("a", local.join("link")).unwrap();
    std::os::unix::fs::symlink(".", local.join("loop")).unwrap();
    let inside = format!("{id}:/tmp/copy");
    let _ = fleet.run(["cp", local.to_str().unwrap(), &inside]).assert_done();
    let ran = fleet.run(["exec", &id, "--", "cat", "/tmp/copy/a"]);
    assert_eq!(ran.assert_done(), "first\n");
    let back = scratch.path().join("out");
    let _ = fleet.run(["cp", &inside, back.to_str().unwrap()]).assert_done();
    assert_eq!(fs::read(back.join("b")).unwrap(), vec![7u8; 600_000]);
    assert_eq!(fs::read(back.join("link")).unwrap(), b"first\n", "a link to a file as that file");
    assert!(!back.join("loop").exists(), "a link to a directory is passed over");
    let none = fleet.run(["cp", &format!("{id}:/none"), "."]);
    none.assert_error("not-found", 3);
    assert!(none.stderr.contains("/none: No such file"), "{none:?}");
    fleet.run(["cp", &format!("{id}:/dev/zero"), "."]).assert_error("bad-request", 2);
    let mut piped = fleet.command(["cp", "-", &format!("{id}:/tmp/piped")]);
    let mut piped = piped.stdin(Stdio::piped()).spawn().unwrap();
    piped.stdin.take().unwrap().write_all(b"through a pipe\n").unwrap();
    assert!(piped.wait().unwrap().success());
    let ran = fleet.run(["cp", &format!("{id}:/tmp/piped"), "-"]);
    assert_eq!(ran.assert_done(), "through a pipe\n");
    // What is watched and then removed ends the watch: it prints what happened in between.
    let mut watch = fleet.command(["watch", &inside]);
    let mut watch = watch.stdout(Stdio::piped()).spawn().unwrap();
    let mut said = std::io::BufReader::new(watch.stdout.take().unwrap());
    let mut line = String::new();
    // Until the watch stands, nobody hears of files; so one is made until one is heard of.
    let heard = std::thread::scope(|scope| {
        let reader = scope.spawn(|| std::io::BufRead::read_line(&mut said, &mut line));
        while !reader.is_finished() {
            let _ = fleet.run(["exec", &id, "--", "sh", "-c", "echo > /tmp/copy/seen"]);
        }
        reader.join().unwrap().unwrap()
    });
    assert!(heard > 0 && line.trim_end().ends_with("seen"), "{line:?}");
    let _ = fleet.run(["exec", &id, "--", "rm", "-r", "/tmp/copy"]).assert_done();
    assert!(watch.wait().unwrap().success());
    let _ = fleet.run(["kill", &id]).assert_done();
}

fn refusals(fleet: &Fleet) {
    let ran = fleet.run(["run", "--image", "none", "--", "true"]);
    ran.assert_error("image-not-found", 3);
    let ran = fleet.run(["run", "--image", "shell", "--", "no-such-program"]);
    ran.assert_error("command-not-found", 3);
    let ran = fleet.run(["run", "--image", "shell", "--user", "nobody-here", "--", "true"]);
    ran.assert_error("user-not-found", 3);

    // Large ones until no host has room: eight fit each host of a dev fleet.
    let large = ["run", "-d", "--image", "shell", "--shape", "large", "-l", "large=1", "--"];
    let mut refused = None;
    for _ in 0..40 {
        let ran = fleet.run([&large[..], &["sleep", "1000"]].concat());
        if ran.code != Some(0) {
            refused = Some(ran);
            break;
        }
    }
    refused.expect("a fleet has an end").assert_error("no-capacity", 5);
    let list = fleet.run(["ls", "--fresh", "-l", "large=1", "-o", "json"]);
    let list: serde_json::Value = serde_json::from_str(list.assert_done()).unwrap();
    let ids = list.as_array().unwrap().iter().map(|row| row["sandbox"].as_str().unwrap());
    let ids: Vec<_> = ids.collect();
    assert_eq!(ids.len(), 16, "{list}");
    let _ = fleet.run([&["kill"][..], &ids].concat()).assert_done();
}

#[test]
fn the_first_command_of_the_readme_ends_by_itself_when_asked() {
    if !can_box() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let mut dev = Command::new(volley());
    dev.args(["dev", "--once", "--burst", "100", "--state"]).arg(scratch.path().join("dev"));
    let ran = Ran::of(&mut dev);
    let said = ran.assert_done();
    assert!(said.contains("hello from pid"), "{ran:?}");
    assert!(said.contains("launches/sec: programs running"), "{ran:?}");
    assert!(said.contains("ceiling"), "{ran:?}");
}
