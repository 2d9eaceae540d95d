//! Named files that are written through memory. While who maps them is away, what is written stays in the page
//! cache over there for a while, and what others at home write is not seen there: so nobody else may map them or
//! have them open to be written. Who only reads them at home sees what was written back last.

use super::Blocker;
use super::family::Family;
use crate::image::{Backing, MappedFile, Vma};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;

/// The file of a mapping that shows in a file with a name what is written into memory.
pub fn named_and_written(vma: &Vma) -> Option<&MappedFile> {
    match &vma.backing {
        Backing::File(file) if vma.shared && file.may_write && !file.deleted => Some(file),
        _ => None,
    }
}

/// Who else uses the files that the process writes through memory.
pub fn blockers(pid: i32, family: &Family, vmas: &[Vma], blockers: &mut Vec<Blocker>) {
    let mut looked_at = BTreeSet::new();
    for vma in vmas {
        let Some(file) = named_and_written(vma) else { continue };
        if !looked_at.insert((file.dev, file.ino)) {
            continue;
        }
        if let Some(use_of_it) = used_outside(pid, family, vma, file) {
            let name = String::from_utf8_lossy(&file.path);
            let what = format!(
                "mapping {:x}-{:x} of {name}: a file mapped shared and writable, which {use_of_it}",
                vma.start, vma.end
            );
            blockers.push(Blocker { kind: "mapping", what });
        }
    }
}

fn used_outside(pid: i32, family: &Family, vma: &Vma, file: &MappedFile) -> Option<String> {
    if let Some(other) = family.files_mapped_outside().get(&(file.dev, file.ino)) {
        return Some(format!("process {other} maps as well"));
    }
    // Where `maps` and stat(2) name different devices (overlays, subvolumes), stat(2) is the one to ask here.
    let meta = fs::metadata(format!("/proc/{pid}/map_files/{:x}-{:x}", vma.start, vma.end)).ok()?;
    let other = family.files_written_outside().get(&(meta.dev(), meta.ino()))?;
    Some(format!("process {other} has open to be written"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::VmaFlags;

    #[test]
    fn only_what_is_written_into_a_file_with_a_name() {
        let vma = |shared, may_write, deleted| {
            let path = b"/a/file".to_vec();
            let file = MappedFile { path, deleted, dev: 1, ino: 1, offset: 0, may_write };
            let (backing, flags) = (Backing::File(file), VmaFlags::empty());
            Vma { start: 0, end: 4096, prot: 3, backing, shared, flags, name: None, pkey: 0, page_shift: 12 }
        };
        assert!(named_and_written(&vma(true, true, false)).is_some());
        for other in [vma(false, true, false), vma(true, false, false), vma(true, true, true)] {
            assert!(named_and_written(&other).is_none());
        }
    }

    #[test]
    fn who_has_a_file_open_to_be_written_is_found() {
        let us = std::process::id() as i32;
        let file = tempfile::NamedTempFile::new().expect("a file");
        let meta = file.as_file().metadata().expect("its identity");
        let id = (meta.dev(), meta.ino());
        // Ourselves are not looked at: the one who looks is no outsider.
        assert_eq!(Family::of(vec![1]).files_written_outside().get(&id), None);
        let mut sleeper = std::process::Command::new("sleep")
            .arg("60")
            .stdout(file.as_file().try_clone().expect("a copy"))
            .spawn()
            .expect("sleep runs");
        let found = Family::of(vec![us]).files_written_outside().get(&id).copied();
        let own = Family::of(vec![us, sleeper.id() as i32]).files_written_outside().get(&id).copied();
        let _ = sleeper.kill();
        let _ = sleeper.wait();
        assert_eq!((found, own), (Some(sleeper.id() as i32), None));
    }
}
