//! Draws the monitor. Any size is drawn: panes shrink, columns that do not fit are left out.

use super::monitor::{Link, Monitor, Pane, Popup, Prompt};
use crate::output::clean;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, BorderType, Clear, Paragraph};

mod migrations;
mod nodes;
mod processes;

/// The keys, for `?`.
const KEYS: [(&str, &str); 19] = [
    ("l s m u", "bars show load, speed, memory, utilisation"),
    ("v w", "bars stand, lie"),
    ("d", "nodes that are down too"),
    ("t", "totals"),
    ("Tab", "next pane"),
    ("↑ ↓ PgUp PgDn", "choose, scroll"),
    ("", ""),
    ("M", "move the chosen process; Enter alone: to the best node"),
    ("H", "move it home"),
    ("P", "pin it where it is, or unpin it"),
    ("e", "explain what moving it would take"),
    ("y", "why the balancer left or moved it"),
    ("", ""),
    ("/", "filter: what contains this (job, command, user, node)"),
    ("Esc", "no filter"),
    ("", ""),
    ("?", "this"),
    ("Ctrl-Z", "stop, as a shell's job"),
    ("q Ctrl-C", "quit"),
];

/// Colours, or none.
#[derive(Debug, Clone, Copy)]
pub struct Palette {
    coloured: bool,
}

impl Palette {
    /// With colours unless NO_COLOR says otherwise (no-color.org: set and not empty).
    pub fn of_environment() -> Palette {
        Palette { coloured: std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) }
    }

    fn colour(self, colour: Color) -> Style {
        if self.coloured { Style::new().fg(colour) } else { Style::new() }
    }

    fn good(self) -> Style {
        self.colour(Color::Green)
    }

    fn busy(self) -> Style {
        self.colour(Color::Yellow)
    }

    fn bad(self) -> Style {
        self.colour(Color::Red).add_modifier(Modifier::BOLD)
    }

    fn away(self) -> Style {
        self.colour(Color::Cyan)
    }

    fn faint(self) -> Style {
        Style::new().add_modifier(Modifier::DIM)
    }

    fn head(self) -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    /// For how much of something is used, 0 to 1.
    fn level(self, share: f64) -> Style {
        match share {
            _ if share >= 0.9 => self.colour(Color::Red),
            _ if share >= 0.6 => self.busy(),
            _ => self.good(),
        }
    }
}

/// Draws everything.
pub fn draw(monitor: &Monitor, palette: &Palette, frame: &mut Frame<'_>) {
    let area = frame.area();
    let room = area.height.saturating_sub(2);
    let moving = (monitor.snapshot.migrations.len() as u16 + 2).clamp(3, (room / 4).max(3));
    let [head, top, middle, bottom, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(nodes::height(monitor, room)),
        Constraint::Min(3),
        Constraint::Length(moving),
        Constraint::Length(1),
    ])
    .areas(area);
    frame.render_widget(Paragraph::new(headline(monitor, *palette)), head);
    nodes::draw(monitor, *palette, frame, top);
    processes::draw(monitor, *palette, frame, middle);
    migrations::draw(monitor, *palette, frame, bottom);
    frame.render_widget(Paragraph::new(footline(monitor, *palette)), foot);
    if let Some(popup) = &monitor.popup {
        draw_popup(popup, *palette, frame);
    }
}

/// The first line: where, and how the whole cluster is.
fn headline(monitor: &Monitor, palette: Palette) -> Line<'static> {
    let snapshot = &monitor.snapshot;
    let mut spans = vec![Span::styled(format!(" {} ", clean(&snapshot.node)), palette.head())];
    if let Link::Lost(why) = &monitor.link {
        let text = format!(" the daemon does not answer: {}; trying again", clean(why));
        spans.push(Span::styled(text, palette.bad()));
        return Line::from(spans);
    }
    let count = |state: &str| snapshot.nodes.iter().filter(|node| node.state == state).count();
    spans.push(Span::raw(format!(" {} up", plural(count("up"), "node"))));
    for (state, style) in [("suspect", palette.busy()), ("down", palette.bad())] {
        if count(state) > 0 {
            spans.push(Span::styled(format!(", {} {state}", count(state)), style));
        }
    }
    let away = snapshot.processes.iter().filter(|process| process.home != process.node).count();
    spans.push(Span::raw(format!(" · {}, ", plural_es(snapshot.processes.len()))));
    spans.push(Span::styled(format!("{away} away"), palette.away()));
    let moving = monitor.in_flight().count();
    if moving > 0 {
        spans.push(Span::styled(format!(", {moving} moving"), palette.busy()));
    }
    if !monitor.filter.is_empty() {
        spans.push(Span::styled(format!(" · only “{}”", clean(&monitor.filter)), palette.busy()));
    }
    Line::from(spans)
}

fn plural(n: usize, word: &str) -> String {
    format!("{n} {word}{}", if n == 1 { "" } else { "s" })
}

fn plural_es(n: usize) -> String {
    format!("{n} process{}", if n == 1 { "" } else { "es" })
}

/// The last line: what is typed, what was answered, or which keys there are.
fn footline(monitor: &Monitor, palette: Palette) -> Line<'static> {
    match &monitor.prompt {
        Some((Prompt::Filter, text)) => Line::from(format!(" /{}▏ Enter keeps, Esc clears", clean(text))),
        Some((Prompt::Move(pid), text)) => {
            let up = monitor.snapshot.nodes.iter().filter(|node| node.state == "up");
            let names: Vec<&str> = up.map(|node| node.name.as_str()).chain(["home", "best"]).collect();
            let ask = Span::styled(format!(" move {pid} to [best]: {}▏", clean(text)), palette.head());
            Line::from(vec![ask, Span::styled(format!("  {}", clean(&names.join(" "))), palette.faint())])
        }
        None if !monitor.message.is_empty() => {
            Line::from(Span::styled(format!(" {}", clean(&monitor.message)), palette.head()))
        }
        None => {
            let keys = [
                ("q", "quit"),
                ("?", "keys"),
                ("Tab", "pane"),
                ("M", "move"),
                ("H", "home"),
                ("P", "pin"),
                ("e", "explain"),
                ("/", "filter"),
                ("lsmu", "bars"),
                ("vw", "layout"),
            ];
            let spans = keys.into_iter().flat_map(|(key, what)| {
                [Span::styled(format!(" {key} "), palette.head()), Span::styled(what, palette.faint())]
            });
            Line::from(spans.collect::<Vec<_>>())
        }
    }
}

/// A pane's frame; the one the arrows act on is told from the others.
fn pane(monitor: &Monitor, palette: Palette, pane: Pane, title: String) -> Block<'static> {
    let block = Block::bordered().border_type(BorderType::Rounded);
    if monitor.pane == pane {
        block.title(Span::styled(title, palette.head())).border_style(palette.away())
    } else {
        block.title(title).border_style(palette.faint())
    }
}

fn draw_popup(popup: &Popup, palette: Palette, frame: &mut Frame<'_>) {
    let (title, lines): (String, Vec<Line<'static>>) = match popup {
        Popup::Help => {
            let line = |(keys, what): (&str, &str)| {
                Line::from(vec![
                    Span::styled(format!("{keys:>14}  "), palette.head()),
                    Span::raw(what.to_string()),
                ])
            };
            (" keys ".into(), KEYS.into_iter().map(line).collect())
        }
        Popup::Text(title, lines) => {
            (format!(" {} ", clean(title)), lines.iter().map(|line| Line::from(clean(line))).collect())
        }
    };
    let area = frame.area();
    let widest = lines.iter().map(Line::width).max().unwrap_or(0).max(title.chars().count()) + 4;
    let width = (widest.min(usize::from(u16::MAX)) as u16).clamp(1, area.width.max(1));
    // Lines too long are wrapped: reserve what they may take.
    let inside = usize::from(width.saturating_sub(4).max(1));
    let tall: usize = lines.iter().map(|line| line.width().div_ceil(inside).max(1)).sum();
    let height = ((tall + 2).min(usize::from(u16::MAX)) as u16).min(area.height);
    let place = Rect {
        x: area.x + (area.width.saturating_sub(width)) / 2,
        y: area.y + (area.height.saturating_sub(height)) / 2,
        width: width.min(area.width),
        height,
    };
    let block = Block::bordered()
        .border_type(BorderType::Rounded)
        .border_style(palette.away())
        .title(Span::styled(title, palette.head()))
        .title_bottom(Span::styled(" any key closes ", palette.faint()))
        .padding(ratatui::widgets::Padding::horizontal(1));
    frame.render_widget(Clear, place);
    let text = Paragraph::new(lines).wrap(ratatui::widgets::Wrap { trim: false });
    frame.render_widget(text.block(block), place);
}

#[cfg(test)]
mod tests;
