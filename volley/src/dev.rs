//! `volley dev`: a whole fleet on this machine, from nothing to launches a second.
//!
//! The roles are the ones of a real fleet, as child processes on loopback addresses, with certificates, heartbeats and
//! a published map; what is small is just their number. It prepares an image from the machine's own shell, launches a
//! first sandbox, fires a burst, says what to type next, and stays up until Ctrl-C, which leaves no process, mount or
//! cgroup behind. Left out: high availability; one of each role but hostd.

pub(crate) mod child;
pub(crate) mod fleet;
mod shell;

use std::{
    io::IsTerminal as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use bench::launch::{Claim, Load, Report};
use clap::Args;
use hostd_image::{PrepareSpec, RegistryAccess, Source};
use tokio_util::sync::CancellationToken;
use volley_client::{Code, LaunchSpec};

use self::{
    child::Role,
    fleet::{Boxes, Fleet, Wanted},
};
use crate::{
    client::{Session, dev_state},
    failure::Failure,
    image, role,
    show::print,
};

/// Name of the image that is made here.
pub(crate) const IMAGE: &str = "shell";

/// What the first sandbox shows.
const FIRST: &str = "echo \"hello from pid $$ of a sandbox\"; id; uname -sr; ls /";

/// Time for all hosts to be known and launchable.
const FLEET_READY_MAX: Duration = Duration::from_secs(15);

/// Launches a host before the burst, so that hardly any host stays cold.
const WARM_UP_EACH: u16 = 8;

/// Time that a launch may take here: the machine may be busy with other things, and a host's first mount waits for it.
const PATIENCE: Duration = Duration::from_secs(30);

/// Time for which a ceiling is measured.
const CEILING: Duration = Duration::from_millis(500);

/// Time that a burst may take.
const BURST_MAX: Duration = Duration::from_secs(60);

/// Flags of `volley dev`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  volley dev                          three hosts with real sandboxes (needs root)
  volley dev --boxes none             without root: launches are admitted and counted, nothing runs
  volley dev --once --burst 500       for a script: ends after the burst
  volley dev --store scylla://127.0.0.1:9042/volley --objects s3://volley?endpoint=http://127.0.0.1:9000")]
pub(crate) struct Flags {
    /// Hosts, each a process on its own loopback address.
    #[arg(long, value_name = "COUNT", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=64))]
    hosts: u16,
    /// Whether sandboxes are real.
    #[arg(long, value_enum, default_value_t, value_name = "KIND")]
    boxes: Boxes,
    /// Launches of the burst; 0 for none.
    #[arg(long, value_name = "COUNT", default_value_t = 2_000)]
    burst: u32,
    /// End after the burst instead of staying up.
    #[arg(long)]
    once: bool,
    /// Directory of the fleet; default: ~/.local/state/volley/dev.
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Database; default: an embedded one in the state directory.
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    /// Object store; default: a directory in the state directory.
    #[arg(long, value_name = "URL")]
    objects: Option<String>,
    /// First of the 50 ports that are used; default: the first that are free from 7500 on.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1024..=65_400))]
    port: Option<u16>,
}

/// `volley dev`.
pub(crate) fn run(flags: &Flags) -> Result<(), Failure> {
    if flags.boxes == Boxes::Real {
        need_root()?;
    }
    let state = flags.state.clone().or_else(dev_state).ok_or_else(|| {
        Failure::new(Code::Config, "no home directory to keep the fleet in")
            .hint("give --state DIR")
    })?;
    let stop = CancellationToken::new();
    role::stop_on_signal(stop.clone())?;
    let wanted = Wanted {
        hosts: flags.hosts,
        packed: false,
        boxes: flags.boxes,
        store: flags.store.clone(),
        objects: flags.objects.clone(),
        port: flags.port,
    };
    if let Some(store) = flags.store.as_deref().filter(|store| store.starts_with("scylla://")) {
        // One copy of each row: for trying it out, and right for a database of one node.
        let made = role::runtime()?.block_on(heartbeat::store::init(store, 1));
        made.map_err(wire::Fault::from)?;
    }
    let fleet = Fleet::lay_out(&wanted, &state)?;
    let outcome = live(flags, &fleet, &stop);
    fleet.put_away();
    outcome
}

/// Real sandboxes are made of namespaces, mounts and cgroups.
pub(crate) fn need_root() -> Result<(), Failure> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Failure::new(Code::Privilege, "real sandboxes need root")
        .hint("run it as root, or without sandboxes: --boxes none"))
}

/// The fleet's life: its processes end when this returns, however it does.
fn live(flags: &Flags, fleet: &Fleet, stop: &CancellationToken) -> Result<(), Failure> {
    let begun = Instant::now();
    let mut roles = start(fleet)?;
    let running = up(flags, fleet, &mut roles, begun, stop);
    let running = match running {
        // Whoever stops it before it is up knows that.
        Err(_) if stop.is_cancelled() => Ok(()),
        other => other,
    };
    if running.is_ok() {
        print("stopping")?;
    }
    put_down(&mut roles);
    running
}

/// From started processes to the wish to stop.
fn up(
    flags: &Flags,
    fleet: &Fleet,
    roles: &mut [Role],
    begun: Instant,
    stop: &CancellationToken,
) -> Result<(), Failure> {
    let session = Session::over(&fleet.client, false)?;
    let operator = Session::over(&fleet.client, true)?;
    await_hosts(&operator, flags.hosts, roles, stop)?;
    print(&format!(
        "fleet up in {:.1} s: {} hosts, 1 heartbeatd, 1 placerd ({})",
        begun.elapsed().as_secs_f64(),
        flags.hosts,
        roles
            .iter()
            .map(|role| format!("{} {}", role.name(), role.pid()))
            .collect::<Vec<_>>()
            .join(", ")
    ))?;
    if flags.boxes == Boxes::Real {
        let begun = Instant::now();
        let programs = prepare(fleet)?;
        print(&format!(
            "image `{IMAGE}`: sh and {} programs of this machine, prepared in {:.1} s",
            programs.saturating_sub(1),
            begun.elapsed().as_secs_f64()
        ))?;
    }
    first(&session, flags, stop)?;
    if flags.burst > 0 {
        warm_up(&session, flags, stop)?;
        fire(flags, fleet, roles, stop)?;
    }
    drop((session, operator));
    if flags.once {
        return Ok(());
    }
    print(&next_commands(flags, fleet))?;
    stay(roles, stop)
}

/// Starts the roles together and waits until all are ready.
pub(crate) fn start(fleet: &Fleet) -> Result<Vec<Role>, Failure> {
    let mut roles = Vec::with_capacity(fleet.roles.len());
    for file in &fleet.roles {
        let log = fleet.state.join("log").join(format!("{}.log", file.name));
        roles.push(Role::start(file, &log)?);
    }
    for role in &mut roles {
        role.wait_ready()?;
    }
    Ok(roles)
}

/// Stops all: placers first, so that nothing is sent to hosts that stop.
pub(crate) fn put_down(roles: &mut Vec<Role>) {
    for role in roles.iter().rev() {
        role.ask_to_stop();
    }
    for role in roles.iter_mut().rev() {
        role.wait_stopped();
    }
    roles.clear();
}

fn cancelled() -> Failure {
    Failure::new(Code::Cancelled, "stopped before it was done")
}

/// Waits until the capacity service knows every host as alive.
pub(crate) fn await_hosts(
    operator: &Session,
    hosts: u16,
    roles: &mut [Role],
    stop: &CancellationToken,
) -> Result<(), Failure> {
    let deadline = Instant::now() + FLEET_READY_MAX;
    loop {
        let known = operator.block(operator.client().hosts());
        let alive = known
            .as_ref()
            .map_or(0, |known| known.iter().filter(|host| host.state == "alive").count());
        if alive >= usize::from(hosts) {
            return Ok(());
        }
        tend(roles, stop)?;
        if Instant::now() > deadline {
            let seconds = FLEET_READY_MAX.as_secs();
            let what = match known {
                Ok(_) => format!("{alive} of {hosts} hosts are known after {seconds} s"),
                Err(error) => format!("the hosts cannot be listed after {seconds} s: {error}"),
            };
            return Err(Failure::new(Code::NoHosts, what)
                .hint("see the logs in the state directory's `log`"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What is done while something else is waited for: roles that ended are started again.
fn tend(roles: &mut [Role], stop: &CancellationToken) -> Result<(), Failure> {
    if stop.is_cancelled() {
        return Err(cancelled());
    }
    roles.iter_mut().try_for_each(Role::keep_running)
}

/// Prepares the machine's own shell as an image; says how many programs it has.
pub(crate) fn prepare(fleet: &Fleet) -> Result<usize, Failure> {
    let root = fleet.state.join("shell");
    if root.exists() {
        std::fs::remove_dir_all(&root).map_err(|error| Failure::io(root.display(), &error))?;
    }
    let programs = shell::lay_out(&root)?;
    let spec = PrepareSpec {
        domain: fleet::TENANT.to_owned(),
        name: IMAGE.to_owned(),
        source: Source::RootfsDir(root),
        arch: hostd_image::host_arch().to_owned(),
    };
    let quiet = !std::io::stderr().is_terminal();
    image::prepare_into(fleet.client.objects()?, spec, RegistryAccess::default(), quiet)?;
    Ok(programs.len())
}

fn spec(command: &[&str]) -> LaunchSpec {
    LaunchSpec::new(IMAGE)
        .command(command.iter().copied())
        .lifetime(Duration::from_secs(60))
        .budget(PATIENCE)
}

/// Launches the first sandbox and shows what it says.
fn first(session: &Session, flags: &Flags, stop: &CancellationToken) -> Result<(), Failure> {
    let command = ["sh", "-c", FIRST];
    let shown = async {
        let launched = first_launch(session, &command).await?;
        let (sandbox, begun) = launched;
        if flags.boxes == Boxes::None {
            return print(&format!(
                "launched {} in {:.1} ms (--boxes none: admitted and counted, nothing runs)",
                sandbox.id(),
                begun.as_secs_f64() * 1e3
            ));
        }
        print(&format!(
            "$ volley run --image {IMAGE} -- sh -c '{FIRST}'     # {}, {:.1} ms",
            sandbox.id(),
            begun.as_secs_f64() * 1e3
        ))?;
        let output = sandbox.attach(0).await?.output().await?;
        for text in [&output.stdout, &output.stderr] {
            let text = String::from_utf8_lossy(text);
            for line in text.lines() {
                print(&format!("  {line}"))?;
            }
        }
        Ok(())
    };
    session.block(async {
        tokio::select! {
            done = shown => done,
            () = stop.cancelled() => Err(cancelled()),
        }
    })
}

/// The placer learns of hosts a moment after the aggregator does: "no hosts" and "no capacity" pass.
pub(crate) async fn first_launch(
    session: &Session,
    command: &[&str],
) -> Result<(volley_client::Sandbox, Duration), Failure> {
    let deadline = Instant::now() + FLEET_READY_MAX;
    loop {
        let begun = Instant::now();
        match session.client().launch(spec(command)).await {
            Ok(sandbox) => return Ok((sandbox, begun.elapsed())),
            Err(error)
                if matches!(error.code(), Code::NoHosts | Code::NoCapacity) && begun < deadline => {
            }
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Lets every host mount the image before launches are counted: what a first mount takes is not what a burst is about.
fn warm_up(session: &Session, flags: &Flags, stop: &CancellationToken) -> Result<(), Failure> {
    let launches =
        (0..flags.hosts * WARM_UP_EACH).map(|_| session.client().launch(spec(&["true"])));
    let warm = async {
        // One that finds no room is as good as one that ran.
        let _ = futures::future::join_all(launches).await;
        Ok(())
    };
    session.block(async {
        tokio::select! {
            done = warm => done,
            () = stop.cancelled() => Err(cancelled()),
        }
    })
}

/// Fires the burst and prints its figures, the ceiling of the same run among them.
fn fire(
    flags: &Flags,
    fleet: &Fleet,
    roles: &mut [Role],
    stop: &CancellationToken,
) -> Result<(), Failure> {
    // The ceiling of launches without sandboxes is the transport's; that of real ones is what this machine starts of
    // the same program without any sandbox.
    let (claim, in_flight, ceiling) = match flags.boxes {
        Boxes::Real => (Claim::ProgramsRunning, 32, Duration::ZERO),
        Boxes::None => (Claim::LaunchesAccepted, 256, CEILING),
    };
    let options = bench::launch::Options {
        claim,
        load: Load::Closed { in_flight },
        launches_max: u64::from(flags.burst),
        duration: BURST_MAX,
        warm_up: Duration::ZERO,
        command: vec!["true".to_owned()],
        image: IMAGE.to_owned(),
        lifetime: Duration::from_secs(10),
        budget: PATIENCE,
        hosts: usize::from(flags.hosts),
        ceiling,
        progress: std::io::stderr().is_terminal(),
        ..options(fleet, roles)
    };
    let report = meanwhile(|| tend(roles, stop), move || bench::launch::run(&options))??;
    print(format!("burst of {} launches:\n{report}", flags.burst).trim_end())?;
    if flags.boxes == Boxes::Real {
        let bare = meanwhile(|| tend(roles, stop), bare_starts)??;
        print(&format!(
            "  ceiling    bare fork+exec of true, no sandbox: {bare:.0}/s (we are at {:.0} %)",
            100.0 * report.launches_per_second / bare.max(1.0)
        ))?;
    }
    judge(&report)
}

/// Programs that this machine starts and reaps a second without any sandbox, on all cores.
fn bare_starts() -> Result<f64, Failure> {
    let begun = Instant::now();
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let starts = (0..cores).map(|_| {
        std::thread::spawn(move || {
            let mut count = 0u32;
            while begun.elapsed() < CEILING {
                let mut program = std::process::Command::new("true");
                program.status().map_err(|error| Failure::io("cannot run `true`", &error))?;
                count += 1;
            }
            Ok::<_, Failure>(count)
        })
    });
    let mut all = 0;
    for thread in starts.collect::<Vec<_>>() {
        let ended = thread.join();
        all +=
            ended.map_err(|_| Failure::new(Code::Internal, "the ceiling ended in a panic"))??;
    }
    Ok(f64::from(all) / begun.elapsed().as_secs_f64())
}

/// What every bench of a fleet of ours says of it.
pub(crate) fn options(fleet: &Fleet, roles: &[Role]) -> bench::launch::Options {
    bench::launch::Options {
        placers: fleet.client.placers.clone(),
        identity: fleet.client.identity.clone(),
        tenant: fleet.client.tenant.clone(),
        pids: roles.iter().map(Role::metered).collect(),
        placer_ops: Some(fleet.placer_ops),
        ..bench::launch::Options::default()
    }
}

/// A burst has no failures on a healthy machine.
fn judge(report: &Report) -> Result<(), Failure> {
    let achieved = &report.achieved;
    let lost = achieved.failed + achieved.unknown;
    if lost == 0 {
        return Ok(());
    }
    let first = report.first_fault.as_deref().unwrap_or("no reason was kept");
    let what = format!(
        "{} launches failed and {} stayed unknown: {first}",
        achieved.failed, achieved.unknown
    );
    Err(Failure::new(Code::FleetFailing, what).hint("see the logs in the state directory's `log`"))
}

/// Runs something that blocks on a thread, and tends to other things until it is done; an error there leaves it.
pub(crate) fn meanwhile<T: Send + 'static>(
    mut tend: impl FnMut() -> Result<(), Failure>,
    task: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failure> {
    let task = std::thread::spawn(task);
    while !task.is_finished() {
        tend()?;
        std::thread::sleep(Duration::from_millis(10));
    }
    task.join().map_err(|_| Failure::new(Code::Internal, "the bench ended in a panic"))
}

fn next_commands(flags: &Flags, fleet: &Fleet) -> String {
    let exe = std::env::current_exe().unwrap_or_else(|_| "volley".into());
    let volley = exe.display();
    let client = match &flags.state {
        None => String::new(),
        Some(_) => format!("export VOLLEY_CLIENT={}\n  ", fleet.client_path.display()),
    };
    // Hosts without boxes say nothing of launches beside their heartbeats: they are asked.
    let (shell, fresh) = match flags.boxes {
        Boxes::Real => (format!("{volley} run -it --image {IMAGE} -- sh\n  "), ""),
        Boxes::None => (String::new(), " --fresh"),
    };
    format!(
        "\nthe fleet stays up; in another terminal:\n  {client}{shell}\
         {volley} run --image {IMAGE} -- sh -c 'id; exit 7'\n  \
         {volley} ls --all{fresh}\n  \
         {volley} host ls\n  \
         {volley} --help\nlogs are in {}; Ctrl-C stops it",
        fleet.state.join("log").display()
    )
}

/// Stays up until it is told to stop, or a role ends by itself.
fn stay(roles: &mut [Role], stop: &CancellationToken) -> Result<(), Failure> {
    while !stop.is_cancelled() {
        tend(roles, stop)?;
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
