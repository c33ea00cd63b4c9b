from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from sardonyx.serving.memory import KvBudget, KvShare, free_memory_bytes

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


def test_models_that_are_expected_share_what_is_left_equally() -> None:
    budget = KvBudget(90, num_models=3)
    assert [budget.take(name, wanted).num_bytes for name, wanted in (("a", 1000), ("b", 10), ("c", 1000))] == [
        30,
        10,
        50,
    ]
    assert budget.take("d", 1000).num_bytes == 0


def test_a_new_version_takes_the_part_of_the_one_it_replaces() -> None:
    budget = KvBudget(90)
    old = budget.take("a", 80)
    new = budget.take("a", 85)
    assert new.num_bytes == 85
    budget.give_back(old)
    assert budget.take("b", 90).num_bytes == 5
    budget.give_back(new)
    budget.give_back(new)
    assert budget.take("c", 90).num_bytes == 85


def test_what_an_operator_claims_is_given_and_missing_for_others() -> None:
    budget = KvBudget(90, num_models=2)
    assert budget.claim("a", 80).num_bytes == 80
    assert budget.take("b", 50).num_bytes == 10
    assert budget.claim("c", 500).num_bytes == 500
    assert budget.take("d", 50).num_bytes == 0


@settings(deadline=None)
@given(
    total=st.integers(0, 1000),
    num_models=st.integers(1, 5),
    moves=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 500), st.booleans())),
)
def test_models_never_hold_more_than_the_budget_together(
    total: int, num_models: int, moves: list[tuple[str, int, bool]]
) -> None:
    budget = KvBudget(total, num_models)
    held: dict[str, KvShare] = {}
    for name, wanted, is_taking in moves:
        if is_taking:
            new = budget.take(name, wanted)
            assert 0 <= new.num_bytes <= wanted
            if name in held:
                budget.give_back(held[name])
            held[name] = new
        elif name in held:
            budget.give_back(held.pop(name))
        assert sum(share.num_bytes for share in held.values()) <= total
