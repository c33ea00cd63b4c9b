"""What handlers are given by name. `app.create_app` provides each; nothing here is looked up globally.

Floor 5.
"""

from typing import Annotated

from litestar.params import Dependency

from sardonyx.api.auth import Gatekeeper
from sardonyx.metrics import Metrics
from sardonyx.serving.registry import Registry
from sardonyx.settings import Settings

# Litestar would have msgspec convert its own objects at every call.
_GIVEN = Dependency(skip_validation=True)

Models = Annotated[Registry, _GIVEN]
ServerSettings = Annotated[Settings, _GIVEN]
ServerMetrics = Annotated[Metrics, _GIVEN]
Keeper = Annotated[Gatekeeper, _GIVEN]
