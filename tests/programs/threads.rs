// Threads with channels, a lock, a condition variable and thread-local state.
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, mpsc};

thread_local!(static STEPS: Cell<u64> = Cell::new(0));

fn main() {
    let (send, receive) = mpsc::sync_channel(4);
    let turn = Arc::new((Mutex::new(0usize), Condvar::new()));
    let threads: Vec<_> = (0..4)
        .map(|me: usize| {
            let (send, turn) = (send.clone(), turn.clone());
            std::thread::spawn(move || {
                for round in 0..60u64 {
                    let mut x = me as u64 * 7919 + round;
                    let mut counts = BTreeMap::new();
                    for _ in 0..150_000 {
                        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        *counts.entry(x >> 52).or_insert(0u64) += x & 3;
                        STEPS.set(STEPS.get() + 1);
                    }
                    // One after the other, in the same order each round.
                    let (lock, changed) = &*turn;
                    let mut now = changed.wait_while(lock.lock().unwrap(), |now| *now != me).unwrap();
                    *now = (*now + 1) % 4;
                    changed.notify_all();
                    drop(now);
                    let sum = counts.iter().fold(0u64, |sum, (k, v)| sum.wrapping_mul(31).wrapping_add(k * v));
                    send.send((round, me, sum, STEPS.get())).unwrap();
                }
            })
        })
        .collect();
    drop(send);
    let mut lines: Vec<_> = receive.iter().collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    lines.sort();
    for line in lines {
        println!("{line:?}");
    }
}
