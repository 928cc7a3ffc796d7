//! Free space of a file system.

use std::{io, path::Path};

/// Bytes that an unprivileged process may still write to the file system of `dir`.
pub(crate) fn available_bytes(dir: &Path) -> io::Result<u64> {
    let file_system = rustix::fs::statvfs(dir)?;
    Ok(file_system.f_bavail.saturating_mul(file_system.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_some_space_and_a_missing_one_is_an_error() {
        assert!(available_bytes(&std::env::temp_dir()).unwrap() > 0);
        assert!(available_bytes(Path::new("/no/such/directory")).is_err());
    }
}
