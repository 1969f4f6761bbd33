//! How far a prepare is: what a caller shows as a bar, and how it stops one.

/// Hears how far a prepare is. Called often, from a thread of its own: it must be quick.
pub trait Progress: Send + Sync {
    /// Something new begins, of so many bytes if that is known.
    fn begin(&self, what: &str, bytes: Option<u64>) {
        let _ = (what, bytes);
    }

    /// So many more bytes of it were read.
    fn advance(&self, bytes: u64) {
        let _ = bytes;
    }

    /// Whether to stop. Nothing is published then.
    fn stopped(&self) -> bool {
        false
    }
}

/// Nobody listens.
impl Progress for () {}
