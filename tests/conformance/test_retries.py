"""When the `openai` package tries again, and when it does not."""

import openai
import pytest
from tests.api.conftest import answering
from tests.api.live import listening
from tests.tiny_models import make_language_model

from sardonyx.errors import EngineError
from sardonyx.serving.admission import Admission
from sardonyx.serving.text import TextLimits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_language_model(tmp_path_factory.mktemp("repository"))


def num_tries(server):
    return sum(
        server.metric(f'sardonyx_http_requests_total{{method="POST",route="/v1/completions",status="{status}"}}')
        for status in (200, 429, 500, 503, 504)
    )


def client_of(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2)


def test_a_full_server_is_asked_again_after_the_time_it_named(folder):
    source = answering(folder)
    reservations = []
    admission = Admission(1, 10_000, on_reject=lambda _: reservations.pop().release(), jitter=lambda: 0.5)
    reservations.append(admission.reserve(1, 1))
    source.options["admission"] = admission
    with listening(source) as server, client_of(server) as client:
        assert client.completions.create(model="tiny", prompt="x").choices[0].text
        assert num_tries(server) == 2


def test_a_deadline_is_not_tried_again(folder):
    source = answering(folder)
    source.options["limits"] = TextLimits(request_timeout_s=0.05)
    with listening(source) as server, client_of(server) as client:
        server.served.runner.gate.clear()
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="tiny", prompt="x")
        server.served.runner.gate.set()
        assert caught.value.code == "deadline_exceeded"
        assert num_tries(server) == 1


def test_a_failed_step_is_tried_again(folder):
    with listening(answering(folder)) as server, client_of(server) as client:
        runner = server.served.runner
        execute, runner.error = runner.execute, EngineError("the session failed")

        def execute_once(batch):
            try:
                return execute(batch)
            finally:
                runner.error = None

        runner.execute = execute_once
        assert client.completions.create(model="tiny", prompt="x").choices[0].text
        assert num_tries(server) == 2


def test_an_error_in_a_stream_is_raised_by_the_client(folder):
    with listening(answering(folder)) as server, client_of(server) as client:
        script = server.served.runner.script

        def fail_later(sequence):
            if sequence.num_completion_tokens == 3:
                raise EngineError("the session failed")
            return script(sequence)

        server.served.runner.script = fail_later
        with pytest.raises(openai.APIError, match="the session failed"):
            list(client.completions.create(model="tiny", prompt="x", stream=True))
