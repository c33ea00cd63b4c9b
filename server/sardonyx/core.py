"""The nouns that every floor shares.

Floor 0: no ONNX Runtime, no HTTP, no files, no clock. A scheduler and a runner never import each other; they meet here,
in `Sequence` and `Batch`.

Shape letters, used in every docstring of the project:
    T packed tokens of a step · B rows · S padded chunk · N wanted logits rows · P past tokens · C cache capacity ·
    L layers · H query heads · K key/value heads · D head size · V vocabulary · E hidden size;
    images: c channels · y rows · x columns.
"""

import enum
from collections.abc import Sized
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

import msgspec


class FinishReason(enum.StrEnum):
    """Why a sequence ended. The OpenAI API shows only ``stop`` and ``length``."""

    STOP = "stop"
    """A stop token, a stop string or the end of the text."""
    LENGTH = "length"
    """`Request.max_tokens` or the model's limit."""
    CANCELLED = "cancelled"
    """Aborted: the client left, or its deadline passed."""
    ERROR = "error"
    """The step that held it failed; `SequenceEvent.error` says how."""


class SequenceState(enum.Enum):
    """Where a sequence stands in a step loop."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED = enum.auto()


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one token is drawn from a row of logits. Validated where it was parsed; trusted from there on."""

    temperature: float = 1.0
    """0 is greedy; everything below then has no effect but penalties, bias and log-probabilities."""
    top_k: int = 0
    """Keep the k likeliest; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probabilities sum to at least this, in (0, 1]."""
    min_p: float = 0.0
    """Drop tokens less likely than this times the likeliest, in [0, 1]."""
    typical_p: float = 1.0
    """Locally typical sampling: keep the set closest to the expected information, of this mass; 1 is off."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens already in prompt or completion; 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted once from every token already in the completion."""
    frequency_penalty: float = 0.0
    """Subtracted from each token as often as it is in the completion."""
    logit_bias: dict[int, float] = {}
    """Added to raw logits, by token id."""
    seed: int | None = None
    """Same seed, same prompt: same completion. ``None`` draws one."""
    num_logprobs: int | None = None
    """``None``: none; 0: the chosen token's; n: the n likeliest as well. From raw logits, before penalties."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence asked of a `StepLoop`: what `serving` submits. ``n`` choices are n requests."""

    id: str
    """Unique in the loop."""
    prompt_ids: list[int]
    """At least one token; at most the model's limit. Never changed after submission."""
    sampling: SamplingParams = SamplingParams()
    max_tokens: int = 16
    """Completion tokens at most. 0 only together with `num_prompt_logprobs`: score the prompt, generate nothing."""
    min_tokens: int = 0
    """Until so many completion tokens, no stop token is drawn."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the sequence, the model's own end tokens among them. The token itself is delivered."""
    num_prompt_logprobs: int | None = None
    """As `SamplingParams.num_logprobs`, for each prompt token but the first. Switches prefix reuse off."""
    deadline_s: float | None = None
    """Monotonic time after which the sequence is ended as CANCELLED, waiting or running."""
    start_by_s: float | None = None
    """Monotonic time after which it is ended as CANCELLED if it never had a slot."""


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities at one position, from the raw logits."""

    token_id: int
    logprob: float
    """Of `token_id`. Never NaN; at least -9999.0."""
    top: list[tuple[int, float]]
    """The likeliest tokens and theirs, best first; as many as were asked for."""


class SequenceEvent(msgspec.Struct, kw_only=True):
    """What one step did for one request. A finished request gets exactly one event with a finish reason, its last."""

    request_id: str
    token_ids: list[int] = []
    """New completion tokens, in order; a stop token is among them."""
    logprobs: list[TokenLogprobs] = []
    """One for each of `token_ids` where asked for."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Once, when the prompt is done and where asked for: one for each prompt token but the first."""
    num_cached_tokens: int = 0
    """Prompt tokens that were not computed again, known from the first event on."""
    started_s: float | None = None
    """Monotonic time at which it first got a slot; ``None`` if it never did."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    """With FinishReason.ERROR: a sentence for the caller. With CANCELLED, where time ran out: ``"deadline"``
    (`Request.deadline_s`) or ``"queue"`` (`Request.start_by_s`)."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's life inside the engine. The policy owns it and changes it between steps; runners only read it."""

    request: Request
    seed: int
    """The request's seed, or one drawn at submission."""
    arrival_s: float
    """Monotonic."""
    token_ids: list[int] = field(default_factory=list)
    """Prompt, then completion."""
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the cache. After a preemption it counts from 0 again."""
    num_cached_tokens: int = 0
    """Prompt tokens taken from the cache at first admission."""
    slot: int = -1
    """The KV row it holds while RUNNING, else -1. Where the cache has blocks: its place among those that run."""
    blocks: list[int] = field(default_factory=list)
    """Where the cache has blocks: those it holds, the first `RunnerLimits.block_size` positions in the first one. Empty
    unless RUNNING."""
    state: SequenceState = SequenceState.WAITING
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_preemptions: int = 0
    started_s: float | None = None
    """When it first got a slot."""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens known but not yet in the cache: 1 while decoding, more while the prompt is prefilled."""
        return len(self.token_ids) - self.num_computed_tokens


@dataclass(slots=True, frozen=True)
class BatchRow:
    """One sequence's part of a step: tokens ``[num_past, num_past + num_new)`` of its `token_ids`, as it is when made.

    A step may be launched while the one before it still runs (`AsyncRunner`). Its rows then go on from what that one
    will have computed.
    """

    sequence: Sequence
    num_new_tokens: int
    num_ahead: int = 0
    """Tokens of the sequence that the step before computes, where the policy has not seen that step's outcome yet."""
    fed_by: int = -1
    """Where the row's one token is what the step before samples: that one's row. It never passes through the host."""

    num_past: int = field(init=False)
    """Tokens that are in the cache when the step begins."""
    is_sampled: bool = field(init=False)
    """The row reaches the last token that is known when it begins, so its logits give the next one."""

    def __post_init__(self) -> None:
        # Settled here: by the time a step is collected the one before it may have moved the sequence on.
        sequence, num_ahead = self.sequence, self.num_ahead
        object.__setattr__(self, "num_past", sequence.num_computed_tokens + num_ahead)
        object.__setattr__(self, "is_sampled", num_ahead + self.num_new_tokens >= sequence.num_pending_tokens)


@dataclass(slots=True, frozen=True)
class SlotCopy:
    """Copy the first `num_tokens` cached positions of every layer from slot `source` to slot `target`."""

    source: int
    target: int
    num_tokens: int


@dataclass(slots=True)
class Batch:
    """What one step executes: copies first, then one packed pass over `rows`."""

    rows: list[BatchRow]
    copies: list[SlotCopy] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """T of the step."""
        return sum(row.num_new_tokens for row in self.rows)


@dataclass(slots=True)
class StepOutput:
    """What a runner made of a `Batch`, in the order of its rows."""

    token_ids: list[int | None]
    """The next token, for rows that are sampled."""
    logprobs: list[TokenLogprobs | None]
    """For sampled rows that asked."""
    prompt_logprobs: list[list[TokenLogprobs]]
    """For rows that asked: of the prompt tokens that this step's logits predict, in order; else empty."""
    failed: dict[int, str] = field(default_factory=dict)
    """By index of the row: why this row alone has no answer, as a sentence for its caller. The others stand."""


@dataclass(slots=True, frozen=True)
class RunnerLimits:
    """What a policy must respect; fixed while the runner lives."""

    num_slots: int
    """KV rows; where the cache has blocks, sequences that run at once."""
    max_model_len: int
    """Prompt and completion tokens of one sequence at most."""
    max_chunk_tokens: int
    """Prompt tokens of one row in one step at most; C = max_model_len + max_chunk_tokens - 1."""
    vocab_size: int
    block_size: int = 0
    """Tokens of a KV block; 0: the cache has slots."""
    num_blocks: int = 0
    """KV blocks of all sequences together; block 0 is among them and belongs to nobody, for rows that fill a bucket."""
    max_scored_tokens: int | None = None
    """Tokens of one step at most whose sequences want their prompts' log-probabilities; ``None``: no limit but the
    others."""


class AnyBatch(Protocol):
    """What a step loop counts of the batches that its policy and its runner exchange."""

    @property
    def rows(self) -> Sized: ...

    @property
    def num_tokens(self) -> int:
        """T of the step."""
        ...


B = TypeVar("B", bound=AnyBatch)
B_contra = TypeVar("B_contra", bound=AnyBatch, contravariant=True)
O = TypeVar("O")  # noqa: E741 - an output, as B is a batch
O_co = TypeVar("O_co", covariant=True)
O_contra = TypeVar("O_contra", contravariant=True)


class Runner(Protocol[B_contra, O_co]):
    """Executes batches of one family on one device. Used by one thread."""

    @property
    def limits(self) -> RunnerLimits: ...

    def execute(self, batch: B_contra) -> O_co:
        """Run one step.

        Raises:
            EngineError: the step failed; no row of it has an answer, and their cache rows are unspecified.
        """
        ...

    def close(self) -> None:
        """Give back memory. Nothing may be executed afterwards."""
        ...


@runtime_checkable
class AsyncRunner(Runner[B_contra, O_co], Protocol[B_contra, O_co]):
    """A runner whose steps run on a device while the host goes on.

    Steps run in the order in which they are launched, each after the one before it has ended. At most two are out. A
    sequence may end while a row of it is out, and its blocks go to others; a launch therefore reads all that it needs
    of its sequences, and `collect` gives such a row an answer that nobody looks at.
    """

    def can_follow(self, batch: B_contra) -> bool:
        """A step may be launched behind this one before its outcome is known: every token is drawn on the device."""
        ...

    def launch(self, batch: B_contra) -> None:
        """Start a step. Rows with `BatchRow.fed_by` take their token from the step launched before it.

        Raises:
            EngineError: the step was not started.
        """
        ...

    def collect(self) -> O_co:
        """Wait for the oldest step that is out.

        Raises:
            EngineError: it failed. A step behind it has no answer either: it is not to be collected.
        """
        ...
