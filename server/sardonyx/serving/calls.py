"""One API call, checked and tokenised: its prompts and the engine's requests for each of their choices.

Floor 4. Pure.
"""

import msgspec

from sardonyx.core import Request
from sardonyx.serving.options import GenerationOptions, PromptInfo


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """What a `Generation` carries out."""

    id: str
    prompts: list[PromptInfo]
    requests: list[Request]
    """Prompt-major, `num_each` for each prompt."""
    options: GenerationOptions
    arrival_s: float
    """Monotonic."""
    deadline_s: float
    """Monotonic."""

    @property
    def num_each(self) -> int:
        """Choices that are generated for each prompt."""
        return num_each(self.options)


def num_each(options: GenerationOptions) -> int:
    """Choices that are generated for each prompt."""
    return options.best_of or options.n


def make_requests(
    id_prefix: str,
    prompts: list[PromptInfo],
    max_tokens: list[int],
    options: GenerationOptions,
    *,
    eos_token_ids: frozenset[int],
    deadline_s: float,
    start_by_s: float,
) -> list[Request]:
    """The engine's requests, prompt-major.

    `id_prefix` is unique in the engine, `max_tokens` has a number for each prompt, `eos_token_ids` are the model's own
    end tokens, and both times are monotonic.
    """
    count = num_each(options)
    sampling = options.sampling
    if count > options.n and sampling.num_logprobs is None:
        sampling = msgspec.structs.replace(sampling, num_logprobs=0)  # what `completion.best` chooses by
    samplings = [
        sampling if sampling.seed is None else msgspec.structs.replace(sampling, seed=sampling.seed + choice)
        for choice in range(count)
    ]
    stop_token_ids = (frozenset[int]() if options.ignore_eos else eos_token_ids).union(options.stop_token_ids)
    return [
        Request(
            id=f"{id_prefix}/{number * count + choice}",
            prompt_ids=prompt.token_ids,
            sampling=samplings[choice],
            max_tokens=most,
            min_tokens=min(options.min_tokens, most),
            stop_token_ids=stop_token_ids,
            # Of the first choice only: a prompt that is scored cannot be taken from the cache.
            num_prompt_logprobs=options.num_prompt_logprobs if choice == 0 else None,
            deadline_s=deadline_s,
            start_by_s=start_by_s,
        )
        for number, (prompt, most) in enumerate(zip(prompts, max_tokens, strict=True))
        for choice in range(count)
    ]
