//! Images: prepared once into a lazy form on storage that every host reads, and mounted by any host in the same time.
//!
//! [`prepare()`] turns an OCI image, an archive of one, a rootfs tar or a directory into packs, an EROFS image of the metadata,
//! an object index and a manifest. [`Mounter`] gives what a sandbox's root is composed of. DESIGN.md beside this crate
//! has the format in tables. Left out: which store (any [`object_store::ObjectStore`]), and the box that gets the root.

mod apply;
mod catalog;
mod erofs;
mod erofs_read;
mod erofs_write;
mod id;
mod index;
mod layer;
pub mod limits;
mod manifest;
mod mount;
mod oci;
mod pack;
mod prepare;
mod progress;
mod refuse;
mod rootfs;
mod source;
mod store;
mod tarball;
#[cfg(test)]
mod tests;
mod tree;
mod unpack;

pub use catalog::{ImageReport, ImageRow, config, inspect, list, resolve};
pub use id::NameError;
pub use index::Damaged;
pub use manifest::{ImageConfig, Totals};
pub use mount::{Layers, MountConfig, MountMode, MountedImage, Mounter};
pub use prepare::{PrepareSpec, Summary, host_arch, prepare, prepare_spec};
pub use progress::Progress;
pub use refuse::{PrepareError, Refusal, Rule};
pub use source::Source;
pub use store::ImageError;
pub use wire::ImageId;
