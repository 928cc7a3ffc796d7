//! The list of keys as operators write it.

use super::{Client, KeyHash};

/// Longest name of a key.
const MAX_NAME_BYTES: usize = 64;

/// Keys and whose they are. A line is a name and a hash, `team-a blake3:5f…`; a name may have several keys, so that one can
/// be replaced without a gap. Empty lines and those that begin with `#` say nothing.
#[derive(Debug, Clone, Default)]
pub struct KeyList {
    keys: Vec<(KeyHash, Client)>,
}

impl KeyList {
    /// Reads such lines; the error names the line, and never quotes it: somebody may have pasted a key there.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut keys: Vec<(KeyHash, Client)> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let refused = |reason: &str| format!("line {}: {reason}", index + 1);
            let mut words = line.split_whitespace();
            let (Some(name), Some(hash), None) = (words.next(), words.next(), words.next()) else {
                return Err(refused("wanted a name and a hash, as moerun key new prints them"));
            };
            if name.len() > MAX_NAME_BYTES
                || !name
                    .bytes()
                    .all(|it| it.is_ascii_alphanumeric() || b"-_.@".contains(&it))
            {
                return Err(refused("wanted a name of at most 64 letters, digits and -_.@"));
            }
            let hash = KeyHash::parse(hash).map_err(refused)?;
            if keys.iter().any(|(known, _)| *known == hash) {
                return Err(refused("this key is there twice"));
            }
            keys.push((hash, Client::named(name)));
        }
        Ok(KeyList { keys })
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Whose key hashes so. Every key is compared, in constant time, so that the time tells nothing.
    pub(crate) fn find(&self, shown: KeyHash) -> Option<&Client> {
        let mut found = None;
        for (hash, client) in &self.keys {
            if *hash == shown {
                found = Some(client);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::ApiKey;

    #[test]
    fn a_line_is_a_name_and_a_hash_and_a_name_may_have_several_keys() {
        let (old, new, other) = (ApiKey::generate(), ApiKey::generate(), ApiKey::generate());
        let text = format!(
            "# keys\n\n  team-a {}\r\nteam-a {}\nteam-b\t{}",
            old.hash(),
            new.hash(),
            other.hash()
        );
        let list = KeyList::parse(&text).unwrap();
        assert_eq!(list.len(), 3);
        for (key, name) in [(&old, "team-a"), (&new, "team-a"), (&other, "team-b")] {
            assert_eq!(list.find(key.hash()).unwrap().name(), name);
        }
        assert!(list.find(ApiKey::generate().hash()).is_none());
        assert!(KeyList::parse("").unwrap().is_empty());
    }

    #[test]
    fn a_bad_line_is_named_and_not_quoted() {
        let key = ApiKey::generate();
        let (secret, hash) = (key.reveal(), key.hash());
        for (text, word) in [
            (format!("a {hash}\n{secret}"), "line 2: wanted a name and a hash"),
            (format!("a {secret}"), "line 1: wanted blake3:"),
            (format!("a {hash} {secret}"), "line 1: wanted a name and a hash"),
            (format!("a/b {hash}"), "line 1: wanted a name of at most 64"),
            (format!("a {hash}\nb {hash}"), "line 2: this key is there twice"),
        ] {
            let error = KeyList::parse(&text).unwrap_err();
            assert!(error.starts_with(word), "{error}");
            assert!(!error.contains(secret), "{error}");
        }
    }
}
