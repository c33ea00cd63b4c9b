"""Encoders of our own builder: embedding models, rerankers and classifiers with a packed graph."""

import os
from pathlib import Path

from sardonyx.repository.families import Embeddings, Encoder, Labels
from sardonyx.repository.manifest import Parity
from sardonyx.runtime.session import configure_threads
from sardonyx_export.builders.encoder import EncoderPrecision, build_encoder
from sardonyx_export.built import Built
from sardonyx_export.checkpoint import Checkpoint, count_storage
from sardonyx_export.encoder_spec import Array, EncoderSpec, Head
from sardonyx_export.errors import ExportError
from sardonyx_export.families.encoder import read_encoder_spec
from sardonyx_export.families.encoder_heads import read_classification_head
from sardonyx_export.families.sentence_transformers import read_layout
from sardonyx_export.plan import FAMILY_OF_TASK, PAGED_NOTE, Plan, Target, Task
from sardonyx_export.recipes.recipe import Progress
from sardonyx_export.request import ExportRequest
from sardonyx_export.sources.model_folder import ModelFolder
from sardonyx_export.sources.resolve import OpenSource
from sardonyx_export.stages import library_reference
from sardonyx_export.stages.encoder_reference import EncodedRow, reference_outputs
from sardonyx_export.stages.encoder_rows import Rows, tokenizer_text
from sardonyx_export.stages.encoder_verify import compare_embeddings, compare_scores, run_graph, run_in_numpy

REFERENCE = "numpy forward pass in float32 over the source's weights"
_BYTES_PER_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.1}


def chosen_precision(request: ExportRequest) -> EncoderPrecision:
    """Of an encoder: fp32, for CUDA fp16, unless asked otherwise.

    Raises:
        ExportError: a precision or a treatment of activations that encoders do not have.
    """
    chosen = request.precision
    if chosen == "auto":
        chosen = "fp16" if request.target == "cuda" else "fp32"
    if chosen == "int4":
        raise ExportError("int4 is for language models; encoders are built in fp32 or int8", field="--precision")
    if request.target == "cuda" and chosen not in ("fp16", "bf16"):
        raise ExportError(f"{chosen} is for the CPU; encoders for cuda are fp16 or bf16", field="--precision")
    if request.target == "cpu" and chosen in ("fp16", "bf16"):
        raise ExportError(f"{chosen} is for --target cuda; encoders for the CPU are fp32 or int8", field="--precision")
    if request.activations not in (None, "int8_rows" if chosen == "int8" else chosen):
        raise ExportError("follow from the precision of an encoder; leave them out", field="--activations")
    return chosen


class TextEncoderRecipe:
    """A `recipe.Recipe`.

    Args:
        opened: a source with a checkpoint of an architecture in `families.encoder.architectures`.
        name: of the model.
        request: precision, tokens and pooling.
        task: embeddings, reranker or classifier.
    """

    def __init__(self, opened: OpenSource, name: str, request: ExportRequest, task: Task) -> None:
        assert opened.checkpoint is not None
        self._checkpoint: Checkpoint = opened.checkpoint
        self._path = opened.path
        self._is_as_published = request.pooling is None
        self._embeddings: Embeddings | None = None
        self._labels: Labels | None = None
        self._lowercases = False
        config, names = self._checkpoint.config, list(self._checkpoint.names())
        spec = read_encoder_spec(config, names, request.max_model_len)
        if task == "embeddings":
            layout = read_layout(ModelFolder(opened.path), config, request.pooling)
            self._head, self._embeddings, self._lowercases = layout.head, layout.embeddings, layout.lowercases
            limit = layout.max_seq_length
            if limit is not None and request.max_model_len is None and limit < spec.max_model_len:
                spec = read_encoder_spec(config, names, limit)
        else:
            if request.pooling is not None:
                raise ExportError("is for embeddings; a classifier pools as it was trained", field="--pooling")
            self._head, self._labels = read_classification_head(self._checkpoint, spec)
            if task == "reranker" and len(self._labels.names) != 1:
                raise ExportError(f"a reranker has one label; this model has {len(self._labels.names)}", field="--task")
        self._spec: EncoderSpec = spec
        self._precision = chosen_precision(request)
        self.plan = self._plan(name, task, request.target)

    def _plan(self, name: str, task: Task, target: Target) -> Plan:
        storage = count_storage(self._checkpoint)
        return Plan(
            name=name,
            family=FAMILY_OF_TASK[task],
            architecture=self._checkpoint.config["architectures"][0],
            precision=self._precision,
            activations=None,
            max_model_len=self._spec.max_model_len,
            target=target,
            num_parameters=storage.total(),
            storage=dict(storage.most_common()),
            estimated_bytes=int(storage.total() * _BYTES_PER_WEIGHT[self._precision]),
        )

    def build(self, folder: Path, progress: Progress) -> Built:
        """See `recipe.Recipe`."""
        spec, head, plan = self._spec, self._head, self.plan
        output = "embeddings" if self._embeddings is not None else "logits"
        encoder = Encoder(
            layout="packed",
            output=output,
            width=head.width(spec.hidden_size),
            vocab_size=spec.vocab_size,
            max_model_len=spec.max_model_len,
        )
        texts = encoder_texts(self._checkpoint.texts(), lowercases=self._lowercases)
        rows = Rows(texts["tokenizer.json"], max_model_len=spec.max_model_len, vocab_size=spec.vocab_size)
        report = build_encoder(
            self._checkpoint,
            spec,
            head,
            folder,
            precision=self._precision,
            output=output,
            progress=lambda done, total: progress("build", done, total),
        )
        parity = self._verify(report.files[0], encoder, head, rows, progress)
        return Built(
            family=plan.family,
            architecture=plan.architecture,
            precision=plan.precision,
            activations=report.activations,
            graphs={"encoder": [file.name for file in report.files]},
            texts=texts,
            weights=report.weights,
            encoder=encoder,
            embeddings=self._embeddings,
            labels=self._labels,
            parity=parity,
        )

    def _verify(self, graph: Path, encoder: Encoder, head: Head, rows: Rows, progress: Progress) -> list[Parity]:
        batches = rows.batches(are_pairs=self.plan.family == "reranker")
        every_row = [row for _, _, batch in batches for row in batch]
        reference = reference_outputs(
            self._checkpoint, self._spec, head, every_row, lambda done, total: progress("verify", done, total)
        )
        measured = self._run(graph, encoder, [batch for _, _, batch in batches])
        expected, start = [], 0
        for _, _, batch in batches:
            expected.append(reference[start : start + len(batch)])
            start += len(batch)
        parity = self._compare(REFERENCE, [what for what, _, _ in batches], expected, measured)
        if self._embeddings is not None and not self._is_as_published:
            return parity  # the library would pool as it does by default
        if self._embeddings is not None:
            found = library_reference.sentence_embeddings(
                self._path, [texts for _, texts, _ in batches], rows.max_tokens
            )
        else:
            found = library_reference.class_logits(self._path, [batch for _, _, batch in batches])
        if found is not None:
            parity += self._compare(found[0], [what for what, _, _ in batches], found[1], measured)
        return parity

    def _run(self, graph: Path, encoder: Encoder, batches: list[list[EncodedRow]]) -> list[Array]:
        if self.plan.target == "cuda":
            return run_in_numpy(graph, encoder.output, batches)
        configure_threads(os.cpu_count() or 1, allow_spinning=False)
        return run_graph(graph, None, self.plan.name, encoder, batches)

    def _compare(self, reference: str, shapes: list[str], expected: list[Array], measured: list[Array]) -> list[Parity]:
        parity, note = [], f"{PAGED_NOTE}: " if self.plan.target == "cuda" else ""
        for what, wanted, actual in zip(shapes, expected, measured, strict=True):
            name = f"{note}{reference}, {what}"
            if self._labels is None:
                parity.append(compare_embeddings(wanted, actual, self.plan.precision, name))
            else:
                parity.append(compare_scores(wanted, actual, self._labels, self.plan.precision, name))
        return parity


def encoder_texts(texts: dict[str, bytes], *, lowercases: bool) -> dict[str, bytes]:
    """The files of a version that say how text becomes tokens."""
    kept = {"tokenizer.json": tokenizer_text(texts["tokenizer.json"], lowercases=lowercases)}
    if "tokenizer_config.json" in texts:
        kept["tokenizer_config.json"] = texts["tokenizer_config.json"]
    return kept
