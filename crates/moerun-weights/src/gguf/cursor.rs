//! Reads the header front to back; nothing is read, and no length believed, past the end of the file.

use std::path::Path;

use crate::WeightsError;

/// What is left of a file.
pub(super) struct Cursor<'a> {
    path: &'a Path,
    file: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(path: &'a Path, file: &'a [u8]) -> Self {
        Cursor {
            path,
            file,
            position: 0,
        }
    }

    /// The file's name.
    pub(super) fn path(&self) -> &'a Path {
        self.path
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> usize {
        self.position
    }

    /// Length of the file.
    pub(super) fn file_bytes(&self) -> usize {
        self.file.len()
    }

    pub(super) fn refuse(
        &self,
        what: impl Into<String>,
        wanted: impl Into<String>,
        found: impl ToString,
    ) -> WeightsError {
        WeightsError::Gguf {
            path: self.path.to_owned(),
            what: what.into(),
            wanted: wanted.into(),
            found: found.to_string(),
        }
    }

    /// The next `length` bytes.
    pub(super) fn bytes(&mut self, what: &str, length: u64) -> Result<&'a [u8], WeightsError> {
        let rest = &self.file[self.position..];
        let taken = usize::try_from(length).ok().and_then(|length| rest.get(..length));
        let taken = taken.ok_or_else(|| {
            self.refuse(
                what,
                format!("{length} bytes from byte {}", self.position),
                format!("{}, then the end of the file", rest.len()),
            )
        })?;
        self.position += taken.len();
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], WeightsError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(what, N as u64)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, WeightsError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, WeightsError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A number of things of at least `min_bytes` each, which must fit in what is left of the file.
    pub(super) fn count(&mut self, what: &str, limit: usize, min_bytes: usize) -> Result<usize, WeightsError> {
        let found = self.u64(what)?;
        let room = (self.file.len() - self.position) / min_bytes;
        let most = limit.min(room);
        match usize::try_from(found) {
            Ok(count) if count <= most => Ok(count),
            _ if found <= limit as u64 => Err(self.refuse(
                what,
                format!("at most {room}, for which the rest of the file has room"),
                found,
            )),
            _ => Err(self.refuse(what, format!("at most {limit}"), found)),
        }
    }

    /// A string with its length before it.
    pub(super) fn text(&mut self, what: &str, limit: usize) -> Result<&'a str, WeightsError> {
        let length = self.u64(what)?;
        if length > limit as u64 {
            return Err(self.refuse(what, format!("at most {limit} bytes"), length));
        }
        let bytes = self.bytes(what, length)?;
        std::str::from_utf8(bytes).map_err(|error| self.refuse(what, "UTF-8", error))
    }
}
