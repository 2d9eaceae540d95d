//! The nodes: a bar each, lying with figures beside it or standing side by side as in the old monitor.

use super::{Palette, pane};
use crate::mosmon::monitor::{Bars, Monitor, Pane};
use crate::output::clean;
use crate::quantity::bytes_short;
use migd::api::NodeInfo;
use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Rect};
use ratatui::style::Style;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Bar, BarChart, BarGroup, Cell, Paragraph, Row, Table};

/// Least rows of standing bars that can be told apart.
const STANDING: u16 = 10;
/// Partial blocks, an eighth each.
const EIGHTHS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];

/// Rows the pane wants, of so many.
pub fn height(monitor: &Monitor, room: u16) -> u16 {
    if monitor.standing {
        return (room / 2).max(STANDING.min(room));
    }
    let rows = monitor.nodes().len().min(usize::from(u16::MAX / 2)) as u16;
    (rows + 3 + u16::from(monitor.totals)).clamp(4, (room * 2 / 5).max(4))
}

/// Draws the pane.
pub fn draw(monitor: &Monitor, palette: Palette, frame: &mut Frame<'_>, area: Rect) {
    let what = match monitor.bars {
        Bars::Load => "load",
        Bars::Speed => "speed",
        Bars::Memory => "memory used",
        Bars::Utilisation => "CPU use",
    };
    let nodes = monitor.nodes();
    let block = pane(monitor, palette, Pane::Nodes, format!(" nodes · {what} "));
    let inside = block.inner(area);
    frame.render_widget(block, area);
    if nodes.is_empty() {
        let text = "no node is up; `d` shows those that are down";
        return frame.render_widget(Paragraph::new(text).alignment(Alignment::Center), inside);
    }
    let from = monitor.scrolled[0].min(nodes.len() - 1);
    let scale = nodes.iter().map(|node| measure(monitor.bars, node)).fold(1e-9, f64::max);
    // Little load must look little; shares of something have their own whole.
    let scale = match monitor.bars {
        Bars::Load => scale.max(1.0),
        Bars::Memory | Bars::Utilisation => 1.0,
        Bars::Speed => scale,
    };
    if monitor.standing {
        standing(monitor, palette, frame, inside, &nodes[from..], scale);
    } else {
        lying(monitor, palette, frame, inside, &nodes[from..], scale);
    }
}

/// What the bar shows.
fn measure(bars: Bars, node: &NodeInfo) -> f64 {
    let value = match bars {
        // What it said last is of no interest.
        _ if node.state == "down" => 0.0,
        Bars::Load => node.load,
        Bars::Speed => f64::from(node.speed),
        Bars::Memory => used(node) as f64 / node.mem_total_bytes.max(1) as f64,
        Bars::Utilisation => node.cpu_pct / 100.0,
    };
    if value.is_finite() { value.max(0.0) } else { 0.0 }
}

fn used(node: &NodeInfo) -> u64 {
    node.mem_total_bytes.saturating_sub(node.mem_available_bytes)
}

fn in_words(bars: Bars, node: &NodeInfo) -> String {
    match bars {
        _ if node.state == "down" => "-".into(),
        Bars::Load => format!("{:.2}", node.load),
        Bars::Speed => node.speed.to_string(),
        Bars::Memory | Bars::Utilisation => format!("{:.0}%", measure(bars, node) * 100.0),
    }
}

fn style(bars: Bars, node: &NodeInfo, palette: Palette) -> Style {
    match bars {
        _ if node.state == "down" => palette.faint(),
        // One runnable thread a CPU of standard speed is a node well used; two are too many.
        Bars::Load => palette.level(node.load / 2.0),
        Bars::Speed => palette.away(),
        Bars::Memory => palette.level(measure(bars, node)),
        Bars::Utilisation => palette.level(measure(bars, node) * 0.8),
    }
}

/// `share` of `width` columns.
fn bar(share: f64, width: u16) -> String {
    let eighths = (share.clamp(0.0, 1.0) * f64::from(width) * 8.0).round() as usize;
    let mut text = "█".repeat(eighths / 8);
    if !eighths.is_multiple_of(8) {
        text.push(EIGHTHS[eighths % 8]);
    }
    text
}

fn state_style(node: &NodeInfo, palette: Palette) -> Style {
    match node.state.as_str() {
        "up" => palette.good(),
        "suspect" => palette.busy(),
        _ => palette.bad(),
    }
}

fn lying(
    monitor: &Monitor,
    palette: Palette,
    frame: &mut Frame<'_>,
    area: Rect,
    nodes: &[&NodeInfo],
    scale: f64,
) {
    let wide = area.width >= 90;
    let name = nodes.iter().map(|node| node.name.chars().count()).max().unwrap_or(4).clamp(4, 20) as u16;
    let figures: &[u16] = if wide { &[6, 6, 5, 12, 4, 4, 10] } else { &[4, 4] };
    let fixed: u16 = 3 + name + 7 + 6 + figures.iter().sum::<u16>() + 4 + figures.len() as u16;
    let bar_width = area.width.saturating_sub(fixed).clamp(4, 60);
    let row = |node: &&NodeInfo| {
        let value = measure(monitor.bars, node);
        let mut cells = vec![
            right(node.number.to_string()),
            Cell::from(clean(&node.name)),
            Cell::from(Span::styled(clean(&node.state), state_style(node, palette))),
            Cell::from(Span::styled(bar(value / scale, bar_width), style(monitor.bars, node, palette))),
            right(in_words(monitor.bars, node)),
        ];
        if wide {
            cells.push(right(node.speed.to_string()));
            cells.push(right(format!("{:.1}", node.cpus)));
            cells.push(right(format!("{:.0}%", node.cpu_pct)));
            cells.push(right(format!("{}/{}", bytes_short(used(node)), bytes_short(node.mem_total_bytes))));
        }
        cells.push(right(node.guests_out.to_string()));
        cells.push(right(node.guests_in.to_string()));
        if wide {
            cells.push(Cell::from(Span::styled(remarks(node), palette.busy())));
        }
        let row = Row::new(cells);
        if node.name == monitor.snapshot.node { row.style(palette.head()) } else { row }
    };
    let mut rows: Vec<Row<'_>> = nodes.iter().map(row).collect();
    if monitor.totals {
        // In the last visible row, whatever is scrolled.
        rows.truncate(usize::from(area.height.saturating_sub(2)));
        rows.push(totals(monitor, wide).style(palette.head()));
    }
    let mut heads = vec![right("#"), "NODE".into(), "STATE".into(), "".into(), right("")];
    if wide {
        heads.extend([right("SPEED"), right("CPUS"), right("CPU"), right("MEMORY")]);
    }
    heads.extend([right("OUT"), right("IN")]);
    if wide {
        heads.push("".into());
    }
    let widths = [3, name, 7, bar_width, 6].into_iter().chain(figures.iter().copied());
    let table = Table::new(rows, widths.map(Constraint::Length))
        .header(Row::new(heads).style(palette.faint()))
        .column_spacing(1);
    frame.render_widget(table, area);
}

fn right(text: impl Into<String>) -> Cell<'static> {
    Cell::from(Line::from(text.into()).alignment(Alignment::Right))
}

/// What else is to be known about a node.
fn remarks(node: &NodeInfo) -> String {
    let mut words = Vec::new();
    if node.blocked {
        words.push("block".to_string());
    }
    if node.stay {
        words.push("stay".into());
    }
    if node.state != "down" && node.age_ms > 10_000 {
        words.push("old".into());
    }
    words.join(" ")
}

/// Over all that are not down.
fn totals(monitor: &Monitor, wide: bool) -> Row<'static> {
    let up: Vec<&NodeInfo> = monitor.snapshot.nodes.iter().filter(|node| node.state != "down").collect();
    let cpus: f64 = up.iter().map(|node| node.cpus).sum();
    let sum = |of: fn(&NodeInfo) -> u64| up.iter().map(|node| of(node)).fold(0u64, u64::saturating_add);
    let (memory, taken) = (sum(|node| node.mem_total_bytes), sum(used));
    let busy: f64 = up.iter().map(|node| node.cpu_pct * node.cpus).sum::<f64>() / cpus.max(1e-9);
    let speed = sum(|node| u64::from(node.speed));
    let value = match monitor.bars {
        Bars::Load => format!("{:.2}", up.iter().map(|node| node.load).sum::<f64>()),
        Bars::Speed => speed.to_string(),
        Bars::Memory => format!("{:.0}%", taken as f64 / memory.max(1) as f64 * 100.0),
        Bars::Utilisation => format!("{busy:.0}%"),
    };
    let mut cells = vec![
        right(""),
        Cell::from("all"),
        Cell::from(format!("{} up", up.len())),
        Cell::from(""),
        right(value),
    ];
    if wide {
        cells.extend([right(speed.to_string()), right(format!("{cpus:.1}")), right(format!("{busy:.0}%"))]);
        cells.push(right(format!("{}/{}", bytes_short(taken), bytes_short(memory))));
    }
    cells.push(right(sum(|node| u64::from(node.guests_out)).to_string()));
    cells.push(right(sum(|node| u64::from(node.guests_in)).to_string()));
    Row::new(cells)
}

fn standing(
    monitor: &Monitor,
    palette: Palette,
    frame: &mut Frame<'_>,
    area: Rect,
    nodes: &[&NodeInfo],
    scale: f64,
) {
    let (chart_area, foot) = if monitor.totals && area.height > 4 {
        let row = Rect { y: area.bottom() - 1, height: 1, ..area };
        (Rect { height: area.height - 1, ..area }, Some(row))
    } else {
        (area, None)
    };
    // Names if there is room for them, else numbers.
    let longest = nodes.iter().map(|node| node.name.chars().count()).max().unwrap_or(1) as u16;
    let named = (longest.max(5) + 1).saturating_mul(nodes.len().min(1000) as u16) <= area.width;
    let width = if named { longest.max(5) } else { 5 };
    let bars: Vec<Bar<'_>> = nodes
        .iter()
        .take(usize::from(area.width / (width + 1)).max(1))
        .map(|node| {
            let label = if named { clean(&node.name) } else { node.number.to_string() };
            let style = style(monitor.bars, node, palette);
            Bar::default()
                .value((measure(monitor.bars, node) / scale * 1000.0).min(1e9) as u64)
                .text_value(in_words(monitor.bars, node))
                .label(Line::from(label))
                .style(style)
                .value_style(style.add_modifier(ratatui::style::Modifier::REVERSED))
        })
        .collect();
    let chart =
        BarChart::default().data(BarGroup::default().bars(&bars)).bar_width(width).bar_gap(1).max(1000);
    frame.render_widget(chart, chart_area);
    if let Some(row) = foot {
        let widths = [3, 5, 7, 1, 8, 8, 6, 5, 12, 4, 4].map(Constraint::Length);
        frame.render_widget(Table::new([totals(monitor, true).style(palette.head())], widths), row);
    }
}
