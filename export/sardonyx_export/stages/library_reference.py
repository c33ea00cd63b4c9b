"""What sentence-transformers and transformers themselves make of a checkpoint, where they are installed.

They are needed for no export of our own builders. Where they are there, the manifest states the comparison with them as
well. A checkpoint's own code is never run, and nothing is fetched.
"""

import importlib.metadata
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sardonyx_export.encoder_spec import Array
from sardonyx_export.stages.encoder_reference import EncodedRow

logger = logging.getLogger(__name__)


def sentence_embeddings(
    folder: Path, batches: Sequence[Sequence[str]], max_tokens: int
) -> tuple[str, list[Array]] | None:
    """Embeddings of texts by sentence-transformers, without any prompt.

    Args:
        folder: in a layout that the library loads.
        batches: texts.
        max_tokens: at which texts are cut.

    Returns:
        What to call it, and (texts, width) float32 for each batch; ``None`` where the library is not installed, or
        does not load this folder.
    """
    if not _has("sentence_transformers"):
        return None
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(str(folder), device="cpu", local_files_only=True, trust_remote_code=False)
        model.max_seq_length = max_tokens
        encode: Any = model.encode
        found = [np.asarray(encode(list(texts), prompt="", show_progress_bar=False), np.float32) for texts in batches]
    except Exception as error:  # whatever a foreign library says of a folder that it does not load
        logger.warning("sentence-transformers does not load %s: %s", folder.name, error)
        return None
    return f"sentence-transformers {importlib.metadata.version('sentence-transformers')}", found


def class_logits(folder: Path, batches: Sequence[Sequence[EncodedRow]]) -> tuple[str, list[Array]] | None:
    """Logits of rows by transformers' own class, one row at a time.

    Returns:
        As `sentence_embeddings`, (rows, labels) each.
    """
    if not _has("torch") or not _has("transformers"):
        return None
    import torch
    from transformers import AutoModelForSequenceClassification

    try:
        load: Any = AutoModelForSequenceClassification.from_pretrained
        model = load(str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True).eval()
        with torch.no_grad():
            found = [np.concatenate([_logits(model, row) for row in rows]) for rows in batches]
    except Exception as error:  # whatever a foreign library says of a folder that it does not load
        logger.warning("transformers does not load %s: %s", folder.name, error)
        return None
    return f"transformers {importlib.metadata.version('transformers')}", found


def _logits(model: Any, row: EncodedRow) -> Array:
    import torch

    inputs = {"input_ids": torch.tensor([list(row.token_ids)])}
    if row.token_type_ids is not None:
        inputs["token_type_ids"] = torch.tensor([list(row.token_type_ids)])
    logits: Array = model(**inputs).logits.float().numpy()
    return logits


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
