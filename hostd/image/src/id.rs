//! Names of things: trust domain, object, frame, pack.
//!
//! An id is a keyed BLAKE3 hash, and the key is derived from the trust domain: the same file has different ids in two
//! domains, so nobody learns by a timing or a listing what another tenant stores. An image's id is `wire`'s.

use crate::limits::{DOMAIN_BYTES_MAX, IMAGE_NAME_BYTES_MAX};

/// 32 bytes of BLAKE3.
pub(crate) type Hash = [u8; 32];

/// What is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not a trust domain.
    #[error(
        "not a trust domain: {0:?}; use up to 63 of a-z, 0-9, '.', '_', '-', and begin with a letter or digit"
    )]
    Domain(String),
    /// Not an image name.
    #[error(
        "not an image name: {0:?}; use up to 128 of A-Z, a-z, 0-9, '.', '_', '-', ':', '@', '/', and begin with a letter or digit"
    )]
    Image(String),
}

/// A trust domain: the tenant within which equal bytes are stored once.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Domain {
    name: String,
    key: Hash,
    list_key: Hash,
}

impl Domain {
    /// The domain of that name.
    ///
    /// # Errors
    /// [`NameError::Domain`] when it is not one.
    pub(crate) fn new(name: &str) -> Result<Self, NameError> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let good = name.len() <= DOMAIN_BYTES_MAX
            && name.bytes().next().is_some_and(plain)
            && name.bytes().all(|b| plain(b) || b"._-".contains(&b));
        if !good {
            return Err(NameError::Domain(name.to_owned()));
        }
        Ok(Self {
            name: name.to_owned(),
            key: blake3::derive_key("volley 1 bytes of a trust domain", name.as_bytes()),
            list_key: blake3::derive_key("volley 1 lists of a trust domain", name.as_bytes()),
        })
    }

    /// Its name.
    #[must_use]
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The hash of some bytes in this domain.
    pub(crate) fn hash(&self, bytes: &[u8]) -> Hash {
        *blake3::keyed_hash(&self.key, bytes).as_bytes()
    }

    /// The key of [`Domain::hash`].
    pub(crate) fn key(&self) -> &Hash {
        &self.key
    }

    /// The key of [`Domain::list_hasher`].
    pub(crate) fn list_key(&self) -> &Hash {
        &self.list_key
    }

    /// Hashes the chunks' hashes of an object that is cut into its id: a large file is hashed once.
    pub(crate) fn list_hasher(&self) -> blake3::Hasher {
        blake3::Hasher::new_keyed(&self.list_key)
    }
}

/// Checks the name by which users call an image.
pub(crate) fn check_image_name(name: &str) -> Result<(), NameError> {
    let good = name.len() <= IMAGE_NAME_BYTES_MAX
        && name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-:@/".contains(&b))
        && name.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
        && hash_from_hex(name).is_none();
    if good { Ok(()) } else { Err(NameError::Image(name.to_owned())) }
}

/// Lower-case hex.
pub(crate) fn to_hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut out = String::with_capacity(bytes.len() * 2);
    for b in bytes {
        out.push(char::from(DIGITS[usize::from(b >> 4)]));
        out.push(char::from(DIGITS[usize::from(b & 15)]));
    }
    out
}

/// Bytes out of lower-case hex, and nothing else.
pub(crate) fn from_hex(s: &str) -> Option<Vec<u8>> {
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    let bytes = s.as_bytes();
    if !bytes.len().is_multiple_of(2) {
        return None;
    }
    bytes.chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

/// A hash out of 64 hex digits.
pub(crate) fn hash_from_hex(s: &str) -> Option<Hash> {
    if s.len() != 64 {
        return None;
    }
    from_hex(s)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn domains_give_different_ids_to_the_same_bytes() {
        let (a, b) = (Domain::new("a").unwrap(), Domain::new("b").unwrap());
        assert_ne!(a.hash(b"x"), b.hash(b"x"));
        assert_eq!(a.hash(b"x"), Domain::new("a").unwrap().hash(b"x"));
        assert_ne!(*a.list_hasher().update(&[7; 32]).finalize().as_bytes(), a.hash(&[7; 32]));
    }

    #[test]
    fn bad_names_are_refused() {
        for bad in ["", "A", "a/b", "-a", "..", &"a".repeat(64)] {
            assert!(Domain::new(bad).is_err(), "{bad}");
        }
        for bad in ["", "/a", "a//b", "a/../b", "a b", "a\n", &"a".repeat(64), "-x"] {
            assert!(check_image_name(bad).is_err(), "{bad}");
        }
        for good in ["a", "docker.io/library/python:3.12", "a@sha256:00"] {
            assert!(check_image_name(good).is_ok(), "{good}");
        }
    }

    #[test]
    fn hex_goes_both_ways() {
        assert_eq!(hash_from_hex(&to_hex(&[0xa5; 32])), Some([0xa5; 32]));
        assert!(hash_from_hex(&"A5".repeat(32)).is_none());
        assert!(from_hex("0").is_none());
    }
}
