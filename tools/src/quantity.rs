//! Sizes and times: as users write them, and as they like to read them.

use std::time::Duration;

/// Number and unit of `text`.
fn split<'a>(text: &'a str, what: &str) -> Result<(f64, &'a str), String> {
    let text = text.trim();
    let at = text.find(|c: char| c.is_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    match number.trim().parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok((number, unit)),
        _ => Err(format!("`{text}` is not {what}")),
    }
}

/// `10s`, `500ms`, `2m`, `1h`, `1d`; a bare number is seconds.
pub fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text, "a time (like 10s, 500ms, 2m, 1h)")?;
    let seconds = match unit {
        "" | "s" | "sec" => number,
        "us" => number / 1e6,
        "ms" => number / 1e3,
        "m" | "min" => number * 60.0,
        "h" => number * 3600.0,
        "d" => number * 86_400.0,
        _ => return Err(format!("`{unit}` is not a unit of time (ms, s, m, h, d)")),
    };
    // Beyond ten years nobody waits, and sums of times stay in range.
    if seconds > 315_360_000.0 {
        return Err(format!("`{text}` is too long a time"));
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| format!("`{text}` is out of range"))
}

/// `512M`, `2GiB`; a bare number is bytes; powers of 1024.
pub fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text, "a size (like 512M, 2G)")?;
    let unit = unit.to_ascii_lowercase();
    let shift = match unit.strip_suffix("ib").or(unit.strip_suffix('b')).unwrap_or(&unit) {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(format!("`{unit}` is not a unit of size (K, M, G, T)")),
    };
    let bytes = number * (1u64 << shift) as f64;
    if bytes > 1e18 {
        return Err(format!("`{text}` is out of range"));
    }
    Ok(bytes as u64)
}

/// Bytes in words: `1.5 GiB`.
pub fn bytes(n: u64) -> String {
    let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.iter().find(|(_, shift)| n >> shift > 0) {
        Some((unit, shift)) => format!("{:.1} {unit}", n as f64 / (1u64 << shift) as f64),
        None => format!("{n} B"),
    }
}

/// Bytes in at most six columns: `1.5G`.
pub fn bytes_short(n: u64) -> String {
    let units = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];
    match units.iter().find(|(_, shift)| n >> shift > 0) {
        Some((unit, shift)) => {
            let value = n as f64 / (1u64 << shift) as f64;
            if value < 9.95 { format!("{value:.1}{unit}") } else { format!("{value:.0}{unit}") }
        }
        None => format!("{n}B"),
    }
}

/// Milliseconds in words: `3.2 ms`, `1.25 s`, `2 m 05 s`.
pub fn millis(ms: f64) -> String {
    match ms {
        _ if !ms.is_finite() => "?".into(),
        _ if ms < 100.0 => format!("{ms:.1} ms"),
        _ if ms < 1000.0 => format!("{ms:.0} ms"),
        _ if ms < 60_000.0 => format!("{:.2} s", ms / 1000.0),
        _ => {
            let seconds = (ms / 1000.0) as u64;
            format!("{} m {:02} s", seconds / 60, seconds % 60)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("1.5"), Ok(Duration::from_millis(1500)));
        for wrong in ["", "x", "-1s", "1y", "nan", "inf", "1e99s", "9999999d", "é"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
        assert_eq!(
            [0.25, 250.0, 1250.0, 125_000.0].map(millis),
            ["0.2 ms", "250 ms", "1.25 s", "2 m 05 s"].map(String::from)
        );
    }

    #[test]
    fn sizes() {
        assert_eq!(size("2G"), Ok(2 << 30));
        assert_eq!(size("1.5KiB"), Ok(1536));
        assert_eq!(size("100 MB"), Ok(100 << 20));
        for wrong in ["", "1Q", "-5", "nan", "G", "99999999T"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!([512, 1536, 40 << 20, 3 << 40].map(bytes_short), ["512B", "1.5K", "40M", "3.0T"]);
    }
}
