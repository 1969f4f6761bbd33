//! Images: prepared once into a lazy form on storage that every host reads, and mounted by any host in the same time.
//!
//! [`prepare()`] turns an OCI image, an archive of one, a rootfs tar or a directory into packs, an EROFS image of the metadata,
//! an object index and a manifest. [`Mounter`] gives what a sandbox's root is composed of. DESIGN.md beside this crate
//! has the format in tables. Left out: which store (any [`object_store::ObjectStore`]), and the box that gets the root.

mod ahead;
mod apply;
mod boot;
mod boot_write;
mod brought;
mod catalog;
mod control;
mod deep;
mod device;
mod disk;
mod erofs;
mod erofs_read;
mod erofs_write;
pub mod far_store;
mod frames;
mod fuse_wire;
mod gc;
mod holder;
mod id;
mod index;
mod kernel;
mod layer;
mod lazy;
mod lazy_host;
pub mod limits;
mod lru;
mod manifest;
mod memory_group;
mod metrics;
mod mount;
mod node;
mod oci;
mod pack;
mod prepare;
mod progress;
mod proof;
mod push;
mod refuse;
mod registry;
mod rootfs;
mod self_check;
mod server;
mod source;
mod store;
mod tar_header;
mod tarball;
#[cfg(test)]
mod tests;
mod tree;
mod unpack;
mod unpacked;
mod worker;

pub use catalog::{BootRow, ImageReport, ImageRow, config, inspect, list, resolve};
pub use gc::{Swept, gc, remove_name};
pub use holder::{OpenStore, main_if_asked};
pub use id::NameError;
pub use index::Damaged;
pub use kernel::{mount_overlay, unmount};
pub use manifest::{ImageConfig, Totals};
pub use metrics::ImageMetrics;
pub use mount::{
    FirstRunGuard, Layers, MountBy, MountConfig, MountMode, MountedImage, Mounter, Run, Serving,
};
pub use prepare::{PrepareSpec, Summary, host_arch, prepare, prepare_spec, prepare_with};
pub use progress::Progress;
pub use push::BootSummary;
pub use refuse::{PrepareError, Refusal, Rule};
pub use registry::RegistryAccess;
pub use source::Source;
pub use store::ImageError;
pub use wire::ImageId;
