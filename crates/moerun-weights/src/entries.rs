//! A JSON object as a list of its entries: unlike a map, it does not hide that a name stands there twice.

use std::{fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, MapAccess, Visitor},
};

/// Entries in the order of the text.
pub(crate) struct Entries<V>(pub(crate) Vec<(String, V)>);

/// Reads an object of at most this many entries.
pub(crate) struct AtMost<V> {
    limit: usize,
    values: PhantomData<V>,
}

impl<V> AtMost<V> {
    pub(crate) fn new(limit: usize) -> Self {
        AtMost {
            limit,
            values: PhantomData,
        }
    }
}

impl<'de, V: Deserialize<'de>> DeserializeSeed<'de> for AtMost<V> {
    type Value = Entries<V>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Entries<V>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, V: Deserialize<'de>> Visitor<'de> for AtMost<V> {
    type Value = Entries<V>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object of at most {} entries", self.limit)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<V>, A::Error> {
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if entries.len() == self.limit {
                return Err(serde::de::Error::custom(format!(
                    "wanted at most {} entries, found more",
                    self.limit
                )));
            }
            entries.push((name, map.next_value()?));
        }
        Ok(Entries(entries))
    }
}
