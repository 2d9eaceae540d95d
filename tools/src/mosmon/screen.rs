//! The terminal: taken at the start, given back at every end (keys, signals, errors, panics), and lent
//! to the shell while the monitor is stopped.

use super::feed::{Feed, News};
use super::monitor::{Link, Monitor, Wish};
use super::{signals, view};
use crate::arguments::Socket;
use crate::output;
use migd::api::{ApiError, ErrorKind, Request, Response};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, raise};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::mpsc::Receiver;
use std::time::Duration;

/// News and signals are looked at so often, in milliseconds; keys at once.
const TICK_MS: u16 = 100;
/// Keys taken at a time (a pasted text is many), before anything else has its turn.
const KEYS_AT_ONCE: usize = 64;
/// Drawn anew after so many ticks even if nothing has come, so that a disturbed screen heals.
const HEAL_TICKS: u32 = 50;

fn broken(error: io::Error) -> ApiError {
    let next = "use `mosmon --once`, or another terminal";
    output::error(ErrorKind::Failed, "the terminal failed", &error.to_string(), next)
}

/// Runs until `q` or a signal.
pub fn run(socket: &Socket) -> Result<(), ApiError> {
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        let why = "standard input or output is not a terminal";
        return Err(output::error(ErrorKind::Failed, "nothing can be drawn", why, "use `mosmon --once`"));
    }
    let mut client = socket.connect()?;
    let answer = client.call(&Request::Snapshot)?;
    let Response::Snapshot(snapshot) = answer else { return Err(output::unexpected(&answer)) };
    drop(client);
    // Blocked before any thread exists, so that no other thread is ended by them.
    let signals = signals::take().map_err(broken)?;
    let feed = Feed::start(socket).map_err(broken)?;
    // Takes care of panics too: the terminal is given back before the message.
    let mut terminal = ratatui::try_init().map_err(broken)?;
    let result = show(&mut terminal, Monitor::new(snapshot), &feed, &signals);
    // Not `restore`, which panics if standard error has gone with the terminal.
    let _ = ratatui::try_restore();
    if let Some(signal) = result.map_err(broken)? {
        signals::end_by(signal);
    }
    Ok(())
}

/// Waits for a key or the tick. A terminal that has hung up is an error.
fn wait() -> io::Result<()> {
    let stdin = io::stdin();
    let mut keys = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    match poll(&mut keys, PollTimeout::from(TICK_MS)) {
        // A resize comes as a signal.
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
    match keys[0].revents() {
        Some(events) if events.intersects(gone) => Err(io::Error::other("it has hung up")),
        _ => Ok(()),
    }
}

/// Shows the cluster until a key or a signal (which is returned) ends it.
fn show(
    terminal: &mut DefaultTerminal,
    mut monitor: Monitor,
    feed: &Feed,
    signals: &Receiver<Signal>,
) -> io::Result<Option<Signal>> {
    let palette = view::Palette::of_environment();
    let mut quiet = HEAL_TICKS;
    loop {
        if quiet == 0 || quiet >= HEAL_TICKS {
            terminal.draw(|frame| view::draw(&monitor, &palette, frame))?;
            quiet = 0;
        }
        quiet += 1;
        wait()?;
        for _ in 0..KEYS_AT_ONCE {
            if !event::poll(Duration::ZERO)? {
                break;
            }
            quiet = 0;
            let Event::Key(key) = event::read()? else { continue };
            if key.kind != KeyEventKind::Press {
                continue;
            }
            match monitor.key(key) {
                Wish::Draw => {}
                Wish::Quit => return Ok(None),
                Wish::Suspend => suspend(terminal)?,
                Wish::Ask(request, doing) => {
                    monitor.message = format!("{doing} …");
                    if !feed.ask(request, doing) {
                        monitor.message = "the daemon is still busy with what was asked before".into();
                    }
                }
            }
        }
        while let Ok(news) = feed.news.try_recv() {
            quiet = 0;
            match news {
                News::Snapshot(snapshot) => monitor.heard(*snapshot),
                News::Lost(error) => monitor.link = Link::Lost(error.why),
                News::Answer(doing, answer) => monitor.answered(&doing, answer),
            }
        }
        match signals.try_recv() {
            Ok(Signal::SIGTSTP) => {
                suspend(terminal)?;
                quiet = 0;
            }
            Ok(signal) => return Ok(Some(signal)),
            Err(_) => {}
        }
    }
}

/// Gives the terminal back, stops, and takes it again when continued.
fn suspend(terminal: &mut DefaultTerminal) -> io::Result<()> {
    let _ = ratatui::try_restore();
    // SIGTSTP is blocked here; the shell sees a stop either way.
    raise(Signal::SIGSTOP)?;
    *terminal = ratatui::try_init()?;
    terminal.clear()
}
