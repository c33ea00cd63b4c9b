"""What the `openai` package and Triton's clients make of image models, and of what is refused."""

import base64
import threading
import urllib.request

import numpy as np
import openai
import pytest
from tests.conformance.process import serve
from tests.tiny_diffusion import SIDE, make_diffusion_model, mask_file, picture_file, pixels_of
from tests.tiny_models import make_language_model

SIZE = (SIDE, SIDE, 3)
IMAGE = ("image.png", picture_file())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    repository = root / "repository"
    make_diffusion_model(repository, "tiny")
    config = 'parameters { key: "max_steps" value { string_value: "1000" } }'
    make_diffusion_model(repository, "xl", "sdxl", config=config)
    make_language_model(repository, "talk")
    with serve(repository, root / "log", "--aliases", "my-painter=tiny") as server:
        yield server
        assert "Traceback" not in server.log()


@pytest.fixture
def generate(client):
    def create(**options):
        return client.images.generate(**({"prompt": "a cat"} | options))

    return create


def decoded(item):
    return pixels_of(base64.b64decode(item.b64_json))


@pytest.mark.parametrize("model", ["tiny", "my-painter", "xl", "gpt-image-1", "dall-e-3", openai.omit])
def test_prompt_becomes_pictures(generate, model):
    answer = generate(model=model, n=2, response_format="b64_json")
    assert [decoded(each).shape for each in answer.data] == [SIZE] * 2
    assert (answer.size, answer.output_format, answer.quality, answer.background) == (
        f"{SIDE}x{SIDE}",
        "png",
        "medium",
        "opaque",
    )
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.usage.input_tokens_details.text_tokens == 7
    assert answer.usage.output_tokens == 2 * 64
    assert answer.created > 1_700_000_000


def test_pictures_are_fetched_by_their_urls(generate):
    answer = generate(n=2, extra_body={"seed": 5})
    same = generate(n=2, response_format="b64_json", extra_body={"seed": 5})
    for item, other in zip(answer.data, same.data, strict=True):
        assert item.b64_json is None
        with urllib.request.urlopen(item.url) as file:
            assert file.headers["content-type"] == "image/png"
            np.testing.assert_array_equal(pixels_of(file.read()), decoded(other))


def test_every_option_of_the_package_is_taken(generate):
    answer = generate(
        model="tiny",
        background="opaque",
        moderation="low",
        n=1,
        output_compression=80,
        output_format="jpeg",
        quality="high",
        response_format="b64_json",
        size="64x48",
        style="vivid",
        user="somebody",
        extra_body={"negative_prompt": "a dog", "seed": 3, "steps": 3, "cfg_scale": 2.0, "sampler": "DPM++ 2M Karras"},
    )
    assert (answer.size, answer.quality, answer.output_format) == ("64x48", "high", "jpeg")
    assert decoded(answer.data[0]).shape == (48, 64, 3)


@pytest.mark.parametrize("model", ["tiny", "xl"])
def test_stream_tells_previews_and_the_picture(generate, model):
    options = {"model": model, "output_format": "webp", "extra_body": {"steps": 8, "seed": 1}}
    events = list(generate(stream=True, partial_images=3, **options))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    for event in events:
        assert (event.size, event.output_format, event.quality) == (f"{SIDE}x{SIDE}", "webp", "medium")
        assert event.background == "opaque"
        assert decoded(event).shape == SIZE
    assert events[-1].usage.total_tokens == 7 + 64
    whole = generate(response_format="b64_json", **options)
    np.testing.assert_array_equal(decoded(events[-1]), decoded(whole.data[0]))


def test_picture_is_edited(client):
    answer = client.images.edit(image=IMAGE, prompt="a cat", response_format="b64_json", n=2)
    assert [decoded(each).shape for each in answer.data] == [SIZE] * 2
    assert answer.usage.input_tokens_details.image_tokens == 64


def test_mask_says_where(client):
    answer = client.images.edit(
        image=[IMAGE], mask=("mask.png", mask_file()), prompt="a cat", response_format="b64_json", size="auto"
    )
    before, after = pixels_of(picture_file()).astype(int), decoded(answer.data[0]).astype(int)
    assert np.abs(after[:, 16:] - before[:, 16:]).max() <= 1
    assert np.abs(after[:, :16] - before[:, :16]).mean() > 5


def test_edits_are_streamed(client):
    events = list(
        client.images.edit(
            image=IMAGE,
            prompt="a cat",
            stream=True,
            partial_images=2,
            input_fidelity="high",
            extra_body={"strength": 0.9, "steps": 9},
        )
    )
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert all(decoded(event).shape == SIZE for event in events)


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # what the package says of its own method
def test_picture_is_varied(client):
    answer = client.images.create_variation(image=IMAGE, n=2, response_format="b64_json", model="tiny")
    first, second = (decoded(each) for each in answer.data)
    assert first.shape == SIZE
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"prompt": "x" * 100}, "prompt", "context_length_exceeded"),
        ({"n": 11}, "n", None),
        ({"size": "33x32"}, "size", None),
        ({"size": "4096x4096"}, "size", None),
        ({"background": "transparent"}, "background", "unsupported_parameter"),
        ({"extra_body": {"steps": 101}}, "steps", None),
        ({"extra_body": {"sampler": "Heun"}}, "sampler", None),
        ({"model": "talk"}, "model", None),
    ],
)
def test_what_makes_no_sense_is_a_bad_request_that_names_the_field(generate, options, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        generate(**({"model": "tiny"} | options))
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"


def test_file_that_is_no_picture_is_a_bad_request(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=("a.png", b"no picture"), prompt="a")
    assert caught.value.param == "image"


def test_unknown_model_is_not_found(generate):
    with pytest.raises(openai.NotFoundError) as caught:
        generate(model="stable-diffusion-9")
    assert caught.value.code == "model_not_found"


def test_many_clients_at_once_get_what_they_get_alone(generate):
    def paint(seed):
        options = {"seed": seed, "steps": 2 + seed % 4}
        answers[seed] = decoded(generate(model="tiny", response_format="b64_json", extra_body=options).data[0])

    answers: dict[int, np.ndarray] = {}
    threads = [threading.Thread(target=paint, args=[seed]) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together, answers = answers, {}
    for seed in range(12):
        paint(seed)
        assert np.abs(answers[seed].astype(int) - together[seed].astype(int)).max() <= 1


@pytest.mark.parametrize("stream", ["false", "true"])
def test_client_that_leaves_ends_its_pictures(server, stream):
    """Ten pictures of 900 steps: seconds of work."""
    before = server.metric('sardonyx_generation_tokens_total{model_name="xl"}')
    body = b'{"prompt": "a", "model": "xl", "n": 10, "steps": 900, "size": "64x64", "sampler": "ddim", "stream": %s}'
    body %= stream.encode()
    head = ["POST /v1/images/generations HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    with server.connect() as connection:
        connection.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        server.wait_for(lambda: server.metric('sardonyx_num_requests_running{model_name="xl"}'))
    server.wait_for(server.is_idle)
    assert server.metric('sardonyx_generation_tokens_total{model_name="xl"}') - before < 10 * 900 * 2 / 2


# As tensors


def tensor(module, text, name="prompt"):
    given = module.InferInput(name, [1], "BYTES")
    given.set_data_from_numpy(np.array([text.encode()], np.object_))
    return given


def test_prompt_as_a_tensor_becomes_a_picture(tensor_client, generate):
    module, client = tensor_client
    inputs = [tensor(module, "a cat"), tensor(module, "a dog", "negative_prompt")]
    parameters = {"seed": 8, "steps": 5, "width": 24, "height": 16}
    image = client.infer("tiny", inputs, parameters=parameters).as_numpy("image")
    assert image.shape == (1,)
    body = {"negative_prompt": "a dog", "seed": 8, "steps": 5}
    same = generate(model="tiny", size="24x16", response_format="b64_json", extra_body=body)
    np.testing.assert_array_equal(pixels_of(image[0]), decoded(same.data[0]))


def test_what_makes_no_sense_as_tensors_is_refused(tensor_client):
    module, client = tensor_client
    for parameters, words in (({"width": 32}, "height and width"), ({"steps": 0}, "steps"), ({"n": 3}, "n: is no")):
        with pytest.raises(Exception, match=words):
            client.infer("tiny", [tensor(module, "a cat")], parameters=parameters)
