//! A thread with a stack for deep trees: a path may have a thousand names, and walks are recursive.

use std::io;

/// Deeper than any path that is let in needs, in a build without optimisation. Only what is used is ever real memory.
const STACK_BYTES: usize = 64 << 20;

/// Runs `work` on a thread of its own, from now on; what is given back waits for it.
pub(crate) fn on_deep_stack<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> impl Future<Output = io::Result<T>> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES);
    let started = thread.spawn(move || sender.send(work()));
    async move {
        started?;
        receiver.await.map_err(|_| io::Error::other("the thread died"))
    }
}
