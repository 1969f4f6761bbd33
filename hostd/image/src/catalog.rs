//! What a domain has: its images by name.

use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use object_store::ObjectStore;
use wire::ImageId;

use crate::manifest::{ImageConfig, Totals};
use crate::store::{DomainStore, ImageError, names_path};

/// One named image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRow {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: ImageId,
    /// How much is in it.
    pub totals: Totals,
}

/// All that a manifest says, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageReport {
    /// Its id.
    pub id: ImageId,
    /// How to start what is in it.
    pub config: ImageConfig,
    /// How much is in it.
    pub totals: Totals,
    /// Bytes of its metadata.
    pub meta_bytes: u64,
    /// Bytes of its object index.
    pub index_bytes: u64,
    /// Its boot packs.
    pub boot_packs: Vec<BootRow>,
}

/// A boot pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootRow {
    /// What it is of: `default` serves runs that have none of their own; see [`crate::Run::entry`].
    pub entry: String,
    /// Its bytes.
    pub stored: u64,
    /// When it was written.
    pub written: std::time::SystemTime,
}

impl DomainStore {
    /// All names.
    pub(crate) async fn names(&self) -> Result<Vec<String>, ImageError> {
        let prefix = names_path(&self.domain);
        let found: Vec<_> =
            self.store.list(Some(&prefix)).try_collect().await.map_err(ImageError::Store)?;
        let name = |meta: object_store::ObjectMeta| {
            let name = meta.location.filename()?.replace('+', "/");
            crate::id::check_image_name(&name).ok().map(|()| name)
        };
        Ok(found.into_iter().filter_map(name).collect())
    }

    /// Names with their images, in name order.
    pub(crate) async fn images(&self) -> Result<Vec<(String, ImageId)>, ImageError> {
        let names = self.names().await?;
        let mut rows: Vec<(String, ImageId)> = futures::stream::iter(names)
            .map(|name| async move {
                match self.resolve(&name).await {
                    Ok(id) => Ok(Some((name, id))),
                    // Removed since it was listed, or damaged: the others are still there.
                    Err(error) if error.is_not_found() => Ok(None),
                    Err(ImageError::Damaged(_)) => Ok(None),
                    Err(error) => Err(error),
                }
            })
            .buffer_unordered(16)
            .try_filter_map(|row| async move { Ok(row) })
            .try_collect()
            .await?;
        rows.sort_unstable();
        Ok(rows)
    }
}

/// The image that a name or an id says in a domain.
///
/// # Errors
/// [`ImageError::NotFound`] when there is no such name.
pub async fn resolve(
    store: Arc<dyn ObjectStore>,
    domain: &str,
    name_or_id: &str,
) -> Result<ImageId, ImageError> {
    DomainStore::new(store, domain)?.resolve(name_or_id).await
}

/// Names with their images, in name order.
///
/// # Errors
/// [`ImageError::Store`] when the store cannot be read.
pub async fn list(store: Arc<dyn ObjectStore>, domain: &str) -> Result<Vec<ImageRow>, ImageError> {
    let at = DomainStore::new(store, domain)?;
    let mut rows = Vec::new();
    for (name, id) in at.images().await? {
        match at.manifest(id).await {
            Ok(manifest) => rows.push(ImageRow { name, id, totals: manifest.totals }),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(rows)
}

/// How to start what is in an image.
///
/// # Errors
/// [`ImageError::NotFound`] when it is not in this domain.
pub async fn config(
    store: Arc<dyn ObjectStore>,
    domain: &str,
    id: ImageId,
) -> Result<ImageConfig, ImageError> {
    Ok(DomainStore::new(store, domain)?.manifest(id).await?.config)
}

/// All that a manifest says.
///
/// # Errors
/// [`ImageError::NotFound`] when it is not in this domain.
pub async fn inspect(
    store: Arc<dyn ObjectStore>,
    domain: &str,
    name_or_id: &str,
) -> Result<ImageReport, ImageError> {
    let at = DomainStore::new(store, domain)?;
    let id = at.resolve(name_or_id).await?;
    let manifest = at.manifest(id).await?;
    let prefix = object_store::path::Path::from(format!("boot/{id}"));
    let listed: Vec<_> =
        at.store.list(Some(&prefix)).try_collect().await.map_err(ImageError::Store)?;
    let row = |meta: object_store::ObjectMeta| {
        let entry = meta.location.filename()?.to_owned();
        Some(BootRow { entry, stored: meta.size, written: meta.last_modified.into() })
    };
    let mut boot_packs: Vec<_> = listed.into_iter().filter_map(row).collect();
    boot_packs.sort_unstable_by(|a, b| a.entry.cmp(&b.entry));
    Ok(ImageReport {
        id,
        config: manifest.config,
        totals: manifest.totals,
        meta_bytes: manifest.meta.bytes,
        index_bytes: manifest.index.bytes,
        boot_packs,
    })
}
