"""From a version's folder to an encoder model that serves: tokenizer, sessions, steps, and the task of its family.

Floor 4. Everything here blocks; the registry runs it in worker threads.
"""

from contextlib import ExitStack

from sardonyx.engine.instances import InstanceLoop
from sardonyx.engine.token_budget import TokenBudgetOptions, TokenBudgetPolicy
from sardonyx.errors import ConfigError
from sardonyx.metrics import Metrics
from sardonyx.processing.encoder_tokenizer import EncoderTokenizer
from sardonyx.processing.tokenizer import TOKENIZER_FILE
from sardonyx.repository.device_placement import without_device
from sardonyx.repository.encoder_config import EncoderOptions, encoder_options
from sardonyx.repository.layout import ModelEntry
from sardonyx.repository.manifest import Manifest
from sardonyx.repository.tensorrt_bounds import EncoderSteps, encoder_bounds
from sardonyx.runners.encoder import EncoderGraphs, EncoderRunner
from sardonyx.runtime.priority import in_modest_thread
from sardonyx.runtime.providers import num_gpus
from sardonyx.runtime.session import SessionConfig
from sardonyx.serving.admission import Admission
from sardonyx.serving.classifier import TextClassifier
from sardonyx.serving.embeddings import EmbeddingModel
from sardonyx.serving.encoder import EncoderVersion
from sardonyx.serving.encoder_tensors import classifier_face, embedding_face, reranker_face
from sardonyx.serving.engines import Engines
from sardonyx.serving.entry import ENCODER_FAMILIES
from sardonyx.serving.event_inbox import EventInbox
from sardonyx.serving.item_calls import ItemCalls
from sardonyx.serving.pool import WorkerPool
from sardonyx.serving.reranker import RerankerModel
from sardonyx.serving.task_tensors import Face, TaskTensorModel
from sardonyx.serving.tasks import CategoryRule
from sardonyx.serving.tensor_loader import MAX_FAILED_STEPS
from sardonyx.serving.tensor_sessions import MAX_WIDE_BYTES
from sardonyx.serving.version_files import VersionFiles, read_version
from sardonyx.settings import Settings, usable_cores

NUM_EXPRESS = 1
"""Instances that are kept for short requests: they share the session, and its threads, of the others."""


class EncoderLoader:
    """Loads embedding models, rerankers and text classifiers. What they share is made here."""

    def __init__(self, settings: Settings, metrics: Metrics, engines: Engines | None = None) -> None:
        self._engines = engines or Engines(settings.engine_cache, metrics)
        self._num_gpus = num_gpus()
        self._settings = settings
        self._metrics = metrics
        self._pool = WorkerPool()
        self._admission = Admission(
            settings.max_queued_requests, settings.max_queued_tokens, unit="queued tokens", on_reject=metrics.reject
        )
        self._num_threads = settings.num_threads or usable_cores()

    def close(self) -> None:
        """When the last model is closed."""
        self._pool.close()

    def load(self, entry: ModelEntry, version: int) -> TaskTensorModel:
        """One version, its instances running.

        Raises:
            ConfigError: a file is missing or wrong, or config, manifest, tokenizer and graph do not suit each other.
        """
        file = str(entry.config_path)
        files = read_version(entry, version, ENCODER_FAMILIES, "encoder model", num_gpus=self._num_gpus)
        options = encoder_options(without_device(entry.config), file=file)
        moderation = moderation_rules(files.manifest, options, file=file)
        facts = _facts(files, options, file)
        inbox = EventInbox()
        with ExitStack() as undo:
            loop = self._open_loop(files, facts, options, inbox, undo)
            undo.pop_all()
        calls = ItemCalls(
            entry.name,
            loop,
            inbox,
            files.count_load(self._metrics),
            admission=self._admission,
            timeout_s=self._settings.request_timeout_s,
        )
        task, face = self._task(facts, calls, files.manifest, options, moderation)
        return TaskTensorModel(task, face, calls, entry.config, files)

    def _task(
        self,
        facts: EncoderVersion,
        calls: ItemCalls,
        manifest: Manifest,
        options: EncoderOptions,
        moderation: dict[str, list[CategoryRule]],
    ) -> tuple[object, Face]:
        """What the endpoints of the model's family use, and how it looks as tensors."""
        if manifest.embeddings is not None:
            assert manifest.encoder is not None
            embedder = EmbeddingModel(
                facts,
                calls,
                self._pool,
                embeddings=manifest.embeddings,
                size=manifest.encoder.width,
                allows_any_dimensions=options.allow_any_dimensions,
            )
            return embedder, embedding_face(embedder)
        assert manifest.labels is not None
        if manifest.family == "reranker":
            reranker = RerankerModel(facts, calls, self._pool, labels=manifest.labels)
            return reranker, reranker_face(reranker)
        classifier = TextClassifier(facts, calls, self._pool, labels=manifest.labels, moderation=moderation)
        return classifier, classifier_face(classifier)

    def _open_loop(
        self, files: VersionFiles, facts: EncoderVersion, options: EncoderOptions, inbox: EventInbox, undo: ExitStack
    ) -> InstanceLoop:
        """Instances that run; `undo` closes what was opened until then.

        As with tensor models (see `tensor_sessions.SessionOpener`), the instances on the CPU share a session and divide
        its threads, and runs that are alone have a session with all of them. All but the express instance leave the
        processor to others, so that a short call is soon through, and so is the event loop. A card has no cores to
        divide.
        """
        encoder = files.manifest.encoder
        assert encoder is not None
        on_card = files.device.gpu is not None
        num_instances = options.num_instances or (1 if on_card else min(2, self._num_threads))
        steps = self._policy_options(options, num_instances)
        bounds = encoder_bounds(
            encoder,
            EncoderSteps(
                max_batch_tokens=steps.max_batch_tokens,
                max_batch_size=steps.max_batch_size,
                max_model_len=facts.max_model_len,
            ),
        )

        def open_all(num_threads: int) -> EncoderGraphs:
            config = SessionConfig(num_threads=num_threads)
            opened = files.open_graphs(undo, config, engines=self._engines, bounds=bounds)
            return EncoderGraphs(opened["encoder"], opened.get("head"))

        shared = open_all(max(1, self._num_threads // num_instances))
        runner = EncoderRunner([shared] * (num_instances + NUM_EXPRESS), encoder)
        if not on_card and num_instances > 1 and self._num_threads > 1 and files.size_bytes <= MAX_WIDE_BYTES:
            # Its threads have the priority of those who open it.
            runner.use_alone(in_modest_thread(lambda: open_all(self._num_threads)))
        runner.warm_up()
        policy = TokenBudgetPolicy(files.name, steps)
        loop = InstanceLoop(
            files.name,
            policy,
            runner,
            inbox.deliver,
            num_instances=num_instances + NUM_EXPRESS,
            num_modest=num_instances,
            # A processor is not lost for good: where steps fail, it is for what callers sent.
            max_failed_steps=MAX_FAILED_STEPS if on_card else None,
        )
        loop.start()
        return loop

    def _policy_options(self, options: EncoderOptions, num_instances: int) -> TokenBudgetOptions:
        return TokenBudgetOptions(
            max_batch_tokens=options.max_batch_tokens or self._settings.encoder_batch_tokens,
            **({} if options.max_batch_size is None else {"max_batch_size": options.max_batch_size}),
            num_instances=num_instances,
            num_express=NUM_EXPRESS,
        )


def moderation_rules(manifest: Manifest, options: EncoderOptions, *, file: str) -> dict[str, list[CategoryRule]]:
    """What the operator says that labels mean, by label.

    Raises:
        ConfigError: the model has no such label, or is no classifier.
    """
    names = manifest.labels.names if manifest.labels is not None and manifest.family != "reranker" else []
    for label in options.moderation:
        if label not in names:
            known = f"its labels are {', '.join(names)}" if names else f"a model of {manifest.family} has no labels"
            raise ConfigError(
                f"the model has no label {label!r}; {known}", file=file, field=f"parameters['moderation.{label}']"
            )
    return {label: [CategoryRule(*rule) for rule in rules] for label, rules in options.moderation.items()}


def _facts(files: VersionFiles, options: EncoderOptions, file: str) -> EncoderVersion:
    encoder = files.manifest.encoder
    assert encoder is not None
    tokenizer = EncoderTokenizer.load(files.folder)
    if tokenizer.vocab_size > encoder.vocab_size:
        raise ConfigError(
            f"has ids up to {tokenizer.vocab_size - 1:,}; the graph was built for {encoder.vocab_size:,} tokens",
            file=str(files.folder / TOKENIZER_FILE),
        )
    max_model_len = min(options.max_model_len or encoder.max_model_len, encoder.max_model_len)
    if max_model_len <= tokenizer.num_special_tokens:
        raise ConfigError(
            f"is {max_model_len}; the special tokens alone are {tokenizer.num_special_tokens}",
            file=file,
            field="parameters['max_model_len']",
        )
    return EncoderVersion(
        name=files.name,
        tokenizer=tokenizer,
        vocab_size=encoder.vocab_size,
        max_model_len=max_model_len,
        truncates=options.truncate,
    )
