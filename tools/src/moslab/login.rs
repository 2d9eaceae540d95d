//! A login on a node: who may log in there, and becoming that user.
//!
//! The ordinary user is one that the machine has. On a machine with none, the lab's nodes get one of
//! their own by a private `/etc/passwd` and `/etc/group`; the machine's are not touched.

use super::cgroup;
use super::place::INSIDE;
use anyhow::{Context, Result, bail};
use nix::sys::signal::SigSet;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, chown, initgroups, setgid, setuid};
use std::ffi::{CString, OsString};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A node's commands, then the machine's.
pub const PATH: &str = "/run/mos/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The user made for machines without an ordinary one.
const MADE_USER: &str = "mosuser";
const MADE_ID: u32 = 20_001;
/// Numbers of ordinary users (login.defs(5), UID_MIN and UID_MAX).
const ORDINARY: std::ops::Range<u32> = 1000..60_000;
/// What a login keeps of the caller's environment: what describes the terminal and the language.
const KEPT: [&str; 6] = ["TERM", "COLORTERM", "NO_COLOR", "LANG", "LANGUAGE", "TZ"];

/// One line of `/etc/passwd`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Account {
    name: String,
    uid: u32,
    gid: u32,
    home: PathBuf,
    shell: PathBuf,
}

/// Reads accounts; lines that are none are passed over.
fn accounts(passwd: &str) -> impl Iterator<Item = Account> {
    passwd.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, _, home, shell] = fields[..] else { return None };
        Some(Account {
            name: name.to_string(),
            uid: uid.parse().ok()?,
            gid: gid.parse().ok()?,
            home: home.into(),
            shell: if shell.is_empty() { "/bin/sh".into() } else { shell.into() },
        })
    })
}

/// The name of the ordinary user of a lab's nodes.
pub fn ordinary_user() -> Result<String> {
    let passwd = fs::read_to_string("/etc/passwd").context("/etc/passwd cannot be read")?;
    let logs_in = |shell: &Path| !shell.ends_with("nologin") && !shell.ends_with("false") && shell.exists();
    let found = accounts(&passwd).find(|account| ORDINARY.contains(&account.uid) && logs_in(&account.shell));
    Ok(found.map_or_else(|| MADE_USER.to_string(), |account| account.name))
}

/// Gives a node the ordinary user's home, and the user if the machine has none.
pub fn prepare_user(node_dir: &Path, user: &str) -> Result<()> {
    let mut passwd = fs::read_to_string("/etc/passwd").context("/etc/passwd cannot be read")?;
    if !accounts(&passwd).any(|account| account.name == user) {
        passwd.push_str(&format!("{MADE_USER}:x:{MADE_ID}:{MADE_ID}::/home/{MADE_USER}:/bin/sh\n"));
        let group = fs::read_to_string("/etc/group").unwrap_or_default();
        fs::write(node_dir.join("names/passwd"), &passwd)?;
        fs::write(node_dir.join("names/group"), format!("{group}{MADE_USER}:x:{MADE_ID}:\n"))?;
    }
    let account = accounts(&passwd).find(|account| account.name == user).context("no such user")?;
    if let Ok(inside) = account.home.strip_prefix("/home") {
        let home = node_dir.join("home").join(inside);
        fs::create_dir_all(&home)?;
        chown(&home, Some(Uid::from_raw(account.uid)), Some(Gid::from_raw(account.gid)))?;
    }
    Ok(())
}

/// The user and group numbers of a node's user.
pub fn ids(node_dir: &Path, user: &str) -> Result<(u32, u32)> {
    let own = fs::read_to_string(node_dir.join("names/passwd"));
    let passwd = own.or_else(|_| fs::read_to_string("/etc/passwd")).context("/etc/passwd cannot be read")?;
    let account = accounts(&passwd).find(|account| account.name == user);
    account.map(|account| (account.uid, account.gid)).with_context(|| format!("there is no user {user:?}"))
}

/// `moslab __login [--group DIR] USER -- COMMAND…`: becomes that user, and the command. Runs inside the
/// node; `group` is the node's control group. Does not return if it succeeds.
pub fn login(user: &str, group: Option<&Path>, command: &[OsString]) -> Result<u8> {
    // The caller of `moslab exec` blocks the signals it passes on.
    SigSet::all().thread_unblock()?;
    let account = find(user)?;
    if let Some(group) = group {
        cgroup::enter(group)?;
    }
    let (uid, gid) = (Uid::from_raw(account.uid), Gid::from_raw(account.gid));
    initgroups(&CString::new(account.name.as_str())?, gid).context("the user's groups cannot be set")?;
    setgid(gid).context("the user's group cannot be set")?;
    setuid(uid).context("the user cannot be set")?;
    umask(Mode::from_bits_truncate(0o022));
    let error = prepare(&account, command).exec();
    let what = command.first().map_or_else(|| account.shell.clone().into_os_string(), Clone::clone);
    eprintln!("moslab: {}: {error}", what.display());
    Ok(if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 })
}

fn find(user: &str) -> Result<Account> {
    let passwd = fs::read_to_string("/etc/passwd").context("/etc/passwd cannot be read")?;
    match accounts(&passwd).find(|a| a.name == user || a.uid.to_string() == user) {
        Some(account) => Ok(account),
        None => bail!("this node has no user {user:?}; see /etc/passwd"),
    }
}

fn prepare(account: &Account, words: &[OsString]) -> Command {
    let mut command = match words.split_first() {
        Some((program, arguments)) => {
            let mut command = Command::new(program);
            command.args(arguments);
            command
        }
        None => {
            let mut command = Command::new(&account.shell);
            command.arg("-l");
            command
        }
    };
    let kept = std::env::vars_os().filter(|(name, _)| {
        name.to_str().is_some_and(|name| KEPT.contains(&name) || name.starts_with("LC_"))
    });
    let kept: Vec<_> = kept.collect();
    let home = if account.home.is_dir() { account.home.as_path() } else { Path::new("/") };
    command
        .env_clear()
        .envs(kept)
        .env("HOME", home)
        .env("USER", &account.name)
        .env("LOGNAME", &account.name)
        .env("SHELL", &account.shell)
        .env("PATH", PATH)
        .current_dir(home);
    command
}

// The commands' folder is part of PATH; a constant cannot be built from a constant without a macro.
const _: () = {
    let (path, inside) = (PATH.as_bytes(), INSIDE.as_bytes());
    let mut at = 0;
    while at < inside.len() {
        assert!(path[at] == inside[at], "PATH starts with the folder of the node's commands");
        at += 1;
    }
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_read_and_junk_is_passed_over() {
        let text = "root:x:0:0:root:/root:/bin/bash\njunk\na:x:1000:100:A,,:/home/a:\nb:x:x:1::/:/\n";
        let found: Vec<Account> = accounts(text).collect();
        assert_eq!(found.len(), 2);
        assert_eq!((found[1].uid, found[1].gid, found[1].shell.as_path()), (1000, 100, Path::new("/bin/sh")));
    }
}
