"""The image model in the repository, asked by the `openai` package and judged by its pictures' pixels."""

import base64
import shutil
from pathlib import Path

import pytest
from tests.conformance.process import serve
from tests.tiny_diffusion import pixels_of

from demo_diffusion.captions import Asked, AskedThing
from demo_diffusion.judge import judge, look
from demo_diffusion.scenes import SHAPES

NAME = "shapes-64"
FOLDER = Path(__file__).parents[2] / "model_repository" / NAME
COLOURS = ("red", "blue", "yellow", "green")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    shutil.copytree(FOLDER, root / "repository" / NAME)
    with serve(root / "repository", root / "log") as server:
        yield server
        assert "Traceback" not in server.log()


def test_shapes_are_drawn_in_the_colours_asked_for(client):
    verdicts = []
    for number, shape in enumerate(SHAPES):
        colour = COLOURS[number % len(COLOURS)]
        answer = client.images.generate(
            prompt=f"a {colour} {shape} on a black background", response_format="b64_json", extra_body={"seed": number}
        )
        picture = pixels_of(base64.b64decode(answer.data[0].b64_json))
        verdicts.append(judge(Asked((AskedThing(shape, colour, None),), None, "black"), look(picture)))
    # It misses one of 25; which one depends on the processor's rounding.
    assert sum(each.exact and each.background is True for each in verdicts) >= len(SHAPES) - 1


def test_what_it_draws_without_being_told_is_in_its_config(client):
    unsaid, said = (
        client.images.generate(prompt="a red circle", response_format="b64_json", extra_body={"seed": 1, **more})
        for more in ({}, {"steps": 25, "guidance_scale": 3})
    )
    assert unsaid.data[0].b64_json == said.data[0].b64_json
