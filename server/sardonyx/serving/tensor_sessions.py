"""The sessions of a tensor model: how many there are, on which devices, with how many threads.

Floor 4. ONNX Runtime lets several threads run one session at once, so instances of one device share theirs; Triton's
backend opens one an instance, and gives each all cores.
"""

from dataclasses import replace
from pathlib import Path

from sardonyx.repository.accelerators import GPU_PROVIDERS, PATH_OPTIONS, ProviderChoice
from sardonyx.repository.tensor_config import TensorConfig
from sardonyx.runtime.providers import ExecutionProvider, execution_provider
from sardonyx.runtime.session import Session, SessionConfig
from sardonyx.serving.engines import Engines, GraphPlace

MAX_WIDE_BYTES = 256 << 20
"""Of a graph and its external data that may be in memory twice for the sake of a lone request's latency."""


class SessionOpener:
    """Opens the sessions of one version.

    Instances on the CPU divide the threads: with all of them for each, runs at the same time wait for each other at
    every operator. MiniLM in int8, 32 tokens a row, two runs of four rows at a time on two cores: 268 rows a second
    with a thread each, 239 with two each, and 226 with one instance of two threads (median of 4 turns). Alone it takes
    nearly twice as long with one thread, so there is a session with all threads for such runs (`open_wide`).

    Args:
        engines: opens the sessions.
        place: the graph.
        folder: the model's.
        placement: instances, providers and options.
        num_threads: of the process's models.
        is_strict: the model insists on a card; see `SessionConfig.is_strict`.
    """

    def __init__(
        self,
        engines: Engines,
        place: GraphPlace,
        folder: Path,
        placement: TensorConfig,
        num_threads: int,
        *,
        is_strict: bool = False,
    ) -> None:
        self._engines = engines
        self._place = place
        self._path = place.path
        self._is_strict = is_strict
        self._folder = folder
        self._placement = placement
        self._num_threads = num_threads
        self._num_on_cpu = sum(instance.gpu is None for instance in placement.instances)

    def open_all(self) -> list[Session]:
        """The session of each instance.

        Raises:
            ConfigError: as `open_session`.
        """
        opened: dict[int | None, Session] = {}
        for instance in self._placement.instances:
            if instance.gpu not in opened:
                opened[instance.gpu] = self._open(instance.gpu, self._num_threads // max(1, self._num_on_cpu))
        return [opened[instance.gpu] for instance in self._placement.instances]

    def open_wide(self) -> Session | None:
        """A session with all threads for runs that are alone; ``None`` where it would be no other, or too large.

        Raises:
            ConfigError: as `open_session`.
        """
        is_divided = self._num_on_cpu > 1 and self._num_threads > 1
        if not is_divided or self._num_on_cpu < len(self._placement.instances):
            return None
        if self._placement.session.num_intra_op_threads is not None:  # the operator's own division
            return None
        if sum(file.stat().st_size for file in self._path.parent.rglob("*") if file.is_file()) > MAX_WIDE_BYTES:
            return None
        return self._open(None, self._num_threads)

    def _open(self, gpu: int | None, num_threads: int) -> Session:
        config = _session_config(self._placement, gpu, self._folder, max(1, num_threads))
        return self._engines.open(self._place, replace(config, is_strict=self._is_strict and gpu is not None))


def _session_config(placement: TensorConfig, gpu: int | None, folder: Path, num_threads: int) -> SessionConfig:
    parameters = placement.session
    given = SessionConfig()
    return SessionConfig(
        providers=tuple(open_providers(placement.providers, gpu, folder)),
        num_threads=parameters.num_intra_op_threads or (num_threads if gpu is None else None),
        num_parallel_threads=parameters.num_inter_op_threads,
        is_parallel=parameters.is_parallel,
        enable_arena=given.enable_arena if parameters.enable_arena is None else parameters.enable_arena,
        enable_mem_pattern=(
            given.enable_mem_pattern if parameters.enable_mem_pattern is None else parameters.enable_mem_pattern
        ),
        graph_level=placement.graph_level,
        session_entries=parameters.session_entries,
        run_entries=parameters.run_entries,
    )


def open_providers(choices: list[ProviderChoice], gpu: int | None, folder: Path) -> list[ExecutionProvider]:
    """Execution providers of a session on a card, or on the CPU, which is always the last.

    Args:
        choices: of the model's config.
        gpu: number of the card.
        folder: the model's, where paths begin.

    Raises:
        ConfigError: the installed ONNX Runtime was built without one.
    """
    chosen = []
    for choice in choices:
        on_gpu = choice.name in GPU_PROVIDERS
        if on_gpu and gpu is None:
            continue
        # Otherwise ONNX Runtime would take relative paths from the working directory.
        options = {key: str(folder / value) if key in PATH_OPTIONS else value for key, value in choice.options.items()}
        chosen.append(execution_provider(choice.name, {**options, "device_id": str(gpu)} if on_gpu else options))
    if not any(each.name == "cpu" for each in chosen):
        chosen.append(execution_provider("cpu"))
    return chosen
