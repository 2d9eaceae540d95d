//! Texts of `/proc`.

use crate::mutate::{break_bytes, fuzz};
use checkpoint::proc::elf::functions;
use checkpoint::proc::fdinfo::FdInfo;
use checkpoint::proc::maps;
use checkpoint::proc::status::{Stat, Status};

#[test]
fn texts_of_proc() {
    let mut corpus = Vec::new();
    for name in ["smaps", "maps", "status", "stat", "fdinfo/0", "fdinfo/1", "fdinfo/2"] {
        for pid in ["self", "1"] {
            corpus.extend(std::fs::read(format!("/proc/{pid}/{name}")));
        }
    }
    corpus.push(
        b"pos:\t0\nflags:\t02\nmnt_id:\t15\ntfd:        5 events:       19 data: 7ffc  pos:0 ino:0 sdev:0\n"
            .to_vec(),
    );
    corpus
        .push(b"pos:\t0\nflags:\t02\nclockid: 1\nticks: 0\nit_value: (3, 7)\nit_interval: (0, 0)\n".to_vec());
    for text in &mut corpus {
        text.truncate(6000);
    }
    fuzz("texts of /proc", &corpus, break_bytes, |input| {
        for vma in maps::parse(input) {
            assert!(vma.start < vma.end, "{vma:?}");
        }
        let status = Status::parse(input);
        status.state();
        status.inner_id();
        status.numbers("Groups");
        status.mask("CapEff");
        let stat = Stat::parse(&String::from_utf8_lossy(input));
        for field in 0..60 {
            stat.number(field);
        }
        if let Some(info) = FdInfo::parse(input) {
            info.epoll_targets();
            info.watches();
            info.pid();
            info.timer("it_value");
            info.number("ticks", 10);
            checkpoint::inventory::locks::parse_all(info.locks());
        }
    });
}

/// The vDSO that an image brings.
#[test]
fn vdsos() {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let line = maps.lines().find(|line| line.ends_with("[vdso]")).expect("a vDSO");
    let number = |text: &str| u64::from_str_radix(text, 16).expect("a number");
    let (start, end) = line.split_once(' ').and_then(|(range, _)| range.split_once('-')).expect("a range");
    let mut own = vec![0; (number(end) - number(start)) as usize];
    let pid = std::process::id() as i32;
    checkpoint::sys::process_vm::read(pid, number(start), &mut own).expect("reads");
    // The headers and tables are where it can be led astray.
    own.truncate(2048);
    fuzz("vDSOs", &[own], break_bytes, |input| {
        assert!(functions(input).values().all(|&at| at < input.len() as u64));
    });
}
