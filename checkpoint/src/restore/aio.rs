//! Asynchronous I/O contexts (io_setup(2)): made anew, moved to where their rings were, and brought to where they were
//! with their events.

use super::RestoreError;
use crate::image::{Backing, ContextImage, MmImage, Vma};
use crate::tracee::Tracee;
use crate::tracee::aio::{Contents, EVENT_LEN, Event, Ring};
use nix::errno::Errno;

/// What must hold of those of an image.
pub fn check(mm: &MmImage) -> Result<(), RestoreError> {
    let ordered = mm.contexts.windows(2).all(|pair| pair[0].start < pair[1].start);
    let fit = ordered && mm.contexts.iter().all(|context| ring_of(mm, context).is_some());
    let rings = mm.vmas.iter().filter(|vma| matches!(vma.backing, Backing::Aio { .. }));
    match fit && rings.into_iter().all(|vma| vma.shared && Ring::of(vma).is_some()) {
        true => Ok(()),
        false => Err(RestoreError::Unfit("the image is not consistent: an asynchronous I/O context".into())),
    }
}

fn ring_of(mm: &MmImage, context: &ContextImage) -> Option<Ring> {
    let vma = &mm.vmas[mm.vmas.binary_search_by_key(&context.start, |vma| vma.start).ok()?];
    let ring = matches!(vma.backing, Backing::Aio { .. }).then(|| Ring::of(vma)).flatten()?;
    let events = context.events.len();
    let fits = context.in_flight == 0
        && context.head < ring.slots()
        && events.is_multiple_of(EVENT_LEN)
        && events / EVENT_LEN < ring.slots() as usize;
    fits.then_some(ring)
}

/// Makes the context whose ring is this mapping. All places of mappings are taken: the kernel finds another one for it.
pub fn make(tracee: &mut Tracee, mm: &MmImage, vma: &Vma) -> Result<(), RestoreError> {
    let context = mm.contexts.iter().find(|context| context.start == vma.start);
    let Some((context, ring)) = context.and_then(|context| Some((context, ring_of(mm, context)?))) else {
        let what = "a mapping of its parent's asynchronous I/O context, which it has not inherited";
        return Err(RestoreError::Unfit(what.into()));
    };
    let made = set_up(tracee, ring)?;
    let length = vma.end - vma.start;
    // The kernel takes the context along (aio_ring_mremap in fs/aio.c).
    let how = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
    let args = [made, length, length, how, vma.start, 0];
    tracee.must(0, "moving an asynchronous I/O context", libc::SYS_mremap, args)?;
    let events =
        context.events.chunks_exact(EVENT_LEN).map(|event| Event::try_from(event).expect("its length"));
    ring.fill(tracee, &Contents { head: context.head, events: events.collect(), in_flight: 0 })?;
    Ok(())
}

/// Makes one with a ring of this length, somewhere; gives its address.
fn set_up(tracee: &mut Tracee, ring: Ring) -> Result<u64, RestoreError> {
    let scratch = tracee.scratch();
    tracee.write_mem(scratch, &[0; 8])?;
    let requests = ring.requests();
    let got = tracee.syscall(0, libc::SYS_io_setup, [requests.into(), scratch, 0, 0, 0, 0])?;
    if got < 0 {
        let limit = "all of a machine's together are bounded by /proc/sys/fs/aio-max-nr";
        let what = format!("making an asynchronous I/O context for {requests} requests ({limit})");
        return Err(RestoreError::file(what, Errno::from_raw(-got as i32)));
    }
    let mut made = [0; 8];
    tracee.read_mem(scratch, &mut made)?;
    let made = u64::from_le_bytes(made);
    let mut slots = [0; 4];
    tracee.read_mem(made + 4, &mut slots)?;
    let slots = u32::from_le_bytes(slots);
    if slots != ring.slots() {
        // It depends on the number of CPUs that the kernel is prepared for (ioctx_alloc).
        return Err(RestoreError::Unfit(format!(
            "it has an asynchronous I/O context with room for {} events, and this machine makes none for less than \
             {slots}",
            ring.slots()
        )));
    }
    Ok(made)
}
