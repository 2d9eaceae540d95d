//! The verbs that print.

use super::snapshot;
use crate::migrate::{in_words, unexpected};
use crate::output;
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
        let free = output::bytes(node.mem_available_bytes);
        output::line(&format!("memory      {free} available of {}", output::bytes(node.mem_total_bytes)));
        output::line(&format!("guests      {} out, {} in", node.guests_out, node.guests_in));
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
    let headings = ["#", "NODE", "ADDRESS", "STATE", "LOAD", "SPEED", "CPUS", "MEMORY FREE", "OUT", "IN", ""];
    let rows: Vec<Vec<String>> = snapshot.nodes.iter().map(row).collect();
    output::table(&headings, &rows);
    Ok(())
}

fn row(node: &NodeInfo) -> Vec<String> {
    let mut switches = Vec::new();
    if node.blocked {
        switches.push("block");
    }
    if node.stay {
        switches.push("stay");
    }
    vec![
        node.number.to_string(),
        node.name.clone(),
        node.address.clone(),
        node.state.clone(),
        format!("{:.2}", node.load),
        node.speed.to_string(),
        format!("{:.2}", node.cpus),
        output::bytes(node.mem_available_bytes),
        node.guests_out.to_string(),
        node.guests_in.to_string(),
        switches.join(","),
    ]
}

/// One node.
pub fn whois(snapshot: &Snapshot, wanted: &str, json: bool) -> Result<(), ApiError> {
    let host = |node: &NodeInfo| node.address.rsplit_once(':').map(|(host, _)| host.to_string());
    let found = snapshot.nodes.iter().find(|node| {
        node.name == wanted
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

/// Past migrations.
pub fn history(client: &mut Client, since: Option<Duration>, json: bool) -> Result<(), ApiError> {
    let answer = client.call(&Request::History { since_secs: since.map(|d| d.as_secs()) })?;
    let Response::History { migrations } = answer else { return Err(unexpected(&answer)) };
    if json {
        output::json(&migrations);
        return Ok(());
    }
    for migration in &migrations {
        let text = match &migration.error {
            Some(why) => {
                format!("process {} {} -> {}: failed: {why}", migration.pid, migration.from, migration.to)
            }
            None => in_words(migration),
        };
        output::line(&format!("{:<9} {text}", migration.cause));
    }
    Ok(())
}
