//! An API key, and the hash by which it is known.

use std::fmt;

use rand::Rng as _;

/// What keys of ours begin with, so that scanners for leaked secrets find them.
const PREFIX: &str = "moerun-";
/// Random bytes of a key: beyond any guessing, so that a fast hash of it is safe to keep.
const RANDOM_BYTES: usize = 32;
/// What the hash is written after.
const ALGORITHM: &str = "blake3:";

/// A secret that its holder shows. It is neither printed nor logged but by [`ApiKey::reveal`].
#[derive(Clone)]
pub struct ApiKey(String);

impl ApiKey {
    /// A fresh one.
    pub fn generate() -> Self {
        let mut random = [0; RANDOM_BYTES];
        rand::rng().fill_bytes(&mut random);
        ApiKey(format!("{PREFIX}{}", blake3::Hash::from_bytes(random).to_hex()))
    }

    /// The secret itself, to be shown once.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// What is kept of it.
    pub fn hash(&self) -> KeyHash {
        KeyHash::of(self.0.as_bytes())
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

/// What is kept of a key: its BLAKE3 hash. Compared in constant time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyHash(blake3::Hash);

impl KeyHash {
    /// Of what a client shows.
    pub(crate) fn of(shown: &[u8]) -> Self {
        KeyHash(blake3::hash(shown))
    }

    /// Reads `blake3:` and 64 hexadecimal digits.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let wanted = "wanted blake3: and 64 hexadecimal digits";
        let digits = text.strip_prefix(ALGORITHM).ok_or(wanted)?;
        blake3::Hash::from_hex(digits).map(KeyHash).map_err(|_| wanted)
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{ALGORITHM}{}", self.0.to_hex())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_fresh_long_and_never_printed() {
        let (one, other) = (ApiKey::generate(), ApiKey::generate());
        assert_ne!(one.reveal(), other.reveal());
        assert_eq!(one.reveal().len(), PREFIX.len() + 2 * RANDOM_BYTES);
        assert!(!format!("{one:?}").contains(&one.reveal()[PREFIX.len()..]));
        assert_eq!(KeyHash::parse(&one.hash().to_string()).unwrap(), one.hash());
        assert_ne!(one.hash(), other.hash());
        for bad in ["", "blake3:", "blake3:12", "sha256:00", one.reveal()] {
            assert!(KeyHash::parse(bad).is_err(), "{bad}");
        }
    }
}
