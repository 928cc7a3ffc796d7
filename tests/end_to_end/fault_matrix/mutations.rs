//! Row 27: files and messages that are nearly right. Each parser gets valid inputs with a few random changes, for
//! `MOERUN_FUZZ_SECONDS` (1 unless told otherwise) a target; it may refuse or accept, but neither panic nor hang.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    time::{Duration, Instant},
};

use moerun_gateway::{ChatMessage, TextCodec};
use moerun_proto::{ModelLimits, decode_handshake, decode_request, decode_response, v1};
use moerun_testkit::RawGguf;
use moerun_tests::golden_dir;
use moerun_types::{ModelConfig, Numerics};
use moerun_weights::{Checkpoint, Needs};
use prost::Message;
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};
use tempfile::TempDir;

use super::figure;

/// Longest that a parser may take for one small input: far above what it needs, far below a hang.
const LONGEST: Duration = Duration::from_secs(10);
/// Numbers that sizes, offsets and counts overflow at.
const NUMBERS: [&str; 12] = [
    "0",
    "-1",
    "1",
    "255",
    "65536",
    "2147483648",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "1e308",
    "-1e308",
    "0.5",
];
/// What they are as bytes.
const WORDS: [u64; 8] = [0, 1, u64::MAX, 1 << 31, 1 << 32, 1 << 63, i64::MAX as u64, u64::MAX - 7];

/// A few changes at random places.
fn mutate(input: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..rng.random_range(1..=4) {
        if bytes.is_empty() {
            bytes.push(rng.random());
        }
        // Headers come first: half of the changes hit the first kilobyte.
        let reach = if rng.random() {
            bytes.len()
        } else {
            bytes.len().min(1024)
        };
        let at = rng.random_range(0..reach);
        match rng.random_range(0..7) {
            0 => bytes[at] ^= 1 << rng.random_range(0..8),
            1 => bytes[at] = rng.random(),
            2 => bytes.truncate(at),
            3 => {
                let word = WORDS[rng.random_range(0..WORDS.len())].to_le_bytes();
                let end = (at + rng.random_range(1..=8)).min(bytes.len());
                bytes[at..end].copy_from_slice(&word[..end - at]);
            }
            4 => {
                let end = (at + rng.random_range(1..=64)).min(bytes.len());
                bytes.drain(at..end);
            }
            5 => {
                let end = (at + rng.random_range(1..=64)).min(bytes.len());
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            _ => replace_number(&mut bytes, at, rng),
        }
    }
    bytes
}

/// The first number in digits at or behind `at` becomes another.
fn replace_number(bytes: &mut Vec<u8>, at: usize, rng: &mut ChaCha8Rng) {
    let Some(begin) = (at..bytes.len()).find(|&at| bytes[at].is_ascii_digit()) else {
        return;
    };
    let end = (begin..bytes.len())
        .find(|&at| !bytes[at].is_ascii_digit())
        .unwrap_or(bytes.len());
    bytes.splice(begin..end, NUMBERS[rng.random_range(0..NUMBERS.len())].bytes());
}

/// Gives mutations of `inputs` to `parse` for the time there is. A failure prints the seed.
#[track_caller]
fn mutations(target: &str, inputs: &[Vec<u8>], mut parse: impl FnMut(&[u8])) {
    let seconds = std::env::var("MOERUN_FUZZ_SECONDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(1);
    let until = Instant::now() + Duration::from_secs(seconds);
    for input in inputs {
        parse(input); // the corpus itself, past crashes included
    }
    let (mut executions, mut longest) = (0u64, Duration::ZERO);
    while Instant::now() < until {
        let mut rng = ChaCha8Rng::seed_from_u64(executions);
        let input = mutate(&inputs[rng.random_range(0..inputs.len())], &mut rng);
        let begun = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| parse(&input)));
        let took = begun.elapsed();
        let shown = String::from_utf8_lossy(&input[..input.len().min(2000)]).into_owned();
        assert!(outcome.is_ok(), "{target}: seed {executions} panics: {shown}");
        assert!(took < LONGEST, "{target}: seed {executions} takes {took:?}: {shown}");
        longest = longest.max(took);
        executions += 1;
    }
    figure(
        27,
        format!(
            "{target}: {executions} mutations, 0 panics, longest {:.1} ms",
            longest.as_secs_f64() * 1e3
        ),
    );
}

fn config_of(dir: &Path) -> ModelConfig {
    let text = fs::read_to_string(dir.join("config.json")).expect("a golden config");
    ModelConfig::from_json(&text).expect("it is valid")
}

#[test]
fn row_27_config_json() {
    let inputs: Vec<Vec<u8>> = moerun_tests::decoder_families()
        .iter()
        .map(|family| fs::read(golden_dir(family).join("config.json")).expect("a golden config"))
        .collect();
    mutations("config.json", &inputs, |bytes| {
        let _ = ModelConfig::from_json(&String::from_utf8_lossy(bytes));
    });
}

#[test]
fn row_27_safetensors() {
    let golden = golden_dir("qwen3_moe");
    let folder = TempDir::new().expect("a temporary folder");
    fs::copy(golden.join("config.json"), folder.path().join("config.json")).expect("a copy");
    let file = fs::read(golden.join("model.safetensors")).expect("a golden file");
    let weights = folder.path().join("model.safetensors");
    mutations("safetensors", &[file], |bytes| {
        // A new file each time: what another process has mapped must not change under it.
        let _ = fs::remove_file(&weights);
        fs::write(&weights, bytes).expect("writable");
        let _ = Checkpoint::open(folder.path(), Needs::All);
    });
}

#[test]
fn row_27_gguf() {
    let folder = TempDir::new().expect("a temporary folder");
    let gguf = RawGguf::from_checkpoint(&golden_dir("olmoe"))
        .expect("it has a GGUF form")
        .to_bytes();
    let file = folder.path().join("model.gguf");
    mutations("gguf", &[gguf], |bytes| {
        let _ = fs::remove_file(&file);
        fs::write(&file, bytes).expect("writable");
        let _ = Checkpoint::open(&file, Needs::All);
        let _ = TextCodec::load(&file);
    });
}

/// A folder with the texts of a golden checkpoint, of which one file changes.
fn mutate_text(target: &str, dir: &Path, name: &str, use_codec: impl Fn(&TextCodec)) {
    let folder = TempDir::new().expect("a temporary folder");
    for text in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(dir.join(text), folder.path().join(text)).expect("a copy");
    }
    let input = fs::read(dir.join(name)).expect("a golden file");
    mutations(target, &[input], |bytes| {
        fs::write(folder.path().join(name), bytes).expect("writable");
        if let Ok(codec) = TextCodec::load(folder.path()) {
            use_codec(&codec);
        }
    });
}

#[test]
fn row_27_tokenizer_json() {
    mutate_text("tokenizer.json", &golden_dir("qwen3_moe"), "tokenizer.json", |codec| {
        if let Ok(ids) = codec.encode("In the beginning") {
            let _ = codec.decode(&ids, true);
        }
    });
}

#[test]
fn row_27_chat_template() {
    let messages = [ChatMessage {
        role: "user".to_owned(),
        content: "What is a river?".to_owned(),
    }];
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-bible-moe");
    mutate_text("chat template", &dir, "tokenizer_config.json", |codec| {
        let _ = codec.render_chat(&messages);
    });
}

fn limits() -> ModelLimits {
    let config = config_of(&golden_dir("qwen3_moe"));
    let numerics = Numerics::checked(moerun_types::NumberFormat::F32, moerun_types::CombineMode::Exact, 8);
    ModelLimits::new(&config, numerics.expect("valid"))
}

#[test]
fn row_27_messages_between_gateway_and_worker() {
    let limits = limits();
    let (rows, hidden) = (2, limits.hidden);
    let packed = |values: &[u16]| {
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect::<Vec<u8>>()
            .into()
    };
    let request = v1::ExecuteRequest {
        request_id: 7,
        layer: 0,
        rows,
        hidden: hidden as u32,
        format: v1::ActivationFormat::F32.into(),
        hidden_states: vec![0; 4 * hidden * rows as usize].into(),
        assignment_counts: packed(&[1, 1]),
        expert_ids: packed(&[0, 1]),
        routing_weights: [0.5f32, 0.25]
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect::<Vec<u8>>()
            .into(),
        first_blocks: packed(&[0, 0]),
        end_blocks: packed(&[limits.num_blocks as u16, 1]),
        ..v1::ExecuteRequest::default()
    };
    decode_request(&request, &limits).expect("the corpus is valid");
    mutations("ExecuteRequest", &[request.encode_to_vec()], |bytes| {
        if let Ok(request) = v1::ExecuteRequest::decode(bytes) {
            let _ = decode_request(&request, &limits);
        }
    });
    let held = v1::HeldSlice {
        layer: 0,
        expert: 1,
        first_block: 0,
        end_block: limits.num_blocks as u32,
        block_hashes: vec![3; 16 * limits.num_blocks].into(),
    };
    let handshake = v1::HandshakeResponse {
        protocol_version: moerun_proto::PROTOCOL_VERSION,
        build: "0.1.0".to_owned(),
        config_hash: "a".repeat(64),
        expert_header_hash: "b".repeat(64),
        dense_header_hash: String::new(),
        router_hash: "c".repeat(64),
        numerics_id: limits.numerics.id(),
        host: None,
        held: vec![held.clone(), held],
    };
    mutations("HandshakeResponse", &[handshake.encode_to_vec()], |bytes| {
        if let Ok(response) = v1::HandshakeResponse::decode(bytes) {
            let _ = decode_handshake(&response, Some(&limits));
            let _ = decode_handshake(&response, None);
        }
    });
    let response = v1::ExecuteResponse {
        request_id: 7,
        status: v1::ExecuteStatus::Ok.into(),
        row_widths: vec![5, 6].into(),
        partial_sums: vec![1; 11 * hidden].into(),
        ..v1::ExecuteResponse::default()
    };
    mutations("ExecuteResponse", &[response.encode_to_vec()], |bytes| {
        if let Ok(response) = v1::ExecuteResponse::decode(bytes) {
            let _ = decode_response(&response, limits.numerics.combine, rows as usize, hidden);
        }
    });
}
