"""Classifiers that come in a form of their own: a pickled text classifier, and ready graphs that judge pictures."""

from collections.abc import Callable
from pathlib import Path

from sardonyx_export.built import Built
from sardonyx_export.plan import FAMILY_OF_TASK, Plan, Task
from sardonyx_export.recipes.recipe import Progress
from sardonyx_export.sources.resolve import OpenSource


class PackagedRecipe:
    """A `recipe.Recipe` that one function carries out.

    Args:
        opened: the source.
        name: of the model.
        task: classifier or image-classifier.
        architecture: the source's own word.
        make: writes graphs into a folder.
    """

    def __init__(
        self, opened: OpenSource, name: str, task: Task, architecture: str, make: Callable[[Path], Built]
    ) -> None:
        path = opened.path
        files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
        num_bytes = sum(file.stat().st_size for file in files)
        self._make = make
        self.plan = Plan(
            name=name,
            family=FAMILY_OF_TASK[task],
            architecture=architecture,
            precision="fp32",
            activations=None,
            max_model_len=None,
            num_parameters=num_bytes // 4,
            storage={"as published": 1},
            estimated_bytes=num_bytes,
        )

    def build(self, folder: Path, progress: Progress) -> Built:
        """See `recipe.Recipe`."""
        progress("build", 0, 1)
        built = self._make(folder)
        progress("build", 1, 1)
        return built


def profanity(opened: OpenSource, name: str, max_model_len: int | None) -> PackagedRecipe:
    """A text classifier that scikit-learn pickled."""
    from sardonyx_export.families.profanity import build_profanity

    return PackagedRecipe(
        opened,
        name,
        "classifier",
        "CalibratedClassifierCV",
        lambda folder: build_profanity(opened.path, folder, sha256=opened.sha256, max_model_len=max_model_len),
    )


def image_classifier(opened: OpenSource, name: str) -> PackagedRecipe:
    """A ready graph that judges pictures."""
    from sardonyx_export.families.image_classifier import import_image_classifier

    return PackagedRecipe(
        opened,
        name,
        "image-classifier",
        "ONNX",
        lambda folder: import_image_classifier(opened.path, folder, sha256=opened.sha256),
    )
