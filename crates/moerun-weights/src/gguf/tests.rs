//! Hostile headers, one per class of bug that readers of this format have had: each must be an error that names the
//! part of the file, found before anything of the size that it claims is allocated.

use std::path::Path;

use super::*;

/// A header in pieces, so that any of them can lie.
struct Header {
    version: u32,
    num_tensors: u64,
    entries: Vec<Vec<u8>>,
    num_entries: Option<u64>,
    infos: Vec<Vec<u8>>,
    data: usize,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [text(key), kind.to_le_bytes().to_vec(), value.to_vec()].concat()
}

fn info(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = text(name);
    bytes.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

impl Header {
    /// Two f32 tensors of 32 bytes.
    fn good() -> Self {
        Header {
            version: 3,
            num_tensors: 2,
            entries: vec![entry("general.architecture", 8, &text("llama"))],
            num_entries: None,
            infos: vec![info("a", &[4, 2], 0, 0), info("b", &[8], 0, 32)],
            data: 64,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut file = MAGIC.to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend(self.num_tensors.to_le_bytes());
        file.extend(self.num_entries.unwrap_or(self.entries.len() as u64).to_le_bytes());
        file.extend(self.entries.concat());
        file.extend(self.infos.concat());
        file.resize(file.len().next_multiple_of(32), 0);
        file.resize(file.len() + self.data, 1);
        file
    }

    fn error(&self) -> String {
        parse(Path::new("m.gguf"), &self.bytes()).unwrap_err().to_string()
    }
}

fn altered(alter: impl FnOnce(&mut Header)) -> String {
    let mut header = Header::good();
    alter(&mut header);
    header.error()
}

#[track_caller]
fn assert_says(error: &str, words: &[&str]) {
    assert!(error.starts_with("m.gguf: "), "{error}");
    for word in words {
        assert!(error.contains(word), "no {word:?} in {error:?}");
    }
}

#[test]
fn a_good_header_is_read_in_both_versions() {
    for version in [2, 3] {
        let header = Header {
            version,
            ..Header::good()
        };
        let file = header.bytes();
        let (metadata, tensors) = parse(Path::new("m.gguf"), &file).unwrap();
        assert_eq!(metadata.text("general.architecture").unwrap(), Some("llama"));
        assert_eq!(tensors[0].shape, [2, 4]);
        assert_eq!((tensors[0].bytes.len(), tensors[1].bytes.end), (32, file.len()));
    }
}

#[test]
fn counts_that_the_file_has_no_room_for_are_refused() {
    for count in [1000, 1 << 40, u64::MAX] {
        assert_says(
            &altered(|header| header.num_tensors = count),
            &["number of tensors", &count.to_string()],
        );
        let error = altered(|header| header.num_entries = Some(count));
        assert_says(&error, &["number of metadata entries", &count.to_string()]);
        let list = [4u32.to_le_bytes().to_vec(), count.to_le_bytes().to_vec()].concat();
        assert_says(
            &altered(|header| header.entries.push(entry("list", 9, &list))),
            &["list", &count.to_string()],
        );
    }
}

#[test]
fn strings_that_run_past_the_end_are_refused() {
    for length in [500, 1 << 33, u64::MAX] {
        let error = altered(|header| header.entries.push(entry("name", 8, &length.to_le_bytes())));
        assert_says(&error, &["name", &length.to_string()]);
        let error = altered(|header| header.infos[1] = length.to_le_bytes().to_vec());
        assert_says(&error, &["tensor's name", &length.to_string()]);
        let error = altered(|header| header.entries.push(length.to_le_bytes().to_vec()));
        assert_says(&error, &["metadata key", &length.to_string()]);
    }
}

#[test]
fn dimensions_that_overflow_or_are_zero_are_refused() {
    for dims in [
        vec![1 << 32, 1 << 32],
        vec![u64::MAX, 2],
        vec![1 << 63],
        vec![u64::MAX],
        vec![0, 4],
        vec![4, 0],
        vec![1 << 62, 4],
    ] {
        assert_says(
            &altered(|header| header.infos[1] = info("b", &dims, 0, 32)),
            &["tensor b"],
        );
    }
    for rank in [0, 5] {
        let dims = vec![1; rank];
        let error = altered(|header| header.infos[1] = info("b", &dims, 0, 32));
        assert_says(&error, &["tensor b", "dimensions", &rank.to_string()]);
    }
    let error = altered(|header| header.infos[1][9..13].copy_from_slice(&u32::MAX.to_le_bytes()));
    assert_says(&error, &["tensor b", "dimensions"]);
}

#[test]
fn types_that_there_are_not_are_refused() {
    for kind in [4, 31, 40, 1 << 31, u32::MAX] {
        let error = altered(|header| header.infos[1] = info("b", &[8], kind, 32));
        assert_says(&error, &["tensor b", &kind.to_string()]);
        let error = altered(|header| header.entries.push(entry("key", kind | 64, &[0; 8])));
        assert_says(&error, &["type of key"]);
    }
    let error = altered(|header| header.infos[1] = info("b", &[16, 2], 8, 32));
    assert_says(&error, &["tensor b", "whole blocks of 32"]);
    let nested = [9u32.to_le_bytes().to_vec(), 1u64.to_le_bytes().to_vec(), vec![0; 64]].concat();
    assert_says(
        &altered(|header| header.entries.push(entry("nested", 9, &nested))),
        &["nested", "list"],
    );
    assert_says(
        &altered(|header| header.entries.push(entry("flag", 7, &[2]))),
        &["flag", "0 or 1"],
    );
    assert_says(
        &altered(|header| header.entries.push(entry("bad", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 255]))),
        &["UTF-8"],
    );
}

#[test]
fn offsets_outside_the_file_between_tensors_or_unaligned_are_refused() {
    for offset in [0, 4, 33, 64, 1 << 40, u64::MAX, u64::MAX - 31] {
        let error = altered(|header| header.infos[1] = info("b", &[8], 0, offset));
        assert_says(&error, &["tensor"]);
    }
    let error = altered(|header| header.infos[1] = info("b", &[1 << 40], 0, 32));
    assert_says(&error, &["tensor b", "a file of"]);
    assert_says(&altered(|header| header.data = 128), &["the file", "at most"]);
    for alignment in [0u32, 1, 4, 48, u32::MAX] {
        let error = altered(|header| {
            header
                .entries
                .push(entry("general.alignment", 4, &alignment.to_le_bytes()));
        });
        assert_says(&error, &["general.alignment", "power of two"]);
    }
}

#[test]
fn names_and_keys_come_once() {
    assert_says(
        &altered(|header| header.infos[1] = info("a", &[8], 0, 32)),
        &["tensor a", "twice"],
    );
    let error = altered(|header| header.entries.push(header.entries[0].clone()));
    assert_says(&error, &["general.architecture", "twice"]);
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let file = Header::good().bytes();
    for length in 0..file.len() {
        let error = parse(Path::new("m.gguf"), &file[..length]).unwrap_err();
        assert!(error.to_string().starts_with("m.gguf: "), "{length}: {error}");
    }
}

#[test]
fn other_files_and_versions_are_told_apart() {
    for version in [0, 1, 4, 3u32.swap_bytes()] {
        assert_says(&altered(|header| header.version = version), &["version", "2 or 3"]);
    }
    assert_says(&altered(|header| header.version = 3 << 24), &["big-endian"]);
    let error = parse(Path::new("m.gguf"), b"PK\x03\x04 and more")
        .unwrap_err()
        .to_string();
    assert_says(&error, &["magic number", "GGUF"]);
}

#[test]
fn random_damage_never_panics() {
    let file = Header::good().bytes();
    let mut state = 1u64;
    let mut next = |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for _ in 0..20_000 {
        let mut damaged = file.clone();
        for _ in 0..=next(4) {
            let at = next(damaged.len());
            damaged[at] = next(256) as u8;
        }
        if let Ok((_, tensors)) = parse(Path::new("m.gguf"), &damaged) {
            assert!(tensors.iter().all(|tensor| tensor.bytes.end <= damaged.len()));
        }
    }
}
