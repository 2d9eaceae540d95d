//! System-call filters, as the kernel tells them to a tracer (needs CAP_SYS_ADMIN).

use super::DumpError;
use super::inside::Inside;
use crate::image::{FilterImage, SeccompImage};
use crate::proc::status::Status;
use crate::sys::ptrace;
use crate::tracee::TraceeError;
use nix::errno::Errno;

/// Filters on top of each other; the kernel allows a few hundred (`MAX_INSNS_PER_PATH`).
pub const MAX_FILTERS: usize = 4096;

/// The filters of all threads, and for each thread which it has, oldest first.
pub fn read(inside: &Inside<'_>, status: &Status) -> Result<(SeccompImage, Vec<Vec<u32>>), DumpError> {
    let spec = status.line("Speculation_Store_Bypass").unwrap_or_default();
    let mut image = SeccompImage {
        filters: Vec::new(),
        spec_allow: !spec.contains("force") && !spec.contains("mitigated"),
    };
    let mut of_threads = Vec::with_capacity(inside.thread_count());
    for i in 0..inside.thread_count() {
        of_threads.push(match inside.threads[i].seccomp_mode {
            2 => of_thread(inside.original(i).tid, &mut image)?,
            _ => Vec::new(),
        });
    }
    Ok((image, of_threads))
}

fn of_thread(tid: i32, image: &mut SeccompImage) -> Result<Vec<u32>, DumpError> {
    let mut found = Vec::new();
    for index in 0..MAX_FILTERS {
        let (program, log) = match ptrace::seccomp_filter(tid, index) {
            Ok(filter) => filter,
            Err(Errno::ENOENT) => break,
            Err(errno) => return Err(TraceeError::kernel("PTRACE_SECCOMP_GET_FILTER", tid, errno).into()),
        };
        let filter = FilterImage { program, log };
        let at = image.filters.iter().position(|known| *known == filter).unwrap_or_else(|| {
            image.filters.push(filter);
            image.filters.len() - 1
        });
        found.push(at as u32);
    }
    found.reverse();
    Ok(found)
}
