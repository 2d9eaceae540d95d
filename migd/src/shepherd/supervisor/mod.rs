//! Placeholder until the supervisor lands.
use super::session::{IdentityQuestion, Reply};
use checkpoint::tracee::Tracee;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
/// x
pub trait SupervisorHooks: Send + Sync {
    /// x
    fn identity(&self, question: IdentityQuestion) -> io::Result<i64>;
    /// x
    fn terminal(&self, handle: u64, request: u64, value: u64, bytes: &[u8]) -> io::Result<Reply>;
    /// x
    fn retreat(&self, reason: String);
}
/// x
pub struct Supervisor;
impl Supervisor {
    /// x
    pub fn start(_l: OwnedFd, _pid: i32, _h: Arc<dyn SupervisorHooks>) -> io::Result<Supervisor> {
        Ok(Supervisor)
    }
}
/// x
pub fn install(_t: &mut Tracee, _pid: i32) -> io::Result<OwnedFd> {
    Ok(std::fs::File::open("/dev/null")?.into())
}
