"""Prompts as callers send them become token ids that the model can take, or an error that says why not.

Floor 4. Pure; the slow half (`PromptEncoder.encode`) is for a worker thread.
"""

from collections.abc import Sequence
from typing import Any

from sardonyx.errors import ContextLengthExceeded, InvalidRequest, UnsupportedFeature
from sardonyx.processing.chat_encoding import encode_chat
from sardonyx.processing.chat_template import ChatTemplate
from sardonyx.processing.tokenizer import Tokenizer
from sardonyx.serving.options import GenerationOptions, PromptInfo

BYTES_PER_POSITION = 8
"""Text of more bytes than this for each position of the model is refused before it costs a tokeniser anything."""

Prompt = str | list[int]


def num_text_bytes(text: str) -> int:
    """Its length in UTF-8. Half surrogate pairs, which encoding refuses later, count too."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


class PromptEncoder:
    """Encodes and checks prompts for one model.

    Args:
        max_model_len: prompt and completion tokens together.
        vocab_size: ids from 0 up to this are the model's.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_model_len: int, vocab_size: int) -> None:
        self.max_model_len = max_model_len
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    def measure(self, *texts: str, param: str = "prompt") -> int:
        """Bytes of the texts of one prompt, without tokenising.

        Raises:
            ContextLengthExceeded: they are so long that they cannot fit.
        """
        most = BYTES_PER_POSITION * self.max_model_len
        num_bytes = sum(map(len, texts))
        if num_bytes <= most:
            num_bytes = sum(map(num_text_bytes, texts))
        if num_bytes > most:
            raise ContextLengthExceeded(
                f"this model's maximum context length is {self.max_model_len:,} tokens; a text of {num_bytes:,} bytes "
                f"is too long for it (at most {most:,} are read)",
                param=param,
            )
        return num_bytes

    def check(self, options: GenerationOptions) -> None:
        """Raise InvalidRequest for token ids in the options that the model does not have."""
        self._check_ids(options.sampling.logit_bias, "logit_bias")
        self._check_ids(options.stop_token_ids, "stop_token_ids")

    def encode(self, prompts: Sequence[Prompt], options: GenerationOptions) -> list[PromptInfo]:
        """Token ids of prompts, cut and checked.

        Raises:
            InvalidRequest: an empty prompt that no BOS or EOS token can stand for, an id outside of the vocabulary,
                text that is not Unicode.
            ContextLengthExceeded: prompt + max_tokens over the limit.
        """
        encoded = []
        for prompt in prompts:
            if isinstance(prompt, str):
                ids = self._tokenizer.encode(prompt, add_special_tokens=options.add_special_tokens)
            else:
                self._check_ids(prompt, "prompt")
                ids = prompt
            encoded.append(self._info(ids, options, text=prompt if isinstance(prompt, str) else None))
        return encoded

    def encode_chat(
        self,
        template: ChatTemplate,
        messages: Sequence[dict[str, Any]],
        options: GenerationOptions,
        **template_options: Any,  # passed on to `processing.chat_encoding.encode_chat`, which types them
    ) -> list[PromptInfo]:
        """As `encode`, for a conversation: one prompt."""
        ids = encode_chat(self._tokenizer, template, messages, **template_options)
        return [self._info(ids, options, text=None, param="messages")]

    def max_tokens(self, num_prompt_tokens: int, options: GenerationOptions, *, param: str = "prompt") -> int:
        """Completion tokens that a prompt of that length gets.

        Raises:
            ContextLengthExceeded: there is no room for as many as were asked for, or for one.
        """
        room = self.max_model_len - num_prompt_tokens
        wanted = options.max_tokens if options.max_tokens is not None else max(room, 1)
        if wanted > room:
            raise ContextLengthExceeded(
                f"this model's maximum context length is {self.max_model_len:,} tokens, but "
                f"{num_prompt_tokens + wanted:,} were requested ({num_prompt_tokens:,} in the prompt, {wanted:,} for "
                "the completion); shorten the prompt or ask for fewer tokens",
                param=param,
            )
        return wanted

    def _info(
        self, ids: list[int], options: GenerationOptions, *, text: str | None, param: str = "prompt"
    ) -> PromptInfo:
        if not ids:
            ids = [self._stand_in()]
            text = ""
        kept = self._truncated(ids, options)
        self.max_tokens(len(kept), options, param=param)
        if text is None or len(kept) < len(ids):
            text = self._tokenizer.decode(kept, skip_special_tokens=False)
        return PromptInfo(token_ids=kept, text=text)

    def _truncated(self, ids: list[int], options: GenerationOptions) -> list[int]:
        limit = options.truncate_prompt_tokens
        if limit is None:
            return ids
        if limit < 0:
            completion = 1 if options.max_tokens is None else options.max_tokens
            limit = max(1, self.max_model_len - completion)
        return ids[-limit:]

    def _stand_in(self) -> int:
        """What an empty prompt means: a fresh text, as OpenAI's ``<|endoftext|>``."""
        tokenizer = self._tokenizer
        token_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if token_id is None:
            raise InvalidRequest(
                "the prompt is empty, and this model has no token to begin a text with", param="prompt"
            )
        return token_id

    def _check_ids(self, ids: Sequence[int] | dict[int, float], param: str) -> None:
        if not ids:
            return
        for token_id in (min(ids), max(ids)):
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequest(
                    f"token id {token_id} is outside of the model's vocabulary (0 to {self._vocab_size - 1:,})",
                    param=param,
                )


def require_template(template: ChatTemplate | None) -> ChatTemplate:
    """The model's chat template.

    Raises:
        UnsupportedFeature: it has none.
    """
    if template is None:
        raise UnsupportedFeature("this model has no chat template; use completions instead of chat", param="messages")
    return template
