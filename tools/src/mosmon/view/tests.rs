use super::*;
use crate::mosmon::monitor::tests::{cluster, press};
use migd::api::{MigrationInfo, NodeInfo};
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::KeyCode;

fn drawn(monitor: &Monitor, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
    terminal.draw(|frame| draw(monitor, &Palette { coloured: true }, frame)).expect("draws");
    terminal.backend().to_string()
}

#[test]
fn all_three_panes_are_there() {
    let text = drawn(&Monitor::new(cluster()), 140, 40);
    for wanted in [
        "2 nodes up, 1 down",
        "3 processes, 1 away, 1 moving",
        "nodes · load",
        "1.50",
        "12G/16G",
        "xz -9 big",
        "node1 → node2",
        "copying",
        "ratio 2.0",
        "frozen 45.0 ms",
        "no route",
        "q quit",
    ] {
        assert!(text.contains(wanted), "{wanted} is missing:\n{text}");
    }
    assert!(!text.contains("node3"), "what is down is not shown:\n{text}");
}

#[test]
fn bars_stand_lie_and_show_what_was_asked() {
    let mut monitor = Monitor::new(cluster());
    for (key, title, value) in
        [('s', "speed", "10000"), ('m', "memory used", "75%"), ('u', "CPU use", "88%"), ('l', "load", "1.50")]
    {
        for layout in ['v', 'w'] {
            press(&mut monitor, KeyCode::Char(key));
            press(&mut monitor, KeyCode::Char(layout));
            let text = drawn(&monitor, 120, 40);
            assert!(text.contains(title) && text.contains(value), "{key} {layout}:\n{text}");
        }
    }
    press(&mut monitor, KeyCode::Char('d'));
    assert!(drawn(&monitor, 120, 40).contains("node3"));
    press(&mut monitor, KeyCode::Char('t'));
    let text = drawn(&monitor, 120, 40);
    assert!(text.contains("2 up") && text.contains("1.75"), "{text}");
}

#[test]
fn a_bar_is_as_long_as_its_value() {
    let text = drawn(&Monitor::new(cluster()), 120, 30);
    let blocks = |name: &str| {
        let line = text.lines().find(|line| line.contains(name) && line.contains(" up ")).expect("its row");
        line.chars().filter(|c| *c == '█').count()
    };
    assert!(blocks("node1") > 5 * blocks("node2"), "{text}");
}

#[test]
fn help_prompts_and_answers_are_seen() {
    let mut monitor = Monitor::new(cluster());
    press(&mut monitor, KeyCode::Char('?'));
    assert!(drawn(&monitor, 100, 30).contains("any key closes"));
    press(&mut monitor, KeyCode::Char('x'));
    press(&mut monitor, KeyCode::Char('M'));
    let text = drawn(&monitor, 100, 30);
    assert!(text.contains("move 42 to [best]") && text.contains("node2 home best"), "{text}");
    press(&mut monitor, KeyCode::Esc);
    monitor.popup = Some(Popup::Text("blockers".into(), vec!["fd 5: a TCP connection".into()]));
    assert!(drawn(&monitor, 60, 20).contains("fd 5: a TCP connection"));
    monitor.popup = None;
    monitor.link = Link::Lost("gone".into());
    assert!(drawn(&monitor, 100, 30).contains("does not answer: gone"));
}

#[test]
fn any_size_and_any_content_is_drawn() {
    let mut full = cluster();
    for n in 0..300 {
        let name = format!("a-node-with-a-long-name-{n}");
        let (load, cpu_pct) = if n % 2 == 0 { (f64::NAN, f64::INFINITY) } else { (-1.0, -5.0) };
        full.nodes.push(NodeInfo { name, state: "up".into(), load, cpu_pct, ..NodeInfo::default() });
        full.migrations.push(MigrationInfo { total_ms: f64::NAN, bytes: u64::MAX, ..Default::default() });
    }
    for snapshot in [Default::default(), cluster(), full] {
        let mut monitor = Monitor::new(snapshot);
        for key in "vtdMwt?/".chars() {
            press(&mut monitor, KeyCode::Char(key));
            for (width, height) in [(1, 1), (2, 40), (5, 3), (20, 8), (79, 24), (300, 100), (400, 2)] {
                drawn(&monitor, width, height);
            }
        }
    }
}

#[test]
fn nobodys_command_drives_the_terminal() {
    let mut snapshot = cluster();
    snapshot.processes[0].command = "evil \u{1b}[2J\u{7}".into();
    snapshot.nodes[0].name = "n\u{1b}[31m".into();
    assert!(!drawn(&Monitor::new(snapshot), 120, 30).contains('\u{1b}'));
}
