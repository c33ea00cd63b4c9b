"""What each family of models adds to a manifest: the facts that the server needs and that the graphs do not say.

Floor 1. The exporter fills these structs, the server reads them and guesses nothing.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=1, le=1 << 31)]
TokenId = Annotated[int, Meta(ge=0, le=1 << 31)]


class KvLayout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shape of the in-place cache: ``past_key_values.{i}.key|value``, bound as present too.

    Slots: ``(B, K, C, D)``. Blocks: ``(blocks, block_size, K, D)``.
    """

    num_layers: Count
    num_kv_heads: Count
    head_size: Count
    datatype: Literal["FP32", "FP16", "BF16", "INT8", "FP8"] = "FP32"
    """INT8, and FP8 as e4m3, are quantised by scales that the graph holds; on CUDA only."""
    block_size: Annotated[int, Meta(ge=16, le=1 << 16)] | None = None
    """Positions of a block, a power of two; ``None``: the cache has slots."""

    @property
    def is_quantised(self) -> bool:
        return self.datatype in ("INT8", "FP8")


class LanguageModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the llm family adds."""

    vocab_size: Count
    """Width of the logits; the tokenizer may know fewer."""
    max_model_len: Count
    """Positions that the graph was built for."""
    kv: KvLayout
    bos_token_id: TokenId | None = None
    eos_token_ids: list[TokenId] = []
    """Tokens that end a completion."""
    pad_token_id: TokenId | None = None
    add_bos_token: bool = False
    """The tokenizer puts a BOS before a plain prompt."""


class Encoder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the families embeddings, reranker and classifier add: a graph that sees each text once and as a whole.

    Its graph ``encoder`` has one of two layouts (T packed tokens of all rows, B rows, S tokens of the longest row). An
    input that a graph does not declare is not given.

    packed: input_ids (T) int64, token_type_ids (T) int64, position_ids (T) int64 from 0 in each row, row_gather (B, S)
    int64, row_scatter (T) int64, token_offset (B, S) int32 (row_scatter, then the positions of padding),
    cumulative_sequence_length (B + 1) int32, seqlens (B) int32, num_prompt_tokens (B) int32 -> `output` (B, width)
    float32.

    padded: input_ids, attention_mask, token_type_ids, position_ids, each (B, S) int64, rows filled up on the right ->
    `output`; (B, width) float32, or (B, S, hidden size) where there is a graph ``head``. That one takes
    token_embeddings (B, S, hidden size) float32, seqlens (B) int32 and num_prompt_tokens (B) int32, and gives
    embeddings (B, width) float32.
    """

    layout: Literal["packed", "padded"]
    output: str
    """Of the graph ``encoder``."""
    width: Count
    """Of a row's result: embedding size, or number of labels."""
    vocab_size: Count
    max_model_len: Count
    """Tokens of a row at most, special ones among them."""
    pad_token_id: TokenId = 0
    """Fills rows of the padded layout."""


class Embeddings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the family embeddings adds."""

    pooling: str
    """How token vectors become one, in sentence-transformers' words: ``mean``, ``cls+max``."""
    is_normalized: bool
    """Embeddings leave the graph with length 1."""
    similarity: Literal["cosine", "dot", "euclidean", "manhattan"] = "cosine"
    """What the model was trained to be compared with."""
    matryoshka_dims: list[Count] = []
    """Sizes to which an embedding may be cut, ascending; none: the model was not trained for it."""
    prompts: dict[str, str] = {}
    """Texts to put in front of an input, by name: ``query`` -> ``query: ``."""
    default_prompt: str | None = None
    """Name of the prompt for requests that name none."""
    pools_prompt: bool = True
    """Tokens of the prompt take part in pooling."""


class Labels(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the families reranker, classifier and image_classifier add: what the numbers of a result mean."""

    names: list[str]
    """By index. A reranker has one."""
    activation: Literal["none", "sigmoid", "softmax"]
    """What makes scores of the graph's output; softmax where exactly one label holds."""


class ImageInput(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the family image_classifier adds: how a picture becomes the graph's input.

    In this order: decoded as RGB, resized, by way of JPEG where the model was trained so, cropped in the middle,
    channels swapped, ``(x * scale - mean) / std``.
    """

    name: str
    """Of the graph's input."""
    output: str
    """Of the graph's output, (B, number of labels)."""
    layout: Literal["NHWC", "NCHW"]
    resize: Annotated[list[Count], Meta(min_length=1, max_length=2)]
    """Height and width; one number: of the shorter side, the picture keeping its shape."""
    crop: Annotated[list[Count], Meta(min_length=2, max_length=2)]
    """Height and width of the middle that is kept."""
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    is_bgr: bool = False
    scale: float = 1.0
    mean: Annotated[list[float], Meta(min_length=3, max_length=3)]
    """In the graph's order of channels."""
    std: Annotated[list[float], Meta(min_length=3, max_length=3)] = msgspec.field(default_factory=lambda: [1.0] * 3)
    has_jpeg_round_trip: bool = False


class Whisper(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the family whisper adds: three graphs over one window of sound, and the tokens that steer the decoder.

    B windows or rows, M mel bands, F frames, P = F / 2 positions, T packed tokens, A alignment heads; H heads of size D
    are those of `kv`.

    encoder: mel (B, M, F) float32 -> for each decoder layer i cross.{i}.key (B, H, D, P), cross.{i}.value (B, H, P, D).

    decoder: the packed-step contract with position_ids (T), and cross.{i}.key, cross.{i}.value of the row's window.

    aligner: input_ids (1, S) int64, cross.{i}.key, cross.{i}.value with B = 1 -> attention (A, S, P) float32, the
    scaled products before the softmax of the heads in `alignment_heads`; logprobs (S - 1) float32, of each token given
    those before it, among the tokens below `end_id`.

    For CUDA cross.{i}.key lies as cross.{i}.value does, and both and the cache are of the datatype of `kv`. The decoder
    has its cache in blocks and the inputs of a paged step, and beside them row_gather (B, S) and row_scatter (T) of the
    packed one; the aligner takes position_ids (S) int64.
    """

    vocab_size: Count
    """Width of the logits; the tokenizer may know fewer: timestamps need no names."""
    max_model_len: Count
    """Tokens of a window, prompt and result together."""
    num_mels: Count
    num_frames: Count
    """Of a window, 100 a second."""
    kv: KvLayout
    """Of the decoder's own cache."""
    start_id: TokenId
    """``<|startoftranscript|>``."""
    end_id: TokenId
    """``<|endoftext|>``: every token below it is text."""
    previous_id: TokenId
    """``<|startofprev|>``, in front of the text before the window."""
    no_speech_id: TokenId
    """``<|nospeech|>``, in older files ``<|nocaptions|>``."""
    no_timestamps_id: TokenId
    timestamp_begin_id: TokenId
    """``<|0.00|>``; those after it are 20 ms apart."""
    transcribe_id: TokenId | None = None
    """``None`` in English-only models, which take neither a language nor a task."""
    translate_id: TokenId | None = None
    language_ids: dict[str, TokenId] = {}
    """``en`` -> ``<|en|>``; empty in English-only models."""
    suppress_ids: list[TokenId] = []
    """Never a result: signs that are no speech, and all special tokens but `end_id` and timestamps."""
    begin_suppress_ids: list[TokenId] = []
    """Never the first of a result: a lone space, and `end_id`."""
    alignment_heads: list[Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=2, max_length=2)]] = []
    """Layer and head of the cross-attention that follows the sound; none: there is no graph ``aligner``."""


class PromptEncoder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of a diffusion model's text encoders.

    Its graph: input_ids (B, S) int64 -> hidden (B, S, E) float32 and, where `has_pooled`, pooled (B, width) float32.
    """

    graph: str
    """Role: ``text_encoder``, ``text_encoder_2``."""
    tokenizer: str
    """File name: ``tokenizer.json``, ``tokenizer_2.json``."""
    max_tokens: Count
    """S: a prompt is cut to it, or filled up."""
    pad_token_id: TokenId
    has_pooled: bool = False


class Diffusion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the family diffusion adds: a prompt becomes a picture, by way of latents that lose their noise step by step.

    B rows, C latent channels of size (y, x), S tokens of a prompt, E their width (that of all encoders together).

    unet: sample (B, C, y, x) float32, timestep (B) float32, encoder_hidden_states (B, S, E) float32; where
    `pooled_width` is set text_embeds (B, pooled_width) and time_ids (B, 6), both float32; where `guidance_width` is set
    timestep_cond (B, guidance_width) float32 -> noise_pred (B, C, y, x) float32.

    vae_decoder: latents (B, C, y, x) float32 -> image (B, 3, Y, X) float32 between 0 and 1. The latents' scale is
    undone inside.

    vae_encoder, where there is one: image (B, 3, Y, X) float32 between -1 and 1 -> mean and std (B, C, y, x) float32,
    on the scale of the unet's latents.

    ``scheduler_config.json`` beside the graphs is diffusers'.
    """

    encoders: Annotated[list[PromptEncoder], Meta(min_length=1, max_length=2)]
    latent_channels: Count
    pixels_per_latent: Count
    """Y / y, 8 of most models."""
    size: Annotated[list[Count], Meta(min_length=2, max_length=2)]
    """Height and width that the model was trained for, in pixels."""
    size_multiple: Count = 64
    """Of height and width: what the unet halves again and again has to come out even."""
    pooled_width: Count | None = None
    """Of SDXL's second text encoder's summary."""
    guidance_width: Count | None = None
    """Of the embedded guidance that latent consistency models take instead of a negative prompt."""
    zeroes_empty_prompt: bool = False
    """An empty negative prompt is all zeros, and not the encoding of nothing."""
    default_steps: Count = 30
    default_guidance: Annotated[float, Meta(ge=0)] = 7.5
    """Above 1, each row is computed with the prompt and with the negative one."""
    preview: list[Annotated[list[float], Meta(min_length=3, max_length=3)]] = []
    """A rough picture of latents: for each channel what it adds to red, green and blue, then the constant; none: there
    are no previews."""
