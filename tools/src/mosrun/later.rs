//! Options that belong to mosrun and do nothing yet. They are refused by name instead of being taken
//! for a mistake, and the help does not show them.

use migd::api::{ApiError, ErrorKind};
use std::ffi::OsString;

/// See the module.
#[derive(Debug, Default, clap::Args)]
pub struct Later {
    #[arg(long, hide = true)]
    spread: bool,
    #[arg(short = 'A', long, value_name = "DUR", hide = true)]
    checkpoint_every: Option<OsString>,
    #[arg(short = 'N', long, value_name = "N", hide = true)]
    keep: Option<OsString>,
    #[arg(short = 'C', long, value_name = "DIR|URL", hide = true)]
    checkpoint_to: Option<OsString>,
    #[arg(long, value_name = "WHEN", hide = true)]
    restart: Option<OsString>,
    #[arg(short = 'R', long, value_name = "IMAGE", hide = true)]
    restore: Option<OsString>,
    #[arg(short = 'I', long, value_name = "IMAGE", hide = true)]
    inspect: Option<OsString>,
}

impl Later {
    /// An error if any of them was given.
    pub fn refused(&self) -> Option<ApiError> {
        let image = "leave it out; images are the business of `migckpt`";
        let plain = "leave it out";
        let (option, next) = [
            (self.spread, "--spread", plain),
            (self.checkpoint_every.is_some(), "-A (--checkpoint-every)", image),
            (self.keep.is_some(), "-N (--keep)", image),
            (self.checkpoint_to.is_some(), "-C (--checkpoint-to)", image),
            (self.restart.is_some(), "--restart", plain),
            (self.restore.is_some(), "-R (--restore)", "use `migckpt restore IMAGE`"),
            (self.inspect.is_some(), "-I (--inspect)", "use `migckpt inspect IMAGE`"),
        ]
        .into_iter()
        .find_map(|(given, option, next)| given.then_some((option, next)))?;
        let why = format!("{option} is not in this version");
        Some(crate::output::error(ErrorKind::Usage, "nothing was started", &why, next))
    }
}
