//! Row 19: a full disk, a tmpfs of 4 MiB in a mount namespace of its own, which goes with the command in it.

use std::process::{Command, Output};

use moerun_tests::{golden_dir, moerun};
use tempfile::TempDir;

use super::{figure, path, skipped};

/// Runs `script` with a full-sized tmpfs of 4 MiB on `$1`, the binary in `$2` and `$3` on.
fn on_small_disk(script: &str, folder: &str, more: &[&str]) -> Output {
    let mount = format!("mount -t tmpfs -o size=4m none \"$1\" && {script}");
    Command::new("timeout")
        .args([
            "--kill-after=1",
            "60",
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            &mount,
            "sh",
            folder,
        ])
        .arg(moerun())
        .args(more)
        .output()
        .expect("timeout starts")
}

fn can_mount(folder: &str) -> bool {
    on_small_disk("true", folder, &[]).status.success()
}

#[test]
fn row_19_a_full_disk_leaves_no_partial_checkpoint_and_no_failed_request() {
    let folder = TempDir::new().expect("a temporary folder");
    let dir = path(folder.path());
    if !can_mount(dir) {
        return skipped(19, "the right to mount a tmpfs in a namespace of its own");
    }
    // Most of the disk is taken, so that neither fits.
    let writes = [
        (
            "synthesize",
            "\"$2\" synthesize --shape granite-3.1-1b-a400m --layers 1 --weights int4 --out \"$1/out\"",
        ),
        (
            "convert",
            "\"$2\" convert --model \"$3\" --weights f32 --out \"$1/out\"",
        ),
    ];
    let model = golden_dir("deepseek_v3");
    let mut partial = 0;
    for (what, command) in writes {
        let fill = "head -c 4000000 /dev/zero > \"$1/filler\"";
        let script = format!("{fill} && {{ {command}; echo \"code $?\"; ls -A \"$1\"; }}");
        let output = on_small_disk(&script, dir, &[path(&model)]);
        let (said, error) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        assert!(said.contains("code 1"), "{what}: {said} {error}");
        assert!(
            error.contains("are needed") || error.contains("No space left"),
            "{what}: {error}"
        );
        assert!(!error.contains("panicked"), "{what}: {error}");
        partial += said.lines().filter(|line| line.starts_with("out")).count();
    }
    assert_eq!(partial, 0, "partial files are left");

    // Logs on a full disk: a command that logs each step goes on.
    let model = golden_dir("qwen3_moe");
    let generate = "\"$2\" generate --model \"$3\" --prompt-ids 1,2 --max-tokens 16 --ignore-eos --json --workers 2 \
                    --log-level trace";
    let script =
        format!("{{ head -c 5000000 /dev/zero > \"$1/filler\"; {generate} 2>> \"$1/log\"; echo \"code $?\"; }}");
    let output = on_small_disk(&script, dir, &[path(&model)]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        said.contains("code 0") && said.contains("token_ids"),
        "{said} {}",
        String::from_utf8_lossy(&output.stderr)
    );
    figure(
        19,
        "full disk: synthesize and convert fail cleanly, 0 partial files; with its log on it, 0 failed requests",
    );
}
