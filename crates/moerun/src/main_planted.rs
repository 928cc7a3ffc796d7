//! The binary with a violation of an invariant planted in it, which `MOERUN_PLANT` names: what the checker of histories must
//! find. Only built by the tests, beside the binary without any, of which it shares all but three crates.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    moerun::run()
}
