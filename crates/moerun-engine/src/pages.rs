//! Who has which page of the KV cache, and which pages hold what a request may begin with.

use std::collections::{BTreeMap, HashMap};

use moerun_kernels::KV_PAGE_TOKENS;

use crate::page_hash::PageHash;

/// Pages that hold the keys and values of `tokens` tokens.
pub(crate) fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(KV_PAGE_TOKENS)
}

/// Hands out pages. A page has one owner, who fills it; once full and named it may have more, and is only read. A named
/// page that nobody has any more keeps what it holds until its room is needed.
#[derive(Debug)]
pub(crate) struct PagePool {
    /// By number.
    pages: Vec<Page>,
    /// Pages without owner and name. A stack: pages used last are used first, so memory that was never written stays
    /// untouched.
    blank: Vec<u32>,
    /// Pages with a name and without owner, by the time they lost the last one: the first is given up first.
    idle: BTreeMap<u64, u32>,
    named: HashMap<PageHash, u32>,
    /// Counts the pages that became idle.
    time: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Page {
    owners: u32,
    name: Option<PageHash>,
    /// Key in [`PagePool::idle`] if it has a name and no owner.
    idle_since: u64,
}

impl PagePool {
    /// All of `0..num_pages` are blank.
    pub(crate) fn new(num_pages: u32) -> Self {
        Self {
            pages: vec![Page::default(); num_pages as usize],
            blank: (0..num_pages).rev().collect(),
            idle: BTreeMap::new(),
            named: HashMap::new(),
            time: 0,
        }
    }

    /// Appends `count` pages to `pages`, whose only owner the caller becomes, or none of them if fewer are without an
    /// owner; says whether it did. Blank pages go first, then those idle for longest.
    pub(crate) fn take(&mut self, count: usize, pages: &mut Vec<u32>) -> bool {
        if count > self.num_free() {
            return false;
        }
        for _ in 0..count {
            let page = self.blank.pop().or_else(|| self.forget_oldest());
            let page = page.expect("pages were counted above");
            self.pages[page as usize].owners = 1;
            pages.push(page);
        }
        true
    }

    fn forget_oldest(&mut self) -> Option<u32> {
        let (_, page) = self.idle.pop_first()?;
        let name = self.pages[page as usize].name.take();
        self.named.remove(&name.expect("an idle page has a name"));
        Some(page)
    }

    /// Makes the caller one owner less of all of `pages`, which are in the order of a sequence.
    pub(crate) fn give_back(&mut self, pages: &mut Vec<u32>) {
        #[cfg(feature = "planted-violations")]
        if pages.len() > 1 && std::env::var("MOERUN_PLANT").as_deref() == Ok("leaked-block") {
            pages.pop();
        }
        // Backwards, so that a sequence's last pages are given up before those that they build on.
        for number in pages.drain(..).rev() {
            let page = &mut self.pages[number as usize];
            page.owners -= 1;
            match (page.owners, page.name) {
                (0, None) => self.blank.push(number),
                (0, Some(_)) => {
                    page.idle_since = self.time;
                    self.idle.insert(self.time, number);
                    self.time += 1;
                }
                _ => {}
            }
        }
    }

    /// Names a full page of the caller's, which is never written again. A page whose like is known already stays
    /// without a name.
    pub(crate) fn name(&mut self, page: u32, name: PageHash) {
        debug_assert!(self.pages[page as usize].owners > 0, "only an owner names a page");
        debug_assert!(self.pages[page as usize].name.is_none(), "a page is named once");
        self.named.entry(name).or_insert_with(|| {
            self.pages[page as usize].name = Some(name);
            page
        });
    }

    /// The pages of the longest prefix of `names` that is known.
    pub(crate) fn find(&self, names: &[PageHash]) -> Vec<u32> {
        names.iter().map_while(|name| self.named.get(name).copied()).collect()
    }

    /// Makes the caller one more owner of all of `pages`, which were just found.
    pub(crate) fn share(&mut self, pages: &[u32]) {
        for &number in pages {
            let page = &mut self.pages[number as usize];
            if page.owners == 0 {
                self.idle.remove(&page.idle_since);
            }
            page.owners += 1;
        }
    }

    /// Whether nobody has `page`.
    pub(crate) fn is_free(&self, page: u32) -> bool {
        self.pages[page as usize].owners == 0
    }

    /// Pages that nobody has.
    pub(crate) fn num_free(&self) -> usize {
        self.blank.len() + self.idle.len()
    }

    /// Pages that nobody has and that hold what a request may begin with.
    pub(crate) fn num_idle(&self) -> usize {
        self.idle.len()
    }

    /// Pages that somebody has.
    pub(crate) fn num_used(&self) -> usize {
        self.total() - self.num_free()
    }

    /// All pages.
    pub(crate) fn total(&self) -> usize {
        self.pages.len()
    }
}

#[cfg(test)]
mod tests;
