"""What `pipeline` asks of each kind of model: say what will be built, then build and verify it."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from sardonyx_export.built import Built
from sardonyx_export.plan import Plan

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, how much of it is done and how much there is."""


class Recipe(Protocol):
    """One export. Made by `recipes.choose.choose_recipe`."""

    @property
    def plan(self) -> Plan: ...

    def build(self, folder: Path, progress: Progress) -> Built:
        """Write graphs into a folder, and compare them with their source.

        Args:
            folder: an empty one.
            progress: of what takes long, called in this thread.

        Raises:
            ExportError: the source cannot be built, or the result is out of tolerance.
            EngineError: the graph cannot be run.
        """
        ...
