"""Tiny text encoders with random weights, saved by `transformers` as their publishers would save them."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `parity` is not installed")

VOCAB_SIZE = 128
"""Rows of the word embeddings; the tokenizer knows fewer tokens."""
HIDDEN_SIZE = 32
MAX_MODEL_LEN = 48
"""Tokens of a text at most, in every architecture."""
WORDS = """the of and to in he is that capital paris france hello world what a cat sat on mat dog good bad film was
i liked it very much not at all where how who rain snow 1 2 3 . , ! ? ##s ##ing ##ed""".split()  # noqa: SIM905

_PADS_WITH_1 = ("Roberta", "XLMRoberta", "Camembert", "MPNet")


def make_encoder(folder: Path, architecture: str, *, num_labels: int | None = None, **config_changes: Any) -> Any:
    """Write config.json, model.safetensors, tokenizer.json and tokenizer_config.json of a tiny model.

    The weights are spread so that every part of the model moves the result, biases and norms among them, and are the
    same in every call with the same arguments.

    Args:
        folder: is made if it does not exist.
        architecture: of `transformers`: ``BertModel``, ``XLMRobertaForSequenceClassification``.
        num_labels: of a classification head.
        config_changes: fields of the configuration that differ from the tiny default sizes.

    Returns:
        The `transformers` model, in evaluation mode, with eager attention.
    """
    model_class = getattr(transformers, architecture)
    fields = _sizes(architecture) | ({} if num_labels is None else {"num_labels": num_labels}) | config_changes
    config = model_class.config_class(**fields)
    config._attn_implementation = "eager"
    torch.manual_seed(11)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif parameter.ndim == 1:
                parameter.copy_(0.5 * torch.randn_like(parameter))
            elif "embeddings" in name or "relative_attention_bias" in name:
                parameter.copy_(torch.randn_like(parameter))
            else:
                parameter.copy_(1.5 * torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    write_tokenizer(folder, architecture)
    return model


def write_tokenizer(folder: Path, architecture: str = "BertModel") -> None:
    """A lower-casing WordPiece over `WORDS`, its padding token where the architecture has it.

    A text becomes ``[CLS] text [SEP]``, a pair ``[CLS] first [SEP] second [SEP]``; the second text has type 1 in models
    that know types.
    """
    if architecture.startswith(_PADS_WITH_1):
        special = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    else:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {token: index for index, token in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    second = 1 if architecture.startswith(("Bert", "NomicBert")) else 0
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair=f"[CLS]:0 $A:0 [SEP]:0 $B:{second} [SEP]:{second}",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    tokenizer.add_special_tokens(special)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_MODEL_LEN,
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
        "model_input_names": ["input_ids", *(["token_type_ids"] if second else []), "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_released_nomic_config(folder: Path, **changes: Any) -> None:
    """Replace config.json of a ``NomicBertModel`` by one in the words of nomic-embed-text's own release."""
    config: dict[str, Any] = {
        "architectures": ["NomicBertModel"],
        "model_type": "nomic_bert",
        "activation_function": "swiglu",
        "attn_pdrop": 0.0,
        "auto_map": {"AutoModel": "modeling_hf_nomic_bert.NomicBertModel"},
        "bos_token_id": None,
        "causal": False,
        "dense_seq_output": True,
        "embd_pdrop": 0.0,
        "fused_bias_fc": True,
        "fused_dropout_add_ln": True,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-12,
        "max_trained_positions": MAX_MODEL_LEN,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "n_embd": HIDDEN_SIZE,
        "n_head": 2,
        "n_inner": 56,
        "n_layer": 2,
        "n_positions": MAX_MODEL_LEN,
        "pad_vocab_size_multiple": 64,
        "parallel_block": False,
        "parallel_block_tied_norm": False,
        "prenorm": False,
        "qkv_proj_bias": False,
        "reorder_and_upcast_attn": False,
        "resid_pdrop": 0.0,
        "rotary_emb_base": 1000,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "summary_activation": None,
        "summary_first_dropout": 0.0,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "type_vocab_size": 2,
        "use_cache": True,
        "use_flash_attn": True,
        "use_rms_norm": False,
        "use_xentropy": True,
        "vocab_size": VOCAB_SIZE,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))


def _sizes(architecture: str) -> dict[str, Any]:
    """Tiny sizes in the words of the architecture's configuration."""
    pad_id = 1 if architecture.startswith(_PADS_WITH_1) else 0
    common = {"vocab_size": VOCAB_SIZE, "pad_token_id": pad_id}
    if architecture.startswith("DistilBert"):
        sizes = {"dim": HIDDEN_SIZE, "hidden_dim": 56, "n_layers": 2, "n_heads": 4}
        return common | sizes | {"max_position_embeddings": MAX_MODEL_LEN}
    sizes = {
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_MODEL_LEN + (pad_id + 1 if pad_id else 0),
    }
    if architecture.startswith("ModernBert"):
        # Heads of 16, as rotary embeddings need them; a full layer, a windowed one, and another full one.
        sizes |= {"num_attention_heads": 2, "num_hidden_layers": 3, "global_attn_every_n_layers": 2}
        sizes |= {"local_attention": 8, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    elif architecture.startswith("NomicBert"):
        sizes |= {"num_attention_heads": 2, "type_vocab_size": 2}
    elif architecture.startswith("Bert"):
        sizes |= {"type_vocab_size": 2}
    elif not architecture.startswith("MPNet"):
        sizes |= {"type_vocab_size": 1}
    return common | sizes
