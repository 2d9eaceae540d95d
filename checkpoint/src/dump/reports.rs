//! Which stops of its children a process has not been told of yet (waitid(2)).

use super::DumpError;
use crate::tracee::{Call, Tracee};

/// `CLD_STOPPED`: it is stopped, and its parent has not waited for that.
pub const STOPPED: i32 = 5;
/// `CLD_CONTINUED`: it was, and its parent has not waited for its going on.
pub const CONTINUED: i32 = 6;

/// For each child what a wait for stops would tell, which it leaves untold.
pub(super) fn untold(parent: &mut Tracee, children: &[i32]) -> Result<Vec<Option<i32>>, DumpError> {
    if children.is_empty() {
        return Ok(Vec::new());
    }
    let flags = libc::WSTOPPED | libc::WCONTINUED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL;
    let ask = |&child: &i32| {
        let args = [libc::P_PID.into(), child as u64, 0, flags as u64, 0, 0];
        Call::may("waitid", libc::SYS_waitid, args).output(2, 128)
    };
    let calls: Vec<Call> = children.iter().map(ask).collect();
    let replies = parent.must_all(0, &calls)?;
    // siginfo_t: signo, errno, code; signo is 0 where nothing is to be told.
    let word =
        |bytes: &[u8], at: usize| i32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let told = |reply: &crate::tracee::Reply| {
        let info = reply.answer(0);
        (reply.value == 0 && word(info, 0) != 0).then(|| word(info, 8))
    };
    Ok(replies.iter().map(told).collect())
}
