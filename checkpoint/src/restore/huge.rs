//! Explicit huge pages (hugetlb): what an image may say of them, and what is told where there are too few.
//!
//! A private mapping of them is made to be written, and gets its protection when it is filled: not every kernel
//! writes to huge pages without the right to (`FOLL_FORCE`, check_vma_flags in mm/gup.c: 6.18 does, 6.2 does not).

use super::RestoreError;
use crate::image::kept::{kept, without};
use crate::image::objects::{ObjectImage, ObjectKey, ObjectKind, SYSV};
use crate::image::{Backing, HUGE_PAGE_SHIFTS, PAGE_SHIFT, ProcessImage, Vma, VmaFlags};
use crate::sys::huge_pages::{available, size_flag};
use nix::errno::Errno;
use std::collections::BTreeMap;

/// An image that contradicts itself about its pages.
pub fn inconsistent() -> RestoreError {
    RestoreError::Unfit("the image is not consistent: the size of its pages".into())
}

/// What must hold of a mapping, of huge pages or not.
pub fn check(vma: &Vma) -> Result<(), RestoreError> {
    if !vma.is_huge() {
        return if vma.page_shift == PAGE_SHIFT { Ok(()) } else { Err(inconsistent()) };
    }
    if !HUGE_PAGE_SHIFTS.contains(&vma.page_shift) {
        return Err(inconsistent());
    }
    let offset = match vma.backing {
        Backing::Anon if !vma.shared => 0,
        Backing::Object { offset, .. } => offset,
        _ => return Err(inconsistent()),
    };
    let is_whole = |number: u64| number.is_multiple_of(1 << vma.page_shift);
    match is_whole(vma.start) && is_whole(vma.end) && is_whole(offset) {
        true => Ok(()),
        false => Err(inconsistent()),
    }
}

/// What must hold of an object.
pub fn check_object(image: &ObjectImage) -> Result<(), RestoreError> {
    let can_be = match image.kind {
        ObjectKind::Deleted { .. } => false,
        _ => HUGE_PAGE_SHIFTS.contains(&image.page_shift),
    };
    if image.is_huge() && !can_be { Err(inconsistent()) } else { Ok(()) }
}

/// Whether it is protected when it is filled.
pub fn is_protected_late(vma: &Vma) -> bool {
    vma.is_huge() && !vma.shared
}

/// What mmap(2) takes for anonymous memory of such pages.
pub fn flags_of(vma: &Vma) -> libc::c_int {
    if vma.is_huge() { libc::MAP_HUGETLB | size_flag(vma.page_shift) } else { 0 }
}

/// The error that stands for this one, if that is for want of pages; `wanted`: of so many, 0: of one more.
pub fn why(error: RestoreError, page_shift: u8, wanted: u64) -> RestoreError {
    let errno = match &error {
        RestoreError::File { source, .. } => source.raw_os_error().map(Errno::from_raw),
        _ => None,
    };
    let free = available(page_shift);
    // EFAULT is a page that could not be made (madvise(2)); EINVAL or ENODEV a size that there is not.
    let for_want = matches!(errno, Some(Errno::ENOMEM | Errno::ENOSPC | Errno::EFAULT | Errno::EIO));
    match for_want || free.is_none() {
        true => RestoreError::HugePages { page_shift, wanted, free },
        false => error,
    }
}

/// Whether what is reserved for the mappings of an image can be had. More may be used: there may be pages that
/// nothing was reserved for.
pub fn check_room(images: &[ProcessImage]) -> Result<(), RestoreError> {
    for page_shift in HUGE_PAGE_SHIFTS {
        let wanted = reserved(images, page_shift);
        let free = available(page_shift);
        if wanted > free.unwrap_or(0) {
            return Err(RestoreError::HugePages { page_shift, wanted, free });
        }
    }
    Ok(())
}

/// How many pages of this size the mappings have reserved.
fn reserved(images: &[ProcessImage], page_shift: u8) -> u64 {
    let mut objects: BTreeMap<ObjectKey, Vec<(u64, u64)>> = BTreeMap::new();
    let mut bytes = 0u64;
    for image in images.iter().filter(|image| image.shares.memory == 0) {
        let parent = images.iter().find(|parent| parent.pid == image.ppid);
        // What a child has of its parent's nobody reserves again.
        let common = parent.map(|parent| kept(&parent.mm, &image.mm)).unwrap_or_default();
        let is_one = |vma: &&Vma| vma.is_huge() && vma.page_shift == page_shift;
        let reserves = |vma: &&Vma| is_one(vma) && !vma.flags.contains(VmaFlags::NORESERVE);
        for vma in image.mm.vmas.iter().filter(reserves) {
            match vma.backing {
                Backing::Object { key, offset, .. } if vma.shared => {
                    // A segment may be there still.
                    if key.0 != SYSV {
                        let end = offset.saturating_add(vma.end - vma.start);
                        objects.entry(key).or_default().push((offset, end));
                    }
                }
                _ => {
                    let own = without(vma, &common);
                    bytes = own.iter().fold(bytes, |sum, part| sum.saturating_add(part.end - part.start));
                }
            }
        }
    }
    objects.into_values().fold(bytes, |sum, ranges| sum.saturating_add(covered(ranges))) >> page_shift
}

/// How much is in one of the ranges at least.
fn covered(mut ranges: Vec<(u64, u64)>) -> u64 {
    ranges.sort_unstable();
    let (mut sum, mut at) = (0u64, 0);
    for (start, end) in ranges {
        sum = sum.saturating_add(end.saturating_sub(start.max(at)));
        at = at.max(end);
    }
    sum
}

/// In words.
pub fn explain(page_shift: u8, wanted: u64, free: Option<u64>) -> String {
    let size = match page_shift {
        30.. => format!("{} GiB", 1u64 << (page_shift - 30).min(33)),
        20..30 => format!("{} MiB", 1u64 << (page_shift - 20)),
        _ => format!("{} KiB", 1u64 << page_shift.saturating_sub(10)),
    };
    match free {
        None => format!("it has huge pages of {size}, and this kernel has none of that size"),
        Some(free) if free < wanted => {
            format!("it needs {wanted} huge pages of {size}, and {free} are free and not reserved")
        }
        // In use by others since, or held back from this control group.
        Some(free) => {
            format!("it needs more huge pages of {size} than it gets; {free} are free and not reserved")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn huge(start: u64, pages: u64, backing: Backing, shared: bool) -> Vma {
        let (end, flags) = (start + (pages << 21), VmaFlags::HUGETLB);
        Vma { start, end, prot: 3, backing, shared, flags, name: None, pkey: 0, page_shift: 21 }
    }

    #[test]
    fn sizes_that_lie() {
        let truth = huge(0x4000_0000, 2, Backing::Anon, false);
        assert!(check(&truth).is_ok());
        for page_shift in [0, 12, 13, 30, 63, 64, 255] {
            assert!(check(&Vma { page_shift, ..truth.clone() }).is_err(), "{page_shift}");
            assert!(check(&Vma { flags: VmaFlags::empty(), ..truth.clone() }).is_err());
        }
        assert!(check(&Vma { start: 0x4000_1000, ..truth.clone() }).is_err());
        assert!(check(&Vma { shared: true, ..truth.clone() }).is_err());
        let object = |offset| Backing::Object { key: (1, 2), offset, may_write: true };
        assert!(check(&huge(0x4000_0000, 1, object(0x20_0000), true)).is_ok());
        assert!(check(&huge(0x4000_0000, 1, object(0x1000), true)).is_err());
        assert!(check(&huge(0x4000_0000, 1, Backing::SharedAnon { id: 1, offset: 0 }, true)).is_err());
    }

    #[test]
    fn what_is_covered_once() {
        assert_eq!(covered(vec![(4, 6), (0, 2), (1, 3), (5, 6)]), 5);
        assert_eq!(covered(vec![(0, u64::MAX), (1, u64::MAX)]), u64::MAX);
        assert_eq!(covered(Vec::new()), 0);
    }

    #[test]
    fn words_for_any_number() {
        for page_shift in 0..=255 {
            explain(page_shift, 1, Some(0));
        }
        let words = explain(21, 7, Some(2));
        assert_eq!(words, "it needs 7 huge pages of 2 MiB, and 2 are free and not reserved");
        assert!(explain(30, 1, None).contains("1 GiB, and this kernel has none"));
    }
}
