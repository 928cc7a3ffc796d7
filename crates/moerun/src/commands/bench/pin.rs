//! Which core a process runs on.

use std::{fs, io};

use rustix::{
    process::Pid,
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};

/// Cores that this process may use, ascending.
pub(super) fn cores() -> io::Result<Vec<usize>> {
    let allowed = sched_getaffinity(None)?;
    Ok((0..CpuSet::MAX_CPU).filter(|&core| allowed.is_set(core)).collect())
}

/// Binds every thread that process `pid` has now to `cores`; threads it starts later follow the one that starts them.
pub(super) fn bind(pid: u32, cores: &[usize]) -> io::Result<()> {
    let mut set = CpuSet::new();
    cores.iter().for_each(|&core| set.set(core));
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let name = thread?.file_name();
        let id = name.to_str().and_then(|id| id.parse().ok()).and_then(Pid::from_raw);
        match sched_setaffinity(id, &set) {
            Err(rustix::io::Errno::SRCH) => {} // a thread that has ended meanwhile
            bound => bound?,
        }
    }
    Ok(())
}
