//! The full screen: nodes, processes, migrations. Keys as in openMosix' monitor where it had them.

use crate::{migrate, mosps, output};
use migd::api::{ApiError, ErrorKind, MigrateRequest, NodeInfo, Request, Response, Snapshot};
use migd::client::Client;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::widgets::{Block, Cell, Gauge, Paragraph, Row, Table, TableState};
use std::path::Path;
use std::time::{Duration, Instant};

/// How often it is drawn anew.
const PERIOD: Duration = Duration::from_secs(1);
/// Headings of the nodes' table in text.
pub const NODE_HEADINGS: [&str; 9] = ["#", "NODE", "STATE", "LOAD", "SPEED", "CPU%", "MEMORY", "OUT", "IN"];
const HELP: &str = "l load  s speed  m memory  u utilisation  d dead nodes  t totals  v/w layout  \
                    Tab panes  M migrate to best  H home  P pin  e explain  / filter  q quit";

/// What the bars show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bars {
    Load,
    Speed,
    Memory,
    Utilisation,
}

/// Which pane the keys act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pane {
    Nodes,
    Processes,
}

/// Everything that is drawn.
pub struct Monitor {
    snapshot: Snapshot,
    bars: Bars,
    pane: Pane,
    dead: bool,
    totals: bool,
    wide: bool,
    help: bool,
    filter: String,
    filtering: bool,
    selected: TableState,
    message: String,
}

impl Monitor {
    /// Before the first snapshot.
    pub fn new(snapshot: Snapshot) -> Monitor {
        let mut selected = TableState::default();
        selected.select(Some(0));
        Monitor {
            snapshot,
            bars: Bars::Load,
            pane: Pane::Processes,
            dead: false,
            totals: false,
            wide: false,
            help: false,
            filter: String::new(),
            filtering: false,
            selected,
            message: "? for help".into(),
        }
    }

    fn visible(&self) -> Vec<&migd::api::ProcessInfo> {
        let matches = |p: &&migd::api::ProcessInfo| {
            self.filter.is_empty() || p.command.contains(&self.filter) || p.job.contains(&self.filter)
        };
        self.snapshot.processes.iter().filter(matches).collect()
    }

    /// Handles a key; gives a request for the daemon, or `Err(())` to quit.
    fn key(&mut self, code: KeyCode) -> Result<Option<Request>, ()> {
        if self.filtering {
            match code {
                KeyCode::Enter | KeyCode::Esc => self.filtering = false,
                KeyCode::Backspace => drop(self.filter.pop()),
                KeyCode::Char(letter) => self.filter.push(letter),
                _ => {}
            }
            return Ok(None);
        }
        match code {
            KeyCode::Char('q') => return Err(()),
            KeyCode::Char('l') => self.bars = Bars::Load,
            KeyCode::Char('s') => self.bars = Bars::Speed,
            KeyCode::Char('m') => self.bars = Bars::Memory,
            KeyCode::Char('u') => self.bars = Bars::Utilisation,
            KeyCode::Char('d') => self.dead = !self.dead,
            KeyCode::Char('t') => self.totals = !self.totals,
            KeyCode::Char('v') => self.wide = false,
            KeyCode::Char('w') => self.wide = true,
            KeyCode::Char('?') => self.help = !self.help,
            KeyCode::Char('/') => {
                self.filtering = true;
                self.filter.clear();
            }
            KeyCode::Tab => {
                self.pane = if self.pane == Pane::Nodes { Pane::Processes } else { Pane::Nodes };
            }
            KeyCode::Up => self.selected.select_previous(),
            KeyCode::Down => self.selected.select_next(),
            KeyCode::Char('M') => return Ok(self.to("best")),
            KeyCode::Char('H') => return Ok(self.to("home")),
            KeyCode::Char('P') => {
                return Ok(self.chosen().map(|what| Request::Pin { what, node: None }));
            }
            KeyCode::Char('e') => {
                return Ok(self.chosen().map(|what| Request::Explain { what, to: "best".into() }));
            }
            _ => {}
        }
        Ok(None)
    }

    fn chosen(&self) -> Option<String> {
        let visible = self.visible();
        let at = self.selected.selected()?.min(visible.len().checked_sub(1)?);
        Some(visible[at].pid.to_string())
    }

    fn to(&self, node: &str) -> Option<Request> {
        let what = self.chosen()?;
        Some(Request::Migrate(MigrateRequest {
            what,
            to: node.into(),
            dry_run: false,
            stop: false,
            no_wait: true,
            timeout_ms: None,
            progress: false,
        }))
    }

    /// Draws everything.
    pub fn draw(&mut self, frame: &mut Frame<'_>) {
        let nodes: Vec<NodeInfo> =
            self.snapshot.nodes.iter().filter(|n| self.dead || n.state == "up").cloned().collect();
        let head = (nodes.len() as u16 + 2).clamp(3, frame.area().height / 3 + 3);
        let moving = if self.wide { 3 } else { 8 };
        let [top, middle, bottom, foot] = Layout::vertical([
            Constraint::Length(head),
            Constraint::Min(4),
            Constraint::Length(moving),
            Constraint::Length(if self.help { 3 } else { 1 }),
        ])
        .areas(frame.area());
        self.draw_nodes(frame, top, &nodes);
        self.draw_processes(frame, middle);
        self.draw_migrations(frame, bottom);
        let text = if self.help {
            HELP.to_string()
        } else if self.filtering {
            format!("/{}", self.filter)
        } else {
            self.message.clone()
        };
        frame.render_widget(Paragraph::new(text).wrap(ratatui::widgets::Wrap { trim: true }), foot);
    }

    fn draw_nodes(&self, frame: &mut Frame<'_>, area: Rect, nodes: &[NodeInfo]) {
        let what = match self.bars {
            Bars::Load => "load",
            Bars::Speed => "speed",
            Bars::Memory => "memory used",
            Bars::Utilisation => "CPU use",
        };
        let mut title = format!(" nodes: {what} ");
        if self.totals {
            let load: f64 = nodes.iter().map(|n| n.load).sum();
            let cpus: f64 = nodes.iter().map(|n| n.cpus).sum();
            title.push_str(&format!("(total load {load:.2}, {cpus:.1} CPUs) "));
        }
        let block = self.block(&title, Pane::Nodes);
        let inside = block.inner(area);
        frame.render_widget(block, area);
        let most = nodes.iter().map(|n| self.measure(n)).fold(1e-9, f64::max).max(1.0);
        for (row, node) in (inside.y..inside.bottom()).zip(nodes) {
            let value = self.measure(node);
            let label = format!(
                "{:<12} {:<7} {}  out {} in {}",
                node.name,
                node.state,
                self.in_words(node),
                node.guests_out,
                node.guests_in
            );
            let gauge = Gauge::default().ratio((value / most).clamp(0.0, 1.0)).label(label);
            frame.render_widget(gauge, Rect { x: inside.x, y: row, width: inside.width, height: 1 });
        }
    }

    fn measure(&self, node: &NodeInfo) -> f64 {
        match self.bars {
            Bars::Load => node.load,
            Bars::Speed => f64::from(node.speed),
            Bars::Memory => {
                let used = node.mem_total_bytes.saturating_sub(node.mem_available_bytes);
                used as f64 / node.mem_total_bytes.max(1) as f64
            }
            Bars::Utilisation => node.cpu_pct / 100.0,
        }
    }

    fn in_words(&self, node: &NodeInfo) -> String {
        match self.bars {
            Bars::Load => format!("{:.2}", node.load),
            Bars::Speed => node.speed.to_string(),
            Bars::Memory => format!("{} free", output::bytes(node.mem_available_bytes)),
            Bars::Utilisation => format!("{:.0} %", node.cpu_pct),
        }
    }

    fn block(&self, title: &str, pane: Pane) -> Block<'static> {
        let block = Block::bordered().title(title.to_string());
        if self.pane == pane { block.border_style(Style::new().add_modifier(Modifier::BOLD)) } else { block }
    }

    fn draw_processes(&mut self, frame: &mut Frame<'_>, area: Rect) {
        let headings = [
            "PID", "JOB", "USER", "HOME", "NODE", "STATE", "CPU%", "RSS", "MOVES", "L", "CANTMOVE", "COMMAND",
        ];
        let rows: Vec<Row<'static>> = self.visible().into_iter().map(|p| Row::new(mosps::row(p))).collect();
        let widths = [6, 8, 8, 8, 8, 9, 5, 10, 5, 1, 14].map(Constraint::Length);
        let widths: Vec<Constraint> = widths.into_iter().chain([Constraint::Min(10)]).collect();
        let table = Table::new(rows, widths)
            .header(Row::new(headings.map(Cell::from)).style(Style::new().add_modifier(Modifier::BOLD)))
            .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED))
            .block(self.block(" processes ", Pane::Processes));
        let mut selected = self.selected;
        frame.render_stateful_widget(table, area, &mut selected);
        self.selected = selected;
    }

    fn draw_migrations(&self, frame: &mut Frame<'_>, area: Rect) {
        let lines: Vec<String> = self
            .snapshot
            .migrations
            .iter()
            .take(area.height.saturating_sub(2) as usize)
            .map(|m| match &m.error {
                Some(why) => format!("{:<10} {} {} -> {}: {why}", m.phase, m.pid, m.from, m.to),
                None => format!("{:<10} {}", m.phase, migrate::in_words(m)),
            })
            .collect();
        let text = Paragraph::new(lines.join("\n")).block(Block::bordered().title(" migrations "));
        frame.render_widget(text, area);
    }
}

/// A node as cells of a row of text.
pub fn node_row(node: &NodeInfo) -> Vec<String> {
    vec![
        node.number.to_string(),
        node.name.clone(),
        node.state.clone(),
        format!("{:.2}", node.load),
        node.speed.to_string(),
        format!("{:.0}", node.cpu_pct),
        format!("{} free", output::bytes(node.mem_available_bytes)),
        node.guests_out.to_string(),
        node.guests_in.to_string(),
    ]
}

/// Runs until `q`.
pub fn run(socket: Option<&Path>) -> Result<(), ApiError> {
    let mut client = Client::connect(socket)?;
    let first = ask(&mut client)?;
    let mut terminal = ratatui::try_init().map_err(|error| {
        output::error(
            ErrorKind::Failed,
            "there is no terminal to draw on",
            &error.to_string(),
            "use mosmon --once",
        )
    })?;
    let result = watch(socket, client, first, &mut terminal);
    ratatui::restore();
    result
}

fn ask(client: &mut Client) -> Result<Snapshot, ApiError> {
    match client.call(&Request::Snapshot)? {
        Response::Snapshot(snapshot) => Ok(snapshot),
        other => Err(migrate::unexpected(&other)),
    }
}

fn watch(
    socket: Option<&Path>,
    mut client: Client,
    first: Snapshot,
    terminal: &mut ratatui::DefaultTerminal,
) -> Result<(), ApiError> {
    let broken = |error: std::io::Error| {
        output::error(ErrorKind::Failed, "the terminal failed", &error.to_string(), "use mosmon --once")
    };
    let mut monitor = Monitor::new(first);
    let mut next = Instant::now() + PERIOD;
    loop {
        terminal.draw(|frame| monitor.draw(frame)).map_err(broken)?;
        if event::poll(next.saturating_duration_since(Instant::now())).map_err(broken)? {
            if let Event::Key(key) = event::read().map_err(broken)?
                && key.kind == KeyEventKind::Press
            {
                let interrupt =
                    key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
                match monitor.key(key.code) {
                    Err(()) => return Ok(()),
                    _ if interrupt => return Ok(()),
                    Ok(Some(request)) => monitor.message = act(&mut client, &request),
                    Ok(None) => {}
                }
            }
            continue;
        }
        next = Instant::now() + PERIOD;
        match ask(&mut client) {
            Ok(snapshot) => monitor.snapshot = snapshot,
            Err(error) => {
                monitor.message = format!("{}: {}; trying again", error.what, error.why);
                if let Ok(again) = Client::connect(socket) {
                    client = again;
                }
            }
        }
    }
}

fn act(client: &mut Client, request: &Request) -> String {
    match client.call(request) {
        Ok(Response::Explain(found)) if found.blockers.is_empty() => {
            format!("process {} can move", found.pid)
        }
        Ok(Response::Explain(found)) => {
            found.blockers.iter().map(|b| b.what.as_str()).collect::<Vec<_>>().join("; ")
        }
        Ok(_) => "done".into(),
        Err(error) => format!("{}: {}", error.what, error.why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn snapshot() -> Snapshot {
        let node = |name: &str, state: &str, load| NodeInfo {
            name: name.into(),
            state: state.into(),
            load,
            speed: 10_000,
            ..NodeInfo::default()
        };
        let process = migd::api::ProcessInfo { pid: 42, command: "xz -9".into(), ..Default::default() };
        Snapshot {
            node: "node1".into(),
            nodes: vec![node("node1", "up", 1.5), node("node2", "down", 0.0)],
            processes: vec![process],
            migrations: Vec::new(),
        }
    }

    fn drawn(monitor: &mut Monitor, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
        terminal.draw(|frame| monitor.draw(frame)).expect("draws");
        terminal.backend().to_string()
    }

    #[test]
    fn shows_nodes_and_processes() {
        let mut monitor = Monitor::new(snapshot());
        let text = drawn(&mut monitor, 120, 30);
        assert!(text.contains("node1") && text.contains("1.50") && text.contains("xz -9"));
        assert!(!text.contains("node2"));
        assert_eq!(monitor.key(KeyCode::Char('d')).map(|r| r.is_none()), Ok(true));
        assert!(drawn(&mut monitor, 120, 30).contains("node2"));
    }

    #[test]
    fn any_size_is_drawn() {
        let mut monitor = Monitor::new(snapshot());
        for (width, height) in [(1, 1), (5, 3), (20, 8), (300, 100)] {
            drawn(&mut monitor, width, height);
        }
    }

    #[test]
    fn keys_ask_the_daemon() {
        let mut monitor = Monitor::new(snapshot());
        assert!(matches!(monitor.key(KeyCode::Char('H')), Ok(Some(Request::Migrate(m))) if m.to == "home"));
        assert!(
            matches!(monitor.key(KeyCode::Char('P')), Ok(Some(Request::Pin { what, .. })) if what == "42")
        );
        assert!(monitor.key(KeyCode::Char('q')).is_err());
    }
}
