"""Files of a pipeline's weights: which are taken, and which are never opened."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sardonyx_export.errors import ExportError
from sardonyx_export.sources.pipeline_folder import read_weights

STEM = "diffusion_pytorch_model"


def write(path: Path, name: str = "a", dtype: type = np.float32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.zeros((2, 3), dtype)}, path)


def test_the_plain_file_wins_over_its_half(tmp_path: Path) -> None:
    write(tmp_path / "unet" / f"{STEM}.safetensors")
    write(tmp_path / "unet" / f"{STEM}.fp16.safetensors", dtype=np.float16)
    found = read_weights(tmp_path, {"unet": STEM})["unet"]
    assert (found.variant, found.storage) == (None, {"F32": 6})


def test_a_file_in_half_precision_is_taken_where_there_is_no_other(tmp_path: Path) -> None:
    write(tmp_path / "unet" / f"{STEM}.fp16.safetensors", dtype=np.float16)
    found = read_weights(tmp_path, {"unet": STEM})["unet"]
    assert (found.variant, found.storage) == ("fp16", {"F16": 6})


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_counted_together(tmp_path: Path, variant: str | None) -> None:
    for number in (1, 2):
        write(tmp_path / "unet" / f"s{number}.safetensors", str(number))
    suffix = "" if variant is None else ".fp16"
    index = {"weight_map": {"1": "s1.safetensors", "2": "s2.safetensors"}}
    (tmp_path / "unet" / f"{STEM}.safetensors.index{suffix}.json").write_text(json.dumps(index))
    found = read_weights(tmp_path, {"unet": STEM})["unet"]
    assert (found.variant, found.storage) == (variant, {"F32": 12})


@pytest.mark.parametrize("weight_map", [{}, [], {"1": "../s.safetensors"}, {"1": "s.bin"}])
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, weight_map: object) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ExportError, match="names no safetensors files"):
        read_weights(tmp_path, {"unet": STEM})


@pytest.mark.parametrize("name", [f"{STEM}.bin", "model.ckpt", "model.pt"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / name).write_bytes(b"\x80\x04")
    with pytest.raises(ExportError, match="pickled weights, which are never opened"):
        read_weights(tmp_path, {"unet": STEM})


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"unet/{STEM}.safetensors"):
        read_weights(tmp_path, {"unet": STEM})


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "outside.safetensors")
    (tmp_path / "m" / "unet").mkdir(parents=True)
    (tmp_path / "m" / "unet" / f"{STEM}.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(ExportError, match="leaves the model's folder"):
        read_weights(tmp_path / "m", {"unet": STEM})
