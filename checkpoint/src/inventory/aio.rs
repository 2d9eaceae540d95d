//! Threads that a stop would cost a request of an asynchronous I/O context.

use super::Blocker;
use crate::image::{Backing, Vma};
use crate::proc::{self, status::Status};

/// What a file does not do asynchronously, as a pipe or an eventfd that is read, io_submit(2) waits for. There a stop
/// makes the request fail with `EINTR`, and no call could begin it again (aio_rw_done in fs/aio.c).
pub fn blockers(pid: i32, vmas: &[Vma], blockers: &mut Vec<Blocker>) {
    if !vmas.iter().any(|vma| matches!(vma.backing, Backing::Aio { .. })) {
        return;
    }
    for tid in proc::tids(pid).unwrap_or_default() {
        if waits_in_submission(pid, tid) {
            let what = format!("thread {tid} waits in io_submit(2): a stop would end its request with EINTR");
            blockers.push(Blocker { kind: "kernel", what });
        }
    }
}

/// One that waits for a disk cannot be interrupted, and is waited for.
fn waits_in_submission(pid: i32, tid: i32) -> bool {
    let text = proc::read(pid, &format!("task/{tid}/syscall")).unwrap_or_default();
    let is_call = text.starts_with(format!("{} ", libc::SYS_io_submit).as_bytes());
    is_call && Status::of_thread(pid, tid).is_ok_and(|status| status.state() == 'S')
}
