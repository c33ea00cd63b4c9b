"""The image endpoints: every field, every format, every refusal."""

import asyncio
import base64
import io
import logging
import struct
import zlib

import numpy as np
import pytest
from litestar.testing import TestClient
from PIL import Image
from tests.api.live import BASE_URL, application, eventually, frames, listening
from tests.api.openai.answers import error
from tests.serving.fake_tasks import FakeEmbedder, FakePainter, TaskSource
from tests.tiny_diffusion import NOT_FINITE, make_diffusion_model, mask_file, picture_file, pixels_of
from tests.tiny_encoders import make_encoder_model

from sardonyx.api.openai.image_options import sampler_name, steps_of
from sardonyx.app import create_app
from sardonyx.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineDead,
    EngineError,
    InvalidRequest,
    ModelNotReady,
    Overloaded,
)
from sardonyx.metrics import Metrics
from sardonyx.serving.loader import build_registry
from sardonyx.serving.tasks import PictureUpdate
from sardonyx.settings import Settings

GENERATIONS, EDITS, VARIATIONS = "/v1/images/generations", "/v1/images/edits", "/v1/images/variations"
FILES = "/v1/images/files/"
IMAGE = {"image": ("image.png", picture_file(), "image/png")}
MASKED = IMAGE | {"mask": ("mask.png", mask_file(), "image/png")}


@pytest.fixture(scope="module")
def task():
    return FakePainter("painter")


@pytest.fixture(scope="module")
def api(task):
    with application(TaskSource(task, FakeEmbedder("embedder")), aliases={"brush": "painter"}) as api:
        yield api


@pytest.fixture
def generate(api):
    def post(headers=None, **body):
        return api.client.post(GENERATIONS, json={"prompt": "a cat"} | body, headers=headers)

    return post


@pytest.fixture
def edit(api):
    """A multipart POST; lists are repeated fields."""

    def post(path=EDITS, files=IMAGE, headers=None, **fields):
        if path == EDITS:
            fields.setdefault("prompt", "a cat")
        return api.client.post(path, data=fields, files=files, headers=headers)

    return post


def decoded(item):
    return base64.b64decode(item["b64_json"], validate=True)


# Answers


def test_pictures_are_urls_of_this_server(api, generate, task):
    answer = generate(n=2)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    created = body.pop("created")
    assert isinstance(created, int)
    urls = [each.pop("url") for each in body["data"]]
    assert body == {
        "data": [{}, {}],
        "background": "opaque",
        "output_format": "png",
        "size": "24x16",
        "quality": "medium",
        "usage": {
            "input_tokens": 5,
            "input_tokens_details": {"text_tokens": 5, "image_tokens": 0},
            "output_tokens": 12,
            "total_tokens": 17,
        },
    }
    assert task.started[-1].id.startswith("img-")
    for index, url in enumerate(urls):
        assert url.startswith(f"{BASE_URL}{FILES}")
        assert url.endswith(".png")
        file = api.client.get(url)
        assert file.status_code == 200
        assert file.headers["content-type"] == "image/png"
        assert file.headers["x-content-type-options"] == "nosniff"
        assert "private" in file.headers["cache-control"]
        assert (pixels_of(file.content) == 10 * (index + 1)).all()


@pytest.mark.parametrize(("kind", "signature"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF")])
@pytest.mark.parametrize("response_format", ["url", "b64_json"])
def test_files_have_the_format_that_was_asked_for(api, generate, kind, signature, response_format):
    body = generate(output_format=kind, response_format=response_format).json()
    assert body["output_format"] == kind
    (item,) = body["data"]
    assert list(item) == [response_format]
    if response_format == "b64_json":
        data = decoded(item)
    else:
        answer = api.client.get(item["url"])
        assert answer.headers["content-type"] == f"image/{kind}"
        data = answer.content
    assert data.startswith(signature)
    assert np.abs(pixels_of(data).astype(int) - 10).max() <= 3


def test_compression_is_the_files_quality(api, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with application(TaskSource(FakePainter("painter", PictureUpdate(0, noise, is_final=True)))) as own:
        sizes = []
        for compression in (0, 50, None, 100):
            body = {"prompt": "", "output_format": "webp", "response_format": "b64_json"}
            answer = own.post(GENERATIONS, body | {"output_compression": compression}).json()
            sizes.append(len(decoded(answer["data"][0])))
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3]


def test_host_that_was_called_is_in_the_url(generate):
    assert generate(headers={"Host": "localhost:1234"}).json()["data"][0]["url"].startswith("http://localhost:1234/v1/")


def test_host_that_is_none_is_not_repeated():
    with application(TaskSource(FakePainter()), allow_unauthenticated=True, port=8000) as api:
        for host in ("evil.example/x?", "a b", "<script>"):
            error(api.post(GENERATIONS, {"prompt": "a"}, headers={"Host": host}))
        answer = api.post(GENERATIONS, {"prompt": "a"}, headers={"Host": ""})
        assert answer.json()["data"][0]["url"].startswith("http://127.0.0.1:8000/v1/")


@pytest.mark.parametrize("public_url", ["https://ai.example", "https://ai.example/base/"])
def test_public_url_goes_before_the_host(public_url):
    with application(TaskSource(FakePainter()), public_url=public_url) as api:
        url = api.post(GENERATIONS, {"prompt": "a"}).json()["data"][0]["url"]
        assert url.startswith(f"{public_url.rstrip('/')}{FILES}")


@pytest.mark.parametrize(
    ("model", "response_format", "answered"),
    [
        ("gpt-image-1", None, "b64_json"),
        ("gpt-image-1.5", None, "b64_json"),
        ("chatgpt-image-latest", None, "b64_json"),
        ("gpt-image-1", "url", "url"),
        ("dall-e-3", None, "url"),
        ("dall-e-3", "b64_json", "b64_json"),
        ("painter", None, "url"),
    ],
)
def test_names_that_openai_answers_in_base64_are_so_answered(generate, model, response_format, answered):
    assert list(generate(model=model, response_format=response_format).json()["data"][0]) == [answered]


# Files behind URLs


def test_url_needs_no_key_and_everything_else_does():
    with application(TaskSource(FakePainter()), api_keys=("secret",)) as api:
        assert error(api.post(GENERATIONS, {"prompt": "a"}), 401)["code"] == "invalid_api_key"
        for path in (EDITS, VARIATIONS):
            error(api.client.post(path, data={"prompt": "a"}, files=IMAGE), 401)
        url = api.post(GENERATIONS, {"prompt": "a"}, headers={"Authorization": "Bearer secret"}).json()["data"][0][
            "url"
        ]
        assert api.client.get(url).status_code == 200


@pytest.mark.parametrize("name", ["0" * 32 + ".png", "x", "..%2f..%2fetc%2fpasswd", "%00"])
def test_unknown_names_are_not_found(api, name):
    detail = error(api.client.get(FILES + name), 404)
    assert detail["type"] == "invalid_request_error"


def test_name_is_found_as_a_whole_only(api, generate):
    url = generate().json()["data"][0]["url"]
    assert error(api.client.get(url[:-4]), 404)["code"] == "not_found"
    assert "for an hour" in error(api.client.get(url + "x"), 404)["message"]


def test_full_store_forgets_what_was_not_used():
    with application(TaskSource(FakePainter()), image_store_bytes=2500) as api:
        first, second = (api.post(GENERATIONS, {"prompt": "a"}).json()["data"][0]["url"] for _ in range(2))
        assert api.client.get(first).status_code == 200
        third = api.post(GENERATIONS, {"prompt": "a"}).json()["data"][0]["url"]
        assert [api.client.get(each).status_code for each in (first, second, third)] == [200, 404, 200]


@pytest.mark.parametrize("num_bytes", [0, 100])
def test_picture_that_cannot_be_kept_is_in_its_url(num_bytes):
    with application(TaskSource(FakePainter()), image_store_bytes=num_bytes) as api:
        url = api.post(GENERATIONS, {"prompt": "a", "output_format": "webp"}).json()["data"][0]["url"]
        head, _, text = url.partition(",")
        assert head == "data:image/webp;base64"
        assert base64.b64decode(text).startswith(b"RIFF")


# Fields


def test_only_a_prompt_is_needed(generate, task):
    assert generate().status_code == 200
    asked = task.asked[-1]
    assert (asked.prompt, asked.negative_prompt, asked.n, asked.size) == ("a cat", "", 1, None)
    assert (asked.steps, asked.guidance, asked.sampler, asked.seed, asked.num_previews) == (20, None, None, None, 0)
    assert (asked.source, asked.mask, asked.timeout_s) == (None, None, None)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"n": 3}, {"n": 3}),
        ({"size": "512x768"}, {"size": (768, 512)}),
        ({"size": "auto"}, {"size": None}),
        ({"negative_prompt": "dog"}, {"negative_prompt": "dog"}),
        ({"seed": 7}, {"seed": 7}),
        ({"seed": 0}, {"seed": 0}),
        ({"seed": -1}, {"seed": None}),
        ({"seed": 2**63 - 1}, {"seed": 2**63 - 1}),
        ({"steps": 12}, {"steps": 12}),
        ({"num_inference_steps": 12}, {"steps": 12}),
        ({"steps": 12, "num_inference_steps": 12}, {"steps": 12}),
        ({"steps": 12, "quality": "hd"}, {"steps": 12}),
        ({"guidance_scale": 2.5}, {"guidance": 2.5}),
        ({"cfg_scale": 0}, {"guidance": 0.0}),
        ({"sampler": "euler_a"}, {"sampler": "euler_a"}),
        ({"scheduler": "LCMScheduler"}, {"sampler": "lcm"}),
        ({"sampler": "DPM++ 2M Karras"}, {"sampler": "dpmpp_2m_karras"}),
        ({"sampler": ""}, {"sampler": None}),
        ({"quality": "low"}, {"steps": 10}),
        ({"quality": "standard"}, {"steps": 20}),
        ({"quality": "medium"}, {"steps": 20}),
        ({"quality": "auto"}, {"steps": 20}),
        ({"quality": "hd"}, {"steps": 30}),
        ({"quality": "high"}, {"steps": 30}),
        ({"quality": "xhigh"}, {"steps": 40}),
        ({"quality": "max"}, {"steps": 50}),
        ({"partial_images": 3}, {"num_previews": 0}),
    ],
)
@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
def test_fields_reach_the_model(generate, edit, task, path, fields, wanted):
    answer = generate(**fields) if path == GENERATIONS else edit(**{name: str(each) for name, each in fields.items()})
    assert answer.status_code == 200, answer.text
    assert {name: getattr(task.asked[-1], name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("quality", "answered"),
    [("low", "low"), ("standard", "medium"), ("auto", "medium"), ("hd", "high"), ("max", "max"), (None, "medium")],
)
def test_quality_is_answered_in_todays_words(generate, quality, answered):
    assert generate(quality=quality).json()["quality"] == answered


def test_steps_of_few_step_models_round_up():
    class Fast:
        default_steps = 1
        max_steps = 100

    assert [steps_of(each, Fast) for each in ("low", "medium", "high", "xhigh", "max")] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("DDIM", "ddim"),
        ("Euler", "euler"),
        ("Euler a", "euler_a"),
        ("euler-ancestral", "euler_a"),
        ("Euler Karras", "euler_karras"),
        ("DPM++ 2M", "dpmpp_2m"),
        ("dpmpp_2m_karras", "dpmpp_2m_karras"),
        ("EulerAncestralDiscreteScheduler", "euler_a"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("LCM", "lcm"),
        ("Heun", "Heun"),
    ],
)
def test_samplers_have_many_names(text, name):
    assert sampler_name(text) == name


@pytest.mark.parametrize(
    "fields",
    [
        {"style": "vivid"},
        {"style": "natural"},
        {"moderation": "low"},
        {"moderation": "auto"},
        {"user": "somebody"},
        {"background": "opaque"},
        {"background": "auto"},
        {"safety_identifier": "x"},
        {"who_knows": {"what": [1]}},
        dict.fromkeys(["n", "size", "seed", "steps", "sampler", "quality", "stream", "model", "response_format"]),
    ],
)
def test_fields_that_change_nothing_are_taken(generate, task, fields):
    assert generate(**fields).status_code == 200
    assert task.asked[-1] == FakePainter().asked_for("a cat")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "x" * 32_001}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": "2"}, "n"),
        ({"size": "big"}, "size"),
        ({"size": "0x512"}, "size"),
        ({"size": "512"}, "size"),
        ({"size": "512x512x3"}, "size"),
        ({"size": "1000000x1"}, "size"),
        ({"response_format": "file"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_format": "jpeg", "output_compression": 101}, "output_compression"),
        ({"output_format": "jpeg", "output_compression": -1}, "output_compression"),
        ({"output_compression": 90}, "output_compression"),
        ({"quality": "ultra"}, "quality"),
        ({"background": "transparent"}, "background"),
        ({"background": "blue"}, "background"),
        ({"style": "cubist"}, "style"),
        ({"seed": -2}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"steps": 3, "num_inference_steps": 4}, "num_inference_steps"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"guidance_scale": 3, "cfg_scale": 4}, "cfg_scale"),
        ({"sampler": "ddim", "scheduler": "euler"}, "scheduler"),
        ({"sampler": "x" * 65}, "sampler"),
        ({"partial_images": 4}, "partial_images"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_fields_out_of_range_are_refused_by_name(generate, task, fields, param):
    num_before = len(task.asked)
    assert error(generate(**fields))["param"] == param
    assert len(task.asked) == num_before


def test_transparent_background_is_unsupported(generate, edit):
    for answer in (generate(background="transparent"), edit(background="transparent")):
        assert error(answer)["code"] == "unsupported_parameter"


def test_bodies_that_are_no_json_are_refused(api):
    error(api.client.post(GENERATIONS, content=b"{", headers={"Content-Type": "application/json"}))
    error(api.client.post(GENERATIONS, data={"prompt": "a"}), 415)
    error(api.client.post(EDITS, json={"prompt": "a"}), 415)


def test_time_limit_of_the_caller_is_passed_on(generate, edit, task):
    assert generate(headers={"X-Request-Timeout-Ms": "1500"}).status_code == 200
    assert task.asked[-1].timeout_s == 1.5
    assert edit(headers={"X-Request-Timeout-Ms": "2500"}).status_code == 200
    assert task.asked[-1].timeout_s == 2.5
    error(generate(headers={"X-Request-Timeout-Ms": "soon"}))


@pytest.mark.parametrize(
    "model", ["painter", "brush", None, "", "dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-1.5", "gpt-image-1-mini"]
)
def test_names_of_models(generate, edit, model):
    assert generate(model=model).status_code == 200
    assert edit(model=model or "").status_code == 200
    assert edit(VARIATIONS, model=model or "").status_code == 200


@pytest.mark.parametrize(("model", "status"), [("dall-e", 404), ("gpt-4", 404), ("embedder", 400)])
def test_models_that_paint_nothing_are_refused(generate, edit, model, status):
    for answer in (generate(model=model), edit(model=model), edit(VARIATIONS, model=model)):
        assert error(answer, status)["param"] == "model"


def test_without_an_image_model_nothing_is_painted():
    with application(TaskSource(FakeEmbedder("embedder"))) as api:
        assert error(api.post(GENERATIONS, {"prompt": "a"}), 404)["code"] == "model_not_found"


# Pictures to begin with


def test_edit_takes_a_picture_and_a_mask(edit, task):
    answer = edit(files=MASKED, n="2")
    assert answer.status_code == 200
    asked = task.asked[-1]
    assert (asked.source, asked.mask) == (picture_file(), mask_file())
    assert (asked.prompt, asked.n, asked.strength) == ("a cat", 2, 1.0)
    assert answer.json()["usage"]["input_tokens_details"] == {"text_tokens": 5, "image_tokens": 6}


@pytest.mark.parametrize("name", ["image", "image[]", "image[0]"])
def test_picture_may_be_spelled_as_a_list(edit, task, name):
    assert edit(files={name: IMAGE["image"]}).status_code == 200
    assert task.asked[-1].source == picture_file()
    assert task.asked[-1].mask is None
    assert task.asked[-1].strength == 0.8


@pytest.mark.parametrize("path", [EDITS, VARIATIONS])
@pytest.mark.parametrize("name", ["strength", "denoising_strength"])
def test_strength_says_how_much_is_given_up(edit, task, path, name):
    assert edit(path, files=MASKED, **{name: "0.3"}).status_code == 200
    assert task.asked[-1].strength == 0.3


def test_variation_is_the_picture_without_a_prompt(edit, task):
    answer = edit(VARIATIONS, n="2", size="32x16", seed="4", response_format="b64_json", user="x")
    assert answer.status_code == 200
    assert len(answer.json()["data"]) == 2
    asked = task.asked[-1]
    assert (asked.prompt, asked.source, asked.mask) == ("", picture_file(), None)
    assert (asked.n, asked.size, asked.seed, asked.strength) == (2, (16, 32), 4, 0.8)


@pytest.mark.parametrize("fidelity", ["high", "low"])
def test_fidelity_changes_nothing(edit, fidelity):
    assert edit(input_fidelity=fidelity).status_code == 200


@pytest.mark.parametrize(
    ("files", "fields", "param"),
    [
        ({}, {"image": "text"}, "image"),
        ({"mask": MASKED["mask"]}, {}, "image"),
        (IMAGE, {"mask": "text"}, "mask"),
        (IMAGE, {"strength": "0"}, "strength"),
        (IMAGE, {"strength": "1.1"}, "strength"),
        (IMAGE, {"strength": "0.2", "denoising_strength": "0.3"}, "denoising_strength"),
        (IMAGE, {"n": "many"}, "n"),
        (IMAGE, {"input_fidelity": "none"}, "input_fidelity"),
    ],
)
def test_forms_that_make_no_sense_are_refused(edit, task, files, fields, param):
    num_before = len(task.asked)
    for path in (EDITS, VARIATIONS):
        if path == VARIATIONS and {"mask", "input_fidelity"} & fields.keys():
            continue
        files_or_none = files or {"other": ("x", b"x")}
        assert error(edit(path, files=files_or_none, **fields))["param"] == param
    assert len(task.asked) == num_before


@pytest.mark.parametrize("path", [EDITS, VARIATIONS])
@pytest.mark.parametrize("names", [("image", "image"), ("image[]", "image[]"), ("image[0]", "image[1]")])
def test_several_pictures_are_refused(edit, task, path, names):
    num_before = len(task.asked)
    detail = error(edit(path, files=[(name, IMAGE["image"]) for name in names]))
    assert (detail["param"], detail["message"]) == ("image", "image: is given twice; one file is taken")
    assert len(task.asked) == num_before


def test_edit_needs_a_prompt(api):
    assert error(api.client.post(EDITS, files=IMAGE))["message"] == "prompt: is required"


def test_pictures_of_too_many_bytes_are_refused(edit, api):
    large = ("image.png", b"x" * (20 << 20 | 1), "image/png")
    assert error(edit(files={"image": large}), 413)["param"] == "image"
    assert error(edit(files=IMAGE | {"mask": large}), 413)["param"] == "mask"
    huge = ("image.png", b"x" * (43 << 20), "image/png")
    assert error(edit(files={"image": huge}), 413)["code"] == "payload_too_large"


# Streams


def stream_of(answer):
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done = frames(answer.text)
    assert done == "[DONE]"
    return events


@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
def test_stream_tells_previews_and_the_picture(generate, edit, task, path):
    kind = "image_generation" if path == GENERATIONS else "image_edit"
    if path == GENERATIONS:
        answer = generate(stream=True, partial_images=2, output_format="webp", quality="hd")
    else:
        answer = edit(stream="true", partial_images="2", output_format="webp", quality="hd")
    *previews, done = stream_of(answer)
    assert task.asked[-1].num_previews == 2
    for index, event in enumerate(previews):
        data = decoded({"b64_json": event.pop("b64_json")})
        assert pixels_of(data).shape == (16, 24, 3)
        assert data.startswith(b"RIFF")
        assert isinstance(event.pop("created_at"), int)
        assert event == {
            "type": f"{kind}.partial_image",
            "size": "24x16",
            "quality": "high",
            "background": "opaque",
            "output_format": "webp",
            "partial_image_index": index,
        }
    assert len(previews) == 2
    assert np.abs(pixels_of(decoded(done)).astype(int) - 10).max() <= 3
    assert done["type"] == f"{kind}.completed"
    num_source = 0 if path == GENERATIONS else 6
    assert done["usage"] == {
        "input_tokens": 5 + num_source,
        "input_tokens_details": {"text_tokens": 5, "image_tokens": num_source},
        "output_tokens": 6,
        "total_tokens": 11 + num_source,
    }
    assert "partial_image_index" not in done
    assert "index" not in done


def test_events_of_several_pictures_say_of_which(generate):
    events = stream_of(generate(stream=True, partial_images=1, n=2))
    assert [(event["index"], event.get("partial_image_index")) for event in events] == [
        (0, 0),
        (0, None),
        (1, 0),
        (1, None),
    ]


def test_stream_without_previews_has_one_event(generate):
    (event,) = stream_of(generate(stream=True, response_format="url"))
    assert event["type"] == "image_generation.completed"
    assert decoded(event).startswith(b"\x89PNG")


def test_error_in_the_middle_of_a_stream_is_told():
    preview = PictureUpdate(0, np.zeros((2, 3, 3), np.uint8), is_final=False)
    task = FakePainter("painter", preview, EngineError("it broke"))
    with application(TaskSource(task)) as api:
        events = stream_of(api.post(GENERATIONS, {"prompt": "a", "stream": True, "partial_images": 1}))
    assert events[0]["type"] == "image_generation.partial_image"
    assert events[1]["error"]["message"] == "it broke"
    assert task.started[-1].is_aborted


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (InvalidRequest("size: is odd", param="size"), 400, None),
        (InvalidRequest("it was blocked", code="moderation_blocked"), 400, "moderation_blocked"),
        (ContextLengthExceeded("prompt: is long", param="prompt"), 400, "context_length_exceeded"),
        (Overloaded("full", retry_after_s=3), 429, "rate_limit_exceeded"),
        (EngineError("it broke"), 500, "engine_error"),
        (ModelNotReady("it goes"), 503, "model_not_ready"),
        (EngineDead("it is dead"), 503, "engine_dead"),
        (DeadlineExceeded("too late"), 504, "deadline_exceeded"),
    ],
)
@pytest.mark.parametrize("place", ["start", "picture"])
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_their_status_until_the_answer_has_begun(raised, status, code, place, stream):
    task = FakePainter("painter", raised)
    if place == "start":
        task.error = raised
    with application(TaskSource(task)) as api:
        answer = api.post(GENERATIONS, {"prompt": "a", "stream": stream})
        assert error(answer, status)["code"] == code
        if status == 429:
            assert answer.headers["retry-after"] == "3"
        if place == "picture":
            assert task.started[-1].is_aborted


def test_bug_of_ours_tells_nothing(caplog):
    with application(TaskSource(FakePainter("painter", ValueError("a secret")))) as api:
        detail = error(api.post(GENERATIONS, {"prompt": "a"}), 500)
    assert "secret" not in detail["message"]
    assert "a secret" in caplog.text


def test_prompts_are_not_logged(generate, caplog):
    caplog.set_level(logging.DEBUG)
    generate(prompt="a very private cat", negative_prompt="a very private dog")
    assert "private" not in caplog.text


# Clients that leave


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_ends_its_pictures(stream):
    task = FakePainter("painter")
    with listening(TaskSource(task)) as server:
        task.update_gate = asyncio.Semaphore(0)
        connection = server.connect()
        body = b'{"prompt": "a", "stream": %s}' % (b"true" if stream else b"false")
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        eventually(lambda: task.started)
        connection.close()
        eventually(lambda: task.started[0].is_aborted)
        eventually(lambda: server.metric("sardonyx_http_requests_in_flight") == 1)  # the one that asks


# With everything behind it


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    make_diffusion_model(root)
    settings = Settings(repository=root, num_threads=2, allow_grpc=False)
    metrics = Metrics("test")
    with TestClient(create_app(settings, build_registry(settings, metrics), metrics), base_url=BASE_URL) as client:
        eventually(lambda: client.get("/ready").status_code == 200)
        yield client


def test_prompt_becomes_a_picture(real):
    def paint(**body):
        answer = real.post(GENERATIONS, json={"prompt": "a cat", "response_format": "b64_json"} | body)
        assert answer.status_code == 200, answer.text
        return [pixels_of(decoded(each)) for each in answer.json()["data"]]

    first, second = paint(n=2, seed=3)
    assert first.shape == (32, 32, 3)
    np.testing.assert_array_equal(paint(seed=4)[0], second)
    assert not np.array_equal(first, second)
    assert not np.array_equal(paint(seed=3, negative_prompt="a dog")[0], first)
    assert paint(size="24x16")[0].shape == (16, 24, 3)


def test_mask_is_honoured_end_to_end(real):
    answer = real.post(EDITS, data={"prompt": "a cat", "response_format": "b64_json"}, files=MASKED)
    image = pixels_of(decoded(answer.json()["data"][0])).astype(int)
    before = pixels_of(picture_file()).astype(int)
    assert np.abs(image[:, 16:] - before[:, 16:]).max() <= 1
    assert np.abs(image[:, :16] - before[:, :16]).mean() > 5


def test_variation_comes_near_its_picture(real):
    answer = real.post(VARIATIONS, data={"response_format": "b64_json", "size": "auto", "strength": "0.5"}, files=IMAGE)
    assert answer.json()["size"] == "32x32"
    assert pixels_of(decoded(answer.json()["data"][0])).shape == (32, 32, 3)


def test_real_stream_has_previews(real):
    body = {"prompt": "a cat", "stream": True, "partial_images": 3, "steps": 8}
    events = stream_of(real.post(GENERATIONS, json=body))
    assert [event["type"].rpartition(".")[2] for event in events] == ["partial_image"] * 3 + ["completed"]
    assert all(pixels_of(decoded(event)).shape == (32, 32, 3) for event in events)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"size": "33x32"}, "size"),
        ({"size": "99999x99999"}, "size"),
        ({"steps": 101}, "steps"),
        ({"sampler": "Heun"}, "sampler"),
        ({"prompt": "x" * 100}, "prompt"),
        ({"negative_prompt": "x" * 100}, "negative_prompt"),
    ],
)
def test_what_the_model_cannot_do_is_refused(real, body, param):
    assert error(real.post(GENERATIONS, json={"prompt": "a"} | body))["param"] == param


def test_picture_that_is_not_finite_is_an_error_of_its_own(real):
    assert error(real.post(GENERATIONS, json={"prompt": NOT_FINITE}), 500)["code"] == "engine_error"
    assert real.post(GENERATIONS, json={"prompt": "a"}).status_code == 200


def png_bomb():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def narrow():
    file = io.BytesIO()
    Image.new("RGB", (40_000, 1)).save(file, "PNG")
    return file.getvalue()


UNREADABLE = {
    "text": b"no picture",
    "head": b"\x89PNG\r\n\x1a\n",
    "bomb": png_bomb(),
    "cut": picture_file()[:80],
    "svg": b"<svg/>",
}


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("field", ["image", "mask"])
def test_pictures_that_cannot_be_read_are_refused(real, data, field):
    files = MASKED | {field: ("x.png", data, "image/png")}
    detail = error(real.post(EDITS, data={"prompt": "a"}, files=files))
    assert detail["param"] == field
    assert detail["message"].startswith(f"{field}: ")


def test_picture_too_long_and_narrow_is_refused_or_cut(real):
    files = {"image": ("x.png", narrow(), "image/png")}
    answer = real.post(EDITS, data={"prompt": "a", "size": "32x32"}, files=files)
    assert answer.status_code == 200 or error(answer)["param"] == "image"


def plain(colour):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(file, "PNG")
    return ("x.png", file.getvalue(), "image/png")


@pytest.mark.parametrize("stream", ["false", "true"])
def test_moderator_blocks_pictures_that_it_flags(tmp_path, stream):
    """With a mask that lets nothing change, what comes out is what went in."""
    moderator = 'parameters { key: "moderator" value { string_value: "judge" } }'
    make_diffusion_model(tmp_path, config=moderator)
    make_encoder_model(tmp_path, "judge", family="image_classifier", parameters={"moderation.red": "sexual 0.9"})
    settings = Settings(repository=tmp_path, num_threads=2, allow_grpc=False)
    metrics = Metrics("test")
    with TestClient(create_app(settings, build_registry(settings, metrics), metrics), base_url=BASE_URL) as client:
        eventually(lambda: client.get("/ready").status_code == 200)
        answers = [
            client.post(EDITS, data={"prompt": "a", "stream": stream}, files={"image": plain(each), "mask": plain(0)})
            for each in ("blue", "red", "blue")
        ]
    assert [each.status_code for each in answers] == [200, 400, 200]
    detail = error(answers[1])
    assert (detail["code"], detail["type"]) == ("moderation_blocked", "invalid_request_error")


def test_document_knows_the_forms(api):
    document = api.get("/schema/openapi.json").json()
    schemas = document["components"]["schemas"]
    edit_body = document["paths"][EDITS]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert edit_body == {"$ref": "#/components/schemas/EditForm"}
    assert schemas["EditForm"]["properties"]["image"] == {
        "type": "string",
        "format": "binary",
        "description": "The picture to begin with; PNG, JPEG, WebP, GIF or BMP. One.",
    }
    assert "text/event-stream" in document["paths"][GENERATIONS]["post"]["responses"]["200"]["content"]
    assert "description" in schemas["ImageRequest"]["properties"]["guidance_scale"]
    assert "image/*" in document["paths"][FILES + "{name}"]["get"]["responses"]["200"]["content"]
