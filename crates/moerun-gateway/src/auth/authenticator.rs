//! From an `authorization` header to whom it is of.

use std::{path::Path, sync::Arc};

use moerun_transport::{TransportError, Watched};

use super::{KeyHash, KeyList};

/// Longest header that is looked at.
const MAX_SHOWN_BYTES: usize = 512;
/// How it begins.
const SCHEME: &[u8] = b"bearer ";

/// Who asks: the name beside the key that was shown, or nobody in particular where no keys are wanted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Client {
    name: Option<Arc<str>>,
}

impl Client {
    pub(crate) fn named(name: &str) -> Self {
        Client {
            name: Some(name.into()),
        }
    }

    /// Its name; empty for nobody in particular.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or_default()
    }
}

/// Why a request is not let in. The messages never hold what was shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AuthError {
    /// Nothing was shown.
    #[error("wanted an API key: authorization: Bearer KEY")]
    Missing,
    /// Something else than a key was shown.
    #[error("authorization: wanted Bearer and an API key, found something else")]
    NotBearer,
    /// It is no key of ours.
    #[error("the API key is not known here")]
    Unknown,
}

impl AuthError {
    /// Short name for programs.
    pub fn reason(self) -> &'static str {
        match self {
            AuthError::Missing => "API_KEY_MISSING",
            AuthError::NotBearer => "API_KEY_MALFORMED",
            AuthError::Unknown => "API_KEY_UNKNOWN",
        }
    }
}

/// Decides who may ask. Shared by all doors.
#[derive(Debug)]
pub struct Authenticator {
    /// `None` = whoever connects.
    keys: Option<Keys>,
}

#[derive(Debug)]
struct Keys {
    fixed: KeyList,
    watched: Option<Watched<KeyList>>,
}

impl Authenticator {
    /// Lets everybody in.
    pub fn open() -> Self {
        Authenticator { keys: None }
    }

    /// Lets those in who show a key of `fixed`, or of the list in `file`, which is read again when it changes.
    ///
    /// # Errors
    /// A file that cannot be read or makes no sense, and no key at all: a list that was emptied by mistake must not open the
    /// door, and one that never had a key would lock everybody out.
    pub fn with_keys(fixed: KeyList, file: Option<&Path>) -> Result<Self, TransportError> {
        let watched = match file {
            None => None,
            Some(path) => {
                let owned = path.to_owned();
                let build = move |contents: &[Vec<u8>]| {
                    let refused = |reason| TransportError::Content {
                        path: owned.clone(),
                        reason,
                    };
                    let text = std::str::from_utf8(&contents[0]).map_err(|error| refused(error.to_string()))?;
                    let list = KeyList::parse(text).map_err(refused)?;
                    if list.is_empty() {
                        return Err(refused("wanted at least one key, found none".to_owned()));
                    }
                    Ok(list)
                };
                Some(Watched::start("API keys", vec![path.to_owned()], build)?)
            }
        };
        Ok(Authenticator {
            keys: Some(Keys { fixed, watched }),
        })
    }

    /// Whether anybody is let in.
    pub fn is_open(&self) -> bool {
        self.keys.is_none()
    }

    /// Whose the key in an `authorization` header is.
    pub fn authenticate(&self, authorization: Option<&[u8]>) -> Result<Client, AuthError> {
        let Some(keys) = &self.keys else {
            return Ok(Client { name: None });
        };
        let shown = authorization.ok_or(AuthError::Missing)?;
        let key = match shown.split_at_checked(SCHEME.len()) {
            Some((scheme, key)) if scheme.eq_ignore_ascii_case(SCHEME) && shown.len() <= MAX_SHOWN_BYTES => key,
            _ => return Err(AuthError::NotBearer),
        };
        let hash = KeyHash::of(key.trim_ascii());
        let listed = keys.watched.as_ref().map(Watched::current);
        // Both are searched to their ends, whatever the first has.
        let found = [
            keys.fixed.find(hash).cloned(),
            listed.as_ref().and_then(|list| list.find(hash).cloned()),
        ];
        found.into_iter().flatten().next().ok_or(AuthError::Unknown)
    }

    /// Looks at the file now.
    pub fn look(&self) {
        if let Some(watched) = self.keys.as_ref().and_then(|keys| keys.watched.as_ref()) {
            watched.look();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::auth::ApiKey;

    fn bearer(key: &ApiKey) -> Vec<u8> {
        format!("Bearer {}", key.reveal()).into_bytes()
    }

    #[test]
    fn without_keys_everybody_is_let_in_as_nobody() {
        let open = Authenticator::open();
        assert_eq!(open.authenticate(None).unwrap().name(), "");
        assert!(open.authenticate(Some(b"Bearer x")).is_ok() && open.is_open());
    }

    #[test]
    fn a_key_is_known_by_its_name_and_everything_else_is_refused_by_reason() {
        let (fixed, listed) = (ApiKey::generate(), ApiKey::generate());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        fs::write(&path, format!("listed {}", listed.hash())).unwrap();
        let list = KeyList::parse(&format!("fixed {}", fixed.hash())).unwrap();
        let auth = Authenticator::with_keys(list, Some(&path)).unwrap();
        for (key, name) in [(&fixed, "fixed"), (&listed, "listed")] {
            assert_eq!(auth.authenticate(Some(&bearer(key))).unwrap().name(), name);
        }
        let lower = format!("bearer  {} ", fixed.reveal());
        assert_eq!(auth.authenticate(Some(lower.as_bytes())).unwrap().name(), "fixed");
        let long = [b"Bearer ".to_vec(), vec![b'x'; MAX_SHOWN_BYTES]].concat();
        for (shown, error) in [
            (None, AuthError::Missing),
            (Some(&b""[..]), AuthError::NotBearer),
            (Some(b"Basic dXNlcjpwYXNz"), AuthError::NotBearer),
            (Some(fixed.reveal().as_bytes()), AuthError::NotBearer),
            (Some(&long), AuthError::NotBearer),
            (Some(b"Bearer "), AuthError::Unknown),
            (Some(&bearer(&ApiKey::generate())), AuthError::Unknown),
            (Some(format!("Bearer {}", fixed.hash()).as_bytes()), AuthError::Unknown),
        ] {
            assert_eq!(auth.authenticate(shown), Err(error), "{shown:?}");
        }
    }

    #[test]
    fn a_changed_file_is_taken_and_an_empty_one_opens_nothing() {
        let (old, new) = (ApiKey::generate(), ApiKey::generate());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        fs::write(&path, "# none yet\n").unwrap();
        let error = Authenticator::with_keys(KeyList::default(), Some(&path))
            .unwrap_err()
            .to_string();
        assert!(error.contains("wanted at least one key"), "{error}");
        fs::write(&path, format!("a {}", old.hash())).unwrap();
        let auth = Authenticator::with_keys(KeyList::default(), Some(&path)).unwrap();
        fs::write(&path, format!("a {}", new.hash())).unwrap();
        auth.look();
        assert_eq!(auth.authenticate(Some(&bearer(&old))), Err(AuthError::Unknown));
        for broken in ["", "nonsense"] {
            fs::write(&path, broken).unwrap();
            auth.look();
            assert_eq!(auth.authenticate(Some(&bearer(&new))).unwrap().name(), "a");
            assert_eq!(auth.authenticate(None), Err(AuthError::Missing));
        }
    }
}
