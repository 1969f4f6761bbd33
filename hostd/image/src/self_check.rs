//! Whether this host can mount lazily: tried at start on a small image of its own, all the way through.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use object_store::ObjectStore;
use object_store::memory::InMemory;
use tokio::sync::OnceCell;

use crate::kernel::{self, MetaBy};
use crate::lazy_host::{LazyHost, blocking};
use crate::store::{DomainStore, ImageError};
use crate::{MountBy, MountMode, Source};

const DOMAIN: &str = "volley-self-check";

/// Mounts a small image below `state_dir` and reads it through an overlay, once a process for each way that is asked for.
/// Gives the first way that works. The error is why this host cannot.
pub(crate) async fn lazy_mounts(
    state_dir: &Path,
    asked: MountBy,
) -> Result<(MetaBy, MountMode), String> {
    static CHECKED: OnceCell<Result<(), String>> = OnceCell::const_new();
    static CHECKED_LOOP: OnceCell<Result<(), String>> = OnceCell::const_new();
    let by_file = async || CHECKED.get_or_init(|| look(state_dir, MetaBy::File)).await.clone();
    let by_loop = async || CHECKED_LOOP.get_or_init(|| look(state_dir, MetaBy::Loop)).await.clone();
    let why = match asked {
        MountBy::File => return by_file().await.map(|()| (MetaBy::File, MountMode::Lazy)),
        MountBy::Loop => "as asked".to_owned(),
        MountBy::Auto | MountBy::Unpack => match by_file().await {
            Ok(()) => return Ok((MetaBy::File, MountMode::Lazy)),
            Err(why) => why,
        },
    };
    match by_loop().await {
        Ok(()) => Ok((MetaBy::Loop, MountMode::LazyByLoop { why })),
        Err(by_loop) => Err(format!("{why}; by a loop device: {by_loop}")),
    }
}

async fn look(state_dir: &Path, by: MetaBy) -> Result<(), String> {
    for name in ["fuse", "erofs", "overlay"] {
        if !kernel::has_filesystem(name) {
            return Err(format!("the kernel has no {name}, or hostd may not mount it"));
        }
    }
    let dir = state_dir.join(DOMAIN);
    let made = dir.clone();
    let ready = blocking("make a directory", move || {
        let _ = fs::remove_dir_all(&made);
        fs::create_dir_all(made.join("rootfs"))?;
        fs::create_dir_all(made.join("overlay"))
    });
    ready.await.map_err(|e| e.to_string())?;
    let checked = check(&dir, by).await.map_err(|e| e.to_string());
    let _ = blocking("clear the self-check", move || fs::remove_dir_all(dir)).await;
    checked
}

async fn check(dir: &Path, by: MetaBy) -> Result<(), ImageError> {
    let failed = |what: &str, why: String| ImageError::host(what, io::Error::other(why));
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let small = "in the metadata".as_bytes().to_vec();
    let large: Vec<u8> = (0..5000u32).flat_map(u32::to_le_bytes).collect();
    let root = dir.join("rootfs");
    fs::write(root.join("small"), &small)
        .and_then(|()| fs::write(root.join("large"), &large))
        .map_err(|e| ImageError::host("write the self-check's image", e))?;
    let source = Source::RootfsDir(root);
    let prepared = crate::prepare(store.clone(), DOMAIN, "check", source, Arc::new(())).await;
    let prepared = prepared.map_err(|e| failed("prepare the self-check's image", e.to_string()))?;
    let at = DomainStore::new(store, DOMAIN)?;
    let (state, cache) = (dir.join("state"), dir.join("cache"));
    let host = LazyHost::start(at, &state, &cache, 1 << 20, by).await?;
    let (layers, _) = host.mount(prepared.id, None).await?;
    let target = dir.join("overlay");
    // While reads are noted, those ahead of need are turned away: a kernel that told a program of it would be found out.
    host.record().await?;
    let read = blocking("read through an overlay", move || {
        kernel::mount_overlay(&layers, &target)?;
        let read = (fs::read(target.join("small")), fs::read(target.join("large")));
        kernel::unmount(&target)?;
        Ok((read.0?, read.1?))
    });
    if read.await? == (small, large) {
        return Ok(());
    }
    Err(failed("read through an overlay", "the bytes are not what they should be".to_owned()))
}
