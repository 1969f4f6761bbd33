//! Builds the host map: pages by ranges of ids that halve where hosts are dense.
//!
//! Ranges are halves of halves of the id space. Where ids are spread evenly, as random ones are, that makes a power of
//! two of equal ranges; where they are not, only the dense part is cut finer. A range is cut above
//! [`PAGE_SPLIT_HOSTS`] and put together again only below [`PAGE_MERGE_HOSTS`], so that a host more or less
//! changes one page. The work of a build is the same whatever changed; only pages with a new digest have to be put.

use std::collections::BTreeSet;

use wire::{
    HostId,
    limits::{MAP_PAGE_HOSTS_MAX, MAP_PAGES_MAX},
    map::{Digest, HostAddr, Page, PageRef},
};

use crate::limits::{PAGE_MERGE_HOSTS, PAGE_SPLIT_HOSTS};

/// A page that readers may not have yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewPage {
    /// Its name.
    pub digest: Digest,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// What a build gives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Built {
    /// All pages, for the head.
    pub pages: Vec<PageRef>,
    /// Those that were not in the build before.
    pub new: Vec<NewPage>,
    /// Hosts in all pages.
    pub count: u64,
}

/// More hosts in one range than a page can hold, and no finer cut is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the map would need more than {MAP_PAGES_MAX} pages; it stays as it was; host ids must be random"
)]
pub struct TooDense;

/// Remembers how the ranges were cut, and which pages are known to be in the object store.
#[derive(Debug, Default)]
pub struct MapBuilder {
    cuts: BTreeSet<(u64, u64)>,
    known: BTreeSet<Digest>,
}

impl MapBuilder {
    /// A builder that knows no page.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the pages of the head that is published: they need not be put again, and cuts go on as they are.
    pub fn handle_published(&mut self, pages: &[PageRef]) {
        self.known = pages.iter().map(|page| page.digest).collect();
    }

    /// Builds the pages of `hosts`, which must ascend by id without repetition.
    ///
    /// # Errors
    /// [`TooDense`].
    ///
    /// # Panics
    /// If hosts do not ascend.
    pub fn build(&mut self, hosts: &[(HostId, HostAddr)]) -> Result<Built, TooDense> {
        assert!(hosts.is_sorted_by(|a, b| a.0 < b.0), "hosts ascend by id");
        let mut built = Built { count: hosts.len() as u64, ..Built::default() };
        let mut cuts = BTreeSet::new();
        self.cut(0, u64::MAX, hosts, &mut cuts, &mut built)?;
        self.cuts = cuts;
        Ok(built)
    }

    fn cut(
        &self,
        first: u64,
        last: u64,
        hosts: &[(HostId, HostAddr)],
        cuts: &mut BTreeSet<(u64, u64)>,
        built: &mut Built,
    ) -> Result<(), TooDense> {
        let was_cut = self.cuts.contains(&(first, last));
        let limit = if was_cut { PAGE_MERGE_HOSTS } else { PAGE_SPLIT_HOSTS };
        if hosts.len() > limit && first < last {
            let middle = first + (last - first) / 2;
            let (low, high) = hosts.split_at(hosts.partition_point(|(id, _)| id.0 <= middle));
            cuts.insert((first, last));
            self.cut(first, middle, low, cuts, built)?;
            return self.cut(middle + 1, last, high, cuts, built);
        }
        if built.pages.len() == MAP_PAGES_MAX || hosts.len() > MAP_PAGE_HOSTS_MAX {
            return Err(TooDense);
        }
        let bytes = Page::encode(hosts);
        let digest = *blake3::hash(&bytes).as_bytes();
        let (Ok(count), Ok(len)) = (u32::try_from(hosts.len()), u32::try_from(bytes.len())) else {
            return Err(TooDense);
        };
        built.pages.push(PageRef { first, last, count, bytes: len, digest });
        if !self.known.contains(&digest) {
            built.new.push(NewPage { digest, bytes });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use proptest::prelude::*;
    use rand::{RngCore, SeedableRng, rngs::SmallRng};
    use wire::map::{FORMAT, Head, MapVersion};

    use super::*;

    fn hosts(ids: impl IntoIterator<Item = u64>) -> Vec<(HostId, HostAddr)> {
        let addr = |id: u64| HostAddr {
            ip: IpAddr::V4(Ipv4Addr::from(u32::try_from(id >> 32).unwrap())),
            port: 7_000,
        };
        let ids: BTreeSet<u64> = ids.into_iter().collect();
        ids.into_iter().map(|id| (HostId(id), addr(id))).collect()
    }

    fn random(count: usize, seed: u64) -> Vec<(HostId, HostAddr)> {
        let mut rng = SmallRng::seed_from_u64(seed);
        hosts((0..count).map(|_| rng.next_u64()))
    }

    /// The head reads back, and its pages hold exactly `hosts`.
    fn check(built: &Built, pages: &[NewPage], hosts: &[(HostId, HostAddr)]) {
        let head = Head {
            format: FORMAT,
            version: MapVersion::default(),
            previous: MapVersion::default(),
            nonce: [0; 16],
            created_ms: 0,
            count: built.count,
            pages: built.pages.clone(),
        };
        let head = Head::from_bytes(&head.to_bytes()).unwrap();
        let mut read = Vec::new();
        for named in &head.pages {
            let page = pages.iter().find(|page| page.digest == named.digest).unwrap();
            read.extend(Page::parse(&page.bytes, named).unwrap().hosts());
        }
        assert_eq!(read, hosts);
    }

    #[test]
    fn even_ids_make_a_power_of_two_of_pages() {
        let hosts = random(150_000, 1);
        let built = MapBuilder::new().build(&hosts).unwrap();
        assert_eq!(built.pages.len(), 64);
        check(&built, &built.new, &hosts);
        let bytes: u64 = built.pages.iter().map(|page| u64::from(page.bytes)).sum();
        assert_eq!(bytes, 12 * 150_000 + 16 * 64, "12 bytes a host and the pages' heads");
    }

    #[test]
    fn one_host_more_changes_one_page() {
        let mut hosts = random(50_000, 2);
        let mut builder = MapBuilder::new();
        let built = builder.build(&hosts).unwrap();
        builder.handle_published(&built.pages);
        hosts.remove(25_000);
        let next = builder.build(&hosts).unwrap();
        assert_eq!(next.new.len(), 1);
        assert_eq!(next.pages.len(), built.pages.len());
    }

    #[test]
    fn a_fleet_about_a_split_does_not_flap() {
        let (low, high) = (random(PAGE_SPLIT_HOSTS, 3), random(PAGE_SPLIT_HOSTS + 1, 3));
        let mut builder = MapBuilder::new();
        assert_eq!(builder.build(&low).unwrap().pages.len(), 1);
        assert_eq!(builder.build(&high).unwrap().pages.len(), 2);
        assert_eq!(builder.build(&low).unwrap().pages.len(), 2);
        assert_eq!(builder.build(&low[..PAGE_MERGE_HOSTS]).unwrap().pages.len(), 1);
    }

    #[test]
    fn no_hosts_are_a_map_too() {
        let built = MapBuilder::new().build(&[]).unwrap();
        check(&built, &built.new, &[]);
    }

    proptest! {
        #[test]
        fn any_ids_at_all_make_a_map(
            dense in 0usize..6_000, start: u64, spread in 0usize..3_000, seed: u64,
        ) {
            let mut rng = SmallRng::seed_from_u64(seed);
            let dense = (0..dense as u64).map(|at| start.wrapping_add(at));
            let hosts = hosts(dense.chain((0..spread).map(|_| rng.next_u64())).collect::<Vec<_>>());
            let built = MapBuilder::new().build(&hosts).unwrap();
            check(&built, &built.new, &hosts);
        }
    }
}
