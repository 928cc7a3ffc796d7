//! Scripts in Python, their packages installed once below `target/`.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

/// Runs `clients/SCRIPT` with `args`; it must end well.
#[track_caller]
pub fn run_client(script: &str, args: &[&str]) -> String {
    run_python("clients", script, args)
}

/// Runs `FOLDER/SCRIPT` with `args` and the packages of `FOLDER/requirements.txt`; it must end well.
#[track_caller]
pub fn run_python(folder: &str, script: &str, args: &[&str]) -> String {
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let output = Command::new("python3")
        .arg(scripts.join(script))
        .args(args)
        .env("PYTHONPATH", packages(folder, &scripts))
        .output()
        .expect("python3 is installed");
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{script}: {stdout}\n{stderr}");
    stdout.into_owned()
}

/// Where the packages of `scripts/requirements.txt` are, at the versions named there.
fn packages(folder: &str, scripts: &Path) -> PathBuf {
    static INSTALLING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = INSTALLING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let requirements = scripts.join("requirements.txt");
    let wanted = std::fs::read_to_string(&requirements).expect("requirements.txt is in the repository");
    let target = std::env::current_exe().expect("a test has a path");
    let packages = target
        .ancestors()
        .nth(3)
        .expect("target/PROFILE/deps/TEST")
        .join(format!("python-{folder}"));
    let installed = packages.join("installed.txt");
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
            .arg(&packages)
            .arg("--requirement")
            .arg(&requirements)
            .status()
            .expect("python3 is installed");
        assert!(status.success(), "pip could not install {}", requirements.display());
        std::fs::write(&installed, &wanted).expect("target is writable");
    }
    packages
}
