"""Forms as any client may write them: whatever is sent, it is read, or refused in our words."""

from typing import Annotated, Literal

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from litestar import Litestar, Request, post
from litestar.testing import TestClient
from tests.api.live import BASE_URL

from sardonyx.api.form import read_form
from sardonyx.api.openai.errors import EXCEPTION_HANDLERS
from sardonyx.api.parts import MAX_PARTS


class Cut(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["vad"]
    threshold: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5


class Form(msgspec.Struct, frozen=True, kw_only=True):
    file: bytes
    name: str | None = None
    text: str = ""
    number: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    count: Annotated[int, msgspec.Meta(ge=0)] | None = None
    flag: bool = False
    words: list[str] = []
    kinds: list[Literal["a", "b"]] = []
    cut: Literal["auto"] | Cut | None = None


class Seen:
    form: Form | None = None


@post("/form", status_code=200)
async def take(request: Request) -> None:
    Seen.form = await read_form(request, Form)


@pytest.fixture(scope="module")
def client():
    app = Litestar(
        [take],
        exception_handlers=EXCEPTION_HANDLERS,
        logging_config=None,
        openapi_config=None,
        request_max_body_size=10**7,
    )
    with TestClient(app, base_url=BASE_URL) as client:
        yield client


@pytest.fixture(scope="module")
def send(client):
    """Parts as (name, value), values of files as bytes; the form that came of them, or the refusal."""

    def send_parts(*parts, chunk_size=None):
        files = [(name, ("f", value) if isinstance(value, bytes) else (None, value)) for name, value in parts]
        request = httpx.Request("POST", BASE_URL, files=files)
        body = request.read()
        if chunk_size is None:
            content = body
        else:
            content = (body[start : start + chunk_size] for start in range(0, len(body), chunk_size))
        Seen.form = None
        answer = client.post("/form", content=content, headers={"Content-Type": request.headers["content-type"]})
        assert answer.status_code in {200, 400, 413}, answer.text
        if answer.status_code == 200:
            assert Seen.form is not None
            return Seen.form
        detail = answer.json()["error"]
        assert detail["type"] == "invalid_request_error"
        return detail

    return send_parts


# httpx sends what it cannot encode in its own way.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
FILES = st.one_of(st.binary(max_size=200), st.sampled_from([b"\r\n--", b"\r\n" * 50, b"--" * 30]))


@given(
    file=FILES,
    text=TEXTS,
    name=TEXTS,
    number=st.floats(0, 1),
    count=st.integers(0, 2**70),
    flag=st.booleans(),
    words=st.lists(TEXTS, max_size=5),
    brackets=st.booleans(),
    chunk_size=st.one_of(st.none(), st.integers(1, 100)),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_what_is_written_is_read(send, file, text, name, number, count, flag, words, brackets, chunk_size, data):
    parts = [
        ("file", file),
        ("text", text),
        ("name", name),
        ("number", repr(number)),
        ("count", str(count)),
        ("flag", str(flag).lower()),
        *(("words[]" if brackets else "words", word) for word in words),
    ]
    order = data.draw(st.permutations(range(len(parts))))
    # Words have an order of their own.
    places = iter(sorted(index for index in order if parts[index][0].startswith("words")))
    parts = [parts[next(places)] if parts[index][0].startswith("words") else parts[index] for index in order]
    form = send(*parts, chunk_size=chunk_size)
    if isinstance(form, dict):
        assert count >= 2**63
        assert form["param"] == "count"
        return
    assert form.file == file
    assert form.text == text
    # "null" is how some clients spell that there is none.
    assert form.name == (name if name else None)
    assert (form.number, form.count, form.flag) == (number, count, flag)
    assert form.words == [word for word in words if word]


NAMES = st.one_of(
    st.sampled_from(
        ["file", "text", "name", "number", "count", "flag", "words", "kinds", "cut", "words[]", "cut[type]"]
    ),
    st.sampled_from(["cut[threshold]", "cut[]", "file[]", "text[x]", "[", "]", "cut[", "cut[a][b]", "", "cut[0]"]),
    st.text(max_size=10),
)
VALUES = st.one_of(
    st.text(max_size=20),
    st.binary(max_size=20),
    st.sampled_from(["{", "{}", "[", "null", "true", "0.5", "nan", "inf", "-1", "auto", "vad", "a", '{"type": "vad"}']),
)


@given(parts=st.lists(st.tuples(NAMES, VALUES), max_size=8), has_file=st.booleans())
@settings(deadline=None, max_examples=200)
def test_whatever_is_sent_is_read_or_refused_by_a_known_name(send, parts, has_file):
    answer = send(*parts, ("unknown", "x"), *([("file", b"x")] if has_file else []))
    if isinstance(answer, dict):
        field = (answer["param"] or "").split(".")[0]
        assert field in {*Form.__struct_fields__, ""}
        assert field or answer["message"].startswith("the form")


@given(
    body=st.one_of(
        st.binary(max_size=300),
        st.lists(
            st.sampled_from(
                [
                    b"--x",
                    b"\r\n",
                    b"--",
                    b'Content-Disposition: form-data; name="file"; filename="f"',
                    b"a",
                    b"\r\n\r\n",
                    b"\n",
                ]
            ),
            max_size=20,
        ).map(b"".join),
    )
)
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_no_surprise(client, body):
    answer = client.post("/form", content=body, headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert answer.status_code in {200, 400}
    if answer.status_code == 400:
        assert answer.json()["error"]["message"].startswith(("the form", "file: "))


def test_large_file_comes_whole_in_pieces_of_any_size(send):
    file = bytes(range(256)) * 12_000
    for chunk_size in (1000, 65_536, None):
        assert send(("file", file), chunk_size=chunk_size).file == file


@pytest.mark.parametrize(
    "parts",
    [
        [("cut", '{"type": "vad", "threshold": 0.25}')],
        [("cut", ' \n{"type": "vad", "threshold": 0.25}')],
        [("cut[type]", "vad"), ("cut[threshold]", "0.25")],
        [("cut[threshold]", "0.25"), ("cut[type]", "vad")],
    ],
)
def test_objects_are_spelled_in_several_ways(send, parts):
    assert send(("file", b"x"), *parts).cut == Cut(type="vad", threshold=0.25)


@pytest.mark.parametrize("name", ["kinds", "kinds[]", "kinds[0]"])
def test_lists_are_spelled_in_several_ways(send, name):
    assert send(("file", b"x"), (name, "a"), (name, "b"), (name, "a")).kinds == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("value", "flag"), [("true", True), ("True", True), ("1", True), ("false", False), ("0", False)]
)
def test_truths_are_text(send, value, flag):
    assert send(("file", b"x"), ("flag", value)).flag is flag


def test_empty_values_count_as_absent(send):
    parts = [(name, "") for name in Form.__struct_fields__ if name != "file"]
    assert send(("file", b"x"), *parts) == Form(file=b"x")


def test_empty_file_is_one(send):
    assert send(("file", b"")).file == b""


def test_so_many_parts_and_no_more(send):
    parts = [("words", "x")] * (MAX_PARTS - 1)
    assert len(send(("file", b"x"), *parts).words) == MAX_PARTS - 1
    assert f"{MAX_PARTS} parts" in send(("file", b"x"), *parts, ("words", "x"))["message"]


def test_body_over_the_limit_is_too_large(client):
    answer = client.post("/form", files={"file": ("f", b"x" * 10**7)})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "payload_too_large"
