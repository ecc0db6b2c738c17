"""A CLIP that cannot be had, or that is not what it is said to be, is an error that names the way out; never random
weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hdovd.core import HdovdError
from hdovd.pipelines.common.device import pick_device
from hdovd.pipelines.common.options import Precision
from hdovd.pipelines.teachers.openclip import load_clip

SaveClip = Callable[..., str]


def test_built_in_name_without_pretrained() -> None:
    with pytest.raises(HdovdError, match=r"needs --pretrained.*laion2b_s34b_b79k"):
        load_clip("ViT-B-32", None)


def test_unknown_tag_lists_the_tags() -> None:
    with pytest.raises(HdovdError, match=r"neither a file nor a tag of ViT-B-32.*laion2b_s34b_b79k"):
        load_clip("ViT-B-32", "laion3b")


def test_unknown_model() -> None:
    with pytest.raises(HdovdError, match=r"ViT-Q-99.*list_models"):
        load_clip("ViT-Q-99", "openai")


def test_weights_beside_a_local_dir_are_refused(clip: str) -> None:
    """open_clip would ignore them."""
    with pytest.raises(HdovdError, match="--pretrained goes with a model name"):
        load_clip(clip, "openai")


def test_missing_local_dir(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"open_clip_config.json"):
        load_clip(f"local-dir:{tmp_path / 'none'}", None)


def test_local_dir_without_weights(tmp_path: Path, clip: str) -> None:
    shutil.copy(Path(clip.removeprefix("local-dir:")) / "open_clip_config.json", tmp_path)
    with pytest.raises(HdovdError, match="no weights"):
        load_clip(f"local-dir:{tmp_path}", None)


@pytest.mark.parametrize("content", ["{}", "not json", "[]"])
def test_local_dir_with_a_config_that_is_none(tmp_path: Path, clip: str, content: str) -> None:
    shutil.copytree(clip.removeprefix("local-dir:"), tmp_path / "clip")
    (tmp_path / "clip" / "open_clip_config.json").write_text(content)
    with pytest.raises(HdovdError, match=r"no open_clip config|cannot be loaded|config\.json is not valid JSON"):
        load_clip(f"local-dir:{tmp_path / 'clip'}", None)


def test_weights_of_another_architecture(tmp_path: Path, save_clip: SaveClip) -> None:
    save_clip(tmp_path / "one", embed_dim=24)
    save_clip(tmp_path / "other", embed_dim=16)
    shutil.copy(tmp_path / "other" / "open_clip_model.safetensors", tmp_path / "one")
    with pytest.raises(HdovdError, match="cannot be loaded"):
        load_clip(f"local-dir:{tmp_path / 'one'}", None)


def test_cut_off_weights(tmp_path: Path, clip: str) -> None:
    shutil.copytree(clip.removeprefix("local-dir:"), tmp_path / "clip")
    file = tmp_path / "clip" / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(HdovdError, match="cannot be loaded"):
        load_clip(f"local-dir:{tmp_path / 'clip'}", None)


def test_fp16_without_a_gpu(clip: str) -> None:
    with pytest.raises(HdovdError, match="fp16"):
        load_clip(clip, None, device="cpu", precision=Precision.FP16)


def test_unknown_device() -> None:
    with pytest.raises(HdovdError, match="banana"):
        pick_device("banana")


@pytest.fixture
def hub(tmp_path: Path, clip: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Put a repository with some of the files of `clip` into a Hugging Face cache, without a network; returns its
    `hf-hub:` name.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def fill(*files: str) -> str:
        repository = tmp_path / "hub" / "models--someone--tiny-clip"
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        for file in files:
            shutil.copy(Path(clip.removeprefix("local-dir:")) / file, snapshot / file)
        return "hf-hub:someone/tiny-clip"

    return fill


def test_hub_model_in_the_users_cache(hub: Callable[..., str], clip: str) -> None:
    teacher = load_clip(hub("open_clip_config.json", "open_clip_model.safetensors"), None, device="cpu")
    local = load_clip(clip, None, device="cpu")
    assert teacher.identity == local.identity
    assert teacher.preprocessing == local.preprocessing
    assert teacher.hash_prompts(["cat"], ["a {}"]) == local.hash_prompts(["cat"], ["a {}"])
    assert teacher.made_with["clip"] == "hf-hub:someone/tiny-clip"


def test_hub_model_whose_weights_are_out_of_reach_is_refused_not_random(hub: Callable[..., str]) -> None:
    """open_clip only warns, and goes on with random weights."""
    with pytest.raises(HdovdError, match="hf-hub:someone/tiny-clip"):
        load_clip(hub("open_clip_config.json"), None, device="cpu")


def test_hub_model_out_of_reach_names_the_way_out(hub: Callable[..., str]) -> None:
    with pytest.raises(HdovdError, match="local-dir:PATH"):
        load_clip(hub(), None, device="cpu")
