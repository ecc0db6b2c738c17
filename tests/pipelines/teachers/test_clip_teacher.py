"""Loading a CLIP: any size, any form, with the activation that its weights were trained with, or an error that says why
not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from hdovd.cache import Level, key_of
from hdovd.core import HdovdError
from hdovd.pipelines.common.options import Precision
from hdovd.pipelines.embedding.crop_recipe import PLAIN_BOX
from hdovd.pipelines.embedding.embedders import Pictures, embedders_of
from hdovd.pipelines.extraction.identities import TextRows, box_table, level_inputs
from hdovd.pipelines.nouns.allowed import Nouns
from hdovd.pipelines.teachers import openclip as clip_teacher
from hdovd.pipelines.teachers.base import Activation
from hdovd.pipelines.teachers.openclip import ClipTeacher, load_clip

SaveClip = Callable[..., str]
TEXTS = {Level.CLASS, Level.NOUN, Level.PSEUDO_LABEL}  # a pseudo label is a row of the noun level
PICTURES = {Level.IMAGE, Level.INSTANCE, Level.PSEUDO_LABEL}


def _noise() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 30, 50), np.uint8))


def _activations(model: torch.nn.Module) -> set[str]:
    return {type(m).__name__ for m in model.modules()} & {"QuickGELU", "GELU"}


# --- sizes and preprocessing ---


@pytest.mark.parametrize(("embed_dim", "image_size"), [(24, 32), (40, 64), (8, 16)])
def test_any_embedding_size_and_resolution(
    tmp_path: Path, save_clip: SaveClip, embed_dim: int, image_size: int
) -> None:
    teacher = load_clip(save_clip(tmp_path / "clip", embed_dim=embed_dim, image_size=image_size), None, device="cpu")
    assert teacher.dim == embed_dim
    pixels = teacher.fit(_noise())
    assert pixels.shape == (3, image_size, image_size)
    for rows in (teacher.embed_images(pixels[None]), teacher.embed_names(["cat"], ["a {}"])):
        assert rows.shape == (1, embed_dim)
        assert rows.dtype == np.float32
        assert np.linalg.norm(rows) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"resize_mode": "squash"},
        {"resize_mode": "shortest"},
        {"resize_mode": "longest", "fill_color": 7},
        {"interpolation": "bilinear"},
        {"mean": [0.1, 0.2, 0.3]},
    ],
    ids=str,
)
def test_preprocessing_is_the_models_own(tmp_path: Path, save_clip: SaveClip, changes: dict[str, Any]) -> None:
    name = save_clip(tmp_path / "clip", preprocess=changes)
    teacher = load_clip(name, None, device="cpu")
    _, _, preprocess = open_clip.create_model_and_transforms(name)
    found, wanted = teacher.transform.normalise(teacher.fit(_noise())), preprocess(to_pil_image(_noise()))
    assert (255 * (found - wanted) * torch.tensor(teacher.transform.std).view(3, 1, 1)).abs().max() < 2.01  # of 255
    for key, value in changes.items():
        assert teacher.preprocessing[key] == value
    assert teacher.preprocessing.keys() == {
        "size",
        "mean",
        "std",
        "interpolation",
        "resize_mode",
        "fill_color",
        "resize",
    }


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


# --- batches ---


class _Small(torch.nn.Module):
    """An image encoder on a device that has room for so many pictures."""

    def __init__(self, model: torch.nn.Module, room: int) -> None:
        super().__init__()
        self.model, self.room, self.seen = model, room, list[int]()

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(pixels))
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("no room")
        found: torch.Tensor = self.model.encode_image(pixels)  # type: ignore[operator]
        return found


def test_what_does_not_fit_into_memory_is_done_in_halves_and_said_once(
    clip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = load_clip(clip, None, device="cpu")
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (11, 3, 32, 32), np.uint8))
    small = _Small(teacher.model, 3)
    tight = replace(teacher, model=small)
    np.testing.assert_allclose(tight.embed_images(pixels), teacher.embed_images(pixels), atol=1e-6)
    assert small.seen == [11, 6, 3, 3, 5, 3, 2]
    tight.embed_images(pixels)
    assert capsys.readouterr().err.splitlines() == [
        "out of memory with 11 pictures at a time: going on with 6",
        "out of memory with 6 pictures at a time: going on with 3",
    ]
    with pytest.raises(HdovdError, match="cpu has no memory for one picture: no room"):
        replace(teacher, model=_Small(teacher.model, 0)).embed_images(pixels)


# --- activation ---


@pytest.mark.parametrize(("quick", "found"), [(True, "quickgelu"), (False, "gelu"), (None, "gelu")])
def test_activation_of_a_local_dir_is_its_configs(
    tmp_path: Path, save_clip: SaveClip, quick: bool | None, found: str
) -> None:
    teacher = load_clip(save_clip(tmp_path / "clip", quick_gelu=quick), None, device="cpu")
    assert teacher.identity["activation"] == found
    assert _activations(teacher.model) == {"QuickGELU" if found == "quickgelu" else "GELU"}
    assert any(found in note for note in teacher.notes)


def test_activation_changes_embeddings_and_can_be_forced(tmp_path: Path, save_clip: SaveClip) -> None:
    quick, plain = save_clip(tmp_path / "quick", quick_gelu=True), save_clip(tmp_path / "plain", quick_gelu=False)
    rows = {}
    for name, wanted in (
        (quick, Activation.AUTO),
        (plain, Activation.AUTO),
        (quick, Activation.GELU),
        (plain, Activation.QUICK_GELU),
    ):
        teacher = load_clip(name, None, device="cpu", activation=wanted)
        rows[name, wanted] = teacher.embed_images(teacher.fit(_noise())[None])
        if wanted is not Activation.AUTO:
            assert teacher.identity["activation"] == str(wanted)
            assert _activations(teacher.model) == {"QuickGELU" if wanted is Activation.QUICK_GELU else "GELU"}
    assert (rows[quick, Activation.AUTO] * rows[plain, Activation.AUTO]).sum() < 0.99999  # the weights are the same
    np.testing.assert_array_equal(rows[quick, Activation.GELU], rows[plain, Activation.AUTO])
    np.testing.assert_array_equal(rows[plain, Activation.QUICK_GELU], rows[quick, Activation.AUTO])


@pytest.mark.parametrize(
    ("model", "tag", "quick"),
    [
        ("ViT-B-32", "openai", True),
        ("ViT-B-32-quickgelu", "openai", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("ViT-B-32", "laion400m_e32", True),
        ("RN50", "openai", True),
        ("ViT-B-16", "dfn2b", True),
        ("roberta-ViT-B-32", "laion2b_s12b_b32k", True),  # its config says so, its tag says nothing
    ],
)
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
    """Save weights as OpenAI published theirs: a TorchScript archive, float16, with three numbers beside the
    weights."""
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
    teacher = load_clip(clip, None, device="cpu")
    for values in (teacher.identity, teacher.preprocessing, teacher.made_with):
        assert json.loads(json.dumps(values)) == values


def _keys(teacher: ClipTeacher) -> dict[Level, str]:
    embedders = embedders_of(teacher, Pictures([], Path, np.zeros(1), np.zeros((0, 4))), PLAIN_BOX)
    inputs = level_inputs(
        teacher, box_table([], {}), Nouns(("fire-hydrant", "sky"), None), TextRows(("a-b", "cat")), ["a {}"], embedders
    )
    return {level: key_of(values) for level, values in inputs.items()}


def _other_keys(one: ClipTeacher, other: ClipTeacher) -> set[Level]:
    a, b = _keys(one), _keys(other)
    return {level for level in Level if a[level] != b[level]}


def test_folder_is_no_part_of_the_identity(clip: str, tmp_path: Path) -> None:
    moved = shutil.copytree(clip.removeprefix("local-dir:"), tmp_path / "moved")
    one, other = load_clip(clip, None, device="cpu"), load_clip(f"local-dir:{moved}", None, device="cpu")
    assert _keys(one) == _keys(other)
    assert one.made_with == other.made_with


@pytest.mark.parametrize("activation", [Activation.GELU, Activation.QUICK_GELU], ids=str)
def test_built_in_name_with_a_file_and_local_dir_are_one_clip(
    built_in: tuple[str, Path], tmp_path: Path, save_clip: SaveClip, activation: Activation
) -> None:
    """The folder's config says what open_clip takes for granted of the name: its preprocessing, and an activation that
    is told to one.
    """
    name, folder = built_in
    default = load_clip(name, str(folder / "open_clip_model.safetensors"), device="cpu", activation=activation)
    told = {key: value for key, value in default.preprocessing.items() if key != "antialias"}
    local = load_clip(
        save_clip(tmp_path / "local", quick_gelu=activation is Activation.QUICK_GELU, preprocess=told),
        None,
        device="cpu",
    )
    assert _keys(default) == _keys(local)
    assert default.made_with != local.made_with  # what a user called it can still be read
    np.testing.assert_array_equal(default.embed_names(["cat"], ["a {}"]), local.embed_names(["cat"], ["a {}"]))
    pixels = default.fit(_noise())[None]
    np.testing.assert_array_equal(pixels, local.fit(_noise())[None])
    np.testing.assert_array_equal(default.embed_images(pixels), local.embed_images(pixels))


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "RN50"])
def test_quickgelu_twin_has_the_same_architecture(name: str) -> None:
    one, twin = (open_clip.get_model_config(n) for n in (name, f"{name}-quickgelu"))
    assert one != twin
    assert clip_teacher._hash_config(one) == clip_teacher._hash_config(twin)
    assert clip_teacher._hash_config(one) != clip_teacher._hash_config(open_clip.get_model_config("ViT-B-32-256"))


@pytest.mark.parametrize(
    ("change", "differ"),
    [
        ({"seed": 1}, PICTURES | TEXTS),
        ({"quick_gelu": True}, PICTURES | TEXTS),
        ({"preprocess": {"mean": [0.5, 0.5, 0.5]}}, PICTURES),
        ({"preprocess": {"interpolation": "bilinear"}}, PICTURES),
        ({"preprocess": {"resize_mode": "shortest"}}, PICTURES),
    ],
    ids=["weights", "activation", "mean", "interpolation", "resize mode"],
)
def test_change_of_the_model_changes_the_levels_that_it_concerns(
    tmp_path: Path, clip: str, save_clip: SaveClip, change: dict[str, Any], differ: set[Level]
) -> None:
    other = load_clip(save_clip(tmp_path / "other", **change), None, device="cpu")
    assert _other_keys(load_clip(clip, None, device="cpu"), other) == differ


def test_compute_precision_is_a_part_of_the_identity(clip: str) -> None:
    one, other = (
        load_clip(clip, None, device="cpu", precision=precision) for precision in (Precision.FP32, Precision.BF16)
    )
    assert _other_keys(one, other) == PICTURES | TEXTS


def test_tokenizer_counts_by_what_it_makes_of_the_prompts(clip: str) -> None:
    """Not by its name: one that reads "fire-hydrant" otherwise is another for the text levels, and for them alone."""
    teacher = load_clip(clip, None, device="cpu")
    again = replace(teacher, tokenizer=open_clip.SimpleTokenizer(context_length=16))
    assert _keys(again) == _keys(teacher)
    without_punctuation = replace(teacher, tokenizer=open_clip.SimpleTokenizer(context_length=16, clean="canonicalize"))
    assert _other_keys(teacher, without_punctuation) == TEXTS
    assert without_punctuation.hash_prompts(["cat"], ["a {}"]) == teacher.hash_prompts(["cat"], ["a {}"])


def test_prompt_hash_covers_every_prompt(clip: str) -> None:
    """Also those after the first batch."""
    teacher = load_clip(clip, None, device="cpu")
    names = [f"thing {k}" for k in range(600)]
    assert teacher.hash_prompts(names, ["a {}"]) != teacher.hash_prompts([*names[:-1], "other"], ["a {}"])


def test_prompts_that_are_cut_are_named(clip: str) -> None:
    """The text tower takes 16 tokens, the first and the last of which are no words."""
    teacher = load_clip(clip, None, device="cpu")
    fits, cat, dog = "cat " * 13 + "dog", "cat " * 14 + "cat", "cat " * 14 + "dog"
    assert teacher.prompt_notes(["cat", "dog", fits], ["{}"]) == []
    (cut,) = teacher.prompt_notes(["cat", cat, fits, dog], ["{}"])
    assert "2 prompts are longer than the 16 tokens of the text tower, and cut: " in cut
    assert cat in cut
    assert dog in cut
