"""Steps of image classifiers on real sessions."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from sardonyx.errors import ConfigError, EngineError
from sardonyx.repository.families import ImageInput
from sardonyx.runners.images import INPUT, OUTPUT, ImageClassifierRunner, image_shape
from sardonyx.runtime.session import open_session
from sardonyx.tensors import TensorBatch, TensorRequest, TensorRow


def image_input(**fields):
    given = {"name": "pixels", "output": "scores", "layout": "NHWC", "resize": [4], "crop": [4, 3], "mean": [0.0] * 3}
    return ImageInput(**(given | fields))


def means(layout="NHWC", inputs="float[B,4,3,3] pixels", outputs="float[B,3] scores"):
    """The mean of each channel."""
    model = parser.parse_model(f"""
    <ir_version: 10, opset_import: ["" : 21]>
    means ({inputs}) => ({outputs}) {{ scores = ReduceMean<keepdims=0>(pixels, axes) }}
    """)
    axes = np.array([1, 2] if layout == "NHWC" else [2, 3], np.int64)
    model.graph.initializer.append(numpy_helper.from_array(axes, "axes"))
    return model


@pytest.fixture
def open_graph(tmp_path):
    opened = []

    def open_one(model):
        path = tmp_path / f"{len(opened)}.onnx"
        onnx.save_model(model, path)
        opened.append(open_session(path, model_name="pictures"))
        return opened[-1]

    yield open_one
    for session in opened:
        session.close()


def batch(*pictures):
    return TensorBatch(
        [TensorRow(TensorRequest(id=i, inputs={INPUT: each}, outputs=(OUTPUT,))) for i, each in enumerate(pictures)]
    )


def random_pictures(count, shape):
    return list(np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float32))


@pytest.mark.parametrize("num_pictures", [1, 2, 7])
@pytest.mark.parametrize(("layout", "inputs"), [("NHWC", "float[B,4,3,3] pixels"), ("NCHW", "float[B,3,4,3] pixels")])
def test_each_picture_gets_the_numbers_of_its_own(open_graph, layout, inputs, num_pictures):
    image = image_input(layout=layout)
    runner = ImageClassifierRunner([open_graph(means(layout, inputs))], image, 3)
    runner.warm_up()
    pictures = random_pictures(num_pictures, image_shape(image))
    output = runner.execute(batch(*pictures), 0)
    assert len(output.results) == num_pictures
    for picture, result in zip(pictures, output.results, strict=True):
        axes = (0, 1) if layout == "NHWC" else (1, 2)
        assert list(result) == [OUTPUT]
        assert result[OUTPUT].dtype == np.float32
        np.testing.assert_allclose(result[OUTPUT], picture.mean(axis=axes), atol=1e-6)
    assert output.times.compute_infer_ns > 0


@pytest.mark.parametrize("worst", [np.nan, np.inf, -np.inf])
def test_number_that_is_not_finite_fails_its_picture_alone(open_graph, worst):
    runner = ImageClassifierRunner([open_graph(means())], image_input(), 3)
    first, bad, last = random_pictures(3, (4, 3, 3))
    bad[0, 0, 0] = worst
    good, failed, also_good = runner.execute(batch(first, bad, last), 0).results
    assert isinstance(failed, EngineError)
    assert "not finite" in failed.message
    np.testing.assert_allclose(good[OUTPUT], first.mean(axis=(0, 1)), atol=1e-6)
    np.testing.assert_allclose(also_good[OUTPUT], last.mean(axis=(0, 1)), atol=1e-6)


def test_each_instance_runs_its_own_session(open_graph):
    doubled = means()
    doubled.graph.node[0].output[0] = "mean"
    doubled.graph.node.append(helper.make_node("Add", ["mean", "mean"], ["scores"]))
    runner = ImageClassifierRunner([open_graph(means()), open_graph(doubled)], image_input(), 3)
    runner.warm_up()
    (picture,) = random_pictures(1, (4, 3, 3))
    single, double = (runner.execute(batch(picture), instance).results[0][OUTPUT] for instance in (0, 1))
    np.testing.assert_allclose(double, 2 * single, rtol=1e-6)


def test_a_graph_may_leave_its_sizes_open(open_graph):
    graph = open_graph(means(inputs="float[B,Y,X,C] pixels", outputs="float[B,L] scores"))
    runner = ImageClassifierRunner([graph], image_input(), 3)
    runner.warm_up()
    assert len(runner.execute(batch(*random_pictures(2, (4, 3, 3))), 0).results) == 2


@pytest.mark.parametrize(
    ("inputs", "outputs", "words"),
    [
        ("float[B,4,3,3] pixels, float[B] more", "float[B,3] scores", "takes 'pixels', 'more'; 'pixels' alone"),
        ("double[B,4,3,3] pixels", "double[B,3] scores", "takes 'pixels' as FP64; FP32 is needed"),
        ("float[B,3,4,3] pixels", "float[B,3] scores", "takes 'pixels' with the shape ['B', 3, 4, 3]; ['B', 4, 3, 3]"),
        ("float[1,4,3,3] pixels", "float[1,3] scores", "takes 'pixels' with the shape [1, 4, 3, 3]; ['B', 4, 3, 3]"),
        ("float[B,4,3,2] pixels", "float[B,2] scores", "takes 'pixels' with the shape"),
    ],
)
def test_a_graph_of_another_contract_is_refused(open_graph, inputs, outputs, words):
    session = open_graph(means(inputs=inputs, outputs=outputs))
    with pytest.raises(ConfigError) as caught:
        ImageClassifierRunner([session], image_input(), 3)
    assert caught.value.field == "graphs['model']"
    assert words in caught.value.reason


@pytest.mark.parametrize(
    ("fields", "num_labels", "words"),
    [
        ({"name": "image"}, 3, "takes 'pixels'; 'image' alone was expected"),
        ({"output": "logits"}, 3, "has no output 'logits'; its outputs are scores"),
        ({}, 4, "gives 'scores' with the shape ['B', 3]; ['B', 4] is needed"),
        ({"crop": [5, 3]}, 3, "takes 'pixels' with the shape ['B', 4, 3, 3]; ['B', 5, 3, 3]"),
    ],
)
def test_a_manifest_of_another_graph_is_refused(open_graph, fields, num_labels, words):
    session = open_graph(means())
    with pytest.raises(ConfigError) as caught:
        ImageClassifierRunner([session], image_input(**fields), num_labels)
    assert words in caught.value.reason


def test_an_output_of_another_datatype_is_refused(open_graph):
    model = means(outputs="double[B,3] scores")
    model.graph.node[0].output[0] = "mean"
    model.graph.node.append(helper.make_node("Cast", ["mean"], ["scores"], to=TensorProto.DOUBLE))
    session = open_graph(model)
    with pytest.raises(ConfigError, match="gives 'scores' as FP64; FP32 is needed"):
        ImageClassifierRunner([session], image_input(), 3)


def test_warming_up_finds_what_shapes_do_not_tell(open_graph):
    graph = open_graph(means(inputs="float[B,Y,X,C] pixels", outputs="float[B,L] scores"))
    runner = ImageClassifierRunner([graph], image_input(), 2)
    with pytest.raises(ConfigError, match=r"does not run: .*\[2, 3\]; \[2, 2\] was expected"):
        runner.warm_up()


def test_a_session_that_fails_fails_the_step(open_graph):
    runner = ImageClassifierRunner([open_graph(means())], image_input(), 3)
    with pytest.raises(EngineError, match="pictures failed"):
        runner.execute(batch(*random_pictures(2, (5, 3, 3))), 0)


def test_closed_sessions_run_no_more(open_graph):
    session = open_graph(means())
    runner = ImageClassifierRunner([session, session], image_input(), 3)
    runner.close()
    with pytest.raises(EngineError, match="is unloaded"):
        runner.execute(batch(*random_pictures(1, (4, 3, 3))), 1)
