"""Encoders, Whisper's encoder and UNets on the card, against the CPU.

The CPU's graphs run on CUDA as they are, in float32; TF32, which keeps ten bits of a number, is switched off, so that a
wrong result cannot hide behind its rounding. Graphs that were exported for cards compute in 16 bits, and are compared
with the CPU's of the same source.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.gpu.card import HAS_CARD, needs_device

pytest.importorskip("torch", reason="random checkpoints are made with torch, which is not installed")
pytest.importorskip("transformers", reason="random checkpoints are made with transformers, which is not installed")

from tests.export.encoder_checkpoints import VOCAB_SIZE, make_encoder
from tests.export.whisper_checkpoints import make_whisper

from sardonyx.repository.manifest import Manifest
from sardonyx.runners.encoder import OUTPUT, EncoderGraphs, EncoderRunner
from sardonyx.runtime.providers import execution_provider
from sardonyx.runtime.session import Session, SessionConfig, open_session
from sardonyx.tensors import TensorBatch, TensorRequest, TensorRow
from sardonyx_export.builders.whisper import build_whisper
from sardonyx_export.families.whisper import read_whisper_spec
from sardonyx_export.pipeline import run_export
from sardonyx_export.request import ExportRequest
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder

pytestmark = needs_device

Arrays = Mapping[str, npt.NDArray[Any]]
on_card = pytest.mark.skipif(not HAS_CARD, reason="the graph has operators that CUDA alone has")


def export(source: Path, root: Path, **options: Any) -> tuple[Path, Manifest]:
    request = ExportRequest(source=str(source), repository=root, **options)
    result = run_export(request, progress=lambda *_: None, announce=lambda _: None)
    return result.path, result.manifest


def open_on_card(path: Path) -> Session:
    """Nothing but shapes may be computed elsewhere. In a rehearsal: the CPU."""
    if not HAS_CARD:
        return open_session(path, model_name="test")
    provider = execution_provider("cuda", {"device_id": "0", "use_tf32": "0"})
    return open_session(path, model_name="test", config=SessionConfig(providers=(provider,), is_strict=True))


def run_both(path: Path, feeds: Arrays) -> tuple[Arrays, Arrays]:
    """The outputs on the CPU and on the card."""
    outputs = []
    for session in (open_session(path, model_name="test"), open_on_card(path)):
        outputs.append({name: values.copy() for name, values in session.run(feeds).items()})
        session.close()
    return outputs[0], outputs[1]


def random_feeds(path: Path, sizes: Mapping[str, int]) -> dict[str, npt.NDArray[Any]]:
    """Inputs of a graph, its free dimensions as `sizes` says."""
    session, draw = open_session(path, model_name="test"), np.random.default_rng(8)
    feeds = {}
    for name, spec in session.inputs.items():
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        assert spec.datatype.name == "FP32", name
        feeds[name] = draw.standard_normal(shape, np.float32)
    session.close()
    return feeds


def assert_close(expected: Arrays, found: Arrays, relative: float) -> None:
    """Largest difference, as a share of the output's largest value."""
    for name, values in expected.items():
        assert np.isfinite(found[name]).all(), f"{name} is not finite"
        error = np.abs(found[name].astype(np.float32) - values).max() / np.abs(values).max()
        assert error <= relative, f"{name} is off by {error:.2g} of its largest value; {relative:g} is allowed"


# Encoders


def texts() -> list[npt.NDArray[np.int64]]:
    draw = np.random.default_rng(4)
    return [draw.integers(5, VOCAB_SIZE, length) for length in (1, 3, 40, 17, 48, 2)]


def embed(folder: Path, manifest: Manifest, session: Session) -> npt.NDArray[np.float32]:
    """All texts in one step of the server's own runner."""
    assert manifest.encoder is not None
    runner = EncoderRunner([EncoderGraphs(session)], manifest.encoder)
    rows = [
        TensorRow(TensorRequest(id=number, inputs={"input_ids": ids}, outputs=(OUTPUT,)))
        for number, ids in enumerate(texts())
    ]
    results = runner.execute(TensorBatch(rows), 0).results
    runner.close()
    return np.stack([result[OUTPUT] for result in results if isinstance(result, dict)])


def make_bert(folder: Path) -> Path:
    """Heads of 64, which all kernels of attention take."""
    make_encoder(folder, "BertModel", hidden_size=256, num_attention_heads=4, intermediate_size=512)
    return folder


def assert_same_directions(expected: npt.NDArray[Any], found: npt.NDArray[Any], least: float) -> None:
    assert found.shape == expected.shape, "a text failed"
    norms = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
    cosines = (expected * found).sum(axis=1) / norms
    assert (cosines >= least).all(), f"the smallest cosine is {cosines.min():.6f}; {least} is needed"


def test_encoder_of_the_cpu_gives_the_same_embeddings_on_the_card(tmp_path: Path) -> None:
    path, manifest = export(make_bert(tmp_path / "bert"), tmp_path / "models")
    graph = path / manifest.graphs["encoder"].model.path
    expected = embed(path, manifest, open_session(graph, model_name="test"))
    assert_same_directions(expected, embed(path, manifest, open_on_card(graph)), 0.99999)


@on_card
@pytest.mark.parametrize(("precision", "least"), [("fp16", 0.9999), ("bf16", 0.998)])
def test_encoder_for_cards_gives_the_cpu_s_embeddings(tmp_path: Path, precision: Any, least: float) -> None:
    source = make_bert(tmp_path / "bert")
    cpu, manifest = export(source, tmp_path / "cpu")
    expected = embed(cpu, manifest, open_session(cpu / manifest.graphs["encoder"].model.path, model_name="test"))
    card, manifest = export(source, tmp_path / "card", target="cuda", precision=precision)
    found = embed(card, manifest, open_on_card(card / manifest.graphs["encoder"].model.path))
    assert_same_directions(expected, found, least)


# Whisper


def test_whisper_s_encoder_hears_the_same_on_the_card(tmp_path: Path) -> None:
    """Of the CPU's decoder nothing is run: it needs a newer ONNX Runtime than there is for CUDA. See `test_speech`."""
    source, built = tmp_path / "whisper", tmp_path / "built"
    sizes = {"d_model": 128, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}
    make_whisper(source, encoder_attention_heads=2, decoder_attention_heads=2, **sizes)
    checkpoint = SafetensorsFolder(source, uri="random")
    built.mkdir()
    report = build_whisper(checkpoint, read_whisper_spec(checkpoint.config), built, precision="fp32")
    graph = report.graphs["encoder"][0]
    assert_close(*run_both(graph, random_feeds(graph, {"B": 3})), 1e-4)


# Diffusion

LATENT_SIDE = 8


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers", reason="random pipelines are made with diffusers, which is not installed")
    pytest.importorskip("onnxscript", reason="pipelines are traced with onnxscript, which is not installed")
    from tests.export.diffusion_pipelines import make_pipeline

    unet = {"block_out_channels": (64, 128), "norm_num_groups": 16, "attention_head_dim": 2}
    return make_pipeline(tmp_path_factory.mktemp("pipeline") / "sd", unet=unet)


@pytest.fixture(scope="module")
def diffusion(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    return export(pipeline, tmp_path_factory.mktemp("diffusion"))


def picture_sizes() -> dict[str, int]:
    side = LATENT_SIDE
    return {"batch": 2, "y": side, "x": side + 4, "height": 4 * side, "width": 4 * side + 16, "tokens": 12}


@pytest.mark.parametrize("role", ["unet", "vae_decoder", "vae_encoder"])
def test_diffusion_graph_gives_the_same_on_the_card(diffusion: tuple[Path, Manifest], role: str) -> None:
    folder, manifest = diffusion
    graph = folder / manifest.graphs[role].model.path
    assert_close(*run_both(graph, random_feeds(graph, picture_sizes())), 1e-3)


@on_card
@pytest.mark.parametrize("role", ["unet", "vae_decoder"])
def test_diffusion_graph_for_cards_gives_the_cpu_s_numbers(
    pipeline: Path, diffusion: tuple[Path, Manifest], tmp_path: Path, role: str
) -> None:
    folder, manifest = diffusion
    graph = folder / manifest.graphs[role].model.path
    feeds = random_feeds(graph, picture_sizes())
    session = open_session(graph, model_name="test")
    expected = session.run(feeds)
    path, made = export(pipeline, tmp_path / "card", target="cuda", precision="fp16")
    on_card_session = open_on_card(path / made.graphs[role].model.path)
    halves = {name: values.astype(on_card_session.inputs[name].datatype.array) for name, values in feeds.items()}
    assert_close(expected, on_card_session.run(halves), 0.02)
    on_card_session.close()
    session.close()
