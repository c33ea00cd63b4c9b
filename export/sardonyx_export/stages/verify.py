"""The exported graph, run as the server will run it, against what the source's weights say.

The prompts are fixed. They are prefilled in two chunks that share steps with other prompts' chunks, so gathers, cache
and positions are tried together with the weights.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import tokenizers

from sardonyx.core import RunnerLimits
from sardonyx.repository.families import LanguageModel
from sardonyx.repository.manifest import Parity
from sardonyx.runners.decoder import DecoderRunner, ForwardRow
from sardonyx.runtime.session import open_session
from sardonyx_export.errors import ExportError
from sardonyx_export.kv_ranges import KvCacheDtype
from sardonyx_export.plan import Activations, Precision

Array = npt.NDArray[np.float32]

REFERENCE = "numpy forward pass in float32 over the source's weights"
MAX_PROMPT_TOKENS = 64

_TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome. Both cities are visited by millions of people "
    "every year, who come to see their museums, churches and squares.",
    "def mean(values: list[float]) -> float:\n    if not values:\n        raise ValueError('no values')\n"
    "    return sum(values) / len(values)\n",
    "Im Jahr 1879 wurde in Ulm ein Kind geboren, das die Physik veränderte. 1905 erschienen vier seiner Arbeiten.",
    "Question: what is 17 + 25?\nAnswer:",
)


class Tolerance(msgspec.Struct, frozen=True, kw_only=True):
    """What an export may differ by."""

    mean_kl: float
    """Nats."""
    top1_agreement: float
    max_relative_error: float | None = None
    """Largest logit difference, as a share of the largest reference logit; ``None``: any."""

    def allows(self, parity: Parity, largest_logit: float) -> bool:
        """False as well where anything is NaN."""
        is_near = self.max_relative_error is None or parity.max_abs_error <= self.max_relative_error * largest_logit
        assert parity.mean_kl is not None
        assert parity.top1_agreement is not None
        return is_near and parity.mean_kl <= self.mean_kl and parity.top1_agreement >= self.top1_agreement

    def beside(self, other: "Tolerance") -> "Tolerance":
        """Where two things round, each within its own."""
        return Tolerance(
            mean_kl=self.mean_kl + other.mean_kl, top1_agreement=round(self.top1_agreement * other.top1_agreement, 3)
        )

    def __str__(self) -> str:
        limits = [f"mean_kl <= {self.mean_kl:g}", f"top1_agreement >= {self.top1_agreement:g}"]
        if self.max_relative_error is not None:
            limits.append(f"max_abs_error <= {self.max_relative_error:g} * largest logit")
        return ", ".join(limits)


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(mean_kl=1e-6, top1_agreement=0.99, max_relative_error=1e-4),
    "fp16": Tolerance(mean_kl=1e-3, top1_agreement=0.95),
    "bf16": Tolerance(mean_kl=0.02, top1_agreement=0.85),
    "int8": Tolerance(mean_kl=0.03, top1_agreement=0.85),
    "int4": Tolerance(mean_kl=0.3, top1_agreement=0.5),
}
"""Measured on SmolLM2-135M (Q4_1): fp32 3e-6 of the largest logit; int8 0.007 nats and 96 %; int4 with the source's own
blocks 3e-8 nats. Random weights, whose distributions are flat: int8 0.0004 nats and 95 %; int4 0.04 nats and 65 %. A
graph that is wrong somewhere is a nat or more away."""


INT8_ROWS_TOLERANCE = Tolerance(mean_kl=0.15, top1_agreement=0.7)
"""For activations ``int8_rows``, whatever the precision says: 7-bit weights and one scale for a whole row. Measured on
SmolLM2-135M (Q4_1): 0.08 nats and 81 %, of them 0.02 nats by the weights."""

KV_CACHE_TOLERANCES: dict[KvCacheDtype, Tolerance] = {
    "int8": Tolerance(mean_kl=0.02, top1_agreement=0.85),
    "fp8": Tolerance(mean_kl=0.08, top1_agreement=0.75),
}
"""What a quantised cache may add. Measured on random weights of SmolLM2's shape, 8 layers, 64 tokens: int8 0.002 nats
and 95 %, fp8 0.018 nats and 84 %, whatever the weights' precision. No trained model was at hand."""


def make_prompts(tokenizer: tokenizers.Tokenizer, *, vocab_size: int, max_model_len: int) -> list[list[int]]:
    """The fixed prompts as token ids, each at most `MAX_PROMPT_TOKENS` long.

    Raises:
        ExportError: the tokenizer gives ids that the model has no embedding for.
    """
    limit = min(MAX_PROMPT_TOKENS, max_model_len)
    prompts = [ids[:limit] for text in _TEXTS if (ids := tokenizer.encode(text).ids)]
    if not prompts:
        raise ExportError("turns text into no tokens", file="tokenizer.json")
    highest = max(max(prompt) for prompt in prompts)
    if highest >= vocab_size:
        raise ExportError(f"gives token {highest:,}; the model has {vocab_size:,}", file="tokenizer.json")
    return prompts


def run_graph(path: Path, name: str, model: LanguageModel, prompts: Sequence[Sequence[int]]) -> list[Array]:
    """Logits after every token, from the graph in the server's own session and runner.

    Args:
        path: of the graph.
        name: of the model, for messages.
        model: what the manifest will say of it.
        prompts: token ids.

    Returns:
        One (length, V) array for each prompt.

    Raises:
        ConfigError: the graph cannot be opened.
        EngineError: a step failed.
    """
    longest = max(map(len, prompts))
    limits = RunnerLimits(
        num_slots=len(prompts), max_model_len=longest, max_chunk_tokens=longest, vocab_size=model.vocab_size
    )
    runner = DecoderRunner(open_session(path, model_name=name), model, limits)
    try:
        outputs: list[list[Array]] = [[] for _ in prompts]
        # Different cuts, so that no step holds equal chunks.
        cuts = [len(prompt) * (slot + 1) // (len(prompts) + 1) for slot, prompt in enumerate(prompts)]
        for first_half in (True, False):
            rows = [
                ForwardRow(slot, list(prompt[:cut] if first_half else prompt[cut:]), 0 if first_half else cut)
                for slot, (prompt, cut) in enumerate(zip(prompts, cuts, strict=True))
            ]
            rows = [row for row in rows if row.token_ids]
            if rows:
                lengths = [len(row.token_ids) for row in rows]
                logits = runner.forward(rows, range(sum(lengths)))
                for row, part in zip(rows, np.split(logits, np.cumsum(lengths)[:-1]), strict=True):
                    outputs[row.slot].append(np.array(part))
        return [np.concatenate(parts) for parts in outputs]
    finally:
        runner.close()


def compare(
    reference: Sequence[Array],
    measured: Sequence[Array],
    precision: Precision,
    activations: Activations | None = None,
    *,
    note: str = "",
    kv_cache_dtype: KvCacheDtype | None = None,
) -> Parity:
    """How far the export is from its source.

    Args:
        reference: (length, V) for each prompt.
        measured: the same of the export.
        precision: of the export.
        activations: of the export, where they matter.
        note: what the manifest says first, of how it was measured.
        kv_cache_dtype: of the export's cache, where it is quantised.

    Raises:
        ExportError: farther than the tolerance of the precision, or of activations that have their own.
    """
    has_rows = activations == "int8_rows"
    tolerance = INT8_ROWS_TOLERANCE if has_rows else TOLERANCES[precision]
    name = f"{note + ': ' if note else ''}{REFERENCE}, {len(reference)} prompts"
    kind: str | None = activations if has_rows else precision
    if kv_cache_dtype is not None:
        tolerance = tolerance.beside(KV_CACHE_TOLERANCES[kv_cache_dtype])
        name, kind = f"{name}; KV cache in {kv_cache_dtype}", f"{kind} with a KV cache in {kv_cache_dtype}"
    return compare_logits(reference, measured, tolerance, name, kind=kind)


@np.errstate(invalid="ignore", over="ignore")
def compare_logits(
    reference: Sequence[Array], measured: Sequence[Array], tolerance: Tolerance, name: str, *, kind: str | None
) -> Parity:
    """How far the logits of some texts are from what they should be.

    Args:
        reference: (length, V) for each text.
        measured: the same of the export.
        tolerance: how far they may be.
        name: of the reference.
        kind: what the tolerance belongs to, for messages.

    Raises:
        ExportError: farther than that.
    """
    max_abs_error = divergence = 0.0
    num_positions = num_agreeing = 0
    for expected, actual in zip(reference, measured, strict=True):
        max_abs_error = max(max_abs_error, float(np.abs(expected - actual).max()))
        expected_log, actual_log = log_softmax(expected), log_softmax(actual)
        divergence += float((np.exp(expected_log) * (expected_log - actual_log)).sum())
        num_positions += len(expected)
        num_agreeing += int((expected.argmax(axis=1) == actual.argmax(axis=1)).sum())
    parity = Parity(
        reference=name,
        max_abs_error=max_abs_error,
        mean_kl=max(divergence / num_positions, 0.0),
        top1_agreement=num_agreeing / num_positions,
        num_positions=num_positions,
        tolerance=str(tolerance),
    )
    largest = max(float(np.abs(expected).max()) for expected in reference)
    if not tolerance.allows(parity, largest):
        raise ExportError(
            f"the exported graph is not what the source's weights say: max_abs_error {parity.max_abs_error:.3g} "
            f"(largest logit {largest:.3g}), mean_kl {parity.mean_kl:.3g}, top1_agreement {parity.top1_agreement:.3f}; "
            f"{kind} has to keep {tolerance}. Nothing was published"
        )
    return parity


def log_softmax(logits: Array) -> Array:
    """Logarithms of the shares that logits stand for, (length, V)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
