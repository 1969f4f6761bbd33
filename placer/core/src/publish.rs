//! Swapping a map or a table under its readers.
//!
//! Each reader keeps its own share of the value and looks at one version word before use, a plain load of a line that
//! stays in its cache. Only when the version moved does it try the lock, and when the lock is not free it goes on with what it
//! has: a swap never blocks a reader, and a reader that stands still never blocks a swap.

use crate::sync::{Arc, Cell, Mutex, Ordering, Version};

/// A value that is replaced as a whole.
#[derive(Debug)]
pub struct Published<T> {
    version: Version,
    current: Mutex<Arc<T>>,
}

/// One thread's share of a published value.
#[derive(Debug)]
pub struct Reader<T> {
    of: Arc<Published<T>>,
    seen: u64,
    held: Arc<T>,
}

impl<T> Published<T> {
    /// Publishes the first value.
    pub fn new(value: Arc<T>) -> Arc<Self> {
        Arc::new(Self { version: Version::new(0), current: Mutex::new(value) })
    }

    /// Replaces the value; gives back the old one.
    ///
    /// # Panics
    /// If another thread panicked in here, which nothing in here does.
    pub fn replace(&self, value: Arc<T>) -> Arc<T> {
        #[expect(clippy::unwrap_used, reason = "nothing panics while it is held")]
        let mut current = self.current.lock().unwrap();
        let old = std::mem::replace(&mut *current, value);
        let version = Cell::load(&self.version, Ordering::Relaxed);
        // Release: a reader that sees the new version and takes the lock finds this value or a later one. The lock
        // alone would do for the value; this orders what the writer did before it replaced.
        Cell::store(&self.version, version + 1, Ordering::Release);
        drop(current);
        old
    }

    /// A reader for one thread.
    #[cfg(not(loom))]
    pub fn reader(self: &Arc<Self>) -> Reader<T> {
        Reader::of(self)
    }

    /// A reader for one thread. (loom's `Arc` cannot be a receiver.)
    #[cfg(loom)]
    pub fn reader(this: &Arc<Self>) -> Reader<T> {
        Reader::of(this)
    }
}

impl<T> Reader<T> {
    fn of(published: &Arc<Published<T>>) -> Self {
        #[expect(clippy::unwrap_used, reason = "nothing panics while it is held")]
        let current = published.current.lock().unwrap();
        let seen = Cell::load(&published.version, Ordering::Relaxed);
        Self { of: Arc::clone(published), seen, held: Arc::clone(&current) }
    }

    /// The newest value that can be had without waiting.
    #[inline]
    pub fn get(&mut self) -> &Arc<T> {
        if Cell::load(&self.of.version, Ordering::Acquire) != self.seen {
            self.refresh();
        }
        &self.held
    }

    #[cold]
    fn refresh(&mut self) {
        let Ok(current) = self.of.current.try_lock() else { return };
        // Under the lock the version and the value belong together.
        self.seen = Cell::load(&self.of.version, Ordering::Relaxed);
        let old = std::mem::replace(&mut self.held, Arc::clone(&current));
        drop(current);
        drop(old); // The last reader of a map unmaps it: not under the lock.
    }
}

impl<T> Clone for Reader<T> {
    fn clone(&self) -> Self {
        Self { of: Arc::clone(&self.of), seen: self.seen, held: Arc::clone(&self.held) }
    }
}
