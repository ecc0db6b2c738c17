"""Loading a CLIP: any size, any form, with the activation that its weights were trained with, or an error that says why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from hdovd.errors import HdovdError
from hdovd.pipelines import clip_teacher
from hdovd.pipelines.clip_teacher import load_clip
from hdovd.pipelines.device import pick_device
from hdovd.pipelines.extract_config import Activation, Precision

SaveClip = Callable[..., str]


def _noise(size: tuple[int, int] = (50, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8))


def _activations(model: torch.nn.Module) -> set[str]:
    return {type(m).__name__ for m in model.modules()} & {"QuickGELU", "GELU"}


# --- sizes and preprocessing ---

@pytest.mark.parametrize(("embed_dim", "image_size"), [(24, 32), (40, 64), (8, 16)])
def test_any_embedding_size_and_resolution(tmp_path: Path, save_clip: SaveClip, embed_dim: int, image_size: int) -> None:
    teacher = load_clip(save_clip(tmp_path / "clip", embed_dim=embed_dim, image_size=image_size), None, device="cpu")
    assert teacher.dim == embed_dim
    pixels = teacher.pixels(_noise())
    assert pixels.shape == (3, image_size, image_size)
    for rows in (teacher.embed_images(pixels[None]), teacher.embed_names(["cat"], ["a {}"])):
        assert rows.shape == (1, embed_dim)
        assert rows.dtype == np.float32
        assert np.linalg.norm(rows) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("changes", [{"resize_mode": "squash"}, {"resize_mode": "shortest"}, {"resize_mode": "longest", "fill_color": 7},
                                     {"interpolation": "bilinear"}, {"mean": [0.1, 0.2, 0.3]}], ids=str)
def test_preprocessing_is_the_models_own(tmp_path: Path, save_clip: SaveClip, changes: dict[str, Any]) -> None:
    name = save_clip(tmp_path / "clip", preprocess=changes)
    teacher = load_clip(name, None, device="cpu")
    _, _, preprocess = open_clip.create_model_and_transforms(name)
    assert torch.equal(teacher.pixels(_noise()), preprocess(_noise()))
    for key, value in changes.items():
        assert teacher.identity["preprocessing"][key] == value


def test_weights_are_frozen_and_in_eval_mode(clip: str) -> None:
    model = load_clip(clip, None, device="cpu").model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_many_names_are_embedded_alike_in_any_batch(clip: str) -> None:
    teacher = load_clip(clip, None, device="cpu")
    names = [f"thing {k}" for k in range(150)]
    together = teacher.embed_names(names, ("a {}", "the {}"))  # 300 texts: more than one batch
    alone = np.concatenate([teacher.embed_names([n], ("a {}", "the {}")) for n in names[::37]])
    np.testing.assert_allclose(together[::37], alone, atol=1e-5)


# --- activation ---

@pytest.mark.parametrize(("quick", "found"), [(True, "quickgelu"), (False, "gelu"), (None, "gelu")])
def test_activation_of_a_local_dir_is_its_configs(tmp_path: Path, save_clip: SaveClip, quick: bool | None, found: str) -> None:
    teacher = load_clip(save_clip(tmp_path / "clip", quick_gelu=quick), None, device="cpu")
    assert teacher.identity["activation"] == found
    assert _activations(teacher.model) == {"QuickGELU" if found == "quickgelu" else "GELU"}
    assert any(found in note for note in teacher.notes)


def test_activation_changes_embeddings_and_can_be_forced(tmp_path: Path, save_clip: SaveClip) -> None:
    quick, plain = save_clip(tmp_path / "quick", quick_gelu=True), save_clip(tmp_path / "plain", quick_gelu=False)
    rows = {}
    for name, wanted in ((quick, Activation.AUTO), (plain, Activation.AUTO), (quick, Activation.GELU), (plain, Activation.QUICK_GELU)):
        teacher = load_clip(name, None, device="cpu", activation=wanted)
        rows[name, wanted] = teacher.embed_images(teacher.pixels(_noise())[None])
        if wanted is not Activation.AUTO:
            assert teacher.identity["activation"] == str(wanted)
            assert _activations(teacher.model) == {"QuickGELU" if wanted is Activation.QUICK_GELU else "GELU"}
    assert (rows[quick, Activation.AUTO] * rows[plain, Activation.AUTO]).sum() < 0.99999  # the weights are the same
    np.testing.assert_array_equal(rows[quick, Activation.GELU], rows[plain, Activation.AUTO])
    np.testing.assert_array_equal(rows[plain, Activation.QUICK_GELU], rows[quick, Activation.AUTO])


@pytest.mark.parametrize(("model", "tag", "quick"), [
    ("ViT-B-32", "openai", True),
    ("ViT-B-32-quickgelu", "openai", True),
    ("ViT-B-32", "laion2b_s34b_b79k", False),
    ("ViT-B-32", "laion400m_e32", True),
    ("RN50", "openai", True),
    ("ViT-B-16", "dfn2b", True),
    ("roberta-ViT-B-32", "laion2b_s12b_b32k", True),  # its config says so, its tag says nothing
])
def test_activation_of_a_tag_is_what_it_was_trained_with(model: str, tag: str, quick: bool) -> None:
    config = open_clip.get_model_config(model)
    found, notes = clip_teacher._activation(model, tag, config, Activation.AUTO)
    assert found is quick
    assert len(notes) == 1


# --- a built-in name and a file ---

@pytest.fixture
def built_in(tmp_path: Path, save_clip: SaveClip) -> Iterator[tuple[str, Path]]:
    """A tiny CLIP as a built-in model name `tiny-test-clip`, and the folder of its local-dir form with GELU."""
    save_clip(tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-test-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-test-clip.json")
    yield "tiny-test-clip", tmp_path / "clip"
    open_clip.factory._MODEL_CONFIG_PATHS.remove(tmp_path / "tiny-test-clip.json")
    open_clip.factory._MODEL_CONFIGS.pop("tiny-test-clip")


def test_checkpoint_file_gives_the_same_weights(built_in: tuple[str, Path]) -> None:
    name, folder = built_in
    from_file = load_clip(name, str(folder / "open_clip_model.safetensors"), device="cpu")
    local = load_clip(f"local-dir:{folder}", None, device="cpu")
    assert from_file.identity["weights_sha256"] == local.identity["weights_sha256"]
    assert from_file.identity["activation"] == "gelu"
    assert any("--activation" in note for note in from_file.notes)  # the file does not say: the user must hear of it


class _Node(torch.nn.Module):
    """A part of a module tree that only holds weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _openai_archive(state: dict[str, torch.Tensor], file: Path) -> None:
    """Save weights as OpenAI published theirs: a TorchScript archive, float16, with three numbers beside the weights."""
    root = _Node()
    numbers = {name: torch.tensor(16) for name in ("input_resolution", "vocab_size", "context_length")}
    for name, value in (state | numbers).items():
        *parents, leaf = name.split(".")
        node = root
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, _Node())
            node = getattr(node, parent)
        node.register_buffer(leaf, value.half() if value.is_floating_point() else value)
    torch.jit.script(root).save(str(file))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_archive_is_taken_as_openais(built_in: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = built_in
    state = open_clip.create_model(f"local-dir:{folder}").state_dict()
    _openai_archive(state, tmp_path / "archive.pt")
    teacher = load_clip(name, str(tmp_path / "archive.pt"), device="cpu")
    assert teacher.identity["activation"] == "quickgelu"
    assert _activations(teacher.model) == {"QuickGELU"}
    for key, value in state.items():
        assert torch.equal(teacher.model.state_dict()[key], value.half().float()), key


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_archive_of_another_architecture_is_refused(built_in: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = built_in
    state = open_clip.create_model(f"local-dir:{folder}").state_dict()
    del state["visual.conv1.weight"]
    _openai_archive(state, tmp_path / "archive.pt")
    with pytest.raises(HdovdError, match=r"visual\.conv1\.weight"):
        load_clip(name, str(tmp_path / "archive.pt"), device="cpu")


def test_plain_checkpoint_is_no_torchscript(tmp_path: Path, save_clip: SaveClip) -> None:
    save_clip(tmp_path / "clip", form="bin")
    assert not clip_teacher._is_torchscript(str(tmp_path / "clip" / "open_clip_pytorch_model.bin"))
    assert not clip_teacher._is_torchscript(None)
    assert not clip_teacher._is_torchscript(str(tmp_path / "none"))


# --- identity ---

def test_weights_hash_is_the_same_for_every_file_format(tmp_path: Path, save_clip: SaveClip) -> None:
    names = [save_clip(tmp_path / form, form=form) for form in ("safetensors", "bin")]
    one, other = (load_clip(name, None, device="cpu").identity for name in names)
    assert one == other


def test_identity_tells_weights_apart(tmp_path: Path, save_clip: SaveClip) -> None:
    one, other = (load_clip(save_clip(tmp_path / str(seed), seed=seed), None, device="cpu").identity for seed in (0, 1))
    assert {key for key in one if one[key] != other[key]} == {"weights_sha256"}


def test_identity_is_plain_values(clip: str) -> None:
    identity = load_clip(clip, None, device="cpu").identity
    assert json.loads(json.dumps(identity)) == identity


# --- errors ---

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
    with pytest.raises(HdovdError, match=r"no open_clip config|cannot be loaded"):
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
    """Put a repository with some of the files of `clip` into a Hugging Face cache, without a network; returns its `hf-hub:` name."""
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
    identity = load_clip(hub("open_clip_config.json", "open_clip_model.safetensors"), None, device="cpu").identity
    assert identity["weights_sha256"] == load_clip(clip, None, device="cpu").identity["weights_sha256"]
    assert identity["name"] == "hf-hub:someone/tiny-clip"


def test_hub_model_whose_weights_are_out_of_reach_is_refused_not_random(hub: Callable[..., str]) -> None:
    """open_clip only warns, and goes on with random weights."""
    with pytest.raises(HdovdError, match="hf-hub:someone/tiny-clip"):
        load_clip(hub("open_clip_config.json"), None, device="cpu")


def test_hub_model_out_of_reach_names_the_way_out(hub: Callable[..., str]) -> None:
    with pytest.raises(HdovdError, match="local-dir:PATH"):
        load_clip(hub(), None, device="cpu")
