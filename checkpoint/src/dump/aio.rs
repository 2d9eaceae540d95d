//! Asynchronous I/O contexts (io_setup(2)): which rings are those of the process' own contexts, and what is in them.

use super::DumpError;
use crate::image::{Backing, ContextImage, MmImage, ProcessImage, Vma};
use crate::inventory::Blocker;
use crate::tracee::aio::Ring;
use crate::tracee::{Call, Tracee, TraceeError};

/// Those of a frozen process, which has these mappings.
pub fn read(tracee: &mut Tracee, vmas: &[Vma]) -> Result<Vec<ContextImage>, DumpError> {
    let rings: Vec<&Vma> = vmas.iter().filter(|vma| matches!(vma.backing, Backing::Aio { .. })).collect();
    let asked = rings.iter().map(|vma| no_events(vma.start)).collect::<Vec<Call>>();
    let replies = tracee.batch(0, &asked)?;
    let own = rings.iter().zip(&replies).filter(|(_, reply)| reply.value >= 0);
    own.map(|(vma, _)| read_one(tracee, vma)).collect()
}

/// Asks for no event, at once: `EINVAL` if it is no context of the process' own (lookup_ioctx in fs/aio.c). After fork
/// a child has the mapping, and not the context.
fn no_events(context: u64) -> Call {
    let args = [context, 0, 0, 0, 0, 0];
    Call::may("io_getevents", libc::SYS_io_getevents, args).input(4, &[0; 16])
}

fn read_one(tracee: &mut Tracee, vma: &Vma) -> Result<ContextImage, DumpError> {
    let what = "its mapping of an asynchronous I/O context is not the whole ring";
    let ring = Ring::of(vma).ok_or(TraceeError::Unfit { pid: tracee.pid(), what })?;
    let found = ring.look(tracee)?;
    let events = found.events.as_flattened().to_vec();
    Ok(ContextImage { start: vma.start, head: found.head, events, in_flight: found.in_flight })
}

/// Contexts that cannot be carried, and rings of which the image has no context.
pub fn blockers(images: &[ProcessImage], blockers: &mut Vec<Blocker>) {
    for image in images {
        let parent = images.iter().find(|parent| parent.pid == image.ppid);
        for vma in &image.mm.vmas {
            let Some(why) = why_not(vma, &image.mm, parent.map(|parent| &parent.mm)) else { continue };
            let what = format!("mapping {:x}-{:x} of /[aio]: {why}", vma.start, vma.end);
            blockers.push(Blocker { kind: "mapping", what });
        }
    }
}

fn why_not(vma: &Vma, mm: &MmImage, parent: Option<&MmImage>) -> Option<String> {
    let Backing::Aio { .. } = vma.backing else { return None };
    let of_parent =
        |theirs: &Vma| (theirs.start, theirs.end, &theirs.backing) == (vma.start, vma.end, &vma.backing);
    match mm.contexts.iter().find(|context| context.start == vma.start) {
        Some(context) if context.in_flight > 0 => Some(format!(
            "an asynchronous I/O context with requests in flight ({} or less)",
            context.in_flight
        )),
        Some(_) => None,
        None if parent.is_some_and(|parent| parent.vmas.iter().any(of_parent)) => None,
        None => Some("the ring of an asynchronous I/O context of another process".into()),
    }
}
