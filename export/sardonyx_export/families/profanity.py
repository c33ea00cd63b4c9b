"""The text classifier of alt-profanity-check: words weighed by scikit-learn, linear machines over them.

Opening a pickle runs what is written in it. Two files are opened, whose hashes are known, and no others.
"""

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from sardonyx.repository.families import Encoder, Labels
from sardonyx.repository.manifest import Parity
from sardonyx_export.builders.graph import GraphWriter
from sardonyx_export.built import Built
from sardonyx_export.encoder_spec import Array
from sardonyx_export.errors import ExportError
from sardonyx_export.sources.pypi import PINNED_SHA256
from sardonyx_export.stages.encoder_reference import EncodedRow
from sardonyx_export.stages.encoder_rows import TEXTS
from sardonyx_export.stages.encoder_verify import run_graph

_PIN = ("alt-profanity-check", "1.9.1")
_VECTORIZER, _MODEL = "vectorizer.joblib", "model.joblib"
_FILES = {
    _VECTORIZER: "19c5200dc6a41f026e0558e2f164f5fe8d8f58e502b46b37e4385037fcfa4831",
    _MODEL: "aeafc04849d4d93db4721cf30a86ebf22085595294b8a07d51918e7fa98f538b",
}
"""What that wheel holds: a folder may have been changed since it was extracted."""
_SKLEARN = "1.9.1"
"""Other versions unpickle with a warning, and may compute something else."""

_TOKEN_PATTERN = r"(?u)\b\w\w+\b"  # noqa: S105  # scikit-learn's default
_FIXED: dict[str, object] = {
    "input": "content",
    "analyzer": "word",
    "token_pattern": _TOKEN_PATTERN,
    "ngram_range": (1, 1),
    "lowercase": True,
    "strip_accents": None,
    "preprocessor": None,
    "tokenizer": None,
    "binary": False,
    "norm": "l2",
    "use_idf": True,
    "sublinear_tf": False,
}
"""The only settings of TfidfVectorizer that are implemented. Stop words are; what else it has matters to fitting."""

_UNKNOWN = "[UNK]"
_OUTPUT = "scores"
_SHORTEST = np.float32(1e-12)
_MAX_MODEL_LEN = 512
_MOST_TOKENS = 4096
"""Each word of a text is compared with each: at this length that takes 64 MB for a row."""
MAX_ERROR = 1e-5
"""Of a probability. The graph computes in float32, scikit-learn in float64."""


def build_profanity(path: Path, folder: Path, *, sha256: str | None, max_model_len: int | None = None) -> Built:
    """Turn alt-profanity-check's two pickles into a graph, a tokenizer and labels.

    Args:
        path: the folder with both.
        folder: an existing one, where the graph goes.
        sha256: of the wheel that they come from.
        max_model_len: words of a text at most. ``None``: 512.

    Raises:
        ExportError: another wheel or other files, scikit-learn is missing or of another version, or the graph does
            not say what scikit-learn says.
    """
    vectorizer, model = _unpickle(path, sha256)
    return convert(vectorizer, model, folder, max_model_len=max_model_len or _MAX_MODEL_LEN)


def _unpickle(path: Path, sha256: str | None) -> tuple[Any, Any]:
    """Both objects, of classes that have no types, from the very bytes that were hashed."""
    if sha256 != PINNED_SHA256[_PIN]:
        raise ExportError(
            f"holds pickles, and opening those runs what is written in them; only pypi:{_PIN[0]}=={_PIN[1]} is opened",
            file=path.name,
        )
    contents = {}
    for name, expected in _FILES.items():
        try:
            contents[name] = (path / name).read_bytes()
        except OSError as error:
            raise ExportError(f"cannot be read: {error.strerror}", file=name) from error
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            raise ExportError(f"is not the file of {_PIN[0]} {_PIN[1]}; remove it, and it is downloaded", file=name)
    try:
        import joblib
        import sklearn
    except ImportError as error:
        raise ExportError(f"{error.name} is not installed: pip install 'sardonyx[export-sklearn]'") from error
    if sklearn.__version__ != _SKLEARN:
        raise ExportError(
            f"scikit-learn is {sklearn.__version__}; the model was pickled by {_SKLEARN}: "
            "pip install 'sardonyx[export-sklearn]'"
        )
    return joblib.load(io.BytesIO(contents[_VECTORIZER])), joblib.load(io.BytesIO(contents[_MODEL]))


def convert(vectorizer: Any, model: Any, folder: Path, *, max_model_len: int) -> Built:
    """Write the graph of a fitted ``TfidfVectorizer`` and ``CalibratedClassifierCV`` over ``LinearSVC``.

    Both are scikit-learn's, which has no types. The graph has the packed layout of `families.Encoder`: input_ids (T)
    int64, row_gather (B, S) int64, seqlens (B) int32 -> scores (B, 1) float32, the probability of class 1.

    Raises:
        ExportError: a setting that is not implemented, or the graph does not say what scikit-learn says.
    """
    if not 1 <= max_model_len <= _MOST_TOKENS:
        raise ExportError(f"is {max_model_len:,}; 1 to {_MOST_TOKENS:,} words are possible", field="max_model_len")
    _check_vectorizer(vectorizer)
    table, bias = _weigh(vectorizer, model)
    files = _build_graph(table, bias, folder)
    encoder = Encoder(
        layout="packed", output=_OUTPUT, width=1, vocab_size=len(table), max_model_len=max_model_len, pad_token_id=0
    )
    tokenizer = _tokenizer(vectorizer)
    return Built(
        family="classifier",
        architecture=type(model).__name__,
        precision="fp32",
        graphs={"encoder": [file.name for file in files]},
        texts={"tokenizer.json": tokenizer.to_str().encode()},
        weights=f"float64 → fp32: {len(table) - 1:,} words, {len(bias)} linear machines",
        encoder=encoder,
        labels=Labels(names=["offensive"], activation="none"),
        parity=_verify(vectorizer, model, tokenizer, files[0], encoder),
        config_parameters={"moderation.offensive": "harassment 0.5"},
    )


def _check_vectorizer(vectorizer: Any) -> None:
    settings = vectorizer.get_params()
    for field, implemented in _FIXED.items():
        if settings[field] != implemented:
            raise ExportError(
                f"is {settings[field]!r:.100}; only {implemented!r} is implemented", file=_VECTORIZER, field=field
            )


def _weigh(vectorizer: Any, model: Any) -> tuple[Array, Array]:
    """What each word adds to a row's sums, and what is added to each machine's logit in the end.

    Machine k says ``f = x · coef_k + intercept_k`` of ``x = counts * idf / |counts * idf|``, and is sure of class 1
    with ``1 / (1 + exp(a_k f + b_k))``. All that is linear goes into the table.

    Returns:
        (V + 1, 1 + K) float32: a word's idf² and its shares of the logits, the last row being the unknown word's
        zeros; and (K) float32.

    Source: scikit-learn 1.9, ``TfidfTransformer.transform`` and ``_SigmoidCalibration.predict``.
    """
    idf = np.asarray(vectorizer.idf_, np.float64)
    if list(model.classes_) != [0, 1]:
        raise ExportError(f"are {list(model.classes_)!r:.100}; 0 and 1 are needed", file=_MODEL, field="classes_")
    table = np.zeros((len(idf) + 1, 1 + len(model.calibrated_classifiers_)))
    table[:-1, 0] = idf**2
    bias = []
    for column, each in enumerate(model.calibrated_classifiers_, start=1):
        machine = type(each.estimator).__name__
        if machine != "LinearSVC" or each.method != "sigmoid":
            raise ExportError(
                f"is {machine} with method {each.method}; LinearSVC with sigmoid is implemented",
                file=_MODEL,
                field="estimator",
            )
        (calibrator,) = each.calibrators
        table[:-1, column] = -calibrator.a_ * idf * each.estimator.coef_[0]
        bias.append(-(calibrator.a_ * each.estimator.intercept_[0] + calibrator.b_))
    # A vocabulary that was given, not learnt, may hold words that the analyser leaves out.
    left_out = [
        vectorizer.vocabulary_[word] for word in vectorizer.get_stop_words() or () if word in vectorizer.vocabulary_
    ]
    table[left_out] = 0
    return table.astype(np.float32), np.array(bias, np.float32)


def _build_graph(table: Array, bias: Array, folder: Path) -> list[Path]:
    with GraphWriter(folder) as graph:
        graph.input("input_ids", np.int64, ["T"])
        graph.input("row_gather", np.int64, ["B", "S"])
        graph.input("seqlens", np.int32, ["B"])
        graph.output(_OUTPUT, np.float32, ["B", 1])
        first, second = (graph.constant(f"axis_{axis}", np.array([axis], np.int64)) for axis in (1, 2))
        rows = _rows_of_words(graph, unknown=len(table) - 1)
        one, other = graph.node("Unsqueeze", [rows, second], "one"), graph.node("Unsqueeze", [rows, first], "other")
        same = graph.node("Cast", [graph.node("Equal", [one, other], "is_same")], "same", to=1)
        # Of a word that a row has c times each of its c places adds c: together its count's square.
        counts = graph.node("ReduceSum", [same, second], "counts", keepdims=1)
        terms = graph.weight("terms", np.float32, table.shape, [table])
        values = graph.node("Gather", [terms, rows], "values")
        sizes = graph.constant("sizes", np.array([1, len(bias)], np.int64))
        squares, shares = graph.node_with_outputs("Split", [values, sizes], ["squares", "shares"], axis=2)
        squares = graph.node("ReduceSum", [graph.node("Mul", [squares, counts], "weighed"), first], "sum", keepdims=0)
        length = graph.node("Sqrt", [squares], "length")
        # A row without known words is all zeros, and stays that.
        length = graph.node("Max", [length, graph.constant("shortest", np.array(_SHORTEST))], "length_or_more")
        shares = graph.node("ReduceSum", [shares, first], "shares_of_row", keepdims=0)
        logits = graph.node("Div", [shares, length], "linear")
        logits = graph.node("Add", [logits, graph.constant("bias", bias)], "logits")
        graph.node("ReduceMean", [graph.node("Sigmoid", [logits], "probabilities"), first], _OUTPUT, keepdims=1)
        return graph.save("profanity")


def _rows_of_words(graph: GraphWriter, *, unknown: int) -> str:
    """(B, S) int64: the rows' words, behind a row's end the unknown one."""
    zero, one = (graph.constant(name, np.array(value, np.int64)) for name, value in (("zero", 0), ("one_step", 1)))
    longest = graph.node("Shape", ["row_gather"], "shape_of_columns", start=1, end=2)
    longest = graph.node("Squeeze", [longest], "longest")
    columns = graph.node("Range", [zero, longest, one], "columns")
    lengths = graph.node("Cast", ["seqlens"], "lengths", to=7)
    lengths = graph.node("Unsqueeze", [lengths, graph.constant("axis_1", np.array([1], np.int64))], "lengths_of_rows")
    is_word = graph.node("Less", [columns, lengths], "is_word")
    grid = graph.node("Gather", ["input_ids", "row_gather"], "grid")
    return graph.node("Where", [is_word, grid, graph.constant("unknown", np.array(unknown, np.int64))], "rows")


def _tokenizer(vectorizer: Any) -> tokenizers.Tokenizer:
    r"""Words as the analyser finds them.

    Python's ``\w`` is a letter, a number of any kind or ``_``; other engines count marks in and some numbers out, so
    it is spelt out. As runs are taken whole, ``\b`` has nothing left to say.
    """
    # Two differences remain. The library puts Σ into σ where Python writes ς at the end of a word, so Greek words in
    # capitals may be unknown. And it knows a newer Unicode: letters since added are none to Python 3.11 to 3.13.
    vocabulary = {str(word): int(index) for word, index in vectorizer.vocabulary_.items()}
    # No word is written like this, since no word has a bracket.
    vocabulary[_UNKNOWN] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        tokenizers.Regex(r"[\p{L}\p{N}_]{2,}"), behavior="removed", invert=True
    )
    return tokenizer


def _verify(
    vectorizer: Any, model: Any, tokenizer: tokenizers.Tokenizer, graph: Path, encoder: Encoder
) -> list[Parity]:
    """The graph on the server's runner against ``predict_proba``, texts and all, in three shapes."""
    import sklearn

    shapes = _texts(vectorizer, model, encoder.max_model_len)
    unknown = encoder.vocab_size - 1
    batches = [[EncodedRow(token_ids=tokenizer.encode(text).ids or [unknown]) for text in texts] for _, texts in shapes]
    results = run_graph(graph, None, "profanity", encoder, batches)
    parity = []
    for (what, texts), result in zip(shapes, results, strict=True):
        expected = model.predict_proba(vectorizer.transform(texts))[:, 1]
        error = float(np.abs(result[:, 0] - expected).max())
        reference = f"scikit-learn {sklearn.__version__}, {what}"
        if not error <= MAX_ERROR:
            raise ExportError(
                f"the exported graph is not what its source says: a probability differs by {error:.3g} from "
                f"{reference}; {MAX_ERROR:g} is allowed. Nothing was published"
            )
        tolerance = f"max_abs_error <= {MAX_ERROR:g}"
        parity.append(Parity(reference=reference, max_abs_error=error, num_positions=len(texts), tolerance=tolerance))
    return parity


def _texts(vectorizer: Any, model: Any, max_words: int) -> list[tuple[str, list[str]]]:
    """Texts of at most so many words, by shape. Most words are the model's own, some come several times."""
    generator = np.random.default_rng(0)
    known = np.array(sorted(vectorizer.vocabulary_), object)
    coefficients = np.mean([each.estimator.coef_[0] for each in model.calibrated_classifiers_], axis=0)
    worst = known[np.argmax([coefficients[vectorizer.vocabulary_[word]] for word in known])]

    def some(num_words: int) -> str:
        return " ".join(generator.choice(known, num_words))

    pattern = re.compile(_TOKEN_PATTERN)
    lengths = [min(length, max_words) for length in (1, 2, 3, 5, 8, 13, 21, 34, 55)]
    mixed = [text for text in TEXTS if len(pattern.findall(text.lower())) <= max_words]
    mixed += ["", "!?", "Qqzx", *(some(length) for length in lengths), " ".join([worst] * min(5, max_words))]
    half = some(max_words // 2 + max_words % 2)
    long_text = f"{half} {' '.join(half.split()[: max_words // 2])}"
    return [
        ("one word", [worst.upper()]),
        (f"{len(mixed)} texts of several lengths", mixed),
        (f"one text of {max_words} words", [long_text]),
    ]
