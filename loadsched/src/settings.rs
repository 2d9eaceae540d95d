//! What can be set about the policy, by name and as text.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The policy's settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// A process stays where it is for at least so long after a move, ms.
    pub min_residency_ms: u64,
    /// And for at least so many times what that move froze it, so that moving never takes more than this
    /// part of its time, however the load sways.
    pub residency_factor: u64,
    /// Younger processes are not looked at, ms: most end at once.
    pub min_age_ms: u64,
    /// A move must bring the marginal cost down to this part of what it is.
    pub hysteresis: f64,
    /// The gain must be so many times the cost of moving.
    pub gain_factor: f64,
    /// Base of the cost of a resource; the number of nodes if that is larger. With 300, four against two
    /// runnable threads on equal nodes are worth a move, and three against two are not.
    pub cost_base: f64,
    /// Guests on their way to one node at a time.
    pub max_arrivals: u64,
    /// Processes leaving one node at a time.
    pub max_departures: u64,
    /// A node whose figures are older is no target, ms.
    pub max_load_age_ms: u64,
    /// Processes that want less of a CPU than this stay.
    pub min_demand: f64,
    /// What a move carries in a second, for its predicted cost.
    pub bytes_per_sec: u64,
    /// What a move costs whatever its size, ms.
    pub move_fixed_ms: u64,
    /// A node with less of its memory free than this, per cent, is short of it.
    pub reserve_pct: f64,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            min_residency_ms: 3000,
            residency_factor: 10,
            min_age_ms: 1000,
            hysteresis: 0.5,
            gain_factor: 2.0,
            cost_base: 300.0,
            max_arrivals: 2,
            max_departures: 2,
            max_load_age_ms: 5000,
            min_demand: 0.3,
            bytes_per_sec: 200 << 20,
            move_fixed_ms: 200,
            reserve_pct: 5.0,
        }
    }
}

/// Why a setting was not changed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SettingsError {
    /// There is none of that name.
    #[error("there is no setting `{0}`")]
    Unknown(String),
    /// The value is not a number, or out of range.
    #[error("`{value}` is not {wanted}")]
    Value {
        /// What was given.
        value: String,
        /// What is wanted.
        wanted: &'static str,
    },
}

impl Settings {
    /// All of them, as text.
    pub fn show(&self) -> BTreeMap<String, String> {
        let pairs = [
            ("min_residency_ms", self.min_residency_ms.to_string()),
            ("residency_factor", self.residency_factor.to_string()),
            ("min_age_ms", self.min_age_ms.to_string()),
            ("hysteresis", self.hysteresis.to_string()),
            ("gain_factor", self.gain_factor.to_string()),
            ("cost_base", self.cost_base.to_string()),
            ("max_arrivals", self.max_arrivals.to_string()),
            ("max_departures", self.max_departures.to_string()),
            ("max_load_age_ms", self.max_load_age_ms.to_string()),
            ("min_demand", self.min_demand.to_string()),
            ("bytes_per_sec", self.bytes_per_sec.to_string()),
            ("move_fixed_ms", self.move_fixed_ms.to_string()),
            ("reserve_pct", self.reserve_pct.to_string()),
        ];
        pairs.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
    }

    /// Changes one; nothing is changed on an error.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), SettingsError> {
        match key {
            "min_residency_ms" => self.min_residency_ms = whole(value)?,
            "residency_factor" => self.residency_factor = whole(value)?,
            "min_age_ms" => self.min_age_ms = whole(value)?,
            "hysteresis" => self.hysteresis = between(value, 0.01, 1.0, "between 0.01 and 1")?,
            "gain_factor" => self.gain_factor = between(value, 0.0, 1e6, "0 or more")?,
            "cost_base" => self.cost_base = between(value, 1.1, 1e6, "between 1.1 and 1000000")?,
            "max_arrivals" => self.max_arrivals = whole(value)?,
            "max_departures" => self.max_departures = whole(value)?,
            "max_load_age_ms" => self.max_load_age_ms = whole(value)?,
            "min_demand" => self.min_demand = between(value, 0.0, 1e6, "0 or more")?,
            "bytes_per_sec" => self.bytes_per_sec = whole(value)?.max(1),
            "move_fixed_ms" => self.move_fixed_ms = whole(value)?,
            "reserve_pct" => self.reserve_pct = between(value, 0.0, 90.0, "between 0 and 90")?,
            _ => return Err(SettingsError::Unknown(key.to_string())),
        }
        Ok(())
    }
}

fn whole(value: &str) -> Result<u64, SettingsError> {
    let error = || SettingsError::Value { value: value.to_string(), wanted: "a whole number" };
    value.trim().parse().map_err(|_| error())
}

fn between(value: &str, least: f64, most: f64, wanted: &'static str) -> Result<f64, SettingsError> {
    let number = value.trim().parse().ok().filter(|number| (least..=most).contains(number));
    number.ok_or_else(|| SettingsError::Value { value: value.to_string(), wanted })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_that_is_shown_can_be_set() {
        let (mut settings, mut other) = (Settings::default(), Settings::default());
        for (key, value) in settings.clone().show() {
            settings.set(&key, &value).expect("its own value");
            assert!(other.set(&key, "nonsense").is_err());
            assert!(other.set(&key, "-1").is_err());
            assert!(other.set(&key, "NaN").is_err());
        }
        assert_eq!((&settings, &other), (&Settings::default(), &Settings::default()));
        assert!(matches!(settings.set("x", "1"), Err(SettingsError::Unknown(_))));
        settings.set("hysteresis", "0.8").expect("in range");
        assert_eq!(settings.show()["hysteresis"], "0.8");
    }
}
