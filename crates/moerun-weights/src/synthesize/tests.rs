use std::{fs, sync::Mutex};

use moerun_types::{Family, LayerId};

use super::*;
use crate::{Checkpoint, Needs, SHAPES, Shape, TensorRole};

/// Enough for any request here.
const PLENTY: u64 = 1 << 40;

/// A small config: a golden one with a vocabulary that is no power of two.
fn small_config(family: Family) -> String {
    let path = format!(
        "{}/../../tests/golden/{}/config.json",
        env!("CARGO_MANIFEST_DIR"),
        family.model_type()
    );
    fs::read_to_string(path)
        .unwrap()
        .replace("\"vocab_size\": 320", "\"vocab_size\": 397")
}

fn make(request: &SynthesizeRequest<'_>) -> SynthesizeReport {
    synthesize_with_space(request, &|_| Ok(PLENTY)).unwrap()
}

/// Names and contents of all files, sorted.
fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            (
                entry.file_name().into_string().unwrap(),
                fs::read(entry.path()).unwrap(),
            )
        })
        .collect();
    files.sort();
    files
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_small_checkpoint_of_every_family_opens() {
    for family in Family::ALL {
        for (dtype, element_bytes) in [(NumberFormat::F32, 4), (NumberFormat::Bf16, 2)] {
            let root = tempfile::tempdir().unwrap();
            let out = root.path().join("made");
            let config = small_config(family);
            let report = make(&SynthesizeRequest {
                dtype,
                ..SynthesizeRequest::new(&config, &out)
            });
            let checkpoint = Checkpoint::open(&out, Needs::All).unwrap_or_else(|error| panic!("{family:?}: {error}"));
            assert_eq!(checkpoint.config().layers.len(), report.layers);
            assert_eq!(report.weight_bytes, report.parameters * element_bytes);
            assert!(!checkpoint.generation_config().eos_token_ids.is_empty());
            assert_eq!(names(root.path()), ["made"], "{family:?}");
        }
    }
}

#[test]
fn weights_that_are_read_back_have_the_size_they_were_given() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("made");
    make(&SynthesizeRequest::new(&small_config(Family::Qwen3Moe), &out));
    let checkpoint = Checkpoint::open(&out, Needs::All).unwrap();
    let norm = checkpoint.vector(TensorRole::FinalNorm).unwrap();
    assert!(norm.iter().all(|value| (value - 1.0).abs() < 0.1), "{norm:?}");
    let embedding = checkpoint.matrix(TensorRole::Embedding).unwrap();
    let mut row = vec![0.0; embedding.cols()];
    embedding.read_row(0, &mut row);
    assert!(
        row.iter().any(|value| value.abs() > 0.01) && row.iter().all(|value| value.abs() < 0.1),
        "{row:?}"
    );
}

#[test]
fn one_seed_gives_one_checkpoint_and_another_seed_other_weights() {
    let root = tempfile::tempdir().unwrap();
    let config = small_config(Family::Mixtral);
    let made = |name: &str, seed| {
        let out = root.path().join(name);
        make(&SynthesizeRequest {
            seed,
            ..SynthesizeRequest::new(&config, &out)
        });
        contents(&out)
    };
    let first = made("first", 7);
    assert_eq!(first, made("second", 7));
    let other = made("third", 8);
    for ((name, bytes), (_, other)) in first.iter().zip(&other) {
        assert_eq!(bytes == other, name != "model.safetensors", "{name}");
    }
}

#[test]
fn shards_are_bounded_and_hold_the_same_weights() {
    let root = tempfile::tempdir().unwrap();
    let [one, many] = ["one", "many"].map(|name| root.path().join(name));
    let config = small_config(Family::DeepseekV3);
    make(&SynthesizeRequest::new(&config, &one));
    let max_shard_bytes = 30_000;
    let report = make(&SynthesizeRequest {
        max_shard_bytes,
        ..SynthesizeRequest::new(&config, &many)
    });
    assert!(report.shards > 2, "{report:?}");
    let [one, many] = [one, many].map(|dir| Checkpoint::open(&dir, Needs::All).unwrap());
    assert_eq!(one.expert_header_hash(), many.expert_header_hash());
    assert_eq!(one.router_hash(), many.router_hash());
    assert_eq!(
        one.vector(TensorRole::FinalNorm).unwrap(),
        many.vector(TensorRole::FinalNorm).unwrap()
    );
}

#[test]
fn tensors_longer_than_a_piece_are_whole() {
    let tensors = vec![
        PlannedTensor {
            name: "long".to_owned(),
            shape: vec![(1 << 21) + 5, 2],
        },
        PlannedTensor {
            name: "short".to_owned(),
            shape: vec![3],
        },
    ];
    let plans = shards::split(tensors, Element::Bf16, u64::MAX);
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("file");
    let reported = Mutex::new(Vec::new());
    let progress = |bytes| reported.lock().unwrap().push(bytes);
    let writing = Writing {
        seed: 3,
        dtype: Element::Bf16,
        progress: &progress,
        interrupted: None,
    };
    shards::write(&path, &plans[0], &writing).unwrap();

    let written = fs::read(&path).unwrap();
    let mut wanted = plans[0].header.clone();
    for (name, elements) in [("long", 2 * ((1 << 21) + 5)), ("short", 3)] {
        let mut bytes = vec![0; 2 * elements];
        random::TensorValues::new(3, name, Element::Bf16).fill(0, &mut bytes);
        wanted.extend(bytes);
    }
    assert!(written == wanted);
    assert_eq!(reported.into_inner().unwrap().last(), Some(&plans[0].data_bytes));
}

#[test]
fn fewer_layers_are_the_first_layers() {
    for (family, layers) in [
        (Family::GptOss, 1),
        (Family::Llama4Text, 3),
        (Family::Qwen2Moe, 1),
        (Family::DeepseekV3, 1),
        (Family::Ernie45Moe, 1),
        (Family::Qwen3, 1),
    ] {
        let root = tempfile::tempdir().unwrap();
        let [whole, cut] = ["whole", "cut"].map(|name| root.path().join(name));
        let config = small_config(family);
        make(&SynthesizeRequest::new(&config, &whole));
        let request = SynthesizeRequest {
            layers: Some(layers),
            ..SynthesizeRequest::new(&config, &cut)
        };
        assert_eq!(make(&request).layers, layers);
        let [whole, cut] = [whole, cut].map(|dir| Checkpoint::open(&dir, Needs::All).unwrap());
        let kept: Vec<LayerId> = whole
            .config()
            .moe_layers()
            .into_iter()
            .filter(|layer| (layer.0 as usize) < layers)
            .collect();
        assert_eq!(cut.config().moe_layers(), kept, "{family:?}");
        let norm = |checkpoint: &Checkpoint| checkpoint.vector(TensorRole::FinalNorm).unwrap();
        assert_eq!(norm(&whole), norm(&cut), "{family:?}");
    }
    for wanted in [0, 3] {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        let config = small_config(Family::Mixtral);
        let request = SynthesizeRequest {
            layers: Some(wanted),
            ..SynthesizeRequest::new(&config, &out)
        };
        let error = synthesize(&request).unwrap_err();
        assert!(matches!(error, SynthesizeError::Layers { available: 2, .. }), "{error}");
        assert!(names(root.path()).is_empty());
    }
}

#[test]
fn what_exists_is_left_as_it_is() {
    let root = tempfile::tempdir().unwrap();
    let config = small_config(Family::Llama);
    let [directory, file, link] = ["directory", "file", "link"].map(|name| root.path().join(name));
    fs::create_dir(&directory).unwrap();
    fs::write(&file, "mine").unwrap();
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    for out in [&directory, &file, &link] {
        let error = synthesize(&SynthesizeRequest::new(&config, out)).unwrap_err();
        assert!(
            matches!(error, SynthesizeError::Write(WriteError::Exists { .. })),
            "{error}"
        );
        assert!(error.to_string().contains(out.to_str().unwrap()), "{error}");
    }
    assert_eq!(names(root.path()), ["directory", "file", "link"]);
    assert!(names(&directory).is_empty());
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
}

#[test]
fn a_full_disk_is_noticed_before_anything_is_written() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    let config = small_config(Family::Olmoe);
    let request = SynthesizeRequest::new(&config, &out);
    let error = synthesize_with_space(&request, &|_| Ok(1000)).unwrap_err();
    let SynthesizeError::Write(WriteError::NoSpace {
        needed_bytes,
        available_bytes: 1000,
        ..
    }) = error
    else {
        panic!("{error}")
    };
    assert!(names(root.path()).is_empty());
    let report = synthesize_with_space(&request, &|_| Ok(needed_bytes)).unwrap();
    let taken: u64 = contents(&out).iter().map(|(_, bytes)| bytes.len() as u64).sum();
    assert!(
        report.weight_bytes < taken && taken <= needed_bytes,
        "{taken} of {needed_bytes}"
    );
}

#[test]
fn a_model_larger_than_the_real_disk_names_what_it_needs() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    let huge = Shape::by_name("mixtral-8x7b")
        .unwrap()
        .config_json
        .replace("\"num_hidden_layers\": 32", "\"num_hidden_layers\": 4096");
    let error = synthesize(&SynthesizeRequest::new(&huge, &out)).unwrap_err();
    assert!(
        matches!(error, SynthesizeError::Write(WriteError::NoSpace { needed_bytes, .. }) if needed_bytes > 10 << 40),
        "{error}"
    );
}

#[test]
fn nothing_is_left_of_interrupted_work_and_a_stale_rest_is_replaced() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    let config = small_config(Family::GraniteMoe);
    let stop = AtomicBool::new(true);
    let request = SynthesizeRequest {
        interrupted: Some(&stop),
        ..SynthesizeRequest::new(&config, &out)
    };
    assert!(matches!(
        synthesize(&request),
        Err(SynthesizeError::Write(WriteError::Interrupted))
    ));
    assert!(names(root.path()).is_empty());

    fs::create_dir(root.path().join("out.partial")).unwrap();
    fs::write(root.path().join("out.partial/model-00009-of-00009.safetensors"), "rest").unwrap();
    make(&SynthesizeRequest::new(&config, &out));
    assert_eq!(names(root.path()), ["out"]);
    assert_eq!(
        names(&out),
        [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json"
        ]
    );
}

#[test]
fn a_write_error_is_reported_and_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let config = small_config(Family::Mixtral);
    let out = root.path().join("missing/out");
    let error = synthesize(&SynthesizeRequest::new(&config, &out)).unwrap_err();
    assert!(error.to_string().contains("missing"), "{error}");
    let error = synthesize(&SynthesizeRequest::new(&config, Path::new("/"))).unwrap_err();
    assert!(
        matches!(error, SynthesizeError::Write(WriteError::Exists { .. })),
        "{error}"
    );
    // A device that is always full: the reason must come through from the thread that writes.
    let plans = shards::split(
        vec![PlannedTensor {
            name: "x".to_owned(),
            shape: vec![100],
        }],
        Element::F32,
        1,
    );
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let writing = Writing {
        seed: 0,
        dtype: Element::F32,
        progress: &|_| {},
        interrupted: None,
    };
    let error = shards::write_data(full, Path::new("shard"), &plans[0], &writing).unwrap_err();
    assert!(error.to_string().starts_with("shard: No space left"), "{error}");
}

#[test]
fn a_packed_checkpoint_of_every_family_has_weights_of_the_plain_ones_deviation() {
    for family in Family::ALL {
        for dtype in [NumberFormat::Int8, NumberFormat::Int4, NumberFormat::Mxfp4] {
            let root = tempfile::tempdir().unwrap();
            let out = root.path().join("made");
            let config = small_config(family);
            let report = make(&SynthesizeRequest {
                dtype,
                ..SynthesizeRequest::new(&config, &out)
            });
            let checkpoint = Checkpoint::open(&out, Needs::All).unwrap_or_else(|error| panic!("{family:?}: {error}"));
            assert_eq!(checkpoint.packed_format(), Some(dtype));
            assert_eq!(report.parameters, ParameterCounts::of(checkpoint.config()).total);
            let norm = checkpoint.vector(TensorRole::FinalNorm).unwrap();
            assert!(norm.iter().all(|value| (value - 1.0).abs() < 0.1), "{norm:?}");
            let mut matrices = checkpoint.load_matrices(TensorRole::Embedding, dtype).unwrap();
            if let (Some(moe), Some(&layer)) = (&checkpoint.config().moe, checkpoint.config().moe_layers().first()) {
                let expert = checkpoint.load_expert(layer, moerun_types::ExpertId(0), dtype, 0..moe.intermediate);
                matrices.push(expert.unwrap().down_proj);
            }
            for matrix in matrices {
                let mut row = vec![0.0; matrix.cols()];
                let (mut sum, mut squares) = (0.0, 0.0);
                for index in 0..matrix.rows() {
                    matrix.unpack_row(index, &mut row);
                    sum += row.iter().map(|&value| f64::from(value)).sum::<f64>();
                    squares += row.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>();
                }
                let count = (matrix.rows() * matrix.cols()) as f64;
                let deviation = (squares / count).sqrt();
                // A power of two as scale hits the deviation within a factor of the root of two.
                let wide = matrix.format() == NumberFormat::Mxfp4;
                let wanted = if wide { 0.0141..0.0284 } else { 0.018..0.022 };
                assert!(wanted.contains(&deviation), "{family:?} {dtype}: {deviation}");
                assert!((sum / count).abs() < 0.002, "{family:?} {dtype}: mean {}", sum / count);
            }
        }
    }
}

#[test]
fn a_vocabulary_too_small_for_bytes_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    let config = small_config(Family::Mixtral).replace("397", "260");
    let error = synthesize(&SynthesizeRequest::new(&config, &out)).unwrap_err();
    assert!(
        matches!(
            error,
            SynthesizeError::Vocabulary {
                wanted: 261,
                found: 260
            }
        ),
        "{error}"
    );
}

#[test]
fn every_released_shape_has_the_parameters_its_name_tells_of() {
    for (name, billions) in [
        ("granite-3.1-1b-a400m", 1.33),
        ("olmoe-1b-7b", 6.92),
        ("qwen1.5-moe-a2.7b", 14.3),
        ("deepseek-v2-lite", 15.7),
        ("gpt-oss-20b", 20.9),
        ("qwen3-30b-a3b", 30.5),
        ("mixtral-8x7b", 46.7),
    ] {
        let config = ModelConfig::from_json(Shape::by_name(name).unwrap().config_json).unwrap();
        let parameters: usize = planned_tensors(&config)
            .iter()
            .map(|tensor| tensor.shape.iter().product::<usize>())
            .sum();
        let found = parameters as f64 / 1e9;
        assert!(
            (found - billions).abs() < 0.006 * billions,
            "{name}: {found} thousand million"
        );
    }
    assert_eq!(SHAPES.len(), 7);
    assert!(Shape::by_name("gpt-5").is_none());
}
