//! The tools' side of the daemon's API: blocking, one connection, one request at a time.

use crate::api::{ApiError, DEFAULT_SOCKET, ErrorKind, MAX_LINE, Request, Response, SOCKET_ENV};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// Which socket: the one given, else the environment's, else the usual one.
pub fn socket_path(given: Option<&Path>) -> PathBuf {
    match (given, std::env::var_os(SOCKET_ENV)) {
        (Some(path), _) => path.to_path_buf(),
        (None, Some(path)) if !path.is_empty() => PathBuf::from(path),
        _ => PathBuf::from(DEFAULT_SOCKET),
    }
}

/// A connection to the local daemon.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
    path: PathBuf,
}

impl Client {
    /// Connects to the daemon at `socket` (see [`socket_path`]).
    pub fn connect(socket: Option<&Path>) -> Result<Client, ApiError> {
        let path = socket_path(socket);
        let stream = UnixStream::connect(&path).map_err(|error| no_daemon(&path, &error))?;
        Ok(Client { reader: BufReader::new(stream), path })
    }

    /// The connection, so that `mosrun` can leave it open until its exec closes it.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.get_ref().as_fd()
    }

    /// Asks, and waits for the one answer. An error answer is an `Err`.
    pub fn call(&mut self, request: &Request) -> Result<Response, ApiError> {
        self.send(request)?;
        self.receive()
    }

    /// Asks, and hands every line of the answer to `each` until it says `false`, or until the last
    /// line (anything but [`Response::Progress`] and [`Response::Snapshot`]), which is returned.
    pub fn stream(
        &mut self,
        request: &Request,
        mut each: impl FnMut(&Response) -> bool,
    ) -> Result<Option<Response>, ApiError> {
        self.send(request)?;
        loop {
            let response = self.receive()?;
            match response {
                Response::Progress(_) | Response::Snapshot(_) => {
                    if !each(&response) {
                        return Ok(None);
                    }
                }
                last => return Ok(Some(last)),
            }
        }
    }

    fn send(&mut self, request: &Request) -> Result<(), ApiError> {
        let mut line = serde_json::to_vec(request).map_err(|error| self.lost(&error))?;
        line.push(b'\n');
        if line.len() > MAX_LINE {
            return Err(ApiError {
                kind: ErrorKind::Usage,
                what: "the request is too long".into(),
                why: format!("it has {} bytes, the limit is {MAX_LINE}", line.len()),
                next: "shorten the command line".into(),
                blockers: Vec::new(),
            });
        }
        self.reader.get_mut().write_all(&line).map_err(|error| self.lost(&error))
    }

    fn receive(&mut self) -> Result<Response, ApiError> {
        let mut line = Vec::new();
        let read = (&mut self.reader).take(MAX_LINE as u64 * 4).read_until(b'\n', &mut line);
        match read {
            Err(error) => return Err(self.lost(&error)),
            Ok(_) if line.last() != Some(&b'\n') => {
                return Err(self.lost(&io::Error::other("it closed the connection")));
            }
            Ok(_) => {}
        }
        match serde_json::from_slice(&line) {
            Ok(Response::Error(error)) => Err(error),
            Ok(response) => Ok(response),
            Err(error) => Err(self.lost(&error)),
        }
    }

    fn lost(&self, why: &dyn std::fmt::Display) -> ApiError {
        ApiError {
            kind: ErrorKind::Failed,
            what: format!("the daemon at {} did not answer", self.path.display()),
            why: why.to_string(),
            next: "see its log (`journalctl -u migd`), and try again".into(),
            blockers: Vec::new(),
        }
    }
}

fn no_daemon(path: &Path, error: &io::Error) -> ApiError {
    let (why, next) = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => (
            format!("no migd is running at {}", path.display()),
            "start one: `systemctl start migd`, or `migd` as root; or name its socket with --socket".into(),
        ),
        _ => (error.to_string(), format!("check the rights on {}", path.display())),
    };
    ApiError {
        kind: ErrorKind::Failed,
        what: "the local daemon cannot be reached".into(),
        why,
        next,
        blockers: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_daemon_the_error_says_how_to_start_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let error = Client::connect(Some(&folder.path().join("none"))).expect_err("nobody there");
        assert_eq!(error.kind.exit_code(), 1);
        assert!(error.why.contains("no migd is running") && error.next.contains("start"));
    }
}
