//! Every lie can be told, has its own name, and changes the checkpoint.

use std::{collections::BTreeSet, ffi::OsString, fs, path::Path};

use moerun_testkit::{copy_checkpoint, golden_dir, lies};

/// A file's name, whether it is a link, and its contents; a directory has none.
type Entry = (OsString, bool, Option<Vec<u8>>);

fn contents(dir: &Path) -> Vec<Entry> {
    let mut files: Vec<Entry> = fs::read_dir(dir)
        .expect("a directory just written")
        .map(|entry| entry.expect("a readable entry"))
        .map(|entry| {
            (
                entry.file_name(),
                entry.path().is_symlink(),
                fs::read(entry.path()).ok(),
            )
        })
        .collect();
    files.sort();
    files
}

#[test]
fn there_are_many_lies_and_no_two_have_one_name() {
    let names: BTreeSet<&str> = lies().iter().map(|lie| lie.name).collect();
    assert_eq!(names.len(), lies().len());
    assert!(names.len() >= 40, "{}", names.len());
    assert!(lies().iter().all(|lie| !lie.words.is_empty()));
}

#[test]
fn every_lie_makes_a_checkpoint_of_its_own() {
    let root = tempfile::tempdir().unwrap();
    let mut seen = BTreeSet::new();
    for (i, lie) in lies().iter().enumerate() {
        let [truth, told] = ["truth", "told"].map(|name| root.path().join(format!("{i}/{name}")));
        copy_checkpoint(&golden_dir(lie.family), &truth).unwrap();
        lie.write(&told).unwrap_or_else(|error| panic!("{lie:?}: {error}"));
        let told = contents(&told);
        assert_ne!(contents(&truth), told, "{lie:?}");
        assert!(seen.insert(told), "{lie:?} tells what another told");
    }
}

#[test]
fn missing_words_are_found_whatever_the_case_of_letters() {
    let lie = lies()
        .into_iter()
        .find(|lie| lie.name == "an unknown model type")
        .unwrap();
    assert_eq!(
        lie.missing_words("config.json: MODEL_TYPE Mamba is unknown"),
        Vec::<&str>::new()
    );
    assert_eq!(lie.missing_words("config.json: model_type is unknown"), ["mamba"]);
}
