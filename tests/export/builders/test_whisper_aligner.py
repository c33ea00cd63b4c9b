"""The aligner of a tiny Whisper against transformers: attention before the softmax, and logprobs."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from tests.export.whisper_checkpoints import make_whisper

from sardonyx.runtime.session import open_session
from sardonyx_export.builders.whisper import build_whisper
from sardonyx_export.builders.whisper_aligner import Alignment
from sardonyx_export.families.whisper import read_whisper_spec
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder

Array = npt.NDArray[np.float32]
HEADS = [[2, 1], [0, 0], [0, 1], [1, 0]]
END_ID = 80
IDS = [83, 10, 79, 12, 80, 14]


class Exported:
    """A tiny model and what its aligner makes of a window."""

    def __init__(self, folder: Path, precision: Literal["fp32", "int8"] = "fp32") -> None:
        self.model = make_whisper(folder / "source")
        checkpoint = SafetensorsFolder(folder / "source", uri="tiny")
        spec = read_whisper_spec(checkpoint.config)
        (folder / "graphs").mkdir()
        alignment = Alignment(heads=HEADS, end_id=END_ID)
        report = build_whisper(checkpoint, spec, folder / "graphs", precision=precision, alignment=alignment)
        self.files = report.graphs
        self.mel = np.random.default_rng(3).standard_normal((1, spec.num_mels, spec.num_frames)).astype(np.float32)

    def align(self, ids: list[int]) -> dict[str, Array]:
        encoder, aligner = (open_session(self.files[role][0], model_name=role) for role in ("encoder", "aligner"))
        cross = encoder.run({"mel": self.mel})
        try:
            return aligner.run({"input_ids": np.array([ids], np.int64), **cross})
        finally:
            encoder.close()
            aligner.close()

    def reference(self, ids: list[int]) -> Any:
        with torch.no_grad():
            return self.model(
                input_features=torch.from_numpy(self.mel),
                decoder_input_ids=torch.tensor([ids]),
                output_attentions=True,
            )

    def expected_logprobs(self, ids: list[int]) -> Array:
        shares = torch.log_softmax(self.reference(ids).logits[0, :-1, :END_ID], dim=-1)
        following = torch.tensor(ids[1:]).clamp(max=END_ID - 1)
        return shares.gather(1, following[:, None])[:, 0].numpy()


@pytest.fixture
def exported(tmp_path: Path) -> Exported:
    return Exported(tmp_path)


def test_attention_is_that_of_the_heads_in_their_order(exported: Exported) -> None:
    attention = exported.align(IDS)["attention"]
    shares = torch.softmax(torch.from_numpy(attention.copy()), dim=-1).numpy()
    layers = exported.reference(IDS).cross_attentions
    expected = np.stack([layers[layer][0, head].numpy() for layer, head in HEADS])
    np.testing.assert_allclose(shares, expected, atol=1e-5)


def test_attention_is_before_the_softmax_and_scaled(exported: Exported) -> None:
    decoder, (layer, head), size = exported.model.model.decoder, HEADS[0], 16
    taken: list[torch.Tensor] = []
    hook = decoder.layers[layer].encoder_attn.q_proj.register_forward_hook(lambda _m, _i, output: taken.append(output))
    encoded = exported.reference(IDS).encoder_last_hidden_state
    hook.remove()
    with torch.no_grad():
        key = decoder.layers[layer].encoder_attn.k_proj(encoded)[0, :, head * size : (head + 1) * size]
        expected = taken[0][0, :, head * size : (head + 1) * size] @ key.T * size**-0.5
    np.testing.assert_allclose(exported.align(IDS)["attention"][0], expected.numpy(), atol=1e-4)


def test_logprobs_are_of_each_next_token_among_text(exported: Exported) -> None:
    actual, expected = exported.align(IDS)["logprobs"], exported.expected_logprobs(IDS)
    is_text = np.array(IDS[1:]) < END_ID
    assert actual.shape == (len(IDS) - 1,)
    np.testing.assert_allclose(actual[is_text], expected[is_text], atol=2e-4)
    assert np.isfinite(actual).all()


def test_a_token_sees_none_behind_it(exported: Exported) -> None:
    whole, begun = exported.align(IDS), exported.align(IDS[:3])
    np.testing.assert_allclose(whole["attention"][:, :3], begun["attention"], atol=1e-5)
    np.testing.assert_allclose(whole["logprobs"][:2], begun["logprobs"], atol=1e-5)


def test_weights_are_the_decoders_own_bytes(exported: Exported) -> None:
    assert [file.name for file in exported.files["aligner"]] == ["aligner.onnx", "decoder.onnx.data"]
    assert exported.files["aligner"][1] == exported.files["decoder"][1]
    decoder, aligner = (
        onnx.load(exported.files[role][0], load_external_data=False).graph for role in ("decoder", "aligner")
    )
    places = {each.name: each.SerializeToString() for each in decoder.initializer if each.external_data}
    shared = {each.name: each.SerializeToString() for each in aligner.initializer if each.external_data}
    assert shared == places


def test_int8_keeps_close_to_the_source(tmp_path: Path) -> None:
    exported = Exported(tmp_path, "int8")
    given, attention = exported.align(IDS), Exported(tmp_path / "exact").align(IDS)["attention"]
    cosine = (given["attention"] * attention).sum() / np.linalg.norm(given["attention"]) / np.linalg.norm(attention)
    assert cosine > 0.99
    is_text = np.array(IDS[1:]) < END_ID
    np.testing.assert_allclose(given["logprobs"][is_text], exported.expected_logprobs(IDS)[is_text], atol=1.0)


def test_without_alignment_there_is_no_aligner(tmp_path: Path) -> None:
    make_whisper(tmp_path / "source")
    checkpoint = SafetensorsFolder(tmp_path / "source", uri="tiny")
    report = build_whisper(checkpoint, read_whisper_spec(checkpoint.config), tmp_path, precision="fp32")
    assert sorted(report.graphs) == ["decoder", "encoder"]
    assert not (tmp_path / "aligner.onnx").exists()
