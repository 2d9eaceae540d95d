//! Moves that the load figures do not show yet.
//!
//! A decayed average and gossip lag behind: a node that has just sent three processes away still
//! looks full, and the one that got them still looks empty. Deciding by those figures makes
//! everything run to the same node, and back. So each own move corrects both ends, less and less.

/// A move made or ordered.
#[derive(Debug, Clone, PartialEq)]
pub struct Move {
    /// From which node.
    pub from: String,
    /// To which.
    pub to: String,
    /// Runnable threads it carried.
    pub tasks: f64,
    /// When, ms.
    pub at_ms: u64,
    /// Which process.
    pub pid: i32,
}

/// After this many time constants a correction is forgotten.
const FORGOTTEN: f64 = 5.0;

/// The moves of the last seconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Recent {
    moves: Vec<Move>,
}

impl Recent {
    /// Remembers a move.
    pub fn add(&mut self, made: Move) {
        self.moves.retain(|old| old.pid != made.pid || old.at_ms + 1000 < made.at_ms);
        self.moves.push(made);
    }

    /// Forgets what the figures show by now.
    pub fn forget(&mut self, now_ms: u64, lag_ms: u64) {
        let limit = (lag_ms as f64 * FORGOTTEN) as u64;
        self.moves.retain(|old| now_ms.saturating_sub(old.at_ms) < limit);
    }

    /// What must be added to a node's runnable threads (negative: it has lost some).
    pub fn correction(&self, node: &str, now_ms: u64, lag_ms: u64) -> f64 {
        let weight = |made: &Move| (-(now_ms.saturating_sub(made.at_ms) as f64) / lag_ms.max(1) as f64).exp();
        self.moves
            .iter()
            .map(|made| {
                let sign = f64::from(made.to == node) - f64::from(made.from == node);
                sign * made.tasks * weight(made)
            })
            .sum()
    }

    /// Arrivals at a node since `since_ms`.
    pub fn arrivals(&self, node: &str, since_ms: u64) -> usize {
        self.moves.iter().filter(|made| made.to == node && made.at_ms >= since_ms).count()
    }
}
