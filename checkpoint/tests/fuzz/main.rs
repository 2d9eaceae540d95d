//! What is read and not trusted, mutated at random: images, and the texts of `/proc`.
//!
//! Every input gives an error or a value: no panic, and no allocation beyond a bound. What the reader of
//! images lets through is given to the restorer, which leaves no process behind whatever it was told.
//! Some seconds each with all tests; for long (the same seed gives the same inputs):
//!
//! ```sh
//! FUZZ_SECONDS=3600 FUZZ_SEED=7 cargo test --release -p checkpoint --test fuzz -- --nocapture
//! ```

#[path = "../roundtrip/harness.rs"]
#[allow(dead_code, reason = "the other tests use the rest")]
mod harness;
#[path = "../roundtrip/huge_pool.rs"]
#[allow(dead_code, reason = "the other tests use the rest")]
mod huge_pool;
mod images;
mod lies;
mod mutate;
mod proc_texts;
mod restorer;
mod seeds;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Notes the largest allocation asked for.
struct Watching;

/// Bytes, since it was last set to 0.
pub static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;
