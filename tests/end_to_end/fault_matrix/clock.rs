//! Row 20: clocks that are wrong, and that jump, by libfaketime. Only the wall clock lies: monotonic time cannot jump.

use std::{fs, path::Path};

use moerun_tests::{Golden, Server};
use tempfile::TempDir;

use super::{Load, assert_exact, figure, finished, gateway_args, path, skipped};

/// Where Debian has it.
const LIBRARIES: [&str; 3] = [
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/faketime/libfaketimeMT.so.1",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_20_no_deadline_hangs_on_the_wall_clock() {
    let Some(library) = LIBRARIES.into_iter().find(|library| Path::new(library).exists()) else {
        return skipped(20, "libfaketime (Debian: faketime)");
    };
    let golden = Golden::read("qwen3_moe");
    let folder = TempDir::new().expect("a temporary folder");
    let clock = |name: &str, offset: &str| {
        let file = folder.path().join(name);
        fs::write(&file, offset).expect("writable");
        file
    };
    let (ahead, behind, jumping) = (clock("ahead", "+1h"), clock("behind", "-1h"), clock("jumping", "+0"));
    let start = |file: &Path, args: &[String]| {
        let variables = [
            ("LD_PRELOAD", library),
            ("FAKETIME_TIMESTAMP_FILE", path(file)),
            ("FAKETIME_NO_CACHE", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ];
        Server::start_with(&variables, args)
    };
    let worker_args = |shard: &str| {
        [
            "worker",
            "--model",
            path(&golden.dir),
            "--listen",
            "127.0.0.1:0",
            "--shard",
            shard,
        ]
        .map(str::to_owned)
    };
    let workers = [start(&ahead, &worker_args("0/2")), start(&behind, &worker_args("1/2"))];
    let gateway = start(
        &jumping,
        &gateway_args(&golden.dir, &[&workers[0].addr, &workers[1].addr]),
    );
    let load = Load::start(&gateway.addr, &golden, 50, 3);
    for offset in ["+1h", "-1h", "+0", "-30d"] {
        tokio::time::sleep(std::time::Duration::from_millis(600)).await;
        fs::write(&jumping, offset).expect("writable");
    }
    let history = load.history().await;
    assert_exact(&history);
    let failed = history.requests.iter().filter(|it| !finished(it)).count();
    assert_eq!(failed, 0);
    figure(
        20,
        format!(
            "workers an hour ahead and behind, the gateway's clock jumping four times under load: {failed} of {} requests \
             failed",
            history.requests.len(),
        ),
    );
}
