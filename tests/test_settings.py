import os
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sardonyx.errors import ConfigError
from sardonyx.settings import (
    EDGE_DEFAULTS,
    SECRETS,
    Settings,
    check_exposure,
    load_settings,
    options,
    parse_size,
    usable_cores,
)

README = Path(__file__).parents[1] / "server" / "README.md"


@pytest.fixture(autouse=True)
def _empty_working_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    for variable in [name for name in os.environ if name.startswith("SARDONYX_")]:
        monkeypatch.delenv(variable)


def write_toml(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_defaults_hold_when_nothing_is_given():
    assert load_settings(environ={}) == Settings()


@pytest.mark.parametrize(
    ("flags", "environ", "toml", "expected"),
    [
        ({}, {}, "", 8000),
        ({}, {}, "port = 1", 1),
        ({}, {"SARDONYX_PORT": "2"}, "", 2),
        ({}, {"SARDONYX_PORT": "2"}, "port = 1", 2),
        ({"port": "3"}, {}, "", 3),
        ({"port": "3"}, {}, "port = 1", 3),
        ({"port": "3"}, {"SARDONYX_PORT": "2"}, "", 3),
        ({"port": "3"}, {"SARDONYX_PORT": "2"}, "port = 1", 3),
        ({"port": None}, {"SARDONYX_PORT": ""}, "port = 1", 1),
    ],
)
def test_flags_win_over_environment_over_file_over_defaults(tmp_path, flags, environ, toml, expected):
    file = write_toml(tmp_path / "s.toml", toml)
    assert load_settings(flags, config=file, environ=environ).port == expected


def test_each_option_takes_the_nearest_source_that_has_it(tmp_path):
    file = write_toml(tmp_path / "s.toml", "port = 1\nmax_num_seqs = 4\nlog_level = 'debug'")
    settings = load_settings({"port": "3"}, config=file, environ={"SARDONYX_MAX_NUM_SEQS": "8"})
    assert (settings.port, settings.max_num_seqs, settings.log_level) == (3, 8, "debug")


def test_file_is_found_by_flag_then_variable_then_working_directory(tmp_path):
    write_toml(Path("sardonyx.toml"), "port = 1")
    named = write_toml(tmp_path / "named.toml", "port = 2")
    flagged = write_toml(tmp_path / "flagged.toml", "port = 3")
    environ = {"SARDONYX_CONFIG": str(named)}
    assert load_settings(environ={}).port == 1
    assert load_settings(environ=environ).port == 2
    assert load_settings(config=flagged, environ=environ).port == 3


def test_named_file_must_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read: No such file"):
        load_settings(environ={"SARDONYX_CONFIG": str(tmp_path / "nowhere.toml")})


def test_lists_and_tables_come_from_text_and_from_toml(tmp_path):
    file = write_toml(
        tmp_path / "s.toml",
        'cors_origins = ["https://a.example"]\n[aliases]\n"gpt-3.5-turbo" = "smollm2"\n"org/model" = "smollm2"',
    )
    settings = load_settings(config=file, environ={})
    assert settings.aliases == {"gpt-3.5-turbo": "smollm2", "org/model": "smollm2"}
    assert settings.cors_origins == ("https://a.example",)
    environ = {
        "SARDONYX_ALIASES": "gpt-3.5-turbo=smollm2-135m-instruct, gpt-4 = other ,",
        "SARDONYX_CORS_ORIGINS": "https://a.example, http://localhost:3000",
    }
    settings = load_settings(environ=environ)
    assert settings.aliases == {"gpt-3.5-turbo": "smollm2-135m-instruct", "gpt-4": "other"}
    assert settings.cors_origins == ("https://a.example", "http://localhost:3000")


@pytest.mark.parametrize(("text", "expected"), [("true", True), ("1", True), ("False", False), ("0", False)])
def test_booleans_come_from_text(text, expected):
    assert load_settings({"log_json": text}, environ={}).log_json is expected
    assert load_settings(environ={"SARDONYX_LOG_JSON": text}).log_json is expected


def test_sizes_have_units():
    settings = load_settings({"kv_cache_bytes": "2GiB"}, environ={"SARDONYX_MAX_BODY_BYTES": "64 MiB"})
    assert (settings.kv_cache_bytes, settings.max_body_bytes) == (2 << 30, 64 << 20)


@given(st.integers(0, 10**17), st.sampled_from(["", "KiB", "MiB", "GiB", "TiB"]))
def test_size_is_the_number_times_its_unit(number, unit):
    factor = {"": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}[unit]
    assert parse_size(f" {number} {unit} ") == number * factor


def test_relative_paths_in_a_file_start_at_the_file(tmp_path):
    file = write_toml(tmp_path / "s.toml", 'repository = "models"\nmore_repositories = ["a", "/b"]')
    assert load_settings(config=file, environ={}).more_repositories == (tmp_path / "a", Path("/b"))
    assert load_settings(config=file, environ={}).repository == tmp_path / "models"
    assert load_settings({"repository": "models"}, config=file, environ={}).repository == Path("models")


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("prot = 1", "s.toml: prot: is not a setting; did you mean port?"),
        ("[server]\nport = 1", "s.toml: server: is not a setting"),
        ("port = 70000", "s.toml: port: expected int <= 65535, not 70000"),
        ("port = true", "s.toml: port: expected int, not True"),
        ("port = 'x'", "s.toml: port: expected int, not 'x'"),
        ("log_level = 'loud'", "s.toml: log_level: Invalid enum value 'loud', not 'loud'"),
        ("aliases = {a = 1}", "s.toml: aliases: expected str, not {'a': 1}"),
        ("repository = 3", "s.toml: repository: expected a path, not 3"),
        ("cors_origins = ['https://a.example/path']", "s.toml: cors_origins: expected * or scheme://host[:port]"),
        ("host = ''", "s.toml: host: is empty"),
        ("public_url = 'ai.example'", "s.toml: public_url: expected http://... or https://..."),
        ("public_url = 'https://ai.example/?a=1'", "s.toml: public_url: expected http://"),
        ("public_url = 'https://user:word@ai.example'", "s.toml: public_url: expected http://"),
        ("public_url = ''", "s.toml: public_url: expected http://"),
        ("image_store_bytes = -1", "s.toml: image_store_bytes: expected int >= 0"),
        ("request_timeout_s = nan", "s.toml: request_timeout_s: expected float > 0.0"),
        ("port = ", "s.toml: is not TOML"),
        ("a = " + "[" * 5000, "s.toml: is not TOML"),
        ("# " + "x" * (1 << 20), "s.toml: is larger than"),
    ],
)
def test_wrong_file_is_refused_with_file_and_field(tmp_path, toml, message):
    file = write_toml(tmp_path / "s.toml", toml)
    with pytest.raises(ConfigError) as caught:
        load_settings(config=file, environ={})
    assert message in str(caught.value)


@pytest.mark.parametrize("url", ["http://localhost:8000", "https://ai.example", "https://ai.example/below/here/"])
def test_public_url_is_taken(url):
    assert load_settings({"public_url": url}, environ={}).public_url == url


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "s.toml").write_bytes(b"port = \xff")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_settings(config=tmp_path / "s.toml", environ={})


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("SARDONYX_PORT", "x", "SARDONYX_PORT: expected int, not 'x'"),
        ("SARDONYX_PORT", "tcp://10.0.0.1:8000", "enableServiceLinks: false"),
        ("SARDONYX_ALIASES", "gpt-4", "SARDONYX_ALIASES: expected name=value,..., not 'gpt-4'"),
        ("SARDONYX_ALIASES", "=x", "SARDONYX_ALIASES: expected name=value"),
        ("SARDONYX_REPOSITORY", "~nobody-of-that-name/x", "SARDONYX_REPOSITORY: expected a path"),
        ("SARDONYX_LOG_JSON", "maybe", "SARDONYX_LOG_JSON: expected bool, not 'maybe'"),
        ("SARDONYX_API_KEYS", " , ", "SARDONYX_API_KEYS: holds no key"),
        ("SARDONYX_API_KEYS", "sk 1", "SARDONYX_API_KEYS: holds no key, or one with a space"),
    ],
)
def test_wrong_variable_is_refused_by_its_name(variable, text, message):
    with pytest.raises(ConfigError) as caught:
        load_settings(environ={variable: text})
    assert message in str(caught.value)


def test_wrong_flag_is_refused_by_its_name():
    with pytest.raises(ConfigError, match=r"^--max-num-seqs: expected int >= 1, not '0'$"):
        load_settings({"max_num_seqs": "0"}, environ={})


def test_misspelt_variable_is_warned_about_and_foreign_ones_are_not(caplog):
    load_settings(environ={"SARDONYX_PROT": "1", "SARDONYX_SERVICE_HOST": "10.0.0.1", "SARDONYX_PORT_8000_TCP": "x"})
    assert [record.getMessage() for record in caplog.records] == ["SARDONYX_PROT is not a setting; did you mean port?"]


@given(st.text(max_size=40))
def test_any_text_for_any_option_gives_a_value_or_a_config_error(text):
    for option in options():
        try:
            load_settings({option.name: text}, environ={})
        except ConfigError:
            continue


def test_keys_of_all_sources_are_known(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nsk-one\n\nsk-two  # with a comment\n")
    file.chmod(0o600)
    settings = load_settings({"api_keys_file": str(file)}, environ={"SARDONYX_API_KEYS": "sk-three,sk-four"})
    assert settings.api_keys == ("sk-three", "sk-four", "sk-one", "sk-two")


@pytest.mark.parametrize("content", [b"", b"# only a comment\n", b"two words\n", b"\xff\xff"])
def test_key_file_without_usable_keys_is_refused(tmp_path, content):
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ConfigError, match="keys"):
        load_settings({"admin_keys_file": str(tmp_path / "keys")}, environ={})


def test_missing_key_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"api_keys_file: .*cannot be read"):
        load_settings({"api_keys_file": str(tmp_path / "nowhere")}, environ={})


def test_key_file_that_others_can_read_is_warned_about(tmp_path, caplog):
    (tmp_path / "keys").write_text("sk-one")
    (tmp_path / "keys").chmod(0o644)
    load_settings({"api_keys_file": str(tmp_path / "keys")}, environ={})
    assert "chmod 600" in caplog.text


def test_keys_are_never_shown(tmp_path):
    settings = load_settings(environ={"SARDONYX_API_KEYS": "sk-canary", "SARDONYX_ADMIN_KEYS": "sk-canary2"})
    for shown in (repr(settings), str(settings), f"{settings}", repr(settings.__rich_repr__())):
        assert "canary" not in shown
    with pytest.raises(ConfigError) as caught:
        load_settings(config=write_toml(tmp_path / "s.toml", 'api_keys = ["sk-canary", 3]'), environ={})
    assert "canary" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_settings(environ={"SARDONYX_API_KEYS": "sk-canary with space"})
    assert "canary" not in str(caught.value)


def test_secrets_have_no_flag():
    assert {option.name for option in options() if option.flag is None} == SECRETS | {"repository"}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]", "::ffff:127.0.0.1"])
def test_loopback_needs_no_keys(host):
    check_exposure(Settings(host=host))


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.2", "example.com", "::ffff:10.0.0.1", "localhost.example"]
)
def test_other_addresses_need_keys_or_permission(host):
    with pytest.raises(ConfigError, match="there are no API keys"):
        check_exposure(Settings(host=host))
    check_exposure(Settings(host=host, api_keys=("sk-one",)))
    check_exposure(Settings(host=host, allow_unauthenticated=True))


def test_settings_cannot_be_changed():
    with pytest.raises(AttributeError):
        Settings().port = 1  # type: ignore[misc]


def test_every_option_has_a_help_text_and_nothing_else():
    assert [option.name for option in options()] == [field.name for field in msgspec.structs.fields(Settings)]
    assert all(option.help.endswith(".") for option in options())


def test_every_setting_has_its_row_in_the_readme():
    text = README.read_text()
    for option in options():
        value = str(option.default).lower() if isinstance(option.default, bool) else option.default
        default = "" if option.default in (None, (), {}) else f"`{value}`"
        assert f"| `{option.name}` | {default} | {option.help} |\n" in text
    rows = re.findall(r"^\| `(\w+)` \|", text.partition("## Settings")[2].partition("\n## ")[0], re.MULTILINE)
    assert rows == [option.name for option in options()]


def test_example_file_of_the_deployment_is_understood():
    settings = load_settings(config=README.parent / "deploy/sardonyx.toml", environ={})
    assert settings.repository == Path("/var/lib/sardonyx/models")
    check_exposure(settings)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A fake /proc and /sys with four CPUs, two threads a core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    for cpu in range(4):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    return tmp_path


def set_cgroup(root: Path, membership: str, files: dict[str, str]) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_hyperthreads_count_once(machine):
    assert usable_cores(machine) == 2


def test_affinity_bounds_the_cores(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2})
    assert usable_cores(machine) == 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a/b/cpu.max": "max 100000"}, 2),
        ({"a/b/cpu.max": "150000 100000"}, 1),
        ({"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, 1),
        ({"a/b/cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "100000 100000"}, 1),
        ({"a/b/cpu.max": "rubbish"}, 2),
    ],
)
def test_quota_of_the_cgroup_and_those_above_it_bounds_the_cores(machine, files, expected):
    set_cgroup(machine, "0::/a/b\n", files)
    assert usable_cores(machine) == expected


def test_quota_of_an_old_cgroup_bounds_the_cores(machine):
    files = {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"}
    set_cgroup(machine, "3:memory:/a\n2:cpu,cpuacct:/a\n", files)
    assert usable_cores(machine) == 1


def test_unknown_topology_counts_every_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert usable_cores(tmp_path) == 3


@pytest.mark.parametrize("flags", [{"profile": "edge"}, {}])
def test_the_edge_profile_has_defaults_of_its_own_and_each_can_be_set(flags, tmp_path):
    config = write_toml(tmp_path / "edge.toml", "profile = 'edge'\nmax_num_seqs = 2\n")
    environ = {"SARDONYX_MAX_MODEL_LEN": "512"}
    settings = load_settings(flags | {"max_choices": "1"}, config=config, environ=environ)
    expected = EDGE_DEFAULTS | {"profile": "edge", "max_num_seqs": 2, "max_model_len": 512, "max_choices": 1}
    assert settings == msgspec.structs.replace(Settings(), **expected)


def test_another_profile_in_a_flag_leaves_the_files_alone(tmp_path):
    config = write_toml(tmp_path / "edge.toml", "profile = 'edge'\n")
    assert load_settings({"profile": "server"}, config=config, environ={}) == Settings()


def test_an_unknown_profile_is_refused():
    with pytest.raises(ConfigError, match=r"--profile: .*'tiny'"):
        load_settings({"profile": "tiny"}, environ={})


def test_values_of_the_edge_profile_are_valid_and_smaller_than_the_servers():
    smaller = load_settings({name: str(value) for name, value in EDGE_DEFAULTS.items()}, environ={})
    assert smaller == Settings(**EDGE_DEFAULTS)
    for name, value in EDGE_DEFAULTS.items():
        assert value < getattr(Settings(), name) or name == "max_model_len"  # where 0 is no limit


def test_every_default_of_the_edge_profile_has_its_row_in_the_readme():
    section = README.read_text().partition("## Small boxes")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.+)` \| `(.+)` \|", section, re.MULTILINE)
    assert rows == [(name, str(value), str(getattr(Settings(), name))) for name, value in EDGE_DEFAULTS.items()]
