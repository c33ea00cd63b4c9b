"""What a family's builder or importer leaves in a version folder, in the words of the manifest.

`pipeline` gets one from whatever made the graphs, and publishes it.
"""

from typing import Literal

import msgspec

from sardonyx.repository.families import Diffusion, Embeddings, Encoder, ImageInput, Labels, LanguageModel, Whisper
from sardonyx.repository.manifest import Family, Parity


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """A version folder that holds its graphs; the manifest and the texts are still to be written."""

    family: Family
    architecture: str
    """The source's own word: ``BertModel``."""
    precision: str
    activations: Literal["fp32", "int8", "int8_rows", "fp16", "bf16"] = "fp32"
    graphs: dict[str, list[str]]
    """File names by role, the graph first, then its data files."""
    texts: dict[str, bytes] = {}
    """Files to write beside them, by name: ``tokenizer.json``."""
    weights: str = ""
    """How the weights were stored and what became of them."""
    llm: LanguageModel | None = None
    encoder: Encoder | None = None
    embeddings: Embeddings | None = None
    labels: Labels | None = None
    image: ImageInput | None = None
    whisper: Whisper | None = None
    diffusion: Diffusion | None = None
    parity: list[Parity]
    """At least one: nothing is published unverified."""
    config_parameters: dict[str, str] = {}
    """``parameters`` for a new config.pbtxt: ``moderation.offensive`` -> ``harassment 0.5``."""


class PaddedGraph(msgspec.Struct, frozen=True, kw_only=True):
    """A graph that somebody else's exporter made: (B, S) inputs, see the padded layout of `families.Encoder`."""

    files: list[str]
    """In the version folder, the graph first."""
    output: str
    """Name of the output to use."""
    kind: Literal["tokens", "pooled", "logits"]
    """(B, S, hidden size), (B, hidden size), or (B, labels)."""
    width: int
    """Last axis of the output."""
    precision: Literal["fp32", "fp16", "int8"]
    """As far as the stored weights tell."""
    weights: str
    """For the manifest."""
