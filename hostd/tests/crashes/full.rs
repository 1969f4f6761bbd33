//! FAULTS O2: the file system of the state directory is full, and has room again.

use std::{
    fs,
    io::Write as _,
    path::Path,
    time::{Duration, Instant},
};

use wire::{
    call::State,
    launch::{LaunchReply, LaunchRequest},
};

use crate::{
    common::{block_on, inspect, launch, request, started},
    place::{Place, exited},
};

/// A small file system over a directory, until dropped.
struct Small(tempfile::TempDir);

impl Small {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", dir.path(), "tmpfs", flags, c"size=48m").unwrap();
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Takes all room there is.
    fn fill(&self) {
        let mut file = fs::File::create(self.path().join("fill")).unwrap();
        for piece in [1 << 20, 4096] {
            while file.write_all(&vec![7; piece]).is_ok() {}
        }
    }

    fn make_room(&self) {
        fs::remove_file(self.path().join("fill")).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

/// While it is full each launch starts whole or fails, and what runs goes on; with room again launches start, and a
/// hostd that is killed then finds everything that it had started.
pub(crate) fn a_full_state_directory_undoes_what_it_fails() {
    let small = Small::new();
    let mut place = Place::with(|config| config.state = small.path().join("state"));
    let runs = |number: u128| request(number, "img", &["sleep", "777"]);
    let first = block_on(async {
        let placer = place.placer().await;
        started(&placer, &runs(1)).await.sandbox
    });
    small.fill();
    let mut live = vec![(runs(1), first)];
    block_on(async {
        let placer = place.placer().await;
        for number in 2..34 {
            // Requests of some length, so that the journal has to grow.
            let padded =
                LaunchRequest { env: vec![("PAD".into(), "x".repeat(30_000))], ..runs(number) };
            match launch(&placer, &padded).await {
                LaunchReply::Started(answer) => live.push((padded, answer.sandbox)),
                LaunchReply::Failed(fault) => {
                    assert_eq!(fault.code, wire::Code::Storage, "{fault}");
                }
                LaunchReply::Refused(refused) => panic!("{refused:?}"),
            }
        }
        println!("{} of 33 started with a full disk", live.len());
        assert!(live.len() < 33, "the disk was not full");
        assert_eq!(place.boxes_of_programs("sleep"), live.len(), "nothing half made");
        small.make_room();
        let begun = Instant::now();
        let again = loop {
            match launch(&placer, &runs(1_000 + begun.elapsed().as_millis())).await {
                LaunchReply::Started(answer) => break answer.sandbox,
                other => assert!(begun.elapsed() < Duration::from_secs(20), "{other:?}"),
            }
        };
        assert_eq!(inspect(&placer, again).await.state, State::Running);
        wire_kill(&placer, again).await;
    });
    place.kill_hostd();
    place.start_hostd();
    block_on(async {
        let placer = place.placer().await;
        for (request, id) in &live {
            assert_eq!(started(&placer, request).await.sandbox, *id);
            assert_eq!(inspect(&placer, *id).await.state, State::Running);
        }
    });
    place.end();
    drop(small);
}

async fn wire_kill(placer: &quinn::Connection, id: wire::SandboxId) {
    let call = wire::call::Call::Kill { sandbox: id, signal: 0 };
    crate::common::call(placer, &call).await.unwrap();
    exited(placer, id).await;
}
