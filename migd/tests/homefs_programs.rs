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
    let base = tempfile::tempdir_in("/tmp").expect("temporary directory");
    let dir = base.path().to_path_buf();
    mounted(Path::new("/"), join, move |m| {
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
            "truncate -s 10M s; printf x | dd of=s bs=1 seek=5000000 conv=notrunc 2>/dev/null; cp --sparse=always s t; cmp s t; du -k t | cut -f1; fallocate -l 1M u; stat -c %s u; fallocate -p -o 0 -l 4096 u; setfattr -n user.a -v b u; getfattr -d u",
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
