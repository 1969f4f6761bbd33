//! Images on this host: one mounter a tenant, and names resolved once in a while.
//!
//! A name may be pointed elsewhere by a later prepare, so that an answer is good for [`NAME_TTL`] only. Mounts are
//! single-flight in `hostd-image`; here a launch whose time runs out leaves its mount going on for the next.

use std::{
    cell::RefCell,
    collections::HashMap,
    path::PathBuf,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use hostd_image::{
    FirstRunGuard, ImageError, ImageMetrics, MountBy, MountConfig, MountMode, MountedImage,
    Mounter, Run, Serving,
};
use object_store::ObjectStore;
use tokio::sync::OnceCell;
use wire::{Code, Fault, ImageId};

use crate::runtime::spawn;

/// How long a name is taken to mean what it meant.
const NAME_TTL: Duration = Duration::from_secs(3);

/// Images that stay mounted though no sandbox uses them.
const UNUSED_MAX: usize = 64;

/// Names that are remembered; at the bound all are forgotten.
const NAMES_MAX: usize = 4_096;

/// What a name meant, and when.
#[derive(Clone, Copy, Debug)]
struct Name {
    id: ImageId,
    at: Instant,
    renewing: bool,
}

type Names = HashMap<(String, String), Name>;
type Mounters = HashMap<String, Rc<OnceCell<Arc<Mounter>>>>;

/// The images of this host.
#[derive(Debug)]
pub(crate) struct Images {
    store: Arc<dyn ObjectStore>,
    serving: Serving,
    dir: PathBuf,
    cache_bytes_max: u64,
    by: MountBy,
    record: bool,
    mounters: RefCell<Mounters>,
    names: Rc<RefCell<Names>>,
}

/// What is set about images.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ImageSettings {
    /// How they are mounted.
    pub(crate) by: MountBy,
    /// Whether first runs write boot packs.
    pub(crate) record: bool,
    /// Bytes of what was fetched.
    pub(crate) cache_bytes_max: u64,
}

/// A mounted image, and the guard of its first run here.
type Mounted = (Arc<MountedImage>, Option<FirstRunGuard>);

impl Images {
    /// Images of the store that `objects` names, kept under `dir`.
    ///
    /// # Errors
    /// [`Code::Config`] or [`Code::Storage`]: there is no such store.
    pub(crate) fn open(
        objects: &str,
        dir: PathBuf,
        settings: ImageSettings,
    ) -> Result<Self, Fault> {
        let lazy = settings.by != MountBy::Unpack;
        let holder = || Serving::Holder { objects: objects.to_owned() };
        let can_hold = crate::ASKED.load(std::sync::atomic::Ordering::Relaxed);
        if lazy && !can_hold {
            tracing::warn!("images are unpacked: main does not call hostd::main_if_asked");
        }
        Ok(Self {
            store: wire_net::objects::open(objects)?,
            serving: if lazy && can_hold { holder() } else { Serving::Unpack },
            dir,
            cache_bytes_max: settings.cache_bytes_max,
            by: settings.by,
            record: settings.record,
            mounters: RefCell::default(),
            names: Rc::default(),
        })
    }

    /// Tells the sweeper that images in use are, and takes away mounts that nobody uses. Call it every minute or so.
    pub(crate) async fn tidy(&self, renew: bool) {
        let mounters: Vec<Arc<Mounter>> =
            self.mounters.borrow().values().filter_map(|cell| cell.get().cloned()).collect();
        for mounter in mounters {
            mounter.unmount_unused(UNUSED_MAX).await;
            if renew && let Err(error) = mounter.renew_uses().await {
                tracing::warn!(%error, "the sweeper was not told which images are in use");
            }
        }
    }

    /// What all tenants' mounts counted.
    pub(crate) async fn metrics(&self) -> ImageMetrics {
        let mounters: Vec<Arc<Mounter>> =
            self.mounters.borrow().values().filter_map(|cell| cell.get().cloned()).collect();
        let mut sum = ImageMetrics::default();
        for mounter in mounters {
            match mounter.metrics().await {
                Ok(metrics) => sum.add(&metrics),
                Err(_) => {
                    if let Err(error) = mounter.revive().await {
                        tracing::error!(%error, "no image server");
                    }
                }
            }
        }
        sum
    }

    async fn mounter(&self, tenant: &str) -> Result<Arc<Mounter>, Fault> {
        let cell = Rc::clone(self.mounters.borrow_mut().entry(tenant.to_owned()).or_default());
        let config = || MountConfig {
            state_dir: self.dir.join("mounts").join(tenant),
            cache_dir: self.dir.join("cache"),
            cache_bytes_max: self.cache_bytes_max,
            store: Arc::clone(&self.store),
            domain: tenant.to_owned(),
            by: self.by,
        };
        let start = || async {
            let mounter = Mounter::start_with(config(), self.serving.clone()).await?;
            match mounter.mode() {
                MountMode::Lazy => tracing::info!(tenant, "images are mounted lazily"),
                mode => tracing::warn!(tenant, ?mode, "images are not mounted lazily"),
            }
            Ok::<_, ImageError>(Arc::new(mounter))
        };
        cell.get_or_try_init(start).await.map(Arc::clone).map_err(|error| fault(&error))
    }

    /// A tenant's image by name or id, mounted to run a command.
    ///
    /// # Errors
    /// By what is wrong with it; nothing is half mounted.
    pub(crate) async fn mount(
        &self,
        tenant: &str,
        image: &str,
        command: &[String],
    ) -> Result<Mounted, Fault> {
        let mounter = self.mounter(tenant).await?;
        let id = self.resolve(&mounter, tenant, image).await?;
        let run = Run::of(command, self.record);
        if mounter.mounted(id).is_some() {
            let mounted = mounter.mount_to_run(id, &run).await.map_err(|error| fault(&error))?;
            return Ok(mounted);
        }
        // A task of its own: whoever gives up leaves it running.
        let mounting = spawn(async move { mounter.mount_to_run(id, &run).await });
        let (mounted, first) = mounting
            .await
            .map_err(|_| Fault::new(Code::Internal, "a mount ended without an answer"))?
            .map_err(|error| fault(&error))?;
        check_arch(&mounted)?;
        Ok((mounted, first))
    }

    /// The same by id: for sandboxes that are taken up again.
    ///
    /// # Errors
    /// As above.
    pub(crate) async fn mount_again(
        &self,
        tenant: &str,
        id: ImageId,
    ) -> Result<Arc<MountedImage>, Fault> {
        let mounter = self.mounter(tenant).await?;
        mounter.mount_again(id).await.map_err(|error| fault(&error))
    }

    /// What a name means. Young answers are taken as they are, and renewed beside the launch before they are old, so
    /// that steady traffic never waits for the store; an old one is better than none while the store is away.
    async fn resolve(
        &self,
        mounter: &Arc<Mounter>,
        tenant: &str,
        image: &str,
    ) -> Result<ImageId, Fault> {
        if let Ok(id) = image.parse::<ImageId>() {
            return Ok(id);
        }
        let key = (tenant.to_owned(), image.to_owned());
        let known = self.names.borrow().get(&key).copied();
        if let Some(name) = known
            && name.at.elapsed() < NAME_TTL
        {
            if name.at.elapsed() > NAME_TTL / 2 && !name.renewing {
                self.renew(Arc::clone(mounter), key);
            }
            return Ok(name.id);
        }
        match (mounter.resolve(image).await, known) {
            (Ok(id), _) => {
                enter(&self.names, key, id);
                Ok(id)
            }
            (Err(error @ ImageError::Store(_)), Some(name)) => {
                tracing::warn!(%error, image, "the store is away: the image's name means what it meant");
                Ok(name.id)
            }
            (Err(error), _) => Err(fault(&error)),
        }
    }

    fn renew(&self, mounter: Arc<Mounter>, key: (String, String)) {
        if let Some(name) = self.names.borrow_mut().get_mut(&key) {
            name.renewing = true;
        }
        let names = Rc::clone(&self.names);
        spawn(async move {
            match mounter.resolve(&key.1).await {
                Ok(id) => enter(&names, key, id),
                Err(error) => {
                    tracing::debug!(%error, image = key.1, "a name was not renewed");
                    if let Some(name) = names.borrow_mut().get_mut(&key) {
                        name.renewing = false;
                    }
                }
            }
        });
    }
}

/// Whether the image is for this host's processor.
fn check_arch(mounted: &MountedImage) -> Result<(), Fault> {
    let (arch, own) = (&mounted.config().arch, hostd_image::host_arch());
    if arch.is_empty() || arch == own {
        return Ok(());
    }
    let text = format!("the image is for {arch}, this host is {own}; nothing was started");
    Err(Fault::new(Code::ImageArchitecture, text))
}

fn enter(names: &RefCell<Names>, key: (String, String), id: ImageId) {
    let mut names = names.borrow_mut();
    if names.len() >= NAMES_MAX {
        names.clear();
    }
    names.insert(key, Name { id, at: Instant::now(), renewing: false });
}

pub(crate) fn fault(error: &ImageError) -> Fault {
    let code = match error {
        error if error.is_not_found() => Code::ImageNotFound,
        ImageError::NotFound(_) | ImageError::Name(_) => Code::ImageNotFound,
        ImageError::Damaged(_) => Code::ImageBroken,
        ImageError::Store(_) => Code::Storage,
        ImageError::Shared(inner) => return fault(inner),
        // The host's own doing, and whatever is added.
        _ => Code::BoxFailed,
    };
    Fault::new(code, format!("{error}; nothing was started"))
}
