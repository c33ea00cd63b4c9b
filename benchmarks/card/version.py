"""Random models in a version folder, as an export for cards would leave it, but for texts and verification."""

import shutil
import time
from pathlib import Path
from typing import Any

from card.random_weights import RandomWeights
from card.shapes import Shape
from sardonyx.repository.families import LanguageModel
from sardonyx.repository.manifest import FILE_NAME, Graph, GraphFile, Manifest, Source, encode
from sardonyx_export.builders.decoder import BuildOptions, build_decoder
from sardonyx_export.builders.feed import build_feed


def make_version(folder: Path, shape: Shape, precision: Any) -> dict[str, Any]:
    """Write graphs and manifest; a folder that is there already is taken as it is.

    Returns:
        Seconds and bytes.
    """
    if (folder / FILE_NAME).exists():
        return {"build_s": None, "files_bytes": _size(folder)}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started_s = time.perf_counter()
    checkpoint = RandomWeights(shape, has_blocks=precision == "int4")
    report = build_decoder(checkpoint, folder, BuildOptions(precision=precision, activations="fp16", target="cuda"))
    graphs = {"decoder": report.files, "sampler": report.sampler, "feed": build_feed(folder)}
    manifest = Manifest(
        family="llm",
        precision=precision,
        activations="fp16",
        target="cuda",
        graphs={
            role: Graph(model=_file(files[0]), data=[_file(file) for file in files[1:]])
            for role, files in graphs.items()
        },
        source=Source(uri="random", architecture="LlamaForCausalLM", weights=report.weights),
        llm=LanguageModel(vocab_size=report.vocab_size, max_model_len=report.max_model_len, kv=report.kv),
    )
    (folder / FILE_NAME).write_bytes(encode(manifest))
    return {"build_s": round(time.perf_counter() - started_s, 1), "files_bytes": _size(folder)}


def _file(path: Path) -> GraphFile:
    # The hash of 16 GB takes as long as writing them, and nobody asks for it here.
    return GraphFile(path=path.name, sha256="0" * 64, size_bytes=path.stat().st_size)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
