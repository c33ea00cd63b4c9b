"""Whisper: encoder, decoder and aligner, verified by the source's own weights in numpy."""

import os
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import tokenizers

from sardonyx.repository.families import Whisper
from sardonyx.repository.manifest import Parity
from sardonyx.runtime.session import configure_threads
from sardonyx_export.builders.whisper import WhisperPrecision, build_whisper
from sardonyx_export.builders.whisper_aligner import Alignment
from sardonyx_export.built import Built
from sardonyx_export.checkpoint import Checkpoint, count_storage
from sardonyx_export.errors import ExportError
from sardonyx_export.families.whisper import read_whisper_spec
from sardonyx_export.families.whisper_tokens import read_whisper_facts
from sardonyx_export.plan import PAGED_NOTE, Plan
from sardonyx_export.recipes.recipe import Progress
from sardonyx_export.request import ExportRequest
from sardonyx_export.stages.verify import REFERENCE
from sardonyx_export.stages.whisper_library import MAX_PARAMETERS, library_pass
from sardonyx_export.stages.whisper_reference import WhisperPass, reference_pass
from sardonyx_export.stages.whisper_verify import (
    Trial,
    compare_logprobs,
    compare_passes,
    make_trial,
    run_graphs,
    run_in_numpy,
)

_BYTES_PER_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.1}
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
        self._precision = precision = _chosen_precision(request)
        self.plan = Plan(
            name=name,
            family="whisper",
            architecture=checkpoint.config["architectures"][0],
            precision=precision,
            activations=None,
            max_model_len=self._spec.max_model_len,
            target=request.target,
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
            precision=self._precision,
            alignment=alignment,
            progress=lambda done, total: progress("build", done, total),
        )
        if report.block_size is not None:
            datatype = "BF16" if self._precision == "bf16" else "FP16"
            kv = msgspec.structs.replace(facts.kv, datatype=datatype, block_size=report.block_size)
            facts = msgspec.structs.replace(facts, kv=kv)
        parity = self._verify({role: files[0] for role, files in report.graphs.items()}, facts, progress)
        return Built(
            family="whisper",
            architecture=plan.architecture,
            precision=plan.precision,
            activations="int8_rows" if self._precision == "int8" else self._precision,
            graphs={role: [file.name for file in files] for role, files in report.graphs.items()},
            texts=self._texts,
            weights=report.weights,
            whisper=facts,
            parity=parity,
        )

    def _verify(self, graphs: dict[str, Path], facts: Whisper, progress: Progress) -> list[Parity]:
        precision, note = self._precision, f"{PAGED_NOTE}: " if self.plan.target == "cuda" else ""
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
        measured, logprobs = self._run(graphs, facts, trial)
        parity = compare_passes(reference, measured, precision, note + REFERENCE)
        if logprobs:
            parity.append(compare_logprobs(reference, logprobs, trial, facts, precision, note + REFERENCE))
        del reference
        if self.plan.num_parameters <= MAX_PARAMETERS:
            found = library_pass(self._checkpoint, self._spec, trial.mel, trial.rows)
            if found is not None:
                parity += compare_passes(found[1], measured, precision, note + found[0])
        return parity

    def _run(
        self, graphs: dict[str, Path], facts: Whisper, trial: Trial
    ) -> tuple[WhisperPass, list[npt.NDArray[np.float32]]]:
        if self.plan.target == "cuda":
            return run_in_numpy(graphs, facts, trial)
        configure_threads(os.cpu_count() or 1, allow_spinning=False)
        return run_graphs(graphs, self.plan.name, facts, trial)


def _chosen_precision(request: ExportRequest) -> WhisperPrecision:
    """fp32, for CUDA fp16, unless asked otherwise.

    Raises:
        ExportError: a precision or a treatment of activations that speech models do not have.
    """
    chosen = request.precision
    if chosen == "auto":
        chosen = "fp16" if request.target == "cuda" else "fp32"
    if chosen == "int4":
        raise ExportError("int4 is for language models; speech models are built in fp32 or int8", field="--precision")
    if request.target == "cuda" and chosen not in ("fp16", "bf16"):
        raise ExportError(f"{chosen} is for the CPU; speech models for cuda are fp16 or bf16", field="--precision")
    if request.target == "cpu" and chosen in ("fp16", "bf16"):
        raise ExportError(
            f"{chosen} is for --target cuda; speech models for the CPU are fp32 or int8", field="--precision"
        )
    if request.activations not in (None, "int8_rows" if chosen == "int8" else chosen):
        raise ExportError("follow from the precision of a speech model; leave them out", field="--activations")
    return chosen
