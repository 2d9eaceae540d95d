//! Reading and writing a waiting guest's arguments (process_vm_readv(2)): pages it may not write
//! itself are not written for it either.

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use std::io::{IoSlice, IoSliceMut};

/// Fills `into` from `address`.
pub fn read(tid: i32, address: u64, into: &mut [u8]) -> Result<(), Errno> {
    let len = into.len();
    let remote = [RemoteIoVec { base: address as usize, len }];
    let got = process_vm_readv(Pid::from_raw(tid), &mut [IoSliceMut::new(into)], &remote)?;
    if got == len { Ok(()) } else { Err(Errno::EFAULT) }
}

/// Writes `bytes` to `address`.
pub fn write(tid: i32, address: u64, bytes: &[u8]) -> Result<(), Errno> {
    let remote = [RemoteIoVec { base: address as usize, len: bytes.len() }];
    let got = process_vm_writev(Pid::from_raw(tid), &[IoSlice::new(bytes)], &remote)?;
    if got == bytes.len() { Ok(()) } else { Err(Errno::EFAULT) }
}
