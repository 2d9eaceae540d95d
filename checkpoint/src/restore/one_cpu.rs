//! A family is rebuilt on one CPU: its restorer and its processes wait for each other all the time, and to
//! wake a task on another CPU, which may be idle, takes several times as long as to switch to it here.

use crate::image::ProcessImage;
use crate::sys::sched;
use crate::tracee::Tracee;

/// From so many processes on: a few are through before it pays, and the threads of one are set at the same
/// time.
const MANY: usize = 8;

/// While it is there, the calling thread stays on the CPU that it is on, as do all that it makes.
pub struct OneCpu {
    /// What it was allowed before, and is meanwhile.
    masks: Option<(Vec<u8>, Vec<u8>)>,
}

impl OneCpu {
    /// For so many processes. Where it cannot be had, nothing changes.
    pub fn take(processes: usize) -> OneCpu {
        let masks = (processes >= MANY).then(pin).flatten();
        OneCpu { masks }
    }

    /// Threads that could not be given the CPUs they had (this machine has none of them) get those that the
    /// restorer has.
    pub fn release(&self, images: &[ProcessImage], tracees: &[Tracee]) {
        let Some((before, meanwhile)) = &self.masks else { return };
        for (image, tracee) in images.iter().zip(tracees) {
            for tid in (0..tracee.thread_count()).map(|i| tracee.tid(i)) {
                let stays = sched::affinity(tid).is_ok_and(|mask| is_same(&mask, meanwhile));
                let thread = image.threads.iter().find(|thread| thread.tid == tid);
                if stays && thread.is_none_or(|thread| !is_same(&thread.affinity, meanwhile)) {
                    let _ = sched::set_affinity(tid, before);
                }
            }
        }
    }
}

impl Drop for OneCpu {
    fn drop(&mut self) {
        if let Some((before, _)) = &self.masks {
            let _ = sched::set_affinity(0, before);
        }
    }
}

fn pin() -> Option<(Vec<u8>, Vec<u8>)> {
    let before = sched::affinity(0).ok()?;
    let cpu = nix::sched::sched_getcpu().ok()?;
    let mut one = vec![0; before.len()];
    *one.get_mut(cpu / 8)? |= 1 << (cpu % 8);
    sched::set_affinity(0, &one).ok()?;
    Some((before, one))
}

/// Masks of different lengths may be the same.
fn is_same(one: &[u8], other: &[u8]) -> bool {
    let common = one.len().min(other.len());
    one[..common] == other[..common] && one[common..].iter().chain(&other[common..]).all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_for_many_and_only_for_a_while() {
        let before = sched::affinity(0).expect("a mask");
        drop(OneCpu::take(MANY - 1));
        let taken = OneCpu::take(MANY);
        let meanwhile = sched::affinity(0).expect("a mask");
        assert_eq!(meanwhile.iter().map(|byte| byte.count_ones()).sum::<u32>(), 1);
        drop(taken);
        assert_eq!(sched::affinity(0).expect("a mask"), before);
    }

    #[test]
    fn masks_are_compared_without_their_ends() {
        assert!(is_same(&[1, 0, 0], &[1]) && is_same(&[], &[0]));
        assert!(!is_same(&[1, 0, 2], &[1]) && !is_same(&[2], &[1]));
    }
}
