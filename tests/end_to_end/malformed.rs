//! Malformed checkpoints, one lie each: the binary says what is wrong, and neither panics nor hangs.

use moerun_testkit::{LIE_PROMPT, Stage, lies};
use moerun_tests::run;
use tempfile::TempDir;

#[test]
fn every_lie_is_refused_in_words_that_name_it() {
    let lies = lies();
    assert!(lies.len() >= 40, "only {} lies", lies.len());
    let mut wrong = Vec::new();
    for lie in lies {
        let folder = TempDir::new().expect("a temporary folder");
        let dir = folder.path().join("model");
        lie.write(&dir).expect("the lie is told");
        let model = dir.to_str().expect("a plain path");
        let args = match lie.stage {
            Stage::Weights => vec!["generate", "--model", model, "--prompt-ids", "1,2", "--max-tokens", "1"],
            Stage::Text => vec![
                "generate",
                "--model",
                model,
                "--prompt",
                LIE_PROMPT,
                "--max-tokens",
                "1",
            ],
            Stage::Chat => vec![
                "generate",
                "--model",
                model,
                "--chat",
                "--prompt",
                LIE_PROMPT,
                "--max-tokens",
                "1",
            ],
        };
        let finished = run(&args);
        let missing = lie.missing_words(&finished.stderr);
        if finished.code != Some(1) || finished.stderr.contains("panicked") || !missing.is_empty() {
            wrong.push(format!(
                "{lie:?}: code {:?}, lacks {missing:?}: {}",
                finished.code, finished.stderr
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
