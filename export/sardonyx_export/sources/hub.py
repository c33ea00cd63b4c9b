"""``hf:org/name[@revision]``: a snapshot in Hugging Face's own cache, by its own client.

Nothing is written outside that cache, and HF_HOME, HF_HUB_CACHE, HF_TOKEN and HF_HUB_OFFLINE mean what they mean
everywhere. Pickled weights and code are never asked for.
"""

from pathlib import Path

from sardonyx_export.errors import ExportError

ALLOW_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "README.md")
"""README.md is the model card: the licence stands in it."""
IGNORE_PATTERNS = ("*/*", "consolidated*.safetensors")
"""Subfolders hold other formats of the same weights, and so does Mistral's consolidated file."""


def fetch_snapshot(repo_id: str, revision: str | None) -> Path:
    """The snapshot's folder, downloaded as far as the cache lacks it. Its name is the commit.

    Raises:
        ExportError: no such repository or revision, no access, no network, or offline and not in the cache.
    """
    # Imported here: it takes half a second, and the package reads its environment once, when imported.
    import huggingface_hub
    from huggingface_hub import errors

    name = f"hf:{repo_id}" + (f"@{revision}" if revision else "")
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(ALLOW_PATTERNS),
            ignore_patterns=list(IGNORE_PATTERNS),
        )
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
