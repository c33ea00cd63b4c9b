import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sardonyx.errors import ConfigError
from sardonyx_export.errors import ExportError
from sardonyx_export.sources.onnx_folder import find_graph, import_graph

WIDTH = 4
NAMES = ("input_ids", "attention_mask")
ROWS = ["batch", "sequence"]


def table(dtype=np.float32):
    return numpy_helper.from_array(np.arange(12 * WIDTH).reshape(12, WIDTH).astype(dtype), "table")


def write_graph(
    path,
    *,
    output="last_hidden_state",
    output_shape=None,
    inputs=None,
    weights=None,
    also=(),
    nodes=(),
    fixed_rows=None,
):
    """Rows of a table by token id, times the mask; ``sentence_embedding`` and ``logits`` sum them over the tokens.

    Args:
        path: of the graph.
        output: its name; a pooled one, or one for each token.
        output_shape: as declared; ``None``: without the width.
        inputs: (element type, shape) by name; ``None``: `NAMES`.
        weights: the table.
        also: further outputs, the table's rows.
        nodes: put before the others.
        fixed_rows: rows that a reshape inside of the graph allows.
    """
    inputs = inputs or dict.fromkeys(NAMES, (TensorProto.INT64, ROWS))
    weights = weights or table()
    is_pooled = output in ("sentence_embedding", "logits")
    steps = [
        *nodes,
        helper.make_node("Cast", ["table"], ["table_fp32"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["table_fp32", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask_fp32"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask_fp32", "last"], ["mask"]),
        helper.make_node("Mul", ["rows", "mask"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "middle"], ["summed"], keepdims=0),
    ]
    end = "summed" if is_pooled else "masked"
    constants = {"last": [-1], "middle": [1]}
    if fixed_rows is not None:
        constants["shape"] = [fixed_rows, -1, WIDTH]
        steps.append(helper.make_node("Reshape", [end, "shape"], ["reshaped"]))
        end = "reshaped"
    steps.append(helper.make_node("Identity", [end], [output]))
    steps += [helper.make_node("Identity", ["rows"], [name]) for name in also]
    shape = output_shape or ["batch", *([] if is_pooled else ["sequence"]), "width"]
    graph = helper.make_graph(
        steps,
        "encoder",
        [helper.make_tensor_value_info(name, *what) for name, what in inputs.items()],
        [
            helper.make_tensor_value_info(output, TensorProto.FLOAT, shape),
            *(helper.make_tensor_value_info(name, TensorProto.FLOAT, [*ROWS, "width"]) for name in also),
        ],
        [weights, *(numpy_helper.from_array(np.array(value, np.int64), name) for name, value in constants.items())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def external_table(location):
    tensor = TensorProto(name="table", data_type=TensorProto.FLOAT, dims=[12, WIDTH])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


@pytest.fixture
def source(tmp_path):
    return tmp_path / "source"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "version").mkdir()
    return tmp_path / "version"


@pytest.mark.parametrize("layout", ["model.onnx", "onnx/model.onnx", "onnx/model_quantized.onnx"])
def test_only_graph_of_a_folder_is_found(source, layout):
    write_graph(source / layout)
    assert find_graph(source) == source / layout


def test_file_is_its_own_graph(source):
    graph = write_graph(source / "any.onnx")
    write_graph(source / "other.onnx")
    assert find_graph(graph) == graph


@pytest.mark.parametrize("file", ["model_O2.onnx", "onnx/model_O2.onnx"])
def test_file_chooses_among_several_graphs(source, file):
    for name in ("model.onnx", "model_O2.onnx"):
        write_graph(source / "onnx" / name)
    assert find_graph(source, file) == source / "onnx" / "model_O2.onnx"


def test_several_graphs_are_listed_when_none_is_chosen(source):
    for name in ("onnx/model.onnx", "onnx/model_O2.onnx"):
        write_graph(source / name)
    with pytest.raises(ExportError, match=r"choose one of onnx/model.onnx, onnx/model_O2.onnx"):
        find_graph(source)


def test_same_name_in_two_folders_needs_the_path(source):
    for name in ("model.onnx", "onnx/model.onnx", "onnx/other.onnx"):
        write_graph(source / name)
    assert find_graph(source, "model.onnx") == source / "model.onnx"  # A path in the folder comes first.
    assert find_graph(source, "onnx/model.onnx") == source / "onnx" / "model.onnx"


@pytest.mark.parametrize("file", ["missing.onnx", "../outside.onnx", "config.json"])
def test_unknown_file_is_refused_with_what_there_is(source, tmp_path, file):
    write_graph(source / "model.onnx")
    write_graph(tmp_path / "outside.onnx")
    (source / "config.json").write_text("{}")
    with pytest.raises(ExportError, match=r"there are model.onnx"):
        find_graph(source, file)


def test_folder_without_graph_is_refused(source):
    source.mkdir()
    with pytest.raises(ExportError, match=r"holds no \.onnx file"):
        find_graph(source)


def test_other_file_is_refused(source):
    source.mkdir()
    (source / "model.bin").write_bytes(b"x")
    with pytest.raises(ExportError, match=r"is no \.onnx file"):
        find_graph(source / "model.bin")


def test_link_out_of_the_folder_is_refused(source, tmp_path):
    write_graph(tmp_path / "outside.onnx")
    (source / "onnx").mkdir(parents=True)
    (source / "onnx" / "model.onnx").symlink_to(tmp_path / "outside.onnx")
    with pytest.raises(ExportError, match="leaves the model's folder"):
        find_graph(source)


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        ("last_hidden_state", "tokens"),
        ("token_embeddings", "tokens"),
        ("sentence_embedding", "pooled"),
        ("logits", "logits"),
    ],
)
def test_output_says_what_the_graph_gives(source, folder, output, kind):
    graph = write_graph(source / "model.onnx", output=output)
    padded = import_graph(graph, folder)
    assert (padded.output, padded.kind, padded.width) == (output, kind, WIDTH)
    assert padded.files == ["model.onnx"]
    assert (folder / "model.onnx").read_bytes() == graph.read_bytes()


def test_pooled_output_comes_before_those_of_tokens(source, folder):
    graph = write_graph(source / "model.onnx", output="sentence_embedding", also=("token_embeddings",))
    assert import_graph(graph, folder).output == "sentence_embedding"


@pytest.mark.parametrize(
    ("dtype", "precision"), [(np.float32, "fp32"), (np.float16, "fp16"), (np.int8, "int8"), (np.uint8, "int8")]
)
def test_precision_is_that_of_the_matrices(source, folder, dtype, precision):
    padded = import_graph(write_graph(source / "model.onnx", weights=table(dtype)), folder)
    assert padded.precision == precision
    assert np.dtype(dtype).name.removesuffix("32") in padded.weights


def test_external_data_is_copied_under_its_name(source, folder):
    graph = write_graph(source / "onnx" / "model.onnx", weights=external_table("model.onnx_data"))
    (graph.parent / "model.onnx_data").write_bytes(table().raw_data)
    padded = import_graph(graph, folder)
    assert padded.files == ["model.onnx", "model.onnx_data"]
    assert (folder / "model.onnx_data").read_bytes() == table().raw_data
    assert padded.width == WIDTH


def test_files_of_a_download_cache_are_copied_through_its_links(tmp_path, folder):
    entry = tmp_path / "models--a--b"
    snapshot = entry / "snapshots" / "abc"
    blobs = write_graph(entry / "blobs" / "1111", weights=external_table("model.onnx_data")).parent
    (blobs / "2222").write_bytes(table().raw_data)
    (snapshot / "onnx").mkdir(parents=True)
    for name, blob in {"model.onnx": "1111", "model.onnx_data": "2222"}.items():
        (snapshot / "onnx" / name).symlink_to(os.path.relpath(blobs / blob, snapshot / "onnx"))
    assert import_graph(find_graph(snapshot), folder).width == WIDTH
    assert not any(each.is_symlink() for each in folder.iterdir())


@pytest.mark.parametrize(
    "location",
    ["../secret", "sub/weights", "/etc/passwd", ".hidden", "", "model.onnx", "manifest.json", "a\\b", "config.pbtxt"],
)
def test_external_data_elsewhere_or_under_another_files_name_is_refused(source, folder, tmp_path, location):
    graph = write_graph(source / "model.onnx", weights=external_table(location))
    (tmp_path / "secret").write_bytes(table().raw_data)
    (source / "sub").mkdir()
    for name in ("sub/weights", ".hidden", "manifest.json", "config.pbtxt"):
        (source / name).write_bytes(table().raw_data)
    with pytest.raises(ExportError, match="is not a plain name of a data file"):
        import_graph(graph, folder)
    assert [each.name for each in folder.iterdir()] == ["model.onnx"]


def test_external_data_behind_a_link_that_leaves_is_refused(source, folder, tmp_path):
    graph = write_graph(source / "model.onnx", weights=external_table("weights"))
    (tmp_path / "secret").write_bytes(table().raw_data)
    (source / "weights").symlink_to(tmp_path / "secret")
    with pytest.raises(ExportError, match="leaves the model's folder"):
        import_graph(graph, folder)


def test_missing_and_short_external_data_is_refused(source, folder):
    graph = write_graph(source / "model.onnx", weights=external_table("weights"))
    with pytest.raises(ExportError, match="missing"):
        import_graph(graph, folder)
    (source / "weights").write_bytes(b"short")
    with pytest.raises(ConfigError):
        import_graph(graph, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"past_key_values.0.key": (TensorProto.FLOAT, ROWS)}, "'past_key_values.0.key': it is a decoder's graph"),
        ({"pixel_values": (TensorProto.FLOAT, ROWS)}, "takes an input 'pixel_values'; encoders may take"),
        ({"attention_mask": (TensorProto.INT32, ROWS)}, "takes 'attention_mask' as INT32; INT64 is needed"),
        ({"position_ids": (TensorProto.INT64, ["sequence"])}, "takes 'position_ids' with 1 axes"),
        ({"input_ids": (TensorProto.INT64, [1, "sequence"])}, "fixes the batch axis of 'input_ids' at 1"),
        ({"attention_mask": (TensorProto.INT64, ["batch", 128])}, "fixes the sequence axis of 'attention_mask' at 128"),
    ],
)
def test_inputs_that_encoders_have_not_are_refused_by_name(source, folder, changes, message):
    inputs = dict.fromkeys(NAMES, (TensorProto.INT64, ROWS)) | changes
    graph = write_graph(source / "model.onnx", inputs=inputs)
    with pytest.raises(ExportError, match=message):
        import_graph(graph, folder)


def test_further_inputs_of_encoders_are_given(source, folder):
    inputs = dict.fromkeys((*NAMES, "token_type_ids", "position_ids"), (TensorProto.INT64, ROWS))
    assert import_graph(write_graph(source / "model.onnx", inputs=inputs), folder).width == WIDTH


def test_graph_without_mask_is_refused(source, folder):
    ones = [
        helper.make_node("Shape", ["input_ids"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["attention_mask"]),
    ]
    graph = write_graph(source / "model.onnx", inputs={"input_ids": (TensorProto.INT64, ROWS)}, nodes=ones)
    with pytest.raises(ExportError, match="takes no attention_mask"):
        import_graph(graph, folder)


@pytest.mark.parametrize("output", ["pooler_output", "scores"])
def test_other_outputs_are_not_guessed(source, folder, output):
    with pytest.raises(ExportError, match=f"gives {output}; one output has to be sentence_embedding or logits"):
        import_graph(write_graph(source / "model.onnx", output=output), folder)


def test_logits_of_every_token_are_refused(source, folder):
    graph = write_graph(source / "model.onnx", output="scores")
    model = onnx.load(graph)
    model.graph.output[0].name = model.graph.node[-1].output[0] = "logits"
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"gives 'logits' as \[1, 2, 4\]; \[1, 'width'\] is needed"):
        import_graph(graph, folder)


def test_graph_with_rows_built_in_is_refused(source, folder):
    graph = write_graph(source / "model.onnx", fixed_rows=1)
    with pytest.raises(ExportError, match=r"gives 'last_hidden_state' as \[1, 10, 4\]; \[2, 5, 'width'\] is needed"):
        import_graph(graph, folder)


@pytest.mark.parametrize("data", [b"", b"not an ONNX model"])
def test_damaged_file_is_refused(source, folder, data):
    source.mkdir()
    (source / "model.onnx").write_bytes(data)
    with pytest.raises(ConfigError, match=r"model\.onnx"):
        import_graph(Path(source / "model.onnx"), folder)
