//! The policy's settings, readable and settable by name.

use std::collections::BTreeMap;

macro_rules! settings {
    ($($(#[$doc:meta])* $name:ident: $kind:ty = $value:expr;)*) => {
        /// Everything that can be tuned.
        #[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(default)]
        pub struct Settings {
            $($(#[$doc])* pub $name: $kind,)*
        }

        impl Default for Settings {
            fn default() -> Self {
                Settings { $($name: $value,)* }
            }
        }

        impl Settings {
            /// All names and values as text.
            pub fn show(&self) -> BTreeMap<String, String> {
                BTreeMap::from([$((stringify!($name).to_string(), self.$name.to_string()),)*])
            }

            /// Sets one; the error says what was wrong.
            pub fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
                match name {
                    $(stringify!($name) => {
                        self.$name = value.parse::<$kind>()
                            .map_err(|error| format!("`{value}` is no value for `{name}`: {error}"))?;
                    })*
                    _ => return Err(format!("`{name}` is not a setting")),
                }
                Ok(())
            }
        }
    };
}

settings! {
    /// Balance at all.
    balance: bool = true;
    /// Time between decisions, ms.
    tick_ms: u64 = 1000;
    /// Minimum stay of a process after its start and after each move, ms.
    residency_ms: u64 = 3000;
    /// Move only if the marginal cost becomes at most this part of what it is.
    hysteresis: f64 = 0.5;
    /// The gain must exceed the cost of moving this many times.
    gain_factor: f64 = 2.0;
    /// Arrivals that a node may get in `arrival_window_ms`.
    max_arrivals: usize = 2;
    /// See `max_arrivals`.
    arrival_window_ms: u64 = 2000;
    /// How far load figures lag behind, ms.
    lag_ms: u64 = 2000;
    /// Load figures older than this are not used, ms.
    max_age_ms: u64 = 10_000;
    /// A process that had to come home for a system call stays this long, doubled each time.
    retreat_backoff_ms: u64 = 5000;
    /// Assumed rate of a move, bytes a second, until it is measured.
    move_bytes_per_sec: f64 = 400e6;
    /// Time of a move that does not depend on its size, ms.
    move_fixed_ms: f64 = 100.0;
    /// A node with less than this part of its memory available gives processes up.
    memory_low: f64 = 0.04;
    /// CPU use (per cent of one CPU) below which a process is not worth moving for load.
    min_cpu_pct: f64 = 3.0;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_name() {
        let mut settings = Settings::default();
        assert_eq!(settings.set("residency_ms", "7"), Ok(()));
        assert_eq!(settings.show()["residency_ms"], "7");
        assert!(settings.set("residency_ms", "x").is_err());
        assert!(settings.set("nonsense", "1").is_err());
    }
}
