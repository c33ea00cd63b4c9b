"""Models without a builder of their own, traced and run as the server runs them."""

import sys
from pathlib import Path

import numpy as np
import pytest
from tests.export.encoder_checkpoints import HIDDEN_SIZE, make_encoder

from sardonyx.repository.families import Encoder
from sardonyx_export.built import PaddedGraph
from sardonyx_export.errors import ExportError
from sardonyx_export.stages.encoder_reference import EncodedRow
from sardonyx_export.stages.encoder_verify import run_graph
from sardonyx_export.traced import Task, export_traced, torch_outputs

torch = pytest.importorskip("torch", reason="the extra `export-torch` is not installed")
pytest.importorskip("onnxscript", reason="the extra `export-torch` is not installed")
onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.slow  # tracing takes seconds a model

ROWS = ([5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15])
SIZES = {"embedding_size": 16}
EXTRA = {
    "Albert": SIZES,
    "MobileBert": SIZES | {"intra_bottleneck_size": 16, "true_hidden_size": 16},
    "SqueezeBert": {"embedding_size": HIDDEN_SIZE},
    "DebertaV2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 16,
        "type_vocab_size": 0,
    },
}


def make(folder: Path, architecture: str, **changes: object):
    family = architecture.removesuffix("Model").removesuffix("ForSequenceClassification")
    return make_encoder(folder, architecture, **EXTRA.get(family, {}) | changes)


def export(path: Path, folder: Path, task: Task) -> PaddedGraph:
    folder.mkdir()
    return export_traced(path, folder, task)


def signature(graph: Path) -> dict[str, list[str | int]]:
    model = onnx.load(str(graph), load_external_data=False)
    return {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }


def check_logits(path: Path, folder: Path, task: Task, num_labels: int) -> None:
    padded = export(path, folder, task)
    assert (padded.output, padded.kind, padded.width) == ("logits", "logits", num_labels)
    encoder = Encoder(layout="padded", output="logits", width=num_labels, vocab_size=128, max_model_len=48)
    rows = [EncodedRow(token_ids=row) for row in ROWS]
    (actual,) = run_graph(folder / padded.files[0], None, "m", encoder, [rows])
    expected = np.stack(torch_outputs(path, task, ROWS))
    assert np.ptp(expected, axis=0).max() > 0.01  # Rows that are alike would prove nothing.
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4)


def test_encoder_becomes_a_padded_graph_of_token_vectors(tmp_path: Path) -> None:
    make(tmp_path / "m", "BertModel", num_hidden_layers=1)
    padded = export(tmp_path / "m", tmp_path / "v", "embeddings")
    assert (padded.output, padded.kind, padded.width) == ("last_hidden_state", "tokens", HIDDEN_SIZE)
    assert sorted(padded.files) == sorted(each.name for each in (tmp_path / "v").iterdir())
    rows = ["batch", "sequence"]
    names = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), rows)
    assert signature(tmp_path / "v" / "model.onnx") == names | {"last_hidden_state": [*rows, HIDDEN_SIZE]}
    assert b"site-packages" not in (tmp_path / "v" / "model.onnx").read_bytes()
    outputs = torch_outputs(tmp_path / "m", "embeddings", ROWS)
    assert [each.shape for each in outputs] == [(len(row), HIDDEN_SIZE) for row in ROWS]


def test_classifier_without_token_types_becomes_a_padded_graph_of_logits(tmp_path: Path) -> None:
    make(tmp_path / "m", "DebertaV2ForSequenceClassification", num_hidden_layers=1, num_labels=3)
    check_logits(tmp_path / "m", tmp_path / "v", "classifier", 3)
    names = {key: ["batch", "sequence"] for key in ("input_ids", "attention_mask")}
    assert signature(tmp_path / "v" / "model.onnx") == names | {"logits": ["batch", 3]}


@pytest.mark.slow
def test_reranker_becomes_a_padded_graph_of_one_logit(tmp_path: Path) -> None:
    make(tmp_path / "m", "ElectraForSequenceClassification", num_labels=1)
    check_logits(tmp_path / "m", tmp_path / "v", "reranker", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    ["ElectraModel", "AlbertModel", "DebertaV2Model", "SqueezeBertModel", "CamembertModel", "ModernBertModel"],
)
def test_encoders_are_traced(tmp_path: Path, architecture: str) -> None:
    make(tmp_path / "m", architecture)
    assert export(tmp_path / "m", tmp_path / "v", "embeddings").width == HIDDEN_SIZE


@pytest.mark.slow
@pytest.mark.parametrize("pads_with_zeros", [True, False])
def test_mobilebert_is_traced_if_its_padding_token_is_zero(tmp_path: Path, pads_with_zeros: bool) -> None:
    """It reads each token's neighbours, and behind the last one zeros or the padding token."""
    model = make(tmp_path / "m", "MobileBertModel")
    if pads_with_zeros:
        with torch.no_grad():
            model.embeddings.word_embeddings.weight[0] = 0
        model.save_pretrained(tmp_path / "m")
        assert export(tmp_path / "m", tmp_path / "v", "embeddings").width == HIDDEN_SIZE
    else:
        with pytest.raises(ExportError, match="padding changes its results"):
            export(tmp_path / "m", tmp_path / "v", "embeddings")


@pytest.mark.slow
def test_convbert_is_refused_because_its_convolutions_see_padding(tmp_path: Path) -> None:
    make(tmp_path / "m", "ConvBertModel")
    with pytest.raises(ExportError, match="ConvBertModel cannot be served in batches, for padding changes its results"):
        export(tmp_path / "m", tmp_path / "v", "embeddings")


def test_encoder_without_classification_weights_is_no_classifier(tmp_path: Path) -> None:
    make(tmp_path / "m", "ElectraModel", num_hidden_layers=1)
    with pytest.raises(ExportError, match=r"has no weights for classifier\..* trained for classifier has them"):
        export(tmp_path / "m", tmp_path / "v", "classifier")


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "m", "BartModel", d_model=32, encoder_layers=1, decoder_layers=1, max_position_embeddings=48)
    with pytest.raises(ExportError, match="BartModel is an encoder-decoder"):
        export(tmp_path / "m", tmp_path / "v", "embeddings")


def test_model_without_mask_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "m", "FNetModel", num_hidden_layers=1)
    with pytest.raises(ExportError, match="FNetModel does not take input_ids and attention_mask"):
        export(tmp_path / "m", tmp_path / "v", "embeddings")


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = make(tmp_path / "m", "ElectraModel", num_hidden_layers=1)
    torch.save(model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"cannot load it as a model for embeddings: .*model\.safetensors"):
        export(tmp_path / "m", tmp_path / "v", "embeddings")


def test_checkpoints_own_code_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    marker = tmp_path / "ran"
    (tmp_path / "m" / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (tmp_path / "m" / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}'
    )
    with pytest.raises(ExportError, match="cannot load it as a model for embeddings"):
        export(tmp_path / "m", tmp_path / "v", "embeddings")
    assert not marker.exists()


def test_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(ExportError, match=r"config\.json: is missing"):
        export(tmp_path / "m", tmp_path / "v", "embeddings")


@pytest.mark.parametrize("module", ["torch", "transformers", "optimum.exporters.tasks", "onnxscript"])
def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ExportError, match=r"install sardonyx\[export-torch\]"):
        export(tmp_path, tmp_path / "v", "embeddings")
