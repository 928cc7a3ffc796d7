//! Memory in cache lines, the unit in which panels and pages are laid out: the process' own, or a part of a mapping.

use std::{io, ops::Range, sync::Arc};

use memmap2::{Mmap, MmapMut};

/// Output rows of a panel, keys of a tile, f32 of a register: the width of every kernel.
pub(crate) const LANES: usize = 16;

/// One cache line: a word per lane.
pub(crate) type Line = [u32; LANES];

pub(crate) const LINE_BYTES: usize = size_of::<Line>();

/// A huge page of this architecture's usual size; smaller lines live on the heap.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Reads bytes of a mapping from a place on: from the mapping itself, or from the file behind it.
pub type ReadMapped<'a> = &'a mut dyn FnMut(&Arc<Mmap>, usize, &mut [u8]) -> io::Result<()>;

/// Lines that start on a cache line border.
#[derive(Debug)]
pub(crate) struct Lines {
    memory: Memory,
    first_byte: usize,
    len: usize,
}

#[derive(Debug)]
enum Memory {
    // Over-allocated and cut to size: an allocator asked for aligned zeroes would write them all.
    Heap(Vec<u32>),
    /// Pages of their own, huge ones where the kernel allows.
    Pages(MmapMut),
    /// Part of a mapping that others share: never written.
    Mapped(Arc<Mmap>),
}

impl Lines {
    /// `len` lines of zeroes. Memory is touched only when written.
    pub(crate) fn zeroed(len: usize) -> Self {
        let bytes = len
            .checked_mul(LINE_BYTES)
            .and_then(|bytes| bytes.checked_add(LINE_BYTES))
            .expect("fits the address space");
        if bytes > HUGE_PAGE_BYTES
            && let Some((pages, first_byte)) = huge_pages(len * LINE_BYTES)
        {
            let memory = Memory::Pages(pages);
            return Self {
                memory,
                first_byte,
                len,
            };
        }
        let words = vec![0_u32; bytes / size_of::<u32>() - 1];
        let first_word = words.as_ptr().align_offset(LINE_BYTES).min(LANES - 1);
        Self {
            memory: Memory::Heap(words),
            first_byte: first_word * size_of::<u32>(),
            len,
        }
    }

    /// The lines at `bytes` of `map`, which are within it, a whole number of lines and on a border of lines.
    pub(crate) fn mapped(map: Arc<Mmap>, bytes: Range<usize>) -> Self {
        let lines = Self {
            memory: Memory::Mapped(map),
            first_byte: bytes.start,
            len: bytes.len() / LINE_BYTES,
        };
        assert_eq!(lines.as_slice().len() * LINE_BYTES, bytes.len(), "whole lines");
        lines
    }

    /// Copies of `parts`, one after another in one mapping of their own; `None` where the system gives none. What is
    /// mapped is fetched by `read`, with its mapping and the place there of its first byte.
    pub(crate) fn gathered(parts: &[&Lines], read: ReadMapped<'_>) -> io::Result<Option<Vec<Lines>>> {
        let bytes = parts.iter().map(|part| part.bytes()).sum();
        let Some((mut pages, first_byte)) = huge_pages(bytes) else {
            return Ok(None);
        };
        let mut end = first_byte;
        let mut places = Vec::with_capacity(parts.len());
        for part in parts {
            let place = end..end + part.bytes();
            let out = &mut pages[place.clone()];
            match &part.memory {
                Memory::Mapped(map) => read(map, part.first_byte, out)?,
                Memory::Heap(_) | Memory::Pages(_) => out.copy_from_slice(bytemuck::cast_slice(part.as_slice())),
            }
            end = place.end;
            places.push(place);
        }
        let Ok(map) = pages.make_read_only().map(Arc::new) else {
            return Ok(None);
        };
        let lines = |place| Self::mapped(Arc::clone(&map), place);
        Ok(Some(places.into_iter().map(lines).collect()))
    }

    /// Some of the lines: shared where they are mapped, else copied.
    pub(crate) fn part(&self, lines: Range<usize>) -> Self {
        if let Memory::Mapped(map) = &self.memory {
            let start = self.first_byte + lines.start * LINE_BYTES;
            return Self::mapped(Arc::clone(map), start..start + lines.len() * LINE_BYTES);
        }
        Self::copy_of(&self.as_slice()[lines])
    }

    fn copy_of(lines: &[Line]) -> Self {
        let mut copy = Self::zeroed(lines.len());
        copy.as_mut_slice().copy_from_slice(lines);
        copy
    }

    /// Whether the lines are part of a shared mapping.
    pub(crate) fn is_mapped(&self) -> bool {
        matches!(self.memory, Memory::Mapped(_))
    }

    /// The lines.
    #[inline(always)]
    pub(crate) fn as_slice(&self) -> &[Line] {
        let bytes: &[u8] = match &self.memory {
            Memory::Heap(words) => bytemuck::cast_slice(words),
            Memory::Pages(pages) => pages,
            Memory::Mapped(map) => map,
        };
        bytemuck::cast_slice(&bytes[self.first_byte..self.first_byte + self.len * LINE_BYTES])
    }

    /// The lines, to be written; mapped ones are copied first.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [Line] {
        if self.is_mapped() {
            *self = Self::copy_of(self.as_slice());
        }
        let bytes: &mut [u8] = match &mut self.memory {
            Memory::Heap(words) => bytemuck::cast_slice_mut(words),
            Memory::Pages(pages) => pages,
            Memory::Mapped(_) => unreachable!("copied above"),
        };
        bytemuck::cast_slice_mut(&mut bytes[self.first_byte..self.first_byte + self.len * LINE_BYTES])
    }

    /// Bytes of all lines.
    pub(crate) fn bytes(&self) -> usize {
        self.len * LINE_BYTES
    }
}

/// Zeroed pages for `bytes`, and where the first of them that may be huge begins.
fn huge_pages(bytes: usize) -> Option<(MmapMut, usize)> {
    let pages = MmapMut::map_anon(bytes.checked_add(HUGE_PAGE_BYTES)?).ok()?;
    // Advice: a kernel without huge pages goes on with small ones.
    #[cfg(target_os = "linux")]
    let _ = pages.advise(memmap2::Advice::HugePage);
    let first_byte = pages.as_ptr().align_offset(HUGE_PAGE_BYTES).min(HUGE_PAGE_BYTES);
    Some((pages, first_byte))
}

impl Default for Lines {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl Clone for Lines {
    fn clone(&self) -> Self {
        self.part(0..self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_zero_and_aligned_and_a_copy_is_equal() {
        for len in [0, 1, 3, HUGE_PAGE_BYTES / LINE_BYTES - 1, 100_000] {
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

    #[test]
    fn gathered_lines_are_equal_and_shared_until_they_are_written() {
        let mut first = Lines::zeroed(5);
        first.as_mut_slice()[4][3] = 7;
        let second = Lines::zeroed(40_000);
        let unmapped = &mut |_: &Arc<Mmap>, _, _: &mut [u8]| unreachable!("nothing is mapped");
        let gathered = Lines::gathered(&[&first, &second], unmapped).unwrap().expect("memory");
        assert_eq!(gathered[0].as_slice(), first.as_slice());
        assert_eq!(gathered[1].as_slice(), second.as_slice());
        let mut clone = gathered[0].clone();
        assert_eq!(clone.as_slice().as_ptr(), gathered[0].as_slice().as_ptr());
        clone.as_mut_slice()[0][0] = 1;
        assert!(!clone.is_mapped() && clone.as_slice()[4][3] == 7 && gathered[0].as_slice()[0][0] == 0);
        assert_eq!(gathered[0].part(4..5).as_slice(), &first.as_slice()[4..]);
    }
}
