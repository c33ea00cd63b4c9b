"""Encoders whose graph another exporter makes or made: padded inputs, and for embeddings a head of ours behind it."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sardonyx.repository.families import Embeddings, Encoder, Labels
from sardonyx.repository.manifest import Parity
from sardonyx.runtime.session import configure_threads
from sardonyx_export.builders.head import build_head
from sardonyx_export.built import Built, PaddedGraph
from sardonyx_export.encoder_spec import Array, Head
from sardonyx_export.errors import ExportError
from sardonyx_export.families.sentence_transformers import SentenceLayout, read_layout
from sardonyx_export.plan import FAMILY_OF_TASK, Plan, Task
from sardonyx_export.recipes.recipe import Progress
from sardonyx_export.recipes.text_encoder import encoder_texts
from sardonyx_export.request import ExportRequest
from sardonyx_export.sources.model_folder import ModelFolder
from sardonyx_export.sources.onnx_folder import find_graph, import_graph
from sardonyx_export.sources.resolve import OpenSource
from sardonyx_export.sources.texts import MAX_TOKENIZER_BYTES
from sardonyx_export.stages import library_reference
from sardonyx_export.stages.encoder_reference import EncodedRow
from sardonyx_export.stages.encoder_rows import Rows
from sardonyx_export.stages.encoder_verify import compare_embeddings, compare_scores, run_graph

HEAD_FILE = "head.onnx"
_NO_LIMIT = 1_000_000
"""tokenizer_config.json says a number of thirty digits where there is no limit."""
_DEFAULT_MAX_MODEL_LEN = 512


class PaddedEncoderRecipe:
    """A `recipe.Recipe`.

    Args:
        opened: a source with weights that transformers loads, or with a ready graph.
        name: of the model.
        request: tokens, pooling, and which graph.
        task: embeddings, reranker or classifier.
        is_ready: there is a graph to import; else transformers' exporter makes one.
    """

    def __init__(self, opened: OpenSource, name: str, request: ExportRequest, task: Task, *, is_ready: bool) -> None:
        if request.precision not in ("auto", "fp32") and not is_ready:
            raise ExportError(
                "this architecture goes through transformers' exporter, which makes fp32 only", field="--precision"
            )
        if request.target != "cpu":
            raise ExportError(
                "this graph is another exporter's, in fp32, and the same wherever it runs; leave the target out",
                field="--target",
            )
        self._path = opened.path
        self._folder = ModelFolder(opened.path if opened.path.is_dir() else opened.path.parent)
        self._is_as_published = request.pooling is None
        self._graph = find_graph(opened.path, request.file) if is_ready else None
        self._config = self._folder.object("config.json")
        self._task = task
        self._layout: SentenceLayout | None = None
        if task == "embeddings":
            self._layout = read_layout(self._folder, self._config, request.pooling)
        self._texts = self._read_texts(request.tokenizer)
        self._max_model_len = request.max_model_len or self._limit()
        architectures = self._config.get("architectures") or ["ONNX"]
        self.plan = Plan(
            name=name,
            family=FAMILY_OF_TASK[task],
            architecture=str(architectures[0]),
            precision="fp32",
            activations=None,
            max_model_len=self._max_model_len,
            num_parameters=self._num_bytes() // 4,
            storage={"ONNX" if is_ready else "safetensors": 1},
            estimated_bytes=self._num_bytes(),
        )

    def _num_bytes(self) -> int:
        if self._graph is not None:
            return sum(file.stat().st_size for file in self._graph.parent.glob(f"{self._graph.name}*"))
        return sum(file.stat().st_size for file in self._path.glob("*.safetensors"))

    def _read_texts(self, given: Path | None) -> dict[str, bytes]:
        tokenizer = self._folder.read("tokenizer.json", max_bytes=MAX_TOKENIZER_BYTES)
        if given is not None:
            tokenizer = ModelFolder(given.parent).read(given.name, max_bytes=MAX_TOKENIZER_BYTES)
        if tokenizer is None:
            raise ExportError("is missing; name one with --tokenizer", file="tokenizer.json")
        texts = {"tokenizer.json": tokenizer}
        if (said := self._folder.read("tokenizer_config.json")) is not None:
            texts["tokenizer_config.json"] = said
        return encoder_texts(texts, lowercases=self._layout is not None and self._layout.lowercases)

    def _limit(self) -> int:
        """Tokens of a text: the least of what the files say."""
        padding = self._config.get("pad_token_id") or 0
        positions = self._config.get("max_position_embeddings")
        if isinstance(positions, int) and self._config.get("model_type") in {"roberta", "xlm-roberta", "camembert"}:
            positions -= padding + 1
        said = [
            positions,
            self._folder.object("tokenizer_config.json").get("model_max_length"),
            None if self._layout is None else self._layout.max_seq_length,
        ]
        limits = [value for value in said if isinstance(value, int) and 0 < value < _NO_LIMIT]
        return min(limits, default=_DEFAULT_MAX_MODEL_LEN)

    def build(self, folder: Path, progress: Progress) -> Built:
        """See `recipe.Recipe`."""
        configure_threads(os.cpu_count() or 1, allow_spinning=False)
        graph = self._make_graph(folder)
        wanted = {"embeddings": ("tokens", "pooled")}.get(self._task, ("logits",))
        if graph.kind not in wanted:
            raise ExportError(f"the graph gives {graph.kind}; for {self._task} it needs {' or '.join(wanted)}")
        head = self._layout.head if self._layout is not None and graph.kind == "tokens" else None
        files = {"encoder": graph.files}
        if head is not None:
            files["head"] = [file.name for file in build_head(head, graph.width, folder, HEAD_FILE)]
        rows = Rows(self._texts["tokenizer.json"], max_model_len=self._max_model_len, vocab_size=self._vocab_size())
        encoder = Encoder(
            layout="padded",
            output=graph.output,
            width=graph.width if head is None else head.width(graph.width),
            vocab_size=self._vocab_size(),
            max_model_len=self._max_model_len,
            pad_token_id=self._config.get("pad_token_id") or 0,
        )
        labels = self._labels(graph.width) if graph.kind == "logits" else None
        parity, is_normalized = self._verify(folder, graph, encoder, head, labels, rows)
        return Built(
            family=self.plan.family,
            architecture=self.plan.architecture,
            precision=graph.precision,
            graphs=files,
            texts=self._texts,
            weights=graph.weights,
            encoder=encoder,
            embeddings=self._facts(head, is_normalized=is_normalized),
            labels=labels,
            parity=parity,
        )

    def _make_graph(self, folder: Path) -> PaddedGraph:
        if self._graph is not None:
            return import_graph(self._graph, folder)
        # Imported here: torch takes seconds, and is needed by this way only.
        from sardonyx_export.traced import export_traced

        assert self._task in ("embeddings", "reranker", "classifier")
        return export_traced(self._path, folder, self._task)

    def _vocab_size(self) -> int:
        size = self._config.get("vocab_size")
        if isinstance(size, int) and size > 0:
            return size
        import tokenizers

        return int(tokenizers.Tokenizer.from_buffer(self._texts["tokenizer.json"]).get_vocab_size())

    def _labels(self, width: int) -> Labels:
        named = self._config.get("id2label") or {}
        names = [str(named.get(str(index), f"LABEL_{index}")) for index in range(width)]
        if self._task == "reranker" and width != 1:
            raise ExportError(f"a reranker has one label; this model has {width}", field="--task")
        is_multi = self._config.get("problem_type") == "multi_label_classification"
        return Labels(names=names, activation="sigmoid" if width == 1 or is_multi else "softmax")

    def _facts(self, head: Head | None, *, is_normalized: bool) -> Embeddings | None:
        if self._layout is None:
            return None
        said = self._layout.embeddings
        if head is not None:
            return said
        return Embeddings(
            pooling="in the graph",
            is_normalized=is_normalized,
            similarity=said.similarity,
            matryoshka_dims=said.matryoshka_dims,
            prompts=said.prompts,
            default_prompt=said.default_prompt,
        )

    def _verify(
        self, folder: Path, graph: PaddedGraph, encoder: Encoder, head: Head | None, labels: Labels | None, rows: Rows
    ) -> tuple[list[Parity], bool]:
        """What each batch gives, against sentence-transformers or transformers, or else the graph's rows alone."""
        batches = rows.batches(are_pairs=self.plan.family == "reranker")
        head_path = None if head is None else folder / HEAD_FILE
        tried = [batch for _, _, batch in batches]
        measured = run_graph(folder / graph.files[0], head_path, self.plan.name, encoder, tried)
        name, expected = self._reference(folder, graph, encoder, head_path, batches, rows.max_tokens)
        parity = []
        for (what, _, _), wanted, actual in zip(batches, expected, measured, strict=True):
            reference = f"{name}, {what}"
            if labels is None:
                parity.append(compare_embeddings(wanted, actual, graph.precision, reference))
            else:
                parity.append(compare_scores(wanted, actual, labels, graph.precision, reference))
        lengths = np.concatenate([np.linalg.norm(values, axis=1) for values in measured])
        return parity, bool(np.allclose(lengths, 1.0, atol=1e-3))

    def _reference(
        self,
        folder: Path,
        graph: PaddedGraph,
        encoder: Encoder,
        head_path: Path | None,
        batches: Sequence[tuple[str, list[str], list[EncodedRow]]],
        max_tokens: int,
    ) -> tuple[str, list[Array]]:
        found = None
        if self._is_as_published and self._path.is_dir() and any(self._path.glob("*.safetensors")):
            if self._layout is not None:
                found = library_reference.sentence_embeddings(
                    self._path, [texts for _, texts, _ in batches], max_tokens
                )
            else:
                found = library_reference.class_logits(self._path, [batch for _, _, batch in batches])
        if found is not None:
            return found
        alone = [
            np.concatenate(
                run_graph(folder / graph.files[0], head_path, self.plan.name, encoder, [[row] for row in batch])
            )
            for _, _, batch in batches
        ]
        return "the graph itself, each text alone", alone
