"""One embedding library in a process of its own, asked over its standard input: a JSON object a line, answers likewise.

    python rivals.py sentence_transformers|fastembed|padded_onnx FOLDER THREADS

FOLDER holds the model in sentence-transformers' layout, and as `model.onnx` with padded inputs beside it. A request
says ``texts``, and with ``at_s`` when each arrives. Answers hold vectors, or for arrivals the milliseconds of each.
"""

import base64
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Encode = Callable[[list[str]], Vectors]

BATCH_SIZE = 32
"""sentence-transformers' default; the padded run has it too. fastembed's default is 256: it pads more then."""


def sentence_transformers(folder: Path, threads: int) -> Encode:
    """torch, fp32, as ``SentenceTransformer.encode`` does it: sorted by length."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(str(folder), device="cpu")
    return lambda texts: np.asarray(model.encode(texts, batch_size=BATCH_SIZE, show_progress_bar=False), np.float32)


def fastembed(folder: Path, threads: int) -> Encode:
    """fastembed's own tokenising, batching and pooling over the padded graph."""
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    TextEmbedding.add_custom_model(
        model="local",
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf="local"),
        dim=384,
        model_file="model.onnx",
    )
    model = TextEmbedding("local", specific_model_path=str(folder), threads=threads, providers=["CPUExecutionProvider"])
    return lambda texts: np.array(list(model.embed(texts, batch_size=BATCH_SIZE)), np.float32)


def padded_onnx(folder: Path, threads: int) -> Encode:
    """ONNX Runtime by hand: sorted by length, padded to each batch's longest text, mean of the token vectors."""
    import onnxruntime
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    names = {each.name for each in session.get_inputs()}

    def encode(texts: list[str]) -> Vectors:
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        vectors = np.empty((len(texts), 384), np.float32)
        for start in range(0, len(order), BATCH_SIZE):
            part = order[start : start + BATCH_SIZE]
            rows = tokenizer.encode_batch([texts[index] for index in part])
            feeds = {
                "input_ids": np.array([row.ids for row in rows], np.int64),
                "attention_mask": np.array([row.attention_mask for row in rows], np.int64),
                "token_type_ids": np.array([row.type_ids for row in rows], np.int64),
            }
            (tokens,) = session.run(None, {name: array for name, array in feeds.items() if name in names})
            mask = feeds["attention_mask"][..., None].astype(np.float32)
            means = (tokens * mask).sum(axis=1) / mask.sum(axis=1)
            vectors[part] = means / np.linalg.norm(means, axis=1, keepdims=True)
        return vectors

    return encode


def serve_arrivals(encode: Encode, texts: list[str], at_s: list[float]) -> list[float]:
    """Milliseconds from each text's arrival to its vector: whenever the library is free it gets all that wait, in
    batches of `BATCH_SIZE` at most. No server, no HTTP: what a batching server around the library could reach at best.
    """
    start_s = time.perf_counter()
    taken = [0.0] * len(texts)
    position = 0
    while position < len(texts):
        now_s = time.perf_counter() - start_s
        end = position
        while end < len(texts) and end - position < BATCH_SIZE and at_s[end] <= now_s:
            end += 1
        if end == position:
            time.sleep(max(0.0, at_s[position] - now_s))
            continue
        encode(texts[position:end])
        done_s = time.perf_counter() - start_s
        for index in range(position, end):
            taken[index] = 1e3 * (done_s - at_s[index])
        position = end
    return taken


ENGINES = {each.__name__: each for each in (sentence_transformers, fastembed, padded_onnx)}


def main() -> None:
    name, folder, threads = sys.argv[1:]
    encode = ENGINES[name](Path(folder), int(threads))
    encode(["Warm up.", "A second text that is a little longer than the first one."])
    sys.stdout.write(json.dumps({"ready": True}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        request = json.loads(line)
        start_s = time.perf_counter()
        answer: dict[str, object]
        if "at_s" in request:
            answer = {"latency_ms": serve_arrivals(encode, request["texts"], request["at_s"])}
        else:
            vectors = encode(request["texts"])
            seconds = time.perf_counter() - start_s
            answer = {"seconds": seconds, "vectors": base64.b64encode(vectors.tobytes()).decode()}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


main()
