"""Decoder language models: packed steps for the CPU, paged ones for CUDA, verified by the source's weights in numpy."""

import os
from pathlib import Path

from sardonyx.repository.families import LanguageModel
from sardonyx.runtime.session import configure_threads
from sardonyx_export.builders.decoder import BuildOptions, BuildReport, build_decoder, check_options
from sardonyx_export.builders.feed import build_feed
from sardonyx_export.built import Built
from sardonyx_export.checkpoint import Checkpoint
from sardonyx_export.families.llm import read_spec
from sardonyx_export.kv_ranges import KvRange
from sardonyx_export.plan import PAGED_NOTE, make_plan
from sardonyx_export.recipes.recipe import Progress
from sardonyx_export.request import ExportRequest
from sardonyx_export.special_tokens import load_tokenizer, read_special_tokens
from sardonyx_export.stages.calibration import calibration_prompts, measure_ranges
from sardonyx_export.stages.paged_verify import run_paged_graph
from sardonyx_export.stages.reference import Array, reference_logits
from sardonyx_export.stages.verify import compare, make_prompts, run_graph


class LanguageModelRecipe:
    """A `recipe.Recipe`.

    Args:
        checkpoint: of a decoder.
        name: of the model.
        request: precision, activations, positions and target.

    Raises:
        ExportError: they do not go together.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, request: ExportRequest) -> None:
        self._checkpoint = checkpoint
        self.plan = make_plan(
            checkpoint,
            name=name,
            precision=request.precision,
            activations=request.activations,
            max_model_len=request.max_model_len,
            target=request.target,
            kv_cache_dtype=request.kv_cache_dtype,
        )
        self._options = BuildOptions(
            precision=self.plan.precision,
            activations=self.plan.activations,
            max_model_len=self.plan.max_model_len,
            target=self.plan.target,
            kv_cache_dtype=self.plan.kv_cache_dtype,
        )
        check_options(self._options)

    def build(self, folder: Path, progress: Progress) -> Built:
        """See `recipe.Recipe`."""
        checkpoint, plan = self._checkpoint, self.plan
        spec = read_spec(checkpoint.config, max_model_len=plan.max_model_len)
        tokenizer = load_tokenizer(checkpoint)
        special = read_special_tokens(checkpoint, tokenizer, vocab_size=spec.vocab_size)
        prompts = make_prompts(tokenizer, vocab_size=spec.vocab_size, max_model_len=spec.max_model_len)
        ranges: list[KvRange] = []
        if plan.kv_cache_dtype is not None:
            ranges = measure_ranges(
                checkpoint,
                spec,
                calibration_prompts(tokenizer, vocab_size=spec.vocab_size, max_model_len=spec.max_model_len),
                lambda done, total: progress("calibrate", done, total),
            )
        report = build_decoder(
            checkpoint,
            folder,
            self._options,
            lambda done, total: progress("build", done, total),
            kv_ranges=ranges,
        )
        llm = LanguageModel(
            vocab_size=report.vocab_size,
            max_model_len=report.max_model_len,
            kv=report.kv,
            bos_token_id=special.bos,
            eos_token_ids=special.eos,
            pad_token_id=special.pad,
            add_bos_token=special.add_bos,
        )
        # The reference comes first and leaves only its logits: its weights and the session's are never held at once.
        reference = reference_logits(checkpoint, spec, prompts, lambda done, total: progress("verify", done, total))
        measured = self._run(report, llm, prompts)
        graphs = {"decoder": report.files}
        if plan.target == "cuda":
            graphs |= {"sampler": report.sampler, "feed": build_feed(folder)}
        note = PAGED_NOTE if plan.target == "cuda" else ""
        return Built(
            family="llm",
            architecture=plan.architecture,
            precision=plan.precision,
            activations=report.activations,
            graphs={role: [file.name for file in files] for role, files in graphs.items()},
            texts=checkpoint.texts(),
            weights=report.weights,
            llm=llm,
            parity=[
                compare(
                    reference,
                    measured,
                    plan.precision,
                    report.activations,
                    note=note,
                    kv_cache_dtype=plan.kv_cache_dtype,
                )
            ],
        )

    def _run(self, report: BuildReport, llm: LanguageModel, prompts: list[list[int]]) -> list[Array]:
        if self.plan.target == "cuda":
            return run_paged_graph(report.files[0], llm, prompts)
        configure_threads(os.cpu_count() or 1, allow_spinning=False)
        return run_graph(report.files[0], self.plan.name, llm, prompts)
