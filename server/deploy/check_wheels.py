"""Say whether a machine of another kind could install the server without a compiler: ask pip by platform tags.

    python server/deploy/check_wheels.py                                   # for a Jetson or a Raspberry Pi, on the CPU
    python server/deploy/check_wheels.py --extra cuda --glibc 2.35 --python 3.12   # onnxruntime-gpu

Nothing is downloaded but what pip needs to resolve the dependencies, and nothing installed. Exit code 1: for some
version of Python something has no wheel, and pip says what. Run it on Linux: pip takes other markers of dependencies
(``sys_platform``, ``platform_machine``) from the machine that it runs on.

Source: PEP 600 (manylinux tags name the oldest glibc), pip's "Installation Report".
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
OLDEST_GLIBC = "2.28"
"""Of Debian 10 and RHEL 8. JetPack 6 has 2.35."""


class MissingWheel(Exception):
    """pip found no set of wheels. The message is pip's last word."""


def requirements(pyproject: Path, extras: Sequence[str]) -> list[str]:
    """Base dependencies of a project and those of some of its extras, as they are written."""
    project = tomllib.loads(pyproject.read_text())["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return [requirement for group in groups for requirement in group]


def platform_tags(machine: str, glibc: str) -> list[str]:
    """Every tag of wheels that run on a Linux with this glibc, newest first; of aarch64 the oldest is manylinux2014."""
    major, minor = map(int, glibc.split("."))
    return [f"manylinux_{major}_{each}_{machine}" for each in range(minor, 16, -1)] + [f"manylinux2014_{machine}"]


def resolve(wanted: Sequence[str], python: str, tags: Sequence[str]) -> list[str]:
    """File names of the wheels that would be installed, by name.

    Raises:
        MissingWheel: there is no such set.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--disable-pip-version-check", "--only-binary=:all:", "--implementation", "cp"]
        command += ["--python-version", python, "--target", folder, "--report", str(report)]
        command += [word for tag in tags for word in ("--platform", tag)]
        ended = subprocess.run([*command, *wanted], capture_output=True, text=True)
        if ended.returncode != 0:
            raise MissingWheel(ended.stderr.strip().rpartition("\n")[2])
        return wheel_names(json.loads(report.read_bytes()))


def wheel_names(report: Any) -> list[str]:
    """File names of what pip's report would install, by name; ``Any``: it is pip's JSON."""
    return sorted(each["download_info"]["url"].rpartition("/")[2] for each in report["install"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="X.Y")
    parser.add_argument("--machine", default="aarch64", help="as uname -m says it")
    parser.add_argument("--glibc", default=OLDEST_GLIBC, metavar="X.Y")
    parser.add_argument("--extra", nargs="*", default=("cpu",), help="beside the base dependencies")
    options = parser.parse_args(arguments)
    wanted, tags = requirements(PYPROJECT, options.extra), platform_tags(options.machine, options.glibc)
    is_complete = True
    for python in options.python:
        try:
            names = resolve(wanted, python, tags)
        except MissingWheel as error:
            is_complete = False
            sys.stdout.write(f"Python {python}, {options.machine}, glibc {options.glibc}: {error}\n")
            continue
        native = [name for name in names if not name.endswith("-any.whl")]
        summary = f"{len(names)} wheels, {len(native)} of them for {options.machine}"
        sys.stdout.write(f"Python {python}, {options.machine}, glibc {options.glibc}: {summary}\n")
        sys.stdout.writelines(f"    {name}\n" for name in native)
    return 0 if is_complete else 1


if __name__ == "__main__":
    sys.exit(main())
