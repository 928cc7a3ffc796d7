//! What gateway and workers show to Prometheus, and that the files in `deploy/` ask for nothing else.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use moerun_tests::{Golden, Server, free_port, metric, metrics_page, run};

fn path(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

/// Names on a page, without what a kind of metric puts behind them.
fn names(page: &str) -> BTreeSet<String> {
    let types = page
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    types.map(str::to_owned).collect()
}

#[test]
fn figures_tell_what_happened_and_which_worker_failed() {
    let golden = Golden::read("qwen3_moe");
    let [door, of_worker] = [(); 2].map(|()| format!("127.0.0.1:{}", free_port()));
    let start = |extra: &[&str]| {
        Server::start(
            &[
                &["worker", "--model", path(&golden.dir), "--listen", "127.0.0.1:0"],
                extra,
            ]
            .concat(),
        )
    };
    let mut workers = [start(&["--metrics-addr", &of_worker]), start(&[])];
    let gateway = Server::start(&[
        "gateway",
        "--model",
        path(&golden.dir),
        "--grpc-addr",
        "127.0.0.1:0",
        "--registry-addr",
        &format!("127.0.0.1:{}", free_port()),
        "--metrics-addr",
        &door,
        "--worker",
        &workers[0].addr,
        "--worker",
        &workers[1].addr,
    ]);
    let generate = || {
        let args = [
            "generate",
            "--connect",
            &gateway.addr,
            "--prompt-ids",
            "1,2,3",
            "--max-tokens",
            "8",
            "--ignore-eos",
        ];
        run(&args).ok();
    };
    generate();
    assert_eq!(metric(&door, "moerun_generated_tokens_total"), 8.0);
    assert_eq!(metric(&door, "moerun_prompt_tokens_total"), 3.0);
    assert_eq!(metric(&door, "moerun_answers_ended_total{how=\"finished\"}"), 1.0);
    assert_eq!(metric(&door, "moerun_worker_up"), 2.0);
    let calls = metric(&door, "moerun_worker_calls_total");
    assert!(calls > 0.0 && calls <= metric(&door, "moerun_worker_assignments_total"));
    assert!(metric(&door, "moerun_worker_call_seconds_count") > 0.0);
    assert!(metric(&of_worker, "moerun_requests_executed_total") > 0.0);
    assert!(metric(&of_worker, "moerun_held_slices") > 0.0);

    let lost = workers[0].addr.clone();
    workers[0].kill();
    let deadline = Instant::now() + Duration::from_secs(20);
    while metric(&door, &format!("moerun_worker_up{{worker=\"{lost}\"}}")) != 0.0 {
        assert!(Instant::now() < deadline, "the lost worker is not told");
        std::thread::sleep(Duration::from_millis(20));
    }
    generate();
    assert_eq!(metric(&door, "moerun_generated_tokens_total"), 16.0);
    assert!(metrics_page(&door).contains("openmetrics-text"));
}

#[test]
fn what_deploy_asks_prometheus_for_is_there() {
    let golden = Golden::read("qwen3_moe");
    let [door, of_worker] = [(); 2].map(|()| format!("127.0.0.1:{}", free_port()));
    let registry = format!("127.0.0.1:{}", free_port());
    let worker = Server::start(&[
        "worker",
        "--model",
        path(&golden.dir),
        "--listen",
        "127.0.0.1:0",
        "--metrics-addr",
        &of_worker,
    ]);
    let _gateway = Server::start(&[
        "gateway",
        "--model",
        path(&golden.dir),
        "--grpc-addr",
        "127.0.0.1:0",
        "--registry-addr",
        &registry,
        "--metrics-addr",
        &door,
        "--worker",
        &worker.addr,
    ]);
    let known: BTreeSet<String> = names(&metrics_page(&door))
        .union(&names(&metrics_page(&of_worker)))
        .cloned()
        .collect();
    assert!(known.len() > 40, "{known:?}");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/monitoring");
    let mut asked = 0;
    for entry in fs::read_dir(&folder).expect("deploy/monitoring") {
        let file = entry.expect("readable").path();
        let text = fs::read_to_string(&file).expect("text");
        let is_name = |it: char| it.is_ascii_alphanumeric() || it == '_';
        for word in text.split(|it| !is_name(it)).filter(|word| word.starts_with("moerun_")) {
            let bare = ["_total", "_bucket", "_count", "_sum"]
                .iter()
                .find_map(|end| word.strip_suffix(end));
            let is_known = known.contains(word) || bare.is_some_and(|bare| known.contains(bare));
            assert!(is_known, "{}: {word} is no metric of ours", file.display());
            asked += 1;
        }
    }
    assert!(asked > 20, "{asked}");
}
