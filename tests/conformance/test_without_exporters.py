"""Serving must work where torch, transformers, onnx and the exporter are not installed."""

import sys

from tests.conformance.process import serve

BLOCKER = """
import sys

class Blocker:
    names = {"torch", "transformers", "onnx", "onnx_ir", "gguf", "safetensors", "sardonyx_export"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)

sys.meta_path.insert(0, Blocker())
from sardonyx.cli import main
main(sys.argv[1:])
"""


def test_a_server_without_the_exporters_libraries_answers(repository, tmp_path):
    script = tmp_path / "blocked.py"
    script.write_text(BLOCKER)
    with serve(repository, tmp_path / "log", command=[sys.executable, str(script)]) as server:
        status, answer = server.request(
            "POST", "/v1/completions", {"prompt": "the cat", "max_tokens": 4, "ignore_eos": True}
        )
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 4
        status, answer = server.request(
            "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        )
        assert status == 200
        assert server.request("GET", "/schema/openapi.json")[0] == 200
