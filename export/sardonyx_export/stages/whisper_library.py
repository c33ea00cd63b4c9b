"""What transformers' own Whisper makes of a checkpoint's tensors, where torch and transformers are installed.

They are needed for no export. Whatever layout the source has, the library is handed its tensors, so nothing of the
source's folder is loaded by it, and nothing is fetched.
"""

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from sardonyx_export.checkpoint import Checkpoint
from sardonyx_export.errors import ExportError
from sardonyx_export.stages.whisper_reference import Array, WhisperPass
from sardonyx_export.whisper_spec import WhisperSpec

MAX_PARAMETERS = 300_000_000
"""The library holds the whole model in float32; larger ones than this are left to the reference in numpy."""


def library_pass(
    checkpoint: Checkpoint, spec: WhisperSpec, mel: Array, rows: Sequence[Sequence[int]]
) -> tuple[str, WhisperPass] | None:
    """Cross keys and values of the windows (B, M, F), and logits of a text to each.

    Returns:
        The library's name with its version, and the pass without attention; ``None`` where it is not installed.

    Raises:
        ExportError: the library's class has other tensors.
    """
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        return None
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    with torch.device("meta"):
        model = WhisperForConditionalGeneration(WhisperConfig(**_sizes(spec)))
    state = {name: torch.from_numpy(checkpoint.tensor(name).read()) for name in checkpoint.names()}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        raise ExportError(f"transformers' Whisper has other tensors: {[*missing, *unexpected]!r:.200}")
    model.train(False)
    done = WhisperPass()
    shape = (len(mel), spec.num_positions, spec.num_decoder_heads, spec.head_size)
    with torch.no_grad():
        encoded = model.model.encoder(torch.from_numpy(mel)).last_hidden_state
        for i, layer in enumerate(model.model.decoder.layers):
            attention = layer.encoder_attn
            key, value = (project(encoded).numpy().reshape(shape) for project in (attention.k_proj, attention.v_proj))
            done.cross[f"cross.{i}.key"] = np.transpose(key, (0, 2, 3, 1))
            done.cross[f"cross.{i}.value"] = np.transpose(value, (0, 2, 1, 3))
        for number, row in enumerate(rows):
            ids, window = torch.tensor([list(row)]), encoded[number : number + 1]
            done.logits.append(model(encoder_outputs=(window,), decoder_input_ids=ids).logits[0].numpy())
    return f"transformers {importlib.metadata.version('transformers')}", done


def _sizes(spec: WhisperSpec) -> dict[str, Any]:  # the library's own parameters, of many types
    """The library's words for a spec."""
    return {
        "vocab_size": spec.vocab_size,
        "num_mel_bins": spec.num_mels,
        "d_model": spec.hidden_size,
        "encoder_layers": spec.num_encoder_layers,
        "encoder_attention_heads": spec.num_encoder_heads,
        "encoder_ffn_dim": spec.encoder_ffn_size,
        "decoder_layers": spec.num_decoder_layers,
        "decoder_attention_heads": spec.num_decoder_heads,
        "decoder_ffn_dim": spec.decoder_ffn_size,
        "max_source_positions": spec.num_positions,
        "max_target_positions": spec.max_model_len,
        "activation_function": spec.activation,
        # Of no consequence here, but they have to be in the vocabulary.
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "decoder_start_token_id": 0,
    }
