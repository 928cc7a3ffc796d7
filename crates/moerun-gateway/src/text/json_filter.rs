//! The `tojson` filter as chat templates expect it: Python's `json.dumps`, with nothing escaped for HTML.

use minijinja::{Error, ErrorKind, State, Value, value::Kwargs};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// `json.dumps(value, ensure_ascii=False)`, with the keyword arguments `indent`, `separators` and `ensure_ascii`.
pub(super) fn tojson(state: &State<'_, '_>, value: &Value, arguments: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = arguments.get("indent")?;
    let separators: Option<Vec<String>> = arguments.get("separators")?;
    let ensure_ascii: bool = arguments.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    arguments.assert_all_used()?;
    // One fuel per 64 bytes is what the built-in filters pay; the value itself has been paid for.
    let json = match (indent, separators.as_deref()) {
        (Some(width), None) => {
            let spaces = " ".repeat(width.min(16));
            serialise(value, PrettyFormatter::with_indent(spaces.as_bytes()))?
        }
        (None, None) => serialise(value, Separated { item: ", ", key: ": " })?,
        (None, Some([item, key])) => serialise(value, Separated { item, key })?,
        _ => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "tojson: wanted indent, or two separators",
            ));
        }
    };
    state.consume_fuel((json.len() / 64) as u64)?;
    Ok(Value::from_safe_string(if ensure_ascii {
        escape_non_ascii(&json)
    } else {
        json
    }))
}

fn serialise(value: &Value, formatter: impl Formatter) -> Result<String, Error> {
    let mut json = Vec::new();
    value
        .serialize(&mut Serializer::with_formatter(&mut json, formatter))
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(String::from_utf8(json).expect("serde_json writes UTF-8"))
}

fn escape_non_ascii(json: &str) -> String {
    let mut ascii = String::with_capacity(json.len());
    for character in json.chars() {
        if character.is_ascii() {
            ascii.push(character);
        } else {
            for unit in character.encode_utf16(&mut [0; 2]) {
                ascii.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    ascii
}

/// Everything on one line, with these separators.
struct Separated<'a> {
    item: &'a str,
    key: &'a str,
}

impl Formatter for Separated<'_> {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(self.item.as_bytes())
        }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(self.item.as_bytes())
        }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }
}
