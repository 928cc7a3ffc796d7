//! Typed, range-checked access to the fields of a JSON object; null counts as absent.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::ConfigError;

/// An object of `config.json`, and where it stands in the file.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    scope: &'static str,
}

impl<'a> Fields<'a> {
    pub(super) fn new(map: &'a Map<String, Value>) -> Self {
        Fields { map, scope: "" }
    }

    /// The value of `name`, unless it is absent or null.
    pub(super) fn get(self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Whether `name` is in the file, be it null.
    pub(super) fn mentions(self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    /// Names of all fields that are not null.
    pub(super) fn names(self) -> impl Iterator<Item = &'a str> {
        self.map
            .iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(name, _)| name.as_str())
    }

    /// `name` with the objects around it.
    pub(super) fn path(self, name: &str) -> String {
        if self.scope.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.scope)
        }
    }

    pub(super) fn missing(self, name: &str, wanted: impl Into<String>) -> ConfigError {
        ConfigError::Missing {
            field: self.path(name),
            wanted: wanted.into(),
        }
    }

    pub(super) fn invalid(self, name: &str, wanted: impl Into<String>, found: impl ToString) -> ConfigError {
        ConfigError::Invalid {
            field: self.path(name),
            wanted: wanted.into(),
            found: found.to_string(),
        }
    }

    pub(super) fn unsupported(self, name: &str, wanted: impl Into<String>, found: impl ToString) -> ConfigError {
        ConfigError::Unsupported {
            field: self.path(name),
            wanted: wanted.into(),
            found: found.to_string(),
        }
    }

    /// A nested object.
    pub(super) fn object(self, name: &'static str) -> Result<Option<Fields<'a>>, ConfigError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields { map, scope: name })),
            Some(other) => Err(self.invalid(name, "an object or null", shorten(other))),
        }
    }

    /// An integer within `range`.
    pub(super) fn optional_size(self, name: &str, range: RangeInclusive<usize>) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        size_in(value, &range)
            .map(Some)
            .ok_or_else(|| self.invalid(name, integer_wanted(&range), shorten(value)))
    }

    /// An integer within `range` that must be there.
    pub(super) fn size(self, name: &str, range: RangeInclusive<usize>) -> Result<usize, ConfigError> {
        self.optional_size(name, range.clone())?
            .ok_or_else(|| self.missing(name, integer_wanted(&range)))
    }

    /// An integer within `range`, or `default`.
    pub(super) fn size_or(
        self,
        name: &str,
        range: RangeInclusive<usize>,
        default: usize,
    ) -> Result<usize, ConfigError> {
        Ok(self.optional_size(name, range)?.unwrap_or(default))
    }

    /// One integer that goes by several names; those that are there must agree.
    pub(super) fn size_of_any(self, names: &[&str], range: RangeInclusive<usize>) -> Result<usize, ConfigError> {
        let mut chosen: Option<(&str, usize)> = None;
        for &name in names {
            let Some(found) = self.optional_size(name, range.clone())? else {
                continue;
            };
            match chosen {
                Some((other, wanted)) if wanted != found => {
                    return Err(self.invalid(name, format!("{wanted} as in {other}"), found));
                }
                _ => chosen = Some((name, found)),
            }
        }
        chosen
            .map(|(_, size)| size)
            .ok_or_else(|| self.missing(names[0], integer_wanted(&range)))
    }

    /// A list of integers within `range`.
    pub(super) fn sizes(self, name: &str, range: RangeInclusive<usize>) -> Result<Option<Vec<usize>>, ConfigError> {
        let Some(items) = self.list(name)? else { return Ok(None) };
        let wanted = || format!("a list, each {}", integer_wanted(&range));
        items
            .iter()
            .map(|item| size_in(item, &range).ok_or_else(|| self.invalid(name, wanted(), shorten(item))))
            .collect::<Result<_, _>>()
            .map(Some)
    }

    pub(super) fn list(self, name: &str) -> Result<Option<&'a [Value]>, ConfigError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(self.invalid(name, "a list or null", shorten(other))),
        }
    }

    /// A list of positive numbers.
    pub(super) fn positive_numbers(self, name: &str) -> Result<Vec<f64>, ConfigError> {
        let items = self
            .list(name)?
            .ok_or_else(|| self.missing(name, "a list of positive numbers"))?;
        items
            .iter()
            .map(|item| {
                item.as_f64()
                    .filter(|number| number.is_finite() && *number > 0.0)
                    .ok_or_else(|| self.invalid(name, "a list of positive numbers", shorten(item)))
            })
            .collect()
    }

    /// A number within `range`.
    pub(super) fn number(self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value
            .as_f64()
            .filter(|number| range.contains(number))
            .map(Some)
            .ok_or_else(|| {
                let wanted = format!("a number from {:e} to {:e}", range.start(), range.end());
                self.invalid(name, wanted, shorten(value))
            })
    }

    /// A number within `range`, or `default`, in single precision.
    pub(super) fn f32_or(self, name: &str, range: RangeInclusive<f64>, default: f32) -> Result<f32, ConfigError> {
        Ok(self.number(name, range)?.map_or(default, |number| number as f32))
    }

    pub(super) fn flag_or(self, name: &str, default: bool) -> Result<bool, ConfigError> {
        match self.get(name) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.invalid(name, "true or false", shorten(other))),
        }
    }

    pub(super) fn text(self, name: &str) -> Result<Option<&'a str>, ConfigError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.invalid(name, "a string", shorten(other))),
        }
    }
}

fn size_in(value: &Value, range: &RangeInclusive<usize>) -> Option<usize> {
    value
        .as_u64()
        .and_then(|number| usize::try_from(number).ok())
        .filter(|number| range.contains(number))
}

fn integer_wanted(range: &RangeInclusive<usize>) -> String {
    format!("an integer from {} to {}", range.start(), range.end())
}

/// A value as it stands in the file, cut so that a message stays a line.
pub(super) fn shorten(value: &Value) -> String {
    const LONGEST: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        None => text,
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}
