//! The threads beside the leader. They are made when the memory is there, and each makes the calls that only it can
//! make at once ([`Tracee::add_threads`]). What it has of its maker already is not set again.

use super::{RebuildOptions, RestoreError, credentials, threads, traits};
use crate::image::traits::ThreadTraits;
use crate::image::{CredsImage, ProcessImage, ThreadImage};
use crate::tracee::{Call, NewThread, Tracee};

/// Length of a thread's name with its NUL (`TASK_COMM_LEN`).
const COMM_LEN: usize = 16;

/// What a new thread has of its maker (clone(2)): of the leader, which has made all of them or those that have.
pub(crate) struct Inheritance {
    comm: Vec<u8>,
    timer_slack_ns: u64,
    traits: ThreadTraits,
    /// `None`: not known.
    creds: Option<CredsImage>,
}

/// Makes the threads of the image, under their TIDs. Gives what those that the leader has made have of it; `None`:
/// there are no others.
pub(crate) fn make(tracee: &mut Tracee, image: &ProcessImage) -> Result<Option<Inheritance>, RestoreError> {
    let Some((leader, others)) = image.threads.split_first().filter(|(_, others)| !others.is_empty()) else {
        return Ok(None);
    };
    let of_leader = Inheritance::of_leader(tracee, leader)?;
    let with = |first: i32| others.iter().filter(move |one| one.apart.fs_with == first);
    add(tracee, 0, with(0), &of_leader.comm)?;
    for first in others.iter().filter(|thread| thread.apart.fs.is_some()) {
        let maker = threads::place(tracee, first.tid)?;
        let args = [libc::CLONE_FS as u64, 0, 0, 0, 0, 0];
        tracee.must(maker, "unshare", libc::SYS_unshare, args)?;
        add(tracee, maker, with(first.tid), &first.comm)?;
    }
    Ok(Some(of_leader))
}

/// Thread `maker`, whose name is `comm`, makes threads.
fn add<'a>(
    tracee: &mut Tracee,
    maker: usize,
    which: impl Iterator<Item = &'a ThreadImage>,
    comm: &[u8],
) -> Result<(), RestoreError> {
    let new = |thread: &ThreadImage| NewThread {
        tid: thread.tid,
        clear_child_tid: thread.clear_child_tid,
        calls: calls_of(thread, comm),
    };
    let new: Vec<NewThread> = which.map(new).collect();
    Ok(tracee.add_threads(maker, &new)?)
}

/// What a new thread calls at once: nothing that a child would have of it which it is to make. An alternate stack
/// it has none (sigaltstack(2)), nor a registration of rseq(2).
fn calls_of(thread: &ThreadImage, comm: &[u8]) -> Vec<Call> {
    let mut calls: Vec<Call> = threads::set_robust_list(thread).into_iter().collect();
    if thread.altstack.2 != 0 {
        calls.push(threads::set_altstack(thread));
    }
    calls.extend(threads::register_rseq(thread));
    if thread.comm != comm {
        calls.push(threads::name(thread));
    }
    calls
}

impl Inheritance {
    /// Asks the leader, which `image` is of; it gets its name, as others may have the same.
    fn of_leader(tracee: &mut Tracee, image: &ThreadImage) -> Result<Inheritance, RestoreError> {
        let ask = |option: i32| Call::must("prctl", libc::SYS_prctl, [option as u64, 0, 0, 0, 0, 0]);
        let mut calls = vec![
            threads::name(image),
            ask(libc::PR_GET_NAME).output(1, COMM_LEN),
            ask(libc::PR_GET_TIMERSLACK),
            ask(libc::PR_GET_SECUREBITS),
        ];
        calls.extend(traits::questions());
        let replies = tracee.must_all(0, &calls)?;
        let name = replies[1].answer(0);
        Ok(Inheritance {
            comm: name.split(|&byte| byte == 0).next().unwrap_or_default().to_vec(),
            timer_slack_ns: replies[2].value as u64,
            traits: traits::told(&replies[4..]),
            creds: credentials::of(tracee.pid(), tracee.tid(0), replies[3].value as u32),
        })
    }

    /// What a thread that was made with this must call, when the children that it makes are there.
    pub fn lacks(&self, thread: &ThreadImage, options: RebuildOptions) -> Vec<Call> {
        let mut calls = Vec::new();
        if thread.timer_slack_ns != self.timer_slack_ns {
            calls.extend(threads::set_timer_slack(thread));
        }
        if options.misc {
            calls.extend(traits::of_thread(&thread.traits, Some(&self.traits)));
        }
        calls
    }

    /// Whether a new thread has these credentials, of which it may have the capabilities `allowed`.
    pub fn has(&self, creds: &CredsImage, allowed: u64) -> bool {
        let wanted = CredsImage { caps: creds.caps.map(|caps| caps & allowed), ..creds.clone() };
        self.creds.as_ref() == Some(&wanted)
    }
}
