//! Whether a program can run on a CPU after it has looked at another one.
//!
//! What counts are instructions that programs use and that fault where they are missing. What only the kernel
//! uses, what a hypervisor shows, and hints that do nothing on older CPUs (`hle`, prefetches, speed of string
//! moves) are no reason to refuse.

use super::Blocker;
use crate::image::cpu::CpuImage;

/// Where cpuid tells of a feature, and its name in `/proc/cpuinfo`.
struct Feature(u32, u32, Register, u32, &'static str);

#[derive(Clone, Copy)]
enum Register {
    Eax = 0,
    Ebx = 1,
    Ecx = 2,
    Edx = 3,
}
use Register::{Eax, Ebx, Ecx, Edx};

/// Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E.
const FEATURES: &[Feature] = &[
    Feature(1, 0, Ecx, 0, "pni"),
    Feature(1, 0, Ecx, 1, "pclmulqdq"),
    Feature(1, 0, Ecx, 9, "ssse3"),
    Feature(1, 0, Ecx, 12, "fma"),
    Feature(1, 0, Ecx, 13, "cx16"),
    Feature(1, 0, Ecx, 19, "sse4_1"),
    Feature(1, 0, Ecx, 20, "sse4_2"),
    Feature(1, 0, Ecx, 22, "movbe"),
    Feature(1, 0, Ecx, 23, "popcnt"),
    Feature(1, 0, Ecx, 25, "aes"),
    Feature(1, 0, Ecx, 27, "osxsave"),
    Feature(1, 0, Ecx, 28, "avx"),
    Feature(1, 0, Ecx, 29, "f16c"),
    Feature(1, 0, Ecx, 30, "rdrand"),
    Feature(1, 0, Edx, 4, "tsc"),
    Feature(1, 0, Edx, 15, "cmov"),
    Feature(1, 0, Edx, 19, "clflush"),
    Feature(1, 0, Edx, 23, "mmx"),
    Feature(7, 0, Ebx, 0, "fsgsbase"),
    Feature(7, 0, Ebx, 3, "bmi1"),
    Feature(7, 0, Ebx, 5, "avx2"),
    Feature(7, 0, Ebx, 8, "bmi2"),
    Feature(7, 0, Ebx, 11, "rtm"),
    Feature(7, 0, Ebx, 16, "avx512f"),
    Feature(7, 0, Ebx, 17, "avx512dq"),
    Feature(7, 0, Ebx, 18, "rdseed"),
    Feature(7, 0, Ebx, 19, "adx"),
    Feature(7, 0, Ebx, 21, "avx512ifma"),
    Feature(7, 0, Ebx, 23, "clflushopt"),
    Feature(7, 0, Ebx, 24, "clwb"),
    Feature(7, 0, Ebx, 28, "avx512cd"),
    Feature(7, 0, Ebx, 29, "sha_ni"),
    Feature(7, 0, Ebx, 30, "avx512bw"),
    Feature(7, 0, Ebx, 31, "avx512vl"),
    Feature(7, 0, Ecx, 1, "avx512vbmi"),
    Feature(7, 0, Ecx, 4, "ospke"),
    Feature(7, 0, Ecx, 5, "waitpkg"),
    Feature(7, 0, Ecx, 6, "avx512_vbmi2"),
    Feature(7, 0, Ecx, 8, "gfni"),
    Feature(7, 0, Ecx, 9, "vaes"),
    Feature(7, 0, Ecx, 10, "vpclmulqdq"),
    Feature(7, 0, Ecx, 11, "avx512_vnni"),
    Feature(7, 0, Ecx, 12, "avx512_bitalg"),
    Feature(7, 0, Ecx, 14, "avx512_vpopcntdq"),
    Feature(7, 0, Ecx, 22, "rdpid"),
    Feature(7, 0, Ecx, 27, "movdiri"),
    Feature(7, 0, Ecx, 28, "movdir64b"),
    Feature(7, 0, Edx, 8, "avx512_vp2intersect"),
    Feature(7, 0, Edx, 14, "serialize"),
    Feature(7, 0, Edx, 16, "tsxldtrk"),
    Feature(7, 0, Edx, 22, "amx_bf16"),
    Feature(7, 0, Edx, 23, "avx512_fp16"),
    Feature(7, 0, Edx, 24, "amx_tile"),
    Feature(7, 0, Edx, 25, "amx_int8"),
    Feature(7, 1, Eax, 0, "sha512"),
    Feature(7, 1, Eax, 1, "sm3"),
    Feature(7, 1, Eax, 2, "sm4"),
    Feature(7, 1, Eax, 4, "avx_vnni"),
    Feature(7, 1, Eax, 5, "avx512_bf16"),
    Feature(7, 1, Eax, 7, "cmpccxadd"),
    Feature(7, 1, Eax, 21, "amx_fp16"),
    Feature(7, 1, Eax, 23, "avx_ifma"),
    Feature(7, 1, Edx, 4, "avx_vnni_int8"),
    Feature(7, 1, Edx, 5, "avx_ne_convert"),
    Feature(7, 1, Edx, 10, "avx_vnni_int16"),
    Feature(0xd, 1, Eax, 0, "xsaveopt"),
    // The dynamic linker saves registers with it.
    Feature(0xd, 1, Eax, 1, "xsavec"),
    Feature(0xd, 1, Eax, 2, "xgetbv1"),
    Feature(0x8000_0001, 0, Ecx, 0, "lahf_lm"),
    Feature(0x8000_0001, 0, Ecx, 5, "abm"),
    Feature(0x8000_0001, 0, Ecx, 6, "sse4a"),
    Feature(0x8000_0001, 0, Ecx, 11, "xop"),
    Feature(0x8000_0001, 0, Ecx, 16, "fma4"),
    Feature(0x8000_0001, 0, Ecx, 21, "tbm"),
    Feature(0x8000_0001, 0, Ecx, 29, "mwaitx"),
    Feature(0x8000_0001, 0, Edx, 22, "mmxext"),
    Feature(0x8000_0001, 0, Edx, 27, "rdtscp"),
    Feature(0x8000_0001, 0, Edx, 30, "3dnowext"),
    Feature(0x8000_0001, 0, Edx, 31, "3dnow"),
    Feature(0x8000_0008, 0, Ebx, 0, "clzero"),
];

/// Features that the CPU `was` has and `here` lacks, by their names in `/proc/cpuinfo`.
pub fn lacking(was: &CpuImage, here: &CpuImage) -> Vec<&'static str> {
    let has = |cpu: &CpuImage, feature: &Feature| {
        cpu.register(feature.0, feature.1, feature.2 as usize) >> feature.3 & 1 == 1
    };
    FEATURES.iter().filter(|feature| has(was, feature) && !has(here, feature)).map(|f| f.4).collect()
}

/// Why what has looked at the CPU `was` may not run on `here`; `auxv` is its auxiliary vector.
pub fn blockers(was: &CpuImage, here: &CpuImage, auxv: &[u8], kernel_told: u64) -> Vec<Blocker> {
    let mut blockers = Vec::new();
    let lacking = lacking(was, here);
    if !lacking.is_empty() {
        let what = format!(
            "it was told of instructions that this CPU ({}) lacks: {} (it ran on {})",
            here.model,
            lacking.join(", "),
            was.model
        );
        blockers.push(Blocker { kind: "cpu", what });
    }
    let told = auxiliary(auxv, libc::AT_HWCAP2).unwrap_or(0);
    let missing = told & !kernel_told;
    if missing != 0 {
        let what =
            format!("it was told of CPU features (AT_HWCAP2 {missing:#x}) that this kernel does not enable");
        blockers.push(Blocker { kind: "cpu", what });
    }
    blockers
}

/// A value of an auxiliary vector (getauxval(3)).
pub fn auxiliary(auxv: &[u8], wanted: u64) -> Option<u64> {
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    auxv.chunks_exact(16)
        .map(|pair| (word(&pair[..8]), word(&pair[8..])))
        .find(|&(key, _)| key == wanted)
        .map(|(_, value)| value)
}

/// AT_HWCAP2 of this program, which is what the kernel here tells all.
pub fn kernel_tells() -> u64 {
    let auxv = std::fs::read("/proc/self/auxv").unwrap_or_default();
    auxiliary(&auxv, libc::AT_HWCAP2).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(leaves: &[(u32, u32, [u32; 4])]) -> CpuImage {
        CpuImage { model: "made up".into(), leaves: leaves.to_vec(), ..CpuImage::default() }
    }

    #[test]
    fn what_is_missing_is_named() {
        let old = cpu(&[(1, 0, [0, 0, 1 << 9 | 1 << 28, 0]), (7, 0, [0, 1 << 5, 0, 0])]);
        let new =
            cpu(&[(1, 0, [0, 0, 1 << 9 | 1 << 28, 0]), (7, 0, [0, 1 << 5 | 1 << 16 | 1 << 30, 0, 1 << 24])]);
        assert_eq!(lacking(&new, &old), ["avx512f", "avx512bw", "amx_tile"]);
        assert!(lacking(&old, &new).is_empty());
        let found = blockers(&new, &old, &[], 0);
        assert!(found[0].what.contains("lacks: avx512f, avx512bw, amx_tile"), "{}", found[0].what);
        // A leaf that the other has not at all.
        assert_eq!(lacking(&old, &cpu(&[])), ["ssse3", "avx", "avx2"]);
    }

    #[test]
    fn what_only_the_kernel_uses_is_none_of_it() {
        // VMX, x2APIC, TSC deadline, hypervisor; SMEP, SMAP, Processor Trace; CET, speculation control.
        let new = cpu(&[
            (1, 0, [0x806f8, 0, 1 << 5 | 1 << 21 | 1 << 24 | 1 << 31, 0]),
            (7, 0, [2, 1 << 7 | 1 << 20 | 1 << 25, 1 << 7, 1 << 26 | 1 << 31]),
        ]);
        assert!(lacking(&new, &cpu(&[])).is_empty());
    }

    #[test]
    fn what_the_kernel_told() {
        let auxv: Vec<u8> = [16u64, 0xff, 26, 3, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(auxiliary(&auxv, 26), Some(3));
        assert_eq!(auxiliary(&auxv[..40], 33), None);
        let same = cpu(&[]);
        assert!(blockers(&same, &same, &auxv, 3).is_empty());
        assert!(blockers(&same, &same, &auxv, 1)[0].what.contains("AT_HWCAP2 0x2"));
    }

    #[test]
    fn this_cpu_lacks_nothing_of_itself() {
        let here = CpuImage::here();
        assert!(lacking(here, here).is_empty());
        assert!(!here.leaves.is_empty() && here.model.len() < 60);
        assert!(here.components.iter().all(|component| component.size > 0 && component.offset >= 576));
    }
}
