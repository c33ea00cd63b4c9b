import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.repository.configs import HEAD, TENSORS, config_of, refusal
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.errors import ConfigError
from sardonyx.repository.ensemble import EnsembleStep, read_steps
from sardonyx.repository.tensor_config import read_tensor_config

ENSEMBLE = 'name: "m" platform: "ensemble" ' + TENSORS


def step(model: str, inputs: dict[str, str], outputs: dict[str, str], version: int = -1) -> str:
    maps = [f'input_map {{ key: "{key}" value: "{value}" }}' for key, value in inputs.items()]
    maps += [f'output_map {{ key: "{key}" value: "{value}" }}' for key, value in outputs.items()]
    return f'step {{ model_name: "{model}" model_version: {version} {" ".join(maps)} }} '


def ensemble(*steps: str) -> str:
    return f"ensemble_scheduling {{ {''.join(steps)} }}"


CHAIN = ensemble(step("b", {"in": "t"}, {"out": "y"}), step("a", {"in": "x"}, {"out": "t"}, version=2))


def test_steps_are_read_whatever_their_order():
    config = read_tensor_config(config_of(ENSEMBLE + CHAIN))
    assert config.steps == [
        EnsembleStep(model_name="b", input_map={"in": "t"}, output_map={"out": "y"}),
        EnsembleStep(model_name="a", model_version=2, input_map={"in": "x"}, output_map={"out": "t"}),
    ]
    assert (config.instances, config.providers, config.max_batch_size) == ([], [], 0)


@pytest.mark.parametrize("version", [0, -1])
def test_step_without_a_version_takes_the_latest(version):
    text = ENSEMBLE + ensemble(step("a", {"in": "x"}, {"out": "y"}, version=version))
    assert read_tensor_config(config_of(text)).steps[0].model_version is None


ONE = ensemble(step("a", {"in": "x"}, {"out": "y"}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ensemble_scheduling: ensemble scheduling must be set for ensemble m whose platform is ensemble"),
        ("ensemble_scheduling { }", "ensemble_scheduling.step: must specify 'step' for ensemble 'm'"),
        (ONE + "instance_group { }", "instance_group: instance group should not be specified for ensemble 'm'"),
        (ONE + "optimization { }", "optimization: optimization should not be specified for ensemble 'm'"),
        (ONE + "model_warmup { }", "model_warmup: model_warmup can not be specified for ensemble 'm'"),
        (
            ONE + 'parameters { key: "execution_mode" value { string_value: "1" } }',
            "parameters: has no meaning for an ensemble",
        ),
        (ONE + 'default_model_filename: "a.onnx"', "default_model_filename: has no meaning for an ensemble"),
        (
            ensemble(step("", {"in": "x"}, {"out": "y"})),
            "ensemble_scheduling.step[0].model_name: must specify 'model_name' in step 0 of ensemble 'm'",
        ),
        (
            ensemble(step("a", {}, {"out": "y"})),
            "ensemble_scheduling.step[0].input_map: must specify 'input_map' in step 0 of ensemble 'm'",
        ),
        (
            ensemble(step("a", {"in": "x"}, {})),
            "ensemble_scheduling.step[0].output_map: must specify 'output_map' in step 0 of ensemble 'm'",
        ),
        (
            ensemble(step("a", {"in": ""}, {"out": "y"})),
            "ensemble_scheduling.step[0].input_map: maps to a tensor without name",
        ),
        (
            ensemble(step("a", {"in": "x"}, {"out": "y"}, version=-2)),
            "ensemble_scheduling.step[0].model_version: is a version from 1 up",
        ),
        (
            ensemble(step("m", {"in": "x"}, {"out": "y"})),
            "ensemble_scheduling.step[0].model_name: circular dependency between ensembles: m is a step of itself",
        ),
        (
            ensemble(step("a", {"in": "x"}, {"out": "y"}), step("b", {"in": "x"}, {"out": "y"})),
            "ensemble_scheduling.step[1].output_map: ensemble tensor 'y' can appear in an output map only once for "
            "ensemble 'm' step 1",
        ),
        (
            ensemble(step("a", {"in": "x"}, {"out": "y", "more": "x"})),
            "ensemble_scheduling.step[0].output_map: ensemble input 'x' is written by step 0",
        ),
        (
            ensemble(step("a", {"in": "t"}, {"out": "y"})),
            "input: ensemble input 'x' for ensemble m' is not used",
        ),
        (
            ensemble(step("a", {"in": "x"}, {"out": "t"})),
            "output: ensemble output 'y' for ensemble m' is not used",
        ),
        (
            ensemble(step("a", {"in": "x", "second": "t"}, {"out": "y"})),
            "output: output 'y' for ensemble 'm' is not written: at least one of its depending tensors, 't', is not "
            "connected",
        ),
        (
            ensemble(step("a", {"in": "x", "back": "u"}, {"out": "t"}), step("b", {"in": "t"}, {"out": "u", "y": "y"})),
            "output: output 'y' for ensemble 'm' is not written: at least one of its depending tensors, 'u', is not "
            "connected",
        ),
        (
            ensemble(step("a", {"in": "x"}, {"out": "y", "more": "t"})),
            "ensemble_scheduling.step: ensemble tensor 't' is unused in ensemble 'm'",
        ),
        (
            ensemble(step("a", {"in": "x"}, {"out": "y"}), step("b", {"in": "u"}, {"out": "u"})),
            "ensemble_scheduling.step: ensemble tensor 'u' is unused in ensemble 'm'",
        ),
    ],
)
def test_ensemble_whose_data_cannot_flow_is_refused(text, message):
    assert refusal(text, head=ENSEMBLE).startswith(f"c.pbtxt: {message}")


def test_steps_belong_to_the_platform_ensemble():
    assert refusal(TENSORS + ONE, head=HEAD).startswith(
        "c.pbtxt: platform: ensemble scheduling cannot be set for model 'm' whose platform is not ensemble"
    )


@given(st.lists(st.integers(0, 2**16), min_size=1, max_size=8), st.randoms())
def test_any_flow_without_circle_is_accepted_and_any_circle_refused(picks, random):
    """Step n reads one or more tensors of those before it; the last reads all that nobody else does."""
    config = ModelConfig(name="m", platform="ensemble")
    config.input.add(name="t0")
    config.output.add(name="out")
    unread = {"t0"}
    for number, pick in enumerate(picks):
        step = config.ensemble_scheduling.step.add(model_name="a")
        for earlier in range(number + 1):
            if pick >> earlier & 1 or earlier == pick % (number + 1):
                step.input_map[f"i{earlier}"] = f"t{earlier}"
        unread -= set(step.input_map.values())
        step.output_map["o"] = f"t{number + 1}"
        unread.add(f"t{number + 1}")
    last = config.ensemble_scheduling.step.add(model_name="a")
    last.input_map.update({f"i{index}": name for index, name in enumerate(sorted(unread))})
    last.output_map["o"] = "out"
    order = list(config.ensemble_scheduling.step)
    random.shuffle(order)
    shuffled = ModelConfig(name="m", platform="ensemble", input=config.input, output=config.output)
    shuffled.ensemble_scheduling.step.extend(order)
    assert len(read_steps(shuffled)) == len(picks) + 1
    first = next(step for step in shuffled.ensemble_scheduling.step if "t1" in step.output_map.values())
    first.input_map["circle"] = "out"
    with pytest.raises(ConfigError, match=r"output 'out' for ensemble 'm' is not written: .* is not connected"):
        read_steps(shuffled)
