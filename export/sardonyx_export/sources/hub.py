"""``hf:org/name[@revision]``: a snapshot in Hugging Face's own cache, by its own client.

Nothing is written outside that cache, and HF_HOME, HF_HUB_CACHE, HF_TOKEN and HF_HUB_OFFLINE mean what they mean
everywhere. Pickled weights and code are never asked for.
"""

import glob
from pathlib import Path

from sardonyx_export.errors import ExportError

ALLOW_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "model.bin", "tokenizer.model", "README.md")
"""README.md is the model card: the licence stands in it. ``model.bin`` is CTranslate2's; pickles have other names."""
PIPELINE_FILE = "model_index.json"
PIPELINE_PATTERNS = (
    PIPELINE_FILE,
    "README.md",
    "*/*.json",
    "tokenizer*/merges.txt",
    "unet/diffusion_pytorch_model*.safetensors",
    "vae/diffusion_pytorch_model*.safetensors",
    "text_encoder*/model*.safetensors",
)
"""Of a pipeline of diffusers: its parts, and not the single files for other programs that lie beside them."""
PIPELINE_IGNORED = ("*.fp16*", "*non_ema*", "safety_checker/*", "*/*/*")
IGNORE_PATTERNS = ("[!0-9]*/*", "consolidated*.safetensors")
"""Subfolders hold other formats of the same weights, and so does Mistral's consolidated file. Those whose name begins
with a number, as in ``1_Pooling``, are sentence-transformers' modules."""


def fetch_snapshot(repo_id: str, revision: str | None, *, file: str | None = None) -> Path:
    """The snapshot's folder, downloaded as far as the cache lacks it. Its name is the commit.

    Args:
        repo_id: ``organisation/name``.
        revision: a branch, a tag or a commit.
        file: one more file to fetch, a ready ONNX graph; what its name begins (external data) comes along.

    Raises:
        ExportError: no such repository or revision, no access, no network, or offline and not in the cache.
    """
    # Imported here: it takes half a second, and the package reads its environment once, when imported.
    import huggingface_hub
    from huggingface_hub import errors

    name = f"hf:{repo_id}" + (f"@{revision}" if revision else "")
    try:
        # First, because beside a pipeline lie files of many gigabytes that it does not need.
        folder = huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=[PIPELINE_FILE])
        is_pipeline = (Path(folder) / PIPELINE_FILE).exists()
        folder = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(PIPELINE_PATTERNS if is_pipeline else ALLOW_PATTERNS),
            ignore_patterns=list(PIPELINE_IGNORED if is_pipeline else IGNORE_PATTERNS),
        )
        if file is not None:
            patterns = [f"{glob.escape(file)}*"]
            folder = huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=patterns)
    except errors.GatedRepoError as error:
        raise ExportError(
            f"{name} is gated: accept its terms on its page, then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ExportError(f"{name}: there is no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise ExportError(f"{name}: there is no such model, or it is private and HF_TOKEN is not set") from error
    except errors.LocalEntryNotFoundError as error:
        raise ExportError(f"{name} is not in the local cache, and the hub cannot be reached or is off") from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise ExportError(f"{name} cannot be downloaded: {error}") from error
    return Path(folder)
