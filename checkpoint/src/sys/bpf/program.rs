//! The programs that the kernel runs for each thread or mapping: they load fields of structures, and write them
//! out as a row of 64-bit words. Instructions as in Documentation/bpf/standardization/instruction-set.rst.

use super::btf::{Btf, Place};

/// Words of a row, at most: they are put together on the program's stack of 512 bytes.
const MAX_WORDS: usize = 60;
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
/// Kept by calls.
const SEQUENCE: u8 = 6;
const TASK: u8 = 7;
const REGISTERS: u8 = 8;
const PID: u8 = 9;
/// The frame's end, which the stack is below.
const FRAME: u8 = 10;
const LOAD: u8 = 0x61;
const LOAD_DOUBLE: u8 = 0x79;
const STORE_DOUBLE: u8 = 0x7b;
const STORE_IMMEDIATE: u8 = 0x7a;
const MOVE_REGISTER: u8 = 0xbf;
const MOVE_IMMEDIATE: u8 = 0xb7;
const ADD_IMMEDIATE: u8 = 0x07;
const JUMP_IF_NOT: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const PROBE_READ_KERNEL: i32 = 113;
const SEQ_WRITE: i32 = 127;
const TASK_PT_REGS: i32 = 175;

/// What a word of a row is.
#[derive(Debug, Clone, Copy)]
pub enum Field {
    /// Of `struct task_struct`: members of members. A kernel without it is not looked at that way.
    Task(&'static [&'static str]),
    /// The same; 0 on a kernel without it.
    Perhaps(&'static [&'static str]),
    /// Eight bytes at an offset of a member.
    Part(&'static str, u32),
    /// The address of a member.
    Address(&'static str),
    /// Of the registers that the thread entered the kernel with, `struct pt_regs`.
    Register(&'static str),
}

/// PID namespaces in each other that are looked into.
pub const LEVELS: usize = 4;
/// Words that a row begins with: how deep the task's PID namespace is, and of each up to [`LEVELS`] its number
/// there (`struct upid`: with the address of the namespace). Of those that are deeper they say nothing.
pub const WORDS_OF_PID: usize = 1 + 2 * LEVELS;

/// The program of a task; `None`: this kernel has not all of what is asked for.
///
/// Pointers are not loaded but copied by a helper: for each pointer that it learns of, the verifier looks its type
/// up by name several times, among all types of the kernel (`btf_nested_type_is_trusted`,
/// kernel/bpf/btf.c), 9 ms for a dozen of them.
pub fn assemble_task(btf: &Btf, fields: &[Field]) -> Option<Vec<u64>> {
    let task = btf.structure("task_struct")?;
    let registers = btf.structure("pt_regs")?;
    let words = WORDS_OF_PID + fields.len();
    if words > MAX_WORDS {
        return None;
    }
    let row = words as i16 * 8;
    // struct bpf_iter__task { struct bpf_iter_meta *meta; struct task_struct *task; }.
    let mut code = begin(TASK, 8)?;
    code.extend([
        instruction(MOVE_REGISTER, R1, TASK, 0, 0),
        instruction(CALL, 0, 0, 0, TASK_PT_REGS),
        instruction(MOVE_REGISTER, REGISTERS, R0, 0, 0),
    ]);
    code.extend(numbers(btf, task, -row)?);
    for (n, field) in (WORDS_OF_PID as i16..).zip(fields) {
        code.extend(word(btf, (task, registers), field, n * 8 - row)?);
    }
    code.extend(end(row));
    Some(code)
}

/// The program of a mapping, whose row is its first address, the one past its last, and its flags.
pub fn assemble_mapping(btf: &Btf) -> Option<Vec<u64>> {
    const MAPPING: u8 = TASK;
    let mapping = btf.structure("vm_area_struct")?;
    let row = OF_MAPPING.len() as i16 * 8;
    // struct bpf_iter__task_vma { struct bpf_iter_meta *meta; struct task_struct *task; struct vm_area_struct *vma; }.
    let mut code = begin(MAPPING, 16)?;
    for (n, name) in (0..).zip(OF_MAPPING) {
        let place = btf.member(mapping, name)?;
        code.push(load(btf.size(place.kind)?, R1, MAPPING, place.offset)?);
        code.push(instruction(STORE_DOUBLE, FRAME, R1, n * 8 - row, 0));
    }
    code.extend(end(row));
    Some(code)
}

/// Of `struct vm_area_struct`.
pub const OF_MAPPING: [&str; 3] = ["vm_start", "vm_end", "vm_flags"];

/// Takes what it is called for, at this place of its context; there is none at the end, which is the end of the
/// program too. The context begins with a struct bpf_iter_meta *, and that with a struct seq_file *
/// (include/linux/bpf.h).
fn begin(object: u8, place: u32) -> Option<Vec<u64>> {
    Some(vec![
        load(8, object, R1, place)?,
        load(8, SEQUENCE, R1, 0)?,
        instruction(JUMP_IF_NOT, object, 0, 2, 0),
        instruction(MOVE_IMMEDIATE, R0, 0, 0, 0),
        instruction(EXIT, 0, 0, 0, 0),
        load(8, SEQUENCE, SEQUENCE, 0)?,
    ])
}

/// Writes out the row, of so many bytes, and ends.
fn end(row: i16) -> [u64; 7] {
    [
        instruction(MOVE_REGISTER, R1, SEQUENCE, 0, 0),
        instruction(MOVE_REGISTER, R2, FRAME, 0, 0),
        instruction(ADD_IMMEDIATE, R2, 0, 0, -i32::from(row)),
        instruction(MOVE_IMMEDIATE, R3, 0, 0, row.into()),
        instruction(CALL, 0, 0, 0, SEQ_WRITE),
        instruction(MOVE_IMMEDIATE, R0, 0, 0, 0),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

/// Puts what a field is into its slot, at an offset from the frame's end.
fn word(btf: &Btf, (task, registers): (u32, u32), field: &Field, slot: i16) -> Option<Vec<u64>> {
    let mut code = Vec::new();
    match *field {
        Field::Task(path) => {
            let place = find(btf, task, path)?;
            if btf.pointed(place.kind).is_some() {
                return Some(copy(slot, 8, TASK, place.offset).to_vec());
            }
            code.push(load(btf.size(place.kind)?, R1, TASK, place.offset)?);
        }
        Field::Perhaps(path) => match find(btf, task, path) {
            Some(_) => return word(btf, (task, registers), &Field::Task(path), slot),
            None => code.push(instruction(MOVE_IMMEDIATE, R1, 0, 0, 0)),
        },
        Field::Part(name, part) => {
            let place = btf.member(task, name)?;
            btf.size(place.kind).filter(|&size| part + 8 <= size)?;
            return Some(copy(slot, 8, TASK, place.offset + part).to_vec());
        }
        Field::Address(name) => {
            code.push(instruction(MOVE_REGISTER, R1, TASK, 0, 0));
            code.push(instruction(
                ADD_IMMEDIATE,
                R1,
                0,
                0,
                i32::try_from(btf.member(task, name)?.offset).ok()?,
            ));
        }
        Field::Register(name) => {
            let place = btf.member(registers, name)?;
            code.push(load(btf.size(place.kind)?, R1, REGISTERS, place.offset)?);
        }
    }
    code.push(instruction(STORE_DOUBLE, FRAME, R1, slot, 0));
    Some(code)
}

/// Where a member of members is.
fn find(btf: &Btf, structure: u32, path: &[&str]) -> Option<Place> {
    let (name, rest) = path.split_last()?;
    let (mut structure, mut offset) = (structure, 0);
    for name in rest {
        let place = btf.member(structure, name)?;
        (structure, offset) = (place.kind, offset + place.offset);
    }
    let place = btf.member(structure, name)?;
    Some(Place { offset: offset + place.offset, ..place })
}

/// `task->thread_pid->level`, and the beginning of `numbers`, the first words of a row.
fn numbers(btf: &Btf, task: u32, slot: i16) -> Option<Vec<u64>> {
    let (pid, upid) = (btf.structure("pid")?, btf.structure("upid")?);
    let (level, numbers) = (btf.member(pid, "level")?, btf.member(pid, "numbers")?);
    let as_known = btf.size(level.kind) == Some(4) && btf.size(upid) == Some(16);
    if !as_known || btf.member(upid, "nr")?.offset != 0 {
        return None;
    }
    let mut code = copy(slot, 8, TASK, btf.member(task, "thread_pid")?.offset).to_vec();
    code.push(instruction(LOAD_DOUBLE, PID, FRAME, slot, 0));
    code.push(instruction(STORE_IMMEDIATE, FRAME, 0, slot, 0));
    code.extend(copy(slot, 4, PID, level.offset));
    code.extend(copy(slot + 8, 16 * LEVELS as i32, PID, numbers.offset));
    Some(code)
}

/// Copies so many bytes of what a register points to into a slot; zeros, if it cannot be read.
fn copy(slot: i16, bytes: i32, from: u8, offset: u32) -> [u64; 6] {
    [
        instruction(MOVE_REGISTER, R1, FRAME, 0, 0),
        instruction(ADD_IMMEDIATE, R1, 0, 0, slot.into()),
        instruction(MOVE_IMMEDIATE, R2, 0, 0, bytes),
        instruction(MOVE_REGISTER, R3, from, 0, 0),
        instruction(ADD_IMMEDIATE, R3, 0, 0, offset as i32),
        instruction(CALL, 0, 0, 0, PROBE_READ_KERNEL),
    ]
}

/// Loads a number of so many bytes; there is no instruction for others, or for what is too far away.
fn load(size: u32, to: u8, from: u8, offset: u32) -> Option<u64> {
    let code = match size {
        1 => LOAD | 0x10,
        2 => LOAD | 0x08,
        4 => LOAD,
        8 => LOAD | 0x18,
        _ => return None,
    };
    Some(instruction(code, to, from, i16::try_from(offset).ok()?, 0))
}

/// `struct bpf_insn`.
fn instruction(code: u8, to: u8, from: u8, offset: i16, value: i32) -> u64 {
    u64::from(code)
        | u64::from(to) << 8
        | u64::from(from) << 12
        | u64::from(offset as u16) << 16
        | u64::from(value as u32) << 32
}
