"""From a version's folder to an image model that serves: tokenizers, sessions, step loop.

Floor 4. Everything here blocks; the registry runs it in worker threads.
"""

import math
from contextlib import ExitStack
from pathlib import Path

import msgspec

from sardonyx.engine.denoise import DenoiseOptions, DenoisePolicy
from sardonyx.engine.loop import StepLoop
from sardonyx.errors import ConfigError
from sardonyx.metrics import Metrics
from sardonyx.processing.prompt_tokens import PromptTokenizer
from sardonyx.repository.device_placement import without_device
from sardonyx.repository.diffusion_config import DiffusionModelOptions, diffusion_model_options
from sardonyx.repository.families import Diffusion
from sardonyx.repository.layout import ModelEntry
from sardonyx.repository.scheduler_config import FILE_NAME, SchedulerConfig, read_scheduler_config
from sardonyx.repository.tensorrt_bounds import DenoiseSteps, diffusion_bounds
from sardonyx.runners.diffusion import DiffusionRunner, DiffusionSessions
from sardonyx.runtime.providers import num_gpus
from sardonyx.serving.admission import Admission
from sardonyx.serving.dispatch import EventDispatch
from sardonyx.serving.engines import Engines
from sardonyx.serving.entry import DIFFUSION_FAMILY
from sardonyx.serving.image_generation import ImageGeneration
from sardonyx.serving.image_tensors import painter_face
from sardonyx.serving.images import ImageLimits, ImageModel, ImageVersion
from sardonyx.serving.loop_calls import LoopCalls
from sardonyx.serving.picture_moderation import FindJudge, PictureModerator
from sardonyx.serving.pool import WorkerPool
from sardonyx.serving.task_tensors import TaskTensorModel
from sardonyx.serving.version_files import VersionFiles, read_version
from sardonyx.settings import Settings

MAX_NUM_SEQS = 32
"""Pictures under way at once, where the operator's config does not say."""
MAX_BATCH_ROWS = 4
"""Rows of a unet call, where the operator's config does not say."""
MAX_STEPS = 100
"""Of a picture, where the operator's config does not say."""
_CHANNELS_LAST = {role: {"prefer_nhwc": "1"} for role in ("unet", "vae_decoder", "vae_encoder")}
"""Of CUDA, for graphs whose group norms take channels last, as the tensor cores do: between them and convolutions
nothing is transposed then."""
_SIZES = 4
"""Times the pixels that the model was trained for."""


class DiffusionLoader:
    """Loads image models. What they share is made here.

    Args:
        find_judge: where the moderators are that models' configs name.
        engines: opens the sessions; ``None``: of its own.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, find_judge: FindJudge, engines: Engines | None = None
    ) -> None:
        self._engines = engines or Engines(settings.engine_cache, metrics)
        self._num_gpus = num_gpus()
        self._find_judge = find_judge
        self._settings = settings
        self._metrics = metrics
        self._pool = WorkerPool()
        self._admission = Admission(
            settings.max_queued_requests,
            settings.max_queued_image_steps,
            unit="queued steps of pictures",
            on_reject=metrics.reject,
        )

    def close(self) -> None:
        """When the last model is closed."""
        self._pool.close()

    def load(self, entry: ModelEntry, version: int) -> TaskTensorModel:
        """One version, its engine running.

        Raises:
            ConfigError: a file is missing or wrong.
        """
        files = read_version(entry, version, {DIFFUSION_FAMILY}, "image model", num_gpus=self._num_gpus)
        name, diffusion = files.name, files.manifest.diffusion
        assert diffusion is not None
        options = diffusion_model_options(without_device(entry.config), file=str(entry.config_path))
        diffusion = _with_defaults(diffusion, options)
        scheduler = _read_scheduler(files.folder)
        tokenizers = [
            PromptTokenizer(files.folder / encoder.tokenizer, encoder.max_tokens, encoder.pad_token_id)
            for encoder in diffusion.encoders
        ]
        limits = self._limits(files, options, diffusion)
        steps = DenoiseOptions(
            max_num_seqs=options.max_num_seqs or MAX_NUM_SEQS,
            max_batch_rows=options.max_batch_rows or MAX_BATCH_ROWS,
            short_runs_alone=files.device.gpu is None,
        )
        with ExitStack() as undo:
            runner = self._open_runner(files, diffusion, steps, limits)
            undo.callback(runner.close)
            runner.warm_up()
            policy = DenoisePolicy(steps)
            dispatch = EventDispatch()
            engine = StepLoop(name, policy, runner, dispatch.deliver)
            dispatch.connect(engine)
            engine.start()
            undo.pop_all()
        calls = LoopCalls[ImageGeneration](
            name,
            engine,
            admission=self._admission,
            metrics=self._metrics.model(name),
            statistics=files.count_load(self._metrics),
        )
        task = ImageModel(
            ImageVersion(name, diffusion, scheduler, tokenizers, "vae_encoder" in files.manifest.graphs),
            calls,
            dispatch,
            pool=self._pool,
            limits=limits,
            moderator=self._moderator(name, options),
        )
        return TaskTensorModel(task, painter_face(task), calls, entry.config, files)

    def _moderator(self, name: str, options: DiffusionModelOptions) -> PictureModerator | None:
        if options.moderator is None:
            return None
        return PictureModerator(name, options.moderator, self._find_judge, self._pool)

    def _open_runner(
        self, files: VersionFiles, diffusion: Diffusion, steps: DenoiseOptions, limits: ImageLimits
    ) -> DiffusionRunner:
        bounds = diffusion_bounds(
            diffusion,
            DenoiseSteps(
                max_batch_rows=steps.max_batch_rows,
                max_batch_prompts=steps.max_batch_prompts,
                max_side=limits.max_side or max(diffusion.size),
            ),
        )
        with ExitStack() as undo:
            sessions = files.open_graphs(
                undo,
                engines=self._engines,
                bounds=bounds,
                cuda_defaults=_CHANNELS_LAST if files.manifest.target == "cuda" else None,
            )
            parts = DiffusionSessions(
                encoders=[sessions[encoder.graph] for encoder in diffusion.encoders],
                unet=sessions["unet"],
                vae_decoder=sessions["vae_decoder"],
                vae_encoder=sessions.get("vae_encoder"),
            )
            runner = DiffusionRunner(parts, diffusion)
            undo.pop_all()
        return runner

    def _limits(self, files: VersionFiles, options: DiffusionModelOptions, diffusion: Diffusion) -> ImageLimits:
        height, width = diffusion.size
        max_pixels = options.max_pixels or _SIZES * height * width
        max_side = options.max_side
        if max_side is None and any(each.name == "tensorrt" for each in files.device.providers):
            max_side = math.isqrt(max_pixels)
        return ImageLimits(
            max_pixels=max_pixels,
            max_side=None if max_side is None else max(max_side, height, width),
            max_steps=options.max_steps or MAX_STEPS,
            timeout_s=self._settings.request_timeout_s,
            queue_timeout_s=self._settings.queue_timeout_s,
        )


def _with_defaults(diffusion: Diffusion, options: DiffusionModelOptions) -> Diffusion:
    """With what requests get that say nothing, as the operator has it."""
    steps, guidance = options.default_steps, options.default_guidance
    return msgspec.structs.replace(
        diffusion,
        default_steps=min(diffusion.default_steps if steps is None else steps, options.max_steps or MAX_STEPS),
        default_guidance=diffusion.default_guidance if guidance is None else guidance,
    )


def _read_scheduler(folder: Path) -> SchedulerConfig:
    path = folder / FILE_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from error
    return read_scheduler_config(data, file=str(path))
