"""Ready ONNX encoders: found in the layouts of optimum and sentence-transformers, and imported byte for byte.

A graph comes from whoever published it. Its external data is copied under plain names only and from inside of its
folder, and it is opened in the server's own session, with the checks that serving has.
"""

import mmap
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec
import numpy as np
import onnx
from google.protobuf.message import DecodeError

from sardonyx.errors import ConfigError, EngineError
from sardonyx.runtime.external_data import check_external_data, external_data
from sardonyx.runtime.session import Session, open_session
from sardonyx_export.built import PaddedGraph
from sardonyx_export.errors import ExportError
from sardonyx_export.sources import texts

MODEL_FILE = "model.onnx"
_FOLDERS = ("", "onnx")
"""Where optimum and sentence-transformers put graphs, below a model's folder."""
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_AXES = ("batch", "sequence")
_SHAPES = ((1, 2), (2, 5))
"""Rows and tokens that a graph is tried with: one that has sizes built in runs with one of them at most."""
_DATA_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
_TAKEN_SUFFIXES = (".onnx", ".json", ".jinja", ".pbtxt", ".txt", ".md")
"""Of files that a version folder may get besides."""


class _Output(msgspec.Struct, frozen=True):
    """What an output of that name is."""

    kind: Literal["tokens", "pooled", "logits"]
    num_axes: int


_OUTPUTS = {
    "sentence_embedding": _Output("pooled", 2),
    "logits": _Output("logits", 2),
    "last_hidden_state": _Output("tokens", 3),
    "token_embeddings": _Output("tokens", 3),
}
"""The first one that a graph has is used. ``pooler_output`` is none of them: it is no pooling anybody trained."""


def find_graph(path: Path, file: str | None = None) -> Path:
    """The graph to import.

    Args:
        path: of a ``.onnx`` file, or of a model's folder.
        file: which one of a folder: its name, or its path in the folder.

    Returns:
        A file inside the folder, or inside the download cache that the folder is a snapshot of.

    Raises:
        ExportError: there is none, or none of that name; there are several to choose from; a link leaves the folder.
    """
    if path.is_file():
        if path.suffix != ".onnx":
            raise ExportError("is no .onnx file", file=path.name)
        if file is not None and file != path.name:
            raise ExportError(f"is not {file!r}; a file was chosen already", file=path.name)
        return path
    found = {
        str(PurePosixPath(folder, each.name)): each
        for folder in _FOLDERS
        for each in sorted((path / folder).glob("*.onnx"))
    }
    if not found:
        raise ExportError(f"{path.name} holds no .onnx file, nor does its folder onnx")
    if file is None:
        chosen = list(found)
    else:
        chosen = [file] if file in found else [name for name in found if PurePosixPath(name).name == file]
    if len(chosen) != 1:
        names = ", ".join(chosen or found)
        raise ExportError(
            f"choose one of {names}" if chosen else f"has no {file!r:.200}; there are {names}", field="file"
        )
    texts.inside(texts.trusted_root(path), found[chosen[0]])
    return found[chosen[0]]


def import_graph(graph: Path, folder: Path) -> PaddedGraph:
    """Copy a graph and its external data into `folder`, and find out what it takes and gives.

    Args:
        graph: as `find_graph` gives it.
        folder: gets ``model.onnx``, and the data files under their own names.

    Raises:
        ExportError: external data elsewhere than beside the graph; inputs or outputs that the padded layout has not;
            a fixed batch or sequence axis; a graph that does not run.
        ConfigError: ONNX Runtime does not open it, or its file is damaged.
    """
    files = [MODEL_FILE, *_copy(graph, folder)]
    check_external_data(folder / MODEL_FILE)
    precision, weights = _weights(folder / MODEL_FILE)
    session = open_session(folder / MODEL_FILE, model_name=graph.name)
    try:
        _check_inputs(session, graph.name)
        name, output = _choose_output(session, graph.name)
        width = _run(session, name, output, graph.name)
    finally:
        session.close()
    return PaddedGraph(files=files, output=name, kind=output.kind, width=width, precision=precision, weights=weights)


def _copy(graph: Path, folder: Path) -> list[str]:
    """Copy the files. Returns the names of the data files."""
    model_folder = graph.parent.parent if graph.parent.name == _FOLDERS[1] else graph.parent
    root = texts.trusted_root(model_folder)
    source = texts.inside(root, graph)
    try:
        shutil.copyfile(source, folder / MODEL_FILE)
        # As a copy that nobody else writes to, so that what was checked is what is opened.
        locations = _data_files(folder / MODEL_FILE)
        for location in locations:
            if not _DATA_FILE.fullmatch(location) or location.lower().endswith(_TAKEN_SUFFIXES):
                raise ExportError(
                    f"external data {location!r:.200} is not a plain name of a data file beside the graph",
                    file=graph.name,
                )
            shutil.copyfile(texts.inside(root, graph.parent / location), folder / location)
    except ExportError:
        raise
    except ConfigError as error:
        raise ExportError(error.reason, file=graph.name) from error
    except ValueError as error:  # mmap of an empty file
        raise ExportError("is empty", file=graph.name) from error
    except OSError as error:
        raise ExportError(f"cannot be copied: {error.strerror}", file=graph.name) from error
    return locations


def _data_files(path: Path) -> list[str]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return sorted({entry.location for entry in external_data(data)})


def _check_inputs(session: Session, file: str) -> None:
    for name, spec in session.inputs.items():
        if name.startswith("past_key_values"):
            raise ExportError(f"takes {name!r}: it is a decoder's graph, not an encoder's", file=file)
        if name not in _INPUTS:
            raise ExportError(f"takes an input {name!r}; encoders may take {', '.join(_INPUTS)}", file=file)
        if spec.datatype.name != "INT64":
            raise ExportError(f"takes {name!r} as {spec.datatype.name}; INT64 is needed", file=file)
        if len(spec.shape) != len(_AXES):
            raise ExportError(f"takes {name!r} with {len(spec.shape)} axes; batch and sequence are needed", file=file)
        for axis, size in zip(_AXES, spec.shape, strict=True):
            if isinstance(size, int):
                raise ExportError(
                    f"fixes the {axis} axis of {name!r} at {size}; export it with dynamic axes", file=file
                )
    for name in ("input_ids", "attention_mask"):
        if name not in session.inputs:
            raise ExportError(f"takes no {name}; rows of several lengths need it", file=file)


def _choose_output(session: Session, file: str) -> tuple[str, _Output]:
    for name, output in _OUTPUTS.items():
        spec = session.outputs.get(name)
        if spec is None:
            continue
        if spec.datatype.name != "FP32":
            raise ExportError(f"gives {name!r} as {spec.datatype.name}; FP32 is needed", file=file)
        return name, output
    raise ExportError(
        f"gives {', '.join(session.outputs)}; one output has to be {' or '.join(_OUTPUTS)}, and which other one would "
        "do cannot be guessed",
        file=file,
    )


def _run(session: Session, name: str, output: _Output, file: str) -> int:
    """Run the graph on rows of zeros. Returns the last axis of the output."""
    widths = set()
    for num_rows, num_tokens in _SHAPES:
        shape = (num_rows, num_tokens)
        inputs = {each: np.zeros(shape, np.int64) for each in _INPUTS}
        inputs["attention_mask"][:] = 1
        inputs["position_ids"][:] = np.arange(num_tokens)
        try:
            values = session.run({each: inputs[each] for each in session.inputs}, [name])[name]
        except EngineError as error:
            raise ExportError(
                f"does not run with {num_rows} rows of {num_tokens} tokens; it may have been exported for one shape",
                file=file,
            ) from error
        if values.ndim != output.num_axes or values.shape[:-1] != shape[: values.ndim - 1]:
            wanted = [*shape[: output.num_axes - 1], "width"]
            raise ExportError(f"gives {name!r} as {list(values.shape)}; {wanted} is needed", file=file)
        widths.add(values.shape[-1])
    if len(widths) != 1 or widths == {0}:
        raise ExportError(f"gives {name!r} with a last axis of {sorted(widths)}; it has to be one size", file=file)
    return int(widths.pop())


def _weights(path: Path) -> tuple[Literal["fp32", "fp16", "int8"], str]:
    """The narrowest type that matrices are stored in, 8 bits standing for fewer as well, and what to say of them."""
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise ExportError("is not an ONNX model", file=path.name) from error
    counts: Counter[str] = Counter()
    for tensor in _tensors(model.graph):
        if len(tensor.dims) > 1:
            counts[onnx.TensorProto.DataType.Name(tensor.data_type)] += int(np.prod(tensor.dims, dtype=np.int64))
    narrow = {"INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2"} & set(counts)
    half = {"FLOAT16", "BFLOAT16"} & set(counts)
    types = " and ".join(name.lower() for name, _ in counts.most_common() if name not in ("INT64", "INT32", "BOOL"))
    said = f"{types or 'float'} matrices, as published"
    return ("int8" if narrow else "fp16" if half else "fp32"), said


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Initialisers, and constants among the nodes."""
    yield from graph.initializer
    for node in graph.node:
        if node.op_type == "Constant":
            yield from (attribute.t for attribute in node.attribute if attribute.name == "value")
