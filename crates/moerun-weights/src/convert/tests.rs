use std::{cell::Cell, sync::atomic::Ordering};

use moerun_testkit::{Family, TinyCheckpoint};

use super::*;
use crate::Needs;

fn source(root: &Path) -> Checkpoint {
    let dir = root.join("source");
    TinyCheckpoint::new(Family::Qwen3Moe, 3).write(&dir).unwrap();
    Checkpoint::open(&dir, Needs::All).unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_full_disk_is_noticed_before_anything_is_written() {
    let root = tempfile::tempdir().unwrap();
    let source = source(root.path());
    let out = root.path().join("out");
    let request = ConvertRequest::new(&source, NumberFormat::Int8, &out);
    let asked = Cell::new(false);
    let error = convert_with_space(&request, &|dir| {
        asked.set(dir == root.path());
        Ok(1000)
    });
    assert!(asked.get());
    let Err(ConvertError::Write(WriteError::NoSpace {
        needed_bytes,
        available_bytes: 1000,
        ..
    })) = error
    else {
        panic!("{error:?}")
    };
    assert_eq!(names(root.path()), ["source"]);
    convert_with_space(&request, &|_| Ok(needed_bytes)).unwrap();
    let taken: u64 = fs::read_dir(&out)
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum();
    assert!(
        taken <= needed_bytes && taken + (2 << 20) > needed_bytes,
        "{taken} of {needed_bytes}"
    );
}

#[test]
fn nothing_is_left_of_interrupted_work() {
    let root = tempfile::tempdir().unwrap();
    let source = source(root.path());
    let out = root.path().join("out");
    let stop = AtomicBool::new(false);
    let partial = root.path().join("out.partial");
    let request = ConvertRequest {
        interrupted: Some(&stop),
        progress: Some(&|written, total| {
            assert!(partial.is_dir() && written <= total);
            stop.store(written > total / 2, Ordering::Relaxed);
        }),
        ..ConvertRequest::new(&source, NumberFormat::Int4, &out)
    };
    assert!(matches!(
        convert(&request),
        Err(ConvertError::Write(WriteError::Interrupted))
    ));
    assert_eq!(names(root.path()), ["source"]);
}

#[test]
fn what_exists_is_left_as_it_is_and_packed_weights_are_not_packed_again() {
    let root = tempfile::tempdir().unwrap();
    let source = source(root.path());
    let out = root.path().join("out");
    let request = ConvertRequest::new(&source, NumberFormat::Bf16, &out);
    convert(&request).unwrap();
    assert!(matches!(
        convert(&request),
        Err(ConvertError::Write(WriteError::Exists { .. }))
    ));
    let packed = Checkpoint::open(&out, Needs::All).unwrap();
    let again = root.path().join("again");
    let error = convert(&ConvertRequest::new(&packed, NumberFormat::Int8, &again)).unwrap_err();
    assert!(error.to_string().contains("is packed in bf16 already"), "{error}");
    assert_eq!(names(root.path()), ["out", "source"]);
}

#[test]
fn files_beside_the_weights_are_taken_over_and_weights_are_not() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("source");
    TinyCheckpoint {
        shards: 2,
        ..TinyCheckpoint::new(Family::Mixtral, 3)
    }
    .write(&dir)
    .unwrap();
    for name in ["chat_template.jinja", "LICENSE", ".hidden.json", "pytorch_model.bin"] {
        fs::write(dir.join(name), name).unwrap();
    }
    fs::create_dir(dir.join("folder.json")).unwrap();
    let source = Checkpoint::open(&dir, Needs::All).unwrap();
    let out = root.path().join("out");
    convert(&ConvertRequest {
        files: &[("extra.txt".to_owned(), "more".to_owned())],
        ..ConvertRequest::new(&source, NumberFormat::Bf16, &out)
    })
    .unwrap();
    let found = names(&out);
    for wanted in [
        "chat_template.jinja",
        "LICENSE",
        "config.json",
        "tokenizer.json",
        "extra.txt",
    ] {
        assert!(found.iter().any(|name| name == wanted), "{wanted} in {found:?}");
    }
    let weights: Vec<_> = found.iter().filter(|name| name.contains("safetensors")).collect();
    assert_eq!(
        weights,
        [
            "packed-00001-of-00002.safetensors",
            "packed-00002-of-00002.safetensors",
            "packed.safetensors.index.json"
        ]
    );
    assert!(
        !found
            .iter()
            .any(|name| name.contains("hidden") || name.contains("bin") || name.contains("folder"))
    );
    assert_eq!(
        fs::read(out.join("config.json")).unwrap(),
        fs::read(dir.join("config.json")).unwrap()
    );
}
