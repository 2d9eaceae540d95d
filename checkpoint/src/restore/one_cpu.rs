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
    /// What it was allowed before.
    masks: Option<Vec<u8>>,
}

impl OneCpu {
    /// For so many processes. Where it cannot be had, nothing changes.
    pub fn take(processes: usize) -> OneCpu {
        let masks = (processes >= MANY).then(pin).flatten();
        OneCpu { masks }
    }

    /// Whether it is there.
    pub fn is_taken(&self) -> bool {
        self.masks.is_some()
    }

    /// All is done: the threads get the CPUs that they had; where this machine has none of them, those that the
    /// restorer has.
    pub fn release(&self, images: &[ProcessImage], tracees: &[Tracee]) {
        let Some(before) = &self.masks else { return };
        for (image, tracee) in images.iter().zip(tracees) {
            for tid in (0..tracee.thread_count()).map(|i| tracee.tid(i)) {
                let thread = image.threads.iter().find(|thread| thread.tid == tid);
                let its_own = thread.map(|thread| sched::set_affinity(tid, &thread.affinity));
                if !matches!(its_own, Some(Ok(()))) {
                    let _ = sched::set_affinity(tid, before);
                }
                // A deadline needs all CPUs, and could not be set before.
                if let Some(thread) = thread.filter(|thread| sched::is_deadline(&thread.sched)) {
                    let _ = sched::set_attributes(tid, &thread.sched);
                }
            }
        }
    }
}

impl Drop for OneCpu {
    fn drop(&mut self) {
        if let Some(before) = &self.masks {
            let _ = sched::set_affinity(0, before);
        }
    }
}

fn pin() -> Option<Vec<u8>> {
    let before = sched::affinity(0).ok()?;
    let cpu = nix::sched::sched_getcpu().ok()?;
    let mut one = vec![0; before.len()];
    *one.get_mut(cpu / 8)? |= 1 << (cpu % 8);
    sched::set_affinity(0, &one).ok()?;
    Some(before)
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
}
