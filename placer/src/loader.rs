//! The map loader: from the object store to a private file that is mapped.
//!
//! It fetches the head and, when that names a newer map, the pages that the last map does not hold already; checks
//! everything (PROTOCOL 5.3), two pages at once as they arrive; writes one flat file and maps it. The file is synced and
//! renamed into place afterwards ([`Loader::settle`]), since a map is of use before the disk has it. Whatever goes wrong,
//! the last good map stays, over restarts too, and the reason has a name. A map is never too old to be used.
//!
//! A page counts as held if the last map's hosts in its range encode to the very digest: nothing but the map itself has to
//! be kept.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt};
use object_store::{
    GetOptions, GetResult, ObjectStore, ObjectStoreExt as _, path::Path as ObjectPath,
};
use placer_core::map;
use tempfile::NamedTempFile;
use wire::{
    HostId,
    codec::Malformed,
    limits::MAP_PAGE_HOSTS_MAX,
    map::{HEAD_BYTES_MAX, Head, HostAddr, MapVersion, Page, PageRef, path as names},
};

use crate::{Map, mapped::MappedBytes};

/// One request to the store.
const REQUEST: Duration = Duration::from_secs(20);
/// Pages under way at once.
const FETCHES: usize = 16;
/// Pages that are checked at once, on threads beside ours.
const CHECKS: usize = 2;
/// Bytes of the largest page: a head, and the widest rows.
const PAGE_BYTES_MAX: usize = 16 + MAP_PAGE_HOSTS_MAX * 26;
/// Bytes before a head's own.
const HEAD_DIGEST_BYTES: usize = 32;
const FILE: &str = "map";
/// How names of files begin that are not a restart's map yet.
const UNSETTLED: &str = "map.new.";

/// What a refresh found.
#[derive(Clone, Debug)]
pub enum Refresh {
    /// The map that we have is the newest.
    Unchanged,
    /// A newer map, and the pages that had to be fetched for it.
    Newer {
        /// The map.
        map: Arc<Map>,
        /// Pages that the last map did not hold.
        fetched: usize,
    },
}

/// Why a map was not taken. The last good one stays.
#[derive(Debug, thiserror::Error)]
pub enum NotTaken {
    /// Nothing is published.
    #[error("no map is published yet: heartbeatd publishes one with its first host")]
    NoHead,
    /// The store did not serve.
    #[error("the object store did not serve the map; the last good one stays: {0}")]
    Storage(object_store::Error),
    /// The store did not answer in time.
    #[error("the object store did not answer in {} s; the last good map stays", REQUEST.as_secs())]
    Slow,
    /// More bytes than the thing can have.
    #[error("{what} has more than {bytes_max} bytes; the last good map stays")]
    TooLong {
        /// What was read.
        what: &'static str,
        /// The most that it may have.
        bytes_max: usize,
    },
    /// The head's bytes are no head.
    #[error("the map's head does not check ({0}); the last good map stays")]
    Head(Malformed),
    /// An older map, or another of the same version, than ours.
    #[error("map {}.{} was offered and is older than ours, {}.{}: it is refused",
        offered.epoch, offered.version, held.epoch, held.version)]
    Older {
        /// What the head names.
        offered: MapVersion,
        /// What we have.
        held: MapVersion,
    },
    /// A page's bytes are not those that the head names.
    #[error("page {index} of map {}.{} does not check ({why}); the last good map stays",
        version.epoch, version.version)]
    Page {
        /// Which map.
        version: MapVersion,
        /// Which page of it.
        index: usize,
        /// By which rule.
        why: Malformed,
    },
    /// The private file could not be written or mapped.
    #[error("the map's file {} was not written; the last good map stays: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// Fetches maps. One a process; it holds the newest.
#[derive(Debug)]
pub struct Loader {
    store: Arc<dyn ObjectStore>,
    dir: PathBuf,
    e_tag: Option<String>,
    held: Option<Arc<Map>>,
    pages: Vec<PageRef>,
    unsettled: Option<NamedTempFile>,
}

/// Hosts of a page, ascending.
type PageHosts = Vec<(HostId, HostAddr)>;

impl Loader {
    /// A loader that keeps its map in `dir`, and takes up the one that is there.
    #[must_use]
    pub fn new(store: Arc<dyn ObjectStore>, dir: &Path) -> Self {
        let held = open_file(&dir.join(FILE)).ok().map(Arc::new);
        Self { store, dir: dir.to_owned(), e_tag: None, held, pages: Vec::new(), unsettled: None }
    }

    /// The newest good map.
    #[must_use]
    pub const fn held(&self) -> Option<&Arc<Map>> {
        self.held.as_ref()
    }

    /// Looks for a newer map and takes it. A restart finds it from the next [`Loader::settle`] on.
    ///
    /// # Errors
    /// [`NotTaken`]; then nothing has changed.
    pub async fn refresh(&mut self) -> Result<Refresh, NotTaken> {
        self.settle();
        let Some((bytes, e_tag)) = self.fetch_head().await? else {
            return Ok(Refresh::Unchanged);
        };
        let head = Head::from_bytes(&bytes).map_err(NotTaken::Head)?;
        if let Some(held) = self.held.as_ref().map(|map| map.version()) {
            if head.version < held {
                return Err(NotTaken::Older { offered: head.version, held });
            }
            if head.version == held {
                self.e_tag = e_tag;
                return Ok(Refresh::Unchanged);
            }
        }
        let (pages, fetched) = self.hosts_of(&head).await?;
        let map = Arc::new(self.keep(head.version, &pages)?);
        self.held = Some(Arc::clone(&map));
        self.pages = head.pages;
        // Only now: a map that was not taken is looked at again.
        self.e_tag = e_tag;
        Ok(Refresh::Newer { map, fetched })
    }

    /// The head's bytes, unless it is the one that we have seen.
    async fn fetch_head(&self) -> Result<Option<(Bytes, Option<String>)>, NotTaken> {
        let options = GetOptions { if_none_match: self.e_tag.clone(), ..GetOptions::default() };
        let path = ObjectPath::from(names::HEAD);
        match timely(self.store.get_opts(&path, options)).await? {
            Ok(got) => {
                let e_tag = got.meta.e_tag.clone();
                let bytes_max = HEAD_BYTES_MAX + HEAD_DIGEST_BYTES;
                Ok(Some((read(got, "the map's head", bytes_max).await?, e_tag)))
            }
            Err(object_store::Error::NotModified { .. }) => Ok(None),
            Err(object_store::Error::NotFound { .. }) => Err(NotTaken::NoHead),
            Err(error) => Err(NotTaken::Storage(error)),
        }
    }

    /// All hosts of a map by its pages, and how many of these had to be fetched.
    async fn hosts_of(&self, head: &Head) -> Result<(Vec<PageHosts>, usize), NotTaken> {
        let held: Vec<_> = head.pages.iter().map(|page| self.held_page(page)).collect();
        let missing = head.pages.iter().enumerate().filter(|(at, _)| held[*at].is_none());
        let missing: Vec<_> = missing.map(|(at, page)| (at, *page)).collect();
        let fetched = missing.len();
        let version = head.version;
        let mut pages: Vec<Option<PageHosts>> = held;
        let mut checked = futures::stream::iter(missing)
            .map(|(index, page)| async move { (index, page, self.fetch_page(&page).await) })
            .buffer_unordered(FETCHES)
            .map(|(index, named, bytes)| async move {
                let bytes = bytes?;
                let check = move || Page::parse(&bytes, &named).map(|page| page.hosts().collect());
                let hosts = tokio::task::spawn_blocking(check).await;
                // The check does not panic; and nothing is taken that was not checked.
                let hosts = hosts.unwrap_or(Err(Malformed::Value));
                hosts.map(|hosts| (index, hosts)).map_err(|why| NotTaken::Page {
                    version,
                    index,
                    why,
                })
            })
            .buffer_unordered(CHECKS);
        while let Some(page) = checked.next().await {
            let (index, hosts) = page?;
            pages[index] = Some(hosts);
        }
        drop(checked);
        Ok((pages.into_iter().flatten().collect(), fetched))
    }

    /// The hosts of a page if the last map holds exactly them.
    fn held_page(&self, named: &PageRef) -> Option<PageHosts> {
        let map = self.held.as_ref()?;
        let first = map.lower_bound(HostId(named.first));
        let hosts: Vec<_> = (first..map.len())
            .map(|at| (map.id(at), map.addr(at)))
            .take_while(|(host, _)| host.0 <= named.last)
            .take(MAP_PAGE_HOSTS_MAX + 1)
            .collect();
        if hosts.len() != named.count as usize {
            return None;
        }
        // Page and map were adopted together: no need to hash again.
        let known = self.pages.binary_search_by_key(&named.first, |page| page.first);
        if known.is_ok_and(|at| self.pages[at] == *named) {
            return Some(hosts);
        }
        (*blake3::hash(&Page::encode(&hosts)).as_bytes() == named.digest).then_some(hosts)
    }

    async fn fetch_page(&self, named: &PageRef) -> Result<Bytes, NotTaken> {
        let path = ObjectPath::from(names::page(&named.digest));
        let got = timely(self.store.get(&path)).await?.map_err(NotTaken::Storage)?;
        let bytes_max = PAGE_BYTES_MAX.min(named.bytes as usize);
        read(got, "a page of the map", bytes_max).await
    }

    /// Writes, maps and checks the file.
    fn keep(&mut self, version: MapVersion, pages: &[PageHosts]) -> Result<Map, NotTaken> {
        let written = || -> io::Result<(NamedTempFile, Map)> {
            // Mode 0600.
            let mut file = tempfile::Builder::new().prefix(UNSETTLED).tempfile_in(&self.dir)?;
            file.write_all(&map::encode_from(version, || pages.iter().flatten().copied()))?;
            let map = open_file(file.path())?;
            Ok((file, map))
        };
        let (file, map) =
            written().map_err(|error| NotTaken::File { path: self.dir.join(FILE), error })?;
        self.unsettled = Some(file);
        Ok(map)
    }

    /// Sees to it that a restart, of the machine too, finds the newest map. Call it once that is in use.
    pub fn settle(&mut self) {
        let Some(file) = self.unsettled.take() else { return };
        let path = self.dir.join(FILE);
        let settled = || -> io::Result<()> {
            file.as_file().sync_all()?;
            file.persist(&path).map_err(|error| error.error)?;
            // Of processes that were killed before they came here.
            for entry in std::fs::read_dir(&self.dir)?.flatten() {
                if entry.file_name().as_encoded_bytes().starts_with(UNSETTLED.as_bytes()) {
                    std::fs::remove_file(entry.path())?;
                }
            }
            std::fs::File::open(&self.dir)?.sync_all()
        };
        if let Err(error) = settled() {
            tracing::warn!(%error, path = %path.display(), "the map is in use, and a restart will not find it");
        }
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.settle();
    }
}

/// Maps and checks a file that was kept.
fn open_file(path: &Path) -> io::Result<Map> {
    let bytes = MappedBytes::open(path)?;
    Map::open(bytes).map_err(|why| io::Error::new(io::ErrorKind::InvalidData, why))
}

async fn timely<T>(request: impl Future<Output = T>) -> Result<T, NotTaken> {
    tokio::time::timeout(REQUEST, request).await.map_err(|_| NotTaken::Slow)
}

/// Reads an object, and stops at the first byte too many: a body may be endless.
async fn read(got: GetResult, what: &'static str, bytes_max: usize) -> Result<Bytes, NotTaken> {
    if got.meta.size > bytes_max as u64 {
        return Err(NotTaken::TooLong { what, bytes_max });
    }
    let whole = async {
        let mut bytes = BytesMut::new();
        let mut stream = got.into_stream();
        while let Some(chunk) = stream.try_next().await.map_err(NotTaken::Storage)? {
            if bytes.len() + chunk.len() > bytes_max {
                return Err(NotTaken::TooLong { what, bytes_max });
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes.freeze())
    };
    timely(whole).await?
}
