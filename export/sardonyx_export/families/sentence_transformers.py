"""sentence-transformers' layout: what its files add to an encoder's own configuration.

``modules.json`` names the steps from tokens to an embedding: Transformer, Pooling, and any of Dense, LayerNorm and
Normalize. A folder without it is a bare encoder, whose tokens are averaged, as that library does with it.

Source: sentence-transformers 6.2, the ``save`` and ``load`` of each module.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import msgspec

from sardonyx.repository.families import Embeddings
from sardonyx_export.encoder_spec import Activation, Dense, Head, Norm, Normalise, Pooling
from sardonyx_export.errors import ExportError
from sardonyx_export.sources.model_folder import ModelFolder

MODULES = "modules.json"

_TRANSFORMER_CONFIGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_mpnet_config.json",
    "sentence_xlm-roberta_config.json",
)
_LEGACY_POOLINGS: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""In the order in which that library puts several side by side."""
_ACTIVATIONS: dict[str, Activation] = {
    "Identity": "identity",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Sigmoid": "sigmoid",
}
_SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
_LAYER_NORM_EPSILON = 1e-5


@dataclass(frozen=True, slots=True)
class SentenceLayout:
    """What the layout says."""

    head: Head
    embeddings: Embeddings
    max_seq_length: int | None
    """Tokens of a text at most; ``None``: as many as the encoder takes."""
    lowercases: bool
    """Texts are put into small letters before they are tokenised."""


def read_layout(folder: ModelFolder, config: dict[str, Any], pooling: Pooling | None = None) -> SentenceLayout:
    """Read the layout of a folder.

    Args:
        folder: with or without ``modules.json``.
        config: the encoder's ``config.json``.
        pooling: what pools a bare encoder's tokens. ``None``: mean.

    Raises:
        ExportError: a module or an option that is not implemented, a Dense layer that is pickled, or `pooling` for a
            folder that names its own.
    """
    modules = _modules(folder)
    if modules and pooling is not None:
        raise ExportError("applies to an encoder without modules.json; this one says how it pools", field="--pooling")
    head = _head(folder, modules) if modules else Head(poolings=(pooling or "mean",))
    transformer = next((folder.object(name) for name in _TRANSFORMER_CONFIGS if folder.has(name)), {})
    return SentenceLayout(
        head=head,
        embeddings=_facts(folder, config, head),
        max_seq_length=_optional_count(transformer.get("max_seq_length"), "max_seq_length"),
        lowercases=transformer.get("do_lower_case") is True,
    )


def _modules(folder: ModelFolder) -> list[tuple[str, str]]:
    """The kind and the path of each module, in order."""
    data = folder.read(MODULES)
    if data is None:
        return []
    try:
        entries = msgspec.json.decode(data, type=list[dict[str, Any]])
        found = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in entries]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError) as error:
        raise ExportError(f"is not a list of modules: {error}", file=MODULES) from error
    if len(found) < 2 or found[0][0] != "Transformer" or found[1][0] != "Pooling":
        kinds = ", ".join(kind for kind, _ in found)
        raise ExportError(f"has {kinds}; Transformer and Pooling must come first", file=MODULES)
    if found[0][1]:
        raise ExportError(
            f"has its Transformer in {found[0][1]}; save the model with a current sentence-transformers, which keeps "
            "it in the folder itself",
            file=MODULES,
        )
    return found


def _head(folder: ModelFolder, modules: list[tuple[str, str]]) -> Head:
    poolings, pools_prompt = _poolings(folder, modules[1][1])
    steps: list[Dense | Norm | Normalise] = []
    for kind, path in modules[2:]:
        match kind:
            case "Dense":
                steps.append(_dense(folder, path))
            case "LayerNorm":
                steps.append(_norm(folder, path))
            case "Normalize":
                steps.append(Normalise())
            case "Dropout":
                continue  # only while training
            case _:
                raise ExportError(f"has a module {kind}, which is not implemented", file=MODULES)
    return Head(poolings=poolings, steps=tuple(steps), pools_prompt=pools_prompt)


def _poolings(folder: ModelFolder, path: str) -> tuple[tuple[Pooling, ...], bool]:
    file = f"{path}/config.json"
    config = folder.object(file)
    chosen = config.get("pooling_mode")
    if chosen is None:
        found = [mode for flag, mode in _LEGACY_POOLINGS.items() if config.get(flag) is True]
        if not found and not any(flag in config for flag in _LEGACY_POOLINGS):
            raise ExportError("says nothing of how to pool", file=file, field="pooling_mode")
    else:
        names: list[Any] = [chosen] if isinstance(chosen, str) else chosen if isinstance(chosen, list) else []
        known: dict[Any, Pooling] = {mode: mode for mode in get_args(Pooling)}
        found = [known[name] for name in names if name in known] if all(name in known for name in names) else []
    if not found:
        raise ExportError(
            f"is {chosen!r:.100}; known are {', '.join(get_args(Pooling))}", file=file, field="pooling_mode"
        )
    return tuple(found), config.get("include_prompt", True) is not False


def _dense(folder: ModelFolder, path: str) -> Dense:
    config = folder.object(f"{path}/config.json")
    for field in ("module_input_name", "module_output_name"):
        if config.get(field, "sentence_embedding") != "sentence_embedding":
            raise ExportError(f"is {config[field]!r:.100}, which is not implemented", file=path, field=field)
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise ExportError(
            f"is {name!r:.100}; known are {', '.join(_ACTIVATIONS)}", file=path, field="activation_function"
        )
    tensors = _weights(folder, path)
    if set(tensors) - {"linear.weight", "linear.bias"} or "linear.weight" not in tensors:
        raise ExportError(f"has the tensors {', '.join(sorted(tensors))}; linear.weight is needed", file=path)
    bias = tensors["linear.bias"].read() if "linear.bias" in tensors else None
    return Dense(tensors["linear.weight"].read(), bias, _ACTIVATIONS[name])


def _norm(folder: ModelFolder, path: str) -> Norm:
    tensors = _weights(folder, path)
    if set(tensors) != {"norm.weight", "norm.bias"}:
        raise ExportError(f"has the tensors {', '.join(sorted(tensors))}; norm.weight and .bias are needed", file=path)
    return Norm(tensors["norm.weight"].read(), tensors["norm.bias"].read(), _LAYER_NORM_EPSILON)


def _weights(folder: ModelFolder, path: str) -> Any:
    if not folder.has(f"{path}/model.safetensors"):
        raise ExportError(
            "has no model.safetensors; pickled weights are never opened: load and save the model with a current "
            "sentence-transformers",
            file=path,
        )
    return folder.tensors(f"{path}/model.safetensors")


def _facts(folder: ModelFolder, config: dict[str, Any], head: Head) -> Embeddings:
    said = folder.object("config_sentence_transformers.json")
    if said.get("truncate_dim") is not None:
        raise ExportError(
            "cuts every embedding, which is not implemented; remove it, and let requests say dimensions",
            file="config_sentence_transformers.json",
            field="truncate_dim",
        )
    prompts = {str(name): str(text) for name, text in (said.get("prompts") or {}).items() if isinstance(text, str)}
    default_prompt = said.get("default_prompt_name")
    if default_prompt is not None and default_prompt not in prompts:
        raise ExportError(
            f"is {default_prompt!r:.100}, which is no prompt",
            file="config_sentence_transformers.json",
            field="default_prompt_name",
        )
    sizes = config.get("matryoshka_dimensions") or config.get("matryoshka_dims") or []
    if not isinstance(sizes, list) or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ExportError(f"is {sizes!r:.100}; a list of sizes is needed", file="config.json", field="matryoshka_dims")
    return Embeddings(
        pooling="+".join(head.poolings),
        is_normalized=head.is_normalized,
        similarity=_similarity(said.get("similarity_fn_name") or "cosine"),
        matryoshka_dims=sorted(set(sizes)),
        prompts=prompts,
        default_prompt=default_prompt,
        pools_prompt=head.pools_prompt,
    )


def _similarity(name: Any) -> Literal["cosine", "dot", "euclidean", "manhattan"]:
    for known in _SIMILARITIES:
        if name == known:
            return known  # type: ignore[return-value]  # one of the four
    raise ExportError(
        f"is {name!r:.100}; known are {', '.join(_SIMILARITIES)}",
        file="config_sentence_transformers.json",
        field="similarity_fn_name",
    )


def _optional_count(value: Any, field: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ExportError(f"is {value!r:.100}; a positive whole number is needed", field=field)
    return value
