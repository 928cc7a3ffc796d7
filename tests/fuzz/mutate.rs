//! Changes to inputs: of bytes, and of what the bytes are made of.

use rand::{RngExt, rngs::ChaCha8Rng};
use serde_json::{Map, Value, json};

/// What an input is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Nothing known.
    Bytes,
    /// JSON: values are replaced, dropped, repeated, nested.
    Json,
    /// JSON behind its length in eight bytes, then other bytes.
    Safetensors,
    /// Fields with numbers.
    Proto,
}

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
/// What they are as words.
const WORDS: [u64; 8] = [0, 1, u64::MAX, 1 << 31, 1 << 32, 1 << 63, i64::MAX as u64, u64::MAX - 7];
/// Longest nesting that is tried.
const DEEP: usize = 2000;

impl Form {
    /// A few changes, at random places.
    pub(crate) fn mutate(self, input: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
        let structured = match self {
            Form::Bytes => None,
            // Now and then the structure itself is broken.
            _ if rng.random_range(0..4) == 0 => None,
            Form::Json => json_of(input, rng),
            Form::Safetensors => safetensors(input, rng),
            Form::Proto => Some(proto(input, rng)),
        };
        structured.unwrap_or_else(|| bytes(input, rng))
    }
}

fn bytes(input: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
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

fn json_of(input: &[u8], rng: &mut ChaCha8Rng) -> Option<Vec<u8>> {
    let mut value: Value = serde_json::from_slice(input).ok()?;
    for _ in 0..rng.random_range(1..=3) {
        change(&mut value, rng);
    }
    serde_json::to_vec(&value).ok()
}

/// Changes one value, chosen by walking down from the top.
fn change(value: &mut Value, rng: &mut ChaCha8Rng) {
    let goes_on = rng.random_range(0..5) > 0;
    match value {
        Value::Object(fields) if goes_on && !fields.is_empty() => {
            let at = rng.random_range(0..fields.len());
            let name = fields.keys().nth(at).cloned().unwrap_or_default();
            match rng.random_range(0..12) {
                0 => drop(fields.remove(&name)),
                1 => rename(fields, &name, rng),
                _ => fields
                    .values_mut()
                    .nth(at)
                    .into_iter()
                    .for_each(|field| change(field, rng)),
            }
        }
        Value::Array(items) if goes_on && !items.is_empty() => {
            let at = rng.random_range(0..items.len());
            match rng.random_range(0..8) {
                0 => drop(items.remove(at)),
                1 => items.push(items[at].clone()),
                _ => change(&mut items[at], rng),
            }
        }
        other => *other = another(other, rng),
    }
}

fn rename(fields: &mut Map<String, Value>, name: &str, rng: &mut ChaCha8Rng) {
    let Some(value) = fields.remove(name) else { return };
    let mut letters: Vec<char> = name.chars().collect();
    let at = rng.random_range(0..=letters.len());
    letters.insert(at, ['\0', '/', '.', 'é', '\u{202e}'][rng.random_range(0..5)]);
    fields.insert(letters.into_iter().collect(), value);
}

fn another(value: &Value, rng: &mut ChaCha8Rng) -> Value {
    match rng.random_range(0..10) {
        0 => Value::Null,
        1 => Value::Bool(rng.random()),
        2 => json!("x".repeat(rng.random_range(0..5000))),
        3 => json!(["../../etc/passwd", "/dev/zero", "{{ x }}", "\u{0}", "1"][rng.random_range(0..5)]),
        4 => Value::Array(vec![value.clone(); rng.random_range(0..200)]),
        5 => (0..rng.random_range(1..DEEP)).fold(value.clone(), |inner, _| Value::Array(vec![inner])),
        6 => json!({ "x": value }),
        _ => serde_json::from_str(NUMBERS[rng.random_range(0..NUMBERS.len())]).unwrap_or_default(),
    }
}

fn safetensors(input: &[u8], rng: &mut ChaCha8Rng) -> Option<Vec<u8>> {
    let (length, rest) = input.split_first_chunk::<8>()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let header = json_of(rest.get(..length)?, rng)?;
    let length = header.len() as u64;
    Some(
        [
            &length.to_le_bytes()[..],
            &header,
            &rest[usize::try_from(u64::from_le_bytes(*input.first_chunk()?)).ok()?..],
        ]
        .concat(),
    )
}

/// A field of a message: its number, and its value.
#[derive(Debug, Clone)]
enum Field {
    Varint(u64, u64),
    Bytes(u64, Vec<u8>),
    Fixed(u64, Vec<u8>),
}

fn proto(input: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut fields = fields_of(input);
    for _ in 0..rng.random_range(1..=3) {
        if fields.is_empty() {
            break;
        }
        let at = rng.random_range(0..fields.len());
        match rng.random_range(0..10) {
            0 => drop(fields.remove(at)),
            1 => fields.push(fields[at].clone()),
            _ => match &mut fields[at] {
                Field::Varint(_, value) => *value = a_number(rng),
                Field::Fixed(_, content) => *content = bytes(content, rng),
                Field::Bytes(_, content) => match rng.random_range(0..6) {
                    0 => content.clear(),
                    1 => content.extend(vec![rng.random::<u8>(); rng.random_range(1..100)]),
                    // What is a message itself has fields too.
                    2 | 3 if !fields_of(content).is_empty() => *content = proto(content, rng),
                    _ => *content = bytes(content, rng),
                },
            },
        }
    }
    let mut out = Vec::new();
    for field in fields {
        match field {
            Field::Varint(number, value) => {
                put_varint(&mut out, number << 3);
                put_varint(&mut out, value);
            }
            Field::Bytes(number, content) => {
                put_varint(&mut out, number << 3 | 2);
                put_varint(&mut out, content.len() as u64);
                out.extend(content);
            }
            Field::Fixed(tag, content) => {
                put_varint(&mut out, tag);
                out.extend(content);
            }
        }
    }
    out
}

fn a_number(rng: &mut ChaCha8Rng) -> u64 {
    match rng.random() {
        true => WORDS[rng.random_range(0..WORDS.len())],
        false => rng.random_range(0..300),
    }
}

/// The fields up to the first that is none.
fn fields_of(mut input: &[u8]) -> Vec<Field> {
    let mut fields = Vec::new();
    while let Some(tag) = take_varint(&mut input) {
        let field = match tag & 7 {
            0 => take_varint(&mut input).map(|value| Field::Varint(tag >> 3, value)),
            2 => take_varint(&mut input)
                .and_then(|length| take(&mut input, usize::try_from(length).ok()?))
                .map(|content| Field::Bytes(tag >> 3, content)),
            1 => take(&mut input, 8).map(|content| Field::Fixed(tag, content)),
            5 => take(&mut input, 4).map(|content| Field::Fixed(tag, content)),
            _ => None,
        };
        let Some(field) = field else { break };
        fields.push(field);
    }
    fields
}

fn take(input: &mut &[u8], length: usize) -> Option<Vec<u8>> {
    let (taken, rest) = input.split_at_checked(length)?;
    *input = rest;
    Some(taken.to_vec())
}

fn take_varint(input: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = input.split_first()?;
        *input = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}
