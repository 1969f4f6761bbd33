//! Which aggregator a bucket belongs to: rendezvous hashing, the same on every host.
//!
//! Every host ranks the aggregators of its list for its own bucket by a hash of both, sends to the first, and moves to
//! the next when that one is silent. Taking an aggregator out moves only the buckets that were its own, evenly over the
//! others, and putting it back moves just those home. Nobody coordinates: an aggregator takes what comes.
//!
//! Aggregators are named by the address that hosts send to, since that is what a host's settings hold.

use alloc::vec::Vec;
use core::net::{IpAddr, SocketAddr};

use crate::id::BucketId;

/// The weight of one aggregator for one bucket: the highest owns it.
#[must_use]
pub fn weight(bucket: BucketId, aggregator: SocketAddr) -> u64 {
    let ip = match aggregator.ip() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    let mut said = [0; 20];
    said[..16].copy_from_slice(&ip);
    said[16..18].copy_from_slice(&aggregator.port().to_le_bytes());
    said[18..].copy_from_slice(&bucket.0.to_le_bytes());
    let hash = blake3::hash(&said);
    let (first, _) = hash.as_bytes().split_first_chunk::<8>().unwrap_or((&[0; 8], &[]));
    u64::from_le_bytes(*first)
}

/// The aggregators in the order in which hosts of `bucket` try them.
#[must_use]
pub fn ranked(bucket: BucketId, aggregators: &[SocketAddr]) -> Vec<SocketAddr> {
    let mut ranked = aggregators.to_vec();
    // Equal weights are ordered by address, so that two lists in other orders agree.
    ranked.sort_by_key(|&aggregator| (core::cmp::Reverse(weight(bucket, aggregator)), aggregator));
    ranked.dedup();
    ranked
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::BUCKETS;

    fn aggregators(count: u8) -> Vec<SocketAddr> {
        (1..=count).map(|at| SocketAddr::from(([10, 0, 0, at], 7_400))).collect()
    }

    #[test]
    fn a_lost_aggregator_moves_only_its_own_buckets_and_evenly() {
        let (all, lost) = (aggregators(5), 2);
        let mut left = all.clone();
        let lost = left.remove(lost);
        let mut inherited = [0u32; 5];
        for bucket in (0..BUCKETS).map(BucketId) {
            let (before, after) = (ranked(bucket, &all), ranked(bucket, &left));
            if before[0] == lost {
                assert_eq!(after[0], before[1], "the next one inherits");
                inherited[all.iter().position(|one| *one == after[0]).unwrap()] += 1;
            } else {
                assert_eq!(after[0], before[0], "the others stay");
            }
        }
        let total: u32 = inherited.iter().sum();
        assert!((600..1_040).contains(&total), "about a fifth of 4,096: {total}");
        assert!(inherited.iter().filter(|&&count| count > 140).count() == 4, "{inherited:?}");
    }

    #[test]
    fn the_order_of_the_list_does_not_matter() {
        let forward = aggregators(4);
        let backward: Vec<_> = forward.iter().rev().copied().collect();
        for bucket in (0..BUCKETS).step_by(97).map(BucketId) {
            assert_eq!(ranked(bucket, &forward), ranked(bucket, &backward));
        }
    }
}
