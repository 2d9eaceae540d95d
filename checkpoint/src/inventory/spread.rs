//! Many looks at `/proc` at the same time: most of each is spent in the kernel.

use std::sync::OnceLock;

/// With fewer, starting threads costs more than it saves.
const MANY: usize = 16;
/// Threads, at most.
const THREADS: usize = 8;

/// What `look` says of each item, in their order. With many of them several threads look.
pub fn over<I: Copy + Sync, T: Send>(items: &[I], look: impl Fn(I) -> T + Sync) -> Vec<T> {
    let threads = if items.len() < MANY { 1 } else { at_most() };
    if threads < 2 {
        return items.iter().map(|&item| look(item)).collect();
    }
    std::thread::scope(|scope| {
        let look = &look;
        let of_part = |part: &[I]| part.iter().map(|&item| look(item)).collect::<Vec<T>>();
        let mut parts = items.chunks(items.len().div_ceil(threads));
        // This thread does its part too.
        let first = parts.next().unwrap_or_default();
        let others: Vec<_> = parts.map(|part| scope.spawn(move || of_part(part))).collect();
        let mut all = of_part(first);
        all.extend(others.into_iter().flat_map(|part| part.join().expect("who looks does not panic")));
        all
    })
}

/// Threads that pay. Asked once: the quota of a control group is looked up in files.
fn at_most() -> usize {
    static FOUND: OnceLock<usize> = OnceLock::new();
    *FOUND.get_or_init(|| std::thread::available_parallelism().map_or(1, |n| n.get().min(THREADS)))
}

#[cfg(test)]
mod tests {
    use super::over;

    #[test]
    fn the_order_stays() {
        let numbers: Vec<i32> = (1..1000).collect();
        assert_eq!(over(&numbers, |n| n * 2), (2..2000).step_by(2).collect::<Vec<i32>>());
        assert!(over(&[], |n: i32| n).is_empty());
        assert_eq!(over(&[1], |n: i32| n), [1]);
    }
}
