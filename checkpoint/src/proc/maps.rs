//! `/proc/PID/smaps`: mappings with their flags (Documentation/filesystems/proc.rst).

use crate::image::{Backing, MappedFile, PAGE_SHIFT, Vma, VmaFlags};

/// One mapping as the kernel shows it, before it is known what is behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line<'a> {
    start: u64,
    end: u64,
    perms: &'a [u8],
    offset: u64,
    dev: u64,
    ino: u64,
    name: &'a [u8],
}

/// Parses `smaps`. Lines that are not understood are skipped, never guessed.
pub fn parse(smaps: &[u8]) -> Vec<Vma> {
    let mut vmas: Vec<Vma> = Vec::new();
    let mut page_shift = PAGE_SHIFT;
    let mut rest = smaps;
    while !rest.is_empty() {
        let line = &rest[..memchr::memchr(b'\n', rest).unwrap_or(rest.len())];
        rest = rest.get(line.len() + 1..).unwrap_or_default();
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            if let Some(vma) = vmas.last_mut() {
                apply_flags(vma, flags);
                if vma.is_huge() {
                    vma.page_shift = page_shift;
                }
            }
        } else if let Some(size) = line.strip_prefix(b"KernelPageSize:") {
            // Above the flags, which tell whether they are huge pages.
            page_shift = page_shift_of(size).unwrap_or(PAGE_SHIFT);
        } else if let Some(key) = line.strip_prefix(b"ProtectionKey:") {
            let key = std::str::from_utf8(key).ok().and_then(|key| key.trim().parse().ok());
            if let (Some(vma), Some(key)) = (vmas.last_mut(), key) {
                vma.pkey = key;
            }
        } else if matches!(line.first(), Some(b'0'..=b'9' | b'a'..=b'f'))
            && let Some(line) = parse_line(line)
        {
            // All other lines begin with a capital letter.
            vmas.push(vma_of(&line));
        }
    }
    vmas
}

/// Of `    2048 kB`.
fn page_shift_of(size: &[u8]) -> Option<u8> {
    let kilobytes = std::str::from_utf8(size).ok()?.trim().strip_suffix("kB")?.trim_end();
    let kilobytes: u64 = kilobytes.parse().ok()?;
    let shift = kilobytes.trailing_zeros() as u8 + 10;
    (kilobytes.is_power_of_two() && shift < 48).then_some(shift)
}

fn parse_line(line: &[u8]) -> Option<Line<'_>> {
    let mut rest = line;
    let mut word = || {
        let at = rest.iter().position(|&byte| byte == b' ').unwrap_or(rest.len());
        let (word, tail) = rest.split_at(at);
        rest = tail.get(1..).unwrap_or_default();
        word
    };
    let range = word();
    let dash = range.iter().position(|&byte| byte == b'-')?;
    let (start, end) = (hex(&range[..dash])?, hex(&range[dash + 1..])?);
    let perms = word();
    let offset = hex(word())?;
    let dev = word();
    let colon = dev.iter().position(|&byte| byte == b':')?;
    let dev = libc::makedev(hex(&dev[..colon])? as u32, hex(&dev[colon + 1..])? as u32);
    let ino = std::str::from_utf8(word()).ok()?.parse().ok()?;
    let name = rest.trim_ascii_start();
    (perms.len() == 4 && start < end).then_some(Line { start, end, perms, offset, dev, ino, name })
}

fn hex(bytes: &[u8]) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(bytes).ok()?, 16).ok()
}

fn vma_of(line: &Line<'_>) -> Vma {
    let bit = |at: usize, letter: u8, value: i32| if line.perms[at] == letter { value as u32 } else { 0 };
    let prot = bit(0, b'r', libc::PROT_READ) | bit(1, b'w', libc::PROT_WRITE) | bit(2, b'x', libc::PROT_EXEC);
    let name = unescape(line.name);
    let mut label = None;
    let backing = match name.as_slice() {
        b"[vdso]" => Backing::Vdso,
        b"[vsyscall]" => Backing::Vsyscall,
        name if name.starts_with(b"[vvar") => Backing::Vvar,
        name if name.starts_with(b"[anon_shmem:") => {
            label = name
                .strip_prefix(b"[anon_shmem:")
                .and_then(|name| name.strip_suffix(b"]"))
                .map(<[u8]>::to_vec);
            Backing::SharedAnon { id: line.ino, offset: line.offset }
        }
        // The first System V segment has inode number 0, and a name.
        name if line.ino == 0 && !name.starts_with(b"/") => {
            label = name.strip_prefix(b"[anon:").and_then(|name| name.strip_suffix(b"]")).map(<[u8]>::to_vec);
            Backing::Anon
        }
        // A private mapping of it is anonymous memory that keeps the name (drivers/char/mem.c).
        b"/dev/zero" if line.perms[3] == b'p' => Backing::Anon,
        // The kernel's own tmpfs file behind MAP_SHARED|MAP_ANONYMOUS (mm/shmem.c).
        b"/dev/zero (deleted)" => Backing::SharedAnon { id: line.ino, offset: line.offset },
        // The kernel's own hugetlbfs file behind MAP_ANONYMOUS|MAP_HUGETLB, private or shared (mm/mmap.c).
        HUGE_ANONYMOUS if libc::major(line.dev) == 0 => match line.perms[3] {
            b'p' => Backing::Anon,
            _ => Backing::SharedAnon { id: line.ino, offset: line.offset },
        },
        _ => Backing::File(MappedFile {
            path: name,
            deleted: false,
            dev: line.dev,
            ino: line.ino,
            offset: line.offset,
            may_write: false,
        }),
    };
    let shared = line.perms[3] == b's';
    Vma {
        start: line.start,
        end: line.end,
        prot,
        backing,
        shared,
        flags: VmaFlags::empty(),
        name: label,
        pkey: 0,
        page_shift: PAGE_SHIFT,
    }
}

/// How `maps` shows anonymous memory of huge pages.
const HUGE_ANONYMOUS: &[u8] = b"/anon_hugepage (deleted)";

/// `\ooo` stands for a newline in a path (fs/seq_file.c, `mangle_path`).
fn unescape(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut at = 0;
    while at < name.len() {
        let octal = name.get(at + 1..at + 4).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if name[at] == b'\\' && byte == b'\n' => {
                out.push(byte);
                at += 4;
            }
            _ => {
                out.push(name[at]);
                at += 1;
            }
        }
    }
    out
}

/// Of each mapping in `smaps`: its addresses, the text of its flags, and its protection key.
pub fn texts_of_flags(smaps: &[u8]) -> Vec<(u64, u64, &[u8], u8)> {
    let mut found = Vec::new();
    let (mut place, mut pkey) = (None, 0);
    for line in smaps.split(|&byte| byte == b'\n') {
        if let Some(text) = line.strip_prefix(b"VmFlags:") {
            found.extend(place.take().map(|(start, end)| (start, end, text, pkey)));
        } else if let Some(key) = line.strip_prefix(b"ProtectionKey:") {
            pkey = std::str::from_utf8(key).ok().and_then(|key| key.trim().parse().ok()).unwrap_or(0);
        } else if matches!(line.first(), Some(b'0'..=b'9' | b'a'..=b'f')) {
            (place, pkey) = (parse_line(line).map(|line| (line.start, line.end)), 0);
        }
    }
    found
}

/// The protection that flags tell of, and whether the mapping is shared.
pub fn protection(text: &[u8]) -> (u32, bool) {
    let has = |flag: &[u8]| text.split(|&byte| byte == b' ').any(|word| word == flag);
    let bit = |flag: &[u8], value: i32| if has(flag) { value as u32 } else { 0 };
    let prot = bit(b"rd", libc::PROT_READ) | bit(b"wr", libc::PROT_WRITE) | bit(b"ex", libc::PROT_EXEC);
    // What `maps` calls shared (`show_map_vma`): whether it may be.
    (prot, has(b"ms"))
}

/// Adds what the text of its flags says to a mapping.
pub fn apply_flags(vma: &mut Vma, text: &[u8]) {
    for word in text.split(|&byte| byte == b' ') {
        vma.flags |= match word {
            b"gd" => VmaFlags::GROWSDOWN,
            b"lo" => VmaFlags::LOCKED,
            b"lf" => VmaFlags::LOCKONFAULT,
            b"hg" => VmaFlags::HUGEPAGE,
            b"nh" => VmaFlags::NOHUGEPAGE,
            b"dc" => VmaFlags::DONTFORK,
            b"wf" => VmaFlags::WIPEONFORK,
            b"dd" => VmaFlags::DONTDUMP,
            b"mg" => VmaFlags::MERGEABLE,
            b"sr" => VmaFlags::SEQ_READ,
            b"rr" => VmaFlags::RAND_READ,
            b"nr" => VmaFlags::NORESERVE,
            b"ht" => VmaFlags::HUGETLB,
            b"sl" => VmaFlags::SEALED,
            b"um" | b"uw" | b"ui" => VmaFlags::USERFAULT,
            b"io" => VmaFlags::IO,
            b"pf" => VmaFlags::PFNMAP,
            b"dp" => VmaFlags::DROPPABLE,
            b"mw" => {
                if let Backing::File(file) = &mut vma.backing {
                    file.may_write = true;
                }
                VmaFlags::empty()
            }
            _ => VmaFlags::empty(),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn never_panics(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            parse(&text);
        }

        #[test]
        fn never_panics_on_nearly_right_lines(
            text in "[0-9a-f]{1,17}-[0-9a-f]{1,17} [rwxps-]{3,5} [0-9a-f]{0,9} [0-9a-f:]{0,6} [0-9]{0,21} {0,4}[ -~]{0,20}"
        ) {
            for vma in parse(text.as_bytes()) {
                prop_assert!(vma.start < vma.end);
            }
        }
    }

    #[test]
    fn reads_a_file_mapping() {
        let text = b"55d0-55d2 r-xp 00001000 fe:01 1234   /bin/a\\012b (deleted)\nSize: 4 kB\n\
                     ProtectionKey:         0\nVmFlags: rd ex mr mw me \n7ff0-8000 rw-p 00000000 00:00 0   [stack]\n\
                     ProtectionKey:        12\nVmFlags: rd gd\n";
        let vmas = parse(text);
        assert_eq!(vmas.len(), 2);
        let Backing::File(file) = &vmas[0].backing else { panic!("a file") };
        assert_eq!(file.path, b"/bin/a\nb (deleted)");
        assert!(file.may_write);
        assert_eq!((file.dev, file.ino, file.offset), (libc::makedev(0xfe, 1), 1234, 0x1000));
        assert_eq!(vmas[1].backing, Backing::Anon);
        assert!(vmas[1].flags.contains(VmaFlags::GROWSDOWN));
        assert_eq!((vmas[0].pkey, vmas[1].pkey), (0, 12));
    }

    #[test]
    fn knows_memory_without_an_inode_from_files_without_one() {
        let text = b"1000-2000 rw-s 00000000 00:01 0   /SYSV00000000 (deleted)\n\
                     2000-3000 rw-p 00000000 00:00 0   [anon:my heap]\n\
                     3000-4000 rw-p 00000000 00:05 7   /dev/zero\n\
                     4000-5000 rw-s 00001000 00:01 9   /dev/zero (deleted)\n";
        let vmas = parse(text);
        assert!(matches!(&vmas[0].backing, Backing::File(file) if file.path.starts_with(b"/SYSV")));
        assert_eq!((&vmas[1].backing, vmas[1].name.as_deref()), (&Backing::Anon, Some(&b"my heap"[..])));
        assert_eq!(vmas[2].backing, Backing::Anon);
        assert_eq!(vmas[3].backing, Backing::SharedAnon { id: 9, offset: 0x1000 });
    }

    #[test]
    fn knows_huge_pages() {
        let text = b"200000-400000 rw-p 00000000 00:11 7   /anon_hugepage (deleted)\n\
                     KernelPageSize:     2048 kB\nVmFlags: rd wr mr mw me de ht \n\
                     40000000-80000000 rw-s 40000000 00:11 8   /anon_hugepage (deleted)\n\
                     KernelPageSize:  1048576 kB\nVmFlags: rd wr sh ht \n\
                     90000000-90200000 rw-p 00000000 00:00 0 \nKernelPageSize:     2048 kB\nVmFlags: rd wr \n\
                     91000000-91200000 rw-p 00000000 00:00 0 \nKernelPageSize:     2047 kB\nVmFlags: ht \n";
        let vmas = parse(text);
        assert_eq!((&vmas[0].backing, vmas[0].page_shift), (&Backing::Anon, 21));
        assert_eq!(
            (&vmas[1].backing, vmas[1].page_shift),
            (&Backing::SharedAnon { id: 8, offset: 0x4000_0000 }, 30)
        );
        assert_eq!((vmas[2].page_shift, vmas[3].page_shift), (12, 12));
    }

    #[test]
    fn survives_anything() {
        for text in [&b"-"[..], b"1-2", b"2-1 rwxp 0 0:0 0", b"a-b r 0 : x", b"\xff\xfe", b"VmFlags: gd"] {
            assert!(parse(text).is_empty());
        }
    }
}
