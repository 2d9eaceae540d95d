//! The verbs that print.

use super::snapshot;
use crate::migrate::in_words;
use crate::output::{self, unexpected};
use crate::quantity;
use migd::api::{ApiError, ErrorKind, NodeInfo, Request, Response, Snapshot};
use migd::client::Client;
use std::time::Duration;

/// This node in a few lines.
pub fn status(client: &mut Client, json: bool) -> Result<(), ApiError> {
    let snapshot = snapshot(client)?;
    let here = snapshot.nodes.iter().find(|node| node.name == snapshot.node);
    let moving = snapshot.migrations.iter().filter(|m| m.phase != "done" && m.phase != "failed").count();
    if json {
        output::json(&serde_json::json!({
            "node": snapshot.node,
            "this": here,
            "nodes_up": snapshot.nodes.iter().filter(|n| n.state == "up").count(),
            "processes": snapshot.processes.len(),
            "migrations_in_flight": moving,
        }));
        return Ok(());
    }
    output::line(&format!("node        {}", snapshot.node));
    if let Some(node) = here {
        output::line(&format!("address     {}", node.address));
        output::line(&format!(
            "load        {:.2} on {:.2} CPUs of speed {}",
            node.load, node.cpus, node.speed
        ));
        let free = quantity::bytes(node.mem_available_bytes);
        output::line(&format!("memory      {free} available of {}", quantity::bytes(node.mem_total_bytes)));
        output::line(&format!("guests      {} out, {} in", node.guests_out, node.guests_in));
        let switches = switches(node);
        if !switches.is_empty() {
            output::line(&format!("switches    {}", switches.join(", ")));
        }
    }
    let up = snapshot.nodes.iter().filter(|node| node.state == "up").count();
    output::line(&format!("cluster     {up} of {} nodes up", snapshot.nodes.len()));
    output::line(&format!("processes   {}, {moving} moving", snapshot.processes.len()));
    Ok(())
}

/// All nodes.
pub fn nodes(snapshot: &Snapshot, json: bool) -> Result<(), ApiError> {
    if json {
        output::json(&snapshot.nodes);
        return Ok(());
    }
    let headings =
        [" #", "NODE", "ADDRESS", "STATE", " LOAD", " SPEED", " CPUS", " FREE", " OUT", " IN", "SWITCHES"];
    let rows: Vec<Vec<String>> = snapshot.nodes.iter().map(row).collect();
    output::raw(&output::table(&headings, &rows));
    Ok(())
}

/// The switches that are on, as far as a node tells of them.
fn switches(node: &NodeInfo) -> Vec<&'static str> {
    [(node.blocked, "block"), (node.stay, "stay")]
        .into_iter()
        .filter_map(|(on, name)| on.then_some(name))
        .collect()
}

fn row(node: &NodeInfo) -> Vec<String> {
    vec![
        node.number.to_string(),
        node.name.clone(),
        node.address.clone(),
        node.state.clone(),
        format!("{:.2}", node.load),
        node.speed.to_string(),
        format!("{:.2}", node.cpus),
        quantity::bytes(node.mem_available_bytes),
        node.guests_out.to_string(),
        node.guests_in.to_string(),
        switches(node).join(","),
    ]
}

/// One node.
pub fn whois(snapshot: &Snapshot, wanted: &str, json: bool) -> Result<(), ApiError> {
    let host = |node: &NodeInfo| node.address.rsplit_once(':').map(|(host, _)| host.to_string());
    let found = snapshot.nodes.iter().find(|node| {
        (matches!(wanted, "here" | "home") && node.name == snapshot.node)
            || node.name == wanted
            || node.number.to_string() == wanted
            || node.address == wanted
            || host(node).as_deref() == Some(wanted)
    });
    let Some(node) = found else {
        let what = format!("no node is called {wanted}");
        return Err(output::error(ErrorKind::Failed, &what, "it is not a member", "see `mosctl nodes`"));
    };
    if json {
        output::json(node);
    } else {
        output::line(&format!("{} {} {} {}", node.number, node.name, node.address, node.state));
    }
    Ok(())
}

/// What the kernel and the host support.
pub fn doctor(client: &mut Client, json: bool) -> Result<(), ApiError> {
    let answer = client.call(&Request::Doctor)?;
    let Response::Doctor { checks } = answer else { return Err(unexpected(&answer)) };
    if json {
        output::json(&checks);
    } else {
        for check in &checks {
            output::line(&format!("{:<9} {:<28} {}", check.status, check.name, check.found));
            if !check.next.is_empty() {
                output::line(&format!("          next: {}", check.next));
            }
        }
    }
    match checks.iter().find(|check| check.status == "missing") {
        Some(check) => Err(output::error(
            ErrorKind::Failed,
            "something this node needs is missing",
            &format!("{}: {}", check.name, check.found),
            &check.next,
        )),
        None => Ok(()),
    }
}

/// The balancer's last decision.
pub fn why(client: &mut Client, pid: &str, json: bool) -> Result<(), ApiError> {
    let answer = client.call(&Request::Why { what: pid.into() })?;
    let Response::Why(report) = answer else { return Err(unexpected(&answer)) };
    if json {
        output::json(&report);
        return Ok(());
    }
    let target = report.target.as_ref().map_or(String::new(), |node| format!(" to {node}"));
    output::line(&format!("process {}: {}{target}: {}", report.pid, report.decision, report.reason));
    for (name, value) in &report.numbers {
        output::line(&format!("  {name:<28} {value:.3}"));
    }
    Ok(())
}

/// The balancer's settings.
pub fn policy(client: &mut Client, json: bool) -> Result<(), ApiError> {
    let answer = client.call(&Request::PolicyShow)?;
    let Response::Policy { settings } = answer else { return Err(unexpected(&answer)) };
    if json {
        output::json(&settings);
    } else {
        settings.iter().for_each(|(key, value)| output::line(&format!("{key}={value}")));
    }
    Ok(())
}

/// How long ago something ended.
fn when(unix_ms: u64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let secs = (now.as_millis() as u64).saturating_sub(unix_ms) / 1000;
    let text = match secs {
        0..120 => format!("{secs} s ago"),
        120..7200 => format!("{} min ago", secs / 60),
        7200..172_800 => format!("{} h ago", secs / 3600),
        _ => format!("{} d ago", secs / 86_400),
    };
    format!("{text:>10}")
}

/// Past migrations.
pub fn history(client: &mut Client, since: Option<Duration>, json: bool) -> Result<(), ApiError> {
    let answer = client.call(&Request::History { since_secs: since.map(|d| d.as_secs()) })?;
    let Response::History { migrations } = answer else { return Err(unexpected(&answer)) };
    if json {
        output::json(&migrations);
        return Ok(());
    }
    for migration in &migrations {
        let when = when(migration.ended_unix_ms);
        output::line(&format!("{when}  {:<9} {}", migration.cause, in_words(migration)));
    }
    Ok(())
}
