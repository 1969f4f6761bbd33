//! Proofs: some pages of a run of bytes, with the hashes that it takes to check them against the hash of the whole run.
//!
//! BLAKE3 hashes a tree. Whoever has a run can tell the hashes of its subtrees; whoever has a few pages, the hashes of the
//! subtrees that have none of them, and the hash of the run, can compute the root again and believe the pages. So a boot
//! pack, which any host of a fleet may write, cannot make anybody read other bytes than the image has. Left out: which
//! pages of which run; `boot` says that.

use std::ops::Range;

use blake3::hazmat::{
    HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root,
};

use crate::id::Hash;

/// What is proven as one: a page.
pub(crate) const GROUP: usize = 4096;

/// Whether ranges can be proven: not empty, in order, apart from each other, and on the bounds of groups.
fn are_provable(ranges: &[Range<usize>], len: usize) -> bool {
    let mut at = 0;
    ranges.iter().all(|range| {
        let good = range.start >= at
            && range.end > range.start
            && range.start.is_multiple_of(GROUP)
            && (range.end == len || range.end.is_multiple_of(GROUP) && range.end < len);
        at = range.end;
        good
    }) && !ranges.is_empty()
}

/// How much of `start..start + len` the ranges cover.
enum Cover {
    None,
    Some,
    All,
}

fn cover(ranges: &[Range<usize>], start: usize, len: usize) -> Cover {
    let end = start + len;
    let mut covered = 0;
    for range in ranges {
        covered += range.end.min(end).saturating_sub(range.start.max(start));
    }
    match covered {
        0 => Cover::None,
        n if n == len => Cover::All,
        _ => Cover::Some,
    }
}

fn subtree(key: &Hash, start: usize, bytes: &[u8]) -> Hash {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.set_input_offset(start as u64).update(bytes).finalize_non_root()
}

fn left_of(len: usize) -> usize {
    usize::try_from(left_subtree_len(len as u64)).unwrap_or(len)
}

/// The hashes that go with `ranges` of `bytes`. Ranges lie on the bounds of groups or end with the bytes.
pub(crate) fn prove(key: &Hash, bytes: &[u8], ranges: &[Range<usize>]) -> Vec<Hash> {
    debug_assert!(are_provable(ranges, bytes.len()));
    let mut out = Vec::new();
    collect(key, bytes, 0, ranges, &mut out);
    out
}

fn collect(key: &Hash, bytes: &[u8], start: usize, ranges: &[Range<usize>], out: &mut Vec<Hash>) {
    match cover(ranges, start, bytes.len()) {
        Cover::All => {}
        Cover::None => out.push(subtree(key, start, bytes)),
        Cover::Some => {
            let (left, right) = bytes.split_at(left_of(bytes.len()));
            collect(key, left, start, ranges, out);
            collect(key, right, start + left.len(), ranges, out);
        }
    }
}

/// What is being checked: pages and hashes are used up from front to back.
struct Check<'a> {
    key: &'a Hash,
    ranges: &'a [Range<usize>],
    pages: &'a [u8],
    proof: &'a [Hash],
}

impl Check<'_> {
    fn subtree(&mut self, start: usize, len: usize) -> Option<Hash> {
        match cover(self.ranges, start, len) {
            Cover::All => {
                let (bytes, rest) = self.pages.split_at_checked(len)?;
                self.pages = rest;
                Some(subtree(self.key, start, bytes))
            }
            Cover::None => {
                let (hash, rest) = self.proof.split_first()?;
                self.proof = rest;
                Some(*hash)
            }
            Cover::Some => {
                let left_len = left_of(len);
                let left = self.subtree(start, left_len)?;
                let right = self.subtree(start + left_len, len - left_len)?;
                Some(merge_subtrees_non_root(&left, &right, Mode::KeyedHash(self.key)))
            }
        }
    }
}

/// Whether `pages`, one range after another, are these ranges of the run of `len` bytes whose hash is `hash`.
///
/// The length is proven only where the last group is among the ranges: two lengths may give the same tree elsewhere.
pub(crate) fn holds(
    key: &Hash,
    hash: &Hash,
    len: usize,
    ranges: &[Range<usize>],
    pages: &[u8],
    proof: &[Hash],
) -> bool {
    if !are_provable(ranges, len) {
        return false;
    }
    if matches!(cover(ranges, 0, len), Cover::All) {
        return pages.len() == len
            && proof.is_empty()
            && blake3::keyed_hash(key, pages).as_bytes() == hash;
    }
    let mut check = Check { key, ranges, pages, proof };
    let left_len = left_of(len);
    let both = check.subtree(0, left_len).zip(check.subtree(left_len, len - left_len));
    both.is_some_and(|(left, right)| {
        check.pages.is_empty()
            && check.proof.is_empty()
            && merge_subtrees_root(&left, &right, Mode::KeyedHash(key)).as_bytes() == hash
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        blake3::Hasher::new().update(b"run").finalize_xof().fill(&mut out);
        out
    }

    fn ranges_of(groups: &[bool], len: usize) -> Vec<Range<usize>> {
        let count = len.div_ceil(GROUP);
        let mut out: Vec<Range<usize>> = Vec::new();
        for n in (0..count).filter(|n| groups[n % groups.len()]) {
            let (start, end) = (n * GROUP, (n * GROUP + GROUP).min(len));
            match out.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => out.push(start..end),
            }
        }
        out
    }

    proptest! {
        #[test]
        fn true_pages_pass_and_changed_ones_do_not(
            len in 1usize..300_000,
            groups in proptest::collection::vec(any::<bool>(), 1..40),
            flip: usize,
        ) {
            let (key, bytes) = ([3; 32], run(len));
            let ranges = ranges_of(&groups, len);
            prop_assume!(!ranges.is_empty());
            let hash = *blake3::keyed_hash(&key, &bytes).as_bytes();
            let proof = prove(&key, &bytes, &ranges);
            let mut pages: Vec<u8> =
                ranges.iter().flat_map(|range| bytes[range.clone()].to_vec()).collect();
            prop_assert!(holds(&key, &hash, len, &ranges, &pages, &proof));
            let at = flip % pages.len();
            pages[at] ^= 1;
            prop_assert!(!holds(&key, &hash, len, &ranges, &pages, &proof));
            pages[at] ^= 1;
            prop_assert!(!holds(&key, &hash, len, &ranges, &pages[1..], &proof));
            let mut more = proof.clone();
            more.push([0; 32]);
            prop_assert!(!holds(&key, &hash, len, &ranges, &pages, &more));
            // With the last group, another length does not pass.
            if ranges.last().is_some_and(|range| range.end == len) && len > 1 {
                let mut short = ranges.clone();
                let last = short.last_mut().unwrap();
                last.end -= 1;
                prop_assume!(last.end > last.start);
                let pages = &pages[..pages.len() - 1];
                prop_assert!(!holds(&key, &hash, len - 1, &short, pages, &proof));
            }
        }
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "lists of ranges, some of one")]
    fn ranges_that_are_none_are_refused() {
        let hash = *blake3::keyed_hash(&[0; 32], &run(10_000)).as_bytes();
        for bad in [vec![], vec![0..0], vec![1..4096], vec![0..20_000], vec![4096..8192, 0..4096]] {
            let pages = vec![0; bad.iter().map(ExactSizeIterator::len).sum()];
            assert!(!holds(&[0; 32], &hash, 10_000, &bad, &pages, &[]), "{bad:?}");
        }
    }
}
