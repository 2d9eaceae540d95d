//! The extended state (x87, SSE, AVX, …) of an image in the form of this CPU.
//!
//! The image has the standard form of XSAVE as ptrace(2) gives it (`NT_X86_XSTATE`): 512 bytes of FXSAVE, a header
//! whose first word says which parts are in use, and each further part at the place that CPUID leaf 0xd tells
//! (Intel SDM volume 1, 13.4). The kernel takes it only in its own length, and refuses parts that it does not have.

use crate::image::cpu::CpuImage;

/// FXSAVE's area and the header.
const FIXED: usize = 576;
/// The header's first word: parts in use.
const IN_USE: usize = 512;
/// What the kernel tells in the bytes that the CPU leaves to software (struct _fpx_sw_bytes in
/// arch/x86/include/uapi/asm/sigcontext.h): 48 bytes of the FXSAVE area.
const SOFTWARE: std::ops::Range<usize> = 464..512;
/// PKRU.
const PROTECTION_KEYS: u32 = 9;
/// x87 and SSE, which are a part of FXSAVE.
const LEGACY: u64 = 3;

/// The area `theirs`, of the CPU `was`, as this kernel takes it: `ours` is one that it gave here.
///
/// Errors name what cannot be carried.
pub fn fit(theirs: &[u8], was: &CpuImage, ours: &[u8], here: &CpuImage) -> Result<Vec<u8>, String> {
    if theirs.len() < FIXED || ours.len() < FIXED {
        // FXSAVE alone, on a CPU or kernel without XSAVE.
        return match theirs.len() == ours.len() {
            true => Ok(theirs.to_vec()),
            false => Err("one of the two CPUs has no XSAVE".into()),
        };
    }
    let in_use = u64::from_le_bytes(theirs[IN_USE..IN_USE + 8].try_into().expect("eight bytes"));
    let mut area = vec![0; ours.len()];
    area[..FIXED].copy_from_slice(&theirs[..FIXED]);
    area[SOFTWARE].copy_from_slice(&ours[SOFTWARE]);
    for number in (0..64).filter(|number| (in_use & !LEGACY) >> number & 1 == 1) {
        if number == PROTECTION_KEYS && here.component(number).is_none() {
            // Every thread has it; what uses keys is refused by what it uses (`pkeys::check`).
            continue;
        }
        let lacks = || {
            format!(
                "it uses part {number} of the extended state ({}), which this CPU or kernel does not have",
                name(number)
            )
        };
        let to = here.component(number).ok_or_else(lacks)?;
        let from = was.component(number).ok_or("the image is not consistent: its extended state")?;
        if from.size != to.size {
            return Err(format!(
                "part {number} of the extended state ({}) has another size here",
                name(number)
            ));
        }
        let range = |offset: u32| offset as usize..offset as usize + from.size as usize;
        let source =
            theirs.get(range(from.offset)).ok_or("the image is not consistent: its extended state")?;
        let target = area.get_mut(range(to.offset)).ok_or_else(lacks)?;
        target.copy_from_slice(source);
    }
    Ok(area)
}

fn name(number: u32) -> &'static str {
    match number {
        2 => "AVX",
        3 | 4 => "MPX",
        5..=7 => "AVX-512",
        9 => "protection keys",
        17 | 18 => "AMX",
        19 => "APX",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::cpu::Component;

    fn cpu(parts: &[(u32, u32, u32)]) -> CpuImage {
        let components =
            parts.iter().map(|&(number, offset, size)| Component { number, offset, size }).collect();
        CpuImage { components, ..CpuImage::default() }
    }

    /// An area whose parts are filled with their numbers.
    fn area(length: usize, in_use: u64, of: &CpuImage) -> Vec<u8> {
        let mut area = vec![0; length];
        area[..464].fill(0xee);
        area[464..512].fill(length as u8);
        area[512..520].copy_from_slice(&in_use.to_le_bytes());
        for part in &of.components {
            if in_use >> part.number & 1 == 1 {
                area[part.offset as usize..(part.offset + part.size) as usize].fill(part.number as u8);
            }
        }
        area
    }

    #[test]
    fn parts_move_to_where_this_cpu_has_them() {
        // Intel has AVX-512 at 1088, AMD at 832; one has MPX between, the other protection keys behind.
        let intel =
            cpu(&[(2, 576, 256), (3, 960, 64), (5, 1088, 64), (6, 1152, 512), (7, 1664, 1024), (9, 2688, 8)]);
        let amd = cpu(&[(2, 576, 256), (5, 832, 64), (6, 896, 512), (7, 1408, 1024)]);
        let in_use = 0b1110_0111;
        let found = fit(&area(2696, in_use, &intel), &intel, &area(2432, 0, &amd), &amd).expect("fits");
        assert_eq!(found, area(2432, in_use, &amd));
        let back = fit(&found, &amd, &area(2696, 0, &intel), &intel).expect("fits");
        assert_eq!(back, area(2696, in_use, &intel));
    }

    #[test]
    fn parts_in_use_that_are_missing_here_are_named() {
        let (with, without) = (cpu(&[(2, 576, 256), (18, 2752, 8192)]), cpu(&[(2, 576, 256)]));
        let here = area(832, 0, &without);
        let error = fit(&area(10944, 1 << 18 | 7, &with), &with, &here, &without).expect_err("refused");
        assert!(error.contains("AMX"), "{error}");
        // There, but not in use.
        assert!(fit(&area(10944, 7, &with), &with, &here, &without).is_ok());
    }

    #[test]
    fn lies_are_errors() {
        let lying = cpu(&[(2, u32::MAX, 256), (5, 576, u32::MAX)]);
        let here = cpu(&[(2, 576, 256), (5, 832, u32::MAX)]);
        let mut theirs = area(832, 0, &cpu(&[]));
        theirs[512] = 1 << 2;
        assert!(fit(&theirs, &lying, &area(896, 0, &cpu(&[])), &here).is_err());
        theirs[512] = 1 << 5;
        assert!(fit(&theirs, &lying, &area(896, 0, &cpu(&[])), &here).is_err());
        assert!(fit(&[0; 512], &lying, &area(896, 0, &cpu(&[])), &here).is_err());
        assert!(fit(&[1; 512], &lying, &[0; 512], &here).is_ok());
    }
}
