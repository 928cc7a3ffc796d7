//! How a process ends, as an operator's scripts see it.

use std::process::{ExitCode, Termination};

/// How a process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done, or drained after the first SIGTERM or SIGINT.
    Success = 0,
    /// Something failed; the last line of standard error says what.
    Failure = 1,
    /// The command line or the configuration makes no sense.
    Usage = 2,
    /// A SIGINT before anything had begun, or a second one that cut the drain short.
    Interrupted = 130,
    /// A SIGTERM before anything had begun, or a second one that cut the drain short.
    Terminated = 143,
}

impl Exit {
    /// Name of the signal that ends a process so.
    pub(crate) fn signal(self) -> &'static str {
        match self {
            Exit::Interrupted => "SIGINT",
            Exit::Terminated => "SIGTERM",
            Exit::Success | Exit::Failure | Exit::Usage => "no signal",
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

impl Termination for Exit {
    fn report(self) -> ExitCode {
        self.into()
    }
}
