//! What every tool prints: lines, JSON, tables, errors in three parts; and its end.
//!
//! Words of others (command lines, names from the network) are printed with their control characters
//! replaced: a process' name must not be able to drive the terminal of who looks at it.

use migd::api::{ApiError, ErrorKind, Response};
use std::fmt::Write as _;
use std::io::{self, Write};
use std::process::ExitCode;

/// Prints an error (what, why, what next) and gives its exit code.
pub fn fail(tool: &str, error: &ApiError) -> ExitCode {
    // Standard error may be closed or full; there is nobody left to tell then.
    let _ = io::stderr().lock().write_all(in_three_parts(tool, error).as_bytes());
    ExitCode::from(error.kind.exit_code() as u8)
}

/// What failed, why, what to do next.
pub fn in_three_parts(tool: &str, error: &ApiError) -> String {
    let mut text = format!("{tool}: {}\n", clean(&error.what));
    if error.blockers.is_empty() {
        let _ = writeln!(text, "  why:  {}", clean(&error.why));
    }
    for blocker in &error.blockers {
        let _ = writeln!(text, "  why:  {}: {}", clean(&blocker.kind), clean(&blocker.what));
    }
    if !error.next.is_empty() {
        let _ = writeln!(text, "  next: {}", clean(&error.next));
    }
    text
}

/// An error of the tool's own.
pub fn error(kind: ErrorKind, what: &str, why: &str, next: &str) -> ApiError {
    ApiError { kind, what: what.into(), why: why.into(), next: next.into(), blockers: Vec::new() }
}

/// The daemon answered something else.
pub fn unexpected(response: &Response) -> ApiError {
    error(
        ErrorKind::Failed,
        "the daemon gave an answer that does not belong to the question",
        &format!("{response:?}").chars().take(200).collect::<String>(),
        "are the tools and the daemon of the same version? see `mosctl status`",
    )
}

/// Ends a tool: nothing to say, or an error.
pub fn end(tool: &str, result: Result<(), ApiError>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(tool, &error),
    }
}

/// Prints one JSON document, on a line of its own.
pub fn json<T: serde::Serialize>(value: &T) {
    match serde_json::to_string(value) {
        Ok(text) => raw(&format!("{text}\n")),
        Err(error) => unwritable(&io::Error::other(error)),
    }
}

/// Prints a line.
pub fn line(text: &str) {
    raw(&format!("{}\n", clean(text)));
}

/// Prints text as it is.
pub fn raw(text: &str) {
    let mut out = io::stdout().lock();
    if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        drop(out);
        unwritable(&error);
    }
}

/// Output that nobody can read ends the tool: a reader that has gone as SIGPIPE would have, a full disk
/// with a word.
fn unwritable(error: &io::Error) -> ! {
    if error.kind() == io::ErrorKind::BrokenPipe {
        checkpoint::sys::sigpipe::restore();
        let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGPIPE);
        std::process::exit(1);
    }
    let tool = std::env::args_os().next().unwrap_or_default();
    let tool = std::path::Path::new(&tool).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let next = "is the disk full? send the output somewhere else";
    let found = self::error(ErrorKind::Failed, "the output could not be written", &error.to_string(), next);
    let _ = fail(&tool, &found);
    std::process::exit(1)
}

/// Without control characters.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Columns that `text` takes on a terminal.
fn width(text: &str) -> usize {
    ratatui::text::Line::from(text).width()
}

/// Rows under headings, columns aligned; numbers belong to the right, so headings that begin with a
/// space are aligned to the right.
pub fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let heads = headings.iter().map(|h| h.trim_start().to_string()).collect();
    let rows: Vec<Vec<String>> =
        std::iter::once(heads).chain(rows.iter().map(|r| r.iter().map(|c| clean(c)).collect())).collect();
    let mut widths = vec![0; headings.len()];
    for row in &rows {
        for (most, cell) in widths.iter_mut().zip(row) {
            *most = width(cell).max(*most);
        }
    }
    let mut text = String::new();
    for row in &rows {
        let mut cells = String::new();
        for ((cell, most), heading) in row.iter().zip(&widths).zip(headings) {
            let space = " ".repeat(most - width(cell));
            let (before, after) =
                if heading.starts_with(' ') { (space, "".into()) } else { ("".into(), space) };
            let _ = write!(cells, "{before}{cell}{after}  ");
        }
        text.push_str(cells.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows =
            vec![vec!["a".into(), "1".into(), "x".into()], vec!["长い".into(), "20".into(), "".into()]];
        assert_eq!(table(&["NAME", " N", "C"], &rows), "NAME   N  C\na      1  x\n长い  20\n");
    }

    #[test]
    fn nobodys_words_drive_the_terminal() {
        let text = table(&["C"], &[vec!["\u{1b}[2Jrm\n".into()]]);
        assert!(!text.contains('\u{1b}') && text.lines().count() == 2, "{text:?}");
    }

    #[test]
    fn errors_have_three_parts() {
        let error = error(ErrorKind::Refused, "it was not done", "not yours", "ask root");
        assert_eq!(in_three_parts("x", &error), "x: it was not done\n  why:  not yours\n  next: ask root\n");
    }
}
