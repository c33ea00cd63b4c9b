"""A version that was published without being built."""

from pathlib import Path

from sardonyx.repository.families import KvLayout, LanguageModel
from sardonyx.repository.layout import Repository
from sardonyx.repository.manifest import Parity
from sardonyx_export.built import Built
from sardonyx_export.plan import make_plan
from sardonyx_export.sources.resolve import OpenSource
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder
from sardonyx_export.stages.publish import config_text, write_version

_LLM = LanguageModel(
    vocab_size=300,
    max_model_len=256,
    kv=KvLayout(num_layers=2, num_kv_heads=2, head_size=16),
    eos_token_ids=[2],
)
PARITY = Parity(
    reference="r", max_abs_error=0.0, mean_kl=0.0, top1_agreement=1.0, num_positions=1, tolerance="none needed"
)


def publish(root: Path, source: Path, content: bytes) -> int:
    """Publish a version whose graph is `content`, as the pipeline does after it has built and verified one."""
    checkpoint = SafetensorsFolder(source, uri="tiny")
    opened = OpenSource(path=source, uri="tiny", name="tiny", checkpoint=checkpoint, licence=checkpoint.licence)
    plan = make_plan(checkpoint, name="tiny")
    built = Built(
        family="llm",
        architecture=plan.architecture,
        precision=plan.precision,
        graphs={"decoder": ["model.onnx", "model.onnx.data"]},
        texts=checkpoint.texts(),
        weights="F32 -> int8",
        llm=_LLM,
        parity=[PARITY],
    )
    repository = Repository(root)
    with repository.staging("tiny") as folder:
        (folder / "model.onnx").write_bytes(content)
        (folder / "model.onnx.data").write_bytes(content * 100)
        write_version(folder, opened, plan, built)
        return repository.publish("tiny", folder, config_text(plan, built))
