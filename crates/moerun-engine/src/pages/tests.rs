//! The pool against a plain model of it: what each owner has, and what each page holds.

use std::collections::{HashMap, HashSet};

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::page_hash::{PageHashes, RopeSet};

/// Names of `count` pages of a text; texts share no page unless they are the same.
fn names(text: u32, count: usize) -> Vec<PageHash> {
    let tokens: Vec<u32> = vec![text; count * KV_PAGE_TOKENS];
    PageHashes::new(RopeSet::Short).of_full_pages(&tokens).to_vec()
}

/// One owner: a text, its pages, and how many of them are full.
#[derive(Default)]
struct Owner {
    text: u32,
    pages: Vec<u32>,
    full: usize,
}

#[test]
fn no_page_is_lost_or_written_while_another_reads_it() {
    let mut shared = 0;
    for seed in 0..100 {
        let context = format!("seed {seed}");
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let total = rng.random_range(1..40);
        let mut pool = PagePool::new(total);
        let mut owners: Vec<Owner> = (0..6).map(|_| Owner::default()).collect();
        let mut content: HashMap<u32, PageHash> = HashMap::new(); // what was written to each page last
        for _ in 0..400 {
            let owner = rng.random_range(0..owners.len());
            let Owner { text, pages, full } = &mut owners[owner];
            match rng.random_range(0..4) {
                0 => {
                    pool.give_back(pages);
                    (*text, *full) = (rng.random_range(0..4), 0);
                    let found = pool.find(&names(*text, rng.random_range(0..8)));
                    for (page, name) in found.iter().zip(names(*text, 8)) {
                        assert_eq!(content[page], name, "{context}: another page than was named");
                    }
                    shared += found.iter().filter(|&&page| !pool.is_free(page)).count();
                    pool.share(&found);
                    (*full, *pages) = (found.len(), found);
                }
                1 | 2 => {
                    let (count, free) = (rng.random_range(0..6), pool.num_free());
                    let before = pages.clone();
                    assert_eq!(pool.take(count, pages), count <= free, "{context}");
                    assert_eq!(pages.len(), before.len() + if count <= free { count } else { 0 });
                    assert!(pages.starts_with(&before), "{context}");
                }
                _ => {
                    for (page, name) in pages.iter().zip(names(*text, pages.len())).skip(*full) {
                        content.insert(*page, name);
                        pool.name(*page, name);
                    }
                    *full = pages.len();
                }
            }
            check(&pool, &owners, &content, &context);
        }
        owners.iter_mut().for_each(|owner| pool.give_back(&mut owner.pages));
        assert_eq!(pool.num_used(), 0, "{context}");
        let mut all = Vec::new();
        assert!(pool.take(total as usize, &mut all), "{context}: a page was lost");
        assert_eq!(pool.num_idle(), 0, "{context}");
    }
    assert!(shared > 100, "the seeds must make owners share pages: {shared}");
}

fn check(pool: &PagePool, owners: &[Owner], content: &HashMap<u32, PageHash>, context: &str) {
    let mut owned: HashMap<u32, u32> = HashMap::new();
    for owner in owners {
        for (index, (page, name)) in owner.pages.iter().zip(names(owner.text, owner.pages.len())).enumerate() {
            *owned.entry(*page).or_default() += 1;
            if index < owner.full {
                assert_eq!(content[page], name, "{context}: overwritten");
            }
        }
        for page in owner.pages.iter().skip(owner.full) {
            assert_eq!(
                pool.pages[*page as usize].owners, 1,
                "{context}: shared before it is full"
            );
        }
        assert_eq!(owner.pages.iter().collect::<HashSet<_>>().len(), owner.pages.len());
    }
    for (number, page) in (0..).zip(&pool.pages) {
        assert_eq!(
            page.owners,
            owned.get(&number).copied().unwrap_or(0),
            "{context}: page {number}"
        );
    }
    assert_eq!(owned.len(), pool.num_used(), "{context}");
    let named = pool.pages.iter().filter(|page| page.name.is_some()).count();
    assert_eq!(named, pool.named.len(), "{context}: a name without its page");
}

#[test]
fn untouched_pages_are_used_last() {
    let mut pool = PagePool::new(8);
    let mut pages = Vec::new();
    assert!(pool.take(3, &mut pages));
    assert_eq!(pages, [0, 1, 2]);
    pool.give_back(&mut pages);
    assert!(pool.take(4, &mut pages));
    assert_eq!(pages, [0, 1, 2, 3]);
}

#[test]
fn the_longest_idle_is_given_up_first_and_a_sequences_end_before_its_beginning() {
    let mut pool = PagePool::new(4);
    let (old, new) = (names(1, 2), names(2, 2));
    let mut owners = [Vec::new(), Vec::new()];
    for (pages, names) in owners.iter_mut().zip([&old, &new]) {
        assert!(pool.take(2, pages));
        (0..2).for_each(|index| pool.name(pages[index], names[index]));
    }
    owners.iter_mut().for_each(|pages| pool.give_back(pages));
    assert_eq!((pool.num_free(), pool.num_idle()), (4, 4));
    let found = pool.find(&old);
    pool.share(&found); // used again: now the other is the older one
    pool.give_back(&mut found.clone());
    let mut taken = Vec::new();
    for known in [(2, 1), (2, 0), (1, 0), (0, 0)] {
        assert!(pool.take(1, &mut taken));
        assert_eq!((pool.find(&old).len(), pool.find(&new).len()), known);
    }
    assert!(!pool.take(1, &mut taken));
}

#[test]
fn a_page_in_use_is_never_given_up() {
    let mut pool = PagePool::new(2);
    let name = names(1, 1)[0];
    let (mut first, mut third) = (Vec::new(), Vec::new());
    assert!(pool.take(1, &mut first));
    pool.name(first[0], name);
    let mut second = first.clone();
    pool.share(&second);
    pool.give_back(&mut first);
    assert!(!pool.take(2, &mut third), "one has an owner still");
    pool.give_back(&mut second);
    assert!(pool.take(2, &mut third));
    assert!(pool.find(&[name]).is_empty());
}

#[test]
fn a_page_holds_as_many_tokens_as_a_tile() {
    assert_eq!(pages_for(0), 0);
    assert_eq!(pages_for(1), 1);
    assert_eq!(pages_for(KV_PAGE_TOKENS), 1);
    assert_eq!(pages_for(KV_PAGE_TOKENS + 1), 2);
}
