//! Zeroed memory in cache lines, the unit in which panels and pages are laid out.

/// Output rows of a panel, keys of a tile, f32 of a register: the width of every kernel.
pub(crate) const LANES: usize = 16;

/// One cache line: a word per lane.
pub(crate) type Line = [u32; LANES];

const LINE_BYTES: usize = size_of::<Line>();

/// Zeroed lines that start on a cache line border. Memory is touched only when written.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    // Over-allocated and cut to size: an allocator asked for aligned zeroes would write them all.
    words: Vec<u32>,
    first_word: usize,
    len: usize,
}

impl Lines {
    /// `len` lines of zeroes.
    pub(crate) fn zeroed(len: usize) -> Self {
        let words = len
            .checked_mul(LANES)
            .and_then(|words| words.checked_add(LANES - 1))
            .expect("fits the address space");
        let words = vec![0_u32; words];
        let first_word = words.as_ptr().align_offset(LINE_BYTES).min(LANES - 1);
        Self { words, first_word, len }
    }

    /// The lines.
    #[inline(always)]
    pub(crate) fn as_slice(&self) -> &[Line] {
        self.words[self.first_word..self.first_word + self.len * LANES]
            .as_chunks()
            .0
    }

    /// The lines, to be written.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [Line] {
        self.words[self.first_word..self.first_word + self.len * LANES]
            .as_chunks_mut()
            .0
    }

    /// Bytes of all lines.
    pub(crate) fn bytes(&self) -> usize {
        self.len * LINE_BYTES
    }
}

impl Clone for Lines {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.len);
        copy.as_mut_slice().copy_from_slice(self.as_slice());
        copy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_zero_and_aligned_and_a_copy_is_equal() {
        for len in [0, 1, 3, 100_000] {
            let mut lines = Lines::zeroed(len);
            assert_eq!(lines.as_slice().len(), len);
            assert!(lines.as_slice().iter().flatten().all(|&word| word == 0));
            assert!(len == 0 || lines.as_slice().as_ptr().addr().is_multiple_of(LINE_BYTES));
            for (index, line) in lines.as_mut_slice().iter_mut().enumerate() {
                line[index % LANES] = index as u32;
            }
            let copy = lines.clone();
            assert_eq!(copy.as_slice(), lines.as_slice());
            assert!(len == 0 || copy.as_slice().as_ptr().addr().is_multiple_of(LINE_BYTES));
        }
    }
}
