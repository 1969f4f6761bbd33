//! Every kind of source, and tools of others on both sides: what `tar`, `umoci` and Docker-like archives say comes out.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::support::{assert_same, is_root, make_varied, memory, mounter, prepared, snapshot};
use crate::id::to_hex;
use crate::{PrepareError, Rule, Source};

pub(super) fn digest(bytes: &[u8]) -> String {
    to_hex(&Sha256::digest(bytes))
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

/// A tar of files and whiteouts: a name that ends in `/` is a directory.
pub(super) fn tar_of(entries: &[(&str, &str)]) -> Vec<u8> {
    let mut out = tar::Builder::new(Vec::new());
    for (name, text) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(if name.ends_with('/') { 0o755 } else { 0o644 });
        let kind =
            if name.ends_with('/') { tar::EntryType::Directory } else { tar::EntryType::Regular };
        header.set_entry_type(kind);
        out.append_data(&mut header, name, text.as_bytes()).unwrap();
    }
    out.into_inner().unwrap()
}

pub(super) fn layers() -> Vec<Vec<u8>> {
    vec![
        tar_of(&[
            ("a/", ""),
            ("a/old", "1"),
            ("a/kept", "1"),
            ("gone/", ""),
            ("gone/x", "1"),
            ("o/x", "1"),
        ]),
        tar_of(&[("a/.wh.old", ""), (".wh.gone", ""), ("o/.wh..wh..opq", ""), ("o/y", "2")]),
    ]
}

pub(super) fn check_layers(root: &Path) {
    let paths: Vec<_> = snapshot(root).into_keys().map(|p| String::from_utf8(p).unwrap()).collect();
    assert_eq!(paths, ["", "a", "a/kept", "o", "o/y"]);
}

fn config_json(diff_ids: &[String], arch: &str) -> String {
    let ids: Vec<_> = diff_ids.iter().map(|id| format!("\"sha256:{id}\"")).collect();
    format!(
        "{{\"architecture\":\"{arch}\",\"os\":\"linux\",\"config\":{{\"Env\":[\"A=b\"],\"Cmd\":[\"sh\"],\
         \"Entrypoint\":[\"/init\"],\"WorkingDir\":\"/w\",\"User\":\"7:8\"}},\
         \"rootfs\":{{\"type\":\"layers\",\"diff_ids\":[{}]}}}}",
        ids.join(",")
    )
}

/// Writes an OCI layout, its layers packed as `pack` says.
pub(super) fn write_layout(
    dir: &Path,
    layers: &[Vec<u8>],
    arch: &str,
    pack: impl Fn(&[u8]) -> Vec<u8>,
) {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        fs::write(blobs.join(digest(bytes)), bytes).unwrap();
        (digest(bytes), bytes.len())
    };
    let diff_ids: Vec<_> = layers.iter().map(|layer| digest(layer)).collect();
    let (config, config_len) = put(config_json(&diff_ids, arch).as_bytes());
    let descriptors: Vec<_> = layers
        .iter()
        .map(|layer| {
            let (hex, len) = put(&pack(layer));
            format!(
                "{{\"mediaType\":\"application/vnd.oci.image.layer.v1.tar+gzip\",\
                 \"digest\":\"sha256:{hex}\",\"size\":{len}}}"
            )
        })
        .collect();
    let manifest = format!(
        "{{\"schemaVersion\":2,\"config\":{{\"mediaType\":\"application/vnd.oci.image.config.v1+json\",\
         \"digest\":\"sha256:{config}\",\"size\":{config_len}}},\"layers\":[{}]}}",
        descriptors.join(",")
    );
    let (manifest, len) = put(manifest.as_bytes());
    let index = format!(
        "{{\"schemaVersion\":2,\"manifests\":[{{\"mediaType\":\"application/vnd.oci.image.manifest.v1+json\",\
         \"digest\":\"sha256:{manifest}\",\"size\":{len}}}]}}"
    );
    fs::write(dir.join("index.json"), index).unwrap();
    fs::write(dir.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}").unwrap();
}

/// Prepares a source, mounts it unpacked, and gives the root.
async fn unpacked(dir: &Path, source: Source) -> PathBuf {
    let store = memory();
    let summary = prepared(&store, "x", source).await;
    let mounter = mounter(&store, dir, true).await;
    mounter.mount(summary.id).await.unwrap().layers().lower[0].clone()
}

async fn refused(source: Source) -> PrepareError {
    crate::prepare(memory(), "test", "x", source, Arc::new(())).await.unwrap_err()
}

#[tokio::test]
async fn an_oci_layout_with_every_packing() {
    type Pack = fn(&[u8]) -> Vec<u8>;
    let packings: [(&str, Pack); 3] = [
        ("plain", |b| b.to_vec()),
        ("gzip", gzip),
        ("zstd", |b| zstd::bulk::compress(b, 3).unwrap()),
    ];
    for (name, pack) in packings {
        let dir = tempfile::tempdir().unwrap();
        let layout = dir.path().join("layout");
        write_layout(&layout, &layers(), crate::host_arch(), pack);
        let source = Source::detect(layout.to_str().unwrap()).unwrap();
        assert_eq!(source, Source::OciLayout(layout), "{name}");
        if !is_root() {
            println!("skipped: owners need root");
            return;
        }
        check_layers(&unpacked(dir.path(), source).await);
    }
}

#[tokio::test]
async fn the_config_is_carried() {
    let dir = tempfile::tempdir().unwrap();
    write_layout(dir.path(), &layers(), crate::host_arch(), gzip);
    let store = memory();
    let summary = prepared(&store, "x", Source::OciLayout(dir.path().to_owned())).await;
    let config = crate::config(store.clone(), "test", summary.id).await.unwrap();
    assert_eq!((config.entrypoint[0].as_str(), config.cmd[0].as_str()), ("/init", "sh"));
    assert_eq!((config.env[0].as_str(), config.cwd.as_str()), ("A=b", "/w"));
    assert_eq!((config.user.as_str(), config.os.as_str()), ("7:8", "linux"));
    // To another domain it is not there.
    let other = crate::config(store, "other", summary.id).await.unwrap_err();
    assert!(other.is_not_found(), "{other}");
}

#[tokio::test]
async fn what_is_wrong_with_a_layout_is_said_by_rule() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    write_layout(&at("arch"), &layers(), "riscv64", gzip);
    let error = refused(Source::OciLayout(at("arch"))).await;
    assert_eq!(error.rule(), Some(Rule::Architecture), "{error}");

    // Each blob in turn with one bit flipped.
    write_layout(&at("good"), &layers(), crate::host_arch(), gzip);
    for blob in fs::read_dir(at("good/blobs/sha256")).unwrap() {
        let blob = blob.unwrap().path();
        let good = fs::read(&blob).unwrap();
        let mut bad = good.clone();
        let middle = bad.len() / 2;
        bad[middle] ^= 1;
        fs::write(&blob, bad).unwrap();
        let error = refused(Source::OciLayout(at("good"))).await;
        // A flipped bit of gzip may be found by gzip first, or by the tar in it.
        let rules = [Rule::Digest, Rule::BrokenCompression, Rule::BrokenTar];
        assert!(error.rule().is_some_and(|rule| rules.contains(&rule)), "{error}");
        fs::remove_file(&blob).unwrap();
        let error = refused(Source::OciLayout(at("good"))).await;
        assert_eq!(error.rule(), Some(Rule::Layout), "{error}");
        fs::write(&blob, good).unwrap();
    }
    prepared(&memory(), "x", Source::OciLayout(at("good"))).await;
}

#[tokio::test]
async fn archives_as_docker_wrote_them() {
    if !is_root() {
        println!("skipped: owners need root");
        return;
    }
    let all = layers();
    let ids: Vec<_> = all.iter().map(|layer| digest(layer)).collect();
    let config = config_json(&ids, crate::host_arch());
    let manifest =
        "[{\"Config\":\"c.json\",\"RepoTags\":null,\"Layers\":[\"1/layer.tar\",\"2/layer.tar\"]}]";
    let mut tar = tar::Builder::new(Vec::new());
    let mut put = |name: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, bytes).unwrap();
    };
    let named = format!("{}/VERSION", "0".repeat(64));
    put(&named, b"1.0");
    put("real/layer.tar", &all[0]);
    put("2/layer.tar", &all[1]);
    put("c.json", config.as_bytes());
    put("manifest.json", manifest.as_bytes());
    // A layer that two images shared was a link.
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    tar.append_link(&mut header, "1/layer.tar", "../real/layer.tar").unwrap();
    let archive = tar.into_inner().unwrap();
    for (name, bytes) in [("plain.tar", archive.clone()), ("packed.tar.gz", gzip(&archive))] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        let source = Source::detect(path.to_str().unwrap()).unwrap();
        assert_eq!(source, Source::Archive(path));
        check_layers(&unpacked(dir.path(), source).await);
    }
}

#[tokio::test]
async fn a_root_file_system_as_gnu_tar_writes_it() {
    if !is_root() {
        println!("skipped: owners and devices need root");
        return;
    }
    for format in [
        &["--format=gnu"][..],
        &["--format=posix"],
        &["--format=gnu", "-S"],
        &["--format=posix", "-S"],
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (root, tar) = (dir.path().join("rootfs"), dir.path().join("rootfs.tar"));
        fs::create_dir(&root).unwrap();
        make_varied(&root);
        let posix = format[0] == "--format=posix";
        let mut command = Command::new("tar");
        command.args(format).arg("-C").arg(&root).arg("-cf").arg(&tar);
        if posix {
            command.args(["--xattrs", "--xattrs-include=*"]);
        }
        match command.arg(".").status() {
            Ok(done) => assert!(done.success()),
            Err(error) => {
                println!("skipped: tar: {error}");
                return;
            }
        }
        let source = Source::detect(tar.to_str().unwrap()).unwrap();
        assert_eq!(source, Source::RootfsTar(tar));
        let got = snapshot(&unpacked(dir.path(), source).await);
        let mut want = snapshot(&root);
        let mut got = got;
        if !posix {
            // The old format has whole seconds and no xattrs.
            for all in [&mut want, &mut got] {
                all.values_mut().for_each(|line| *line = without_xattrs_and_nanos(line));
            }
        }
        assert_same(&want, &got);
    }
}

fn without_xattrs_and_nanos(line: &str) -> String {
    let mut words: Vec<&str> = line.split(' ').collect();
    words.retain(|word| !["user.", "trusted.", "security."].iter().any(|p| word.starts_with(p)));
    // A time before 1970 is rounded down there and cut off here.
    words.retain(|word| !word.contains('.') || word.starts_with('/'));
    words.join(" ")
}

#[tokio::test]
async fn a_file_that_is_no_image_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text");
    fs::write(&path, "hello\n".repeat(1000)).unwrap();
    let error = Source::detect(path.to_str().unwrap()).unwrap_err();
    assert_eq!(error.rule(), Some(Rule::BrokenTar), "{error}");
    let error = Source::detect(dir.path().join("none.tar").to_str().unwrap()).unwrap_err();
    assert!(matches!(error, PrepareError::NoSource(_)), "{error}");
    let source = Source::detect("docker.io/library/busybox:1.36").unwrap();
    assert_eq!(source, Source::Registry("docker.io/library/busybox:1.36".into()));
}

#[test]
fn an_archive_is_known_by_any_name_that_only_archives_have() {
    let dir = tempfile::tempdir().unwrap();
    let detected = |names: &[&str]| {
        let path = dir.path().join("x.tar");
        let mut tar = tar::Builder::new(fs::File::create(&path).unwrap());
        for name in names {
            let mut header = tar::Header::new_ustar();
            header.set_size(3);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, &b"{}\n"[..]).unwrap();
        }
        tar.into_inner().unwrap();
        Source::detect(path.to_str().unwrap()).unwrap()
    };
    let is_archive = |names: &[&str]| matches!(detected(names), Source::Archive(_));
    assert!(is_archive(&["layer.tar", "a.json", "manifest.json"]));
    assert!(is_archive(&["./VERSION", "./oci-layout"]));
    assert!(!is_archive(&["some", "thing", "usr/lib/x", "manifest.json"]));
    assert!(!is_archive(&["thing"]));
}
