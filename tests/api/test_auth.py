import pytest
from tests.api.live import application

FILES = "/v1/images/files/"
"""Under names that nobody can guess."""
OPEN = ("/live", "/ready", "/health", "/v1/health", "/ping", "/version", "/metrics", "/v1/internal/health")
ADMIN = (
    ("GET", "/v1/internal/model/list"),
    ("POST", "/v1/internal/model/load"),
    ("POST", "/v1/internal/model/unload"),
    ("POST", "/v1/internal/stop-generation"),
)


@pytest.fixture
def locked(script_source):
    with application(script_source, api_keys=("sk-one", "sk-two"), admin_keys=("sk-root",)) as api:
        yield api


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer sk-one"},
        {"authorization": "bearer sk-two"},
        {"X-Api-Key": "sk-one"},
        {"api-key": "sk-two"},
        {"Authorization": "Bearer sk-root"},
        {"Authorization": "Bearer ", "X-Api-Key": "sk-one"},
    ],
)
def test_a_known_key_is_let_in_however_it_is_sent(locked, headers):
    assert locked.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer sk-onE"},
        {"Authorization": "Basic sk-one"},
        {"Authorization": "sk-one"},
        {"X-Api-Key": "sk-one sk-two"},
        {b"Authorization": "Bearer sk-öne".encode()},
    ],
)
def test_anything_else_is_unauthenticated(locked, headers):
    answer = locked.get("/v1/models", headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_files_of_pictures_need_no_key_but_their_name(locked):
    assert locked.get(f"{FILES}0123456789abcdef.png").status_code == 404


@pytest.mark.parametrize("path", OPEN)
def test_probes_need_no_key(locked, path):
    assert locked.get(path).status_code == 200


def test_every_other_route_needs_a_key(locked):
    for route in locked.client.app.routes:
        if route.path in OPEN or route.path.startswith(FILES):
            continue
        path = route.path.replace("{model_id:path}", "tiny").replace("{engine:str}", "tiny")
        for method in route.methods:
            assert locked.client.request(method, path).status_code == 401, (method, path)


@pytest.mark.parametrize(("method", "path"), ADMIN)
def test_admin_routes_need_an_admin_key(locked, method, path):
    answer = locked.client.request(method, path, headers={"Authorization": "Bearer sk-one"})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "permission_denied"
    assert locked.get("/v1/internal/model/list", headers={"X-Api-Key": "sk-root"}).status_code == 200


def test_one_generation_may_be_stopped_by_who_knows_its_id(locked):
    headers = {"Authorization": "Bearer sk-one"}
    assert locked.post("/v1/internal/stop-generation", {"id": "cmpl-1"}, headers=headers).json() == "OK"


def test_an_api_key_is_an_admins_where_there_are_no_admin_keys(script_source):
    with application(script_source, api_keys=("sk-one",)) as api:
        assert api.get("/v1/internal/model/list", headers={"X-Api-Key": "sk-one"}).status_code == 200


def test_only_admin_routes_are_locked_where_there_are_only_admin_keys(script_source):
    with application(script_source, admin_keys=("sk-root",)) as api:
        assert api.get("/v1/models").status_code == 200
        assert api.get("/v1/models", headers={"Authorization": "Bearer whatever"}).status_code == 200
        assert api.get("/v1/internal/model/list").status_code == 401
        assert api.get("/v1/internal/model/list", headers={"X-Api-Key": "sk-root"}).status_code == 200


def test_an_open_server_ignores_keys(api):
    """lm-evaluation-harness sends "Bearer " where it has none."""
    assert api.get("/v1/models", headers={"Authorization": "Bearer "}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:1", "[", "::1", ""]
)
def test_an_open_server_cannot_be_reached_under_a_foreign_name(api, host):
    assert api.get("/v1/models", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST"])
def test_an_open_server_answers_under_its_own_names(api, host):
    assert api.get("/v1/models", headers={"Host": host}).status_code == 200


def test_a_foreign_page_cannot_use_an_open_server(api):
    for origin, status in (("http://evil.example", 403), ("null", 403), ("http://127.0.0.1:8000", 200)):
        answer = api.client.post("/v1/internal/stop-generation", headers={"Origin": origin})
        assert answer.status_code == status


def test_a_page_that_the_operator_named_may_use_it(script_source):
    with application(script_source, cors_origins=("https://app.example",)) as api:
        answer = api.get("/v1/models", headers={"Origin": "https://app.example"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        answer = api.get("/v1/models", headers={"Origin": "https://evil.example"})
        assert answer.status_code == 403
        preflight = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        assert api.client.options("/v1/completions", headers=preflight).status_code == 204


def test_there_are_no_cors_headers_unless_asked_for(api):
    answer = api.get("/version", headers={"Origin": "https://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_server_that_is_open_on_purpose_answers_under_any_name(script_source):
    with application(script_source, allow_unauthenticated=True) as api:
        assert api.get("/v1/models", headers={"Host": "gpu-box.local:8000"}).status_code == 200
