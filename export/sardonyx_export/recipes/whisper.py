"""Whisper: encoder, decoder and aligner, verified by the source's own weights in numpy."""

import os
from pathlib import Path

import tokenizers

from sardonyx.repository.manifest import Parity
from sardonyx.runtime.session import configure_threads
from sardonyx_export.builders.whisper import build_whisper
from sardonyx_export.builders.whisper_aligner import Alignment
from sardonyx_export.built import Built
from sardonyx_export.checkpoint import Checkpoint, count_storage
from sardonyx_export.errors import ExportError
from sardonyx_export.families.whisper import read_whisper_spec
from sardonyx_export.families.whisper_tokens import read_whisper_facts
from sardonyx_export.plan import Plan, Precision
from sardonyx_export.recipes.recipe import Progress
from sardonyx_export.request import ExportRequest
from sardonyx_export.stages.verify import REFERENCE
from sardonyx_export.stages.whisper_library import MAX_PARAMETERS, library_pass
from sardonyx_export.stages.whisper_reference import reference_pass
from sardonyx_export.stages.whisper_verify import compare_logprobs, compare_passes, make_trial, run_graphs

_BYTES_PER_WEIGHT = {"fp32": 4.0, "int8": 1.1}
_KEPT_TEXTS = ("tokenizer.json", "generation_config.json")


class WhisperRecipe:
    """A `recipe.Recipe`.

    Args:
        checkpoint: of a Whisper model.
        name: of the model.
        request: its precision.

    Raises:
        ExportError: an option does not suit it, or the configuration asks for what is not built.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, request: ExportRequest) -> None:
        self._checkpoint = checkpoint
        self._spec = read_whisper_spec(checkpoint.config)
        if request.max_model_len not in (None, self._spec.max_model_len):
            raise ExportError("follows from the windows of speech models; leave it out", field="--max-model-len")
        self._texts = {file: data for file, data in checkpoint.texts().items() if file in _KEPT_TEXTS}
        self._facts = read_whisper_facts(self._texts, checkpoint.config, self._spec)
        storage = count_storage(checkpoint)
        precision = _chosen_precision(request)
        self.plan = Plan(
            name=name,
            family="whisper",
            architecture=checkpoint.config["architectures"][0],
            precision=precision,
            activations=None,
            max_model_len=self._spec.max_model_len,
            num_parameters=storage.total(),
            storage=dict(storage.most_common()),
            estimated_bytes=int(storage.total() * _BYTES_PER_WEIGHT[precision]),
        )

    def build(self, folder: Path, progress: Progress) -> Built:
        """See `recipe.Recipe`."""
        facts, plan = self._facts, self.plan
        alignment = Alignment(heads=facts.alignment_heads, end_id=facts.end_id) if facts.alignment_heads else None
        report = build_whisper(
            self._checkpoint,
            self._spec,
            folder,
            precision="int8" if plan.precision == "int8" else "fp32",
            alignment=alignment,
            progress=lambda done, total: progress("build", done, total),
        )
        parity = self._verify({role: files[0] for role, files in report.graphs.items()}, progress)
        return Built(
            family="whisper",
            architecture=plan.architecture,
            precision=plan.precision,
            activations="int8_rows" if plan.precision == "int8" else "fp32",
            graphs={role: [file.name for file in files] for role, files in report.graphs.items()},
            texts=self._texts,
            weights=report.weights,
            whisper=facts,
            parity=parity,
        )

    def _verify(self, graphs: dict[str, Path], progress: Progress) -> list[Parity]:
        facts, precision = self._facts, self.plan.precision
        trial = make_trial(tokenizers.Tokenizer.from_buffer(self._texts["tokenizer.json"]), facts)
        # The reference comes first and leaves only its results: its weights and a session's are never held at once.
        reference = reference_pass(
            self._checkpoint,
            self._spec,
            trial.mel,
            trial.rows,
            facts.alignment_heads,
            lambda done, total: progress("verify", done, total),
        )
        configure_threads(os.cpu_count() or 1, allow_spinning=False)
        measured, logprobs = run_graphs(graphs, self.plan.name, facts, trial)
        parity = compare_passes(reference, measured, precision, REFERENCE)
        if logprobs:
            parity.append(compare_logprobs(reference, logprobs, trial, facts, precision, REFERENCE))
        del reference
        if self.plan.num_parameters <= MAX_PARAMETERS:
            found = library_pass(self._checkpoint, self._spec, trial.mel, trial.rows)
            if found is not None:
                parity += compare_passes(found[1], measured, precision, found[0])
        return parity


def _chosen_precision(request: ExportRequest) -> Precision:
    """fp32 unless asked otherwise.

    Raises:
        ExportError: a precision or a treatment of activations that speech models do not have.
    """
    if request.precision == "int4":
        raise ExportError("int4 is for language models; speech models are built in fp32 or int8", field="--precision")
    if request.activations not in (None, "int8_rows" if request.precision == "int8" else "fp32"):
        raise ExportError("follow from the precision of a speech model; leave them out", field="--activations")
    return "int8" if request.precision == "int8" else "fp32"
