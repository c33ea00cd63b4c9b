import pytest
from tests.api.kserve.fake_service import serving


@pytest.fixture(scope="session")
def shared_api():
    with serving() as api:
        yield api


@pytest.fixture
def api(shared_api):
    """The protocol over numpy models; what a test changed of the service is undone."""
    yield shared_api
    shared_api.service.error = None
    shared_api.service.is_well = True
    shared_api.service.requests.clear()
    shared_api.service.calls.clear()
