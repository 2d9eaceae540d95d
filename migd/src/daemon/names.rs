//! What the words for nodes and processes mean: name, number, address, `home`, `best`, `here`;
//! PID at home, `job:NAME`, `job:NUMBER`.

use super::state::State;
use super::{Daemon, processes};
use crate::api::{ApiError, ErrorKind, NodeInfo};

/// Where a process is to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// A node by name; its own home by its name as well.
    Node(String),
    /// Where the policy finds it best.
    Best,
    /// Wherever the balancer wants it.
    Balance,
}

/// Who asks, by the kernel's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// Its user id.
    pub uid: u32,
    /// Its process.
    pub pid: i32,
}

impl Caller {
    /// The superuser.
    pub fn is_root(self) -> bool {
        self.uid == 0
    }
}

/// An error with everything a user needs.
pub fn error(
    kind: ErrorKind,
    what: impl Into<String>,
    why: impl Into<String>,
    next: impl Into<String>,
) -> ApiError {
    ApiError { kind, what: what.into(), why: why.into(), next: next.into(), blockers: Vec::new() }
}

/// Sorts `node2` before `node10`.
pub fn natural(name: &str) -> (String, u64, String) {
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let number = name[stem.len()..].parse().unwrap_or(0);
    (stem.to_string(), number, name.to_string())
}

/// The node meant by `text` among `nodes`.
pub fn find_node<'a>(nodes: &'a [NodeInfo], own: &str, text: &str) -> Result<&'a NodeInfo, ApiError> {
    let found = nodes.iter().find(|node| match text {
        "here" | "home" => node.name == own,
        _ => {
            let ip = node.address.rsplit_once(':').map_or("", |(ip, _)| ip);
            node.name == text || node.number.to_string() == text || node.address == text || ip == text
        }
    });
    found.ok_or_else(|| {
        let known: Vec<&str> = nodes.iter().map(|node| node.name.as_str()).collect();
        let what = format!("there is no node `{text}`");
        let why = format!("the cluster has {}", known.join(", "));
        error(ErrorKind::Failed, what, why, "see `mosctl nodes`")
    })
}

impl State {
    /// Where a user wants a process of this home to go. A node that is not up is refused here.
    pub fn destination(&self, text: &str) -> Result<Destination, ApiError> {
        match text {
            "best" => return Ok(Destination::Best),
            "balance" => return Ok(Destination::Balance),
            _ => {}
        }
        let nodes = self.nodes();
        let node = find_node(&nodes, &self.own.name, text)?;
        if node.state == "down" {
            let what = format!("node {} is down", node.name);
            let why = format!("nothing has been heard from {} for a while", node.address);
            return Err(error(ErrorKind::NodeDown, what, why, "see `mosctl nodes`; name another node"));
        }
        Ok(Destination::Node(node.name.clone()))
    }

    /// The names in a list such as `N1,N2,N5-N7` (elements already split), as node names.
    pub fn expand(&self, list: &[String]) -> Vec<String> {
        let nodes = self.nodes();
        let mut names = Vec::new();
        for element in list {
            let range = element.split_once('-').and_then(|(from, to)| {
                let (from, to) = (
                    find_node(&nodes, &self.own.name, from).ok()?,
                    find_node(&nodes, &self.own.name, to).ok()?,
                );
                Some(from.number..=to.number)
            });
            match (find_node(&nodes, &self.own.name, element), range) {
                (Ok(node), _) => names.push(node.name.clone()),
                (Err(_), Some(range)) => {
                    names.extend(nodes.iter().filter(|n| range.contains(&n.number)).map(|n| n.name.clone()));
                }
                // Not known (yet): kept as it was written.
                (Err(_), None) => names.push(element.clone()),
            }
        }
        names
    }
}

impl Daemon {
    /// The processes meant by `text`, each of which `caller` may act on. A plain process that is named
    /// by its PID becomes a job of its own, which the balancer leaves alone.
    pub(super) fn find_processes(&self, caller: Caller, text: &str) -> Result<Vec<i32>, ApiError> {
        let pids = match text.strip_prefix("job:") {
            Some(job) => {
                let members = self.lock().jobs.members(job);
                if members.is_empty() {
                    let why = "no process of a job of that name or number is at home here";
                    return Err(error(ErrorKind::Failed, format!("there is no {text}"), why, "see `mosps`"));
                }
                members
            }
            None => vec![self.find_process(caller, text)?],
        };
        let state = self.lock();
        for pid in &pids {
            let owner = state.jobs.processes.get(pid).map(|process| process.kept.uid);
            if !caller.is_root() && owner != Some(caller.uid) {
                return Err(somebody_elses(*pid));
            }
        }
        Ok(pids)
    }

    fn find_process(&self, caller: Caller, text: &str) -> Result<i32, ApiError> {
        let pid: i32 = text.parse().ok().filter(|pid| *pid > 0).ok_or_else(|| {
            let why = "a process is named by its PID at home, or job:NAME";
            error(ErrorKind::Usage, format!("`{text}` names no process"), why, "see `mosps`")
        })?;
        if self.lock().jobs.processes.contains_key(&pid) {
            return Ok(pid);
        }
        let stat = processes::read(pid, self.units).filter(|stat| stat.state != 'Z');
        let (Some(stat), Some(uid)) = (stat, processes::owner(pid)) else {
            let why = "no process has that PID on this node";
            return Err(error(ErrorKind::Failed, format!("there is no process {pid}"), why, "see `mosps`"));
        };
        if !caller.is_root() && uid != caller.uid {
            return Err(somebody_elses(pid));
        }
        if pid == 1 || pid == std::process::id() as i32 {
            let why = "it is part of what runs this node";
            return Err(error(
                ErrorKind::Refused,
                format!("process {pid} cannot be moved"),
                why,
                "name another",
            ));
        }
        self.take_in(&stat, uid);
        Ok(pid)
    }

    /// A process that has a shepherd is known, even if the daemon before us had no time to save it.
    pub(super) fn remember(&self, pid: i32) {
        if self.lock().jobs.processes.contains_key(&pid) {
            return;
        }
        if let (Some(stat), Some(uid)) = (processes::read(pid, self.units), processes::owner(pid)) {
            self.take_in(&stat, uid);
        }
    }

    /// Makes a process that nobody started with `mosrun` a job of its own.
    fn take_in(&self, stat: &processes::Stat, uid: u32) {
        let spec = crate::api::JobSpec {
            io_bound: true,
            command: vec![processes::command_line(stat.pid)],
            ..crate::api::JobSpec::default()
        };
        self.lock().jobs.register(&self.config.name, stat, uid, spec);
        self.save_now.notify_one();
    }
}

fn somebody_elses(pid: i32) -> ApiError {
    let why = "it belongs to another user";
    error(ErrorKind::Refused, format!("process {pid} is not yours"), why, "ask its owner, or be root")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_have_many_names() {
        let mut names = ["node10", "node2", "alpha", "node1"];
        names.sort_by_key(|name| natural(name));
        assert_eq!(names, ["alpha", "node1", "node2", "node10"]);
        let node = |name: &str, number, address: &str| NodeInfo {
            name: name.into(),
            number,
            address: address.into(),
            ..NodeInfo::default()
        };
        let nodes = [node("a", 1, "10.0.0.1:7700"), node("b", 2, "10.0.0.2:7700")];
        for text in ["b", "2", "10.0.0.2", "10.0.0.2:7700", "here", "home"] {
            assert_eq!(find_node(&nodes, "b", text).expect("found").name, "b", "{text}");
        }
        let error = find_node(&nodes, "b", "c").expect_err("unknown");
        assert_eq!(error.kind.exit_code(), 1);
        assert!(error.why.contains("a, b"));
    }
}
