//! Files of explicit huge pages (hugetlb): memory without a name, memfds, System V segments.
//!
//! lseek(2) tells nothing of their holes, and a fault in one would take a page from those that are reserved for
//! somebody. read(2) makes no page, and userfaultfd(2) tells which there are ([`crate::sys::userfaultfd`]).

use super::DumpError;
use super::objects::{RUN, unread};
use crate::image::PAGE_SHIFT;
use crate::sys::userfaultfd;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};

/// Of the pages of a file.
pub fn page_shift(file: &File) -> io::Result<u8> {
    let found = fstatfs(file)?;
    if found.filesystem_type() != HUGETLBFS_MAGIC {
        return Ok(PAGE_SHIFT);
    }
    // Its blocks are its pages (hugetlbfs_statfs in fs/hugetlbfs/inode.c).
    u8::try_from(found.block_size().trailing_zeros()).map_err(io::Error::other)
}

/// Calls `each` with offset and contents, in parts of [`RUN`], of all pages that are there.
pub fn for_each_run<E: From<DumpError>>(
    file: &File,
    page_shift: u8,
    mut each: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let meta = file.metadata().map_err(unread)?;
    let page = 1u64 << page_shift;
    let (pages, there) = (meta.len() >> page_shift, (meta.blocks() * 512) >> page_shift);
    let present = match there {
        0 => return Ok(()),
        all if all == pages => Some((0..pages).collect()),
        _ => userfaultfd::present_pages(file.as_fd(), page_shift, pages, there).ok(),
    };
    let mut buffer = vec![0; RUN];
    match present {
        Some(present) => {
            for number in present {
                let start = number << page_shift;
                for offset in (start..start + page).step_by(RUN) {
                    file.read_exact_at(&mut buffer, offset).map_err(unread)?;
                    each(offset, &buffer)?;
                }
            }
        }
        // The kernel does not tell: what is zero may be a hole, and becomes one.
        None => {
            for offset in (0..pages << page_shift).step_by(RUN) {
                file.read_exact_at(&mut buffer, offset).map_err(unread)?;
                if buffer.iter().any(|&byte| byte != 0) {
                    each(offset, &buffer)?;
                }
            }
        }
    }
    Ok(())
}
