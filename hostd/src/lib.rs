//! The host daemon: takes launches over QUIC, makes sandboxes, keeps their deadlines, tells the fleet what is free.
//!
//! One thread owns a host: its endpoint, its core (`hostd-core`) and its tasks live on one single-threaded runtime,
//! so that nothing on the launch path takes a lock. That runtime is tokio-uring where the kernel allows it. A
//! process may serve many hosts, dealt over threads. DESIGN.md beside this crate says what is kept where.
//!
//! Left out: how a box is made (`hostd-sandbox`), how an image is mounted (`hostd-image`), what is decided
//! (`hostd-core`).

mod accept;
mod beats;
mod calls;
mod clock;
pub mod config;
mod doors;
mod host;
mod images;
mod journal;
mod lane;
mod launch;
mod metrics;
mod note;
mod persist;
mod process;
mod real;
mod records;
mod run;
mod runtime;
mod streams;

pub use config::{Boxes, Config, EgressMode, Engine, HostConfig, ShapeConfig};
pub use hostd_sandbox::probe;
pub use real::rehearse::{Rehearsal, Said, rehearse};
pub use run::run;

/// Whether this binary can become what [`main_if_asked`] makes of it.
static ASKED: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

/// Becomes a spawner of boxes, a carrier of their packets, or a holder or server of images, if this process was started as one; then it never
/// returns. Call it first thing in `main` of every binary that runs hostd with real boxes.
pub fn main_if_asked() {
    // Set before any thread is started and only read after: relaxed is enough.
    ASKED.store(true, std::sync::atomic::Ordering::Relaxed);
    hostd_sandbox::main_if_asked();
    hostd_egress::main_if_asked();
    hostd_image::main_if_asked(|url| {
        wire_net::objects::open(url).map_err(|fault| fault.to_string())
    });
}
