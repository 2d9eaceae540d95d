//! What the monitor shows, and what its keys do. No terminal, no daemon, no clock.

use migd::api::{MigrateRequest, MigrationInfo, NodeInfo, ProcessInfo, Request, Response, Snapshot};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

/// Longest text that is typed into a prompt.
const MAX_TYPED: usize = 128;

/// What the bars of the nodes show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bars {
    /// Load.
    Load,
    /// Speed.
    Speed,
    /// Memory in use.
    Memory,
    /// CPU use.
    Utilisation,
}

/// Which pane the arrows act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pane {
    /// The nodes.
    Nodes,
    /// The processes.
    Processes,
    /// The migrations.
    Migrations,
}

/// What is being typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// A filter, taken over at every key.
    Filter,
    /// Where this process shall go.
    Move(i32),
}

/// What lies over the panes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Popup {
    /// The keys.
    Help,
    /// Lines under a title.
    Text(String, Vec<String>),
}

/// What a key asks for.
#[derive(Debug, Clone)]
pub enum Wish {
    /// Nothing but to be drawn anew.
    Draw,
    /// To end.
    Quit,
    /// To be stopped, as by a shell's Ctrl-Z.
    Suspend,
    /// A question to the daemon, and what is being done, in words.
    Ask(Request, String),
}

/// The connection to the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Link {
    /// Snapshots come.
    Up,
    /// They do not, and why.
    Lost(String),
}

/// Everything that is shown.
#[derive(Debug)]
pub struct Monitor {
    /// The last one heard.
    pub snapshot: Snapshot,
    /// Whether it is fresh.
    pub link: Link,
    /// What the bars show.
    pub bars: Bars,
    /// Which pane the arrows act on.
    pub pane: Pane,
    /// Nodes that are down are shown as well.
    pub dead: bool,
    /// A line of totals.
    pub totals: bool,
    /// Bars stand (`v`) or lie (`w`).
    pub standing: bool,
    /// Only what contains this.
    pub filter: String,
    /// What is being typed, and for what.
    pub prompt: Option<(Prompt, String)>,
    /// What lies over the panes.
    pub popup: Option<Popup>,
    /// The answer to the last wish.
    pub message: String,
    /// Which process is chosen: its home and PID, which stay the same when rows move.
    chosen: Option<(String, i32)>,
    /// First row shown of nodes and of migrations.
    pub scrolled: [usize; 2],
}

impl Monitor {
    /// Shows this.
    pub fn new(snapshot: Snapshot) -> Monitor {
        Monitor {
            snapshot,
            link: Link::Up,
            bars: Bars::Load,
            pane: Pane::Processes,
            dead: false,
            totals: false,
            standing: false,
            filter: String::new(),
            prompt: None,
            popup: None,
            message: String::new(),
            chosen: None,
            scrolled: [0, 0],
        }
    }

    /// The nodes to show.
    pub fn nodes(&self) -> Vec<&NodeInfo> {
        self.snapshot.nodes.iter().filter(|node| self.dead || node.state != "down").collect()
    }

    /// The processes to show.
    pub fn processes(&self) -> Vec<&ProcessInfo> {
        let wanted = self.filter.to_lowercase();
        let has = |text: &str| text.to_lowercase().contains(&wanted);
        let matches = |p: &&ProcessInfo| {
            wanted.is_empty()
                || [&p.command, &p.job, &p.user, &p.node, &p.home, &p.state].into_iter().any(|text| has(text))
                || has(&p.pid.to_string())
        };
        self.snapshot.processes.iter().filter(matches).collect()
    }

    /// Those that have not ended.
    pub fn in_flight(&self) -> impl Iterator<Item = &MigrationInfo> {
        self.snapshot.migrations.iter().filter(|migration| !ended(migration))
    }

    /// The chosen process' row.
    pub fn row(&self) -> Option<usize> {
        let processes = self.processes();
        let chosen = self.chosen.as_ref();
        let found =
            processes.iter().position(|p| chosen.is_some_and(|(home, pid)| (&p.home, &p.pid) == (home, pid)));
        found.or(if processes.is_empty() { None } else { Some(0) })
    }

    /// The chosen process.
    pub fn process(&self) -> Option<&ProcessInfo> {
        self.processes().get(self.row()?).copied()
    }

    fn choose(&mut self, row: usize) {
        let processes = self.processes();
        let chosen = processes.get(row.min(processes.len().saturating_sub(1)));
        self.chosen = chosen.map(|process| (process.home.clone(), process.pid));
    }

    /// The daemon has told anew.
    pub fn heard(&mut self, snapshot: Snapshot) {
        // What was chosen stays chosen while it lives; then its place in the list is.
        let row = self.row();
        self.snapshot = snapshot;
        self.link = Link::Up;
        let alive = self.chosen.as_ref().is_some_and(|(home, pid)| {
            self.snapshot.processes.iter().any(|process| (&process.home, &process.pid) == (home, pid))
        });
        if !alive && self.chosen.is_some() {
            self.choose(row.unwrap_or(0));
        }
    }

    /// The daemon has answered a wish.
    pub fn answered(&mut self, doing: &str, answer: Result<Response, migd::api::ApiError>) {
        match answer {
            Ok(Response::Explain(found)) => {
                self.message.clear();
                let lines = crate::migrate::explained(&found);
                self.popup = Some(Popup::Text(doing.to_string(), lines));
            }
            Ok(Response::Why(why)) => {
                self.message.clear();
                let mut lines = vec![format!("{}: {}", why.decision, why.reason), String::new()];
                lines.extend(why.numbers.iter().map(|(name, value)| format!("{name:<28} {value:>14.3}")));
                self.popup = Some(Popup::Text(doing.to_string(), lines));
            }
            Ok(_) => self.message = format!("{doing}: done"),
            Err(error) if error.blockers.is_empty() => {
                self.message = format!("{}: {} ({})", error.what, error.why, error.next);
            }
            Err(error) => {
                let lines = error.blockers.iter().map(|b| format!("{:<10} {}", b.kind, b.what)).collect();
                self.popup = Some(Popup::Text(error.what, lines));
            }
        }
    }

    /// A key was pressed.
    pub fn key(&mut self, key: KeyEvent) -> Wish {
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return match key.code {
                KeyCode::Char('c') => Wish::Quit,
                KeyCode::Char('z') => Wish::Suspend,
                _ => Wish::Draw,
            };
        }
        if self.prompt.is_some() {
            return self.typed(key.code);
        }
        if self.popup.take().is_some() {
            return Wish::Draw;
        }
        match key.code {
            KeyCode::Char('q') => return Wish::Quit,
            KeyCode::Char('l') => self.bars = Bars::Load,
            KeyCode::Char('s') => self.bars = Bars::Speed,
            KeyCode::Char('m') => self.bars = Bars::Memory,
            KeyCode::Char('u') => self.bars = Bars::Utilisation,
            KeyCode::Char('d') => self.dead = !self.dead,
            KeyCode::Char('t') => self.totals = !self.totals,
            KeyCode::Char('v') => self.standing = true,
            KeyCode::Char('w') => self.standing = false,
            KeyCode::Char('?') => self.popup = Some(Popup::Help),
            KeyCode::Char('/') => self.prompt = Some((Prompt::Filter, self.filter.clone())),
            KeyCode::Esc => {
                self.filter.clear();
                self.message.clear();
            }
            KeyCode::Tab => self.pane = next(self.pane),
            KeyCode::BackTab => self.pane = next(next(self.pane)),
            KeyCode::Up | KeyCode::Char('k') => self.step(-1),
            KeyCode::Down | KeyCode::Char('j') => self.step(1),
            KeyCode::PageUp => self.step(-10),
            KeyCode::PageDown => self.step(10),
            KeyCode::Home => self.step(isize::MIN),
            KeyCode::End => self.step(isize::MAX),
            KeyCode::Char(letter @ ('M' | 'H' | 'P' | 'e' | 'y')) => return self.act(letter),
            _ => {}
        }
        Wish::Draw
    }

    fn step(&mut self, by: isize) {
        let (at, most) = match self.pane {
            Pane::Processes => {
                let row = self.row().unwrap_or(0).saturating_add_signed(by);
                return self.choose(row);
            }
            Pane::Nodes => (0, self.nodes().len()),
            Pane::Migrations => (1, self.snapshot.migrations.len()),
        };
        self.scrolled[at] = self.scrolled[at].saturating_add_signed(by).min(most.saturating_sub(1));
    }

    /// A key that concerns the chosen process.
    fn act(&mut self, letter: char) -> Wish {
        let Some(process) = self.process() else {
            self.message = "there is no process to act on".into();
            return Wish::Draw;
        };
        if process.home != self.snapshot.node {
            let (pid, home) = (process.pid, process.home.clone());
            self.message = format!("{pid} is a guest here; it is told where to go at its home, {home}");
            return Wish::Draw;
        }
        let (pid, what, locked) = (process.pid, process.pid.to_string(), process.locked);
        match letter {
            'M' => {
                self.prompt = Some((Prompt::Move(pid), String::new()));
                Wish::Draw
            }
            'H' => move_to(pid, "home"),
            'P' if locked => Wish::Ask(Request::Unpin { what }, format!("unpinning {pid}")),
            'P' => Wish::Ask(Request::Pin { what, node: None }, format!("pinning {pid}")),
            'y' => Wish::Ask(Request::Why { what }, format!("why {pid} is where it is")),
            _ => {
                let to = "best".to_string();
                Wish::Ask(Request::Explain { what, to }, format!("what moving {pid} would take"))
            }
        }
    }

    /// A key for the prompt.
    fn typed(&mut self, code: KeyCode) -> Wish {
        let Some((prompt, text)) = &mut self.prompt else { return Wish::Draw };
        match code {
            KeyCode::Char(letter) if text.chars().count() < MAX_TYPED => text.push(letter),
            KeyCode::Backspace => drop(text.pop()),
            KeyCode::Esc => {
                if *prompt == Prompt::Filter {
                    self.filter.clear();
                }
                self.prompt = None;
                return Wish::Draw;
            }
            KeyCode::Enter => {
                let (prompt, text) = (prompt.clone(), text.trim().to_string());
                self.prompt = None;
                if let Prompt::Move(pid) = prompt {
                    return move_to(pid, if text.is_empty() { "best" } else { &text });
                }
                return Wish::Draw;
            }
            _ => {}
        }
        if *prompt == Prompt::Filter {
            self.filter.clone_from(text);
        }
        Wish::Draw
    }
}

fn next(pane: Pane) -> Pane {
    match pane {
        Pane::Nodes => Pane::Processes,
        Pane::Processes => Pane::Migrations,
        Pane::Migrations => Pane::Nodes,
    }
}

/// Whether a migration has ended.
pub fn ended(migration: &MigrationInfo) -> bool {
    matches!(migration.phase.as_str(), "done" | "failed")
}

fn move_to(pid: i32, node: &str) -> Wish {
    let request = MigrateRequest {
        what: pid.to_string(),
        to: node.to_string(),
        dry_run: false,
        stop: false,
        // How it goes is seen among the migrations.
        no_wait: true,
        timeout_ms: None,
        progress: false,
    };
    Wish::Ask(Request::Migrate(request), format!("moving {pid} to {node}"))
}

#[cfg(test)]
pub mod tests;
