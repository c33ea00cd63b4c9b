from pathlib import Path

from sardonyx.runtime.host_memory import free_memory_bytes

MIB = 1 << 20


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_tightest_cgroup_above_the_process_bounds_free_memory(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/inner/memory.max": "max\n",
            "sys/fs/cgroup/outer/inner/memory.current": f"{MIB}\n",
            "sys/fs/cgroup/outer/memory.max": f"{5 * MIB}\n",
            "sys/fs/cgroup/outer/memory.current": f"{2 * MIB}\n",
        },
    )
    assert free_memory_bytes(root) == 3 * MIB


def test_a_container_sees_its_own_cgroup_as_the_root(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": str(MIB), "sys/fs/cgroup/memory.current": "0"}
    assert free_memory_bytes(write(tmp_path, files)) == MIB


def test_cgroups_of_version_1_are_read(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x\n",
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes": str(4 * MIB),
            "sys/fs/cgroup/memory/x/memory.usage_in_bytes": str(MIB),
        },
    )
    assert free_memory_bytes(root) == 3 * MIB


def test_a_full_cgroup_leaves_nothing(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "5", "sys/fs/cgroup/memory.current": "9"}
    assert free_memory_bytes(write(tmp_path, files)) == 0


def test_without_limits_it_is_the_machines_memory(tmp_path: Path) -> None:
    assert free_memory_bytes(tmp_path) > MIB


def test_cached_files_of_a_cgroup_count_as_free_but_shared_memory_does_not(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{5 * MIB}",
            "sys/fs/cgroup/memory.current": f"{4 * MIB}",
            "sys/fs/cgroup/memory.stat": f"anon {MIB}\nfile {3 * MIB}\nshmem {MIB}\n"
            f"inactive_file {MIB // 2}\nactive_file {MIB}\n",
        },
    )
    assert free_memory_bytes(root) == 5 * MIB // 2
