//! What is recorded of memory: its layout and mappings. Their contents follow in the stream.

use super::objects::ObjectKey;
use serde::{Deserialize, Serialize};

/// The address space.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MmImage {
    /// Mappings in rising order.
    pub vmas: Vec<Vma>,
    /// Guard pages (`MADV_GUARD_INSTALL`): starts and ends, in rising order.
    pub guards: Vec<(u64, u64)>,
    /// `start_code end_code start_data end_data start_brk brk start_stack arg_start arg_end
    /// env_start env_end`: the order of `struct prctl_mm_map`.
    pub layout: [u64; 11],
    /// `/proc/PID/auxv` as it is.
    #[serde(with = "serde_bytes")]
    pub auxv: Vec<u8>,
    /// Target of `/proc/PID/exe`.
    pub exe: Vec<u8>,
    /// `/proc/PID/coredump_filter`.
    pub coredump_filter: u32,
    /// `PR_GET_THP_DISABLE`.
    pub thp_disable: bool,
    /// What is in its mapping of the vDSO; empty: the same as in that of the first process, or not known.
    pub vdso: Vec<u8>,
    /// The protection keys that it has allocated, one bit each; 0: the kernel knows none.
    pub pkeys: u16,
    /// Its asynchronous I/O contexts, in rising order of their rings.
    pub contexts: Vec<ContextImage>,
}

/// An asynchronous I/O context (io_setup(2)). How many events its ring has room for the mapping tells.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextImage {
    /// Its id, which is the address of its ring.
    pub start: u64,
    /// The place of the oldest event in the ring.
    pub head: u32,
    /// The events that nobody has taken, oldest first: `struct io_event`, 32 bytes each.
    #[serde(with = "serde_bytes")]
    pub events: Vec<u8>,
    /// Requests that were in flight, at most: such an image is of no use.
    pub in_flight: u32,
}

/// Bound on the length of a vDSO, bytes; they have two pages or three.
pub const MAX_VDSO: usize = 64 << 10;

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// `PROT_*`.
    pub prot: u32,
    /// What is behind it.
    pub backing: Backing,
    /// `MAP_SHARED` rather than `MAP_PRIVATE`.
    pub shared: bool,
    /// Two-letter flags of `VmFlags:` in `smaps`, packed: see [`VmaFlags`].
    pub flags: VmaFlags,
    /// Name given with `PR_SET_VMA_ANON_NAME`, if any.
    pub name: Option<Vec<u8>>,
    /// Its protection key (`ProtectionKey:`, pkeys(7)).
    pub pkey: u8,
    /// Its pages have 2 to the power of this many bytes: [`PAGE_SHIFT`], or what its huge pages have (hugetlb).
    pub page_shift: u8,
}

/// Of ordinary pages.
pub const PAGE_SHIFT: u8 = 12;

/// Of the huge pages that x86-64 has: 2 MiB and 1 GiB.
pub const HUGE_PAGE_SHIFTS: [u8; 2] = [21, 30];

bitflags::bitflags! {
    /// The flags of a mapping that are carried (Documentation/filesystems/proc.rst, `VmFlags`).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
    #[serde(transparent)]
    pub struct VmaFlags: u32 {
        /// `gd`: grows down.
        const GROWSDOWN = 1;
        /// `lo`: locked.
        const LOCKED = 2;
        /// `lf`: lock on fault.
        const LOCKONFAULT = 4;
        /// `hg`: huge pages advised.
        const HUGEPAGE = 8;
        /// `nh`: huge pages advised against.
        const NOHUGEPAGE = 16;
        /// `dc`: not copied on fork.
        const DONTFORK = 32;
        /// `wf`: wiped on fork.
        const WIPEONFORK = 64;
        /// `dd`: not dumped.
        const DONTDUMP = 128;
        /// `mg`: mergeable.
        const MERGEABLE = 256;
        /// `sr`: sequential reads advised.
        const SEQ_READ = 512;
        /// `rr`: random reads advised.
        const RAND_READ = 1024;
        /// `nr`: no swap reserved.
        const NORESERVE = 2048;
        /// `ht`: hugetlb.
        const HUGETLB = 4096;
        /// `sl`: sealed (`mseal`).
        const SEALED = 8192;
        /// `um`/`uw`/`ui`: registered with a userfaultfd.
        const USERFAULT = 16384;
        /// `io`: device memory.
        const IO = 32768;
        /// `pf`: pure PFN range.
        const PFNMAP = 65536;
        /// `dp`: the kernel may drop its contents (`MAP_DROPPABLE`).
        const DROPPABLE = 131072;
    }
}

impl Vma {
    /// Whether it has explicit huge pages (hugetlb).
    pub fn is_huge(&self) -> bool {
        self.flags.contains(VmaFlags::HUGETLB)
    }

    /// Of shared anonymous memory its number.
    pub fn anonymous_id(&self) -> Option<u64> {
        match self.backing {
            Backing::SharedAnon { id, .. } => Some(id),
            _ => None,
        }
    }
}

/// What is behind a mapping.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// Private anonymous memory (heap and stack too).
    Anon,
    /// Shared anonymous memory (`MAP_SHARED|MAP_ANONYMOUS`): mappings of one process with the
    /// same `id` are the same memory.
    SharedAnon {
        /// Inode number of the kernel's internal tmpfs file.
        id: u64,
        /// Offset into it, bytes.
        offset: u64,
    },
    /// A file.
    File(MappedFile),
    /// An object of the image.
    Object {
        /// Which.
        key: ObjectKey,
        /// Offset into it, bytes.
        offset: u64,
        /// The mapping may be (made) written.
        may_write: bool,
    },
    /// The vDSO's code.
    Vdso,
    /// The vDSO's data (one or more mappings named `[vvar…]`).
    Vvar,
    /// `[vsyscall]`: the same on every x86-64 kernel; never touched.
    Vsyscall,
    /// The ring of an asynchronous I/O context (io_setup(2)), whole: of the process' own if [`MmImage::contexts`]
    /// has it, else of its parent's, from which fork has left it the mapping alone.
    Aio {
        /// Inode number of the kernel's internal file.
        id: u64,
    },
}

/// The file behind a mapping.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedFile {
    /// Path in the process' mount namespace, as bytes, without ` (deleted)`.
    pub path: Vec<u8>,
    /// The name is gone or stands for another file now.
    pub deleted: bool,
    /// `st_dev`.
    pub dev: u64,
    /// `st_ino`.
    pub ino: u64,
    /// Offset, bytes.
    pub offset: u64,
    /// The mapping may be (made) written: a shared one needs a writable descriptor.
    pub may_write: bool,
}
