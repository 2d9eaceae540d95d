//! The figures, as a table in Markdown.

use std::fmt;
use std::time::Duration;

/// One line: the median, the best and the worst of all runs, and what was to be reached.
pub struct Figure {
    name: String,
    values: Vec<f64>,
    unit: &'static str,
    /// More is better.
    rising: bool,
    goal: Option<f64>,
}

impl Figure {
    pub fn time(name: &str, times: Vec<Duration>) -> Figure {
        let values = times.iter().map(|time| time.as_secs_f64() * 1e3).collect();
        Figure { name: name.into(), values, unit: "ms", rising: false, goal: None }
    }

    pub fn speed(name: &str, times: Vec<Duration>, bytes: u64) -> Figure {
        let gib = bytes as f64 / f64::from(1 << 30);
        let values = times.iter().map(|time| gib / time.as_secs_f64()).collect();
        Figure { name: name.into(), values, unit: "GiB/s", rising: true, goal: None }
    }

    pub fn percent(name: &str, ratios: Vec<f64>) -> Figure {
        let values = ratios.iter().map(|ratio| ratio * 1e2).collect();
        Figure { name: name.into(), values, unit: "%", rising: true, goal: None }
    }

    pub fn goal_ms(self, goal: f64) -> Figure {
        Figure { goal: Some(goal), ..self }
    }

    pub fn goal_percent(self, goal: f64) -> Figure {
        Figure { goal: Some(goal), ..self }
    }

    fn sorted(&self) -> Vec<f64> {
        let mut values = self.values.clone();
        values.sort_by(f64::total_cmp);
        if self.rising {
            values.reverse();
        }
        values
    }
}

/// All lines.
pub struct Table(Vec<Figure>);

impl Table {
    pub fn new() -> Table {
        Table(Vec::new())
    }

    /// Adds a figure, and says it at once.
    pub fn add(&mut self, figure: Figure) {
        eprintln!("{figure}");
        self.0.push(figure);
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let values = self.sorted();
        let (Some(best), Some(worst)) = (values.first(), values.last()) else { return Ok(()) };
        let median = values[values.len() / 2];
        write!(out, "| {} | {median:.1} {} | {best:.1} | {worst:.1} |", self.name, self.unit)?;
        match self.goal {
            Some(goal) => {
                let reached = if self.rising { median >= goal } else { median <= goal };
                let sign = if self.rising { "≥" } else { "≤" };
                write!(out, " {sign} {goal} {}: {} |", self.unit, if reached { "reached" } else { "missed" })
            }
            None => write!(out, " |"),
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "| figure | median | best | worst | wanted |\n|---|---|---|---|---|")?;
        self.0.iter().try_for_each(|figure| writeln!(out, "{figure}"))
    }
}
