//! Boxes on the real kernel: what a program sees, how it ends, what it can be asked, what is left.
//!
//! Longer than 500 lines: a test a line of the promise, all on one set-up.

#![allow(clippy::unwrap_used, reason = "tests; clippy does not see that without the usual harness")]

mod house;

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;

use hostd_sandbox::{
    ClaimError, Event, Fault, FileAnswer, FileKind, FileOp, Limits, Program, Refusal, TtySize,
};

use house::{Place, place, read_all, run, wait};

fn main() {
    hostd_sandbox::main_if_asked();
    if std::env::args().nth(1).as_deref() == Some("__echo") {
        return echo_server();
    }
    run(&[
        ("a_shell_runs_in_its_own_world", a_shell_runs_in_its_own_world),
        ("starts_that_cannot_be_fail_by_kind", starts_that_cannot_be_fail_by_kind),
        ("users_and_directories", users_and_directories),
        ("the_image_stays_as_it_was", the_image_stays_as_it_was),
        ("layers_and_data_only_layers", layers_and_data_only_layers),
        ("an_erofs_layer", an_erofs_layer),
        ("signals_and_kill", signals_and_kill),
        ("memory_limit", memory_limit),
        ("pids_limit", pids_limit),
        ("disk_and_inode_limits", disk_and_inode_limits),
        ("stdin_until_closed", stdin_until_closed),
        ("exec_in_a_running_box", exec_in_a_running_box),
        ("a_terminal", a_terminal),
        ("file_operations", file_operations),
        ("a_watched_directory", a_watched_directory),
        ("a_port_of_the_box", a_port_of_the_box),
        ("pause_and_resume", pause_and_resume),
        ("ids_and_pools", ids_and_pools),
        ("shapes_change_under_running_boxes", shapes_change_under_running_boxes),
        ("steps_are_in_order", steps_are_in_order),
        ("a_launch_leaves_no_favour", a_launch_leaves_no_favour),
    ]);
}

fn a_shell_runs_in_its_own_world() {
    let mut place = place(2);
    let line = "id -u; id -g; id -G; cat /proc/1/comm; hostname; pwd; umask; echo $HOME; echo $PATH; \
                ls /proc/$$/fd; ls /proc | grep -c '^[0-9]'; ls -A /sys; exit 7";
    let (out, err, exited) = place.shell(line);
    let wanted = "0\n0\n0\ninit\nsandbox\n/\n0022\n/root\n\
                  /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n0\n1\n2\n4\nfs\n";
    // Processes: init, sh, and the two of the pipe.
    assert_eq!((out.as_str(), err.as_str()), (wanted, ""));
    assert_eq!(exited.status.code, Some(7));
    assert!(exited.stats.cpu_ns > 0 && exited.stats.memory_peak_bytes > 0, "{exited:?}");
    let (out, ..) = place.shell("cat /proc/self/status | grep -E '^(NoNewPrivs|Seccomp|CapBnd):'");
    assert_eq!(out, "CapBnd:\t00000000800404fb\nNoNewPrivs:\t1\nSeccomp:\t2\n");
    let (out, ..) = place.shell("stat -c '%n %u %t:%T %a' /dev/* | tr '\\n' ';'; ls /dev/shm");
    for device in ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/ptmx", "/dev/stdout"] {
        assert!(out.contains(device), "{device} is missing: {out}");
    }
    let (out, ..) = place.shell("echo x > /dev/null && echo y > /dev/shm/f && cat /dev/shm/f");
    assert_eq!(out, "y\n");
    let (out, ..) = place.shell("cat /proc/net/dev | tr -d ' ' | grep -o '^[a-z0-9]*:'");
    assert_eq!(out, "lo:\n");
    let (out, ..) = place.shell("cat /sys/fs/cgroup/memory/memory.limit_in_bytes");
    let v1 = Path::new("/sys/fs/cgroup/memory/tasks").exists();
    assert!(!v1 || out == format!("{}\n", 96 << 20), "{out}");
    let (out, ..) = place.shell("cat /etc/hosts; cat /proc/1/cmdline | tr '\\0' ' '");
    assert_eq!(out, "127.0.0.1\tlocalhost sandbox\n::1\tlocalhost\nvolley __spawner ");
}

fn fault(place: &mut Place, program: Program) -> Fault {
    match place.claim(program) {
        Err(ClaimError::Failed(fault)) => fault,
        other => panic!("not a failure: {other:?}"),
    }
}

fn starts_that_cannot_be_fail_by_kind() {
    let mut place = place(2);
    fs::write(place.root.join("etc/text"), "no program").unwrap();
    fs::write(place.root.join("bin/garbage"), [0xfe_u8; 64]).unwrap();
    house::set_mode(&place.root.join("bin/garbage"), 0o755);
    fs::write(place.root.join("bin/script"), "#!/no/such/interpreter\n").unwrap();
    house::set_mode(&place.root.join("bin/script"), 0o755);
    let named = |p: &str| p.to_owned();
    let missing = Fault::NotFound { program: named("nothing") };
    assert_eq!(fault(&mut place, Program::new(["nothing"])), missing);
    let script = Fault::NotFound { program: named("script") };
    assert_eq!(fault(&mut place, Program::new(["script"])), script);
    let text = Fault::NotExecutable { program: named("/etc/text") };
    assert_eq!(fault(&mut place, Program::new(["/etc/text"])), text);
    let garbage = Fault::BadFormat { program: named("garbage") };
    assert_eq!(fault(&mut place, Program::new(["garbage"])), garbage);
    let user = Program { user: "nobody-here".into(), ..Program::new(["true"]) };
    assert_eq!(fault(&mut place, user), Fault::NoSuchUser { user: named("nobody-here") });
    let cwd = Program { cwd: "etc".into(), ..Program::new(["true"]) };
    assert_eq!(fault(&mut place, cwd).errno(), Some(libc::EINVAL));
    assert!(matches!(fault(&mut place, Program::new([""])), Fault::NotFound { .. }));
    let mut spec = place.spec(Program::new(["true"]));
    spec.shape = "giant".into();
    let refused = wait(place.spawner.claim(spec)).unwrap_err();
    assert_eq!(refused, Refusal::NoShape { shape: "giant".into() }.into());
    let long = Program::new(["true".to_owned(), "x".repeat(300_000)]);
    let refused = place.claim(long).unwrap_err();
    assert!(matches!(refused, ClaimError::Refused(Refusal::TooLarge { .. })), "{refused:?}");
    // And after all of that a box still starts.
    assert_eq!(place.shell("exit 0").2.status.code, Some(0));
}

fn users_and_directories() {
    let mut place = place(2);
    let line =
        "id -u; id -G; pwd; echo $HOME; echo out > /dev/stdout; touch /bin/x 2>/dev/null; echo $?";
    let program =
        Program { user: "web".into(), cwd: "/home".into(), ..Program::new(["sh", "-c", line]) };
    let running = place.claim(program).unwrap();
    let (out, err, _) = place.finish(running);
    assert_eq!((out.as_str(), err.as_str()), ("33\n33 40\n/home\n/home\nout\n1\n", ""));
    let program = Program {
        user: "1000:1001".into(),
        cwd: "/made/for/it".into(),
        env: vec!["A=b".into(), "HOME=/x".into()],
        ..Program::new([
            "sh",
            "-c",
            "id -u; id -g; pwd; echo $A $HOME; grep CapEff /proc/self/status",
        ])
    };
    let running = place.claim(program).unwrap();
    let (out, ..) = place.finish(running);
    assert_eq!(out, "1000\n1001\n/made/for/it\nb /x\nCapEff:\t0000000000000000\n");
}

fn the_image_stays_as_it_was() {
    let mut place = place(2);
    let line = "stat -c '%u %a' / /bin/sh /root /tmp; rm /bin/true; echo z > /etc/new; \
                chown 5 /etc/passwd; stat -c %u /etc/passwd; ls /etc | tr '\\n' ' '";
    let (out, err, _) = place.shell(line);
    let wanted = "0 755\n0 755\n0 700\n0 1777\n5\ngroup hosts new passwd ";
    assert_eq!((out.as_str(), err.as_str()), (wanted, ""));
    use std::os::unix::fs::MetadataExt;
    assert!(place.root.join("bin/true").exists() && !place.root.join("etc/new").exists());
    assert_eq!(fs::metadata(place.root.join("etc/passwd")).unwrap().uid(), 0);
    assert!(!place.root.join("proc").exists(), "mount points are the box's own");
}

/// A root as hostd-image makes it: a layer of metadata whose files point into a layer of objects.
fn layers_and_data_only_layers() {
    let mut place = place(2);
    let dir = tempfile::tempdir().unwrap();
    let (meta, objects) = (dir.path().join("meta"), dir.path().join("objects"));
    for path in [meta.join("etc"), objects.join("ab")] {
        fs::create_dir_all(path).unwrap();
    }
    house::set_mode(&meta, 0o755);
    fs::write(objects.join("ab/object"), "from the object\n").unwrap();
    fs::write(meta.join("etc/far"), "").unwrap();
    fs::write(meta.join("etc/passwd"), "above").unwrap();
    let file = fs::OpenOptions::new().write(true).open(meta.join("etc/far")).unwrap();
    file.set_len(16).unwrap();
    let set = |name: &str, value: &[u8]| {
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(meta.join("etc/far"), name, value, flags)
    };
    if let Err(e) = set("trusted.overlay.metacopy", b"") {
        return println!("skipped: no trusted attributes here: {e}");
    }
    set("trusted.overlay.redirect", b"/ab/object").unwrap();
    let line = "cat /etc/far /etc/passwd; stat -c '%u %s' /etc/far; cat /etc/group; echo more >> /etc/far; cat /etc/far";
    let mut spec = place.spec(Program::new(["sh", "-c", line]));
    spec.root = hostd_sandbox::RootSpec::layered(&[meta, place.root.clone()], &[objects]).unwrap();
    let running = wait(place.spawner.claim(spec)).unwrap();
    let (out, err, _) = place.finish(running);
    let wanted = "from the object\nabove0 16\nroot:x:0:\nweb:x:33:\nlog:x:40:web\n\
                  from the object\nmore\n";
    assert_eq!((out.as_str(), err.as_str()), (wanted, ""));
    assert_eq!(
        fs::read_to_string(dir.path().join("objects/ab/object")).unwrap(),
        "from the object\n"
    );
}

/// A layer on EROFS, straight from its file, as lazy images are mounted.
fn an_erofs_layer() {
    let mut place = place(2);
    let dir = tempfile::tempdir().unwrap();
    let (image, at) = (dir.path().join("image"), dir.path().join("at"));
    fs::create_dir(&at).unwrap();
    let made = std::process::Command::new("mkfs.erofs").arg(&image).arg(&place.root).output();
    if !made.is_ok_and(|o| o.status.success()) {
        return println!("skipped: no mkfs.erofs here");
    }
    let flags = rustix::mount::MountFlags::RDONLY;
    if let Err(e) = rustix::mount::mount(&image, &at, "erofs", flags, None) {
        return println!("skipped: no EROFS from a file here: {e}");
    }
    let line = "stat -c %u /etc/passwd; echo more >> /etc/group; wc -l < /etc/group; id -u";
    let mut spec = place.spec(Program::new(["sh", "-c", line]));
    spec.root = hostd_sandbox::RootSpec::layered(&[&at], &[]).unwrap();
    let ran = wait(place.spawner.claim(spec)).map(|running| place.finish(running));
    let unmounted = rustix::mount::unmount(&at, rustix::mount::UnmountFlags::empty());
    let (out, err, _) = ran.unwrap();
    assert_eq!((out.as_str(), err.as_str()), ("0\n4\n0\n", ""));
    // Nothing of the box holds the image's mount once it has ended.
    unmounted.unwrap();
}

fn signals_and_kill() {
    let mut place = place(2);
    let running = place.claim(Program::new(["sleep", "1000"])).unwrap();
    wait(place.spawner.signal(running.id, 0, libc::SIGTERM)).unwrap();
    assert_eq!(place.exited(running.id).status.signal, Some(libc::SIGTERM));
    // Orphans and a program that ignores everything go with the box.
    let line = "trap '' TERM INT HUP; (sleep 1001 &) ; sleep 1002";
    let running = place.claim(Program::new(["sh", "-c", line])).unwrap();
    wait(place.spawner.kill(running.id)).unwrap();
    assert_eq!(place.exited(running.id).status.signal, Some(libc::SIGKILL));
    assert_eq!(read_all(running.stdio.stdout.unwrap()), "");
    let gone = wait(place.spawner.kill(running.id)).unwrap_err();
    assert_eq!(gone, ClaimError::Failed(Fault::NoSandbox));
    assert!(!Path::new(&format!("/proc/{}", running.pid)).exists());
    // From inside, process 1 cannot be killed, and what is orphaned is reaped.
    let line = "kill -9 1; kill -TERM 1; (sh -c 'exit 3' &); \
                until [ $(ps -eo stat | grep -c '^Z') = 0 ]; do :; done; echo reaped";
    let (out, ..) = place.shell(line);
    assert_eq!(out, "reaped\n");
}

fn memory_limit() {
    let mut place = place(2);
    let (_, _, exited) = place.shell("exec tail /dev/zero");
    assert_eq!((exited.status.signal, exited.status.oom), (Some(libc::SIGKILL), true));
    assert!(exited.stats.memory_peak_bytes <= 96 << 20, "{exited:?}");
    // The next box of the slot is not blamed for it.
    for _ in 0..4 {
        assert!(!place.shell("exit 0").2.status.oom);
    }
    // The writable layer is charged to the box too.
    let (_, _, exited) = place.shell("dd if=/dev/zero of=/big bs=1M count=200; exit 0");
    assert!(exited.status.oom, "{exited:?}");
}

fn pids_limit() {
    let mut place = place(2);
    let bomb = "f() { f | f & }; f & exec sleep 1000";
    let running = place.claim(Program::new(["sh", "-c", bomb])).unwrap();
    for _ in 0..50 {
        let stats = wait(place.spawner.stats(running.id)).unwrap();
        assert!(stats.pids <= 48, "{stats:?}");
    }
    assert_eq!(place.shell("echo fine").0, "fine\n");
    wait(place.spawner.kill(running.id)).unwrap();
    assert_eq!(place.exited(running.id).stats.pids, 0);
}

fn disk_and_inode_limits() {
    let mut place = place(2);
    let mut spec = place.spec(Program::new([
        "sh",
        "-c",
        "dd if=/dev/zero of=/big bs=1M count=32 2>&1 | grep -o 'No space.*'; rm /big; \
         i=0; while touch /f$i 2>/dev/null; do i=$((i+1)); done; rm /f*; [ $i -lt 300 ] && echo few; \
         dd if=/dev/zero of=/big bs=1M count=5 2>/dev/null; read x",
    ]));
    spec.program.stdin = true;
    spec.limits = Limits { disk_bytes: 8 << 20, inodes: 256, ..Limits::default() };
    let running = wait(place.spawner.claim(spec)).unwrap();
    let used = || wait(place.spawner.stats(running.id)).unwrap().disk_bytes;
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
    // Until the last file alone is there: hundreds of programs later, on whatever machine.
    while !((5 << 20)..(6 << 20)).contains(&used()) {
        assert!(std::time::Instant::now() < deadline, "{} bytes in use", used());
    }
    rustix::io::write(running.stdio.stdin.as_ref().unwrap(), b"\n").unwrap();
    assert_eq!(place.finish(running).0, "No space left on device\nfew\n");
}

fn stdin_until_closed() {
    let mut place = place(2);
    let program = Program { stdin: true, ..Program::new(["cat"]) };
    let mut running = place.claim(program).unwrap();
    let mut stdin = fs::File::from(running.stdio.stdin.take().unwrap());
    stdin.write_all(b"hello").unwrap();
    wait(place.spawner.close_stdin(running.id)).unwrap();
    drop(stdin);
    assert_eq!(place.finish(running).0, "hello");
}

fn exec_in_a_running_box() {
    let mut place = place(2);
    let main = place.claim(Program::new(["sleep", "1000"])).unwrap();
    let line = "id -u; echo $K; ls /proc/$$/fd; grep Seccomp: /proc/self/status; exit 5";
    let program =
        Program { user: "web".into(), env: vec!["K=v".into()], ..Program::new(["sh", "-c", line]) };
    let done = wait(place.spawner.exec(main.id, program)).unwrap();
    let out = read_all(done.stdio.stdout.unwrap());
    assert_eq!(out, "33\nv\n0\n1\n2\nSeccomp:\t2\n");
    let status = loop {
        match wait(place.events.recv()).unwrap() {
            Event::ExecExited { id, exec, status } if id == main.id => {
                assert_eq!(exec, done.exec);
                break status;
            }
            _ => {}
        }
    };
    assert_eq!(status.code, Some(5));
    let missing = wait(place.spawner.exec(main.id, Program::new(["nothing"]))).unwrap_err();
    assert!(matches!(missing, ClaimError::Failed(Fault::NotFound { .. })), "{missing:?}");
    let sleeper = wait(place.spawner.exec(main.id, Program::new(["sleep", "1001"]))).unwrap();
    wait(place.spawner.signal(main.id, sleeper.exec, libc::SIGINT)).unwrap();
    assert_eq!(read_all(sleeper.stdio.stdout.unwrap()), "");
    // What is open when the main program ends goes with it.
    let other = wait(place.spawner.exec(main.id, Program::new(["sleep", "1002"]))).unwrap();
    wait(place.spawner.signal(main.id, 0, libc::SIGTERM)).unwrap();
    assert_eq!(read_all(other.stdio.stderr.unwrap()), "");
    assert_eq!(place.exited(main.id).status.signal, Some(libc::SIGTERM));
}

fn a_terminal() {
    let mut place = place(2);
    let program = Program {
        tty: Some(TtySize { rows: 31, cols: 97 }),
        user: "web".into(),
        ..Program::new(["sh", "-c", "tty; stty size; read x; echo got $x; stty size; echo $TERM"])
    };
    let mut running = place.claim(program).unwrap();
    assert!(running.stdio.stdout.is_none());
    let pty = running.stdio.pty.take().unwrap();
    let mut file = fs::File::from(pty.try_clone().unwrap());
    let mut seen = String::new();
    while !seen.contains("31 97") {
        let mut bytes = [0; 256];
        let n = file.read(&mut bytes).unwrap();
        seen.push_str(&String::from_utf8_lossy(&bytes[..n]));
    }
    let size = rustix::termios::Winsize { ws_row: 40, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(pty.as_fd(), size).unwrap();
    file.write_all(b"word\n").unwrap();
    seen.push_str(&read_all(pty));
    for wanted in ["/dev/pts/0", "31 97", "got word", "40 120", "xterm"] {
        assert!(seen.contains(wanted), "{wanted} is missing in {seen}");
    }
    place.exited(running.id);
}

fn file_operations() {
    let mut place = place(2);
    let id = place.claim(Program::new(["sleep", "1000"])).unwrap().id;
    let spawner = place.spawner.clone();
    let ask = |op: FileOp| wait(spawner.file(id, op));
    let path = |p: &str| p.to_owned();
    ask(FileOp::MakeDirectory { path: path("/a/b"), mode: 0o750 }).unwrap();
    let write = |append| FileOp::Write { path: path("/a/b/f"), mode: 0o640, append };
    for (append, text) in [(false, "longer text"), (false, "one"), (true, "two")] {
        let Ok(FileAnswer::Open(fd)) = ask(write(append)) else { panic!() };
        fs::File::from(fd).write_all(text.as_bytes()).unwrap();
    }
    let Ok(FileAnswer::Open(fd)) = ask(FileOp::Read { path: path("a/b/f") }) else { panic!() };
    assert_eq!(read_all(fd), "onetwo");
    let Ok(FileAnswer::Stat(stat)) = ask(FileOp::Stat { path: path("/a/b/f") }) else { panic!() };
    assert_eq!((stat.kind, stat.mode, stat.uid, stat.size), (FileKind::File, 0o640, 0, 6));
    ask(FileOp::Rename { from: path("/a/b/f"), to: path("/a/g") }).unwrap();
    let Ok(FileAnswer::List(list)) = ask(FileOp::List { path: path("/a") }) else { panic!() };
    let names: Vec<_> = list.iter().map(|s| (s.name.as_str(), s.kind)).collect();
    assert_eq!(names, [("b", FileKind::Directory), ("g", FileKind::File)]);
    let errno = |op| match ask(op) {
        Err(ClaimError::Failed(fault)) => fault.errno(),
        other => panic!("{other:?}"),
    };
    let not_empty = FileOp::Remove { path: path("/a"), recursive: false };
    assert_eq!(errno(not_empty), Some(libc::ENOTEMPTY));
    ask(FileOp::Remove { path: path("/a"), recursive: true }).unwrap();
    assert_eq!(errno(FileOp::Stat { path: path("/a") }), Some(libc::ENOENT));
    assert_eq!(errno(FileOp::Read { path: path("/etc") }), Some(libc::EISDIR));
    // Never a descriptor that the host could be made to misuse.
    assert_eq!(errno(FileOp::Read { path: path("/dev/zero") }), Some(libc::EINVAL));
    let score = FileOp::Write { path: path("/proc/self/oom_score_adj"), mode: 0, append: true };
    assert!(matches!(errno(score), Some(libc::EPERM | libc::EACCES)));
}

fn a_watched_directory() {
    let mut place = place(2);
    let line =
        "mkdir /w; echo up; read x; echo 1 > /w/a; mv /w/a /w/b; rm /w/b; rm -r /w; sleep 1000";
    let program = Program { stdin: true, ..Program::new(["sh", "-c", line]) };
    let mut running = place.claim(program).unwrap();
    let mut up = [0; 3];
    fs::File::from(running.stdio.stdout.take().unwrap()).read_exact(&mut up).unwrap();
    let watch = FileOp::Watch { path: "/w".into() };
    let Ok(FileAnswer::Open(changes)) = wait(place.spawner.file(running.id, watch)) else {
        panic!()
    };
    let missing = FileOp::Watch { path: "/none".into() };
    let Err(ClaimError::Failed(why)) = wait(place.spawner.file(running.id, missing)) else {
        panic!()
    };
    assert_eq!(why.errno(), Some(libc::ENOENT));
    rustix::io::write(running.stdio.stdin.as_ref().unwrap(), b"\n").unwrap();
    // Ends by itself: what it watched is gone.
    assert_eq!(read_all(changes), "ca\0ma\0fa\0tb\0db\0d\0");
    // One that is no longer read ends too.
    let quiet = place.claim(Program::new(["sleep", "1000"])).unwrap();
    let pids = |wanted: u64| {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while wait(place.spawner.stats(quiet.id)).unwrap().pids != wanted {
            assert!(std::time::Instant::now() < deadline, "not {wanted} processes");
        }
    };
    pids(2);
    let watch = FileOp::Watch { path: "/etc".into() };
    let Ok(FileAnswer::Open(changes)) = wait(place.spawner.file(quiet.id, watch)) else { panic!() };
    pids(3);
    drop(changes);
    pids(2);
}

fn echo_server() {
    let listener = std::net::TcpListener::bind("127.0.0.1:8080").unwrap();
    println!("listening");
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        let mut bytes = [0; 64];
        let n = stream.read(&mut bytes).unwrap();
        stream.write_all(&bytes[..n]).unwrap();
    }
}

fn a_port_of_the_box() {
    let mut place = place(2);
    house::install(&place.root, &std::env::current_exe().unwrap(), "probe");
    let mut running = place.claim(Program::new(["probe", "__echo"])).unwrap();
    let mut out = fs::File::from(running.stdio.stdout.take().unwrap());
    let mut line = [0; 10];
    out.read_exact(&mut line).unwrap();
    let fd = wait(place.spawner.connect(running.id, 8080)).unwrap();
    let mut stream = std::net::TcpStream::from(fd);
    stream.write_all(b"ping").unwrap();
    let mut back = [0; 4];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"ping");
    let closed = wait(place.spawner.connect(running.id, 8081)).unwrap_err();
    let ClaimError::Failed(fault) = closed else { panic!("{closed:?}") };
    assert_eq!(fault.errno(), Some(libc::ECONNREFUSED));
    // The same port of another box is another port.
    let other = place.claim(Program::new(["sleep", "1000"])).unwrap();
    assert!(wait(place.spawner.connect(other.id, 8080)).is_err());
}

fn pause_and_resume() {
    let mut place = place(2);
    let running = place.claim(Program::new(["sh", "-c", "while :; do :; done"])).unwrap();
    let cpu = |place: &Place| wait(place.spawner.stats(running.id)).unwrap().cpu_ns;
    wait(place.spawner.pause(running.id)).unwrap();
    let refused = wait(place.spawner.exec(running.id, Program::new(["true"]))).unwrap_err();
    assert!(matches!(refused, ClaimError::Failed(Fault::WrongState { .. })), "{refused:?}");
    // v1 freezes soon, not at once: wait until two looks agree.
    let mut last = cpu(&place);
    let mut still = 0;
    while still < 20 {
        let now = cpu(&place);
        still = if now == last { still + 1 } else { 0 };
        last = now;
    }
    wait(place.spawner.resume(running.id)).unwrap();
    while cpu(&place) == last {}
    wait(place.spawner.pause(running.id)).unwrap();
    wait(place.spawner.kill(running.id)).unwrap();
    assert_eq!(place.exited(running.id).status.signal, Some(libc::SIGKILL));
}

fn ids_and_pools() {
    let mut place = place(3);
    let spec = place.spec(Program::new(["sleep", "1000"]));
    let id = spec.id;
    wait(place.spawner.claim(spec)).unwrap();
    let mut again = place.spec(Program::new(["true"]));
    again.id = id;
    let refused = wait(place.spawner.claim(again)).unwrap_err();
    assert_eq!(refused, Refusal::Exists.into());
    let (live, exited) = wait(place.spawner.running()).unwrap();
    assert_eq!((live.len(), live[0].id, exited.len()), (1, id, 0));
    loop {
        let pool = wait(place.spawner.pool()).unwrap();
        assert_eq!(pool[0].running, 1);
        if pool[0].parked == 3 {
            break;
        }
    }
}

fn shapes_change_under_running_boxes() {
    let mut place = place(2);
    let main = place.claim(Program::new(["sleep", "1000"])).unwrap();
    let mut large = house::shape(1);
    large.name = "large".into();
    let small = hostd_sandbox::Shape { pids: 16, ..house::shape(1) };
    wait(place.spawner.reshape(vec![small.clone(), large.clone()])).unwrap();
    let mut spec = place.spec(Program::new(["true"]));
    spec.shape = "large".into();
    let ran = wait(place.spawner.claim(spec)).unwrap();
    assert_eq!(place.exited(ran.id).shape, "large");
    // A box parked before the change is not handed out after it.
    let (_, _, exited) = place.shell("for i in $(seq 40); do sleep 100 & done; true");
    assert_ne!(exited.status.code, Some(0), "more than 16 processes");
    // One that is not listed takes no claims; its boxes run on.
    wait(place.spawner.reshape(vec![large])).unwrap();
    let refused = place.claim(Program::new(["true"])).unwrap_err();
    assert_eq!(refused, Refusal::NoShape { shape: "small".into() }.into());
    assert_eq!(wait(place.spawner.pool()).unwrap().len(), 1);
    assert_eq!(wait(place.spawner.running()).unwrap().0[0].id, main.id);
    let bad = hostd_sandbox::Shape { pids: 1, ..small };
    let refused = wait(place.spawner.reshape(vec![bad])).unwrap_err();
    let ClaimError::Failed(fault) = refused else { panic!("{refused:?}") };
    assert_eq!(fault.errno(), Some(libc::EINVAL));
}

fn steps_are_in_order() {
    let mut place = place(2);
    let running = place.claim(Program::new(["true"])).unwrap();
    let s = running.steps;
    let order = [
        s.claim_sent,
        s.received,
        s.box_found,
        s.composed,
        s.woken,
        s.mounted,
        s.pivoted,
        s.confined,
        s.executed,
        s.answered,
    ];
    assert!(order[0] > 0 && order.is_sorted(), "{s:?}");
    place.exited(running.id);
    // The blocking ways work within a runtime too.
    let spec = place.spec(Program::new(["true"]));
    let running = wait(async { place.spawner.claim_blocking(spec) }).unwrap();
    place.exited(running.id);
}

/// What makes a launch fast is the launch's alone: when it is answered the program has no core of its own, no priority,
/// and its group no more weight than its shape says, whatever its limits.
fn a_launch_leaves_no_favour() {
    let mut place = place(2);
    let field = |pid: u32, name: &str| {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix(name)).unwrap();
        line.trim_start_matches(':').trim().to_owned()
    };
    let everywhere = field(place.spawner.pid(), "Cpus_allowed_list");
    for cpu_millis in [None, Some(500), None] {
        let mut spec = place.spec(Program::new(["sleep", "1000"]));
        spec.limits.cpu_millis = cpu_millis;
        let init = wait(place.spawner.claim(spec)).unwrap().pid;
        let children = fs::read_to_string(format!("/proc/{init}/task/{init}/children")).unwrap();
        let program: u32 = children.trim().parse().unwrap();
        for pid in [init, program] {
            assert_eq!(field(pid, "Cpus_allowed_list"), everywhere, "process {pid}");
        }
        let stat = fs::read_to_string(format!("/proc/{program}/stat")).unwrap();
        let after_name: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        // Priority and nice, which are fields 18 and 19 of all.
        assert_eq!(after_name[15..17], ["20", "0"], "{stat}");
        let groups = fs::read_to_string(format!("/proc/{program}/cgroup")).unwrap();
        let root = Path::new(&place.config.cgroup_root);
        let (file, unit) = match groups.lines().find_map(|l| l.split_once(":cpu:")) {
            Some((_, group)) => (root.join("cpu").join(&group[1..]).join("cpu.shares"), 1024),
            None => {
                let group = groups.lines().find_map(|l| l.strip_prefix("0::/")).unwrap();
                (root.join(group).join("cpu.weight"), 100)
            }
        };
        let Ok(weight) = fs::read_to_string(&file) else {
            println!("skipped: cgroups that this test does not know: {groups}");
            return;
        };
        let wanted = u64::from(cpu_millis.unwrap_or(1000)) * unit / 1000;
        assert_eq!(weight.trim(), wanted.to_string(), "{}", file.display());
    }
}
