//! The command line as its users meet it: text, JSON, help, exit codes, settings.

use std::{fs, time::Duration};

use moerun_tests::{Golden, Server, golden_dir, run, run_for, run_with};
use serde_json::Value;
use tempfile::TempDir;

fn bible() -> String {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-bible-moe");
    dir.to_str().expect("a plain path").to_owned()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn the_readme_command_streams_text_a_person_can_read() {
    let model = bible();
    let prompt = "And it came to pass in those days, that";
    let args = [
        "generate",
        "--model",
        &model,
        "--workers",
        "2",
        "--prompt",
        prompt,
        "--temperature",
        "0",
    ];
    let text = run(&[&args[..], &["--max-tokens", "24"]].concat()).ok();
    let words = text
        .split_whitespace()
        .filter(|word| word.chars().any(char::is_alphabetic))
        .count();
    assert!(words >= 12, "{text}");
    assert!(text.contains("LORD") || text.contains("the"), "{text}");
    assert!(!text.contains('\u{fffd}'), "{text}");
}

#[test]
fn the_trained_model_gives_its_golden_tokens_in_f32() {
    let model = bible();
    let golden: Value = json(&fs::read_to_string(format!("{model}/golden.json")).expect("in the repository"));
    for prompt in golden["prompts"].as_array().expect("a list") {
        let ids: Vec<u32> = serde_json::from_value(prompt["ids"].clone()).expect("ids");
        let wanted: Vec<u32> = serde_json::from_value(prompt["greedy"].clone()).expect("ids");
        let safe = prompt["first_small_margin"]
            .as_u64()
            .map_or(wanted.len(), |first| first as usize);
        let ids = ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let args = [
            "generate",
            "--model",
            &model,
            "--weights",
            "f32",
            "--prompt-ids",
            &ids,
            "--json",
        ];
        let extra = ["--temperature", "0", "--max-tokens", "48", "--workers", "2"];
        let answer = json(&run(&[&args[..], &extra].concat()).ok());
        let found: Vec<u32> = serde_json::from_value(answer["token_ids"].clone()).expect("ids");
        assert!(found.len() >= safe.min(wanted.len()), "{found:?}");
        assert_eq!(found[..safe], wanted[..safe], "{}", prompt["prompt"]);
    }
}

#[test]
fn the_same_request_gives_the_same_text_with_any_number_of_workers() {
    let model = bible();
    let ask = |seed: &str, extra: &[&str]| {
        let args = [
            "generate",
            "--model",
            &model,
            "--prompt",
            "The LORD is my",
            "--max-tokens",
            "20",
            "--json",
        ];
        let sampling = [
            "--temperature",
            "0.8",
            "--top-p",
            "0.95",
            "--top-k",
            "50",
            "--min-p",
            "0.01",
            "--seed",
            seed,
        ];
        json(&run(&[&args[..], &sampling, extra].concat()).ok())
    };
    let local = ask("7", &[]);
    for workers in ["1", "2", "3", "4"] {
        let remote = ask("7", &["--workers", workers]);
        assert_eq!(remote["token_ids"], local["token_ids"], "{workers} workers");
        assert_eq!(remote["text"], local["text"], "{workers} workers");
    }
    assert_ne!(
        ask("8", &[])["token_ids"],
        local["token_ids"],
        "another seed, the same text"
    );
}

#[test]
fn chat_prompts_go_through_the_model_s_template() {
    let golden = Golden::read("qwen3_moe");
    let model = golden.dir.to_str().expect("a plain path").to_owned();
    let args = [
        "generate",
        "--model",
        &model,
        "--chat",
        "--prompt",
        "Who made the earth?",
        "--json",
    ];
    let answer = json(&run(&[&args[..], &["--max-tokens", "1"]].concat()).ok());
    // <|im_start|> user \n … the template adds more tokens than the question has.
    let plain = [
        "generate",
        "--model",
        &model,
        "--prompt",
        "Who made the earth?",
        "--json",
        "--max-tokens",
        "1",
    ];
    let plain = json(&run(&plain).ok());
    assert!(
        answer["prompt_tokens"].as_u64() > plain["prompt_tokens"].as_u64(),
        "{answer} {plain}"
    );
    let without = golden_dir("olmoe").to_str().expect("a plain path").to_owned();
    let error = run(&["generate", "--model", &without, "--chat", "--prompt", "x"]).failed(1);
    assert!(error.contains("chat template"), "{error}");
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let model = bible();
    let ask = |extra: &[&str]| {
        let args = [
            "generate",
            "--model",
            &model,
            "--prompt",
            "In the beginning God",
            "--temperature",
            "0",
            "--json",
        ];
        json(&run(&[&args[..], &["--max-tokens", "24"], extra].concat()).ok())
    };
    let whole = ask(&[])["text"].as_str().expect("text").to_owned();
    let words: Vec<&str> = whole.split(' ').collect();
    let stop = format!("{} {}", &words[3][words[3].len() / 2..], &words[4][..1]);
    let cut = ask(&["--stop", &stop]);
    let wanted = &whole[..whole.find(&stop).expect("it is in the text")];
    assert_eq!(cut["text"], wanted, "stop at {stop:?}");
    assert_eq!(cut["finish_reason"], "stop");
}

#[test]
fn help_and_version_answer_and_wrong_usage_exits_with_2() {
    for command in [
        "serve",
        "gateway",
        "worker",
        "generate",
        "forward",
        "inspect",
        "synthesize",
    ] {
        let help = run(&[command, "--help"]).ok();
        assert!(help.contains("Usage: moerun"), "{help}");
    }
    assert!(run(&["--version"]).ok().starts_with("moerun "));
    run(&["generate", "--no-such-flag"]).failed(2);
    run(&["generate", "--model", "x"]).failed(2);
    run(&["no-such-command"]).failed(2);
    let model = bible();
    let error = run(&["serve", "--model", &model, "--weights", "f64"]).failed(2);
    assert!(error.contains("f64") && error.contains("bf16"), "{error}");
}

#[test]
fn settings_come_from_flags_then_environment_then_file() {
    let folder = TempDir::new().expect("a temporary folder");
    let file = folder.path().join("moerun.toml");
    let model = bible();
    fs::write(
        &file,
        format!("model = {model:?}\nserved_name = \"from-file\"\nmax_context = 48\n"),
    )
    .expect("writable");
    let config = file.to_str().expect("a plain path");
    let args = [
        "generate",
        "--config",
        config,
        "--prompt",
        "God",
        "--max-tokens",
        "500",
        "--ignore-eos",
        "--json",
    ];
    // The answer fills the context, so that its length tells whose max_context holds.
    let context = |variables: &[(&str, &str)], extra: &[&str]| {
        let answer = json(&run_with(variables, &[&args[..], extra].concat()).ok());
        let generated = answer["token_ids"].as_array().expect("ids").len() as u64;
        answer["prompt_tokens"].as_u64().expect("a count") + generated
    };
    let environment = [("MOERUN_MAX_CONTEXT", "40")];
    assert_eq!(context(&[], &[]), 48, "the file");
    assert_eq!(context(&environment, &[]), 40, "the environment before the file");
    assert_eq!(
        context(&environment, &["--max-context", "32"]),
        32,
        "the flag before both"
    );
    let error = run_with(&[("MOERUN_MAX_CONTEXT", "much")], &args).failed(2);
    assert!(
        error.contains("MOERUN_MAX_CONTEXT") && error.contains("much"),
        "{error}"
    );
    let error = run_with(&[("MOERUN_ISA", "abacus")], &args).failed(2);
    assert!(error.contains("abacus"), "{error}");
    fs::write(&file, "max_contxt = 48\n").expect("writable");
    let error = run(&["generate", "--config", config, "--prompt", "God"]).failed(2);
    assert!(error.contains("max_contxt"), "{error}");
}

#[test]
fn what_cannot_be_is_said_and_exits_with_1() {
    let model = bible();
    for (args, words) in [
        (
            vec!["generate", "--model", "/no/such/dir", "--prompt", "x"],
            vec!["/no/such/dir"],
        ),
        (
            vec!["generate", "--model", &model, "--prompt-ids", "1,99999"],
            vec!["99999", "4096"],
        ),
        (
            vec!["generate", "--model", &model, "--prompt", "x", "--temperature", "-1"],
            vec!["temperature", "-1"],
        ),
        (
            vec!["generate", "--model", &model, "--prompt", "x", "--top-p", "1.5"],
            vec!["top_p", "1.5"],
        ),
        (
            vec!["generate", "--model", &model, "--prompt", "x", "--max-tokens", "0"],
            vec!["max_tokens", "0"],
        ),
        (
            vec!["generate", "--model", &model, "--prompt", ""],
            vec!["at least one token"],
        ),
        (
            vec!["generate", "--connect", "127.0.0.1:1", "--prompt", "x"],
            vec!["127.0.0.1:1"],
        ),
        (
            vec![
                "gateway",
                "--model",
                &model,
                "--worker",
                "127.0.0.1:1",
                "--max-context",
                "0",
            ],
            vec!["max_context"],
        ),
        (
            vec!["serve", "--model", &model, "--grpc-addr", "nonsense"],
            vec!["nonsense"],
        ),
        (vec!["worker", "--model", &model, "--shard", "2/2"], vec!["2/2"]),
        (vec!["worker", "--model", &model, "--experts", "0:9"], vec!["9"]),
    ] {
        let finished = run_for(&args, Duration::from_secs(60));
        assert!(matches!(finished.code, Some(1 | 2)), "{args:?}: {finished:?}");
        assert!(!finished.stderr.contains("panicked"), "{args:?}: {finished:?}");
        for word in words {
            assert!(
                finished.stderr.contains(word),
                "{args:?} should say {word}: {}",
                finished.stderr
            );
        }
    }
}

#[test]
fn a_prompt_too_long_is_an_error_and_never_cut() {
    let model = bible();
    let args = [
        "generate",
        "--model",
        &model,
        "--prompt",
        "God said unto them all, go.",
        "--max-context",
        "4",
    ];
    let error = run(&args).failed(1);
    assert!(error.contains("context of 4"), "{error}");
}

#[test]
fn generate_asks_a_gateway_that_already_runs() {
    let model = bible();
    let server = Server::start(&["serve", "--model", &model, "--grpc-addr", "127.0.0.1:0"]);
    let common = [
        "--prompt",
        "The fear of the",
        "--temperature",
        "0",
        "--max-tokens",
        "12",
        "--json",
    ];
    let remote = json(&run(&[&["generate", "--connect", &server.addr][..], &common].concat()).ok());
    let local = json(&run(&[&["generate", "--model", &model][..], &common].concat()).ok());
    for field in ["text", "token_ids", "prompt_tokens", "finish_reason"] {
        assert_eq!(remote[field], local[field], "{field}");
    }
    assert!(remote["timings"].is_object(), "{remote}");
}
