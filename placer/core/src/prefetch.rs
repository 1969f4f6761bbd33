//! One hint to the processor: bring this cache line.
//!
//! A plain early read does not do: the locked exchange of each pick waits for every read before it, so that the misses of
//! the next pick would be waited for in this one. A prefetch is waited for by nobody. It is the only `unsafe` of the crate.
#![allow(unsafe_code, reason = "the intrinsic takes a raw pointer")]

/// Asks for the cache line of `at`.
#[inline(always)]
pub(crate) fn prefetch<T>(at: &T) {
    #[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
    // SAFETY: the instruction reads and writes nothing that a program can see and faults at no address; the address comes
    // from a reference, so that it is a valid one all the same; SSE is part of every x86_64.
    unsafe {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(core::ptr::from_ref(at).cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
    let _ = at;
}
