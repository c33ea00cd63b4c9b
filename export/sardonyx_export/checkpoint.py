"""What a builder sees of a source: a configuration in Hugging Face's words and tensors that are read one at a time.

Sources (`sources/`) implement it for safetensors folders and GGUF files; families and builders read it and know nothing
of files.
"""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class StoredTensor(Protocol):
    """One weight, still on disk."""

    @property
    def name(self) -> str:
        """In Hugging Face's naming: ``model.layers.0.self_attn.q_proj.weight``."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, ``(out, in)`` for a linear layer."""
        ...

    @property
    def storage(self) -> str:
        """``F32``, ``F16``, ``BF16``, or a GGUF block type: ``Q4_0``, ``Q4_1``, ``Q8_0``, ``Q4_K`` ..."""
        ...

    def read(self) -> npt.NDArray[np.float32]:
        """The whole tensor in float32, dequantised where it was quantised. A fresh array."""
        ...

    def blocks(self) -> npt.NDArray[np.uint8]:
        """The quantised bytes as ``(out, bytes per row)``, rows in Hugging Face's order (RoPE unpermuted).

        Raises:
            ValueError: `storage` is a plain float type.
        """
        ...


class Checkpoint(Protocol):
    """A model's configuration, weights and texts."""

    @property
    def uri(self) -> str:
        """The source as the manifest shall name it."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """As ``config.json``, which a GGUF file's metadata is translated into. It names an architecture."""
        ...

    @property
    def licence(self) -> str | None: ...

    @property
    def sha256(self) -> str | None:
        """Of the archive or GGUF file, where there is a single one."""
        ...

    def names(self) -> Iterable[str]: ...

    def tensor(self, name: str) -> StoredTensor:
        """Raises ExportError where the checkpoint lacks it; the message names the tensor."""
        ...

    def texts(self) -> dict[str, bytes]:
        """``tokenizer.json``; where known ``tokenizer_config.json``, ``generation_config.json``, a chat template."""
        ...


def count_storage(checkpoint: Checkpoint) -> Counter[str]:
    """Numbers by how the source stores them."""
    storage: Counter[str] = Counter()
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        storage[tensor.storage] += math.prod(tensor.shape)
    return storage
