//! The command line: every command, in one place to read.
//!
//! What a command does is in the file of its group; here is just its name, its help and the way to it.
//! Exit statuses: 0 done, 1 error, 2 usage, 3 not found, 4 not allowed, 5 no capacity, 6 outcome not known;
//! `run`, `exec` and `attach` pass on the status of the command in the sandbox.

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};

use crate::{
    attach, bench, dev, doctor, failure::Failure, files, host, image, init, logs, map, port, role,
    run, sandbox, store, watch,
};

const EXAMPLES: &str = "\
Examples:
  volley dev                                       a fleet on this machine, and a first sandbox
  volley run --image shell -- sh -c 'id; exit 7'   run a command in a new sandbox, exit as it does
  volley run -it --image shell -- sh               a shell in a new sandbox
  volley ls -o json                                your sandboxes, for a program
  volley host drain h-00c0ffee00c0ffee             take a host out of service

Exit status: 0 done, 1 error, 2 usage, 3 not found, 4 not allowed, 5 no capacity, 6 outcome not known;
`run`, `exec` and `attach` exit as the command in the sandbox does.";

/// Launches sandboxes: a million a second over a million hosts, each in the same time.
#[derive(Debug, Parser)]
#[command(name = "volley", version, max_term_width = 110, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Brings up a whole fleet on this machine, launches a first sandbox and a burst, and stays up.
    Dev(dev::Flags),
    /// Makes a fleet: its authority, and identities and settings for its members.
    Init(init::Flags),
    /// Runs the host daemon.
    Hostd(role::HostdFlags),
    /// Runs the capacity service.
    Heartbeatd(role::HeartbeatdFlags),
    /// Runs the placement service.
    Placerd(role::PlacerdFlags),

    /// Runs a command in a new sandbox and exits as it does.
    Run(run::Flags),
    /// Runs another command in a running sandbox and exits as it does.
    Exec(attach::ExecFlags),
    /// Attaches to a process of a sandbox.
    Attach(attach::AttachFlags),
    /// Lists sandboxes.
    Ls(sandbox::ListFlags),
    /// Shows all that is known of a sandbox.
    Inspect(sandbox::InspectFlags),
    /// Prints what a sandbox's command wrote.
    Logs(logs::Flags),
    /// Ends sandboxes, or sends a signal.
    Kill(sandbox::KillFlags),
    /// Waits for sandboxes to end and prints their exit codes.
    Wait(sandbox::WaitFlags),
    /// Freezes sandboxes.
    Pause(sandbox::NamesFlags),
    /// Goes on with paused sandboxes.
    Resume(sandbox::NamesFlags),
    /// Sets new timeouts, counted from now.
    Extend(sandbox::ExtendFlags),
    /// Shows what sandboxes use.
    Stats(sandbox::StatsFlags),
    /// Copies files into and out of a sandbox.
    Cp(files::CopyFlags),
    /// Tells changes of a file or directory of a sandbox as they happen.
    Watch(watch::Flags),
    /// Opens a local port to a port in a sandbox.
    Port(port::Flags),

    /// Prepares images and shows them.
    #[command(subcommand)]
    Image(image::Command),
    /// Shows hosts, and takes them out of service.
    #[command(subcommand)]
    Host(host::Command),
    /// Shows and checks the host map.
    #[command(subcommand)]
    Map(map::Command),
    /// Makes and checks the fleet's database.
    #[command(subcommand)]
    Store(store::Command),
    /// Says what this machine offers, and proves that an object store is one to rely on.
    Doctor(doctor::Flags),
    /// Measures.
    Bench(bench::Flags),
    /// Prints a shell's completion script.
    #[command(after_help = "Example:\n  volley completion bash > /etc/bash_completion.d/volley")]
    Completion {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// Reads the command line and does what it says.
pub(crate) fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    match cli.command.run() {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::from(failure.exit())
        }
    }
}

/// Help and version are answers; the rest is `error[usage]` and a hint.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        return error.print().map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    }
    let text = error.render().to_string();
    let text = text.replacen("error: ", "error[usage]: ", 1);
    let text = text.replace("For more information, try '--help'.", "hint: see --help");
    eprint!("{text}");
    ExitCode::from(2)
}

impl Command {
    fn run(self) -> Result<ExitCode, Failure> {
        let done = |done: Result<(), Failure>| done.map(|()| ExitCode::SUCCESS);
        match self {
            Self::Dev(flags) => done(dev::run(&flags)),
            Self::Init(flags) => done(init::run(&flags)),
            Self::Hostd(flags) => done(role::hostd(flags)),
            Self::Heartbeatd(flags) => done(role::heartbeatd(flags)),
            Self::Placerd(flags) => done(role::placerd(flags)),
            Self::Run(flags) => run::run(&flags),
            Self::Exec(flags) => attach::exec(flags),
            Self::Attach(flags) => attach::attach(&flags),
            Self::Ls(flags) => done(sandbox::list(&flags)),
            Self::Inspect(flags) => done(sandbox::inspect(&flags)),
            Self::Logs(flags) => done(logs::run(&flags)),
            Self::Kill(flags) => done(sandbox::kill(&flags)),
            Self::Wait(flags) => done(sandbox::wait(&flags)),
            Self::Pause(flags) => done(sandbox::pause(&flags)),
            Self::Resume(flags) => done(sandbox::resume(&flags)),
            Self::Extend(flags) => done(sandbox::extend(&flags)),
            Self::Stats(flags) => done(sandbox::stats(&flags)),
            Self::Cp(flags) => done(files::copy(&flags)),
            Self::Watch(flags) => done(watch::run(&flags)),
            Self::Port(flags) => done(port::run(&flags)),
            Self::Image(command) => done(image::run(command)),
            Self::Host(command) => done(host::run(command)),
            Self::Map(command) => done(map::run(command)),
            Self::Store(command) => done(store::run(command)),
            Self::Doctor(flags) => done(doctor::run(&flags)),
            Self::Bench(flags) => bench::run(&flags),
            Self::Completion { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Cli::command(), "volley", &mut script);
                done(crate::show::print(String::from_utf8_lossy(&script).trim_end()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_and_flag_has_help() {
        fn check(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{}: no help", command.get_name());
            for arg in command.get_arguments() {
                assert!(
                    arg.get_help().is_some(),
                    "{} {}: no help",
                    command.get_name(),
                    arg.get_id()
                );
            }
            command.get_subcommands().filter(|sub| sub.get_name() != "help").for_each(check);
        }
        let mut cli = Cli::command();
        cli.build();
        check(&cli);
    }
}
