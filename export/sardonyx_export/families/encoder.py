"""Text encoders: from a checkpoint's configuration to an `EncoderSpec`.

A test fails when an architecture in `architectures` has no parity case.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from msgspec.structs import replace

from sardonyx_export.encoder_spec import EncoderSpec
from sardonyx_export.errors import ExportError
from sardonyx_export.families import bert, rotary_encoders
from sardonyx_export.families.config import ConfigReader

_HEAD_FIELDS = (
    *("classifier_pooling", "classifier_bias", "classifier_activation"),
    *("sentence_transformers", "sbert_ce_default_activation_function"),
)
"""Read where the head is."""


def read_encoder_spec(
    checkpoint_config: Mapping[str, Any], tensor_names: Collection[str], max_model_len: int | None = None
) -> EncoderSpec:
    """What the builder needs to know of a checkpoint, whatever head it has.

    Args:
        checkpoint_config: as ``config.json``.
        tensor_names: of the checkpoint; they tell under which prefix the encoder lies.
        max_model_len: tokens of a text to serve; ``None``: as many as the checkpoint was made for.

    Raises:
        ExportError: an architecture, or a field that would change what the model computes, is not implemented; the
            error names the field. Or the tensors are not the architecture's.
    """
    config = ConfigReader(checkpoint_config)
    spec = architectures[architecture_of(config)](config, tensor_names)
    for name in _HEAD_FIELDS:
        config.raw(name)
    config.finish()
    if max_model_len is None:
        return spec
    if not 1 <= max_model_len <= spec.max_model_len:
        raise ExportError(
            f"is {max_model_len}; this checkpoint has 1 to {spec.max_model_len} positions", field="max_model_len"
        )
    return replace(spec, max_model_len=max_model_len)


def architecture_of(config: ConfigReader) -> str:
    """The checkpoint's first architecture.

    Raises:
        ExportError: it is none of `architectures`.
    """
    names = config.raw("architectures")
    if not isinstance(names, list) or not names or names[0] not in architectures:
        supported = ", ".join(sorted(architectures))
        raise config.refusal("architectures", f"is {names!r:.100}; supported: {supported}")
    return str(names[0])


_READERS: Mapping[str, Callable[[ConfigReader, Collection[str]], EncoderSpec]] = {
    "Bert": bert.bert,
    "Roberta": bert.roberta,
    "XLMRoberta": bert.roberta,
    "Camembert": bert.roberta,
    "DistilBert": bert.distilbert,
    "MPNet": bert.mpnet,
    "ModernBert": rotary_encoders.modernbert,
    "NomicBert": rotary_encoders.nomic_bert,
}

architectures: dict[str, Callable[[ConfigReader, Collection[str]], EncoderSpec]] = {
    f"{name}{part}": reader
    for name, reader in _READERS.items()
    for part in ("Model", "ForMaskedLM", "ForSequenceClassification")
} | {"BertForPreTraining": bert.bert}
"""By ``architectures[0]``. A language modelling head is left out; for a classification head see `encoder_heads`."""
