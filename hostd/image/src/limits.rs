//! Every bound of images, with its reason. They stand here and not in `wire`, because no other part of Volley says or
//! reads an image; what the wire says of one is its name.

/// Version of the format that this crate writes, and the only one that it reads.
pub const FORMAT_VERSION: u32 = 2;

/// A manifest is one small GET on the way to a mount.
pub const MANIFEST_BYTES_MAX: usize = 64 << 10;
/// Objects larger than this are cut, so that one read of a large file never fetches more than this.
pub const CHUNK_BYTES: usize = 1 << 20;
/// Small objects are packed together up to about this, so that one GET brings the neighbours too.
pub const FRAME_BYTES: usize = 256 << 10;
/// One PUT. Large enough that a 2 GB image is a few dozen objects, small enough to hold two in memory.
pub const PACK_BYTES: usize = 64 << 20;
/// Files up to this lie inside the EROFS metadata: reading them costs no second fetch.
pub const INLINE_BYTES_MAX: u64 = 2 << 10;
/// Bytes of frame tables that a manifest carries itself; larger tables are one more frame.
pub const TABLE_INLINE_BYTES_MAX: usize = 12 << 10;
/// A frame table kept outside the manifest: 48 bytes a frame, so 20 GiB of metadata.
pub const TABLE_BYTES_MAX: usize = 4 << 20;
/// A frame, uncompressed. Nothing larger is ever allocated because a manifest said so.
pub const FRAME_BYTES_MAX: usize = 4 << 20;

/// Entries of one image.
pub const ENTRIES_MAX: u64 = 8_000_000;
/// Components of a path: PATH_MAX allows 2,048 of one letter.
pub const DEPTH_MAX: usize = 1_024;
/// Bytes of a path: Linux's PATH_MAX.
pub const PATH_BYTES_MAX: usize = 4_095;
/// Bytes of one name: Linux's NAME_MAX.
pub const NAME_BYTES_MAX: usize = 255;
/// Bytes of all files of an image, sparse ones at full length: four million chunks, which is what a hole costs.
pub const IMAGE_BYTES_MAX: u64 = 4 << 40;
/// Bytes of one PAX or GNU long-name record: it is held in memory.
pub const TAR_RECORD_BYTES_MAX: u64 = 1 << 20;
/// Pieces of a sparse file: they are held in memory.
pub const SPARSE_PIECES_MAX: usize = 64 << 10;
/// Bytes of all extended attributes of one file: EROFS counts them in 16 bits of 4 bytes.
pub const XATTR_BYTES_MAX: usize = 64 << 10;
/// A compressed layer may grow this much before the ratio is looked at.
pub const RATIO_FREE_BYTES: u64 = 256 << 20;
/// Beyond that, a layer that grows more than this is a bomb: real file systems stay under 20.
pub const RATIO_MAX: u64 = 200;
/// Bytes of an OCI config, manifest or index: they are held in memory.
pub const OCI_JSON_BYTES_MAX: u64 = 4 << 20;
/// Layers of an image: Docker's own bound is 127.
pub const LAYERS_MAX: usize = 512;
/// Indexes of earlier images that prepare reads to find out what is stored already.
pub const KNOWN_IMAGES_MAX: usize = 64;
/// Bytes of them: they are held in memory.
pub const KNOWN_INDEX_BYTES_MAX: u64 = 256 << 20;
/// Bytes of one index: 48 an object, so five million objects.
pub const INDEX_BYTES_MAX: u64 = 256 << 20;
/// Bytes of one metadata image.
pub const META_BYTES_MAX: u64 = 8 << 30;
/// Bytes of an image's name.
pub const IMAGE_NAME_BYTES_MAX: usize = wire::limits::NAME_BYTES_MAX;
/// Bytes of a domain's name.
pub const DOMAIN_BYTES_MAX: usize = 63;

const _: () = assert!(FRAME_BYTES <= CHUNK_BYTES && CHUNK_BYTES <= FRAME_BYTES_MAX);
const _: () = assert!(CHUNK_BYTES <= PACK_BYTES && TABLE_BYTES_MAX <= FRAME_BYTES_MAX);
// Two tables and a config fit into a manifest: a table in hex is twice its bytes.
const _: () = assert!(2 * 2 * TABLE_INLINE_BYTES_MAX < MANIFEST_BYTES_MAX);
