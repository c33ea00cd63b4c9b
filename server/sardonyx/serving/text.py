"""A loaded language model as callers see it: text or messages in, chunks of text out.

Floor 4, transport-neutral. Used from one event loop.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sardonyx.repository.manifest import Manifest
from sardonyx.serving.generation import Generation
from sardonyx.serving.options import Choice, GenerationOptions, PromptInfo, TextChunk, TokenInfo, Usage

__all__ = [
    "Choice",
    "Generation",
    "GenerationOptions",
    "PromptInfo",
    "TextChunk",
    "TextModel",
    "TokenInfo",
    "Usage",
]


class TextModel:
    """One version of a language model with its engine."""

    name: str
    version: int
    manifest: Manifest
    max_model_len: int
    """Prompt and completion tokens of one sequence at most."""
    tokenizer: Any
    chat_template: Any
    """``None`` where the model has none."""
    created: int
    """Unix time of the export."""

    @property
    def num_active(self) -> int:
        """API calls that were accepted and have not ended."""
        raise NotImplementedError

    async def start(
        self, prompts: Sequence[str | list[int]], options: GenerationOptions, *, request_id: str
    ) -> Generation:
        """Admit, tokenise, check and submit one API call.

        Args:
            prompts: at least one; strings, lists of token ids, or a mix. Token ids are taken as they are.
            request_id: unique among the calls under way.

        Raises:
            InvalidRequest: an empty prompt without a BOS or EOS token to stand for it, a token id outside of the
                vocabulary, too many choices, text too long to be worth tokenising.
            ContextLengthExceeded: prompt + max_tokens over `max_model_len`.
            Overloaded: admission said no.
            ModelNotReady: the model is being unloaded.
            DeadlineExceeded: the time was over while the call waited for a tokeniser.
            EngineDead: the engine stopped.
        """
        raise NotImplementedError

    async def start_chat(
        self,
        messages: list[dict[str, Any]],
        options: GenerationOptions,
        *,
        request_id: str,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
    ) -> Generation:
        """Render the messages with the model's chat template, then as `start` with that one prompt.

        Args:
            template_kwargs: variables for the template, ``tools`` among them; `ChatTemplate.render` knows which ones.
            add_special_tokens: instead of `GenerationOptions.add_special_tokens`: templates write their own BOS.

        Raises:
            UnsupportedFeature: the model has no chat template.
            InvalidRequest: the template refused the messages; otherwise what `start` raises.
        """
        raise NotImplementedError

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            InvalidRequest: the text is longer than a tokeniser is lent for.
            Overloaded: too many calls wait for a tokeniser.
        """
        raise NotImplementedError

    async def detokenize(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids. Raises as `tokenize`, and InvalidRequest for ids outside of the vocabulary."""
        raise NotImplementedError

    async def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt that `start_chat` would use. Raises as `start_chat` and `tokenize`."""
        raise NotImplementedError
