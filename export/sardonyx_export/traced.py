"""Encoders and classifiers without a builder of their own: whatever `transformers` loads, traced by its own exporter.

Needs the extra ``export-torch``, and says so. A checkpoint's own code is never run, pickled weights are never read, and
nothing is fetched. What comes out is a padded graph: each row of it has to give what the model gives for that row
alone, so a model that looks at padding is refused.
"""

import contextlib
import inspect
import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sardonyx.errors import ConfigError, EngineError
from sardonyx.runtime.session import open_session
from sardonyx_export.built import PaddedGraph
from sardonyx_export.encoder_spec import Array
from sardonyx_export.errors import ExportError

Task = Literal["embeddings", "reranker", "classifier"]

MODEL_FILE = "model.onnx"
_DATA_FILE = f"{MODEL_FILE}.data"
_TASKS = {"embeddings": "feature-extraction", "reranker": "text-classification", "classifier": "text-classification"}
"""In optimum's words."""
_OUTPUTS = {"embeddings": "last_hidden_state", "reranker": "logits", "classifier": "logits"}
_AXES = ("batch", "sequence")
_MAX_ERROR = 1e-4
"""Between graph and model, as a share of the largest number where that is more than 1. Rounding makes about 1e-6."""
_LONGEST_TRIED = 256
"""Tokens. More than the windows of local attention, which a wrong trace would widen or lose."""
_LOUD = ("torch.onnx", "torch.export", "torch._dynamo", "transformers", "diffusers", "onnxscript")


def export_traced(path: Path, folder: Path, task: Task) -> PaddedGraph:
    """Trace a model into `folder` and compare the graph with it.

    Args:
        path: folder with config.json and safetensors.
        folder: gets ``model.onnx`` and ``model.onnx.data``: input_ids, attention_mask and, where the model knows types,
            token_type_ids, each (B, S) int64, to ``last_hidden_state`` (B, S, E) or ``logits`` (B, N) float32.
        task: decides which of the two.

    Raises:
        ExportError: the extra is not installed; the model cannot be loaded or traced; its graph has fixed axes, or
            gives other numbers than the model, padding among the reasons.
    """
    with quiet():
        model, stored = _load(path, task)
        architecture = type(model).__name__
        _write_graph(model, folder / MODEL_FILE, _OUTPUTS[task], architecture)
        width = _compare(model, folder / MODEL_FILE, _OUTPUTS[task], architecture)
    return PaddedGraph(
        files=[MODEL_FILE, _DATA_FILE],
        output=_OUTPUTS[task],
        kind="tokens" if task == "embeddings" else "logits",
        width=width,
        precision="fp32",
        weights=f"{stored} → float32; traced by transformers",
    )


def torch_outputs(path: Path, task: Task, rows: Sequence[Sequence[int]]) -> list[Array]:
    """What the model itself makes of rows, each run alone and with token types of 0.

    Args:
        path: as for `export_traced`.
        task: as for `export_traced`.
        rows: token ids.

    Returns:
        For each row (t, E) float32, or (N) float32 for logits.

    Raises:
        ExportError: the extra is not installed, or the model cannot be loaded.
    """
    with quiet():
        model, _ = _load(path, task)
        return [_run(model, _OUTPUTS[task], {"input_ids": np.array([row], np.int64)})[0] for row in rows]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the libraries' progress reports, and warnings about their own insides, from the operator."""
    before = [(logger, logger.level) for logger in map(logging.getLogger, _LOUD)]
    for logger, _ in before:
        logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in before:
            logger.setLevel(level)


def _load(path: Path, task: Task) -> tuple[Any, str]:
    """The model in float32, ready to run, and the type its weights are stored in."""
    try:
        import onnxscript  # noqa: F401  # what transformers' exporter writes graphs with
        import torch
        import transformers
        from optimum.exporters.tasks import TasksManager
    except ImportError as error:
        raise ExportError(
            f"no builder knows this model, and tracing it needs a package that is missing ({error.name}); install "
            "sardonyx[export-torch]"
        ) from error
    if not (path / "config.json").is_file():
        raise ExportError("is missing", file="config.json")
    try:
        library = TasksManager.infer_library_from_model(str(path))
        if library not in ("transformers", "sentence_transformers"):
            raise ExportError(f"belongs to the library {library}; encoders of transformers can be traced")
        auto = TasksManager.get_model_class_for_task(_TASKS[task], framework="pt", library="transformers")
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        model, info = auto.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",  # also keeps a config.json from naming a kernel to fetch
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except ExportError:
        raise
    except Exception as error:  # whatever a foreign library says of a folder that it does not load
        raise ExportError(f"transformers cannot load it as a model for {task}: {_first_line(error)}") from error
    _check_model(model, info["missing_keys"], task)
    return model.eval(), str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


def _check_model(model: Any, missing: Sequence[str], task: Task) -> None:
    """A text model with all its weights. A pooler is not used for embeddings, so that it may be missing."""
    name = type(model).__name__
    absent = sorted(key for key in missing if task != "embeddings" or "pooler" not in key)
    if absent:
        raise ExportError(
            f"has no weights for {', '.join(absent[:4])}{' ...' if len(absent) > 4 else ''}, which {name} needs; a "
            f"checkpoint trained for {task} has them"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ExportError(f"{name} is an encoder-decoder; only encoders can be exported for {task}", file="config.json")
    if not {"input_ids", "attention_mask"} <= _parameters(model):
        raise ExportError(f"{name} does not take input_ids and attention_mask, so rows cannot be padded")
    if not isinstance(getattr(model.config, "vocab_size", None), int):
        raise ExportError(f"is missing, so {name} cannot be tried", file="config.json", field="vocab_size")


def _write_graph(model: Any, path: Path, output: str, architecture: str) -> None:
    import onnx_ir
    import torch
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    sample = {name: torch.from_numpy(array) for name, array in _inputs(model, [_ids(model, 7), _ids(model, 5)]).items()}
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    any_size = torch.export.Dim.AUTO
    shapes = {name: dict.fromkeys(range(len(_AXES)), any_size) for name in sample}
    try:
        exporter: Any = OnnxExporter  # has no types
        program = exporter().export(model, sample, config=OnnxConfig(dynamic_shapes=shapes)).program
    except Exception as error:  # whatever a foreign library says of a model that it cannot trace
        raise ExportError(f"{architecture} cannot be traced by transformers: {_first_line(error)}") from error
    graph = program.graph
    kept = [value for value in graph.outputs if value.name == output]
    if len(kept) != 1:
        raise ExportError(f"{architecture} gives {', '.join(value.name for value in graph.outputs)}, but no {output}")
    graph.outputs[:] = kept
    RemoveUnusedNodesPass()(program)
    ClearMetadataAndDocStringPass()(program)  # which hold this machine's paths, node by node
    for value in graph.inputs:
        if value.name not in sample:
            raise ExportError(f"the trace of {architecture} takes an unknown input {value.name!r}")
        fixed = [axis for axis, size in zip(_AXES, value.shape, strict=True) if isinstance(size, int)]
        if fixed:
            raise ExportError(f"the trace of {architecture} fixed the {' and '.join(fixed)} axis of {value.name!r}")
        value.shape = onnx_ir.Shape(_AXES)
    axes = kept[0].shape
    kept[0].shape = onnx_ir.Shape([*_AXES[: len(axes) - 1], axes[-1]])
    onnx_ir.save(program, str(path), external_data=f"{path.name}.data")


def _compare(model: Any, path: Path, output: str, architecture: str) -> int:
    """Rows through the graph, in batches of three shapes, and each alone through the model. Returns the width.

    Raises:
        ExportError: the graph does not run, or differs.
    """
    batches = [[1], [9, 4, 2], [_longest(model), 3]]
    try:
        session = open_session(path, model_name=architecture)
    except ConfigError as error:
        raise ExportError(f"the trace of {architecture} cannot be opened: {error.reason}") from error
    width = 0
    try:
        for lengths in batches:
            rows = [_ids(model, length) for length in lengths]
            inputs = _inputs(model, rows)
            values = session.run({name: inputs[name] for name in session.inputs}, [output])[output]
            together = _run(model, output, inputs)
            _check_close(together, values, f"the trace of {architecture} is not what the model gives", lengths)
            for index, row in enumerate(rows):
                alone = _run(
                    model, output, {name: array[index : index + 1, : len(row)] for name, array in inputs.items()}
                )
                actual = values[index : index + 1, : len(row)] if alone.ndim > 2 else values[index : index + 1]
                _check_close(
                    alone,
                    actual,
                    f"{architecture} cannot be served in batches, for padding changes its results",
                    lengths,
                )
            width = together.shape[-1]
    except EngineError as error:
        raise ExportError(f"the trace of {architecture} does not run at every shape: {error.message}") from error
    finally:
        session.close()
    return width


def _check_close(expected: Array, actual: Array, what: str, lengths: Sequence[int]) -> None:
    limit = _MAX_ERROR * max(1.0, float(np.abs(expected).max()))
    error = float(np.abs(expected - actual).max()) if expected.shape == actual.shape else math.inf
    if not error <= limit:
        raise ExportError(f"{what}: rows of {lengths} tokens are off by {error:.3g}; {limit:.3g} is allowed")


def _run(model: Any, output: str, inputs: dict[str, Array]) -> Array:
    """A batch through the model: (B, S, E) or (B, N) float32."""
    import torch

    with torch.no_grad():
        found = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    values: Array = found[output].float().numpy()
    return values


def _inputs(model: Any, rows: Sequence[Array]) -> dict[str, Any]:
    """Rows filled up on the right, their second halves of type 1 where the model knows types."""
    shape = (len(rows), max(map(len, rows)))
    pad_id = getattr(model.config, "pad_token_id", None)
    names = ["input_ids", "attention_mask"]
    if "token_type_ids" in _parameters(model) and (getattr(model.config, "type_vocab_size", None) or 0) > 1:
        names.append("token_type_ids")
    arrays = {name: np.zeros(shape, np.int64) for name in names}
    arrays["input_ids"][:] = pad_id or 0
    for index, row in enumerate(rows):
        arrays["input_ids"][index, : len(row)] = row
        arrays["attention_mask"][index, : len(row)] = 1
        if "token_type_ids" in arrays:
            arrays["token_type_ids"][index, len(row) // 2 : len(row)] = 1
    return arrays


def _parameters(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _ids(model: Any, length: int) -> Any:
    """Token ids that any vocabulary has, without the padding token; the same for the same length. (length) int64."""
    config = model.config
    found = np.random.default_rng(length).integers(0, config.vocab_size, length)
    pad_id = getattr(config, "pad_token_id", None)
    found[found == pad_id] = (found[found == pad_id] + 1) % config.vocab_size
    return found


def _longest(model: Any) -> int:
    """Half the position table: some models keep its first rows for themselves."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(positions // 2, _LONGEST_TRIED) if isinstance(positions, int) and positions > 1 else _LONGEST_TRIED


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.300}"
