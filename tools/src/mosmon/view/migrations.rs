//! Migrations: those in flight with their phase and rate, then the recent ones.

use super::{Palette, pane};
use crate::migrate::ratio;
use crate::mosmon::monitor::{Monitor, Pane, ended};
use crate::output::clean;
use crate::quantity::{bytes_short, millis};
use migd::api::MigrationInfo;
use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Rect};
use ratatui::style::Style;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Paragraph, Row, Table};

/// Draws the pane.
pub fn draw(monitor: &Monitor, palette: Palette, frame: &mut Frame<'_>, area: Rect) {
    let migrations = &monitor.snapshot.migrations;
    let moving = monitor.in_flight().count();
    let title = format!(" migrations · {moving} in flight, {} recent ", migrations.len() - moving);
    let block = pane(monitor, palette, Pane::Migrations, title);
    let inside = block.inner(area);
    frame.render_widget(block, area);
    if migrations.is_empty() {
        let text = Paragraph::new(Span::styled("none yet", palette.faint())).alignment(Alignment::Center);
        return frame.render_widget(text, inside);
    }
    let from = monitor.scrolled[1].min(migrations.len() - 1);
    let wide = inside.width >= 100;
    let way = migrations.iter().map(|m| m.from.chars().count() + m.to.chars().count() + 3).max().unwrap_or(0);
    let way = way.clamp(8, 30) as u16;
    let rows = migrations[from..].iter().take(usize::from(inside.height)).map(|migration| {
        let mut cells = vec![
            Cell::from(format!(" {}", clean(&migration.phase))),
            right(migration.pid.to_string()),
            Cell::from(clean(&format!("{} → {}", migration.from, migration.to))),
        ];
        if wide {
            cells.push(Cell::from(clean(&migration.cause)));
        }
        cells.push(Cell::from(figures(migration, wide)));
        Row::new(cells).style(style(migration, palette))
    });
    let mut widths = vec![11, 7, way];
    if wide {
        widths.push(9);
    }
    let widths = widths.into_iter().map(Constraint::Length).chain([Constraint::Fill(1)]);
    frame.render_widget(Table::new(rows, widths).column_spacing(1), inside);
}

fn right(text: String) -> Cell<'static> {
    Cell::from(Line::from(text).alignment(Alignment::Right))
}

fn style(migration: &MigrationInfo, palette: Palette) -> Style {
    match migration.phase.as_str() {
        "failed" => palette.bad(),
        "done" => Style::new(),
        _ => palette.busy(),
    }
}

/// Bytes, rate, ratio and times; or why it failed.
fn figures(migration: &MigrationInfo, wide: bool) -> String {
    if let Some(why) = &migration.error {
        return clean(why);
    }
    let mut words = vec![bytes_short(migration.bytes)];
    if migration.total_ms > 0.0 && migration.bytes > 0 {
        words.push(format!(
            "{}/s",
            bytes_short((migration.bytes as f64 / migration.total_ms * 1000.0) as u64)
        ));
    }
    if migration.wire_bytes > 0 {
        words.push(format!("ratio {:.1}", ratio(migration)));
    }
    words.push(millis(migration.total_ms));
    if ended(migration) {
        words.push(format!("frozen {}", millis(migration.freeze_ms)));
    }
    if wide && !migration.job.is_empty() {
        words.push(format!("job {}", clean(&migration.job)));
    }
    words.join(" · ")
}
