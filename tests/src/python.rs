//! Foreign clients in Python, their packages installed once below `target/`.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// Runs `clients/SCRIPT` with `args`; it must end well.
#[track_caller]
pub fn run_client(script: &str, args: &[&str]) -> String {
    let clients = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
    let output = Command::new("python3")
        .arg(clients.join(script))
        .args(args)
        .env("PYTHONPATH", packages())
        .output()
        .expect("python3 is installed");
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{script}: {stdout}\n{stderr}");
    stdout.into_owned()
}

/// Folder of the clients' packages: those of `clients/requirements.txt`, at the versions named there.
fn packages() -> &'static Path {
    static PACKAGES: OnceLock<PathBuf> = OnceLock::new();
    PACKAGES.get_or_init(|| {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let requirements = manifest.join("clients/requirements.txt");
        let wanted = std::fs::read_to_string(&requirements).expect("requirements.txt is in the repository");
        let target = std::env::current_exe().expect("a test has a path");
        let folder = target
            .ancestors()
            .nth(3)
            .expect("target/PROFILE/deps/TEST")
            .join("python-clients");
        let installed = folder.join("installed.txt");
        if std::fs::read_to_string(&installed).ok().as_deref() != Some(&wanted) {
            let status = Command::new("python3")
                .args([
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--disable-pip-version-check",
                    "--upgrade",
                    "--target",
                ])
                .arg(&folder)
                .arg("--requirement")
                .arg(&requirements)
                .status()
                .expect("python3 is installed");
            assert!(status.success(), "pip could not install {}", requirements.display());
            std::fs::write(&installed, &wanted).expect("target is writable");
        }
        folder
    })
}
