//! What a process must ask the kernel itself.

use super::DumpError;
use crate::sys::ptrace::Regs;
use crate::sys::rlimit::LIMITS;
use crate::tracee::restart::original_call;
use crate::tracee::{ThreadState, Tracee};

/// Questions asked by injected system calls.
pub struct Inside<'a> {
    tracee: &'a mut Tracee,
}

/// Signals there are.
const SIGNALS: u64 = 64;

impl<'a> Inside<'a> {
    pub fn new(tracee: &'a mut Tracee) -> Inside<'a> {
        Inside { tracee }
    }

    pub fn pid(&self) -> i32 {
        self.tracee.pid()
    }

    pub fn thread_count(&self) -> usize {
        self.tracee.thread_count()
    }

    pub fn original(&self, i: usize) -> &ThreadState {
        self.tracee.original(i)
    }

    /// Handler, flags, restorer and mask of every signal.
    pub fn actions(&mut self) -> Result<Vec<[u64; 4]>, DumpError> {
        let scratch = self.tracee.scratch();
        let mut out = Vec::with_capacity(SIGNALS as usize);
        // Each answer to a place of its own: read back at once.
        for signal in 1..=SIGNALS {
            let at = scratch + (signal - 1) * 32 % 2048;
            self.tracee.must(0, "rt_sigaction", libc::SYS_rt_sigaction, [signal, 0, at, 8, 0, 0])?;
        }
        let mut bytes = vec![0; 32 * SIGNALS as usize];
        self.tracee.read_mem(scratch, &mut bytes)?;
        for action in bytes.chunks_exact(32) {
            out.push(std::array::from_fn(|n| word(action, n * 8)));
        }
        Ok(out)
    }

    pub fn brk(&mut self) -> Result<u64, DumpError> {
        Ok(self.tracee.syscall(0, libc::SYS_brk, [0; 6])? as u64)
    }

    /// Every limit: number, soft, hard. Asked inside, as prlimit(2) on a process with other ids needs
    /// CAP_SYS_RESOURCE.
    pub fn limits(&mut self) -> Result<Vec<(u32, u64, u64)>, DumpError> {
        let scratch = self.tracee.scratch();
        let mut out = Vec::with_capacity(LIMITS as usize);
        for resource in 0..LIMITS {
            let args = [0, resource.into(), 0, scratch, 0, 0];
            if self.tracee.syscall(0, libc::SYS_prlimit64, args)? == 0 {
                let mut bytes = [0; 16];
                self.tracee.read_mem(scratch, &mut bytes)?;
                out.push((resource, word(&bytes, 0), word(&bytes, 8)));
            }
        }
        Ok(out)
    }

    /// A prctl(2) whose result is the answer.
    pub fn prctl_value(&mut self, option: i32) -> Result<i64, DumpError> {
        self.thread_value(0, option)
    }

    /// A prctl(2) that writes its answer.
    pub fn prctl_word(&mut self, option: i32) -> Result<u64, DumpError> {
        self.thread_word(0, option)
    }

    pub fn thread_value(&mut self, i: usize, option: i32) -> Result<i64, DumpError> {
        Ok(self.tracee.must(i, "prctl", libc::SYS_prctl, [option as u64, 0, 0, 0, 0, 0])?)
    }

    pub fn thread_word(&mut self, i: usize, option: i32) -> Result<u64, DumpError> {
        let scratch = self.tracee.scratch();
        self.tracee.write_mem(scratch, &[0; 8])?;
        self.tracee.must(i, "prctl", libc::SYS_prctl, [option as u64, scratch, 0, 0, 0, 0])?;
        self.read_word(scratch)
    }

    pub fn altstack(&mut self, i: usize) -> Result<(u64, u32, u64), DumpError> {
        let scratch = self.tracee.scratch();
        self.tracee.must(i, "sigaltstack", libc::SYS_sigaltstack, [0, scratch, 0, 0, 0, 0])?;
        let mut bytes = [0; 24];
        self.tracee.read_mem(scratch, &mut bytes)?;
        Ok((word(&bytes, 0), word(&bytes, 8) as u32, word(&bytes, 16)))
    }

    /// Interval and remainder of an interval timer, microseconds.
    pub fn itimer(&mut self, which: u64) -> Result<(u64, u64), DumpError> {
        let scratch = self.tracee.scratch();
        self.tracee.must(0, "getitimer", libc::SYS_getitimer, [which, scratch, 0, 0, 0, 0])?;
        let mut bytes = [0; 32];
        self.tracee.read_mem(scratch, &mut bytes)?;
        let micros = |at| word(&bytes, at).saturating_mul(1_000_000).saturating_add(word(&bytes, at + 8));
        Ok((micros(0), micros(16)))
    }

    /// Interval and remainder (ns) and overrun of a POSIX timer.
    pub fn posix_timer(&mut self, id: i32) -> Result<(u64, u64, i32), DumpError> {
        let scratch = self.tracee.scratch();
        let args = [id as u64, scratch, 0, 0, 0, 0];
        self.tracee.must(0, "timer_gettime", libc::SYS_timer_gettime, args)?;
        let mut bytes = [0; 32];
        self.tracee.read_mem(scratch, &mut bytes)?;
        let nanos = |at| word(&bytes, at).saturating_mul(1_000_000_000).saturating_add(word(&bytes, at + 8));
        let (interval, value) = (nanos(0), nanos(16));
        let overrun = self.tracee.syscall(0, libc::SYS_timer_getoverrun, [id as u64, 0, 0, 0, 0, 0])?;
        Ok((interval, value, overrun.max(0) as i32))
    }

    /// CLOCK_MONOTONIC and CLOCK_BOOTTIME as it sees them, ns.
    pub fn clocks(&mut self) -> Result<(u64, u64), DumpError> {
        let scratch = self.tracee.scratch();
        let mut read = |clock: i32| -> Result<u64, DumpError> {
            let args = [clock as u64, scratch, 0, 0, 0, 0];
            self.tracee.must(0, "clock_gettime", libc::SYS_clock_gettime, args)?;
            let mut bytes = [0; 16];
            self.tracee.read_mem(scratch, &mut bytes)?;
            Ok(word(&bytes, 0).saturating_mul(1_000_000_000).saturating_add(word(&bytes, 8)))
        };
        Ok((read(libc::CLOCK_MONOTONIC)?, read(libc::CLOCK_BOOTTIME)?))
    }

    /// Host name and domain name it sees.
    pub fn utsname(&mut self) -> Result<(Vec<u8>, Vec<u8>), DumpError> {
        let scratch = self.tracee.scratch();
        self.tracee.must(0, "uname", libc::SYS_uname, [scratch, 0, 0, 0, 0, 0])?;
        // struct new_utsname: six fields of 65 bytes.
        let mut bytes = [0; 390];
        self.tracee.read_mem(scratch, &mut bytes)?;
        let field = |n: usize| {
            let field = &bytes[n * 65..(n + 1) * 65];
            field.split(|&byte| byte == 0).next().unwrap_or_default().to_vec()
        };
        Ok((field(1), field(5)))
    }

    /// The call that thread `i` was in, as [`original_call`] tells.
    pub fn original_call(&self, regs: &Regs) -> Option<i64> {
        let mut read = |addr: u64, buffer: &mut [u8]| self.tracee.read_mem(addr, buffer).is_ok();
        original_call(regs, &mut read)
    }

    fn read_word(&self, at: u64) -> Result<u64, DumpError> {
        let mut bytes = [0; 8];
        self.tracee.read_mem(at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
