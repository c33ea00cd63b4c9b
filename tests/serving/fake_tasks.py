"""Tasks whose answers a test can work out, and a repository of them."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

import numpy as np
from tests.serving.fake_models import FakeVersion

from sardonyx.errors import ContextLengthExceeded, ServeError
from sardonyx.repository.index import IndexEntry
from sardonyx.serving.served import LoadedModel, ModelOverride
from sardonyx.serving.tasks import (
    CategoryRule,
    Encoded,
    EncodeOptions,
    HeardWindow,
    ImageOptions,
    ImageUsage,
    PictureUpdate,
    TextInput,
    TranscriptionOptions,
)

Rules = Mapping[str, Sequence[CategoryRule]]


class Waits:
    """A task that can be held, and remembers what became of its calls."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.gate: asyncio.Event | None = None
        """Calls wait for it where there is one."""
        self.error: Exception | None = None
        """Raised by the next calls."""
        self.calls: list[object] = []
        self.options: list[EncodeOptions] = []
        self.num_cancelled = 0
        self.num_under_way = 0
        self.entered = asyncio.Event()
        """There was a call."""

    async def enter(self, call: object, options: EncodeOptions | None = None) -> None:
        self.calls.append(call)
        if options is not None:
            self.options.append(options)
        self.num_under_way += 1
        self.entered.set()
        try:
            if self.gate is not None:
                await self.gate.wait()
            if self.error is not None:
                raise self.error
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_under_way -= 1


class FakeEmbedder(Waits):
    """A text is counted letter by letter: ``size`` counts of characters by their code modulo ``size``."""

    def __init__(
        self,
        name: str = "embedder",
        *,
        size: int = 8,
        is_normalized: bool = True,
        similarity: str = "cosine",
        prompts: Mapping[str, str] | None = None,
        default_prompt: str | None = None,
        matryoshka_dims: Sequence[int] = (),
        allows_any_dimensions: bool = False,
        max_model_len: int = 4096,
    ) -> None:
        super().__init__(name)
        self.size = size
        self.is_normalized = is_normalized
        self.similarity = similarity
        self.prompts = dict(prompts or {})
        self.default_prompt = default_prompt
        self.matryoshka_dims = matryoshka_dims
        self.allows_any_dimensions = allows_any_dimensions
        self.max_model_len = max_model_len

    def vector(self, item: TextInput) -> np.ndarray:
        codes = [ord(each) for each in item] if isinstance(item, str) else item
        counts = np.bincount(np.array(codes, np.int64) % self.size, minlength=self.size).astype(np.float32)
        return counts / np.float32(np.linalg.norm(counts)) if self.is_normalized else counts

    async def embed(self, inputs: Sequence[TextInput], *, prompt: str = "", options: EncodeOptions) -> Encoded:
        await self.enter((list(inputs), prompt), options)
        if any(len(item) > self.max_model_len for item in inputs) and not options.truncate:
            raise ContextLengthExceeded(f"input: has more than {self.max_model_len} tokens", param="input")
        values = np.stack([self.vector(prompt + item if isinstance(item, str) else item) for item in inputs])
        return Encoded(values=values, num_tokens=sum(map(len, inputs)))


class FakeReranker(Waits):
    """The share of a text's characters that the query has, too."""

    max_model_len = 512

    async def rerank(self, pairs: Sequence[tuple[str, str]], *, options: EncodeOptions) -> Encoded:
        await self.enter(list(pairs), options)
        values = [[sum(each in query for each in text) / len(text)] for query, text in pairs]
        return Encoded(values=np.array(values, np.float32), num_tokens=sum(len(a) + len(b) for a, b in pairs))


class FakeClassifier(Waits):
    """A text scores for a label what it says: ``"rude=0.75 mild=0.5"``; 0 for labels that it does not name."""

    max_model_len = 512

    def __init__(self, name: str = "classifier", rules: Rules | None = None, labels: Sequence[str] = ()) -> None:
        super().__init__(name)
        self.moderation: Rules = {"rude": [CategoryRule("harassment", 0.5)]} if rules is None else rules
        self.labels = labels or list(self.moderation)

    def scores(self, text: str) -> list[float]:
        said = dict(each.split("=") for each in text.split() if each.count("=") == 1)
        return [float(said.get(label, 0.0)) for label in self.labels]

    async def classify(self, texts: Sequence[str], *, options: EncodeOptions) -> Encoded:
        await self.enter(list(texts), options)
        values = np.array([self.scores(text) for text in texts], np.float32)
        return Encoded(values=values, num_tokens=sum(map(len, texts)))


class FakeImageClassifier(Waits):
    """As `FakeClassifier`; the bytes of a picture are its text."""

    def __init__(self, name: str = "pictures", rules: Rules | None = None) -> None:
        super().__init__(name)
        self.moderation: Rules = {"nude": [CategoryRule("sexual", 0.5)]} if rules is None else rules
        self.labels = list(self.moderation)

    async def classify_images(self, images: Sequence[bytes], *, timeout_s: float | None = None) -> Encoded:
        await self.enter(list(images), EncodeOptions(timeout_s=timeout_s))
        said = FakeClassifier(rules=self.moderation)
        values = np.array([said.scores(image.decode("latin-1")) for image in images], np.float32)
        return Encoded(values=values, num_tokens=len(images))


class FakeTranscript:
    """Windows as a test has written them down; an exception among them is raised there."""

    def __init__(self, task: "FakeTranscriber", id: str, windows: Sequence[HeardWindow | Exception]) -> None:
        self.id = id
        self.duration_s = task.duration_s
        self.language = task.language
        self.num_tokens = 0
        self.is_aborted = False
        self._task = task
        self._windows = windows

    async def __aiter__(self) -> AsyncIterator[HeardWindow]:
        for window in self._windows:
            if self._task.window_gate is not None:
                await self._task.window_gate.acquire()
            if isinstance(window, Exception):
                raise window
            if window.segments:
                yield window

    async def collect(self) -> list[HeardWindow]:
        return [window async for window in self]

    def abort(self, error: ServeError | None = None) -> None:
        self.is_aborted = True


class FakeTranscriber(Waits):
    """Hears in every sound the same."""

    languages = ("en", "de", "fr")
    is_multilingual = True
    has_words = True

    def __init__(self, name: str = "whisper", *windows: HeardWindow | Exception) -> None:
        super().__init__(name)
        self.windows = list(windows)
        self.duration_s = 4.5
        self.language = "en"
        self.window_gate: asyncio.Semaphore | None = None
        """Each window waits for it, where there is one."""
        self.asked: list[TranscriptionOptions] = []
        self.transcripts: list[FakeTranscript] = []

    async def start(self, sound: bytes, options: TranscriptionOptions, *, request_id: str) -> FakeTranscript:
        self.asked.append(options)
        await self.enter(sound)
        self.transcripts.append(FakeTranscript(self, request_id, self.windows))
        return self.transcripts[-1]


class FakePictures:
    """Updates as a test has written them down; an exception among them is raised there."""

    def __init__(self, task: "FakePainter", id: str, options: ImageOptions) -> None:
        self.id = id
        self.size = options.size or task.size
        places = self.size[0] * self.size[1] // 64
        self.usage = ImageUsage(
            num_text_tokens=len(options.prompt),
            num_source_tokens=0 if options.source is None else places,
            num_picture_tokens=places,
        )
        self.is_aborted = False
        self._task = task
        self._updates = task.updates or task.pictures(options, self.size)

    async def __aiter__(self) -> AsyncIterator[PictureUpdate]:
        for update in self._updates:
            if self._task.update_gate is not None:
                await self._task.update_gate.acquire()
            if isinstance(update, Exception):
                raise update
            yield update

    async def collect(self) -> list[PictureUpdate]:
        try:
            return sorted([update async for update in self if update.is_final], key=lambda update: update.index)
        finally:
            self.abort()

    def abort(self, error: ServeError | None = None) -> None:
        self.is_aborted = True


class FakePainter(Waits):
    """Paints each picture of a call in one grey: the first is 10, the next 20; previews are 1, 2, 3."""

    size = (16, 24)
    default_steps = 20
    max_steps = 50

    def __init__(self, name: str = "painter", *updates: PictureUpdate | Exception) -> None:
        super().__init__(name)
        self.updates = list(updates)
        self.update_gate: asyncio.Semaphore | None = None
        """Each update waits for it, where there is one."""
        self.asked: list[ImageOptions] = []
        self.started: list[FakePictures] = []

    def pictures(self, options: ImageOptions, size: tuple[int, int]) -> list[PictureUpdate | Exception]:
        found: list[PictureUpdate | Exception] = []
        for index in range(options.n):
            found += [
                PictureUpdate(index, np.full((2, 3, 3), number + 1, np.uint8), is_final=False)
                for number in range(options.num_previews)
            ]
            found.append(PictureUpdate(index, np.full((*size, 3), 10 * (index + 1), np.uint8), is_final=True))
        return found

    def asked_for(self, prompt: str) -> ImageOptions:
        """What a request says that has nothing but its prompt."""
        return ImageOptions(prompt=prompt, steps=self.default_steps)

    async def start(self, options: ImageOptions, *, request_id: str) -> FakePictures:
        self.asked.append(options)
        await self.enter(options.prompt)
        self.started.append(FakePictures(self, request_id, options))
        return self.started[-1]


class TaskSource:
    """A repository of models that are one task each, by the task's name."""

    def __init__(self, *tasks: Waits) -> None:
        self.tasks = {task.name: task for task in tasks}
        self.served: dict[str, object] = {}
        """For `tests.api.live`: nothing there has a gate to open."""

    def index(self) -> list[IndexEntry]:
        return [IndexEntry(name=name, versions=[1], family=_FAMILIES[type(task)]) for name, task in self.tasks.items()]

    def load(self, name: str, override: ModelOverride | None = None) -> LoadedModel:
        version = FakeVersion(name, 1, 1, None)
        version.task = self.tasks[name]
        return LoadedModel(versions={1: version})

    def progress(self, name: str) -> str:
        return ""

    def close(self) -> None:
        """Models share nothing."""


_FAMILIES: dict[type, str] = {
    FakeEmbedder: "embeddings",
    FakeReranker: "reranker",
    FakeClassifier: "classifier",
    FakeImageClassifier: "image_classifier",
    FakeTranscriber: "whisper",
    FakePainter: "diffusion",
}
