use super::*;
use crate::image::reports::ReportImage;
use crate::image::shares::SharesImage;
use crate::image::*;
use proptest::prelude::*;

fn image() -> ProcessImage {
    ProcessImage {
        pid: 7,
        ppid: 0,
        zombies: Vec::new(),
        pgid: 7,
        sid: 1,
        exit_signal: 17,
        parent_tid: 0,
        mm: MmImage {
            guards: vec![(0x4000, 0x5000)],
            vmas: vec![Vma {
                start: 0x1000,
                end: 0x9000,
                prot: 3,
                backing: Backing::Anon,
                shared: false,
                flags: VmaFlags::GROWSDOWN,
                name: None,
                pkey: 0,
                page_shift: PAGE_SHIFT,
            }],
            contexts: vec![ContextImage { start: 0x1000, head: 3, events: vec![7; 64], in_flight: 0 }],
            layout: [1; 11],
            auxv: vec![1, 2],
            exe: b"/bin/true".to_vec(),
            coredump_filter: 0x33,
            thp_disable: false,
            vdso: Vec::new(),
            pkeys: 1,
        },
        threads: Vec::new(),
        signals: SignalsImage { actions: vec![[0; 4]; 64], pending: Vec::new(), stopped_by: None },
        timers: TimersImage::default(),
        creds: CredsImage {
            uids: [1; 4],
            gids: [2; 4],
            groups: vec![3],
            caps: [0; 5],
            securebits: 0,
            no_new_privs: true,
        },
        seccomp: SeccompImage::default(),
        limits: vec![(1, 2, 3)],
        fs: FsImage { cwd: b"/".to_vec(), cwd_deleted: false, root: b"/".to_vec(), umask: 0o22 },
        files: FilesImage::default(),
        shares: SharesImage::default(),
        traits: Default::default(),
        report: ReportImage::default(),
        misc: MiscImage {
            cpu: cpu::CpuImage::here().clone(),
            membarrier: 0,
            personality: 0,
            dumpable: 1,
            child_subreaper: false,
            oom_score_adj: 0,
            utsname: (Vec::new(), Vec::new()),
            clocks_ns: (1, 2),
            kernel: "6".into(),
        },
    }
}

fn written(pages: &[u8], options: Options) -> (Vec<u8>, StreamStats) {
    let mut writer = StreamWriter::new(Vec::new(), options).expect("starts");
    writer.state(&image()).expect("state");
    writer.data(0x10_0000, pages).expect("data");
    writer.finish().expect("ends")
}

/// All memory that a stream holds, laid out from 0x10_0000.
fn read(bytes: &[u8], length: usize) -> Result<Vec<u8>, StreamError> {
    let mut memory = vec![0xaa; length];
    let mut reader = StreamReader::new(bytes)?;
    loop {
        match reader.next()? {
            Item::State(found) => assert_eq!(*found, image()),
            Item::Process(who) => assert_eq!(who, 0),
            Item::Object(found) => panic!("{found:?}"),
            Item::Data { addr, bytes } => {
                let at = addr as usize - 0x10_0000;
                memory[at..at + bytes.len()].copy_from_slice(bytes);
            }
            Item::Zero { addr, len } => {
                let at = addr as usize - 0x10_0000;
                memory[at..at + len as usize].fill(0);
            }
            Item::Same { addr, .. } => panic!("{addr:#x} was not written so"),
            Item::End => return Ok(memory),
        }
    }
}

fn pages(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed | 1;
    (0..count)
        .flat_map(|page| {
            let mut out = vec![0u8; PAGE];
            if page % 3 != 0 {
                for byte in &mut out {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    *byte = if page % 3 == 1 { state as u8 } else { (state % 3) as u8 };
                }
            }
            out
        })
        .collect()
}

#[test]
fn round_trip_compressed_and_not() {
    let memory = pages(1, 700);
    for compress in [Compress::Auto, Compress::Off, Compress::Level(3)] {
        let (bytes, stats) = written(&memory, Options { compress });
        assert_eq!(read(&bytes, memory.len()).expect("reads"), memory);
        assert_eq!((stats.pages, stats.raw_bytes), (700, memory.len() as u64));
        assert!(stats.zero_pages >= 234);
        assert_eq!(stats.wire_bytes, bytes.len() as u64);
    }
}

#[test]
fn every_truncation_is_an_error() {
    let (bytes, _) = written(&pages(2, 4), Options::default());
    for end in (0..bytes.len()).step_by(7) {
        assert!(read(&bytes[..end], 4 * PAGE).is_err(), "cut at {end}");
    }
}

proptest! {
    #[test]
    fn a_flipped_bit_is_an_error(at in 0usize..4000, bit in 0u8..8) {
        let (mut bytes, _) = written(&pages(3, 3), Options::default());
        let at = at % bytes.len();
        bytes[at] ^= 1 << bit;
        prop_assert!(read(&bytes, 3 * PAGE).is_err());
    }

    #[test]
    fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut with_magic = MAGIC.to_vec();
        with_magic.extend_from_slice(&[VERSION, 0, 0, 0]);
        with_magic.extend_from_slice(&bytes);
        let _ = read(&with_magic, 0);
        let _ = read(&bytes, 0);
    }
}

#[test]
fn several_processes() {
    let child = ProcessImage { pid: 8, ppid: 7, ..image() };
    let mut writer = StreamWriter::new(Vec::new(), Options::default()).expect("starts");
    writer.state(&image()).expect("state");
    writer.state(&child).expect("state");
    writer.data(0x10_0000, &[1; 4096]).expect("data");
    writer.process(1).expect("process");
    writer.data(0x10_0000, &[2; 4096]).expect("data");
    let (bytes, _) = writer.finish().expect("ends");
    let mut reader = StreamReader::new(&bytes[..]).expect("starts");
    assert_eq!(reader.states().expect("states"), [image(), child]);
    let mut found = Vec::new();
    loop {
        match reader.next().expect("an item") {
            Item::Process(who) => found.push((who, 0)),
            Item::Data { bytes, .. } => found.push((9, bytes[0])),
            Item::End => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(found, [(9, 1), (1, 0), (9, 2)]);
}

#[test]
fn processes_in_disorder() {
    let refused = |write: &dyn Fn(&mut StreamWriter<Vec<u8>>)| {
        let mut writer = StreamWriter::new(Vec::new(), Options::default()).expect("starts");
        write(&mut writer);
        let (bytes, _) = writer.finish().expect("ends");
        let mut reader = StreamReader::new(&bytes[..]).expect("starts");
        let result = reader.states().and_then(|_| {
            while !matches!(reader.next()?, Item::End) {}
            Ok(())
        });
        matches!(result, Err(StreamError::Damaged { .. }))
    };
    assert!(refused(&|writer| writer.process(0).expect("written")), "memory before a state");
    assert!(refused(&|writer| {
        writer.state(&image()).expect("written");
        writer.process(1).expect("written");
    }));
    assert!(refused(&|writer| {
        writer.state(&image()).expect("written");
        writer.zero(0x1000, 4096).expect("written");
        writer.state(&image()).expect("written");
    }));
}
