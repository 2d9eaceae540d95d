//! From a request's number to the operation, and the answer's way back.

use std::sync::{Arc, PoisonError};

use nix::errno::Errno;

use super::thread::{Thread, Wait, Work};
use super::{Call, Connection, Done, Shared, attributes, directories, files, names, streams};
use crate::homefs::abi::{Answer, IN_HEADER, InHeader, Reader, bare_reply, op};

/// Gives a request to a worker.
pub(super) fn submit(shared: &Arc<Shared>, connection: Arc<Connection>, header: InHeader, frame: &[u8]) {
    // Registered here, where frames come in order: an interruption follows its request, and comes
    // only once.
    let wait = streams::may_wait(shared, &header, &frame[IN_HEADER..]).then(|| {
        let wait = Arc::new(Wait::default());
        let mut waits = shared.waits.lock().unwrap_or_else(PoisonError::into_inner);
        waits.insert((connection.id, header.unique), Arc::clone(&wait));
        wait
    });
    let frame = frame.to_vec();
    let (all, to) = (Arc::clone(shared), Arc::clone(&connection));
    let work: Work = Box::new(move |thread| {
        let mut call = Call { shared: &all, connection: &to, thread, header, wait };
        call.thread.reply.clear();
        let body = Body { frame, at: IN_HEADER };
        let result = run(&mut call, body);
        if result != Ok(Done::Later) {
            finish(&all, &to, call.thread, &header, result.map(drop));
        }
    });
    if shared.workers.run(work).is_err() {
        forget_wait(shared, &connection, &header);
        connection.send(&bare_reply(header.unique, -(Errno::EIO as i32)));
    }
}

/// A request's body, owned, so that a thread of its own can go on with it.
pub(super) struct Body {
    frame: Vec<u8>,
    at: usize,
}

impl Body {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        self.frame.get(self.at..).unwrap_or_default()
    }

    /// A reader of it.
    pub fn reader(&self) -> Reader<'_> {
        Reader(self.bytes())
    }

    /// Drops the first `n` bytes.
    pub fn skip(&mut self, n: usize) {
        self.at = (self.at + n).min(self.frame.len());
    }
}

/// Sends the answer.
pub(super) fn finish(
    shared: &Shared,
    connection: &Connection,
    thread: &mut Thread,
    header: &InHeader,
    result: Answer<()>,
) {
    forget_wait(shared, connection, header);
    let error = match result {
        Ok(()) => 0,
        // Larger than any errno there is, and not to be sent (see HostView::deliver).
        Err(Errno::UnknownErrno) => -libc::EIO,
        Err(errno) => -(errno as i32),
    };
    connection.send(thread.reply.finish(header.unique, error));
}

fn forget_wait(shared: &Shared, connection: &Connection, header: &InHeader) {
    if streams::opcode_may_wait(header.opcode) {
        let mut waits = shared.waits.lock().unwrap_or_else(PoisonError::into_inner);
        waits.remove(&(connection.id, header.unique));
    }
}

fn run(call: &mut Call<'_>, body: Body) -> Answer<Done> {
    let r = body.reader();
    match call.header.opcode {
        op::OPEN => return files::open(call, body),
        op::READ => return files::read(call, body),
        op::WRITE => return files::write(call, body),
        op::LOOKUP => names::lookup(call, r),
        op::GETATTR => attributes::getattr(call),
        op::SETATTR => attributes::setattr(call, r),
        op::STATX => attributes::statx(call),
        op::STATFS => attributes::statfs(call),
        op::ACCESS => attributes::access(call, r),
        op::SETXATTR => attributes::setxattr(call, r),
        op::GETXATTR => attributes::getxattr(call, r),
        op::LISTXATTR => attributes::listxattr(call, r),
        op::REMOVEXATTR => attributes::removexattr(call, r),
        op::READLINK => names::readlink(call),
        op::SYMLINK => names::symlink(call, r),
        op::MKNOD => names::mknod(call, r),
        op::MKDIR => names::mkdir(call, r),
        op::UNLINK => names::unlink(call, r, false),
        op::RMDIR => names::unlink(call, r, true),
        op::RENAME => names::rename(call, r, false),
        op::RENAME2 => names::rename(call, r, true),
        op::LINK => names::link(call, r),
        op::CREATE => files::create(call, r),
        op::TMPFILE => files::tmpfile(call, r),
        op::RELEASE | op::RELEASEDIR => files::release(call, r),
        op::FLUSH => files::flush(call, r),
        op::FSYNC | op::FSYNCDIR => files::fsync(call, r),
        op::FALLOCATE => files::fallocate(call, r),
        op::LSEEK => files::lseek(call, r),
        op::COPY_FILE_RANGE => files::copy_file_range(call, r),
        op::OPENDIR => directories::open(call, r),
        op::READDIR => directories::read(call, r, false),
        op::READDIRPLUS => directories::read(call, r, true),
        op::POLL => streams::poll(call, r),
        // Among them GETLK, SETLK, SETLKW (made at home by the guest itself), BMAP, SYNCFS.
        _ => Err(Errno::ENOSYS),
    }
    .map(|()| Done::Reply)
}
