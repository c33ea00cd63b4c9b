"""Whisper's exported graphs, run as the server will run them, against what the source's weights say.

What they are tried with is fixed: two windows that look like the spectrogram of speech, and a text to each. The texts
are read in two chunks that share steps, so gathers, cache and positions are tried together with the weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers

from sardonyx.repository.families import Whisper
from sardonyx.repository.manifest import Parity
from sardonyx.runtime.session import Session, open_session
from sardonyx_export.errors import ExportError
from sardonyx_export.stages.operators import MappedEvaluator
from sardonyx_export.stages.paged_verify import empty_caches, step_feeds
from sardonyx_export.stages.verify import TOLERANCES, Tolerance, compare_logits, log_softmax
from sardonyx_export.stages.whisper_operators import WHISPER_OPERATORS
from sardonyx_export.stages.whisper_reference import Array, WhisperPass

MAX_TOKENS = 64
"""Of a text."""
LOGITS = {
    "fp32": TOLERANCES["fp32"],
    "fp16": TOLERANCES["fp16"],
    "bf16": TOLERANCES["bf16"],
    "int8": Tolerance(mean_kl=0.15, top1_agreement=0.7),
}
"""As of language models: `verify.TOLERANCES`, and `verify.INT8_ROWS_TOLERANCE`. Measured on tiny.en and base: fp32 1e-6
of the largest logit; int8 0.010 and 0.014 nats, 93 and 88 %."""
MAX_RELATIVE_ERROR = 1e-4
"""fp32: of keys, values and attention, as a share of the largest number in their tensor."""
MIN_COSINE = {"fp16": 0.999, "bf16": 0.995, "int8": 0.95}
"""Of a window's keys or values in a layer, and of a text's attention. Measured on tiny.en and base: int8 0.986 and
0.978, the values of the worst layer."""
MAX_LOGPROB_ERROR = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.3, "int8": 0.5}
"""Nats, the mean over all tokens of text. Measured on tiny.en and base: fp32 2e-4, int8 0.6 and 0.4 at most."""

_TEXTS = (
    " The ferry leaves at seven, and the last bus to the harbour waits for nobody, so we should go now.",
    " Die Bäckerei öffnet um sechs Uhr, doch das Brot ist erst gegen halb sieben fertig.",
)


@dataclass(slots=True, frozen=True)
class Trial:
    """What a model is tried with."""

    mel: Array
    """(B, M, F)"""
    rows: list[list[int]]
    """B texts, with the tokens that steer the decoder in front and the end behind."""


def make_trial(tokenizer: tokenizers.Tokenizer, facts: Whisper) -> Trial:
    """The fixed windows, and the fixed texts in the model's tokens.

    Raises:
        ExportError: the tokenizer gives ids that are no text of this model.
    """
    begin = [facts.start_id]
    if facts.transcribe_id is not None:
        begin += [min(facts.language_ids.values()), facts.transcribe_id]
    limit = min(MAX_TOKENS, facts.max_model_len)
    rows = []
    for number, text in enumerate(_TEXTS):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if not ids or max(ids) >= facts.end_id:
            raise ExportError(f"gives {ids!r:.80} for a text; text ends below {facts.end_id}", file="tokenizer.json")
        mark = facts.no_timestamps_id if number == 0 else facts.timestamp_begin_id
        row = [*begin, mark, *ids][: limit - 1]
        rows.append([*row, facts.end_id])
    mel = np.stack([_spectrogram(facts.num_mels, facts.num_frames, seed) for seed in range(len(rows))])
    return Trial(mel=mel, rows=rows)


def _spectrogram(num_mels: int, num_frames: int, seed: int) -> Array:
    """(M, F): three bands that wander, in syllables, over a quiet ground, and silence at the end."""
    time, band = np.arange(num_frames) / 100, np.arange(num_mels)[:, None] / num_mels
    level = np.zeros((num_mels, num_frames))
    for number, (centre, pace) in enumerate(((0.12, 1.3), (0.35, 0.9), (0.6, 0.7))):
        path = centre + 0.08 * np.sin(2 * np.pi * pace * time + seed + number)
        level = np.maximum(level, np.exp(-np.square((band - path) / 0.05)) * (1 - 0.2 * number))
    syllables = np.clip(1.4 * np.sin(2 * np.pi * (2.1 + seed) * time), 0, 1) * (
        np.arange(num_frames) < 0.7 * num_frames
    )
    noise = np.random.default_rng(seed).standard_normal(level.shape)
    return np.asarray(-0.6 + 1.7 * level * syllables + 0.05 * noise, np.float32)


def run_graphs(graphs: Mapping[str, Path], name: str, facts: Whisper, trial: Trial) -> tuple[WhisperPass, list[Array]]:
    """The trial through the exported graphs, in the server's own sessions; one is open at a time.

    Args:
        graphs: by role.
        name: of the model, for messages.
        facts: what the manifest will say of it.
        trial: what to run.

    Returns:
        The pass, and where there is an aligner its logprobs (S - 1) of each text.

    Raises:
        ConfigError: a graph cannot be opened.
        EngineError: it failed.
    """
    done = WhisperPass()
    with _Open(graphs["encoder"], name) as session:
        done.cross = session.run({"mel": trial.mel})
    with _Open(graphs["decoder"], name) as session:
        done.logits = _decode(session, facts, trial, done.cross)
    logprobs = []
    if "aligner" in graphs:
        with _Open(graphs["aligner"], name) as session:
            for number, row in enumerate(trial.rows):
                window = {key: values[number : number + 1] for key, values in done.cross.items()}
                given = session.run({"input_ids": np.array([row], np.int64), **window})
                done.attention.append(given["attention"])
                logprobs.append(given["logprobs"])
    return done, logprobs


def run_in_numpy(graphs: Mapping[str, Path], facts: Whisper, trial: Trial) -> tuple[WhisperPass, list[Array]]:
    """As `run_graphs`, of graphs for CUDA: all of their nodes and weights, but in numpy (`stages.whisper_operators`).

    The operators exist on CUDA only. So wiring, weights and their rounding are verified, and CUDA's own kernels are
    not.
    """
    done, logprobs = WhisperPass(), []
    encoder = MappedEvaluator(graphs["encoder"], WHISPER_OPERATORS)
    cross = dict(zip(encoder.output_names, encoder.run(None, {"mel": trial.mel}), strict=True))
    for name, values in cross.items():
        wide = values.astype(np.float32)
        done.cross[name] = wide.transpose(0, 1, 3, 2) if name.endswith(".key") else wide
    done.logits = _decode_in_numpy(graphs["decoder"], facts, trial, cross)
    if "aligner" in graphs:
        aligner = MappedEvaluator(graphs["aligner"], WHISPER_OPERATORS)
        for number, row in enumerate(trial.rows):
            window = {name: values[number : number + 1] for name, values in cross.items()}
            ids = {"input_ids": np.array([row], np.int64), "position_ids": np.arange(len(row))}
            given = dict(zip(aligner.output_names, aligner.run(None, ids | window), strict=True))
            done.attention.append(given["attention"])
            logprobs.append(given["logprobs"])
    return done, logprobs


def _decode_in_numpy(
    path: Path, facts: Whisper, trial: Trial, cross: Mapping[str, npt.NDArray[np.generic]]
) -> list[Array]:
    """As `_decode`, each text in blocks of its own, the last ones first."""
    evaluator = MappedEvaluator(path, WHISPER_OPERATORS)
    block_size = facts.kv.block_size
    assert block_size is not None, "the cache has blocks"
    count = -(-max(map(len, trial.rows)) // block_size)
    caches = empty_caches(evaluator, count * len(trial.rows))
    blocks = np.arange(count * len(trial.rows))[::-1].reshape(-1, count).tolist()
    outputs: list[list[Array]] = [[] for _ in trial.rows]
    for starts, chunks in _steps(trial.rows):
        rows = list(zip(chunks, starts.tolist(), blocks, strict=True))
        lengths = [len(chunk) for chunk in chunks]
        feeds = {**_packed(chunks, starts, capacity=0), **step_feeds(rows, block_size, range(sum(lengths)))}
        feeds = {name: values for name, values in feeds.items() if name in evaluator.input_names}
        (logits,) = evaluator.run(["logits"], feeds | caches | dict(cross))
        for output, part in zip(outputs, np.split(logits, np.cumsum(lengths)[:-1]), strict=True):
            output.append(part)
    return [np.concatenate(parts) for parts in outputs]


class _Open:
    """A session for as long as it is needed."""

    def __init__(self, path: Path, name: str) -> None:
        self._session = open_session(path, model_name=name)

    def __enter__(self) -> Session:
        return self._session

    def __exit__(self, *_: object) -> None:
        self._session.close()


def _decode(session: Session, facts: Whisper, trial: Trial, cross: Mapping[str, Array]) -> list[Array]:
    """Logits after every token of every text."""
    kv = facts.kv
    longest = max(map(len, trial.rows))
    shape = (len(trial.rows), kv.num_kv_heads, 2 * longest, kv.head_size)
    names = [f"{i}.{side}" for i in range(kv.num_layers) for side in ("key", "value")]
    cache = {name: np.zeros(shape, np.float32) for name in names}
    outputs: list[list[Array]] = [[] for _ in trial.rows]
    for starts, chunks in _steps(trial.rows):
        past = {f"past_key_values.{name}": values for name, values in cache.items()}
        given = session.run({**_packed(chunks, starts, capacity=2 * longest), **past, **cross})
        cache = {name: given[f"present.{name}"] for name in names}
        ends = np.cumsum([len(chunk) for chunk in chunks])[:-1]
        for output, part in zip(outputs, np.split(given["logits"], ends), strict=True):
            output.append(part)
    return [np.concatenate(parts) for parts in outputs]


def _steps(rows: Sequence[Sequence[int]]) -> list[tuple[npt.NDArray[np.int64], list[Sequence[int]]]]:
    """Two steps that read all texts: where each one's chunk begins, and the chunks."""
    # Different cuts, so that no step holds equal chunks.
    lengths = np.array([len(row) for row in rows])
    cuts = lengths * np.arange(1, len(lengths) + 1) // (len(lengths) + 1)
    return [
        (starts, [row[start:stop] for row, start, stop in zip(rows, starts, stops, strict=True)])
        for starts, stops in ((np.zeros_like(cuts), cuts), (cuts, lengths))
    ]


def _packed(
    chunks: Sequence[Sequence[int]], starts: npt.NDArray[np.int64], *, capacity: int
) -> dict[str, npt.NDArray[np.int64] | npt.NDArray[np.int32]]:
    """The inputs of a step, by the packed-step contract."""
    lengths = np.array([len(chunk) for chunk in chunks])
    firsts, longest = np.cumsum(lengths) - lengths, int(lengths.max())
    offsets = np.concatenate([np.arange(length) for length in lengths])
    return {
        "input_ids": np.concatenate(chunks).astype(np.int64),
        "position_ids": np.repeat(starts, lengths) + offsets,
        "row_gather": np.minimum(firsts[:, None] + np.arange(longest), lengths.sum() - 1),
        "row_scatter": np.repeat(np.arange(len(chunks)) * longest, lengths) + offsets,
        "seqlens_k": (starts + lengths - 1).astype(np.int32),
        "query_seqlens": lengths.astype(np.int32),
        "total_sequence_length": np.array(capacity, np.int32),
        "logits_index": np.arange(lengths.sum()),
    }


def compare_passes(reference: WhisperPass, measured: WhisperPass, precision: str, name: str) -> list[Parity]:
    """How far the graphs are from a reference: keys and values, logits, and attention where the reference has it.

    Raises:
        ExportError: farther than the precision's tolerance.
    """
    pairs = [
        (expected[row], measured.cross[key][row])
        for key, expected in reference.cross.items()
        for row in range(len(expected))
    ]
    num_positions = len(reference.logits) * next(iter(reference.cross.values())).shape[-1]
    parity = [
        _compare_tensors(
            pairs, precision, f"{name}, keys and values of {len(reference.logits)} windows", num_positions
        ),
        compare_logits(
            reference.logits,
            measured.logits,
            LOGITS[precision],
            f"{name}, logits of {len(reference.logits)} texts",
            kind=precision,
        ),
    ]
    if reference.attention:
        pairs = list(zip(reference.attention, measured.attention, strict=True))
        num_positions = sum(len(logits) for logits in reference.logits)
        parity.append(_compare_tensors(pairs, precision, f"{name}, attention of the aligner", num_positions))
    return parity


def _compare_tensors(pairs: Sequence[tuple[Array, Array]], precision: str, name: str, num_positions: int) -> Parity:
    error = relative = 0.0
    cosine = 1.0
    for expected, actual in pairs:
        largest = float(np.abs(expected).max())
        difference = float(np.abs(expected - actual).max())
        error = max(error, difference)
        # NaN wins a maximum of numpy's, and fails below.
        relative = float(np.maximum(relative, difference / max(largest, 1e-12)))
        lengths = float(np.linalg.norm(expected)) * float(np.linalg.norm(actual))
        product = np.sum(expected * actual, dtype=np.float64)
        cosine = float(np.minimum(cosine, product / max(lengths, 1e-12)))
    is_exact = precision == "fp32"
    least = MIN_COSINE.get(precision, 1.0)
    tolerance = f"max_abs_error <= {MAX_RELATIVE_ERROR:g} * largest" if is_exact else f"min_cosine >= {least:g}"
    if not (relative <= MAX_RELATIVE_ERROR if is_exact else cosine >= least):
        raise ExportError(
            f"the exported graph is not what its source says: cosine {cosine:.5f}, largest difference {relative:.3g} "
            f"of the largest number, with {name}; {precision} has to keep {tolerance}. Nothing was published"
        )
    return Parity(
        reference=name,
        max_abs_error=error,
        min_cosine=min(cosine, 1.0),
        num_positions=num_positions,
        tolerance=tolerance,
    )


def compare_logprobs(
    reference: WhisperPass, measured: Sequence[Array], trial: Trial, facts: Whisper, precision: str, name: str
) -> Parity:
    """How far the aligner's logprobs of text are from a reference's logits.

    Raises:
        ExportError: farther than `MAX_LOGPROB_ERROR`.
    """
    errors = []
    for logits, actual, row in zip(reference.logits, measured, trial.rows, strict=True):
        following = np.array(row[1:])
        places = np.flatnonzero(following < facts.end_id)
        expected = log_softmax(logits[:-1, : facts.end_id])[places, following[places]]
        errors.append(np.abs(expected - actual[places]))
    every = np.concatenate(errors)
    mean, limit = float(every.mean()), MAX_LOGPROB_ERROR[precision]
    if not mean <= limit:
        raise ExportError(
            f"the aligner is not what its source says: log-probabilities of {name} differ by {mean:.3g} on average; "
            f"{precision} has to keep {limit:g}. Nothing was published"
        )
    return Parity(
        reference=f"{name}, log-probabilities of the aligner",
        max_abs_error=float(every.max()),
        num_positions=len(every),
        tolerance=f"mean error <= {limit:g}",
    )
