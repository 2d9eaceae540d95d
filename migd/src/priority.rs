//! The daemon and its shepherds go before the work of their node: a guest stands still while they work,
//! and a daemon that is late is taken for dead. A guest does not inherit it: its own scheduling
//! attributes are part of its image.

use checkpoint::sys::sched;

/// Well before ordinary processes, and behind what the system itself puts first.
const NICE: i32 = -10;
/// `sched_nice` in `struct sched_attr` (sched_setattr(2)).
const NICE_AT: std::ops::Range<usize> = 16..20;

/// For this thread and those that it will start.
pub fn raise() {
    let raised = sched::attributes(0).and_then(|mut attributes| {
        attributes[NICE_AT].copy_from_slice(&NICE.to_ne_bytes());
        sched::set_attributes(0, &attributes)
    });
    if let Err(errno) = raised {
        tracing::debug!(%errno, "the priority stays as it is");
    }
}
