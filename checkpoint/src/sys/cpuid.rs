//! cpuid and xgetbv: what the CPU tells any program (Intel SDM volume 2A, CPUID; volume 1, 13.2).

use std::arch::x86_64::{__cpuid_count, _xgetbv};

/// One answer of cpuid: eax, ebx, ecx, edx.
// Safe since Rust 1.94; this compiles with older ones too.
#[allow(unused_unsafe)]
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    // SAFETY: every x86-64 CPU has the instruction, and it reads nothing but its operands.
    let found = unsafe { __cpuid_count(leaf, subleaf) };
    [found.eax, found.ebx, found.ecx, found.edx]
}

/// XCR0: the parts of the extended state that the kernel lets programs use; `None` without XSAVE.
pub fn xcr0() -> Option<u64> {
    /// CPUID.1:ECX.OSXSAVE.
    const OSXSAVE: u32 = 1 << 27;
    #[target_feature(enable = "xsave")]
    fn read() -> u64 {
        // SAFETY: called only where OSXSAVE is set, and register 0 exists then.
        unsafe { _xgetbv(0) }
    }
    let has_it = cpuid(1, 0)[2] & OSXSAVE != 0;
    // SAFETY: OSXSAVE says that the CPU has the feature and that the kernel has enabled it.
    has_it.then(|| unsafe { read() })
}

#[cfg(test)]
mod tests {
    #[test]
    fn tells_what_every_x86_64_cpu_has() {
        // CPUID.1:EDX: FPU, CMPXCHG8B, FXSR, SSE, SSE2.
        let all = 1 | 1 << 8 | 1 << 24 | 1 << 25 | 1 << 26;
        assert_eq!(super::cpuid(1, 0)[3] & all, all);
        // x87 and SSE are always a part of it.
        assert!(super::xcr0().is_none_or(|mask| mask & 3 == 3));
    }
}
