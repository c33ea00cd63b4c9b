import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from sardonyx.settings import Settings

DEPLOY = Path(__file__).parents[2] / "server" / "deploy"


def read_unit(name: str) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / name)
    return unit


def test_systemd_leaves_the_server_time_to_drain() -> None:
    settings = Settings()
    service = read_unit("sardonyx.service")["Service"]
    assert int(service["TimeoutStopSec"]) > settings.drain_grace_s + settings.drain_timeout_s


def test_systemd_is_notified_and_watches() -> None:
    service = read_unit("sardonyx.service")["Service"]
    assert service["Type"] == "notify"
    assert int(service["WatchdogSec"]) > 60
    assert "AF_UNIX" in service["RestrictAddressFamilies"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_unit_and_its_drop_in(tmp_path: Path) -> None:
    unit = (DEPLOY / "sardonyx.service").read_text().replace("/opt/sardonyx/bin/sardonyx", "/bin/true")
    (tmp_path / "sardonyx.service").write_text(unit)
    (tmp_path / "sardonyx.service.d").mkdir()
    shutil.copy(DEPLOY / "cuda.conf", tmp_path / "sardonyx.service.d")
    command = ["systemd-analyze", "verify", tmp_path / "sardonyx.service"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
