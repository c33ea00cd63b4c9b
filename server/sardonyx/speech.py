"""The nouns of speech recognition that every floor shares: a window of sound, what is asked of it, what a step does.

Floor 0, above `core`: no ONNX Runtime, no HTTP, no clock. Shape letters are those of `core`; M mel bands, F frames of a
window (100 a second), P = F / 2 positions that the encoder makes of them, A alignment heads.
"""

import enum
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from sardonyx.core import BatchRow, Request, Sequence, SequenceEvent

Floats = npt.NDArray[np.float32]


@dataclass(slots=True, eq=False, weakref_slot=True)
class Window:
    """At most thirty seconds of sound. Whoever keeps it keeps what the encoder made of it: it is encoded once.

    Made and dropped by callers; `cross` is written by the runner only. A runner on a card may take it back, where it
    has no room for all windows that are kept: such a window is encoded again when it is needed.
    """

    spectrogram: Floats
    """(M, F); zeros behind the sound."""
    num_frames: int
    """Of sound."""
    cross: "list[CrossLayer] | int | None" = None
    """By decoder layer, or where a card holds it; ``None`` until it is encoded."""


@dataclass(slots=True, frozen=True)
class CrossLayer:
    """What one decoder layer attends to in a window."""

    key: Floats
    """(1, H, D, P)."""
    value: Floats
    """(1, H, P, D)."""


class SpeechTask(enum.Enum):
    """What a request wants to know of its window."""

    TEXT = enum.auto()
    """`Request.prompt_ids`, then what is said."""
    LANGUAGES = enum.auto()
    """How likely each language is; the prompt is the start token alone."""
    ALIGNMENT = enum.auto()
    """Where each token of `Request.prompt_ids` is heard; nothing is generated."""


class SpeechRequest(Request, frozen=True, kw_only=True):
    """One sequence over one window. Of `Request.sampling` temperature and seed count."""

    window: Window
    task: SpeechTask = SpeechTask.TEXT
    has_timestamps: bool = False
    """TEXT: timestamps are generated, by their rules."""
    flow: int = 0
    """Requests with the same number belong to one call: rows are shared fairly between calls."""


class Alignment(msgspec.Struct, frozen=True):
    """What the aligner found of the tokens 0 .. S - 1."""

    attention: Floats
    """(A, S, P): scaled products before the softmax."""
    logprobs: Floats
    """(S - 1): of each token but the first, given those before it, among text tokens."""


class SpeechEvent(SequenceEvent, kw_only=True):
    """The one event of a request: its end. `token_ids` are all that were generated, an end token not among them."""

    token_logprobs: list[float] = msgspec.field(default_factory=list)
    """Of the tokens as they were drawn, after rules and before temperature; the end token's, where there is one, is the
    last."""
    no_speech_prob: float = 0.0
    """TEXT: of the token that says so, in place of the first language or text token."""
    language_probs: dict[int, float] = msgspec.field(default_factory=dict)
    """LANGUAGES: by token id; their sum is 1."""
    alignment: Alignment | None = None
    is_loop: bool = False
    """TEXT: ended because it said the same again and again."""


@dataclass(slots=True, frozen=True)
class Placement:
    """Bring a sequence into a slot, before the pass: its window's keys and values, and what it has computed already."""

    slot: int
    window: Window
    source: int | None = None
    """The slot it moves from; ``None``: it begins."""
    num_tokens: int = 0
    """Positions of its own cache to take along."""


@dataclass(slots=True)
class SpeechBatch:
    """What one step executes: windows to encode, or one sequence to align, or placements and then one packed pass."""

    windows: list[Window] = field(default_factory=list)
    aligned: Sequence | None = None
    placements: list[Placement] = field(default_factory=list)
    rows: list[BatchRow] = field(default_factory=list)
    """In the slots 0 .. B - 1, each taken."""

    @property
    def num_tokens(self) -> int:
        """T of the pass, or tokens to align."""
        if self.aligned is not None:
            return len(self.aligned.token_ids)
        return sum(row.num_new_tokens for row in self.rows)


@dataclass(slots=True)
class SpeechOutput:
    """What a runner made of a `SpeechBatch`; lists are in the order of its rows. Encoded windows have their `cross`."""

    token_ids: list[int | None] = field(default_factory=list)
    """The next token, of rows that ask for text."""
    logprobs: list[float] = field(default_factory=list)
    """Of `token_ids`."""
    no_speech_probs: list[float | None] = field(default_factory=list)
    """Of rows that begin."""
    language_probs: list[dict[int, float]] = field(default_factory=list)
    """Of rows that ask for languages; else empty."""
    alignment: Alignment | None = None
    failed: dict[int, str] = field(default_factory=dict)
    """By index of the row: why this row alone has no answer, as a sentence for its caller."""
