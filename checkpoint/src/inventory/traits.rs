//! Settings of a process that an image does not carry.

use super::{Blocker, Rules};
use crate::image::ProcessImage;
use crate::proc::status::Status;

/// What can be seen without stopping it.
pub fn outside(status: &Status, blockers: &mut Vec<Blocker>) {
    if status.mask("untag_mask").is_some_and(|mask| mask != u64::MAX) {
        let what = "parts of its addresses are tags (linear address masking), which is not carried".into();
        blockers.push(Blocker { kind: "cpu", what });
    }
}

/// What it tells only itself.
pub fn blockers(image: &ProcessImage, rules: Rules, blockers: &mut Vec<Blocker>) {
    let traits = &image.traits;
    let mut refuse = |kind, what: &str| blockers.push(Blocker { kind, what: what.into() });
    if traits.has_ldt {
        refuse("kernel", "it has a local descriptor table (modify_ldt), which is not carried");
    }
    if traits.has_keyring {
        refuse("identity", "it has keys of its own (a process or thread keyring), which are not carried");
    }
    if image.threads.iter().any(|thread| uses_tiles(&thread.xstate)) {
        refuse("cpu", "it has something in AMX tiles, which is not carried");
    }
    // At home it would be mapped anew, and could not be.
    if traits.mdwe != 0 && rules == Rules::Homed {
        refuse("kernel", "it forbids itself memory that becomes executable (PR_SET_MDWE)");
    }
}

/// Whether parts 17 or 18 of the extended state are in use (the header of XSAVE, its first word).
fn uses_tiles(xstate: &[u8]) -> bool {
    xstate.get(514).is_some_and(|byte| byte & 0b110 != 0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn tiles() {
        let mut area = vec![0; 576];
        assert!(!super::uses_tiles(&area) && !super::uses_tiles(&area[..512]));
        area[514] = 4;
        assert!(super::uses_tiles(&area));
    }
}
