//! Memory that the machine still has for this process (Linux).

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Memory that this process can still take: the least of `MemAvailable` and the control group's limit minus use.
/// Pages of files that the group could drop at once do not count as used. `None` where the system does not say.
pub fn available_memory_bytes() -> Option<u64> {
    available_under(Path::new("/"))
}

fn available_under(root: &Path) -> Option<u64> {
    let machine = fs::read_to_string(root.join("proc/meminfo")).ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.trim()
            .strip_suffix("kB")?
            .trim()
            .parse::<u64>()
            .ok()?
            .checked_mul(1024)
    });
    let groups = control_groups(root).into_iter().flat_map(|group| group.free_bytes());
    machine.into_iter().chain(groups).min()
}

/// One control group's files.
struct ControlGroup {
    dir: PathBuf,
    limit: &'static str,
    usage: &'static str,
    /// Line of `memory.stat` with the bytes of file pages that can be dropped.
    droppable: &'static str,
}

impl ControlGroup {
    /// Limit minus use, if there is a limit. A limit of `max` does not parse; the older version's "no limit" is a
    /// number so large that the machine's own memory is less.
    fn free_bytes(&self) -> Option<u64> {
        let number = |name: &str| fs::read_to_string(self.dir.join(name)).ok()?.trim().parse::<u64>().ok();
        let (limit, usage) = (number(self.limit)?, number(self.usage)?);
        let stat = fs::read_to_string(self.dir.join("memory.stat")).unwrap_or_default();
        let droppable = stat
            .lines()
            .find_map(|line| {
                line.strip_prefix(self.droppable)?
                    .strip_prefix(' ')?
                    .trim()
                    .parse::<u64>()
                    .ok()
            })
            .unwrap_or(0);
        Some(limit.saturating_sub(usage.saturating_sub(droppable)))
    }
}

/// The memory groups that this process is in, and all above them: each has a limit of its own.
fn control_groups(root: &Path) -> Vec<ControlGroup> {
    let text = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut groups = Vec::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let (mount, limit, usage, droppable) = if controllers.is_empty() {
            ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
        } else if controllers.split(',').any(|controller| controller == "memory") {
            (
                "sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        } else {
            continue;
        };
        let mount = root.join(mount);
        // Within a container the path may be the host's and not exist here; the mount's own root is then the group.
        let own = mount.join(path.trim_start_matches('/'));
        let dirs = own
            .ancestors()
            .take_while(|dir| dir.starts_with(&mount))
            .map(Path::to_owned);
        groups.extend(dirs.map(|dir| ControlGroup {
            dir,
            limit,
            usage,
            droppable,
        }));
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, name: &str, text: &str) {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn the_machine_counts_where_there_is_no_limit() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(available_under(root.path()), None);
        write(root.path(), "proc/meminfo", "MemTotal:  8 kB\nMemAvailable:   4 kB\n");
        write(root.path(), "proc/self/cgroup", "0::/a/b\n");
        write(root.path(), "sys/fs/cgroup/a/b/memory.max", "max\n");
        write(root.path(), "sys/fs/cgroup/a/b/memory.current", "7\n");
        assert_eq!(available_under(root.path()), Some(4096));
    }

    #[test]
    fn the_tightest_group_counts_without_the_pages_it_could_drop() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "proc/meminfo", "MemAvailable: 1000000 kB\n");
        write(root.path(), "proc/self/cgroup", "0::/a/b\n");
        write(root.path(), "sys/fs/cgroup/a/memory.max", "1000\n");
        write(root.path(), "sys/fs/cgroup/a/memory.current", "900\n");
        write(
            root.path(),
            "sys/fs/cgroup/a/memory.stat",
            "anon 1\ninactive_file 300\n",
        );
        write(root.path(), "sys/fs/cgroup/a/b/memory.max", "5000\n");
        write(root.path(), "sys/fs/cgroup/a/b/memory.current", "100\n");
        assert_eq!(available_under(root.path()), Some(400));
    }

    #[test]
    fn the_older_control_groups_are_understood() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "proc/meminfo", "MemAvailable: 1000000 kB\n");
        write(
            root.path(),
            "proc/self/cgroup",
            "5:cpu:/x\n3:hugetlb,memory:/docker/abc\n",
        );
        write(root.path(), "sys/fs/cgroup/memory/memory.limit_in_bytes", "2000\n");
        write(root.path(), "sys/fs/cgroup/memory/memory.usage_in_bytes", "500\n");
        assert_eq!(available_under(root.path()), Some(1500));
    }
}
