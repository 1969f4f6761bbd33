//! How a command ends when it does not do what it was asked.
//!
//! One shape for everything: `error[code]: what happened`, then `hint: what to do`, and an exit status that a script
//! can act on. A [`Fault`] of the platform keeps its code; the front adds a better hint where it knows one.
//! Left out: the exit code of a sandbox's own command, which is no failure of ours (see `run`).

use std::{fmt, io};

use wire::{Code, Fault};

/// What went wrong, and what to do.
#[derive(Debug)]
pub(crate) struct Failure {
    fault: Fault,
    hint: Option<String>,
}

impl Failure {
    /// A failure with the usual hint of its code.
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { fault: Fault::new(code, message), hint: None }
    }

    /// A file or directory that could not be used.
    pub(crate) fn io(what: impl fmt::Display, error: &io::Error) -> Self {
        let code = match error.kind() {
            io::ErrorKind::NotFound => Code::NotFound,
            io::ErrorKind::PermissionDenied => Code::Privilege,
            io::ErrorKind::AddrInUse => Code::Busy,
            _ => Code::Internal,
        };
        let failure = Self::new(code, format!("{what}: {error}"));
        if code == Code::Privilege {
            return failure.hint("check the file's owner and mode, or run as its owner");
        }
        if error.kind() == io::ErrorKind::AddrNotAvailable {
            return failure.hint("give an address of this machine");
        }
        if code == Code::Internal {
            return failure.hint("check the path, the file system and its free space");
        }
        failure
    }

    /// The same failure with a hint that fits better than its code's.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// What happened, without code and hint.
    pub(crate) fn message(&self) -> String {
        self.fault.message.clone()
    }

    /// What the caller may act on.
    pub(crate) fn code(&self) -> Code {
        self.fault.code
    }

    /// Exit status of the command.
    pub(crate) fn exit(&self) -> u8 {
        self.fault.code.exit()
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self { fault, hint: None }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hint = self.hint.as_deref().unwrap_or_else(|| self.fault.code.hint());
        write!(f, "error[{}]: {}\nhint: {hint}", self.fault.code, self.fault.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_says_code_message_and_hint() {
        let failure = Failure::new(Code::NoHosts, "the map is empty");
        let hint = Code::NoHosts.hint();
        assert_eq!(failure.to_string(), format!("error[no-hosts]: the map is empty\nhint: {hint}"));
        assert_eq!(failure.exit(), 5);
        assert!(failure.hint("wait").to_string().ends_with("hint: wait"));
    }
}
