"""Small Whisper models for everybody's tests: real graphs and a real tokenizer, milliseconds to build.

`make_speech_model` writes a whole entry of a model repository. Whatever is heard, each token decides the next one, so a
window of two seconds or more says `SEGMENTS`, or `TRANSLATION` where that is asked for; the language is `LANGUAGES`'
first. The graphs take the same inputs as exported ones and look at none of them but the tokens.
"""

import hashlib
import io
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import soundfile
from onnx import numpy_helper, parser
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sardonyx.repository import families, manifest

LANGUAGES = ("en", "de", "fr")
SEGMENTS = ((0.0, 1.0, " one two"), (1.0, 2.0, " three"))
"""Begin, end and text of what a window says."""
TEXT = "one two three"
TRANSLATION = "four"
SAMPLE_RATE = 16_000

_WORDS = (" one", " two", " three", " four", " five")
_NUM_MELS = 8
_NUM_FRAMES = 3000
_NUM_TIMESTAMPS = 1501
_ENCODER = """
    <ir_version: 10, opset_import: ["" : 21], producer_name: "sardonyx tests">
    encoder (float[B,8,3000] mel) => (float[B,1,2,1500] cross_0_key, float[B,1,1500,2] cross_0_value) {
        half = Slice(mel, from, to, axes, steps)
        cross_0_key = Unsqueeze(half, one)
        cross_0_value = Transpose<perm=[0, 1, 3, 2]>(cross_0_key)
    }
"""
_DECODER = """
    <ir_version: 10, opset_import: ["" : 21], producer_name: "sardonyx tests">
    decoder (int64[T] input_ids, int64[T] position_ids, int64[B,S] row_gather, int64[T] row_scatter, int32[B] seqlens_k,
        int32[B] query_seqlens, int32 total_sequence_length, int64[N] logits_index,
        float[B,1,C,2] past_key_values_0_key, float[B,1,C,2] past_key_values_0_value,
        float[B,1,2,1500] cross_0_key, float[B,1,1500,2] cross_0_value)
        => (float[N,VOCAB] logits, float[B,1,C,2] present_0_key, float[B,1,C,2] present_0_value) {
        ids = Gather<axis=0>(input_ids, logits_index)
        first = Gather<axis=0>(likeliest, ids)
        second = Gather<axis=0>(likely, ids)
        firsts = OneHot(first, size, twenty)
        seconds = OneHot(second, size, ten)
        logits = Add(firsts, seconds)
        present_0_key = Identity(past_key_values_0_key)
        present_0_value = Identity(past_key_values_0_value)
    }
"""
# The same in the contract for cards, which `make_speech_model_for_cards` writes.
_CARD_ENCODER = """
    <ir_version: 10, opset_import: ["" : 21], producer_name: "sardonyx tests">
    encoder (float[B,8,3000] mel) => (float16[B,1,1500,32] cross_0_key, float16[B,1,1500,32] cross_0_value) {
        half = Slice(mel, from, to, axes, steps)
        wide = Unsqueeze(half, one)
        by_position = Transpose<perm=[0, 1, 3, 2]>(wide)
        broad = Tile(by_position, sixteen)
        cross_0_key = Cast<to=10>(broad)
        cross_0_value = Identity(cross_0_key)
    }
"""
_CARD_DECODER = """
    <ir_version: 10, opset_import: ["" : 21], producer_name: "sardonyx tests">
    decoder (int64[T] input_ids, int64[T] position_ids, int64[B,S] row_gather, int64[T] row_scatter,
        int32[B,M] block_table, int32[R] cumulative_sequence_length, int32[B] past_seqlens, int32[T] slot_mapping,
        int32[3] attention_metadata, int64[N] logits_index,
        float16[blocks,256,1,32] past_key_values_0_key, float16[blocks,256,1,32] past_key_values_0_value,
        float16[B,1,1500,32] cross_0_key, float16[B,1,1500,32] cross_0_value)
        => (float[N,VOCAB] logits, float16[blocks,256,1,32] present_0_key, float16[blocks,256,1,32] present_0_value) {
        ids = Gather<axis=0>(input_ids, logits_index)
        first = Gather<axis=0>(likeliest, ids)
        second = Gather<axis=0>(likely, ids)
        firsts = OneHot(first, size, twenty)
        seconds = OneHot(second, size, ten)
        logits = Add(firsts, seconds)
        present_0_key = Identity(past_key_values_0_key)
        present_0_value = Identity(past_key_values_0_value)
    }
"""
# Token i is heard for a quarter of a second from i / 4 s on.
_ALIGNER = """
    <ir_version: 10, opset_import: ["" : 21], producer_name: "sardonyx tests">
    aligner (int64[1,S] input_ids, float[1,1,2,1500] cross_0_key, float[1,1,1500,2] cross_0_value)
        => (float[1,S,1500] attention, float[R] logprobs) {
        rows = Shape(input_ids)
        length = Squeeze(row_count, zero)
        row_count = Slice(rows, one, two)
        tokens = Range(nothing, length, single)
        column = Unsqueeze(tokens, one)
        peaks = Equal(column, quarters)
        flags = Cast<to=1>(peaks)
        scaled = Mul(flags, twenty)
        attention = Unsqueeze(scaled, zero)
        rest = Sub(row_count, one)
        logprobs = Expand(surety, rest)
    }
"""


def make_speech_model(
    repository_root: Path,
    name: str = "tiny",
    *,
    is_multilingual: bool = True,
    has_aligner: bool = True,
    script: Literal["sentence", "endless"] = "sentence",
    max_model_len: int = 448,
    config: str = "",
) -> Path:
    """Write a complete model and return its version folder.

    Args:
        script: "endless" repeats itself until it is stopped.
        config: further lines of ``config.pbtxt``.
    """
    folder = repository_root / name / "1"
    folder.mkdir(parents=True)
    facts = _write_tokenizer(folder, is_multilingual)
    first, second = _script(facts, script)
    vocab_size = facts["<|0.00|>"] + _NUM_TIMESTAMPS
    graphs = {"encoder": _encoder(), "decoder": _decoder(first, second, vocab_size)}
    if has_aligner:
        graphs["aligner"] = _aligner()
    for role, graph in graphs.items():
        onnx.save_model(graph, folder / f"{role}.onnx")
    entry = manifest.Manifest(
        family="whisper",
        precision="fp32",
        source=manifest.Source(
            uri="tests/tiny_speech.py", architecture="WhisperForConditionalGeneration", licence="Apache-2.0"
        ),
        created="2026-01-01T00:00:00Z",
        graphs={role: manifest.Graph(model=_file(folder, f"{role}.onnx")) for role in graphs},
        files=[_file(folder, "tokenizer.json")],
        whisper=families.Whisper(
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            num_mels=_NUM_MELS,
            num_frames=_NUM_FRAMES,
            kv=families.KvLayout(num_layers=1, num_kv_heads=1, head_size=2),
            start_id=facts["<|startoftranscript|>"],
            end_id=facts["<|endoftext|>"],
            previous_id=facts["<|startofprev|>"],
            no_speech_id=facts["<|nospeech|>"],
            no_timestamps_id=facts["<|notimestamps|>"],
            timestamp_begin_id=facts["<|0.00|>"],
            transcribe_id=facts["<|transcribe|>"] if is_multilingual else None,
            translate_id=facts["<|translate|>"] if is_multilingual else None,
            language_ids={code: facts[f"<|{code}|>"] for code in LANGUAGES} if is_multilingual else {},
            suppress_ids=[i for name, i in facts.items() if name.startswith("<|") and name not in _DRAWN],
            begin_suppress_ids=[facts["<|endoftext|>"]],
            alignment_heads=[[0, 0]] if has_aligner else [],
        ),
    )
    (folder / manifest.FILE_NAME).write_bytes(manifest.encode(entry))
    config = f'name: "{name}"\nbackend: "onnxruntime"\n{config}\n'
    (folder.parent / "config.pbtxt").write_text(config, encoding="utf-8")
    return folder


def make_speech_model_for_cards(repository_root: Path, **options: Any) -> Path:
    """`make_speech_model` as if it had been exported for cards: the graphs' ports, and what the manifest says of them.

    Args:
        options: of `make_speech_model`.
    """
    folder = make_speech_model(repository_root, **options)
    path = folder / manifest.FILE_NAME
    entry = manifest.parse(path.read_bytes())
    assert entry.whisper is not None
    old = onnx.load(folder / "decoder.onnx")
    (folder / "decoder.onnx").unlink()
    (folder / "encoder.onnx").unlink()
    decoder = _graph(_CARD_DECODER.replace("VOCAB", str(entry.whisper.vocab_size)), {})
    decoder.graph.initializer.extend(old.graph.initializer)
    graphs = {"encoder": _encoder(_CARD_ENCODER), "decoder": decoder}
    if "aligner" in entry.graphs:
        graphs["aligner"] = _aligner(for_cards=True)
    for role, graph in graphs.items():
        onnx.save_model(graph, folder / f"{role}.onnx")
    kv = msgspec.structs.replace(entry.whisper.kv, head_size=32, datatype="FP16", block_size=256)
    new = msgspec.structs.replace(
        entry,
        target="cuda",
        precision="fp16",
        activations="fp16",
        graphs={role: manifest.Graph(model=_file(folder, f"{role}.onnx")) for role in graphs},
        whisper=msgspec.structs.replace(entry.whisper, kv=kv),
    )
    path.write_bytes(manifest.encode(new))
    return folder


def wav(duration_s: float = 2.0, *, is_silent: bool = False, pauses_at_s: tuple[float, ...] = ()) -> bytes:
    """A sound file: tones that swell and fade like syllables, silent for four seconds from each pause on."""
    times_s = np.arange(round(duration_s * SAMPLE_RATE)) / SAMPLE_RATE
    tones = sum(np.sin(2 * np.pi * hz * times_s) for hz in (200, 440, 800, 1300, 2000))
    samples = 0.1 * tones * np.sin(np.pi * times_s)
    for pause_s in pauses_at_s:
        samples[(times_s >= pause_s) & (times_s < pause_s + 4)] = 0
    file = io.BytesIO()
    soundfile.write(file, 0 * samples if is_silent else samples, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()


_DRAWN = {"<|endoftext|>", "<|0.00|>"}


def _write_tokenizer(folder: Path, is_multilingual: bool) -> dict[str, int]:
    """Every byte is a token, and so are a few words. Ids by name; timestamps have none but the first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(word, special=False) for word in _WORDS])
    languages = [f"<|{code}|>" for code in LANGUAGES] if is_multilingual else []
    names = ["<|endoftext|>", "<|startoftranscript|>", *languages, "<|translate|>", "<|transcribe|>"]
    names += ["<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens(names)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids: dict[str, int] = {name: tokenizer.token_to_id(name) for name in (*_WORDS, *names)}
    return ids | {"<|0.00|>": tokenizer.get_vocab_size()}


def _script(facts: dict[str, int], script: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The likeliest token behind each, and the second likeliest."""
    one, two, three, four, five = (facts[word] for word in _WORDS)
    end, begin = facts["<|endoftext|>"], facts["<|0.00|>"]
    first = np.full(begin + _NUM_TIMESTAMPS, end, np.int64)
    second = np.full_like(first, end)
    start = facts["<|startoftranscript|>"]
    first[start], second[start] = facts.get("<|en|>", begin), facts.get("<|de|>", begin)
    first[facts["<|transcribe|>"]] = begin
    first[facts["<|translate|>"]] = begin + 1
    first[[begin, begin + 1]] = one, four
    first[[one, two]] = (two, begin + 50) if script == "sentence" else (two, one)
    # The second of a pair may be followed by text only.
    first[begin + 50], second[begin + 50] = begin + 50, three
    first[[three, four, five]] = begin + 100
    return first, second


def _encoder(text: str = _ENCODER) -> onnx.ModelProto:
    numbers = {"from": [0, 0], "to": [2, _NUM_FRAMES], "axes": [1, 2], "steps": [1, 2], "one": [1]}
    if text is _CARD_ENCODER:
        numbers["sixteen"] = [1, 1, 1, 16]
    return _graph(text, {name: np.array(value, np.int64) for name, value in numbers.items()})


def _decoder(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], vocab_size: int) -> onnx.ModelProto:
    return _graph(
        _DECODER.replace("VOCAB", str(vocab_size)),
        {
            "likeliest": first,
            "likely": second,
            "size": np.array(vocab_size, np.int64),
            "twenty": np.array([0, 20], np.float32),
            "ten": np.array([0, 10], np.float32),
        },
    )


def _aligner(*, for_cards: bool = False) -> onnx.ModelProto:
    numbers = {"zero": [0], "one": [1], "two": [2], "nothing": 0, "single": 1}
    constants: dict[str, npt.NDArray[np.generic]] = {name: np.array(each, np.int64) for name, each in numbers.items()}
    constants["quarters"] = np.arange(_NUM_FRAMES // 2)[None] * 4 // 50
    constants["twenty"] = np.array(20, np.float32)
    constants["surety"] = np.array(-0.25, np.float32)
    text = _ALIGNER
    if for_cards:
        ports = "float16[1,1,1500,32] cross_0_key, float16[1,1,1500,32] cross_0_value, int64[S] position_ids"
        text = text.replace("float[1,1,2,1500] cross_0_key, float[1,1,1500,2] cross_0_value", ports)
    return _graph(text, constants)


def _graph(text: str, constants: dict[str, npt.NDArray[np.generic]]) -> onnx.ModelProto:
    """A graph from its text, in which names with dots have underlines."""
    model = parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())

    def dotted(name: str) -> str:
        prefix, layer, side = name.rpartition("_0_")
        return f"{prefix}.0.{side}" if layer else name

    for value in (*model.graph.input, *model.graph.output):
        value.name = dotted(value.name)
    for node in model.graph.node:
        node.input[:] = map(dotted, node.input)
        node.output[:] = map(dotted, node.output)
    return model


def _file(folder: Path, name: str) -> manifest.GraphFile:
    data = (folder / name).read_bytes()
    return manifest.GraphFile(path=name, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
