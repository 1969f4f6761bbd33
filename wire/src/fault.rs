//! Faults: what went wrong, in a form that crosses the wire and ends before a person.
//!
//! A [`Code`] exists because somebody acts on it: a placer retries elsewhere, a client gives up, a script reads the
//! exit status. Each carries what a person may do; the message says what happened and what state things are in.

use alloc::string::String;
use core::fmt;

use rkyv::{Archive, Deserialize, Serialize};

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $number:literal, $name:literal, $exit:literal, $hint:literal;)*) => {
        /// Why something was not done. Numbers are for ever; new ones are added at the end.
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Archive, Serialize, Deserialize,
        )]
        #[rkyv(derive(Clone, Copy, Debug))]
        #[repr(u16)]
        pub enum Code {
            $($(#[$doc])* $variant = $number,)*
        }

        impl Code {
            /// All codes.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name that programs match on.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// Exit status of a command that ends with it: 1 error, 2 usage, 3 not found, 4 auth,
            /// 5 no capacity, 6 unknown outcome.
            #[must_use]
            pub const fn exit(self) -> u8 {
                match self { $(Self::$variant => $exit,)* }
            }

            /// What to do.
            #[must_use]
            pub const fn hint(self) -> &'static str {
                match self { $(Self::$variant => $hint,)* }
            }
        }
    };
}

codes! {
    /// The platform is at fault.
    Internal = 1, "internal", 1, "this is a bug: report it with the log of the role that said it";
    /// The request breaks a rule of the protocol.
    BadRequest = 2, "bad-request", 2, "correct the request";
    /// No such image.
    ImageNotFound = 3, "image-not-found", 3, "see `volley image ls`, or prepare it with `volley image prepare`";
    /// An image whose stored bytes are wrong or unreadable.
    ImageBroken = 4, "image-broken", 1, "prepare the image again; `volley image inspect` shows what is wrong";
    /// An image for another processor.
    ImageArchitecture = 5, "image-architecture", 1, "prepare the image for the architecture of the hosts";
    /// The command is not in the image.
    CommandNotFound = 6, "command-not-found", 3, "check the command's path and PATH in the image";
    /// The command cannot be executed.
    CommandNotExecutable = 7, "command-not-executable", 1, "check the file's mode, its interpreter and its architecture";
    /// The user is not in the image.
    UserNotFound = 8, "user-not-found", 3, "use a user of the image's /etc/passwd, or uid:gid";
    /// The host could not make a box.
    BoxFailed = 9, "box-failed", 1, "see the log of hostd; other hosts may do better";
    /// No host had room.
    NoCapacity = 10, "no-capacity", 5, "add hosts, wait, or ask for a smaller shape";
    /// The fleet has no hosts.
    NoHosts = 11, "no-hosts", 5, "start a hostd; it joins with its first heartbeat (`volley host ls`)";
    /// Launches fail on most hosts that were tried.
    FleetFailing = 12, "fleet-failing", 1, "hosts accept and then fail: look at a hostd's log before adding hosts";
    /// The time for it ran out and nothing was started.
    BudgetSpent = 13, "budget-spent", 1, "give it more time with --budget, or look for slow hosts";
    /// It may have happened or not.
    Unknown = 14, "unknown-outcome", 6, "send the same launch id again: it is started at most once";
    /// The same id with another body.
    Conflict = 15, "conflict", 1, "use a new launch id for a new launch";
    /// It was cancelled.
    Cancelled = 16, "cancelled", 1, "launch again under a new id";
    /// No such sandbox.
    SandboxNotFound = 17, "sandbox-not-found", 3, "it has ended and been forgotten, or never was: see `volley ls`";
    /// The sandbox is not in a state for this.
    WrongState = 18, "wrong-state", 1, "see the sandbox's state with `volley ls`";
    /// The host that holds it does not answer.
    HostUnreachable = 19, "host-unreachable", 1, "see `volley host inspect`; its sandboxes go on and keep their deadlines";
    /// No such host.
    HostNotFound = 20, "host-not-found", 3, "see `volley host ls`";
    /// The certificate is of another fleet, expired, or of the wrong role.
    Unauthenticated = 21, "unauthenticated", 4, "use a certificate of this fleet that is valid now: see `volley init`";
    /// The certificate does not allow it.
    Forbidden = 22, "forbidden", 4, "ask with the tenant or operator that may do this";
    /// Not reached at all.
    Unreachable = 23, "unreachable", 1, "check the address, and that the role runs there";
    /// Too much at once.
    Overloaded = 24, "overloaded", 5, "slow down and try again; nothing was started";
    /// The database or the object store did not serve.
    Storage = 25, "storage", 1, "check the store with `volley store check` or `volley doctor objects`";
    /// Not there: a file, a directory, a process of a sandbox.
    NotFound = 26, "not-found", 3, "check the name";
    /// This build or host does not offer it.
    Unsupported = 27, "unsupported", 1, "see the limits in the README";
    /// A host that takes no new work.
    Draining = 28, "draining", 5, "launch without naming the host, or `volley host resume` it";
    /// A setting is wrong.
    Config = 29, "config", 2, "correct the setting";
    /// A file or a port is another process's.
    Busy = 30, "busy", 1, "stop the other process, or choose another path or port";
    /// The kernel or the user's rights do not allow it.
    Privilege = 31, "privilege", 1, "run as root, or use --boxes none";
    /// A clock is too far off for certificates to be judged.
    Clock = 32, "clock", 4, "set the clock (NTP), then try again";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What went wrong, for a person and for a program.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Fault {
    /// The class, which decides what a caller does.
    pub code: Code,
    /// What happened, and what state things are in now. Lower case, no full stop.
    pub message: String,
}

impl Fault {
    /// A fault with its message.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl core::error::Error for Fault {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_distinct_and_exits_are_known() {
        for (at, code) in Code::ALL.iter().enumerate() {
            assert!((1..=6).contains(&code.exit()));
            assert!(!code.hint().is_empty());
            for other in &Code::ALL[at + 1..] {
                assert!(code.name() != other.name() && *code as u16 != *other as u16);
            }
        }
    }
}
