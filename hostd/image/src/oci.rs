//! Images as OCI layouts and as archives of images: which blobs, in which order, with which digests.
//!
//! A layout is a directory or a tar; both give blobs by name. Everything in them is an allegation until its digest was
//! compared, and JSON is bounded before it is parsed.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use oci_spec::image::{Digest as OciDigest, ImageConfiguration, ImageIndex, ImageManifest};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::id::to_hex;
use crate::layer::{Digests, Packing};
use crate::limits::{LAYERS_MAX, OCI_JSON_BYTES_MAX};
use crate::manifest::ImageConfig;
use crate::refuse::{PrepareError, Refusal, Rule};
use crate::source::open_unpacked;
use crate::tarball::{EntryKind, TarReader};

/// Blobs by name.
pub(crate) enum Blobs {
    Dir(PathBuf),
    Archive { path: PathBuf, packed: bool, places: HashMap<String, (u64, u64)> },
}

/// A layer that is still to be read.
#[derive(Debug)]
pub(crate) struct LayerSource {
    pub(crate) name: String,
    pub(crate) bytes: Option<u64>,
    pub(crate) digests: Digests,
}

/// An image before its layers are read.
#[derive(Debug)]
pub(crate) struct LayeredImage {
    pub(crate) config: ImageConfig,
    pub(crate) layers: Vec<LayerSource>,
}

pub(crate) fn bad(what: impl Into<String>) -> PrepareError {
    Refusal::new(Rule::Layout, b"", what).into()
}

impl Blobs {
    pub(crate) fn dir(path: &Path) -> Self {
        Self::Dir(path.to_owned())
    }

    /// Finds out what is where in an archive, in one pass.
    pub(crate) fn archive(path: &Path) -> Result<Self, PrepareError> {
        let read = |e| PrepareError::read(path.display().to_string(), e);
        let mut first = [0; 4];
        let n = File::open(path).and_then(|mut f| f.read(&mut first)).map_err(read)?;
        let packed = Packing::of(&first[..n]) != Packing::None;
        let mut reader = TarReader::new(open_unpacked(path).map_err(read)?);
        let mut places = HashMap::new();
        let mut links = Vec::new();
        while let Some(entry) = reader.next_entry().map_err(read)? {
            let name = clean(&entry.path)?;
            match entry.kind {
                EntryKind::File(size) => {
                    places.insert(name, (reader.data_at(), size));
                }
                // Old `docker save` wrote a layer once and linked to it; the target is relative to the link.
                EntryKind::Symlink(to) => {
                    let dir = name.rsplit_once('/').map_or("", |(dir, _)| dir);
                    links.push((name.clone(), join(dir, &to)?));
                }
                EntryKind::Hardlink(to) => links.push((name, clean(&to)?)),
                _ => {}
            }
        }
        for (name, to) in links {
            if let Some(place) = places.get(&to).copied() {
                places.insert(name, place);
            }
        }
        Ok(Self::Archive { path: path.to_owned(), packed, places })
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        match self {
            Self::Dir(dir) => dir.join(name).is_file(),
            Self::Archive { places, .. } => places.contains_key(name),
        }
    }

    fn bytes(&self, name: &str) -> Option<u64> {
        match self {
            Self::Dir(dir) => Some(dir.join(name).metadata().ok()?.len()),
            Self::Archive { places, .. } => places.get(name).map(|(_, bytes)| *bytes),
        }
    }

    pub(crate) fn open(&self, name: &str) -> Result<(Box<dyn Read>, u64), PrepareError> {
        let read = |e| PrepareError::read(name, e);
        match self {
            Self::Dir(dir) => {
                let file = File::open(dir.join(name)).map_err(|e| match e.kind() {
                    io::ErrorKind::NotFound => bad(format!("it has no {name}")),
                    _ => read(e),
                })?;
                let bytes = file.metadata().map_err(read)?.len();
                Ok((Box::new(file), bytes))
            }
            Self::Archive { path, packed, places } => {
                let place = places.get(name).ok_or_else(|| bad(format!("it has no {name}")))?;
                let (at, bytes) = *place;
                if *packed {
                    // A packed archive cannot be entered in the middle.
                    let mut stream = open_unpacked(path).map_err(read)?;
                    io::copy(&mut (&mut stream).take(at), &mut io::sink()).map_err(read)?;
                    return Ok((Box::new(stream.take(bytes)), bytes));
                }
                let mut file = File::open(path).map_err(read)?;
                file.seek(SeekFrom::Start(at)).map_err(read)?;
                Ok((Box::new(file.take(bytes)), bytes))
            }
        }
    }

    fn json(&self, name: &str, digest: Option<&OciDigest>) -> Result<Vec<u8>, PrepareError> {
        let (reader, bytes) = self.open(name)?;
        if bytes > OCI_JSON_BYTES_MAX {
            return Err(bad(format!("{name} is longer than 4 MiB")));
        }
        let mut out = Vec::new();
        let mut reader = reader.take(OCI_JSON_BYTES_MAX);
        reader.read_to_end(&mut out).map_err(|e| PrepareError::read(name, e))?;
        if let Some(digest) = digest {
            check_json(&out, digest)?;
        }
        Ok(out)
    }
}

/// Holds some JSON against its digest.
pub(crate) fn check_json(bytes: &[u8], digest: &OciDigest) -> Result<(), PrepareError> {
    let got = to_hex(&Sha256::digest(bytes));
    if got == sha256(digest)? {
        return Ok(());
    }
    let what = format!("the JSON is sha256:{got} and not what names it");
    Err(Refusal::new(Rule::Digest, digest.to_string().as_bytes(), what).into())
}

pub(crate) fn sha256(digest: &OciDigest) -> Result<&str, PrepareError> {
    let text = digest.to_string();
    let good = text.strip_prefix("sha256:").is_some_and(|hex| hex.len() == 64);
    if good { Ok(digest.digest()) } else { Err(bad(format!("a digest other than sha256: {text}"))) }
}

fn clean(path: &[u8]) -> Result<String, PrepareError> {
    join("", path)
}

/// A path in an archive, its `.` and `..` taken out by text: it is only a key here.
fn join(dir: &str, path: &[u8]) -> Result<String, PrepareError> {
    let path = std::str::from_utf8(path).map_err(|_| bad("a name that is not UTF-8"))?;
    let mut out: Vec<&str> = Vec::new();
    for part in dir.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                out.pop();
            }
            _ => out.push(part),
        }
    }
    Ok(out.join("/"))
}

fn blob_name(digest: &OciDigest) -> Result<String, PrepareError> {
    Ok(format!("blobs/sha256/{}", sha256(digest)?))
}

/// The image of an OCI layout for a processor.
pub(crate) fn read_layout(blobs: &Blobs, arch: &str) -> Result<LayeredImage, PrepareError> {
    let index = parse_index(&blobs.json("index.json", None)?)?;
    let mut descriptor = pick(&index, arch)?.clone();
    // An index may name another one, as Docker's do; a third level nobody writes.
    if descriptor.media_type().to_string().contains("index")
        || descriptor.media_type().to_string().contains("manifest.list")
    {
        let digest = descriptor.digest();
        let inner = parse_index(&blobs.json(&blob_name(digest)?, Some(digest))?)?;
        descriptor = pick(&inner, arch)?.clone();
    }
    let digest = descriptor.digest();
    let manifest = blobs.json(&blob_name(digest)?, Some(digest))?;
    let manifest = parse_manifest(&manifest)?;
    let config_digest = manifest.config().digest();
    let config = blobs.json(&blob_name(config_digest)?, Some(config_digest))?;
    layered(&manifest, &config, arch, blob_name)
}

pub(crate) fn parse_index(bytes: &[u8]) -> Result<ImageIndex, PrepareError> {
    ImageIndex::from_reader(bytes).map_err(|e| bad(format!("an index that does not parse: {e}")))
}

pub(crate) fn parse_manifest(bytes: &[u8]) -> Result<ImageManifest, PrepareError> {
    let parsed = ImageManifest::from_reader(bytes);
    parsed.map_err(|e| bad(format!("a manifest that does not parse: {e}")))
}

/// A manifest with its config: which layers, and what they must be.
pub(crate) fn layered(
    manifest: &ImageManifest,
    config: &[u8],
    arch: &str,
    name: impl Fn(&OciDigest) -> Result<String, PrepareError>,
) -> Result<LayeredImage, PrepareError> {
    let (config, diff_ids) = parse_config(config, arch)?;
    if manifest.layers().len() > LAYERS_MAX {
        return Err(bad("more than 512 layers"));
    }
    if manifest.layers().len() != diff_ids.len() {
        return Err(bad("another number of layers than of their digests in the config"));
    }
    let layers = manifest.layers().iter().zip(diff_ids).map(|(layer, diff_id)| {
        let packed = Some(sha256(layer.digest())?.to_owned());
        Ok(LayerSource {
            name: name(layer.digest())?,
            bytes: Some(layer.size()),
            digests: Digests { packed, unpacked: Some(diff_id) },
        })
    });
    Ok(LayeredImage { config, layers: layers.collect::<Result<_, PrepareError>>()? })
}

/// The entry of an index that is for this processor, or the only one.
pub(crate) fn pick<'a>(
    index: &'a ImageIndex,
    arch: &str,
) -> Result<&'a oci_spec::image::Descriptor, PrepareError> {
    let fits = |d: &&oci_spec::image::Descriptor| {
        let platform = d.platform().as_ref();
        platform
            .is_some_and(|p| p.architecture().to_string() == arch && p.os().to_string() == "linux")
    };
    let found = index.manifests().iter().find(fits);
    match (found, index.manifests().as_slice()) {
        (Some(found), _) => Ok(found),
        (None, [only]) => Ok(only),
        (None, []) => Err(bad("an index without an image")),
        (None, all) => {
            let has: Vec<_> = all.iter().filter_map(|d| d.platform().as_ref()).collect();
            let has: Vec<_> =
                has.iter().map(|p| format!("{}/{}", p.os(), p.architecture())).collect();
            let what = format!("there is no linux/{arch} image among: {}", has.join(", "));
            Err(Refusal::new(Rule::Architecture, b"", what).into())
        }
    }
}

/// An image's config, and the digests of its unpacked layers.
fn parse_config(bytes: &[u8], arch: &str) -> Result<(ImageConfig, Vec<String>), PrepareError> {
    let config = ImageConfiguration::from_reader(bytes)
        .map_err(|e| bad(format!("a config that does not parse: {e}")))?;
    let (has, os) = (config.architecture().to_string(), config.os().to_string());
    if has != arch || os != "linux" {
        let what = format!("the image is for {os}/{has} and hosts here are linux/{arch}");
        return Err(Refusal::new(Rule::Architecture, b"", what).into());
    }
    let diff_ids = config.rootfs().diff_ids().iter().map(|id| {
        let hex = id.strip_prefix("sha256:").filter(|hex| hex.len() == 64);
        hex.map(str::to_owned).ok_or_else(|| bad("a layer's digest that is no sha256"))
    });
    let diff_ids = diff_ids.collect::<Result<_, _>>()?;
    let run = config.config().clone().unwrap_or_default();
    let image = ImageConfig {
        entrypoint: run.entrypoint().clone().unwrap_or_default(),
        cmd: run.cmd().clone().unwrap_or_default(),
        env: run.env().clone().unwrap_or_default(),
        cwd: run.working_dir().clone().unwrap_or_default(),
        user: run.user().clone().unwrap_or_default(),
        arch: has,
        os,
    };
    Ok((image, diff_ids))
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    layers: Vec<String>,
}

/// The image of an archive: what `docker save` wrote, old or new, or an OCI layout in a tar.
pub(crate) fn read_archive(blobs: &Blobs, arch: &str) -> Result<LayeredImage, PrepareError> {
    if !blobs.has("manifest.json") {
        return read_layout(blobs, arch);
    }
    let images: Vec<DockerImage> = serde_json::from_slice(&blobs.json("manifest.json", None)?)
        .map_err(|e| bad(format!("a manifest.json that does not parse: {e}")))?;
    let [image] = images.as_slice() else {
        return Err(bad(format!("{} images in one archive; save one", images.len())));
    };
    let config = blobs.json(&clean(image.config.as_bytes())?, None)?;
    let (config, diff_ids) = parse_config(&config, arch)?;
    if image.layers.len() > LAYERS_MAX || image.layers.len() != diff_ids.len() {
        return Err(bad("another number of layers than of their digests in the config"));
    }
    let layers = image.layers.iter().zip(diff_ids).map(|(name, diff_id)| {
        let name = clean(name.as_bytes())?;
        Ok(LayerSource {
            bytes: blobs.bytes(&name),
            name,
            digests: Digests { packed: None, unpacked: Some(diff_id) },
        })
    });
    Ok(LayeredImage { config, layers: layers.collect::<Result<_, PrepareError>>()? })
}
