//! Compiles `proto/` with protox, so that no `protoc` need be installed.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    let files = ["admin", "expert", "inference", "moe_layer", "placement", "registry"]
        .map(|name| root.join(format!("moerun/v1/{name}.proto")));
    println!("cargo:rerun-if-changed={}", root.display());
    let descriptors = protox::compile(&files, [&root])?;
    fs::write(
        PathBuf::from(env::var("OUT_DIR")?).join("moerun_descriptor.bin"),
        descriptors.encode_to_vec(),
    )?;
    tonic_prost_build::configure()
        .bytes(".")
        .codec_path("crate::TensorCodec")
        .compile_fds(descriptors)?;
    Ok(())
}
