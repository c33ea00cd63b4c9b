"""Rivals on the same card, and the card's own rates, by torch. One job a process; an interpreter that has torch.

    python rival_torch.py < job.json

The job is {"kind": ..., ...}; results are JSON objects, one a line of standard output, each as soon as it is known, so
that what a time limit cuts off costs only what was not reached.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

from card.random_weights import RandomWeights
from card.shapes import SHAPES

Result = dict[str, Any]
IS_CARD = torch.cuda.is_available()
CARD = torch.device("cuda" if IS_CARD else "cpu")
FLOATS = torch.float16 if IS_CARD else torch.float32


def measure(work: Callable[[], object], repeats: int, warm_up: int = 3) -> float:
    """Median seconds of some work, the card's own time included."""
    for _ in range(warm_up):
        work()
    taken = []
    for _ in range(repeats):
        wait()
        started_s = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - started_s)
    return statistics.median(taken)


def wait() -> None:
    if IS_CARD:
        torch.cuda.synchronize()


def rates(job: Result) -> Iterator[Result]:
    """Bytes read and written by a copy on the card, and operations of a matrix product in fp16, each a second."""
    num_bytes, side = job["copy_bytes"], job["matrix_side"]
    copy_s = _copy_s(num_bytes)
    first, second = (torch.randn(side, side, device=CARD, dtype=FLOATS) for _ in range(2))
    product_s = measure(lambda: first @ second, 30)
    # One row by a matrix is what a decode of one sequence is: how near does a library come to the copy's rate?
    row = torch.randn(1, side, device=CARD, dtype=FLOATS)
    row_s = measure(lambda: row @ first, 30)
    yield {
        "copy_bytes_per_s": 2 * num_bytes / copy_s,
        "operations_per_s": 2 * side**3 / product_s,
        "row_product_bytes_per_s": first.element_size() * side**2 / row_s,
        "copy_bytes": num_bytes,
        "matrix_side": side,
        "floats": str(FLOATS),
        "torch": torch.__version__,
    }


def _copy_s(num_bytes: int) -> float:
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=CARD)
    target = torch.empty_like(source)
    return measure(lambda: target.copy_(source), 30)


def generate(job: Result) -> Iterator[Result]:
    """`transformers`' own generation from equally long prompts, greedy."""
    import transformers

    transformers.logging.set_verbosity_error()
    started_s = time.perf_counter()
    model = load_llama(job["shape"])
    yield {"load_s": round(time.perf_counter() - started_s, 1), "transformers": transformers.__version__}
    for point in job["points"]:
        prompts = torch.tensor(point.pop("prompts"), device=CARD)
        for cache in job["caches"]:
            try:
                measured = generate_once(model, prompts, job["new_tokens"], cache)
            except Exception as error:  # no memory, or no compiler: the next point may have both
                measured = {"error": f"{type(error).__name__}: {error}"[:300]}
            yield point | {"cache": cache} | measured
            if IS_CARD:
                torch.cuda.empty_cache()


def generate_once(model: Any, prompts: Any, new_tokens: int, cache: str) -> Result:
    """Prefill is a generation of one token; a decode step is what each further token adds.

    Args:
        cache: ``dynamic``; ``static``, run eagerly; or ``compiled``, static as `generate` compiles it by itself.
    """
    options: Result = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if cache != "dynamic":
        options |= {"cache_implementation": "static", "disable_compile": cache == "static"}
    mask = torch.ones_like(prompts)

    def run(count: int) -> Any:
        # A static cache is as long as the whole generation, so both runs have one of the same length.
        with torch.inference_mode():
            return model.generate(prompts, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, **options)

    started_s = time.perf_counter()
    tokens = run(new_tokens)[:, prompts.shape[1] :]
    run(1)
    wait()
    warm_up_s = time.perf_counter() - started_s
    prefill_s = measure(lambda: run(1), 3, warm_up=0)
    whole_s = measure(lambda: run(new_tokens), 2, warm_up=1)
    step_s = (whole_s - prefill_s) / (new_tokens - 1)
    return {
        "prefill_s": round(prefill_s, 5),
        "step_ms": round(1e3 * step_s, 3),
        "tokens_per_s": round(prompts.shape[0] / step_s, 1),
        "warm_up_s": round(warm_up_s, 1),
        "tokens": tokens[:4].tolist(),
    }


def load_llama(name: str) -> Any:
    """The same random weights as ours, straight onto the card."""
    import transformers

    shape = SHAPES[name]
    fields = shape.config()
    del fields["architectures"]
    previous = torch.get_default_dtype()
    torch.set_default_dtype(FLOATS)
    try:
        with CARD:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
    finally:
        torch.set_default_dtype(previous)
    weights = RandomWeights(shape)
    with torch.no_grad():
        for tensor_name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights.tensor(tensor_name).read()))
    return model


def modules(job: Result) -> Iterator[Result]:
    """Parts of other families: a text encoder, Whisper's encoder, a UNet; each at its own batches."""
    wanted, repeats = job["modules"], job["repeats"]
    for name, prepare in (("encoder", _encoder), ("whisper", _whisper), ("unet", _unet)):
        if name not in wanted:
            continue
        try:
            make_work = prepare(wanted[name])
            for batch in wanted[name]["batches"]:
                work = make_work(batch)
                with torch.inference_mode():
                    run_s = measure(work, repeats)
                yield {"name": name, "batch": batch, "run_ms": round(1e3 * run_s, 3)}
        except Exception as error:  # a library that is missing leaves the other parts
            yield {"name": name, "error": f"{type(error).__name__}: {error}"[:300]}


MakeWork = Callable[[int], Callable[[], object]]


def _encoder(sizes: Result) -> MakeWork:
    import transformers

    model = transformers.BertModel(transformers.BertConfig(**sizes["config"])).eval().to(CARD, FLOATS)

    def make(batch: int) -> Callable[[], object]:
        ids = torch.randint(5, sizes["config"]["vocab_size"], (batch, sizes["length"]), device=CARD)
        return lambda: model(ids, attention_mask=torch.ones_like(ids))

    return make


def _whisper(sizes: Result) -> MakeWork:
    import transformers

    config = transformers.WhisperConfig(**sizes["config"])
    model = transformers.WhisperModel(config).encoder.eval().to(CARD, FLOATS)

    def make(batch: int) -> Callable[[], object]:
        frames = 2 * config.max_source_positions
        mel = torch.randn(batch, config.num_mel_bins, frames, device=CARD, dtype=FLOATS)
        return lambda: model(mel)

    return make


def _unet(sizes: Result) -> MakeWork:
    import diffusers

    model = diffusers.UNet2DConditionModel(**sizes["config"]).eval().to(CARD, FLOATS)

    def make(batch: int) -> Callable[[], object]:
        side, width = sizes["side"], sizes["config"]["cross_attention_dim"]
        sample = torch.randn(batch, 4, side, side, device=CARD, dtype=FLOATS)
        text = torch.randn(batch, sizes["tokens"], width, device=CARD, dtype=FLOATS)
        times = torch.full((batch,), 500, device=CARD)
        return lambda: model(sample, times, text).sample

    return make


KINDS = {"rates": rates, "generate": generate, "modules": modules}


def main() -> None:
    job = json.load(sys.stdin)
    torch.manual_seed(0)
    for result in KINDS[job["kind"]](job):
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
