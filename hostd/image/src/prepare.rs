//! Prepare: from a source to an image that every host can mount.
//!
//! One thread reads, hashes and packs; packs go to the store as they fill, two at most in memory. The manifest is published
//! after all that it names, and the name after the manifest, so that a prepare that dies leaves nothing half there: its packs
//! are found by the next prepare of the same, or swept.

use std::io::Read;
use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use wire::ImageId;

use crate::apply::Applier;
use crate::deep::on_deep_stack;
use crate::id::{Domain, Hash, check_image_name};
use crate::layer::Layer;
use crate::limits::{KNOWN_IMAGES_MAX, KNOWN_INDEX_BYTES_MAX};
use crate::manifest::{ImageConfig, Manifest};
use crate::oci::{Blobs, LayerSource, LayeredImage, read_archive, read_layout};
use crate::pack::{BlobWriter, Known, PackSink, Packer};
use crate::progress::Progress;
use crate::refuse::PrepareError;
use crate::registry::{Registry, RegistryAccess};
use crate::source::Source;
use crate::store::{DomainStore, NameRecord, image_path, name_path, pack_path};

/// Earlier images that are looked at together.
const FETCHES: usize = 8;

/// What a prepare did.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// The image.
    pub id: ImageId,
    /// Its name.
    pub name: String,
    /// Inodes.
    pub files: u64,
    /// Bytes of its files.
    pub bytes: u64,
    /// Bytes that had to be stored for it, compressed; the rest was there.
    pub new_bytes: u64,
    /// Seconds that it took.
    pub seconds: f64,
    /// Device nodes 0:0 that were left out, because overlayfs takes them for whiteouts.
    pub dropped: u64,
}

/// What to prepare, and for whom.
#[derive(Debug, Clone)]
pub struct PrepareSpec {
    /// The trust domain (tenant).
    pub domain: String,
    /// The name that will point at it.
    pub name: String,
    /// Where it comes from.
    pub source: Source,
    /// Processor of the hosts, in OCI's words.
    pub arch: String,
}

/// This machine's processor in OCI's words.
#[must_use]
pub fn host_arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Prepares an image for this machine's kind of processor.
///
/// # Errors
/// See [`PrepareError`]. Nothing is published unless all was.
pub async fn prepare(
    store: Arc<dyn ObjectStore>,
    domain: &str,
    name: &str,
    source: Source,
    progress: Arc<dyn Progress>,
) -> Result<Summary, PrepareError> {
    let spec = PrepareSpec {
        domain: domain.to_owned(),
        name: name.to_owned(),
        source,
        arch: host_arch().to_owned(),
    };
    prepare_spec(store, spec, progress).await
}

/// Prepares an image as `spec` says.
///
/// # Errors
/// See [`PrepareError`]. Nothing is published unless all was.
pub async fn prepare_spec(
    store: Arc<dyn ObjectStore>,
    spec: PrepareSpec,
    progress: Arc<dyn Progress>,
) -> Result<Summary, PrepareError> {
    prepare_with(store, spec, RegistryAccess::default(), progress).await
}

/// Prepares an image as `spec` says, out of a registry with which one speaks as `access` says.
///
/// # Errors
/// See [`PrepareError`]. Nothing is published unless all was.
pub async fn prepare_with(
    store: Arc<dyn ObjectStore>,
    spec: PrepareSpec,
    access: RegistryAccess,
    progress: Arc<dyn Progress>,
) -> Result<Summary, PrepareError> {
    let started = Instant::now();
    check_image_name(&spec.name)?;
    let at = DomainStore::new(store, &spec.domain)?;
    let known = known(&at, &spec.name, progress.as_ref()).await;
    // Two packs wait at most: the reader blocks on the third, and that bounds memory.
    let (sender, mut packs) = mpsc::channel(1);
    let domain = at.domain.clone();
    let name = spec.name.clone();
    let runtime = Handle::current();
    let reader = on_deep_stack("prepare", move || {
        let from = Origin { spec: &spec, access: &access, runtime: &runtime };
        build(&domain, &from, known, &mut ChannelSink(sender), progress.as_ref())
    });
    let mut upload = Ok(());
    while let Some((hash, bytes)) = packs.recv().await {
        upload = put_pack(&at, &hash, bytes).await;
        if upload.is_err() {
            break;
        }
    }
    // The reader stops at its next pack when nobody takes it.
    drop(packs);
    let built = reader.await.map_err(|e| PrepareError::read("the source", e))?;
    upload?;
    let built = built?;
    let id = publish(&at, &name, &built.manifest).await?;
    Ok(Summary {
        id,
        name,
        files: built.manifest.totals.files,
        bytes: built.manifest.totals.bytes,
        new_bytes: built.new_bytes,
        seconds: started.elapsed().as_secs_f64(),
        dropped: built.dropped,
    })
}

struct ChannelSink(mpsc::Sender<(Hash, Vec<u8>)>);

impl PackSink for ChannelSink {
    fn put(&mut self, hash: Hash, bytes: Vec<u8>) -> Result<(), PrepareError> {
        self.0.blocking_send((hash, bytes)).map_err(|_| PrepareError::Stopped)
    }
}

/// Stores a pack, over an equal one if there is one: its fresh date keeps the sweeper away.
async fn put_pack(at: &DomainStore, hash: &Hash, bytes: Vec<u8>) -> Result<(), PrepareError> {
    at.store.put(&pack_path(hash), PutPayload::from(bytes)).await?;
    Ok(())
}

/// Publishes the manifest, then the name.
async fn publish(
    at: &DomainStore,
    name: &str,
    manifest: &Manifest,
) -> Result<ImageId, PrepareError> {
    let too_long = || PrepareError::Format("the image's config is too long for it".to_owned());
    let bytes = manifest.encode().ok_or_else(too_long)?;
    let id = ImageId(at.domain.hash(&bytes));
    at.store.put(&image_path(id), PutPayload::from(bytes)).await?;
    let record = NameRecord { name: name.to_owned(), image: id.to_string() };
    let record = serde_json::to_vec(&record).map_err(|e| PrepareError::Format(e.to_string()))?;
    at.store.put(&name_path(&at.domain, name), PutPayload::from(record)).await?;
    Ok(id)
}

/// What the domain has already: the image of this name before, then others. An index that cannot be read only costs
/// the sharing with it.
async fn known(at: &DomainStore, name: &str, progress: &dyn Progress) -> Known {
    progress.begin("looking for what is stored already", None);
    let mut known = Known::default();
    let mut ids = Vec::new();
    if let Ok(id) = at.resolve(name).await {
        ids.push(id);
    }
    if let Ok(others) = at.images().await {
        ids.extend(others.into_iter().map(|(_, id)| id));
    }
    let mut seen = std::collections::HashSet::new();
    ids.retain(|id| seen.insert(*id));
    ids.truncate(KNOWN_IMAGES_MAX);
    let manifests = futures::stream::iter(ids)
        .map(|id| async move { at.manifest(id).await.ok() })
        .buffered(FETCHES)
        .filter_map(std::future::ready);
    let mut bytes = 0;
    let fitting = manifests.take_while(|manifest| {
        bytes += manifest.index.bytes;
        std::future::ready(bytes <= KNOWN_INDEX_BYTES_MAX)
    });
    let read = |manifest: Manifest| async move {
        let index = at.index(&manifest).await.ok()?;
        let meta = at.table(&manifest, &manifest.meta).await.ok()?;
        let table = at.table(&manifest, &manifest.index).await.ok()?;
        Some((manifest.packs, index, meta, table))
    };
    let all = fitting.map(read).buffered(FETCHES).filter_map(std::future::ready);
    let mut all = std::pin::pin!(all);
    while let Some((packs, index, meta, table)) = all.next().await {
        known.learn(&index);
        known.learn_blob(&packs, &meta);
        known.learn_blob(&packs, &table);
    }
    known
}

struct Built {
    manifest: Manifest,
    new_bytes: u64,
    dropped: u64,
}

/// Everything that blocks: reads the source, packs it, writes metadata and index.
fn build(
    domain: &Domain,
    from: &Origin<'_>,
    mut known: Known,
    sink: &mut dyn PackSink,
    progress: &dyn Progress,
) -> Result<Built, PrepareError> {
    let known_blobs = known.take_blobs();
    let mut packer = Packer::new(domain, known, sink)?;
    let mut applier = Applier::new(&mut packer);
    let config = read_source(from, &mut applier, progress)?;
    let (tree, dropped) = (applier.tree, applier.dropped);
    let (index, object_bytes) = packer.finish()?;
    progress.begin("writing metadata", None);
    let mut blobs = BlobWriter::new(domain, known_blobs, sink)?;
    let mut totals = crate::erofs_write::write(&tree, &mut |bytes| blobs.write(bytes))?;
    let meta = blobs.end_blob()?;
    let too_long = || PrepareError::Format("the object index is too long".to_owned());
    blobs.write(&index.encode().ok_or_else(too_long)?)?;
    let index_blob = blobs.end_blob()?;
    let index_head = index.head().ok_or_else(too_long)?;
    let object_frames: u64 = index.frames.iter().map(|frame| u64::from(frame.stored)).sum();
    totals.stored = object_frames + blobs.stored();
    let (packs, blob_bytes) = blobs.finish()?;
    let manifest = Manifest {
        domain: domain.name().to_owned(),
        config,
        totals,
        packs,
        meta,
        index: index_blob,
        index_head,
    };
    Ok(Built { manifest, new_bytes: object_bytes + blob_bytes, dropped })
}

/// Where an image comes from, and how it is reached.
struct Origin<'a> {
    spec: &'a PrepareSpec,
    access: &'a RegistryAccess,
    runtime: &'a Handle,
}

fn read_source(
    from: &Origin<'_>,
    applier: &mut Applier<'_, '_>,
    progress: &dyn Progress,
) -> Result<ImageConfig, PrepareError> {
    let Origin { spec, access, runtime } = *from;
    let bare = || ImageConfig {
        arch: spec.arch.clone(),
        os: "linux".to_owned(),
        env: vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()],
        ..ImageConfig::default()
    };
    match &spec.source {
        Source::OciLayout(path) => {
            let blobs = Blobs::dir(path);
            let image = read_layout(&blobs, &spec.arch)?;
            read_layers(&|layer| Ok(blobs.open(&layer.name)?.0), image, applier, progress)
        }
        Source::Archive(path) => {
            let blobs = Blobs::archive(path)?;
            let image = read_archive(&blobs, &spec.arch)?;
            read_layers(&|layer| Ok(blobs.open(&layer.name)?.0), image, applier, progress)
        }
        Source::RootfsTar(path) => {
            let read = |e| PrepareError::read(path.display().to_string(), e);
            let file = std::fs::File::open(path).map_err(read)?;
            let bytes = file.metadata().map_err(read)?.len();
            progress.begin(&path.display().to_string(), Some(bytes));
            let layer = Layer::open(Box::new(file), Default::default(), progress).map_err(read)?;
            applier.tar(layer, false)?.finish()?;
            Ok(bare())
        }
        Source::RootfsDir(path) => {
            progress.begin(&path.display().to_string(), None);
            crate::rootfs::add(path, applier, progress)?;
            Ok(bare())
        }
        Source::Registry(reference) => {
            progress.begin(reference, None);
            let registry = Registry::new(reference, access, runtime.clone())?;
            let image = registry.image(&spec.arch)?;
            read_layers(&|layer| registry.layer(layer), image, applier, progress)
        }
    }
}

/// Gives a layer's bytes.
type OpenLayer<'a> = dyn Fn(&LayerSource) -> Result<Box<dyn Read>, PrepareError> + 'a;

fn read_layers(
    open: &OpenLayer<'_>,
    image: LayeredImage,
    applier: &mut Applier<'_, '_>,
    progress: &dyn Progress,
) -> Result<ImageConfig, PrepareError> {
    let count = image.layers.len();
    for (i, source) in image.layers.into_iter().enumerate() {
        let raw = open(&source)?;
        progress.begin(&format!("layer {} of {count}", i + 1), source.bytes);
        let layer = Layer::open(raw, source.digests, progress)
            .map_err(|e| PrepareError::read(source.name.clone(), e))?;
        applier.tar(layer, true)?.finish()?;
    }
    Ok(image.config)
}
