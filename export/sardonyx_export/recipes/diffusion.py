"""Pipelines of diffusers: each part traced into a graph, verified by itself, and all of them by a picture."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from sardonyx.repository.manifest import Parity
from sardonyx.runtime.session import configure_threads
from sardonyx_export.built import Built
from sardonyx_export.errors import ExportError
from sardonyx_export.families.diffusion import SCHEDULER_FILE, read_diffusion_spec
from sardonyx_export.plan import CHECK_NOTE, Plan, Precision
from sardonyx_export.recipes.recipe import Progress
from sardonyx_export.request import ExportRequest, lora_words
from sardonyx_export.sources.model_folder import ModelFolder
from sardonyx_export.sources.pipeline_folder import read_weights
from sardonyx_export.sources.resolve import OpenSource

_BYTES_PER_WEIGHT = {"fp32": 4, "fp16": 2}


class DiffusionRecipe:
    """A `recipe.Recipe`.

    Args:
        opened: a folder with a pipeline.
        name: of the model.
        request: its precision, and what to merge into the weights.

    Raises:
        ExportError: an option does not suit it, or the pipeline is not one that is built.
    """

    def __init__(self, opened: OpenSource, name: str, request: ExportRequest) -> None:
        if request.max_model_len is not None:
            raise ExportError(
                "follows from the text encoders of diffusion models; leave it out", field="--max-model-len"
            )
        if request.activations is not None:
            raise ExportError("follow from the precision of a diffusion model; leave them out", field="--activations")
        if request.precision not in ("auto", "fp32", "fp16"):
            raise ExportError(
                f"{request.precision} is not for diffusion models; fp32 and fp16 are", field="--precision"
            )
        self._path = opened.path
        self._loras = request.loras
        self._spec = read_diffusion_spec(ModelFolder(opened.path))
        self._weights = read_weights(opened.path, self._spec.components)
        storage: Counter[str] = Counter()
        for part in self._weights.values():
            storage.update(part.storage)
        is_half = request.precision == "fp16" or (request.precision == "auto" and request.target == "cuda")
        precision: Precision = "fp16" if is_half else "fp32"
        self.plan = Plan(
            name=name,
            family="diffusion",
            architecture=self._spec.pipeline,
            precision=precision,
            activations=None,
            max_model_len=None,
            target=request.target,
            num_parameters=storage.total(),
            storage=dict(storage.most_common()),
            # Above 2 GB a graph lies on the disk twice for a while.
            estimated_bytes=storage.total() * _BYTES_PER_WEIGHT[precision] * 2,
        )

    def build(self, folder: Path, progress: Progress) -> Built:
        """See `recipe.Recipe`."""
        # Imported here: torch takes seconds, and is needed by this way only.
        from sardonyx_export import traced_diffusion
        from sardonyx_export.lora import merge_lora
        from sardonyx_export.stages import diffusion_verify
        from sardonyx_export.stages.diffusion_preview import fit_preview

        configure_threads(os.cpu_count() or 1, allow_spinning=False)
        tokenizers = traced_diffusion.load_tokenizers(self._path, self._spec)
        texts = {file: traced_diffusion.tokenizer_json(each) for file, each in tokenizers.items()}
        texts[SCHEDULER_FILE] = self._spec.scheduler
        encoders = [
            replace(encoder, pad_token_id=tokenizers[encoder.tokenizer].pad_token_id)
            for encoder in self._spec.facts.encoders
        ]
        facts = replace(self._spec.facts, encoders=encoders)
        spec = replace(self._spec, facts=facts)
        components = traced_diffusion.load_components(self._path, spec, self._weights, tokenizers)
        for lora in self._loras:
            merge_lora(components, lora)
        reference = traced_diffusion.library_name()
        if self.plan.target == "cuda":
            reference = f"{CHECK_NOTE}: {reference}"
        picture = diffusion_verify.library_picture(components, spec)
        facts = replace(facts, preview=fit_preview(components, spec))
        roles = [*(encoder.graph for encoder in encoders), "unet", "vae_encoder", "vae_decoder"]
        # Before any export, since a part that goes to half precision stays there.
        trials = {role: diffusion_verify.make_trials(role, components, spec) for role in roles}
        graphs: dict[str, list[str]] = {}
        parity: list[Parity] = []
        paths: dict[str, Path] = {}
        for number, role in enumerate(roles):
            progress("build", number, len(roles))
            precision = self._precision_of(role)
            graphs[role] = traced_diffusion.export_component(
                role, components, spec, folder, precision, self.plan.target
            )
            paths[role] = folder / graphs[role][0]
            if self.plan.target == "cuda":
                inputs = [trial.inputs for trial in trials[role]]
                paths[role] = self._settle(paths[role], inputs)
            parity.append(diffusion_verify.compare_part(role, paths[role], trials[role], precision, reference))
        progress("build", len(roles), len(roles))
        del components
        parity.append(diffusion_verify.compare_picture(picture, paths, texts, spec, self.plan.precision, reference))
        if self.plan.target == "cuda":
            for path in paths.values():
                path.unlink()
        return Built(
            family="diffusion",
            architecture=self.plan.architecture,
            precision=self.plan.precision,
            activations="fp16" if self.plan.target == "cuda" and self.plan.precision == "fp16" else "fp32",
            graphs=graphs,
            texts=texts,
            weights=self._describe(),
            diffusion=facts,
            parity=parity,
        )

    def _settle(self, path: Path, inputs: list[dict[str, Any]]) -> Path:
        """Finish a graph for CUDA, and return one that the CPU can run."""
        from sardonyx_export.traced_cuda import write_check_graph
        from sardonyx_export.traced_shapes import settle_shapes

        settle_shapes(path, write_check_graph(path), inputs)
        return write_check_graph(path)

    def _precision_of(self, role: str) -> Precision:
        return "fp32" if role.startswith("vae") and self._spec.keeps_vae_in_float32 else self.plan.precision

    def _describe(self) -> str:
        """For the manifest."""
        made = {"fp32": "float32", "fp16": "float16"}[self.plan.precision]
        text = f"{', '.join(self.plan.storage)} → {made}"
        if self.plan.precision == "fp16" and self._spec.keeps_vae_in_float32:
            text += ", VAE float32"
        text += "; traced by torch"
        if self._spec.has_safety_checker:
            text += "; the source's safety checker is not part of it"
        return text + lora_words(self._loras)
