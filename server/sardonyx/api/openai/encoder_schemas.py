"""Bodies of the endpoints for models that read a text once: OpenAI's fields, and what users of vLLM, TEI, Jina, Cohere
and Voyage send.

Floor 5. As `schemas`: ranges that stand alone are checked by msgspec, null counts as absent, unknown fields are
ignored, and known ones that would change the answer and cannot be honoured are refused by name.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from sardonyx.api.openai.schemas import ModelName, TokenId

MAX_INPUTS = 2048
"""Texts of one request, as OpenAI's."""
MAX_IMAGES = 16
"""Pictures of one moderation."""

Name = Annotated[str, Meta(max_length=512)]

REFUSED_ENCODING: dict[str, tuple[object, ...]] = {
    # other forms of the numbers
    "embedding_type": ("float",),
    "embedding_types": (["float"],),
    "output_dtype": ("float",),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    # other things than texts
    "messages": (),
    "images": (),
    "additional_data": (),
    "mm_processor_kwargs": (),
    # other ways to read texts
    "late_chunking": (False,),
    "return_multivector": (False,),
    "overlap_tokens": (),
    "max_chunks_per_doc": (),
    "rank_fields": (["text"],),
    "instruction": (),
    "chat_template": (),
    "use_activation": (True,),
    "activation": (True,),
    "softmax": (True,),
}
"""Known fields that would change the answer and are not supported → values with which they change nothing."""


class EncoderRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What all of them take."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = REFUSED_ENCODING

    model: ModelName | None = None
    """A model or an alias; absent or empty: the first by name that serves the endpoint."""
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """vLLM: cut longer texts to so many tokens, special ones among them; -1: to what the model takes."""
    truncate: bool | str | None = None
    """Cut longer texts to what the model takes (TEI, Jina), or Cohere's ``NONE``, ``END``, ``START``. Else they are
    refused, unless the model's config says otherwise."""
    truncation: bool | None = None
    """Voyage's and Jina's name for `truncate`."""
    truncation_side: str | None = None
    """The side that is cut off: ``right`` or ``left``."""
    truncation_direction: str | None = None
    """TEI's name for `truncation_side`."""
    add_special_tokens: bool | None = None
    """Put the tokenizer's special tokens around texts; the default."""


class EmbeddingRequest(EncoderRequest, frozen=True, kw_only=True):
    """Body of ``POST /v1/embeddings``."""

    input: str | list[TokenId | str | list[TokenId]] | None = None
    """A text, texts, token ids, or lists of token ids. Required."""
    encoding_format: Literal["float", "base64"] | None = None
    """``base64``: of little-endian float32."""
    dimensions: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    """Keep the first so many numbers and bring them back to length 1; for models that were trained for it."""
    output_dimension: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    """Voyage's and Cohere's name for `dimensions`, which wins."""
    prompt: Annotated[str, Meta(max_length=65_536)] | None = None
    """A text to put in front of each input; empty: none, whatever the model's default."""
    prompt_name: Name | None = None
    """TEI: the name of one of the model's prompts."""
    input_type: Name | None = None
    """Cohere, Voyage: ``query``, ``document`` and the like; becomes the model's prompt for it, where it has prompts."""
    task: Name | None = None
    """Jina's name for `input_type`: ``retrieval.query``, ``retrieval.passage``."""
    normalize: bool | None = None
    """TEI: embeddings of length 1."""
    normalized: bool | None = None
    """Jina's name for `normalize`."""


class TextDocument(msgspec.Struct, frozen=True, kw_only=True):
    """Cohere's and Jina's other form of a document."""

    text: str


class RerankRequest(EncoderRequest, frozen=True, kw_only=True):
    """Body of ``POST /v1/rerank``: Jina's and Cohere's ``documents``, or TEI's ``texts``."""

    query: str
    documents: Annotated[list[str | TextDocument], Meta(max_length=MAX_INPUTS)] | None = None
    """What to rank. Required, unless `texts` is there."""
    top_n: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    """Answer with the best so many only."""
    return_documents: bool | None = None
    """Answer with the documents' texts, too."""
    max_tokens_per_doc: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    """Cohere: cut longer documents; here, to what the model takes, if that is no more."""
    texts: Annotated[list[str], Meta(max_length=MAX_INPUTS)] | None = None
    """TEI's documents; the answer then is TEI's, too."""
    return_text: bool | None = None
    """TEI: answer with the texts, too."""
    raw_scores: bool | None = None
    """TEI: only false is served."""


class ScoreRequest(EncoderRequest, frozen=True, kw_only=True):
    """Body of ``POST /v1/score``. One text against many, or pair by pair."""

    text_1: str | Annotated[list[str], Meta(max_length=MAX_INPUTS)] | None = None
    """The queries. Required, in this or one of its other names."""
    text_2: str | Annotated[list[str], Meta(max_length=MAX_INPUTS)] | None = None
    """The texts that are scored against them. Required, as `text_1`."""
    queries: str | Annotated[list[str], Meta(max_length=MAX_INPUTS)] | None = None
    """Another name for `text_1`."""
    documents: str | Annotated[list[str], Meta(max_length=MAX_INPUTS)] | None = None
    """Another name for `text_2`."""
    data_1: str | Annotated[list[str], Meta(max_length=MAX_INPUTS)] | None = None
    """Another name for `text_1`."""
    data_2: str | Annotated[list[str], Meta(max_length=MAX_INPUTS)] | None = None
    """Another name for `text_2`."""


class ImageUrl(msgspec.Struct, frozen=True, kw_only=True):
    """Where a picture is."""

    url: str
    """A ``data:`` URI; the server fetches nothing."""


class ModerationPart(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of what is moderated as one."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


class ModerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of ``POST /v1/moderations``."""

    input: str | Annotated[list[str | ModerationPart], Meta(max_length=MAX_INPUTS)] | None = None
    """A text, texts, of which each gets a result, or parts, which get one together. Required."""
    model: ModelName | None = None
    """A moderator or an alias. Absent, empty or OpenAI's (``omni-moderation-latest``): all the moderators there are."""
