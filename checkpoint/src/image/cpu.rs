//! What a CPU told the programs that ran on it.
//!
//! Programs choose their code by it once (glibc when it is loaded) and keep the choice, so that it must hold
//! wherever they run on.

use crate::sys::cpuid::{cpuid, xcr0};
use serde::{Deserialize, Serialize};
use std::sync::OnceLock;

/// Leaves of cpuid that tell of instructions a program may use.
const LEAVES: [(u32, u32); 6] = [(1, 0), (7, 0), (7, 1), (0xd, 1), (0x8000_0001, 0), (0x8000_0008, 0)];
/// Parts of the extended state beyond x87 and SSE have numbers up to this one.
const MAX_COMPONENT: u32 = 62;

/// The CPU where an image was made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuImage {
    /// Its name, for people.
    pub model: String,
    /// Leaf, subleaf, and eax, ebx, ecx, edx.
    pub leaves: Vec<(u32, u32, [u32; 4])>,
    /// XCR0; 0: it has no XSAVE.
    pub xcr0: u64,
    /// Parts of the extended state beyond x87 and SSE.
    pub components: Vec<Component>,
}

/// A part of the extended state, and where it is in the standard form of XSAVE (CPUID leaf 0xd).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Component {
    /// Its bit in XCR0.
    pub number: u32,
    /// Where it begins, bytes.
    pub offset: u32,
    /// Its length, bytes.
    pub size: u32,
}

impl CpuImage {
    /// The CPU that this program runs on. Asked once: under a hypervisor each answer is a way out and back.
    pub fn here() -> &'static CpuImage {
        static HERE: OnceLock<CpuImage> = OnceLock::new();
        HERE.get_or_init(CpuImage::read)
    }

    fn read() -> CpuImage {
        let highest = |leaf: u32| cpuid(leaf & 0x8000_0000, 0)[0];
        let mut leaves = Vec::new();
        for (leaf, subleaf) in LEAVES {
            // Beyond the highest, the answer is that of another leaf.
            let subleaf_is_there = leaf != 7 || subleaf <= cpuid(7, 0)[0];
            if leaf <= highest(leaf) && subleaf_is_there {
                leaves.push((leaf, subleaf, cpuid(leaf, subleaf)));
            }
        }
        let xcr0 = xcr0().unwrap_or(0);
        let component = |number: u32| {
            let [size, offset, ..] = cpuid(0xd, number);
            Component { number, offset, size }
        };
        let components = (2..=MAX_COMPONENT).filter(|n| xcr0 >> n & 1 == 1).map(component).collect();
        CpuImage { model: model(), leaves, xcr0, components }
    }

    /// A register of a leaf; 0 where the CPU has no such leaf.
    pub fn register(&self, leaf: u32, subleaf: u32, register: usize) -> u32 {
        let found = self.leaves.iter().find(|&&(l, s, _)| (l, s) == (leaf, subleaf));
        found.and_then(|(_, _, registers)| registers.get(register)).copied().unwrap_or(0)
    }

    /// A part of the extended state.
    pub fn component(&self, number: u32) -> Option<Component> {
        self.components.iter().find(|component| component.number == number).copied()
    }
}

/// CPUID leaves 0x80000002 to 0x80000004.
fn model() -> String {
    if cpuid(0x8000_0000, 0)[0] < 0x8000_0004 {
        return "unknown".into();
    }
    let bytes: Vec<u8> = (0x8000_0002..=0x8000_0004u32)
        .flat_map(|leaf| cpuid(leaf, 0))
        .flat_map(u32::to_le_bytes)
        .take_while(|&byte| byte != 0)
        .collect();
    String::from_utf8_lossy(&bytes).trim().to_string()
}
