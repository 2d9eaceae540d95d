//! What every tool does alike: errors in three parts, JSON, sizes and times in words, tables.

use migd::api::{ApiError, ErrorKind};
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

/// Prints an error (what, why, what next) and gives its exit code.
pub fn fail(tool: &str, error: &ApiError) -> ExitCode {
    let mut err = std::io::stderr().lock();
    let _ = writeln!(err, "{tool}: {}", error.what);
    if error.blockers.is_empty() {
        let _ = writeln!(err, "  why:  {}", error.why);
    } else {
        for blocker in &error.blockers {
            let _ = writeln!(err, "  why:  {}", blocker.what);
        }
    }
    if !error.next.is_empty() {
        let _ = writeln!(err, "  next: {}", error.next);
    }
    ExitCode::from(error.kind.exit_code() as u8)
}

/// An error of the tool's own.
pub fn error(kind: ErrorKind, what: &str, why: &str, next: &str) -> ApiError {
    ApiError { kind, what: what.into(), why: why.into(), next: next.into(), blockers: Vec::new() }
}

/// Ends a tool: nothing to say, or an error.
pub fn end(tool: &str, result: Result<(), ApiError>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(tool, &error),
    }
}

/// Prints one JSON document; a closed pipe is the reader's choice.
pub fn json<T: serde::Serialize>(value: &T) {
    if let Ok(text) = serde_json::to_string(value) {
        line(&text);
    }
}

/// Prints a line.
pub fn line(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// Bytes in words.
pub fn bytes(n: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.iter().find(|(_, shift)| n >> shift > 0) {
        Some((unit, shift)) => format!("{:.1} {unit}", n as f64 / (1u64 << shift) as f64),
        None => format!("{n} B"),
    }
}

/// `10s`, `500ms`, `2m`, `1h`; a bare number is seconds.
pub fn duration(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 =
        number.parse().map_err(|_| format!("`{text}` is not a duration (like 10s, 500ms, 2m)"))?;
    let seconds = match unit {
        "" | "s" => number,
        "ms" => number / 1e3,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        "d" => number * 86_400.0,
        _ => return Err(format!("`{unit}` is not a unit of time (ms, s, m, h, d)")),
    };
    Duration::try_from_secs_f64(seconds).map_err(|_| format!("`{text}` is out of range"))
}

/// `512M`, `2GiB`; a bare number is bytes.
pub fn size(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().map_err(|_| format!("`{text}` is not a size (like 512M, 2G)"))?;
    let shift = match unit.trim_end_matches("iB").trim_end_matches('B') {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return Err(format!("`{unit}` is not a unit of size (K, M, G, T)")),
    };
    Ok((number.max(0.0) * (1u64 << shift) as f64) as u64)
}

/// Prints rows under headings, columns aligned.
pub fn table(headings: &[&str], rows: &[Vec<String>]) {
    let mut widths: Vec<usize> = headings.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let print = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (cell, width) in cells.zip(&widths) {
            text.push_str(&format!("{cell:<width$}  "));
        }
        line(text.trim_end());
    };
    print(&mut headings.iter().copied());
    for row in rows {
        print(&mut row.iter().map(String::as_str));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes_quantities() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert!(duration("x").is_err() && duration("-1s").is_err() && duration("1y").is_err());
        assert_eq!(size("2G"), Ok(2 << 30));
        assert_eq!(size("1.5KiB"), Ok(1536));
        assert!(size("1Q").is_err());
        assert_eq!(bytes(1536), "1.5 KiB");
    }
}
