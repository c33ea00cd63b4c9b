"""Text encoder, Whisper's encoder and UNet with random weights, exported as for a card: milliseconds of a run.

Inputs and outputs stay on the card, so that what is measured is the graph. Sources are made with torch on the spot.
"""

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from sardonyx.runners.encoder import packed_tensors
from sardonyx.runtime.providers import execution_provider
from sardonyx.runtime.session import Session, SessionConfig, open_session
from sardonyx.tensors import TensorRequest
from sardonyx_export.builders.whisper import build_whisper
from sardonyx_export.families.whisper import read_whisper_spec
from sardonyx_export.pipeline import run_export
from sardonyx_export.request import ExportRequest
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder

Arrays = dict[str, npt.NDArray[Any]]
_VOCAB_SIZE = 288
"""Of Whisper: a small one, since its decoder takes no part here."""


def sizes(*, is_rehearsal: bool) -> dict[str, dict[str, Any]]:
    """What is run: BERT base, Whisper base, and Stable Diffusion 1.5's UNet in half its width; or tiny ones."""
    encoder = {
        "vocab_size": 30_522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
    }
    whisper = {
        "vocab_size": _VOCAB_SIZE,
        "num_mel_bins": 80,
        "d_model": 512,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": 8,
        "decoder_attention_heads": 8,
        "encoder_ffn_dim": 2048,
        "decoder_ffn_dim": 2048,
        "max_source_positions": 1500,
        "max_target_positions": 448,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 3,
    }
    unet: dict[str, Any] = {
        "sample_size": 16,
        "layers_per_block": 2,
        "block_out_channels": [160, 320, 640, 640],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "norm_num_groups": 32,
    }
    if is_rehearsal:
        encoder |= {"num_hidden_layers": 1, "hidden_size": 128, "num_attention_heads": 2, "vocab_size": 128}
        whisper |= {"encoder_layers": 1, "decoder_layers": 1, "d_model": 64, "max_source_positions": 100}
        whisper |= {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
        unet |= {"block_out_channels": [32, 64], "layers_per_block": 1, "cross_attention_dim": 32}
        unet |= {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
        unet |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
    return {
        "encoder": {
            "config": encoder,
            "length": 32 if is_rehearsal else 128,
            "batches": [1, 8, 64][: 4 - 2 * is_rehearsal],
        },
        "whisper": {"config": whisper, "batches": [1, 4, 16][: 4 - 2 * is_rehearsal]},
        "unet": {
            "config": unet,
            "side": 16 if is_rehearsal else 64,
            "tokens": 12,
            "batches": [1, 2, 8][: 4 - 2 * is_rehearsal],
        },
    }


def measure_families(
    work: Path, wanted: Mapping[str, dict[str, Any]], repeats: int, *, is_rehearsal: bool
) -> Iterator[dict[str, Any]]:
    """A result for each family and batch; what cannot be exported or run says why.

    Args:
        work: a folder for sources and models.
        wanted: of `sizes`.
        repeats: of a run.
        is_rehearsal: on the CPU, with its graphs.
    """
    makers: dict[str, Callable[[Path, dict[str, Any]], None]] = {
        "encoder": _make_encoder,
        "whisper": _make_whisper,
        "unet": _make_pipeline,
    }
    feeds: dict[str, Callable[[dict[str, Any], int], Arrays]] = {
        "encoder": _encoder_feeds,
        "whisper": _whisper_feeds,
        "unet": _unet_feeds,
    }
    for name, chosen in wanted.items():
        try:
            started_s = time.perf_counter()
            source = work / "sources" / name
            if not source.exists():
                makers[name](source, chosen["config"])
            target: Literal["cpu", "cuda"] = "cpu" if is_rehearsal else "cuda"
            if name == "whisper":
                path = _build_whisper(source, work / "models" / name, "fp32" if is_rehearsal else "fp16")
            else:
                path = _export(source, work / "models", name, target)
            session = _open(path, is_rehearsal=is_rehearsal)
            build_s = round(time.perf_counter() - started_s, 1)
            yield {"name": name, "build_s": build_s, "target": target}
            for batch in chosen["batches"]:
                taken_s = _time(session, feeds[name](chosen, batch), repeats, is_rehearsal=is_rehearsal)
                yield {"name": name, "batch": batch, "run_ms": round(1e3 * taken_s, 3)}
            session.close()
        except Exception as error:  # a library that is missing leaves the other families
            yield {"name": name, "error": f"{type(error).__name__}: {error}"[:300]}


def _export(source: Path, models: Path, name: str, target: Literal["cpu", "cuda"]) -> Path:
    """The graph that is measured."""
    request = ExportRequest(
        source=str(source), repository=models, name=f"{name}-{target}", target=target, adds_version=True
    )
    result = run_export(request, progress=lambda *_: None, announce=lambda _: None)
    return result.path / result.manifest.graphs[name].model.path


def _build_whisper(source: Path, folder: Path, precision: Literal["fp32", "fp16"]) -> Path:
    """The encoder's graph. Nothing is verified here: `tests/gpu` does so with a small one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    checkpoint = SafetensorsFolder(source, uri="random")
    report = build_whisper(checkpoint, read_whisper_spec(checkpoint.config), folder, precision=precision)
    return report.graphs["encoder"][0]


def _make_encoder(folder: Path, config: dict[str, Any]) -> None:
    from tests.export.encoder_checkpoints import make_encoder

    make_encoder(folder, "BertModel", **config)


def _make_whisper(folder: Path, config: dict[str, Any]) -> None:
    from tests.export.whisper_checkpoints import make_whisper

    make_whisper(folder, **config)


def _make_pipeline(folder: Path, config: dict[str, Any]) -> None:
    from tests.export.diffusion_pipelines import make_pipeline

    width = config["cross_attention_dim"]
    make_pipeline(folder, unet=config, text={"hidden_size": width, "intermediate_size": width})


def _encoder_feeds(chosen: dict[str, Any], batch: int) -> Arrays:
    draw = np.random.default_rng(0)
    rows = [
        TensorRequest(
            id=number,
            inputs={"input_ids": draw.integers(5, chosen["config"]["vocab_size"], chosen["length"])},
            outputs=("values",),
        )
        for number in range(batch)
    ]
    return packed_tensors(rows, np.zeros(batch * chosen["length"], np.int64))


def _whisper_feeds(chosen: dict[str, Any], batch: int) -> Arrays:
    config = chosen["config"]
    shape = (batch, config["num_mel_bins"], 2 * config["max_source_positions"])
    return {"mel": np.random.default_rng(0).standard_normal(shape, np.float32)}


def _unet_feeds(chosen: dict[str, Any], batch: int) -> Arrays:
    draw, side, width = np.random.default_rng(0), chosen["side"], chosen["config"]["cross_attention_dim"]
    return {
        "sample": draw.standard_normal((batch, 4, side, side), np.float32),
        "timestep": np.full(batch, 500, np.float32),
        "encoder_hidden_states": draw.standard_normal((batch, chosen["tokens"], width), np.float32),
    }


def _open(path: Path, *, is_rehearsal: bool) -> Session:
    if is_rehearsal:
        return open_session(path, model_name="card")
    provider = execution_provider("cuda", {"device_id": "0"})
    return open_session(path, model_name="card", config=SessionConfig(providers=(provider,), is_strict=True))


def _time(session: Session, feeds: Arrays, repeats: int, *, is_rehearsal: bool) -> float:
    """Median seconds of a run; it returns when the card is done."""
    place = "cpu" if is_rehearsal else "cuda"
    binding: Any = session.new_io_binding()
    kept = []
    for name, spec in session.inputs.items():
        values = np.ascontiguousarray(feeds[name].astype(spec.datatype.array))
        kept.append(ort.OrtValue.ortvalue_from_numpy(values, place, 0))
        binding.bind_ortvalue_input(name, kept[-1])
    for name in session.outputs:
        binding.bind_output(name, place, 0)
    taken = []
    for number in range(repeats + 3):
        started_s = time.perf_counter()
        session.run_binding(binding)
        if number >= 3:
            taken.append(time.perf_counter() - started_s)
    return statistics.median(taken)
