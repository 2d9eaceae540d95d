use super::*;
use migd::api::{ApiError, Blocker, ErrorKind, Explanation};

/// Two nodes up and one down, three processes, a migration of each kind.
pub fn cluster() -> Snapshot {
    let node = |number, name: &str, state: &str, load, cpu_pct| NodeInfo {
        number,
        name: name.into(),
        state: state.into(),
        address: format!("10.0.0.{number}:7700"),
        load,
        cpu_pct,
        speed: 10_000,
        cpus: 2.0,
        mem_total_bytes: 16 << 30,
        mem_available_bytes: 4 << 30,
        ..NodeInfo::default()
    };
    let process = |pid, node: &str, state: &str, command: &str| ProcessInfo {
        pid,
        job: "work".into(),
        user: "ada".into(),
        home: "node1".into(),
        node: node.into(),
        state: state.into(),
        command: command.into(),
        visited: vec!["node1".into()],
        ..ProcessInfo::default()
    };
    let migration = |pid, phase: &str, error: Option<&str>| MigrationInfo {
        pid,
        from: "node1".into(),
        to: "node2".into(),
        phase: phase.into(),
        cause: "balancer".into(),
        bytes: 64 << 20,
        wire_bytes: 32 << 20,
        total_ms: 500.0,
        freeze_ms: 45.0,
        error: error.map(String::from),
        ..MigrationInfo::default()
    };
    Snapshot {
        node: "node1".into(),
        nodes: vec![
            node(1, "node1", "up", 1.5, 88.0),
            node(2, "node2", "up", 0.25, 12.0),
            node(3, "node3", "down", 0.0, 0.0),
        ],
        processes: vec![
            process(42, "node1", "running", "xz -9 big"),
            process(43, "node2", "running", "sort words"),
            process(44, "node1", "moving", "python3 table.py"),
        ],
        migrations: vec![
            migration(44, "copying", None),
            migration(43, "done", None),
            migration(42, "failed", Some("no route")),
        ],
    }
}

/// Presses a key.
pub fn press(monitor: &mut Monitor, code: KeyCode) -> Wish {
    monitor.key(KeyEvent::new(code, KeyModifiers::NONE))
}

fn types(monitor: &mut Monitor, text: &str) {
    text.chars().for_each(|letter| drop(press(monitor, KeyCode::Char(letter))));
}

fn asked(wish: Wish) -> serde_json::Value {
    match wish {
        Wish::Ask(request, _) => serde_json::to_value(&request).expect("encodes"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_chosen_process_is_moved_pinned_and_explained() {
    let mut monitor = Monitor::new(cluster());
    press(&mut monitor, KeyCode::Down);
    let home = asked(press(&mut monitor, KeyCode::Char('H')));
    assert_eq!((&home["what"], &home["to"], &home["no_wait"]), (&"43".into(), &"home".into(), &true.into()));
    assert!(matches!(press(&mut monitor, KeyCode::Char('M')), Wish::Draw));
    types(&mut monitor, "node2x");
    press(&mut monitor, KeyCode::Backspace);
    assert_eq!(asked(press(&mut monitor, KeyCode::Enter))["to"], "node2");
    press(&mut monitor, KeyCode::Char('M'));
    assert_eq!(asked(press(&mut monitor, KeyCode::Enter))["to"], "best");
    assert_eq!(asked(press(&mut monitor, KeyCode::Char('P')))["request"], "pin");
    monitor.snapshot.processes[1].locked = true;
    assert_eq!(asked(press(&mut monitor, KeyCode::Char('P')))["request"], "unpin");
    assert_eq!(asked(press(&mut monitor, KeyCode::Char('e')))["request"], "explain");
    assert_eq!(asked(press(&mut monitor, KeyCode::Char('y')))["request"], "why");
}

#[test]
fn guests_are_their_homes_business() {
    let mut monitor = Monitor::new(cluster());
    monitor.snapshot.processes[0].home = "node2".into();
    assert!(matches!(press(&mut monitor, KeyCode::Char('H')), Wish::Draw));
    assert!(monitor.message.contains("guest"), "{}", monitor.message);
}

#[test]
fn the_choice_stays_on_its_process_while_rows_move() {
    let mut monitor = Monitor::new(cluster());
    press(&mut monitor, KeyCode::Down);
    assert_eq!(monitor.process().map(|p| p.pid), Some(43));
    let mut next = cluster();
    next.processes.remove(0);
    monitor.heard(next.clone());
    assert_eq!(monitor.process().map(|p| p.pid), Some(43));
    next.processes.remove(0);
    monitor.heard(next.clone());
    assert_eq!(monitor.process().map(|p| p.pid), Some(44), "it has ended: the one in its place");
    next.processes.clear();
    monitor.heard(next);
    assert!(monitor.process().is_none());
    assert!(matches!(press(&mut monitor, KeyCode::Char('H')), Wish::Draw));
    for key in [KeyCode::Up, KeyCode::Down, KeyCode::PageDown, KeyCode::Home, KeyCode::End] {
        press(&mut monitor, key);
    }
}

#[test]
fn filters_as_it_is_typed() {
    let mut monitor = Monitor::new(cluster());
    press(&mut monitor, KeyCode::Char('/'));
    types(&mut monitor, "SORT");
    assert_eq!(monitor.processes().len(), 1);
    press(&mut monitor, KeyCode::Enter);
    assert_eq!((monitor.processes().len(), monitor.process().map(|p| p.pid)), (1, Some(43)));
    press(&mut monitor, KeyCode::Esc);
    assert_eq!(monitor.processes().len(), 3);
}

#[test]
fn keys_of_the_end() {
    let mut monitor = Monitor::new(cluster());
    assert!(matches!(press(&mut monitor, KeyCode::Char('q')), Wish::Quit));
    let ctrl = |letter| KeyEvent::new(KeyCode::Char(letter), KeyModifiers::CONTROL);
    assert!(matches!(monitor.key(ctrl('c')), Wish::Quit));
    assert!(matches!(monitor.key(ctrl('z')), Wish::Suspend));
    press(&mut monitor, KeyCode::Char('/'));
    assert!(matches!(press(&mut monitor, KeyCode::Char('q')), Wish::Draw), "typed, not meant");
    assert!(matches!(monitor.key(ctrl('c')), Wish::Quit), "even while typing");
}

#[test]
fn panes_take_turns_and_scroll() {
    let mut monitor = Monitor::new(cluster());
    press(&mut monitor, KeyCode::Tab);
    assert_eq!(monitor.pane, Pane::Migrations);
    press(&mut monitor, KeyCode::End);
    assert_eq!(monitor.scrolled, [0, 2]);
    press(&mut monitor, KeyCode::Tab);
    press(&mut monitor, KeyCode::Down);
    press(&mut monitor, KeyCode::Down);
    assert_eq!(monitor.scrolled, [1, 2], "two nodes are shown");
    press(&mut monitor, KeyCode::BackTab);
    assert_eq!(monitor.pane, Pane::Migrations);
}

#[test]
fn answers_are_told() {
    let mut monitor = Monitor::new(cluster());
    let blockers = vec![Blocker { kind: "fd".into(), what: "fd 5: TCP".into() }];
    let refused = ApiError {
        kind: ErrorKind::NotMigratable,
        what: "it cannot move".into(),
        why: "x".into(),
        next: "y".into(),
        blockers: blockers.clone(),
    };
    monitor.answered("moving 42", Err(refused));
    assert!(matches!(&monitor.popup, Some(Popup::Text(_, lines)) if lines[0].contains("fd 5: TCP")));
    let found = Explanation {
        pid: 42,
        pids: vec![42],
        to: "node2".into(),
        blockers,
        predicted_bytes: 1,
        predicted_ms: 1,
        predicted_freeze_ms: 1,
    };
    monitor.answered("what moving 42 would take", Ok(Response::Explain(found)));
    assert!(matches!(&monitor.popup, Some(Popup::Text(_, lines)) if lines[0].contains("cannot move")));
    monitor.answered("pinning 42", Ok(Response::Done));
    assert_eq!(monitor.message, "pinning 42: done");
}
