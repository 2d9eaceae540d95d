//! One program, run unmoved, then moved at random moments; the results must be the same bytes.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// A piece of work.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// Its name, and that of its test.
    pub name: &'static str,
    /// Programs and files that must be there. `numpy` and `lua` are folders that `tests/setup` makes; they are copied
    /// into the work's folder.
    pub needs: &'static [&'static str],
    /// Run once before, in the work's folder, which holds `text` and the files beside this one.
    pub prepare: &'static str,
    /// The work, run in `run`, an empty folder in the work's folder.
    pub command: &'static str,
    /// What it has done: run in the same folder, standard output of the work in `out`.
    pub result: &'static str,
    /// Whether it has children: `migckpt` is told.
    #[allow(dead_code, reason = "migrate sees for itself")]
    pub tree: bool,
    /// Which command may refuse it, and with which words.
    pub refused: &'static [(&'static str, &'static str)],
}

impl Program {
    /// One that needs nothing, makes nothing but its output, and is never refused.
    pub const fn new(name: &'static str) -> Program {
        Program { name, needs: &[], prepare: ":", command: "", result: "cat out", tree: false, refused: &[] }
    }
}

/// The files of the works.
const SOURCES: &[(&str, &str)] = &[
    ("Work.java", include_str!("Work.java")),
    ("counter.py", include_str!("counter.py")),
    ("mapped.py", include_str!("mapped.py")),
    ("forks.pl", include_str!("forks.pl")),
    ("goroutines.go", include_str!("goroutines.go")),
    ("jobs.py", include_str!("jobs.py")),
    ("matrix.py", include_str!("matrix.py")),
    ("postgres.sh", include_str!("postgres.sh")),
    ("processes.py", include_str!("processes.py")),
    ("redis.sh", include_str!("redis.sh")),
    ("threads.py", include_str!("threads.py")),
    ("threads.rs", include_str!("threads.rs")),
    ("tmux.sh", include_str!("tmux.sh")),
    ("web.py", include_str!("web.py")),
    ("work.lua", include_str!("work.lua")),
    ("work.pl", include_str!("work.pl")),
    ("work.sql", include_str!("work.sql")),
    ("work.tcl", include_str!("work.tcl")),
    ("workers.js", include_str!("workers.js")),
];

/// Some mebibytes of lines that are the same every time, and neither random nor constant.
fn text(lines: u32) -> String {
    let mut text = String::with_capacity(lines as usize * 40);
    let mut state = 12345u64;
    for n in 0..lines {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        text.push_str(&format!("{:08x} line {n} {} word{}\n", state >> 32, state % 97, (state >> 40) % 1000));
    }
    text
}

/// A number from the environment.
fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Random moments, the same for the same seed.
pub struct Moments(u64);

impl Moments {
    /// The sequence of a seed and a name.
    pub fn new(seed: u64, name: &str) -> Moments {
        Moments(name.bytes().fold(seed ^ 0x9e3779b97f4a7c15, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100000001b3)
        }))
    }

    /// The next number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e3779b97f4a7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58476d1ce4e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d049bb133111eb);
        (mixed ^ (mixed >> 31)) % limit.max(1)
    }
}

/// What an attempt to move came to.
pub enum Attempt {
    /// It goes on after the move.
    Moved,
    /// Refused, with the words of the refusal.
    Refused(String),
    /// In vain for a reason that passes.
    Later(String),
}

/// How a script ended.
pub struct Ended {
    /// Whether its status is 0.
    pub success: bool,
    /// What it wrote.
    pub output: Vec<u8>,
    /// What it complained about, or what the moves did.
    pub complaints: String,
}

/// Where works run, and what moves them.
pub trait Place {
    /// The command that moves them.
    fn command(&self) -> &'static str;
    /// The work's folder, as the test sees it.
    fn folder(&self) -> &Path;
    /// The same folder, as the work sees it.
    fn folder_inside(&self) -> &Path;
    /// Runs a script to its end.
    fn script(&mut self, script: &str) -> Ended;
    /// Starts a script in the work's folder, which becomes the work, or is the root of its tree.
    fn start(&mut self, program: &Program, script: &str);
    /// Whether what was started still runs.
    fn runs(&mut self) -> bool;
    /// Tries to move it.
    fn attempt(&mut self, moments: &mut Moments) -> Attempt;
    /// Waits for its end.
    fn end(&mut self) -> Ended;
}

/// What became of a program.
#[derive(Debug, Default)]
struct Outcome {
    moves: u64,
    refusals: Vec<String>,
    runs: u64,
    unmoved: Duration,
    /// Why the last attempt was in vain.
    waited: String,
    /// When it was moved in this run, in milliseconds from its start.
    when: Vec<u128>,
}

/// Copies what `tests/setup` has made into the work's folder; what is missing otherwise.
fn provide(program: &Program, place: &mut dyn Place) -> Result<(), String> {
    // target/PROFILE/deps/TEST
    let test = std::env::current_exe().map_err(|error| error.to_string())?;
    let made = test.ancestors().nth(3).unwrap_or(Path::new("target")).join("programs");
    for need in program.needs {
        if ["numpy", "lua"].contains(need) {
            if !made.join(need).join(".done").exists() {
                return Err(format!("{need} is not there; tests/setup gets it"));
            }
            let copied = Command::new("cp").arg("-r").arg(made.join(need)).arg(place.folder()).status();
            assert!(copied.is_ok_and(|status| status.success()), "{need} cannot be copied");
        } else if !place.script(&format!("command -v {need} || ls -d {need}")).success {
            return Err(format!("{need} is not installed; tests/setup installs it"));
        }
    }
    Ok(())
}

/// Runs one program unmoved, then moved so many times, and compares. The error says what is missing here.
pub fn run(program: &Program, place: &mut dyn Place) -> Result<(), String> {
    // Short, as many other tests run too; PROGRAMS_MOVES=10 or 200 for long.
    let (wanted, seed) = (number("PROGRAMS_MOVES", 3), number("PROGRAMS_SEED", 1));
    for (file, contents) in SOURCES {
        std::fs::write(place.folder().join(file), contents).expect("written");
    }
    std::fs::write(place.folder().join("text"), text(100_000)).expect("written");
    provide(program, place)?;
    let name = program.name;
    let folder = place.folder_inside().display().to_string();
    let environment = format!(
        "export PATH=\"/usr/bin:/bin:$PATH:{}\" LC_ALL=C PYTHONPATH='{folder}/numpy' GOCACHE='{folder}/cache'; cd '{folder}'",
        std::env::var("PATH").unwrap_or_default(),
    );
    let prepared = place.script(&format!("{environment} && {}", program.prepare));
    assert!(prepared.success, "{name} cannot be prepared: {}", prepared.complaints);
    let work = format!("{environment}/run && exec >out 2>errors </dev/null && {}", program.command);
    std::fs::write(place.folder().join("work.sh"), work).expect("written");

    let mut outcome = Outcome::default();
    let unmoved = Instant::now();
    fresh(place);
    let ended = place.script(&format!("sh '{folder}/work.sh'"));
    outcome.unmoved = unmoved.elapsed();
    let result = format!("{environment}/run && {}", program.result);
    let expected = result_of(program, place, ended, &result, "unmoved");
    let mut moments = Moments::new(seed, name);
    let started = Instant::now();
    // Again if it has ended before it was moved often enough; but not for ever. More often if it was not moved at all:
    // on a quick machine a work may end before the command that moves it has begun.
    while outcome.moves < wanted && (outcome.runs < 2 + wanted / 2 || outcome.moves == 0 && outcome.runs < 20)
    {
        fresh(place);
        place.start(program, &format!("sh '{folder}/work.sh'"));
        let moves = wanted - outcome.moves;
        let ended = one_run(place, moves, &mut moments, &mut outcome);
        outcome.runs += 1;
        let when = format!("moved {} times at {:?} ms (seed {seed})", outcome.when.len(), outcome.when);
        let got = result_of(program, place, ended, &result, &when);
        if got != expected {
            let differs = got.iter().zip(&expected).take_while(|(a, b)| a == b).count();
            let from = differs.saturating_sub(200);
            let part = |text: &[u8]| {
                String::from_utf8_lossy(&text[from..text.len().min(differs + 300)]).into_owned()
            };
            panic!(
                "{name} has another result, {when}; from byte {differs} on.\n--- unmoved:\n{}\n--- moved:\n{}",
                part(&expected),
                part(&got)
            );
        }
        outcome.when.clear();
        if outcome.moves == 0 && !outcome.refusals.is_empty() {
            break;
        }
    }
    outcome.report(program, started.elapsed(), seed);
    for why in &outcome.refusals {
        let known = |(command, words): &(&str, &str)| *command == place.command() && why.contains(words);
        assert!(program.refused.iter().any(known), "{name} is refused: {why}");
    }
    // One that waits for a feature may have ended each time before it was refused in these words.
    assert!(outcome.moves > 0 || !program.refused.is_empty(), "{name} was never moved: {}", outcome.waited);
    Ok(())
}

/// An empty folder for the work.
fn fresh(place: &mut dyn Place) {
    let run = place.folder().join("run");
    if run.exists() {
        std::fs::remove_dir_all(&run).expect("removed");
    }
    std::fs::create_dir(&run).expect("made");
    std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o777)).expect("for everybody");
}

/// What the work has done; it must have succeeded.
fn result_of(program: &Program, place: &mut dyn Place, ended: Ended, result: &str, when: &str) -> Vec<u8> {
    let got = if ended.success { place.script(result) } else { ended };
    if got.success {
        return got.output;
    }
    let file = |name: &str| {
        let bytes = std::fs::read(place.folder().join("run").join(name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(600)..]).into_owned()
    };
    panic!(
        "{} has failed, {when}: {}\n--- its output ends with:\n{}\n--- it complains:\n{}",
        program.name,
        got.complaints,
        file("out"),
        file("errors")
    )
}

/// Runs it once, and moves it at random moments.
fn one_run(place: &mut dyn Place, moves: u64, moments: &mut Moments, outcome: &mut Outcome) -> Ended {
    let (started, mut moved) = (Instant::now(), 0);
    // Spread over the work, most of which is done between the moves.
    let pause = (outcome.unmoved / (moves as u32 + 2)).min(Duration::from_secs(2));
    while place.runs() && moved < moves {
        std::thread::sleep(
            pause.mul_f64(0.2 + moments.below(1000) as f64 / 800.0).max(Duration::from_millis(5)),
        );
        let at = started.elapsed().as_millis();
        match place.attempt(moments) {
            Attempt::Moved => {
                moved += 1;
                outcome.when.push(at);
            }
            Attempt::Refused(why) => {
                outcome.refusals.push(why);
                // It is asked again at some other moments, as it may be refused for a while only.
                if outcome.refusals.len() as u64 > 3 * (outcome.moves + moved + 2) {
                    break;
                }
            }
            Attempt::Later(why) => outcome.waited = why,
        }
    }
    outcome.moves += moved;
    place.end()
}

impl Outcome {
    /// A line for whoever reads the test's output, and one for the table where `PROGRAMS_TABLE` names a file.
    fn report(&self, program: &Program, took: Duration, seed: u64) {
        let Outcome { moves, refusals, runs, unmoved, .. } = self;
        let reason = |text: &String| {
            text.lines().find(|line| line.contains("why:")).unwrap_or(text).trim().to_string()
        };
        let why = refusals.first().map(reason).unwrap_or_default();
        eprintln!(
            "{:18} {moves:3} moves in {runs} runs of {:.1} s (unmoved {:.1} s; seed {seed}), {} refused {why}",
            program.name,
            took.as_secs_f64() / (*runs).max(1) as f64,
            unmoved.as_secs_f64(),
            refusals.len(),
        );
        if let Some(path) = std::env::var_os("PROGRAMS_TABLE")
            && let Ok(mut file) = std::fs::File::options().create(true).append(true).open(path)
        {
            // The line above has been printed in any case.
            let _ = writeln!(file, "{}\t{moves}\t{runs}\t{}\t{why}", program.name, refusals.len());
        }
    }
}
