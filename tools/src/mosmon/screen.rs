//! The terminal: taken at the start, given back at every end (keys, signals, errors, panics), and lent
//! to the shell while the monitor is stopped.

use super::feed::{Feed, News};
use super::monitor::{Link, Monitor, Wish};
use super::view;
use crate::arguments::Socket;
use crate::output;
use migd::api::{ApiError, ErrorKind, Request, Response};
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use std::io::{self, IsTerminal};
use std::time::Duration;

/// News and signals are looked at so often; keys at once.
const TICK: Duration = Duration::from_millis(100);
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
    let signals = signals().map_err(|errno| broken(errno.into()))?;
    let feed = Feed::start(socket).map_err(broken)?;
    // Takes care of panics too: the terminal is given back before the message.
    let mut terminal = ratatui::try_init().map_err(broken)?;
    let result = show(&mut terminal, Monitor::new(snapshot), &feed, &signals);
    ratatui::restore();
    if let Some(signal) = result.map_err(broken)? {
        // Whoever waits for this program learns what has ended it.
        SigSet::from(signal).thread_unblock().and_then(|()| raise(signal)).map_err(|e| broken(e.into()))?;
    }
    Ok(())
}

fn signals() -> nix::Result<SignalFd> {
    let ending = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGTSTP];
    let set: SigSet = ending.into_iter().collect();
    set.thread_block()?;
    SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
}

fn show(
    terminal: &mut DefaultTerminal,
    mut monitor: Monitor,
    feed: &Feed,
    signals: &SignalFd,
) -> io::Result<Option<Signal>> {
    let palette = view::Palette::of_environment();
    let mut quiet = HEAL_TICKS;
    loop {
        if quiet == 0 || quiet >= HEAL_TICKS {
            terminal.draw(|frame| view::draw(&monitor, &palette, frame))?;
            quiet = 0;
        }
        quiet += 1;
        if event::poll(TICK)? {
            quiet = 0;
            match event::read()? {
                Event::Key(key) if key.kind == KeyEventKind::Press => match monitor.key(key) {
                    Wish::Draw => {}
                    Wish::Quit => return Ok(None),
                    Wish::Suspend => suspend(terminal)?,
                    Wish::Ask(request, doing) => {
                        monitor.message = format!("{doing} …");
                        if !feed.ask(request, doing) {
                            monitor.message = "the daemon is still busy with what was asked before".into();
                        }
                    }
                },
                _ => {}
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
        if let Ok(Some(signal)) = signals.read_signal() {
            if signal.ssi_signo != Signal::SIGTSTP as u32 {
                return Ok(Signal::try_from(signal.ssi_signo as i32).ok());
            }
            suspend(terminal)?;
            quiet = 0;
        }
    }
}

/// Gives the terminal back, stops, and takes it again when continued.
fn suspend(terminal: &mut DefaultTerminal) -> io::Result<()> {
    ratatui::restore();
    // SIGTSTP is blocked here; the shell sees a stop either way.
    raise(Signal::SIGSTOP)?;
    *terminal = ratatui::try_init()?;
    terminal.clear()
}
