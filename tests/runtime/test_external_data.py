import os

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import _get_all_tensors

from sardonyx.errors import ConfigError
from sardonyx.runtime.external_data import ExternalData, check_external_data, external_data
from sardonyx.runtime.session import open_session


def external_tensor(location, name="w", **entries):
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model_with(initializers=(), nodes=(), functions=(), sparse=()):
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    graph = helper.make_graph(list(nodes), "g", [], [output], list(initializers))
    graph.sparse_initializer.extend(sparse)
    return helper.make_model(
        graph, functions=list(functions), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )


def constant(tensor):
    return helper.make_node("Constant", [], ["y"], value=tensor)


def model_with_tensor_in(place, tensor):
    if place == "initializer":
        return model_with([tensor])
    if place == "node":
        return model_with(nodes=[constant(tensor)])
    if place == "list":
        return model_with(nodes=[helper.make_node("X", [], ["y"], values=[tensor])])
    if place == "subgraph":
        inner = helper.make_graph([constant(tensor)], "inner", [], [])
        return model_with(nodes=[helper.make_node("If", ["c"], ["y"], then_branch=inner)])
    if place == "function":
        function = helper.make_function("d", "f", [], ["y"], [constant(tensor)], [helper.make_opsetid("", 21)])
        return model_with(functions=[function])
    sparse = onnx.SparseTensorProto(dims=[2])
    (sparse.indices if place == "sparse indices" else sparse.values).CopyFrom(tensor)
    if place == "sparse attribute":
        return model_with(nodes=[helper.make_node("Constant", [], ["y"], sparse_value=sparse)])
    return model_with(sparse=[sparse])


PLACES = [
    "initializer", "node", "list", "subgraph", "function", "sparse values", "sparse indices", "sparse attribute",
]  # fmt: skip


def write_model(folder, location, **entries):
    path = folder / "model.onnx"
    path.write_bytes(model_with([external_tensor(location, **entries)]).SerializeToString())
    return path


@pytest.mark.parametrize("place", PLACES)
def test_external_data_is_found_wherever_a_tensor_can_be(place):
    model = model_with_tensor_in(place, external_tensor("weights", offset=8, length=24))
    assert list(external_data(model.SerializeToString())) == [ExternalData("weights", 8, 24)]


def test_graphs_of_a_training_section_are_read_too():
    model = model_with()
    model.training_info.add().algorithm.initializer.append(external_tensor("weights"))
    assert [entry.location for entry in external_data(model.SerializeToString())] == ["weights"]


def test_model_as_the_onnx_package_writes_it_passes(tmp_path):
    weights = numpy_helper.from_array(np.arange(2000, dtype=np.float32), "w")
    inner = onnx.numpy_helper.from_array(np.ones(2, np.float32))
    onnx.save_model(
        model_with([weights], [constant(inner)]),
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
    )
    check_external_data(tmp_path / "model.onnx")


def test_file_in_a_subfolder_passes(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a").write_bytes(bytes(8))
    check_external_data(write_model(tmp_path, "weights/a", offset=0, length=8))


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd",
        "../secret",
        "weights/../../secret",
        "./w",
        "a//w",
        "w/",
        "",
        "..",
        ".",
        "a\\..\\w",
        "w\0",
        "*/_ORT_MEM_ADDR_/*",  # what ONNX Runtime takes for an address in its own memory
    ],
)
def test_location_that_is_no_plain_path_inside_the_folder_is_refused(tmp_path, location):
    folder = tmp_path / "model"
    (folder / "weights").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(bytes(8))
    with pytest.raises(ConfigError, match=r"model\.onnx: external data .*inside the model's folder"):
        check_external_data(write_model(folder, location))


def test_symbolic_link_is_refused(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(8))
    (tmp_path / "w").symlink_to("secret")
    with pytest.raises(ConfigError, match="'w' cannot be opened inside the model's folder"):
        check_external_data(write_model(tmp_path, "w"))


def test_file_below_a_linked_folder_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "w").write_bytes(bytes(8))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="'weights/w' cannot be opened inside the model's folder"):
        check_external_data(write_model(tmp_path / "model", "weights/w"))


def test_hard_link_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(8))
    (tmp_path / "w").hardlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match="'w' has 2 hard links; replace it by a copy"):
        check_external_data(write_model(tmp_path, "w"))


def test_named_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "w")
    with pytest.raises(ConfigError, match="'w' is not a regular file"):
        check_external_data(write_model(tmp_path, "w"))


def test_folder_and_missing_file_are_refused(tmp_path):
    (tmp_path / "w").mkdir()
    with pytest.raises(ConfigError, match="'w' is not a regular file"):
        check_external_data(write_model(tmp_path, "w"))
    with pytest.raises(ConfigError, match=r"'x' cannot be opened .*: No such file"):
        check_external_data(write_model(tmp_path, "x"))


def test_tensor_beyond_the_end_of_its_file_is_refused(tmp_path):
    (tmp_path / "w").write_bytes(bytes(100))
    check_external_data(write_model(tmp_path, "w", offset=60, length=40))
    with pytest.raises(ConfigError, match="'w' has 100 bytes; a tensor lies at 60 with 41"):
        check_external_data(write_model(tmp_path, "w", offset=60, length=41))


@pytest.mark.parametrize("offset", ["-1", "1e3", "٣", "9" * 30, "x"])
def test_offset_that_is_no_whole_number_is_refused(tmp_path, offset):
    (tmp_path / "w").write_bytes(bytes(100))
    with pytest.raises(ConfigError, match="is not a whole number"):
        check_external_data(write_model(tmp_path, "w", offset=offset))


def test_second_location_does_not_hide_the_first(tmp_path):
    tensor = external_tensor("../secret")
    tensor.external_data.add(key="location", value="w")
    with pytest.raises(ConfigError, match="two locations"):
        list(external_data(model_with([tensor]).SerializeToString()))


def test_session_is_refused_before_onnx_runtime_sees_the_file(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_bytes(bytes(8))
    with pytest.raises(ConfigError, match=r"external data '\.\./secret'"):
        open_session(write_model(tmp_path / "model", "../secret"), model_name="crafted")


def test_graphs_nested_deeper_than_protobuf_allows_are_refused():
    def field(number, payload):
        return bytes([number << 3 | 2, len(payload) & 0x7F | 0x80, len(payload) >> 7]) + payload

    def model(num_levels):
        graph = b""
        for _ in range(num_levels):
            graph = field(1, field(5, field(6, graph)))
        return field(7, graph)

    assert list(external_data(model(33))) == []
    with pytest.raises(ConfigError, match="more than 100 messages deep"):
        list(external_data(model(34)))


def test_file_of_countless_fields_is_refused(monkeypatch):
    monkeypatch.setattr("sardonyx.runtime.external_data._MAX_FIELDS", 1000)
    assert list(external_data(b"\x08\x01" * 1000)) == []
    with pytest.raises(ConfigError, match="more than 1,000 fields"):
        list(external_data(b"\x08\x01" * 1001))


def test_empty_missing_and_foreign_files_are_config_errors(tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(ConfigError, match=r"model\.onnx: cannot be read: No such file"):
        check_external_data(path)
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"model\.onnx: is empty"):
        check_external_data(path)
    path.write_bytes(b"PK\x03\x04 this is no graph")
    with pytest.raises(ConfigError, match=r"model\.onnx: is not an ONNX model"):
        check_external_data(path)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    read_or_refuse(data)


VALID = b"".join(
    model_with_tensor_in(place, external_tensor("w", offset=3, length=5)).SerializeToString() for place in PLACES
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=6), st.integers(0, len(VALID)))
def test_damaged_models_are_read_or_refused(changes, length):
    data = bytearray(VALID)
    for position, value in changes:
        data[position] = value
    read_or_refuse(bytes(data[:length]))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PLACES), st.text(max_size=5), st.integers(0, 10**12)), max_size=8))
def test_reader_finds_what_the_onnx_package_finds(tensors):
    merged = onnx.ModelProto()
    for place, location, offset in tensors:
        merged.MergeFrom(model_with_tensor_in(place, external_tensor(location, offset=offset)))
    found = sorted((entry.location, entry.offset) for entry in external_data(merged.SerializeToString()))
    assert found == sorted((location, offset) for _, location, offset in tensors)
    known = {
        entry.value for tensor in _get_all_tensors(merged) for entry in tensor.external_data if entry.key == "location"
    }
    assert known <= {location for location, _ in found}


def read_or_refuse(data):
    try:
        for entry in external_data(data):
            assert isinstance(entry, ExternalData)
    except ConfigError:
        pass


def test_tags_beyond_32_bits_are_refused():
    # To protobuf this is field 7, the graph; read in full it is a field that nobody knows.
    with pytest.raises(ConfigError):
        list(external_data(b"\xba\x80\x80\x80\x10" + b"\x00"))
