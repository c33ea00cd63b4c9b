"""From a checked body to `EncodeOptions` and a prompt: other servers' names for the same thing, cross-field rules.

Floor 5. What the endpoints of embeddings, reranking and scoring share.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from sardonyx.api.openai.encoder_schemas import EmbeddingRequest, EncoderRequest
from sardonyx.errors import ContextLengthExceeded, InvalidRequest
from sardonyx.serving.scoring import DOCUMENT_PROMPTS, QUERY_PROMPTS, named_prompt
from sardonyx.serving.tasks import EmbeddingTask, EncodeOptions

_SIDES: dict[str, Literal["right", "left"]] = {"right": "right", "left": "left", "end": "right", "start": "left"}


def encode_options(body: EncoderRequest, timeout_s: float | None) -> EncodeOptions:
    """What a body says about how texts become rows.

    Raises:
        InvalidRequest: an unknown word, or fields that contradict each other.
    """
    truncate, side = _truncate(body)
    for name in ("truncation_side", "truncation_direction"):
        word = getattr(body, name)
        if word is not None:
            if word.lower() not in ("right", "left"):
                raise InvalidRequest(f"{name}: must be right or left, not {word[:32]!r}", param=name)
            if side not in (None, _SIDES[word.lower()]):
                raise InvalidRequest(f"{name}: contradicts the other fields about truncation", param=name)
            side = _SIDES[word.lower()]
    return EncodeOptions(
        truncate=truncate,
        truncation_side=side or "right",
        add_special_tokens=body.add_special_tokens is not False,
        timeout_s=timeout_s,
    )


def _truncate(body: EncoderRequest) -> tuple[int | bool | None, Literal["right", "left"] | None]:
    wishes: list[bool] = [] if body.truncation is None else [body.truncation]
    side = None
    if isinstance(body.truncate, bool):
        wishes.append(body.truncate)
    elif body.truncate is not None:
        word = body.truncate.lower()
        side = _SIDES.get(word)
        if side is None and word != "none":
            raise InvalidRequest(
                f"truncate: must be true, false, NONE, START or END, not {body.truncate[:32]!r}", param="truncate"
            )
        wishes.append(side is not None)
    if body.truncate_prompt_tokens == 0:
        raise InvalidRequest("truncate_prompt_tokens: must be at least 1, or -1", param="truncate_prompt_tokens")
    if body.truncate_prompt_tokens is not None:
        wishes.append(True)
    if len(set(wishes)) > 1:
        param = "truncation" if body.truncation is not None else "truncate"
        raise InvalidRequest(f"{param}: contradicts the other fields about truncation", param=param)
    if (body.truncate_prompt_tokens or -1) > 0:
        return body.truncate_prompt_tokens, side
    return (wishes[0] if wishes else None), side


def prompt_text(body: EmbeddingRequest, task: EmbeddingTask, *, has_texts: bool) -> str:
    """What goes in front of each input: what the body says, or the model's default.

    Args:
        has_texts: the inputs are texts; in front of token ids nothing can be put, and no default is.

    Raises:
        InvalidRequest: two fields that say it, a prompt that the model does not have, or one for token ids.
    """
    given = [name for name in ("prompt", "prompt_name", "input_type", "task") if getattr(body, name) is not None]
    if len(given) > 1:
        raise InvalidRequest(f"{given[1]}: not together with {given[0]}; both say what is put in front", param=given[1])
    if body.prompt is not None:
        prompt = body.prompt
    elif body.prompt_name is not None:
        prompt = _prompt(task, body.prompt_name, "prompt_name")
    elif given:
        prompt = _prompt_for(task, getattr(body, given[0]), given[0])
    else:
        return named_prompt(task, ()) if has_texts else ""
    if prompt and not has_texts:
        raise InvalidRequest(f"{given[0]}: not with token ids; put the prompt's ids in front of them", param=given[0])
    return prompt


def _prompt_for(task: EmbeddingTask, purpose: str, param: str) -> str:
    """The prompt for a purpose. A model without prompts reads queries and documents alike, so any purpose will do."""
    if not task.prompts:
        return ""
    if purpose in task.prompts:
        return task.prompts[purpose]
    for names in (QUERY_PROMPTS, DOCUMENT_PROMPTS):
        if purpose.lower().rpartition(".")[2] in names:
            return named_prompt(task, names)
    return _prompt(task, purpose, param)


def _prompt(task: EmbeddingTask, name: str, param: str) -> str:
    if name not in task.prompts:
        there = ", ".join(sorted(task.prompts)) or "none"
        raise InvalidRequest(
            f"{param}: model {task.name} has no prompt {name[:64]!r}; there are: {there}. A text of your own goes into "
            "prompt",
            param=param,
        )
    return task.prompts[name]


@contextmanager
def input_named(field: str) -> Iterator[None]:
    """Let errors that are about "input" name the field that the caller filled."""
    try:
        yield
    except InvalidRequest as error:
        if error.param != "input":
            raise
        kind = ContextLengthExceeded if isinstance(error, ContextLengthExceeded) else InvalidRequest
        raise kind(f"{field}: {error.message}", param=field) from None


def check_texts(texts: Sequence[str], field: str) -> None:
    """Refuse none at all, and empty ones.

    Raises:
        InvalidRequest: names the field, and the index.
    """
    if not texts:
        raise InvalidRequest(f"{field}: is an empty list", param=field)
    for index, text in enumerate(texts):
        if not text:
            raise InvalidRequest(f"{field}.{index}: is an empty string", param=f"{field}.{index}")
