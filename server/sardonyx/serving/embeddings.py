"""Embedding models: texts become vectors. Floor 4. A `tasks.EmbeddingTask`."""

import functools
from collections.abc import Sequence

from sardonyx.errors import InvalidRequest
from sardonyx.repository import families
from sardonyx.serving.encoder import PARAM, EncoderModel, EncoderVersion, item
from sardonyx.serving.item_calls import Item, ItemCalls
from sardonyx.serving.pool import WorkerPool
from sardonyx.serving.tasks import Encoded, EncodeOptions, TextInput

_CHARS_PER_ID = 4
"""What a token id counts for where characters are asked for."""


class EmbeddingModel(EncoderModel):
    """See `tasks.EmbeddingTask`.

    Args:
        version, calls, pool: as `EncoderModel`.
        embeddings: the manifest's.
        size: numbers of an embedding.
        allows_any_dimensions: the operator's.
    """

    def __init__(
        self,
        version: EncoderVersion,
        calls: ItemCalls,
        pool: WorkerPool,
        *,
        embeddings: families.Embeddings,
        size: int,
        allows_any_dimensions: bool = False,
    ) -> None:
        super().__init__(version, calls, pool)
        self.size = size
        self.is_normalized = embeddings.is_normalized
        self.similarity = embeddings.similarity
        self.prompts = embeddings.prompts
        self.default_prompt = embeddings.default_prompt
        self.matryoshka_dims = embeddings.matryoshka_dims
        self.allows_any_dimensions = allows_any_dimensions
        self._pools_prompt = embeddings.pools_prompt

    async def embed(self, inputs: Sequence[TextInput], *, prompt: str = "", options: EncodeOptions) -> Encoded:
        """See `tasks.EmbeddingTask.embed`."""
        limit = self.limit(options)
        texts = [each for each in inputs if isinstance(each, str)]
        if prompt and len(texts) < len(inputs):
            raise InvalidRequest("a prompt cannot be put in front of token ids; send text", param=PARAM)
        leaves_out = bool(prompt) and not self._pools_prompt
        if leaves_out and limit is not None and options.truncation_side == "left":
            raise InvalidRequest(
                "this model leaves the prompt out of pooling, so texts with a prompt are cut on the right only",
                param=PARAM,
            )
        num_chars = self.most_chars([prompt + text for text in texts] if prompt else texts, limit)
        num_chars += sum(_CHARS_PER_ID * len(each) for each in inputs if not isinstance(each, str))
        make = functools.partial(self._make, prompt=prompt, leaves_out=leaves_out, options=options, limit=limit)
        results = await self.run(inputs, make, num_chars=num_chars, timeout_s=options.timeout_s)
        return Encoded(values=results.values, num_tokens=results.num_tokens)

    def _make(
        self, index: int, given: TextInput, *, prompt: str, leaves_out: bool, options: EncodeOptions, limit: int | None
    ) -> list[Item]:
        if not isinstance(given, str):
            return [item(self.check_ids(index, given, limit, options))]
        row = self.encode(index, prompt + given, options, limit)
        # One token at least is pooled, also where cutting or an empty text leaves the prompt alone.
        num_prompt_tokens = min(self._num_prompt_tokens(prompt), len(row) - 1) if leaves_out else 0
        return [item(row, num_prompt_tokens=num_prompt_tokens)]

    def _num_prompt_tokens(self, prompt: str) -> int:
        return self._tokenizer.count_prompt_tokens(prompt)
