//! What a process has registered for by membarrier(2).

use crate::tracee::Call;

/// `MEMBARRIER_CMD_GET_REGISTRATIONS`, Linux 6.3 on.
const GET_REGISTRATIONS: u64 = 1 << 9;
/// Commands that only a registered process may use, each with the one that registers.
const EXPEDITED: [(u64, u32); 3] = [(1 << 3, 1 << 4), (1 << 5, 1 << 6), (1 << 7, 1 << 8)];

/// What is asked, in the order in which [`registered`] takes the results. An older kernel tells by what
/// it lets the process do, and nothing of `MEMBARRIER_CMD_GLOBAL_EXPEDITED`.
pub fn questions() -> Vec<Call> {
    let commands = [GET_REGISTRATIONS].into_iter().chain(EXPEDITED.map(|(command, _)| command));
    commands.map(|command| Call::may("membarrier", libc::SYS_membarrier, [command, 0, 0, 0, 0, 0])).collect()
}

/// The commands by which it has registered.
pub fn registered(result: &mut dyn FnMut() -> i64) -> u32 {
    let told = result();
    let allowed = EXPEDITED.map(|(_, register)| if result() == 0 { register } else { 0 });
    u32::try_from(told).unwrap_or_else(|_| allowed.into_iter().fold(0, |all, one| all | one))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_tell_and_that_do_not() {
        let of = |results: [i64; 4]| {
            let mut results = results.into_iter();
            registered(&mut || results.next().expect("four"))
        };
        assert_eq!(of([20, 0, -1, -1]), 20);
        assert_eq!(of([-22, 0, -1, 0]), 16 | 256);
        assert_eq!(of([-38, -38, -38, -38]), 0);
    }
}
