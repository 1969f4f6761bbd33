//! Why a launch or a call did not do what was asked, sorted by what a caller does next.
//!
//! The outcomes of a launch are kept apart because they lead to different deeds: a launch that was not started may
//! be tried again at once under a new id; one of unknown outcome only under its own.

use wire::{Code, Fault, LaunchId};

/// Why there is no sandbox, or none that is known of.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// Nothing was started, and nothing will be: no room, a wrong request, a failing image.
    #[error("{0}")]
    NotStarted(Fault),
    /// It may run or not. Launch again with the same id ([`crate::LaunchSpec::id`]): it is started at most once.
    #[error("launch {launch_id} may run or not: {fault}")]
    Unknown {
        /// The id to launch again with.
        launch_id: LaunchId,
        /// What was seen last.
        fault: Fault,
    },
    /// No placer could be reached, so that nothing was sent.
    #[error("no placer was reached, nothing was sent: {0}")]
    Unreachable(Fault),
}

impl LaunchError {
    /// What programs match on.
    #[must_use]
    pub const fn code(&self) -> Code {
        match self {
            Self::NotStarted(fault) | Self::Unreachable(fault) => fault.code,
            Self::Unknown { .. } => Code::Unknown,
        }
    }

    /// Whether the launch may have been started.
    #[must_use]
    pub const fn is_unknown(&self) -> bool {
        matches!(self, Self::Unknown { .. })
    }
}

impl From<LaunchError> for Fault {
    fn from(error: LaunchError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

/// Why a call on a running sandbox did not do what was asked: what the host, the placer or the way there said.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct CallError(pub Fault);

impl CallError {
    /// What programs match on.
    #[must_use]
    pub const fn code(&self) -> Code {
        self.0.code
    }

    pub(crate) fn protocol(what: &str) -> Self {
        Self(Fault::new(Code::Internal, format!("the other end broke the protocol: {what}")))
    }

    pub(crate) fn lost(what: impl std::fmt::Display) -> Self {
        Self(Fault::new(Code::Unreachable, format!("the stream broke: {what}")))
    }
}

impl From<Fault> for CallError {
    fn from(fault: Fault) -> Self {
        Self(fault)
    }
}

impl From<CallError> for Fault {
    fn from(error: CallError) -> Self {
        error.0
    }
}

impl From<CallError> for std::io::Error {
    fn from(error: CallError) -> Self {
        Self::other(error)
    }
}
