//! The demo's eight jobs: real programs, in six command lines (one of them a pipeline of three).

use crate::moslab::login;
use anyhow::{Result, bail};
use std::path::Path;

/// One command line; `{run}` in it stands for what starts each of its jobs.
#[derive(Debug, Clone)]
pub struct Line {
    /// The jobs in it, in the order of the `{run}`s.
    pub jobs: Vec<&'static str>,
    /// For `sh -c`, in the folder of the inputs.
    pub command: String,
    /// Its output file.
    pub output: &'static str,
}

impl Line {
    /// The command as an unmigrated run types it: the programs themselves.
    pub fn plain(&self) -> String {
        self.with_output("plain", &self.command.replace("{run} ", ""))
    }

    /// The command as the demo types it, every program started by `mosrun`.
    pub fn moved(&self) -> String {
        let mut command = self.command.clone();
        for job in &self.jobs {
            command = command.replacen("{run}", &format!("mosrun -J {job}"), 1);
        }
        self.with_output("moved", &command)
    }

    fn with_output(&self, folder: &str, command: &str) -> String {
        format!("{command} > {folder}/{}", self.output)
    }
}

/// The job that is moved by hand.
pub const BY_HAND: &str = "compress";
/// The job that is pinned.
pub const PINNED: &str = "scan";
/// The job that visits every node.
pub const TRAVELLER: &str = "data";

/// The command lines, with what this machine has.
pub fn lines() -> Result<Vec<Line>> {
    let mut missing = Vec::new();
    let mut first_of = |choices: &[(&'static str, &'static str, &'static str)]| {
        let found = choices.iter().find(|(program, _, _)| has(program));
        if found.is_none() {
            missing.push(choices[0].1);
        }
        found.map_or("", |(_, _, command)| *command).to_string()
    };
    let compress = first_of(&[
        ("xz", "xz-utils", "{run} xz -9 -c log.txt"),
        ("gzip", "gzip", "{run} gzip -9 -c log.txt"),
    ]);
    let data = first_of(&[("python3", "python3", "{run} python3 data.py")]);
    let scan = first_of(&[
        ("perl", "perl", "{run} perl scan.pl log.txt"),
        ("awk", "mawk", "{run} awk -f scan.awk log.txt"),
    ]);
    let sort = first_of(&[("sort", "coreutils", "{run} sort -S 4M -T /tmp -k3,3n -k2,2nr -k4 records.txt")]);
    let threads = first_of(&[
        ("xz", "xz-utils", "{run} xz -7 -T2 --block-size=1MiB -c log.txt"),
        ("sort", "coreutils", "{run} sort --parallel=2 -S 300M -k2,2n -k4 records.txt"),
    ]);
    let pipeline = first_of(&[("gzip", "gzip", "{run} gzip -dc words.gz | {run} sort | {run} uniq -c")]);
    if !missing.is_empty() {
        missing.sort();
        missing.dedup();
        bail!("programs of the demo are missing; `apt-get install {}`", missing.join(" "));
    }
    let line = |jobs: &[&'static str], command, output| Line { jobs: jobs.to_vec(), command, output };
    Ok(vec![
        line(&["compress"], compress, "compress.out"),
        line(&["data"], data, "data.out"),
        line(&["scan"], scan, "scan.out"),
        line(&["sort"], sort, "sort.out"),
        line(&["threads"], threads, "threads.out"),
        line(&["unpack", "order", "count"], pipeline, "count.out"),
    ])
}

/// What has to be done once before the jobs can run, for `sh -c`.
pub const PREPARE: &str = "gzip -6 -c words.txt > words.gz";

/// Whether a login would find this program.
fn has(program: &str) -> bool {
    login::PATH.split(':').any(|folder| Path::new(folder).join(program).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipeline_becomes_three_jobs() {
        let line =
            Line { jobs: vec!["a", "b"], command: "{run} gzip -dc f | {run} sort".into(), output: "x.out" };
        assert_eq!(line.plain(), "gzip -dc f | sort > plain/x.out");
        assert_eq!(line.moved(), "mosrun -J a gzip -dc f | mosrun -J b sort > moved/x.out");
    }
}
