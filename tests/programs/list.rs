//! The programs.

use super::run::Program;

/// A test of each.
macro_rules! programs {
    ($($(#[$about:meta])* fn $name:ident() = { $($field:ident: $value:expr,)* })*) => { $(
        $(#[$about])*
        #[test]
        fn $name() {
            let mut program = Program::new(stringify!($name));
            $(program.$field = $value;)*
            super::super::moved(&program);
        }
    )* };
}

programs! {
    fn python_threads() = {
        needs: &["python3"],
        command: "exec /usr/bin/python3 ../threads.py",
    }

    /// multiprocessing: a pool, a queue, a shared value, shared memory.
    fn python_processes() = {
        needs: &["python3"],
        command: "exec /usr/bin/python3 ../processes.py",
        tree: true,
        refused: WAITING,
    }

    /// Children that come and go, with memory shared with them.
    fn python_counter() = {
        needs: &["python3"],
        command: "exec /usr/bin/python3 ../counter.py",
        tree: true,
        refused: WAITING,
    }

    fn python_numpy() = {
        needs: &["python3", "numpy"],
        command: "exec /usr/bin/python3 ../matrix.py",
    }

    fn perl() = {
        needs: &["perl"],
        prepare: "head -n 60000 text > half",
        command: "exec perl ../work.pl ../half",
        result: "cksum out",
    }

    fn perl_forks() = {
        needs: &["perl"],
        command: "exec perl ../forks.pl",
        tree: true,
        refused: WAITING,
    }

    fn awk() = {
        needs: &["awk"],
        command: "exec awk '{ for (i = 0; i < 25; i++) n[$NF] += length($0) % (i + 2) } \
                  END { for (k in n) s += n[k] * length(k); print s, NR }' ../text",
    }

    fn sort() = {
        needs: &["sort"],
        prepare: "for n in $(seq 16); do cat text; done > long",
        command: "exec sort -S 1M -T . --parallel=1 -k3 ../long",
        result: "cksum out",
    }

    fn tcl() = {
        needs: &["tclsh"],
        command: "exec tclsh ../work.tcl",
        result: "cksum out",
    }

    fn bc() = {
        needs: &["bc"],
        prepare: "echo 'scale=1400; 4*a(1); e(1); sqrt(2)' > pi.bc; echo quit >> pi.bc",
        command: "exec bc -lq ../pi.bc",
    }

    fn node() = {
        needs: &["node"],
        command: "exec node ../workers.js",
    }

    /// Compiles it first. Its counters are a file in /tmp, mapped shared and writable.
    fn java() = {
        needs: &["/usr/lib/jvm/*/bin/java"],
        command: "exec $(ls -d /usr/lib/jvm/*/bin/java | sort -V | tail -n 1) -Xmx256m ../Work.java",
    }

    /// Two processes that write the same file through memory, and by its descriptor.
    fn python_mapped() = {
        needs: &["python3"],
        command: "exec /usr/bin/python3 ../mapped.py 400",
        result: "cat out; cksum mapped",
        tree: true,
    }

    fn go() = {
        needs: &["go"],
        prepare: "go build -o goroutines goroutines.go",
        command: "exec ../goroutines",
    }

    fn rust() = {
        needs: &["rustc"],
        prepare: "rustc -O -o threads threads.rs",
        command: "exec ../threads",
    }

    /// The compiler itself, without its driver.
    fn cc1() = {
        needs: &["gcc"],
        prepare: "i=0; (echo 'typedef unsigned long u;'; while [ $i -lt 400 ]; do i=$((i + 1)); \
            echo \"u f$i(u *a, int n) { u s = $i; for (int i = 0; i < n; i++) { if (a[i] % $i) s += a[i] * $i; else s ^= a[i] << (s & 7); } return s; }\"; \
            done) > big.c",
        command: "exec $(gcc -print-prog-name=cc1) -quiet -O2 ../big.c -o -",
        result: "cksum out",
    }

    /// Lua's sources as one file.
    fn gcc() = {
        needs: &["gcc", "lua"],
        prepare: "(echo '#define LUA_USE_LINUX'; for f in lzio lctype lopcodes lmem lundump ldump lstate lgc llex lcode lparser ldebug \
            lfunc lobject ltm lstring ltable ldo lvm lapi lauxlib lbaselib lcorolib ldblib liolib lmathlib loadlib loslib lstrlib \
            ltablib lutf8lib linit lua; do echo \"#include \\\"$f.c\\\"\"; done) > one.c",
        command: "exec gcc -w -O2 -I../lua/src -o lua ../one.c -lm -ldl",
        result: "cat out errors && cksum lua && ./lua -e 'print(_VERSION, 2^53)'",
        tree: true,
        refused: WAITING,
    }

    fn make() = {
        needs: &["gcc", "make", "lua"],
        command: "cp -r ../lua . && exec make -C lua/src -j4 linux MYCFLAGS=-O1",
        result: "cat lua/src/*.o lua/src/lua lua/src/luac | cksum && ./lua/src/lua -e 'print(_VERSION, 2^53)'",
        tree: true,
        refused: WAITING,
    }

    /// Lua, built with an address sanitizer: terabytes of shadow memory that are only reserved. Without its look for
    /// leaks at the end, which is no matter of the address space.
    fn lua_sanitized() = {
        needs: &["gcc", "lua"],
        prepare: "gcc -w -O1 -fsanitize=address -DLUA_USE_POSIX -o sanitized $(ls lua/src/*.c | grep -v luac) -lm",
        command: "ASAN_OPTIONS=detect_leaks=0 exec ../sanitized ../work.lua ../text",
    }

    fn rustc() = {
        needs: &["rustc"],
        prepare: "(echo '#![crate_type = \"lib\"]'; i=0; while [ $i -lt 50 ]; do i=$((i + 1)); \
            echo \"pub fn f$i(v: &[u64]) -> Vec<String> { let mut m = std::collections::BTreeMap::new(); for x in v { *m.entry(x % $i).or_insert(0u64) += x; } m.iter().map(|(k, v)| format!(\\\"{k} {v}\\\")).collect() }\"; \
            done) > big.rs",
        command: "exec $(rustc --print sysroot)/bin/rustc -O --emit=llvm-ir -C codegen-units=1 ../big.rs -o -",
        result: "cksum out",
    }

    /// A database in a file, with a write-ahead log.
    fn sqlite() = {
        needs: &["sqlite3"],
        command: "exec sqlite3 -init ../work.sql -batch work.db .quit",
        result: "cat out; sqlite3 work.db 'PRAGMA integrity_check; SELECT sum(b) FROM t'; cksum work.db",
        refused: WAITING,
    }

    /// Without files.
    fn sqlite_memory() = {
        needs: &["sqlite3"],
        command: "exec sqlite3 -init ../work.sql -batch :memory: .quit",
        refused: WAITING,
    }

    fn redis() = {
        needs: &["redis-server", "redis-cli"],
        command: "exec sh ../redis.sh",
        tree: true,
        refused: WAITING,
    }

    fn redis_tcp() = {
        needs: &["redis-server", "redis-cli"],
        command: "exec sh ../redis.sh tcp",
        tree: true,
        refused: WAITING,
    }

    /// http.server and clients of it, over TCP.
    fn python_http() = {
        needs: &["python3"],
        command: "exec /usr/bin/python3 ../web.py",
        tree: true,
        refused: WAITING,
    }

    /// As nobody: its server does not run as root.
    fn postgresql() = {
        needs: &["/usr/lib/postgresql/*/bin/initdb", "python3"],
        prepare: "install -d -o nobody pristine && setpriv --reuid=nobody --regid=nogroup --clear-groups \
            $(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -n 1)/initdb -D \"$PWD/pristine\" -U postgres -A trust -N -E UTF8 --locale=C",
        command: "exec setpriv --reuid=nobody --regid=nogroup --clear-groups sh ../postgres.sh",
        tree: true,
        refused: WAITING,
    }

    fn xz() = {
        needs: &["xz"],
        prepare: "head -c 2200000 text > short",
        command: "exec xz -9 -T1 -c ../short",
        result: "cksum out",
    }

    fn xz_threads() = {
        needs: &["xz"],
        command: "exec xz -6 -T4 --block-size=512KiB -c ../text",
        result: "cksum out",
    }

    fn zstd_threads() = {
        needs: &["zstd"],
        prepare: "cat text text > long",
        command: "exec zstd -q -17 -T2 -c ../long",
        result: "cksum out",
    }

    fn bzip2() = {
        needs: &["bzip2"],
        prepare: "cat text text text text > long",
        command: "exec bzip2 -9 -c ../long",
        result: "cksum out",
    }

    fn git() = {
        needs: &["git"],
        prepare: "git init -q g && cd g && git config user.email a@example.org && git config user.name a && \
            split -n 60 ../text t && git add . && git commit -qm one && for f in t*; do head -c 20000 $f >> taa; done && git commit -qam two",
        command: "exec git -C ../g -c pack.threads=2 pack-objects -q --all --no-reuse-delta --window=100 --depth=50 --stdout",
        // Which thread finds which delta is a matter of time.
        result: "git init -q check && cd check && git unpack-objects -q < ../out && git count-objects && git fsck --full",
    }

    /// A video that it makes up itself, with the encoder's threads. Without looking ahead in a thread of its own,
    /// whose timing makes other bytes.
    fn ffmpeg() = {
        needs: &["ffmpeg"],
        command: "exec ffmpeg -nostdin -v error -f lavfi -i testsrc2=size=480x270:rate=25:duration=14 \
                  -c:v libx264 -threads 4 -x264-params sync-lookahead=0 -flags +bitexact -fflags +bitexact -y video.mkv",
        result: "cat out; cksum video.mkv",
    }

    fn stress_cpu() = {
        needs: &["stress-ng"],
        command: "exec stress-ng --verify --cpu 2 --cpu-ops 1600",
        result: STRESSED,
        tree: true,
        refused: WAITING,
    }

    fn stress_vm() = {
        needs: &["stress-ng"],
        command: "exec stress-ng --verify --vm 2 --vm-bytes 48M --vm-ops 40000",
        result: STRESSED,
        tree: true,
        refused: WAITING,
    }

    fn stress_fork() = {
        needs: &["stress-ng"],
        command: "exec stress-ng --verify --fork 2 --fork-ops 4000",
        result: STRESSED,
        tree: true,
        refused: WAITING,
    }

    fn stress_pipe() = {
        needs: &["stress-ng"],
        command: "exec stress-ng --verify --pipe 2 --pipe-ops 1000000",
        result: STRESSED,
        tree: true,
        refused: WAITING,
    }

    fn stress_futex() = {
        needs: &["stress-ng"],
        command: "exec stress-ng --verify --futex 2 --futex-ops 100000",
        result: STRESSED,
        tree: true,
        refused: WAITING,
    }

    fn stress_signals() = {
        needs: &["stress-ng"],
        command: "exec stress-ng --verify --sigq 2 --sigq-ops 200000 --sigrt 1 --sigrt-ops 100000",
        result: STRESSED,
        tree: true,
        refused: WAITING,
    }

    fn stress_timers() = {
        needs: &["stress-ng"],
        command: "exec stress-ng --verify --timer 2 --timer-ops 30000 --timerfd 1 --timerfd-ops 10000",
        result: STRESSED,
        tree: true,
        refused: WAITING,
    }

    /// A pipeline of a shell.
    fn pipeline() = {
        needs: &["xz"],
        prepare: "cat text text > long",
        command: "cat ../long | tr a-z b-za | sort -k3 | xz -3 -T1 -c",
        result: "cksum out",
        tree: true,
        refused: WAITING,
    }

    /// An interactive bash with jobs, inside script(1).
    fn script_jobs() = {
        needs: &["script", "bash", "python3"],
        command: "exec /usr/bin/python3 ../jobs.py",
        tree: true,
        refused: WAITING,
    }

    fn tmux() = {
        needs: &["tmux", "script"],
        command: "exec sh ../tmux.sh",
        tree: true,
        refused: WAITING,
    }
}

/// What stress-ng says, without PIDs and times.
const STRESSED: &str = "cat out errors | sed -e 's/\\[[0-9]*\\]//' -e 's/completed in .*//'";

/// What stands in the way of some of them for now.
const WAITING: &[(&str, &str)] = &[
    // PostgreSQL's interlock.
    ("migrate", "System V shared memory"),
    ("migckpt", "pseudo-terminal"),
    ("migckpt", "is not accepted yet"),
    // TCP, in the middle of making or ending a connection.
    ("migckpt", "which is being connected"),
    ("migckpt", "waits to be accepted"),
    ("migckpt", "whose other end"),
    // Of a socket that was closed between two looks.
    ("migckpt", "belongs to another network namespace"),
    ("migckpt", "a pipe to another process"),
    // A child that was born since the family was looked at.
    ("migrate", "only a process without children moves"),
    ("migrate", "lock"),
    ("migrate", "pseudo-terminal"),
    ("migrate", "socket"),
    ("migrate", "TCP"),
];
