//! What a full page of the cache holds, as a name: pages of one name hold the same bits.

use moerun_kernels::KV_PAGE_TOKENS;

/// Names the keys and values of a full page by everything that they follow from: BLAKE3 over the name of the page
/// before it and the page's own tokens; the first page's predecessor is the set of longrope factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct PageHash([u8; 32]);

/// Which longrope factors keys were turned with; a model without longrope knows only the short ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RopeSet {
    /// Those of sequences within the original context.
    Short,
    /// Those of longer ones.
    Long,
}

/// Names of a sequence's full pages, each computed once.
#[derive(Debug)]
pub(crate) struct PageHashes {
    rope: RopeSet,
    hashes: Vec<PageHash>,
}

impl PageHashes {
    /// None yet, of a sequence whose keys are turned with `rope`.
    pub(crate) fn new(rope: RopeSet) -> Self {
        Self {
            rope,
            hashes: Vec::new(),
        }
    }

    /// Forgets the names if they are of keys turned otherwise.
    pub(crate) fn set_rope(&mut self, rope: RopeSet) {
        if self.rope != rope {
            *self = Self::new(rope);
        }
    }

    /// Names of the pages that `tokens` fill, in order. `tokens` is a prefix of the sequence, whose tokens never change.
    pub(crate) fn of_full_pages(&mut self, tokens: &[u32]) -> &[PageHash] {
        let (pages, _) = tokens.as_chunks::<KV_PAGE_TOKENS>();
        for page in pages.iter().skip(self.hashes.len()) {
            let parent = self.hashes.last().copied().unwrap_or(root(self.rope));
            self.hashes.push(child(parent, page));
        }
        &self.hashes[..pages.len()]
    }
}

fn root(rope: RopeSet) -> PageHash {
    PageHash([rope as u8; 32])
}

fn child(parent: PageHash, tokens: &[u32; KV_PAGE_TOKENS]) -> PageHash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&parent.0);
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    PageHash(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_name_follows_from_everything_before_the_end_of_its_page() {
        let tokens: Vec<u32> = (0..3 * KV_PAGE_TOKENS as u32 + 5).collect();
        let names = PageHashes::new(RopeSet::Short).of_full_pages(&tokens).to_vec();
        assert_eq!(names.len(), 3);
        assert_eq!(names.iter().collect::<HashSet<_>>().len(), 3);
        for changed in 0..tokens.len() {
            let mut other = tokens.clone();
            other[changed] += 100;
            let others = PageHashes::new(RopeSet::Short).of_full_pages(&other).to_vec();
            for page in 0..3 {
                let differs = changed < (page + 1) * KV_PAGE_TOKENS;
                assert_eq!(names[page] != others[page], differs, "page {page}, token {changed}");
            }
        }
        let long = PageHashes::new(RopeSet::Long).of_full_pages(&tokens).to_vec();
        assert!(names.iter().all(|name| !long.contains(name)), "keys turned otherwise");
    }

    #[test]
    fn names_found_piece_by_piece_are_those_found_at_once() {
        let tokens: Vec<u32> = (0..100).map(|id| id * id).collect();
        let mut names = PageHashes::new(RopeSet::Short);
        assert_eq!(names.of_full_pages(&tokens[..40]).len(), 2);
        assert_eq!(names.of_full_pages(&tokens[..17]).len(), 1);
        let whole = PageHashes::new(RopeSet::Short).of_full_pages(&tokens).to_vec();
        assert_eq!(names.of_full_pages(&tokens), whole);
        names.set_rope(RopeSet::Short);
        assert_eq!(names.of_full_pages(&tokens), whole);
        names.set_rope(RopeSet::Long);
        assert_ne!(names.of_full_pages(&tokens), whole);
    }
}
