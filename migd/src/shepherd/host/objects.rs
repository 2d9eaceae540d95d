//! Contents without a name at a host node ([`checkpoint::image::objects`]): what came is known by home's names,
//! whatever it is here, and goes on under them.

use checkpoint::dump::objects::Object;
use checkpoint::image::objects::{ObjectImage, ObjectKey, ObjectKind};
use checkpoint::image::{Backing, FileKind, ProcessImage};
use checkpoint::restore::objects::{Objects, memfd};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

/// In place of `st_dev`: objects made by guests away are numbered by themselves, as a node's own numbers may be
/// those of another node's.
const MADE_AWAY: u64 = u64::MAX - 1;

/// The objects that came: by device and inode number here. The kernel's inode numbers of memory are not used again.
#[derive(Debug, Default)]
pub(super) struct Known(BTreeMap<ObjectKey, ObjectImage>);

/// What an object becomes here. A deleted file is one of home's file system: its contents are in memory here.
pub(super) fn give(image: &ObjectImage) -> io::Result<Option<File>> {
    match &image.kind {
        ObjectKind::Deleted { path, .. } => memfd(path).map(Some),
        _ => Ok(None),
    }
}

impl Known {
    /// Those that have come.
    pub fn of(objects: &Objects) -> io::Result<Known> {
        let known = objects.files().map(|(image, file)| {
            let meta = file.metadata()?;
            Ok(((meta.dev(), meta.ino()), image.clone()))
        });
        known.collect::<io::Result<_>>().map(Known)
    }

    /// Gives what was found in the guests its name and kind at home.
    pub fn rename(&self, images: &mut [ProcessImage], objects: &mut [Object]) {
        let mut names: BTreeMap<ObjectKey, ObjectKey> = BTreeMap::new();
        let mut used: BTreeSet<ObjectKey> = self.0.values().map(|image| image.key).collect();
        for object in objects {
            let here = object.image.key;
            match self.0.get(&here) {
                Some(image) => {
                    object.image.key = image.key;
                    if let ObjectKind::Deleted { .. } = image.kind {
                        object.image.kind = image.kind.clone();
                    }
                }
                None => {
                    let free = (0..).map(|n| (MADE_AWAY, n)).find(|key| !used.contains(key));
                    object.image.key = free.expect("fewer objects than numbers");
                    used.insert(object.image.key);
                }
            }
            names.insert(here, object.image.key);
        }
        for image in images {
            for vma in &mut image.mm.vmas {
                if let Backing::Object { key, .. } = &mut vma.backing
                    && let Some(&name) = names.get(key)
                {
                    *key = name;
                }
            }
            for file in image.files.files.iter_mut().filter(|file| file.kind == FileKind::Memfd) {
                let here = (file.stat.0, file.stat.1);
                let Some(&name) = names.get(&here) else { continue };
                (file.stat.0, file.stat.1) = name;
                if let Some(ObjectImage { kind: ObjectKind::Deleted { path, .. }, .. }) = self.0.get(&here) {
                    file.kind = FileKind::Regular { deleted: true };
                    file.link = [path.as_slice(), b" (deleted)"].concat();
                }
            }
        }
    }
}
