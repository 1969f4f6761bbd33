//! Sweeping: images that no name points at, and packs that no image points at, after a time of grace.
//!
//! A prepare may be under way that found a pack in an image which is removed now. So what is not needed is marked first, and
//! swept only by a later run that finds it still unneeded, with a mark older than the grace: every prepare that could have seen it has published or died
//! by then. All ages are by the store's own clock: the run writes an object, and looks at the date that the store gave it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutPayload};
use wire::ImageId;

use crate::id::{Hash, check_image_name};
use crate::store::{DomainStore, ImageError, image_path, name_path, pack_path};

/// How long a host's note holds that it uses an image. It renews them more often.
const USE_HOLDS: Duration = Duration::from_secs(24 * 3600);

/// What a sweep did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Swept {
    /// Images and packs that are needed.
    pub kept: u64,
    /// Those that are not, and wait for their grace to end.
    pub waiting: u64,
    /// Those that were removed.
    pub removed: u64,
    /// Bytes of the removed.
    pub removed_bytes: u64,
}

/// Removes a name. The image that it pointed at goes with the next sweeps, unless another name has it.
///
/// # Errors
/// [`ImageError::NotFound`] when there is no such name.
pub async fn remove_name(
    store: Arc<dyn ObjectStore>,
    domain: &str,
    name: &str,
) -> Result<(), ImageError> {
    let at = DomainStore::new(store, domain)?;
    check_image_name(name)?;
    at.resolve(name).await?;
    at.store.delete(&name_path(&at.domain, name)).await.map_err(ImageError::Store)
}

/// Sweeps a whole store: all domains, for packs do not say whose they are.
///
/// # Errors
/// Any error stops the sweep before it removes anything: what cannot be read may be needed.
pub async fn gc(store: Arc<dyn ObjectStore>, grace: Duration) -> Result<Swept, ImageError> {
    let now = clock(&store).await?.last_modified;
    let age = |meta: &ObjectMeta| (now - meta.last_modified).to_std().unwrap_or_default();
    let needed = needed(&store, |note| age(note) < USE_HOLDS).await?;
    let marks = list(&store, "gc/mark").await?;
    let marks: HashMap<Path, ObjectMeta> =
        marks.into_iter().map(|mark| (mark.location.clone(), mark)).collect();
    let old = |meta: &ObjectMeta| (now - meta.last_modified).to_std().is_ok_and(|age| age >= grace);
    let mut swept = Swept::default();
    let mut things = list(&store, "image").await?;
    things.extend(list(&store, "pack").await?);
    things.extend(list(&store, "boot").await?);
    for thing in things {
        let mark = Path::from(format!("gc/mark/{}", thing.location.as_ref().replace('/', "+")));
        let marked = marks.get(&mark);
        if needed.contains(&thing.location) {
            swept.kept += 1;
            if marked.is_some() {
                store.delete(&mark).await.map_err(ImageError::Store)?;
            }
        } else if marked.is_some_and(old) && old(&thing) {
            store.delete(&thing.location).await.map_err(ImageError::Store)?;
            store.delete(&mark).await.map_err(ImageError::Store)?;
            swept.removed += 1;
            swept.removed_bytes += thing.size;
        } else {
            if marked.is_none() {
                let put = store.put(&mark, PutPayload::default()).await;
                put.map_err(ImageError::Store)?;
            }
            swept.waiting += 1;
        }
    }
    Ok(swept)
}

async fn list(store: &Arc<dyn ObjectStore>, prefix: &str) -> Result<Vec<ObjectMeta>, ImageError> {
    store.list(Some(&Path::from(prefix))).try_collect().await.map_err(ImageError::Store)
}

/// An object that was written just now: its date is what time the store thinks it is.
async fn clock(store: &Arc<dyn ObjectStore>) -> Result<ObjectMeta, ImageError> {
    let clock = Path::from("gc/clock");
    store.put(&clock, PutPayload::default()).await.map_err(ImageError::Store)?;
    store.head(&clock).await.map_err(ImageError::Store)
}

/// Domains that have anything below this prefix.
async fn domains(store: &Arc<dyn ObjectStore>, prefix: &str) -> Result<Vec<String>, ImageError> {
    let listed = store.list_with_delimiter(Some(&Path::from(prefix))).await;
    let prefixes = listed.map_err(ImageError::Store)?.common_prefixes;
    Ok(prefixes.iter().filter_map(|p| Some(p.filename()?.to_owned())).collect())
}

/// Everything that a name leads to, or that a host said it uses.
async fn needed(
    store: &Arc<dyn ObjectStore>,
    is_fresh: impl Fn(&ObjectMeta) -> bool,
) -> Result<HashSet<Path>, ImageError> {
    let mut needed = HashSet::new();
    let boots = list(store, "boot").await?;
    for domain in domains(store, "name").await? {
        let at = DomainStore::new(store.clone(), &domain)?;
        for name in at.names().await? {
            let id = at.resolve(&name).await?;
            add_image(&at, id, &boots, &mut needed).await?;
        }
    }
    for domain in domains(store, "use").await? {
        let at = DomainStore::new(store.clone(), &domain)?;
        for note in list(store, &format!("use/{domain}")).await? {
            // use/<domain>/<image>/<host>
            let id = note.location.parts().nth(2).and_then(|id| id.as_ref().parse().ok());
            match id {
                Some(id) if is_fresh(&note) => add_image(&at, id, &boots, &mut needed).await?,
                _ => store.delete(&note.location).await.map_err(ImageError::Store)?,
            }
        }
    }
    Ok(needed)
}

/// All that an image is made of.
async fn add_image(
    at: &DomainStore,
    id: ImageId,
    boots: &[ObjectMeta],
    needed: &mut HashSet<Path>,
) -> Result<(), ImageError> {
    if !needed.insert(image_path(id)) {
        return Ok(());
    }
    let manifest = at.manifest(id).await?;
    let prefix = format!("boot/{id}/");
    let boots = boots.iter().filter(|b| b.location.as_ref().starts_with(&prefix));
    needed.extend(boots.map(|boot| boot.location.clone()));
    let index = at.index(&manifest).await?;
    let packs = index.packs.iter().map(|pack| pack.hash);
    let packs: Vec<Hash> = packs.chain(manifest.packs.iter().copied()).collect();
    needed.extend(packs.iter().map(pack_path));
    Ok(())
}
