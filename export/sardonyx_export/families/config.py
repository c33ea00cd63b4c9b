"""Reading a checkpoint's configuration so that nothing in it is ignored by accident.

`ConfigReader` remembers which fields an architecture asked for; `finish` refuses every other field that could change
what the model computes. A field that is null or false names a feature that is off.
"""

from collections.abc import Mapping
from typing import Any

from sardonyx_export.errors import ExportError

FILE = "config.json"

# Training, bookkeeping, and how to sample: none of it changes a logit.
_INERT = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype name_or_path auto_map use_cache cache_implementation
    initializer_range pretraining_tp attention_dropout embd_pdrop resid_pdrop hidden_dropout
    unsloth_fixed unsloth_version
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    output_attentions output_hidden_states return_dict return_dict_in_generate output_scores torchscript use_bfloat16
    chunk_size_feed_forward id2label label2id num_labels problem_type finetuning_task
    task_specific_params tokenizer_class
    do_sample temperature top_k top_p typical_p min_length max_length max_new_tokens num_beams num_beam_groups
    num_return_sequences length_penalty repetition_penalty diversity_penalty early_stopping no_repeat_ngram_size
    encoder_no_repeat_ngram_size is_llama_config transformers.js_config transformers_js_config neftune_noise_alpha
    attention_probs_dropout_prob hidden_dropout_prob classifier_dropout embedding_dropout mlp_dropout dropout qa_dropout
    seq_classif_dropout summary_first_dropout gradient_checkpointing initializer_cutoff_factor cls_token_id
    mask_token_id deterministic_flash_attn reference_compile repad_logits_with_grad output_past
    """.split()  # noqa: SIM905 - a list of words reads better as words
)


class ConfigReader:
    """A configuration, read field by field.

    Args:
        config: as ``config.json``.
        prefix: dotted name of this part of the file, for messages.
    """

    def __init__(self, config: Mapping[str, Any], prefix: str = "") -> None:
        self._config = config
        self._prefix = prefix
        self._read: set[str] = set()

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive whole number; `default` where it is absent or null."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refusal(name, f"is {value!r}; a positive whole number is needed")
        return value

    def optional_integer(self, name: str) -> int | None:
        """A positive whole number, or ``None`` where it is absent or null."""
        return None if self.raw(name) is None else self.integer(name)

    def number(self, name: str, default: float | None = None) -> float:
        """A number above zero; `default` where it is absent or null."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.refusal(name, f"is {value!r}; a number above zero is needed")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A number above zero, or ``None`` where it is absent or null."""
        return None if self.raw(name) is None else self.number(name)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.refusal(name, f"is {value!r}; true or false is needed")
        return value

    def numbers(self, name: str, length: int) -> list[float]:
        """A list of `length` numbers."""
        values = self._value(name, None)
        if not isinstance(values, list) or not all(isinstance(v, int | float) for v in values):
            raise self.refusal(name, "is not a list of numbers")
        if len(values) != length:
            raise self.refusal(name, f"has {len(values)} numbers; {length} are needed")
        return [float(v) for v in values]

    def choice(self, name: str, choices: Mapping[str, str], default: str | None = None) -> str:
        """What `choices` maps the field's text to."""
        value = self._value(name, default)
        if value not in choices:
            raise self.refusal(name, f"is {value!r}; supported: {', '.join(sorted(choices))}")
        return choices[value]

    def section(self, name: str) -> "ConfigReader | None":
        """A nested object, or ``None`` where it is absent, null or empty. The caller finishes it."""
        value = self.raw(name)
        if not value:
            return None
        if not isinstance(value, dict):
            raise self.refusal(name, f"is {value!r}; an object is needed")
        return ConfigReader(value, f"{self._prefix}{name}.")

    def raw(self, name: str) -> Any:
        """The value as it stands in the file, ``None`` where it is absent. ``Any`` is what JSON holds."""
        self._read.add(name)
        return self._config.get(name)

    def refusal(self, name: str, reason: str) -> ExportError:
        """The error to raise about a field."""
        return ExportError(reason, file=FILE, field=self._prefix + name)

    def finish(self) -> None:
        """Refuse what nobody read.

        Raises:
            ExportError: a field that was not read may change what the model computes.
        """
        for name, value in self._config.items():
            is_known = name in self._read or name in _INERT or name.startswith("_")
            if not is_known and value is not None and value is not False:
                raise self.refusal(name, f"is {value!r}, which this architecture's builder does not implement")

    def _value(self, name: str, default: Any) -> Any:
        value = self.raw(name)
        if value is None:
            value = default
        if value is None:
            raise self.refusal(name, "is missing")
        return value
