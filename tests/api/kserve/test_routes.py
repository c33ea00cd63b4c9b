import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.api.kserve.fake_service import FakeService

from sardonyx.api.kserve.http import _endpoints
from sardonyx.api.kserve.routes import ROUTES, find_route
from sardonyx.errors import InvalidRequest


def test_every_route_has_its_endpoint_and_every_endpoint_its_route():
    assert {route.endpoint for route in ROUTES} == _endpoints(FakeService()).keys()


@pytest.mark.parametrize(
    ("path", "endpoint", "arguments"),
    [
        ("/v2", "server_metadata", {}),
        ("/v2/", "server_metadata", {}),
        ("/v2/health/live", "live", {}),
        ("/v2/models/m", "model_metadata", {"model": "m"}),
        ("/v2/models/m/versions/12", "model_metadata", {"model": "m", "version": "12"}),
        ("/v2/models/m/versions/3/infer", "infer", {"model": "m", "version": "3"}),
        ("/v2/models/a%20b%C3%A9/infer", "infer", {"model": "a bé"}),
        ("/v2/models/stats", "statistics", {}),
        ("/v2/models/stats/stats", "statistics", {"model": "stats"}),
        ("/v2/models/m/trace/setting", "trace_settings", {"model": "m"}),
        ("/v2/repository/index", "index", {}),
        ("/v2/repository/r/index", "index", {"repository": "r"}),
        ("/v2/repository/models/m/load", "load", {"model": "m"}),
        ("/v2/repository/r/models/m/unload", "unload", {"repository": "r", "model": "m"}),
        ("/v2/systemsharedmemory/region/r/register", "register_system_memory", {"region": "r"}),
        ("/v2/cudasharedmemory/unregister", "unregister_cuda_memory", {}),
    ],
)
def test_a_path_finds_its_endpoint(path, endpoint, arguments):
    found = find_route(path.encode())
    assert found.route.endpoint == endpoint
    assert found.arguments == arguments


@pytest.mark.parametrize(
    "path",
    [
        "/v2x",
        "/v2//",
        "/v2/health",
        "/v2/models",
        "/v2/models//infer",
        "/v2/models/m/infer/",
        "/v2/models/a/b/infer",
        "/v2/models/m/versions/x/infer",
        "/v2/models/m/versions/-1/infer",
        "/v2/models/m/versions/1/trace/setting",
        "/v2/models/m/versions//infer",
        "/%76%32/health/live",
        "/v2/models/m/infer\n",
    ],
)
def test_another_path_finds_none(path):
    assert find_route(path.encode()) is None


@pytest.mark.parametrize("name", ["%2e%2e", "..", ".", "a%2Fb", "a%5Cb", "%20", "%ff", "a%00", "a%0Ab", "a" * 2000])
def test_a_name_that_no_model_can_have_is_refused(name):
    with pytest.raises(InvalidRequest, match="model"):
        find_route(f"/v2/models/{name}/infer".encode())


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_path_finds_a_route_or_none(raw):
    with contextlib.suppress(InvalidRequest):
        find_route(b"/v2/models/" + raw)
