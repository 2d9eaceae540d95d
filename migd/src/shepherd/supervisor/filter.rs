//! The policy as a program for seccomp(2): classic BPF over `struct seccomp_data`.
//!
//! The number of the call is looked at first, in a binary tree, and nothing else for calls that are
//! not listed: the kernel then knows them to be always allowed and does not run the program for them
//! at all (`seccomp_cache_prepare`, kernel/seccomp.c, since 5.11). Only what would be told is compared
//! with the stub's addresses, from where a tracer's injected calls come.

use super::policy::{RULES, Rule, When};
use checkpoint::sys::seccomp::ARCH_X86_64;

/// `struct sock_filter`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    code: u16,
    jt: u8,
    jf: u8,
    k: u32,
}

const LD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const JEQ: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const JGE: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const JSET: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const JA: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const RET: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

const ALLOW: u32 = 0x7fff_0000;
const NOTIFY: u32 = 0x7fc0_0000;
const ERRNO: u32 = 0x0005_0000;

/// Offsets in `struct seccomp_data`.
const NR: u32 = 0;
const ARCH: u32 = 4;
const IP: u32 = 8;
/// `__X32_SYSCALL_BIT`.
const X32: u32 = 0x4000_0000;
const PAGE: u64 = 4096;

/// Low and high word of an argument.
const fn low(arg: u8) -> u32 {
    16 + 8 * arg as u32
}

const fn high(arg: u8) -> u32 {
    low(arg) + 4
}

/// Types of ioctl(2) requests (bits 8 to 15) that ask what is behind a file: `T` terminal, `f` and
/// `X` file system, 0x12 block device.
const REQUEST_TYPES: [u32; 4] = [0x5400, 0x6600, 0x5800, 0x1200];
/// FIONBIO, FIOCLEX, FIONCLEX: of type `T`, but the kernel's own business.
const LOCAL_REQUESTS: [u32; 3] = [0x5421, 0x5451, 0x5450];

/// The filter of a guest with PID `own` whose stub's code page is at `stub`.
pub fn program(own: i32, stub: u64) -> Vec<Instruction> {
    let mut asm = Assembler { code: Vec::new(), own: own as u32 };
    asm.push(LD, 0, 0, ARCH);
    let foreign = asm.far(JEQ, ARCH_X86_64, false);
    asm.push(LD, 0, 0, NR);
    // A number of the x32 ABI, which no kernel that is common has.
    asm.push(JGE, 0, 1, X32);
    asm.push(RET, 0, 0, ERRNO | libc::ENOSYS as u32);
    let mut told = Vec::new();
    asm.tree(RULES, &mut told);
    let end = asm.code.len();
    for at in told {
        asm.land(at, end);
    }
    asm.unless_in_stub(stub);
    let end = asm.code.len();
    asm.land(foreign, end);
    asm.push(RET, 0, 0, NOTIFY);
    asm.code
}

/// As the kernel reads it.
pub fn to_bytes(program: &[Instruction]) -> Vec<u8> {
    let mut out = Vec::with_capacity(8 * program.len());
    for instruction in program {
        out.extend_from_slice(&instruction.code.to_le_bytes());
        out.extend_from_slice(&[instruction.jt, instruction.jf]);
        out.extend_from_slice(&instruction.k.to_le_bytes());
    }
    out
}

struct Assembler {
    code: Vec<Instruction>,
    own: u32,
}

impl Assembler {
    fn push(&mut self, code: u16, jt: u8, jf: u8, k: u32) {
        self.code.push(Instruction { code, jt, jf, k });
    }

    /// A long jump whose target is set by [`Assembler::land`].
    fn jump(&mut self) -> usize {
        self.push(JA, 0, 0, 0);
        self.code.len() - 1
    }

    fn land(&mut self, jump: usize, target: usize) {
        self.code[jump].k = (target - jump - 1) as u32;
    }

    /// A long jump if the comparison is `wanted`; else on.
    fn far(&mut self, code: u16, k: u32, wanted: bool) -> usize {
        let (jt, jf) = if wanted { (0, 1) } else { (1, 0) };
        self.push(code, jt, jf, k);
        self.jump()
    }

    /// The number is in the accumulator. Jumps of calls to be told of are added to `told`.
    fn tree(&mut self, rules: &[Rule], told: &mut Vec<usize>) {
        match rules {
            [] => self.push(RET, 0, 0, ALLOW),
            [rule] => {
                self.push(JEQ, 1, 0, rule.nr as u32);
                self.push(RET, 0, 0, ALLOW);
                self.rule(rule.when, told);
            }
            _ => {
                let (left, right) = rules.split_at(rules.len() / 2);
                let jump = self.far(JGE, right[0].nr as u32, true);
                self.tree(left, told);
                let here = self.code.len();
                self.land(jump, here);
                self.tree(right, told);
            }
        }
    }

    fn rule(&mut self, when: When, told: &mut Vec<usize>) {
        match when {
            When::Always => {}
            When::UnlessBits(arg, bits) => {
                self.push(LD, 0, 0, low(arg));
                self.allow_if(JSET, bits);
            }
            When::In(arg, values) => {
                self.push(LD, 0, 0, low(arg));
                self.tell_if_in(values, told);
                return self.push(RET, 0, 0, ALLOW);
            }
            When::UnlessIs(arg, value) => {
                self.push(LD, 0, 0, low(arg));
                self.allow_if(JEQ, value);
            }
            When::UnlessSelf(arg) => {
                self.push(LD, 0, 0, low(arg));
                self.allow_if(JEQ, self.own);
            }
            When::UnlessSelfOrZero(arg) => {
                self.push(LD, 0, 0, low(arg));
                self.allow_if(JEQ, 0);
                self.allow_if(JEQ, self.own);
            }
            When::UnlessOwnProcess(which) => {
                self.push(LD, 0, 0, low(0));
                told.push(self.far(JEQ, which, false));
                self.push(LD, 0, 0, low(1));
                self.allow_if(JEQ, 0);
                self.allow_if(JEQ, self.own);
            }
            When::Prlimit => return self.prlimit(told),
            When::SharedWritable => return self.shared_writable(told),
            When::DeviceRequest => {
                self.push(LD, 0, 0, low(1));
                for request in LOCAL_REQUESTS {
                    self.allow_if(JEQ, request);
                }
                self.push(AND, 0, 0, 0xff00);
                self.tell_if_in(&REQUEST_TYPES, told);
                return self.push(RET, 0, 0, ALLOW);
            }
        }
        told.push(self.jump());
    }

    fn allow_if(&mut self, code: u16, k: u32) {
        self.push(code, 0, 1, k);
        self.push(RET, 0, 0, ALLOW);
    }

    fn tell_if_in(&mut self, values: &[u32], told: &mut Vec<usize>) {
        for &value in values {
            told.push(self.far(JEQ, value, true));
        }
    }

    /// prlimit64(pid, resource, new, old).
    fn prlimit(&mut self, told: &mut Vec<usize>) {
        for word in [low(2), high(2)] {
            self.push(LD, 0, 0, word);
            told.push(self.far(JEQ, 0, false));
        }
        self.push(LD, 0, 0, low(0));
        self.allow_if(JEQ, 0);
        self.allow_if(JEQ, self.own);
        told.push(self.jump());
    }

    /// mmap(addr, length, prot, flags, fd, offset).
    fn shared_writable(&mut self, told: &mut Vec<usize>) {
        self.push(LD, 0, 0, low(3));
        self.push(JSET, 1, 0, libc::MAP_SHARED as u32);
        self.push(RET, 0, 0, ALLOW);
        self.allow_if(JSET, libc::MAP_ANONYMOUS as u32);
        self.push(LD, 0, 0, low(2));
        told.push(self.far(JSET, libc::PROT_WRITE as u32, true));
        self.push(RET, 0, 0, ALLOW);
    }

    /// Allows what is called from the code page at `stub`; falls through for the rest.
    fn unless_in_stub(&mut self, stub: u64) {
        let (first, last) = (stub as u32, (stub + PAGE - 1) as u32);
        self.push(LD, 0, 0, IP + 4);
        self.push(JEQ, 0, 4, (stub >> 32) as u32);
        self.push(LD, 0, 0, IP);
        self.push(JGE, 0, 2, first);
        // Beyond the last byte: told.
        self.push((libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K) as u16, 1, 0, last);
        self.push(RET, 0, 0, ALLOW);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STUB: u64 = 0x7_1234_5000;
    const OWN: i32 = 4321;

    /// Runs the program as the kernel would.
    fn run(program: &[Instruction], arch: u32, nr: i64, ip: u64, args: [u64; 6]) -> u32 {
        let mut data = [0u8; 64];
        data[..4].copy_from_slice(&(nr as u32).to_le_bytes());
        data[4..8].copy_from_slice(&arch.to_le_bytes());
        data[8..16].copy_from_slice(&ip.to_le_bytes());
        for (slot, arg) in data[16..].chunks_exact_mut(8).zip(args) {
            slot.copy_from_slice(&arg.to_le_bytes());
        }
        let (mut at, mut acc) = (0usize, 0u32);
        loop {
            let Instruction { code, jt, jf, k } = program[at];
            at += 1;
            let mut branch = |yes: bool| at += usize::from(if yes { jt } else { jf });
            match code {
                LD => {
                    let bytes = data[k as usize..k as usize + 4].try_into().expect("four bytes");
                    acc = u32::from_le_bytes(bytes);
                }
                JEQ => branch(acc == k),
                JGE => branch(acc >= k),
                JSET => branch(acc & k != 0),
                0x25 => branch(acc > k),
                JA => at += k as usize,
                AND => acc &= k,
                RET => return k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn decide(nr: i64, args: [u64; 6]) -> bool {
        let program = program(OWN, STUB);
        match run(&program, ARCH_X86_64, nr, 0x40_1000, args) {
            ALLOW => true,
            NOTIFY => false,
            other => panic!("{other:#x}"),
        }
    }

    fn args(given: &[u64]) -> [u64; 6] {
        let mut all = [0; 6];
        all[..given.len()].copy_from_slice(given);
        all
    }

    #[test]
    fn unlisted_calls_are_native_and_listed_ones_are_told() {
        for nr in 0..600 {
            let always = RULES.iter().any(|rule| rule.nr == nr && rule.when == When::Always);
            let listed = RULES.iter().any(|rule| rule.nr == nr);
            if !listed {
                assert!(decide(nr, [0; 6]), "{nr}");
            } else if always {
                assert!(!decide(nr, [0; 6]), "{nr}");
            }
        }
    }

    #[test]
    fn arguments_decide() {
        let own = OWN as u64;
        let thread = libc::CLONE_THREAD as u64 | 0x3d0f00;
        for (nr, given, native) in [
            (libc::SYS_clone, vec![thread], true),
            (libc::SYS_clone, vec![17], false),
            (libc::SYS_kill, vec![own, 9], true),
            (libc::SYS_kill, vec![0, 9], false),
            (libc::SYS_kill, vec![u64::MAX, 9], false),
            (libc::SYS_tgkill, vec![own, 5, 9], true),
            (libc::SYS_fcntl, vec![3, 3], true),
            (libc::SYS_fcntl, vec![3, 6], false),
            (libc::SYS_fcntl, vec![3, 1030], true),
            (libc::SYS_prctl, vec![15], true),
            (libc::SYS_prctl, vec![1], false),
            (libc::SYS_prlimit64, vec![0, 7, 0, 0x1000], true),
            (libc::SYS_prlimit64, vec![0, 7, 0x7fff_0000_0000, 0], false),
            (libc::SYS_prlimit64, vec![own, 7, 0, 0], true),
            (libc::SYS_prlimit64, vec![1, 7, 0, 0], false),
            (libc::SYS_mmap, vec![0, 4096, 3, 0x22, u64::MAX], true),
            (libc::SYS_mmap, vec![0, 4096, 3, 0x21, u64::MAX], true),
            (libc::SYS_mmap, vec![0, 4096, 3, 0x2, 3], true),
            (libc::SYS_mmap, vec![0, 4096, 1, 0x1, 3], true),
            (libc::SYS_mmap, vec![0, 4096, 3, 0x1, 3], false),
            (libc::SYS_mmap, vec![0, 4096, 3, 0x3, 3], false),
            (libc::SYS_ioctl, vec![1, 0x5401], false),
            (libc::SYS_ioctl, vec![1, 0x802c_542a], false),
            (libc::SYS_ioctl, vec![1, 0x5421], true),
            (libc::SYS_ioctl, vec![1, 0x4004_9409], true),
            (libc::SYS_sched_getaffinity, vec![0], true),
            (libc::SYS_sched_getaffinity, vec![77], false),
            (libc::SYS_getpriority, vec![0, 0], true),
            (libc::SYS_getpriority, vec![0, own], true),
            (libc::SYS_getpriority, vec![1, 0], false),
            (libc::SYS_personality, vec![0xffff_ffff], true),
            (libc::SYS_personality, vec![0], false),
        ] {
            assert_eq!(decide(nr, args(&given)), native, "{nr} {given:x?}");
        }
    }

    #[test]
    fn the_stub_other_abis_and_nothing_else_are_special() {
        let program = program(OWN, STUB);
        let run = |arch, nr, ip| run(&program, arch, nr, ip, [0; 6]);
        assert_eq!(run(ARCH_X86_64, libc::SYS_fork, STUB), ALLOW);
        assert_eq!(run(ARCH_X86_64, libc::SYS_fork, STUB + 4095), ALLOW);
        assert_eq!(run(ARCH_X86_64, libc::SYS_fork, STUB + 4096), NOTIFY);
        assert_eq!(run(ARCH_X86_64, libc::SYS_fork, STUB - 1), NOTIFY);
        assert_eq!(run(ARCH_X86_64, libc::SYS_fork, STUB & 0xffff_ffff), NOTIFY);
        // i386: everything is told.
        assert_eq!(run(0x4000_0003, 20, STUB), NOTIFY);
        assert_eq!(run(ARCH_X86_64, 0x4000_0001, 0), ERRNO | 38);
        assert!(program.len() < 4096, "BPF_MAXINSNS");
    }
}
