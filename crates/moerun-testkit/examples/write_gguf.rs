//! Writes a checkpoint directory as a GGUF file: `write_gguf DIR FILE`.

use std::{env, error::Error, fs, path::Path};

use moerun_testkit::RawGguf;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [dir, file] = &arguments[..] else {
        return Err("wanted DIR and FILE".into());
    };
    fs::write(file, RawGguf::from_checkpoint(Path::new(dir))?.to_bytes())?;
    Ok(())
}
