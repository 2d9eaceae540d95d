//! Files that are written through memory: what was written is where they are kept before somebody else goes on with
//! them. The kernel of a network file system keeps it for itself for a while.

use super::DumpError;
use crate::image::Vma;
use crate::inventory::mapped_files::named_and_written;
use crate::tracee::{Call, Tracee};

/// Lets a frozen process write back what it has written into mapped files. An error tells which file would have
/// lost something, and is told once (msync(2)).
pub fn mapped_files(tracee: &mut Tracee, vmas: &[Vma]) -> Result<(), DumpError> {
    let written: Vec<(&Vma, &[u8])> =
        vmas.iter().filter_map(|vma| Some((vma, named_and_written(vma)?.path.as_slice()))).collect();
    let sync = |(vma, _): &(&Vma, &[u8])| {
        let args = [vma.start, vma.end - vma.start, libc::MS_SYNC as u64, 0, 0, 0];
        Call::may("writing back a mapped file", libc::SYS_msync, args)
    };
    let replies = tracee.batch(0, &written.iter().map(sync).collect::<Vec<Call>>())?;
    for ((_, path), reply) in written.iter().zip(&replies) {
        if let Some(errno) = reply.errno() {
            let path = String::from_utf8_lossy(path).into_owned();
            return Err(DumpError::WriteBack { path, pid: tracee.pid(), errno });
        }
    }
    Ok(())
}
