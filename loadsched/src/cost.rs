//! Opportunity cost.

/// Exponents over this are cut: far beyond any load, and safe in a double.
const MAX_EXPONENT: f64 = 500.0;

/// What a node has and what of it is used.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Use {
    /// Runnable threads.
    pub tasks: f64,
    /// CPUs × speed ÷ standard speed.
    pub power: f64,
    /// Memory in use, bytes.
    pub mem_used: f64,
    /// Memory there is, bytes.
    pub mem_total: f64,
}

/// Cost of a node in a cluster of `nodes`: `n^(tasks/power) + n^(memory used/total)`.
pub fn of_node(usage: Use, nodes: usize) -> f64 {
    let base = (nodes.max(2) as f64).ln();
    let term = |used: f64, capacity: f64| {
        let ratio = (used.max(0.0) / capacity.max(1e-6)).max(0.0);
        (base * ratio).min(MAX_EXPONENT).exp()
    };
    term(usage.tasks, usage.power) + term(usage.mem_used, usage.mem_total.max(1.0))
}

/// What a process of `tasks` and `bytes` adds to the cost.
pub fn marginal(usage: Use, tasks: f64, bytes: f64, nodes: usize) -> f64 {
    let with = Use { tasks: usage.tasks + tasks, mem_used: usage.mem_used + bytes, ..usage };
    (of_node(with, nodes) - of_node(usage, nodes)).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(tasks: f64) -> Use {
        Use { tasks, power: 1.0, mem_used: 0.0, mem_total: 1e9 }
    }

    #[test]
    fn rises_with_load_and_never_overflows() {
        let costs: Vec<f64> = (0..10).map(|n| marginal(usage(f64::from(n)), 1.0, 0.0, 3)).collect();
        assert!(costs.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(of_node(usage(1e12), 10_000).is_finite());
        assert!(of_node(Use { tasks: f64::NAN, ..usage(0.0) }, 0).is_finite());
    }
}
