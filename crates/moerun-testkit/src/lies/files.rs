//! Weight files that are not what their headers say, or not weight files at all.

use std::{fs, path::Path};

use serde_json::{Map, Value, json};

use super::{Lie, Stage};
use crate::{Family, RawFile, TestkitError};

const FILE: &str = "model.safetensors";
const FIRST: &str = "lm_head.weight";

const fn lie(name: &'static str, words: &'static [&'static str], apply: fn(&Path) -> Result<(), TestkitError>) -> Lie {
    Lie {
        name,
        family: Family::Mixtral,
        stage: Stage::Weights,
        words,
        apply,
    }
}

pub(super) const LIES: &[Lie] = &[
    lie("the data ends early", &[FILE], |dir| {
        edit_bytes(dir, |bytes| bytes.truncate(bytes.len() - 100))
    }),
    lie("there is more data than the header tells of", &[FILE], |dir| {
        edit_bytes(dir, |bytes| bytes.extend([0; 100]))
    }),
    lie("the file is empty", &[FILE], |dir| edit_bytes(dir, Vec::clear)),
    lie("the file ends in the header's length", &[FILE], |dir| {
        edit_bytes(dir, |bytes| bytes.truncate(5))
    }),
    lie("the header is longer than the file", &[FILE], |dir| {
        edit_bytes(dir, |bytes| {
            let len = bytes.len() as u64;
            bytes[..8].copy_from_slice(&len.to_le_bytes());
        })
    }),
    lie("the header's length is the largest number", &[FILE], |dir| {
        edit_bytes(dir, |bytes| bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes()))
    }),
    lie("the header is not JSON", &[FILE], |dir| {
        edit_bytes(dir, |bytes| bytes[8] = b'#')
    }),
    lie("the header is not UTF-8", &[FILE], |dir| {
        edit_bytes(dir, |bytes| bytes[20] = 0xff)
    }),
    lie("the header is a list", &[FILE], |dir| {
        RawFile::read(&dir.join(FILE))?.write_with_header(&dir.join(FILE), "[1, 2, 3]")
    }),
    lie("a header entry is a number", &[FILE], |dir| {
        edit_header(dir, |header| header[FIRST] = json!(7))
    }),
    lie("a header entry lacks offsets", &[FILE], |dir| {
        edit_header(dir, |header| {
            header[FIRST] = json!({ "dtype": "F32", "shape": [320, 32] })
        })
    }),
    lie("an unknown element type", &[FILE], |dir| {
        edit_header(dir, |header| header[FIRST]["dtype"] = json!("F33"))
    }),
    lie("a negative dimension", &[FILE], |dir| {
        edit_header(dir, |header| header[FIRST]["shape"] = json!([-320, 32]))
    }),
    lie("dimensions whose product overflows", &[FILE], |dir| {
        edit_header(dir, |header| header[FIRST]["shape"] = json!([u64::MAX / 2, 32]))
    }),
    lie("offsets overlap", &[FILE], |dir| {
        edit_header(dir, |header| {
            let offsets = header[FIRST]["data_offsets"].clone();
            // The next tensor in the file has the same size, so only its place is wrong.
            header["model.embed_tokens.weight"]["data_offsets"] = offsets;
        })
    }),
    lie("offsets reach beyond the file", &[FILE], |dir| {
        edit_header(dir, |header| {
            header[FIRST]["data_offsets"] = json!([1u64 << 40, (1u64 << 40) + 40_960])
        })
    }),
    lie("offsets run backwards", &[FILE], |dir| {
        edit_header(dir, |header| header[FIRST]["data_offsets"] = json!([40_960, 0]))
    }),
    lie("offsets enclose too few bytes", &[FILE], |dir| {
        edit_header(dir, |header| header[FIRST]["data_offsets"] = json!([0, 40_956]))
    }),
    lie("offsets leave a hole", &[FILE], |dir| {
        edit_header(dir, |header| {
            header.remove("model.layers.0.input_layernorm.weight");
        })
    }),
    lie("one name stands twice in the header", &[FILE, FIRST], |dir| {
        let path = dir.join(FILE);
        let file = RawFile::read(&path)?;
        let header = Value::Object(file.header()).to_string();
        let entry = file.header()[FIRST].to_string();
        file.write_with_header(&path, &format!("{{\"{FIRST}\":{entry},{}", &header[1..]))
    }),
    lie(
        "the weights are a link out of the directory",
        &[FILE, "elsewhere"],
        |dir| {
            let elsewhere = dir.with_extension("elsewhere");
            fs::rename(dir.join(FILE), &elsewhere).map_err(TestkitError::io(&elsewhere))?;
            let target = std::path::absolute(&elsewhere).map_err(TestkitError::io(&elsewhere))?;
            std::os::unix::fs::symlink(target, dir.join(FILE)).map_err(TestkitError::io(dir))
        },
    ),
    lie("a pickle under the name of safetensors", &[FILE], |dir| {
        edit_bytes(dir, |bytes| {
            *bytes = b"\x80\x02}q\x00X\x06\x00\x00\x00weightq\x01cos\nsystem\nq\x02.".to_vec()
        })
    }),
    lie("only a pickle is there", &["pytorch_model.bin"], |dir| {
        fs::rename(dir.join(FILE), dir.join("pytorch_model.bin")).map_err(TestkitError::io(dir))
    }),
    lie("no weights are there", &[FILE], |dir| {
        fs::remove_file(dir.join(FILE)).map_err(TestkitError::io(dir))
    }),
    lie("a directory under the name of the weights", &[FILE], |dir| {
        fs::remove_file(dir.join(FILE)).map_err(TestkitError::io(dir))?;
        fs::create_dir(dir.join(FILE)).map_err(TestkitError::io(dir))
    }),
];

fn edit_bytes(dir: &Path, edit: impl FnOnce(&mut Vec<u8>)) -> Result<(), TestkitError> {
    let path = dir.join(FILE);
    let mut bytes = fs::read(&path).map_err(TestkitError::io(&path))?;
    edit(&mut bytes);
    fs::write(&path, bytes).map_err(TestkitError::io(&path))
}

fn edit_header(dir: &Path, edit: impl FnOnce(&mut Map<String, Value>)) -> Result<(), TestkitError> {
    let path = dir.join(FILE);
    let file = RawFile::read(&path)?;
    let mut header = file.header();
    edit(&mut header);
    file.write_with_header(&path, &Value::Object(header).to_string())
}
