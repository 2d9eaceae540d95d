//! Real programs with the home file system as their root, compared with the same programs at home.

mod homefs_support;

use std::fs;
use std::path::Path;

use homefs_support::{Join, Mounted, mounted, native, text};

/// Runs `script` natively in one directory and through the mount in another; output and resulting
/// files must be the same.
#[track_caller]
fn same(m: &Mounted, base: &Path, name: &str, script: &str) {
    let (here, away) = (base.join(format!("{name}.native")), base.join(format!("{name}.away")));
    fs::create_dir_all(&here).expect("mkdir");
    fs::create_dir_all(&away).expect("mkdir");
    let expected = native(&here, script);
    let started = std::time::Instant::now();
    let got = m.chroot(&away, script);
    eprintln!("{name}: {:?}", started.elapsed());
    assert_eq!(
        String::from_utf8_lossy(&expected.stdout),
        String::from_utf8_lossy(&got.stdout),
        "{name}: output; stderr: {}",
        String::from_utf8_lossy(&got.stderr)
    );
    assert_eq!(expected.status, got.status, "{name}: {}", String::from_utf8_lossy(&got.stderr));
    let differences =
        native(base, &format!("diff -r --no-dereference {name}.native {name}.away && echo same"));
    assert_eq!(text(differences), "same\n", "{name}: files");
}

fn programs(join: Join) {
    mounted(join, move |m| {
        let dir = m.scratch.clone();
        let bind = nix::mount::MsFlags::MS_BIND | nix::mount::MsFlags::MS_REC;
        for name in ["proc", "dev"] {
            let from = Path::new("/").join(name);
            nix::mount::mount(Some(&from), &m.at.join(name), None::<&str>, bind, None::<&str>).expect("bind");
        }
        same(
            m,
            &dir,
            "shell",
            "for i in 1 2 3; do echo $i >> f; done; cat f; ln f g; ln -s g h; ls; stat -c '%a %h %s %F' *; mv g k; rm f; wc -l < k; umask 027; mkdir -p a/b/c; touch a/x; stat -c %a a a/x",
        );
        same(
            m,
            &dir,
            "tree",
            "tar cf - -C /usr/share/perl5 . 2>/dev/null | tar xf - ; find . | sort | head -5000 | md5sum; du -s --apparent-size . | cut -f1; cp -a . ../copy.$$ && diff -r . ../copy.$$ && rm -r ../copy.$$",
        );
        same(
            m,
            &dir,
            "big",
            "head -c 50000000 /dev/zero | openssl enc -aes-128-ctr -pass pass:x -nosalt 2>/dev/null > a; dd if=a of=b bs=123457 2>/dev/null; cmp a b && dd if=a of=c oflag=append conv=notrunc bs=1M count=3 2>/dev/null; dd if=a of=c oflag=append conv=notrunc bs=1M count=3 2>/dev/null; md5sum a b c",
        );
        same(
            m,
            &dir,
            "gcc",
            "printf '#include <stdio.h>\\nint main(){puts(\"hi\");return 3;}' > a.c && gcc -O2 -o a a.c && rm -f a.o && ./a; r=$?; rm a; echo $r",
        );
        same(
            m,
            &dir,
            "sqlite",
            "sqlite3 x.db 'create table t(a,b); insert into t values(1,2),(3,4); select sum(a*b) from t;' ; sqlite3 x.db 'pragma journal_mode=wal; insert into t values(5,6); select count(*) from t;'; sqlite3 x.db .dump; rm -f x.db*",
        );
        same(
            m,
            &dir,
            "perl",
            "perl -e 'use Data::Dumper; $Data::Dumper::Sortkeys=1; print Dumper({a=>1,b=>[1,2]})'; sort -S 1M -T . /usr/share/dict/words 2>/dev/null | md5sum; seq 1 300000 | sort -R --random-source=/bin/ls > r; sort -n -S 1M -T . r | md5sum",
        );
        same(
            m,
            &dir,
            "sparse",
            "truncate -s 10M s; printf x | dd of=s bs=1 seek=5000000 conv=notrunc 2>/dev/null; cp --sparse=always s t; cmp s t; du -k t | cut -f1; fallocate -l 1M u; stat -c %s u; fallocate -p -o 0 -l 4096 u; stat -c %W s | grep -c ^[1-9]; /usr/bin/python3 -c \"import os; os.setxattr('u','user.a',b'b'); print(os.listxattr('u'),os.getxattr('u','user.a')); os.removexattr('u','user.a'); print(os.listxattr('u'))\"",
        );
        same(
            m,
            &dir,
            "parallel",
            "mkdir src; cp -a /usr/share/perl5 src/; for n in 1 2 3 4 5 6; do (cp -a src c$n; find c$n -type f -name '*.pm' | xargs cat | md5sum > sum$n; rm -r c$n) & done; wait; cat sum?; rm -r src",
        );
        same(
            m,
            &dir,
            "git",
            "export HOME=$PWD GIT_AUTHOR_DATE='2020-01-01T00:00:00Z' GIT_COMMITTER_DATE='2020-01-01T00:00:00Z'; git init -q -b m r 2>&1; cd r; git config user.email a@b; git config user.name a; seq 1000 > f; git add f; git commit -qm x; git mv f g; git commit -qm y; git log --format=%H; git fsck 2>&1; cd ..; git clone -q r s 2>&1; cmp r/g s/g; rm -rf r s",
        );
        same(
            m,
            &dir,
            "temporary",
            "/usr/bin/python3 -c \"import tempfile,os,mmap; t=tempfile.TemporaryFile(dir='.'); t.write(b'x'*10000); t.flush(); v=mmap.mmap(t.fileno(),0); print(v[9999:]); fd=os.open('.',os.O_TMPFILE|os.O_RDWR,0o640); os.write(fd,b'abc'); import ctypes; print(ctypes.CDLL(None).linkat(-100,b'/proc/self/fd/%d'%fd,-100,b'linked',0x400)); print(os.stat('linked').st_size, oct(os.stat('linked').st_mode))\"; mv -n linked n; ln -s n l; rename_noreplace() { /usr/bin/python3 -c \"import ctypes,os; c=ctypes.CDLL(None,use_errno=True); print(c.renameat2(-100,b'n',-100,b'l',1), os.strerror(ctypes.get_errno())); print(c.renameat2(-100,b'n',-100,b'l',2))\"; }; rename_noreplace; ls -F; touch -d '2001-02-03 04:05:06.789' n; find . -newermt 2000-01-01 ! -newermt 2002-01-01; chmod 2755 .; stat -c %a .; mkfifo p; (echo through > p &) ; cat p; rm p",
        );
    });
}

#[test]
fn real_programs_joined_by_calls() {
    programs(Join::Memory);
}

#[test]
fn real_programs_over_tcp() {
    programs(Join::Tcp);
}
