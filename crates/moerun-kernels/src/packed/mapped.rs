//! Packed matrices as bytes: written to files, read where a mapping has them, moved together.

use std::{io, ops::Range, sync::Arc};

use memmap2::Mmap;
use moerun_types::NumberFormat;

use super::PackedMatrix;
use crate::lines::{LINE_BYTES, Lines, ReadMapped};

/// Why a part of a mapping is no packed matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum MappedError {
    /// Packed words are little-endian.
    #[error("packed matrices cannot be mapped on a big-endian machine")]
    BigEndian,
    #[error("wanted {wanted} bytes for {format} [{rows}, {cols}], found {found}")]
    Length {
        format: NumberFormat,
        rows: usize,
        cols: usize,
        wanted: u64,
        found: u64,
    },
    #[error("wanted a matrix that begins at a multiple of 64 bytes, found one at {start}")]
    Alignment { start: usize },
    #[error("wanted at most {len} bytes of the mapping, found {end}")]
    Outside { end: usize, len: usize },
}

impl PackedMatrix {
    /// The matrix whose panels, as [`PackedMatrix::as_bytes`] gives them, are the bytes `bytes` of `map`, which stays
    /// mapped as long as it is used. The panels are not looked at: any bytes are some matrix.
    pub fn from_mapped(
        format: NumberFormat,
        rows: usize,
        cols: usize,
        map: &Arc<Mmap>,
        bytes: Range<usize>,
    ) -> Result<Self, MappedError> {
        if cfg!(target_endian = "big") {
            return Err(MappedError::BigEndian);
        }
        let (wanted, found) = (Self::packed_bytes(format, rows, cols), bytes.len() as u64);
        if wanted != found {
            return Err(MappedError::Length {
                format,
                rows,
                cols,
                wanted,
                found,
            });
        }
        if !bytes.start.is_multiple_of(LINE_BYTES) {
            return Err(MappedError::Alignment { start: bytes.start });
        }
        if bytes.end > map.len() {
            return Err(MappedError::Outside {
                end: bytes.end,
                len: map.len(),
            });
        }
        Ok(PackedMatrix {
            format,
            rows,
            cols,
            lines: Lines::mapped(Arc::clone(map), bytes),
        })
    }

    /// The panels, one after another, in this machine's byte order.
    pub fn as_bytes(&self) -> &[u8] {
        bytemuck::cast_slice(self.lines.as_slice())
    }

    /// Whether the panels are part of a mapping that others share.
    pub fn is_mapped(&self) -> bool {
        self.lines.is_mapped()
    }

    /// Moves matrices into one piece of memory of this process, on huge pages where the kernel allows: many small
    /// matrices share them, and mapped ones leave their file. `read` fetches bytes of a mapping from a place on, as
    /// `pread` does faster than a mapping that was not touched yet. Where the system has no such memory, or on an error of
    /// `read`, they stay as they are.
    pub fn gather(matrices: &mut [&mut PackedMatrix], read: ReadMapped<'_>) -> io::Result<()> {
        let parts: Vec<_> = matrices.iter().map(|matrix| &matrix.lines).collect();
        if let Some(gathered) = Lines::gathered(&parts, read)? {
            for (matrix, lines) in matrices.iter_mut().zip(gathered) {
                matrix.lines = lines;
            }
        }
        Ok(())
    }
}
