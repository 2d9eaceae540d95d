//! System-call filters, put back into threads that are traced with filters suspended.
//!
//! What all threads have in common is installed once, for all of them: filters that the program adds
//! later with `SECCOMP_FILTER_FLAG_TSYNC` need threads that share what they have (seccomp(2)).

use super::RestoreError;
use crate::dump::seccomp::MAX_FILTERS;
use crate::image::{FilterImage, ProcessImage};
use crate::sys::seccomp::{FLAG_SPEC_ALLOW, FLAG_TSYNC, SET_MODE_FILTER};
use crate::tracee::{Call, Tracee};

const SET_MODE_STRICT: u64 = 0;
const FLAG_LOG: u64 = 2;
/// `struct sock_filter`, bytes; and the most of them (`BPF_MAXINSNS`).
const INSTRUCTION: usize = 8;
const MAX_INSTRUCTIONS: usize = 4096;

/// What must hold before anything is touched.
pub fn check(image: &ProcessImage) -> Result<(), RestoreError> {
    let fits = |filter: &FilterImage| {
        filter.program.len().is_multiple_of(INSTRUCTION)
            && (1..=MAX_INSTRUCTIONS).contains(&(filter.program.len() / INSTRUCTION))
    };
    let programs = image.seccomp.filters.iter().all(fits) && image.seccomp.filters.len() <= MAX_FILTERS;
    let threads = image.threads.iter().all(|thread| {
        let known = |&at: &u32| (at as usize) < image.seccomp.filters.len();
        let filters = &thread.seccomp_filters;
        thread.seccomp_mode <= 2
            && (thread.seccomp_mode == 2) != filters.is_empty()
            && filters.len() <= MAX_FILTERS
            && filters.iter().all(known)
    });
    match programs && threads {
        true => Ok(()),
        false => Err(RestoreError::Unfit("the image is not consistent: its system-call filters".into())),
    }
}

/// Installs them, while the threads still have the right to. Calls injected later are not filtered.
pub fn install(tracee: &mut Tracee, order: &[usize], image: &ProcessImage) -> Result<(), RestoreError> {
    if image.threads.iter().all(|thread| thread.seccomp_mode == 0) {
        return Ok(());
    }
    tracee.suspend_filters()?;
    let common = match image.threads.len() {
        1 => 0,
        _ => common_to_all(image),
    };
    let leader = order[0];
    for &at in &image.threads[0].seccomp_filters[..common] {
        let replies = tracee.must_all(leader, &[filter(image, at, FLAG_TSYNC)])?;
        if replies.first().is_none_or(|reply| reply.value != 0) {
            return Err(RestoreError::Unfit("a system-call filter could not be given to all threads".into()));
        }
    }
    for (&i, thread) in order.iter().zip(&image.threads) {
        let mut calls: Vec<Call> =
            thread.seccomp_filters[common..].iter().map(|&at| filter(image, at, 0)).collect();
        if thread.seccomp_mode == 1 {
            calls.push(Call::must("strict seccomp", libc::SYS_seccomp, [SET_MODE_STRICT, 0, 0, 0, 0, 0]));
        }
        if !calls.is_empty() {
            tracee.must_all(i, &calls)?;
        }
    }
    Ok(())
}

/// How many filters, the oldest first, all threads have alike.
fn common_to_all(image: &ProcessImage) -> usize {
    let Some((first, others)) = image.threads.split_first() else { return 0 };
    let alike =
        |n: usize| others.iter().all(|thread| thread.seccomp_filters.get(n) == first.seccomp_filters.get(n));
    (0..first.seccomp_filters.len()).take_while(|&n| alike(n)).count()
}

fn filter(image: &ProcessImage, at: u32, flags: u64) -> Call {
    let filter = &image.seccomp.filters[at as usize];
    let log = if filter.log { FLAG_LOG } else { 0 };
    let spec = if image.seccomp.spec_allow { FLAG_SPEC_ALLOW } else { 0 };
    // struct sock_fprog: length, padding, pointer.
    let length = (filter.program.len() / INSTRUCTION) as u64;
    let program = [length.to_le_bytes(), [0; 8]].concat();
    Call::must(
        "installing a system-call filter",
        libc::SYS_seccomp,
        [SET_MODE_FILTER, flags | log | spec, 0, 0, 0, 0],
    )
    .input(2, &program)
    .within(8, &filter.program)
}
