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
    /// A second SIGINT cut the drain short.
    Interrupted = 130,
    /// A second SIGTERM cut the drain short.
    Terminated = 143,
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
