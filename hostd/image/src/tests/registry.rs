//! Pulls from a real registry: Debian's `docker-registry`, filled by `skopeo`.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::sources::{check_layers, gzip, layers, write_layout};
use super::support::{is_root, memory, mounter};
use crate::{PrepareError, PrepareSpec, RegistryAccess, Rule, Source};

struct Registry {
    child: Child,
    port: u16,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A registry with the image `app:1`, or `None` where the tools are not installed.
fn start(dir: &Path, login: bool) -> Option<Registry> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (data, config) = (dir.join("registry"), dir.join("registry.yml"));
    let mut text = format!(
        "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
         http: {{addr: '127.0.0.1:{port}'}}\n",
        data.display()
    );
    if login {
        // volley:secret, by crypt(3) with bcrypt
        let users = dir.join("users");
        let hash = "volley:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";
        fs::write(&users, hash).unwrap();
        text += &format!("auth: {{htpasswd: {{realm: r, path: {}}}}}\n", users.display());
    }
    fs::write(&config, text).unwrap();
    let child = Command::new("docker-registry")
        .arg("serve")
        .arg(&config)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let child = child.inspect_err(|e| println!("skipped: docker-registry: {e}")).ok()?;
    let registry = Registry { child, port };
    let started = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(started.elapsed() < Duration::from_secs(20), "the registry does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    let layout = dir.join("layout");
    write_layout(&layout, &layers(), crate::host_arch(), gzip);
    let mut copy = Command::new("skopeo");
    copy.args(["--insecure-policy", "copy", "-q", "--dest-tls-verify=false"]);
    if login {
        copy.args(["--dest-creds", "volley:secret"]);
    }
    copy.arg(format!("oci:{}", layout.display()));
    let done = copy.arg(format!("docker://127.0.0.1:{port}/app:1")).output();
    let done = done.inspect_err(|e| println!("skipped: skopeo: {e}")).ok()?;
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    Some(registry)
}

fn spec(registry: &Registry, reference: &str) -> PrepareSpec {
    PrepareSpec {
        domain: "test".to_owned(),
        name: "app".to_owned(),
        source: Source::Registry(format!("127.0.0.1:{}/{reference}", registry.port)),
        arch: crate::host_arch().to_owned(),
    }
}

fn plain() -> RegistryAccess {
    let _ = rustls::crypto::ring::default_provider().install_default();
    RegistryAccess { plain_http: true, ..RegistryAccess::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_comes_out_of_a_registry() {
    let dir = tempfile::tempdir().unwrap();
    let Some(registry) = start(dir.path(), false) else { return };
    let store = memory();
    let pull = |reference: &str| {
        crate::prepare_with(store.clone(), spec(&registry, reference), plain(), Arc::new(()))
    };
    let done = pull("app:1").await.unwrap();
    assert!(matches!(pull("app:2").await, Err(PrepareError::Registry(_))));
    if is_root() {
        let mounter = mounter(&store, dir.path(), true).await;
        check_layers(&mounter.mount(done.id).await.unwrap().layers().lower[0]);
    }
    // A blob that rots in the registry.
    let blobs = dir.path().join("registry/docker/registry/v2/blobs/sha256");
    for sub in fs::read_dir(blobs).unwrap() {
        for blob in fs::read_dir(sub.unwrap().path()).unwrap() {
            let path = blob.unwrap().path().join("data");
            let mut bytes = fs::read(&path).unwrap();
            if bytes.starts_with(&[0x1f, 0x8b]) {
                // A field of the gzip head that unpacking does not look at.
                bytes[4] ^= 1;
                fs::write(&path, bytes).unwrap();
            }
        }
    }
    let error = pull("app:1").await.unwrap_err();
    let refused = error.rule() == Some(Rule::Digest);
    assert!(refused || error.to_string().contains("igest"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_wants_a_login_gets_one() {
    let dir = tempfile::tempdir().unwrap();
    let Some(registry) = start(dir.path(), true) else { return };
    let pull =
        |access| crate::prepare_with(memory(), spec(&registry, "app:1"), access, Arc::new(()));
    assert!(matches!(pull(plain()).await, Err(PrepareError::Registry(_))));
    let login = |secret: &str| Some(("volley".to_owned(), secret.to_owned()));
    let wrong = RegistryAccess { login: login("wrong"), ..plain() };
    assert!(matches!(pull(wrong).await, Err(PrepareError::Registry(_))));
    let right = RegistryAccess { login: login("secret"), ..plain() };
    pull(right).await.unwrap();
}
