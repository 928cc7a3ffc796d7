//! `moerun key`: API keys of a gateway's clients.

use std::io::{self, Write};

use moerun_gateway::auth::{ApiKey, KeyList};

use crate::{
    cli::{KeyArgs, KeyCommand},
    settings::SettingsError,
};

/// Runs the command.
pub(crate) fn run(args: &KeyArgs) -> anyhow::Result<()> {
    match &args.command {
        KeyCommand::New { name } => new(name),
    }
}

/// Two lines on standard output, so that scripts can part them: the key, and what is kept of it.
fn new(name: &str) -> anyhow::Result<()> {
    let key = ApiKey::generate();
    let line = format!("{name} {}", key.hash());
    KeyList::parse(&line).map_err(|reason| SettingsError(format!("{name:?}: {reason}")))?;
    eprintln!("The key, shown this once, and its line for the file of --api-keys:");
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{}\n{line}", key.reveal())?;
    Ok(())
}
