"""What handlers are given by name. `app.create_app` provides each; nothing here is looked up globally.

Floor 5. `SkipValidation`: Litestar would have msgspec convert our own objects at every call.
"""

from typing import TypeAlias

from litestar.di import NamedDependency
from litestar.params import SkipValidation

from sardonyx.api.auth import Gatekeeper
from sardonyx.metrics import Metrics
from sardonyx.serving.picture_store import PictureStore
from sardonyx.serving.registry import Registry
from sardonyx.serving.task_finder import TaskFinder
from sardonyx.settings import Settings

Tasks: TypeAlias = NamedDependency[SkipValidation[TaskFinder]]
Models: TypeAlias = NamedDependency[SkipValidation[Registry]]
ServerSettings: TypeAlias = NamedDependency[SkipValidation[Settings]]
ServerMetrics: TypeAlias = NamedDependency[SkipValidation[Metrics]]
Store: TypeAlias = NamedDependency[SkipValidation[PictureStore]]
Keeper: TypeAlias = NamedDependency[SkipValidation[Gatekeeper]]
