//! A directory as an object store, with compare-and-swap.
//!
//! `object_store`'s own directory store writes beside and renames, durably, but has no conditional update. Here each
//! write of a path holds that path's lock file (`flock`, so that a killed process leaves none behind), compares the
//! hash of what is there, and only then renames. The version of an object is the hash of its bytes: a time stamp or
//! an inode number may repeat. Readers take no lock: a rename is atomic.
//!
//! Left out: versions of objects above [`HASHED_BYTES_MAX`] and of partial reads (they have none, so that they cannot
//! be swapped), and multipart uploads, which take no part in swaps. One machine, or a shared file system whose
//! `flock` and `rename` hold across machines (NFS 4).

use std::{
    fmt, fs,
    ops::Range,
    path::{Path as FsPath, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, stream::BoxStream};
use object_store::{
    CopyMode, CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult,
    MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt as _, PutMode, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, Result, local::LocalFileSystem, path::Path,
};
use rustix::fs::{FlockOperation, flock};
use wire::{Code, Fault};

const STORE: &str = "directory";

/// Largest object that has a version.
pub const HASHED_BYTES_MAX: u64 = 4 << 20;

/// Lock files: as many as there are values of a byte, picked by the path's hash.
fn lock_name(path: &Path) -> String {
    format!("{:02x}", blake3::hash(path.as_ref().as_bytes()).as_bytes()[0])
}

/// See the module.
#[derive(Clone, Debug)]
pub struct DirStore {
    files: Arc<LocalFileSystem>,
    locks: PathBuf,
}

/// Holds a path's lock until dropped.
struct Locked {
    _file: fs::File,
}

impl DirStore {
    /// Opens the store in a directory, which is made if it is not there.
    ///
    /// # Errors
    /// [`Code::Storage`] if it cannot be made.
    pub fn open(root: &FsPath) -> Result<Self, Fault> {
        let (objects, locks) = (root.join("objects"), root.join("locks"));
        let storage = |error: &dyn fmt::Display| {
            Fault::new(Code::Storage, format!("{} cannot hold objects: {error}", root.display()))
        };
        fs::create_dir_all(&objects).map_err(|error| storage(&error))?;
        fs::create_dir_all(&locks).map_err(|error| storage(&error))?;
        let files = LocalFileSystem::new_with_prefix(&objects).map_err(|error| storage(&error))?;
        Ok(Self { files: Arc::new(files.with_fsync(true)), locks })
    }

    async fn lock(&self, path: &Path) -> Result<Locked> {
        let file = self.locks.join(lock_name(path));
        let locked = tokio::task::spawn_blocking(move || -> std::io::Result<Locked> {
            let file =
                fs::OpenOptions::new().create(true).truncate(false).write(true).open(file)?;
            flock(&file, FlockOperation::LockExclusive)?;
            Ok(Locked { _file: file })
        });
        locked.await?.map_err(generic)
    }

    /// The version of what is there.
    async fn version(&self, path: &Path) -> Result<Option<String>> {
        match self.files.get(path).await {
            Ok(got) if got.meta.size > HASHED_BYTES_MAX => Ok(None),
            Ok(got) => Ok(Some(tag(&got.bytes().await?))),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn generic(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Generic { store: STORE, source: Box::new(error) }
}

fn tag(bytes: &[u8]) -> String {
    format!("\"b3-{}\"", blake3::hash(bytes).to_hex())
}

fn payload_tag(payload: &PutPayload) -> String {
    let mut hasher = blake3::Hasher::new();
    payload.iter().for_each(|part| {
        hasher.update(part);
    });
    format!("\"b3-{}\"", hasher.finalize().to_hex())
}

impl fmt::Display for DirStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DirStore({})", self.locks.with_file_name("objects").display())
    }
}

#[async_trait]
impl ObjectStore for DirStore {
    async fn put_opts(
        &self,
        path: &Path,
        payload: PutPayload,
        mut opts: PutOptions,
    ) -> Result<PutResult> {
        let _locked = self.lock(path).await?;
        if let PutMode::Update(expected) = &opts.mode {
            let there = self.version(path).await?;
            if there.is_none() || there != expected.e_tag {
                let source = "another version is there".into();
                return Err(Error::Precondition { path: path.to_string(), source });
            }
            opts.mode = PutMode::Overwrite;
        }
        let small =
            u64::try_from(payload.content_length()).is_ok_and(|len| len <= HASHED_BYTES_MAX);
        let e_tag = small.then(|| payload_tag(&payload));
        let put = self.files.put_opts(path, payload, opts).await?;
        Ok(PutResult { e_tag, ..put })
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.files.put_multipart_opts(path, opts).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        let conditional = options.if_match.is_some() || options.if_none_match.is_some();
        let plain = GetOptions { if_match: None, if_none_match: None, ..options.clone() };
        if options.range.is_some() && !conditional {
            let mut got = self.files.get_opts(path, plain).await?;
            got.meta.e_tag = None;
            return Ok(got);
        }
        let whole = GetOptions { range: None, head: false, ..plain.clone() };
        let mut got = self.files.get_opts(path, whole).await?;
        if got.meta.size > HASHED_BYTES_MAX {
            let mut got = self.files.get_opts(path, plain).await?;
            got.meta.e_tag = None;
            options.check_preconditions(&got.meta)?;
            return Ok(got);
        }
        let mut meta = got.meta.clone();
        let attributes = std::mem::take(&mut got.attributes);
        let bytes = got.bytes().await?;
        meta.size = bytes.len() as u64;
        meta.e_tag = Some(tag(&bytes));
        options.check_preconditions(&meta)?;
        let range = match &options.range {
            Some(range) => range.as_range(meta.size).map_err(generic)?,
            None => 0..meta.size,
        };
        let bytes = slice(&bytes, &range);
        let payload = GetResultPayload::Stream(futures::stream::iter([Ok(bytes)]).boxed());
        Ok(GetResult { payload, meta, range, attributes, extensions: options.extensions })
    }

    async fn get_ranges(&self, path: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.files.get_ranges(path, ranges).await
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let store = self.clone();
        paths
            .then(move |path| {
                let store = store.clone();
                async move {
                    let path = path?;
                    let _locked = store.lock(&path).await?;
                    store.files.delete(&path).await.map(|()| path)
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let untagged =
            |meta: Result<ObjectMeta>| meta.map(|meta| ObjectMeta { e_tag: None, ..meta });
        self.files.list(prefix).map(untagged).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let mut listed = self.files.list_with_delimiter(prefix).await?;
        listed.objects.iter_mut().for_each(|meta| meta.e_tag = None);
        Ok(listed)
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let _locked = self.lock(to).await?;
        let mode = options.mode;
        debug_assert!(matches!(mode, CopyMode::Overwrite | CopyMode::Create));
        self.files.copy_opts(from, to, options).await
    }
}

fn slice(bytes: &Bytes, range: &Range<u64>) -> Bytes {
    let at = |at: u64| usize::try_from(at).map_or(bytes.len(), |at| at.min(bytes.len()));
    bytes.slice(at(range.start)..at(range.end))
}
