//! Whether this host can mount lazily: tried at start on a small image of its own, all the way through.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use object_store::ObjectStore;
use object_store::memory::InMemory;
use tokio::sync::OnceCell;

use crate::lazy_host::{LazyHost, blocking};
use crate::store::{DomainStore, ImageError};
use crate::{Source, kernel};

const DOMAIN: &str = "volley-self-check";

/// Mounts a small image below `state_dir` and reads it through an overlay, once a process. The error is why this host cannot.
pub(crate) async fn lazy_mounts(state_dir: &Path) -> Result<(), String> {
    static CHECKED: OnceCell<Result<(), String>> = OnceCell::const_new();
    CHECKED.get_or_init(|| look(state_dir)).await.clone()
}

async fn look(state_dir: &Path) -> Result<(), String> {
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
    let checked = check(&dir).await.map_err(|e| e.to_string());
    let _ = blocking("clear the self-check", move || fs::remove_dir_all(dir)).await;
    checked
}

async fn check(dir: &Path) -> Result<(), ImageError> {
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
    let host = LazyHost::start(at, &dir.join("state"), &dir.join("cache"), 1 << 20).await?;
    let layers = host.mount(prepared.id).await?;
    let target = dir.join("overlay");
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
