//! What a parent has heard of a child's stops.

use serde::{Deserialize, Serialize};

/// Which reports of wait(2) it still has to come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportImage {
    /// It is stopped, and its parent has taken note of that (`WUNTRACED`).
    pub stop_taken: bool,
    /// It runs again after a stop, and its parent has not taken note of that (`WCONTINUED`).
    pub continued: bool,
}
