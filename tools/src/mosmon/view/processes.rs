//! The processes: a row each, and what there is no room for about the chosen one.

use super::{Palette, pane};
use crate::mosmon::monitor::{Monitor, Pane};
use crate::output::clean;
use crate::quantity::{bytes_short, millis};
use migd::api::ProcessInfo;
use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Paragraph, Row, Table, TableState};

/// One column.
struct Column {
    heading: &'static str,
    width: u16,
    /// Left out of panes narrower than this.
    from: u16,
    right: bool,
    cell: fn(&ProcessInfo) -> String,
}

const COLUMNS: [Column; 11] = [
    Column { heading: "PID", width: 7, from: 0, right: true, cell: |p| p.pid.to_string() },
    Column { heading: "JOB", width: 10, from: 60, right: false, cell: |p| p.job.clone() },
    Column { heading: "USER", width: 8, from: 100, right: false, cell: |p| p.user.clone() },
    Column { heading: "HOME", width: 8, from: 80, right: false, cell: |p| p.home.clone() },
    Column { heading: "NODE", width: 8, from: 0, right: false, cell: |p| p.node.clone() },
    Column { heading: "STATE", width: 8, from: 40, right: false, cell: |p| p.state.clone() },
    Column { heading: "CPU%", width: 5, from: 40, right: true, cell: |p| format!("{:.0}", p.cpu_pct) },
    Column { heading: "RSS", width: 6, from: 50, right: true, cell: |p| bytes_short(p.rss_bytes) },
    Column { heading: "MOVES", width: 5, from: 70, right: true, cell: |p| p.migrations.to_string() },
    Column { heading: "FREEZE", width: 8, from: 110, right: true, cell: freeze },
    Column { heading: "COMMAND", width: 0, from: 0, right: false, cell: |p| p.command.clone() },
];

fn freeze(process: &ProcessInfo) -> String {
    process.last_freeze_ms.map_or_else(|| "-".into(), millis)
}

/// Draws the pane.
pub fn draw(monitor: &Monitor, palette: Palette, frame: &mut Frame<'_>, area: Rect) {
    let processes = monitor.processes();
    let all = monitor.snapshot.processes.len();
    let title = match processes.len() {
        n if n == all => format!(" processes · {n} "),
        n => format!(" processes · {n} of {all} "),
    };
    let block = pane(monitor, palette, Pane::Processes, title);
    let inside = block.inner(area);
    frame.render_widget(block, area);
    if processes.is_empty() {
        let text = match all {
            0 => "no job here yet; start one: mosrun COMMAND",
            _ => "no process matches the filter; Esc shows all",
        };
        let text = Span::styled(text, palette.faint());
        return frame.render_widget(Paragraph::new(text).alignment(Alignment::Center), inside);
    }
    let detail = u16::from(inside.height >= 6);
    let [list, more] = Layout::vertical([Constraint::Min(0), Constraint::Length(detail)]).areas(inside);
    let columns: Vec<&Column> = COLUMNS.iter().filter(|column| inside.width >= column.from).collect();
    let mut state = TableState::default();
    state.select(monitor.row());
    let widths = columns.iter().map(|column| match column.width {
        0 => Constraint::Fill(1),
        width => Constraint::Length(width),
    });
    let heads = columns.iter().map(|column| aligned(column.heading.to_string(), column.right));
    let rows = processes.iter().map(|process| {
        Row::new(columns.iter().map(|column| aligned(clean(&(column.cell)(process)), column.right)))
            .style(style(process, palette))
    });
    let table = Table::new(rows, widths)
        .header(Row::new(heads).style(palette.faint()))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED))
        .column_spacing(1);
    frame.render_stateful_widget(table, list, &mut state);
    if let Some(process) = monitor.process() {
        frame.render_widget(Paragraph::new(about(process, palette)), more);
    }
}

fn aligned(text: String, right: bool) -> Cell<'static> {
    let line = Line::from(text);
    Cell::from(if right { line.alignment(Alignment::Right) } else { line })
}

fn style(process: &ProcessInfo, palette: Palette) -> Style {
    match process {
        _ if process.state == "moving" => palette.busy(),
        _ if process.home != process.node => palette.away(),
        _ => Style::new(),
    }
}

/// The way of a process, whether it is held, and by what.
fn about(process: &ProcessInfo, palette: Palette) -> Line<'static> {
    let mut spans = vec![Span::styled(format!(" {}: ", process.pid), palette.head())];
    if process.visited.len() > 1 {
        // The way so far; of a long one the end.
        let skipped = process.visited.len().saturating_sub(6);
        let dots = if skipped > 0 { "… → " } else { "" };
        spans.push(Span::raw(format!("{dots}{}", clean(&process.visited[skipped..].join(" → ")))));
    } else {
        spans.push(Span::raw(format!("on {}, has not moved", clean(&process.node))));
    }
    if process.locked {
        spans.push(Span::styled(" · pinned", palette.busy()));
    }
    if let Some(why) = &process.cantmove {
        spans.push(Span::styled(format!(" · cannot move: {}", clean(why)), palette.busy()));
    }
    Line::from(spans)
}
