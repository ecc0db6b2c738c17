"""Families of image encoders: a small random CLIP of each answers as open_clip itself does, pictures and texts
alike."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from hdovd.cache import Level
from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError
from hdovd.pipelines.common.options import Precision
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.teachers import openclip as clip_teacher
from hdovd.pipelines.teachers.base import Activation
from hdovd.pipelines.teachers.openclip import ClipTeacher, load_clip

DIM = 24
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
WITHOUT_MASK = {"no_causal_mask": True, "pool_type": "last"}
SIGLIP_TEXT = TEXT | WITHOUT_MASK | {"context_length": 64, "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
SIGLIP = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
CLIPA = {
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bilinear",
    "resize_mode": "squash",
}
MOBILE = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"}


def _timm(name: str, size: int, **settings: Any) -> dict[str, Any]:
    return {"timm_model_name": name, "timm_model_pretrained": False, "image_size": size} | settings


def _vit(**settings: Any) -> dict[str, Any]:
    return {"image_size": 56, "patch_size": 14, "layers": 2, "width": 32, "head_width": 16} | settings


def _clip(vision: dict[str, Any], text: dict[str, Any] = TEXT, **settings: Any) -> dict[str, Any]:
    return {"embed_dim": DIM, "vision_cfg": vision, "text_cfg": text} | settings


# Model and preprocessing as open_clip's configurations of the family have them, smaller.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ViT-L-14": (_clip(_vit(), quick_gelu=True), {}),
    "CLIPA": (_clip(_vit(no_ln_pre=True, pool_type="avg", final_ln_after_pool=True), TEXT | WITHOUT_MASK), CLIPA),
    "EVA02": (_clip(_timm("eva02_tiny_patch14_224", 224, timm_pool="token", timm_proj=None), custom_text=True), {}),
    "SigLIP": (
        _clip(
            _timm("test_vit3", 160, timm_pool="map", timm_proj="none"),
            SIGLIP_TEXT,
            custom_text=True,
            init_logit_bias=-10,
        )
        | {"embed_dim": 96},
        SIGLIP,
    ),  # without a projection, the trunk's width is the embedding size
    "SigLIP2": (
        _clip(
            _timm("test_vit3", 160, timm_pool="map", timm_proj=None),
            SIGLIP_TEXT | {"act_kwargs": {"approximate": "tanh"}},
            custom_text=True,
            init_logit_bias=-10,
        ),
        SIGLIP,
    ),
    "ModifiedResNet": (
        _clip(
            {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32, "patch_size": None},
            quick_gelu=True,
        ),
        {},
    ),
    "ConvNeXt": (
        _clip(_timm("test_convnext2", 96, timm_pool="", timm_proj="linear", timm_drop=0.0, timm_drop_path=0.1)),
        {},
    ),
    "ConvNeXt-mlp": (
        _clip(_timm("test_convnext2", 96, timm_pool="", timm_proj="mlp"), quick_gelu=True, custom_text=True),
        {},
    ),
    "MobileCLIP": (
        _clip(
            _timm("fastvit_t8", 64, timm_pool="avg", timm_proj=None), TEXT | {"no_causal_mask": True}, custom_text=True
        ),
        MOBILE,
    ),
    "CoCa": (
        _clip(
            _vit(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=8, output_tokens=True),
            TEXT | {"embed_cls": True, "output_tokens": True},
            custom_text=True,
            multimodal_cfg={"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        ),
        {},
    ),
}
TIMM = [name for name, (config, _) in FAMILIES.items() if "timm_model_name" in config["vision_cfg"]]
PICTURES = [(224, 224), (97, 150), (300, 40), (9, 7), (480, 640)]
PROMPTS = ["cat", "a photo of a fire-hydrant", "Two ZEBRAS, grazing."]


def _randomise(model: torch.nn.Module) -> None:
    """Weights of one size, so that the input decides: fresh ones answer nearly the same to everything."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("token_embedding.weight"):
                value.normal_(0, 2)[0] = 0  # padding
            elif value.ndim >= 2:
                value.normal_(0, value[0].numel() ** -0.5)
            elif name.endswith(("weight", "gamma")):  # of norms and of layer scales, which start at 0 in some families
                value.fill_(1)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.5
        smooth = F.interpolate(torch.randn(8, 3, 4, 4), model.visual.image_size, mode="bilinear")
        model.train().visual(smooth)  # gives BatchNorm some statistics


def _save(folder: Path, config: dict[str, Any], preprocess: dict[str, Any]) -> str:
    """A random CLIP in open_clip's local-dir form; returns its name."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    model = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False)
    _randomise(model)
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return f"local-dir:{folder}"


@dataclass(frozen=True)
class _Family:
    """A family's CLIP as hdovd loads it, and as open_clip does."""

    config: dict[str, Any]
    name: str
    teacher: ClipTeacher
    model: Any
    transform: Callable[[Image.Image], torch.Tensor]

    @torch.inference_mode()
    def reference(self, pictures: list[Image.Image]) -> torch.Tensor:
        return torch.cat([F.normalize(self.model.encode_image(self.transform(p)[None]), dim=1) for p in pictures])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A name for each family's CLIP."""
    root = tmp_path_factory.mktemp("families")
    return {name: _save(root / name, config, preprocess) for name, (config, preprocess) in FAMILIES.items()}


def _load(family: str, name: str) -> _Family:
    model, _, transform = open_clip.create_model_and_transforms(name)
    return _Family(FAMILIES[family][0], name, load_clip(name, None, device="cpu"), model.eval(), transform)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, saved: dict[str, str]) -> _Family:
    return _load(request.param, saved[request.param])


def _pictures() -> list[Image.Image]:
    """Coloured noise, smooth where it is large."""
    rng = np.random.default_rng(0)
    noise = [
        rng.uniform(0, 1, (-(-height // 16), -(-width // 16), 3)) * rng.uniform(0, 256, 3) for height, width in PICTURES
    ]
    return [
        Image.fromarray(n.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        for n, (height, width) in zip(noise, PICTURES, strict=True)
    ]


def _fitted(teacher: ClipTeacher, pictures: list[Image.Image]) -> torch.Tensor:
    return torch.stack([teacher.fit(torch.from_numpy(np.array(p)).permute(2, 0, 1)) for p in pictures])


def _nearest(rows: np.ndarray) -> float:
    """The highest cosine of two rows."""
    return float((rows @ rows.T)[~np.eye(len(rows), dtype=bool)].max())


# --- pictures ---


def test_pictures_are_embedded_as_open_clip_embeds_them(family: _Family) -> None:
    teacher, pictures = family.teacher, _pictures()
    reference = family.reference(pictures).numpy()
    rows = teacher.embed_images(_fitted(teacher, pictures))
    assert teacher.dim == family.config["embed_dim"]
    assert teacher.input_size == (family.config["vision_cfg"]["image_size"],) * 2
    assert rows.shape == (len(pictures), teacher.dim)
    assert rows.dtype == np.float32
    assert (rows * reference).sum(axis=1).min() >= 0.9999
    assert _nearest(reference) < 0.999  # or the comparison would say nothing


def test_bf16_is_near_and_otherwise_the_same(family: _Family) -> None:
    teacher = load_clip(family.name, None, device="cpu", precision=Precision.BF16)
    assert teacher.identity == family.teacher.identity | {"compute_dtype": "bfloat16"}
    assert teacher.preprocessing == family.teacher.preprocessing
    rows = teacher.embed_images(_fitted(teacher, _pictures()))
    assert rows.dtype == np.float32
    assert (rows * family.reference(_pictures()).numpy()).sum(axis=1).min() >= 0.999
    texts = teacher.embed_names(PROMPTS, ["{}"]), family.teacher.embed_names(PROMPTS, ["{}"])
    assert (texts[0] * texts[1]).sum(axis=1).min() >= 0.999


def test_threads_share_a_model(family: _Family) -> None:
    """As in extraction, where each carries a batch; a picture's row does not depend on what else is in its batch."""
    pixels = _fitted(family.teacher, _pictures())
    with ThreadPoolExecutor(2) as pool:
        alone = np.concatenate(list(pool.map(family.teacher.embed_images, pixels[:, None])))
    np.testing.assert_allclose(alone, family.teacher.embed_images(pixels), atol=1e-5)


# --- texts ---


@torch.inference_mode()
def test_texts_are_embedded_as_open_clip_embeds_them(family: _Family) -> None:
    tokens = open_clip.get_tokenizer(family.name)(PROMPTS)
    assert tokens.shape == (len(PROMPTS), family.config["text_cfg"]["context_length"])
    reference = F.normalize(family.model.encode_text(tokens), dim=1).numpy()
    np.testing.assert_allclose(family.teacher.embed_names(PROMPTS, ["{}"]), reference, atol=1e-6)
    assert _nearest(reference) < 0.999


# --- activation and identity ---


def test_activation_is_said_of_what_it_is_true_of(family: _Family) -> None:
    quick = family.config.get("quick_gelu", False)
    notes = " | ".join(family.teacher.notes)
    assert family.teacher.identity["activation"] == ("quickgelu" if quick else "gelu")
    assert f"activation: {'quickgelu' if quick else 'gelu'}, from the model's own config" in notes
    trunk = family.config["vision_cfg"].get("timm_model_name")
    assert (f"timm's {trunk}, with its own activations" in notes) == bool(trunk)


@pytest.mark.parametrize("name", ["SigLIP", "CoCa"])
def test_activation_can_be_forced_where_it_is_open_clips(saved: dict[str, str], name: str) -> None:
    plain, quick = (
        load_clip(saved[name], None, device="cpu", activation=a) for a in (Activation.GELU, Activation.QUICK_GELU)
    )
    assert quick.identity["activation"] == "quickgelu"
    assert abs(plain.embed_names(["cat"], ["{}"]) - quick.embed_names(["cat"], ["{}"])).max() > 1e-4
    pixels = _fitted(plain, _pictures()[:1])
    assert np.array_equal(plain.embed_images(pixels), quick.embed_images(pixels)) == (name in TIMM)


def test_families_have_identities_of_their_own(saved: dict[str, str]) -> None:
    configs = [
        json.loads((Path(name.removeprefix("local-dir:")) / "open_clip_config.json").read_text())
        for name in saved.values()
    ]
    assert len({clip_teacher._hash_config(tree["model_cfg"]) for tree in configs}) == len(FAMILIES)


# --- a whole extraction ---


def test_extraction_with_a_timm_encoder(
    saved: dict[str, str], extraction: Callable[..., ExtractConfig], world: Path, kept: list[int], tmp_path: Path
) -> None:
    extract_clip(extraction(tmp_path / "cache", clip=saved["ConvNeXt"]))
    reader, tree = (
        FeatureCache(tmp_path / "cache"),
        json.loads((world / "annotations" / "instances_train2017.json").read_text()),
    )
    boxes = {a["id"]: a["bbox"] for a in tree["annotations"]}
    found, wanted = [], []
    for entry in (e for e in tree["images"] if e["id"] in kept):
        rows, picture = (
            reader.instances(entry["id"]).base_boxes(),
            Image.open(world / "train2017" / entry["file_name"]).convert("RGB"),
        )
        found += [reader.image_embedding(entry["id"]), *rows.embedding]
        wanted += [
            picture,
            *(picture.crop((x, y, x + w, y + h)) for x, y, w, h in (boxes[key] for key in rows.annotation_id.tolist())),
        ]
    reference = _load("ConvNeXt", saved["ConvNeXt"]).reference(wanted)
    assert len(found) > 2 * len(kept)
    assert F.cosine_similarity(reference.double(), torch.from_numpy(np.stack(found)).double()).min() >= 0.9999
    assert reader.embeddings(Level.CLASS).shape[1] == DIM


# --- built-in names ---


@pytest.fixture
def built_in(saved: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    """Give the CLIP of a family a built-in name, with the tags of a model that open_clip knows; returns it and the file
    of weights.
    """
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))

    def name(family: str, tags_of: str, **text: Any) -> tuple[str, str]:
        config = FAMILIES[family][0]
        (tmp_path / "tiny.json").write_text(json.dumps(config | {"text_cfg": config["text_cfg"] | text}))
        open_clip.add_model_config(tmp_path / "tiny.json")
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", open_clip.pretrained._PRETRAINED[tags_of])
        return "tiny", str(Path(saved[family].removeprefix("local-dir:")) / "open_clip_model.safetensors")

    return name


@pytest.mark.parametrize(
    ("family", "tags_of"), [("SigLIP2", "ViT-B-16-SigLIP2"), ("CLIPA", "ViT-L-14-CLIPA"), ("CoCa", "coca_ViT-B-32")]
)
def test_file_of_weights_is_preprocessed_as_its_family_was_trained(
    built_in: Callable[..., tuple[str, str]], saved: dict[str, str], family: str, tags_of: str
) -> None:
    """open_clip's own default for files is OpenAI's, of which nothing would tell."""
    local, of_file = load_clip(saved[family], None, device="cpu"), load_clip(*built_in(family, tags_of), device="cpu")
    assert of_file.identity == local.identity
    assert of_file.preprocessing == local.preprocessing
    assert any("all weights that open_clip knows" in note for note in of_file.notes)


def test_file_of_weights_that_may_be_of_two_kinds_is_told_of() -> None:
    """ViT-L-14 has tags with two kinds of preprocessing."""
    wanted, note = clip_teacher._preprocessing_of_file("ViT-L-14", "file.pt")
    assert wanted is None
    assert "where its weights want another" in note


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and nothing in Hugging Face's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("model", "tag", "repository"),
    [
        ("ViT-L-14", "datacomp_xl_s13b_b90k", "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K"),
        ("EVA02-B-16", "merged2b_s8b_b131k", "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k"),
        ("ViTamin-S", "datacomp1b", "jienengchen/ViTamin-S"),
        ("RN50", "openai", "timm/resnet50_clip.openai"),
    ],
)
def test_weights_out_of_reach_are_named(offline: None, model: str, tag: str, repository: str) -> None:
    with pytest.raises(
        HdovdError, match=rf"(?s)cannot be loaded.*`hf download {repository}` .*HF_HOME.*local-dir:PATH"
    ):
        load_clip(model, tag, device="cpu")


def test_tokenizer_without_transformers_names_what_to_install(
    saved: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    file = Path(saved["SigLIP"].removeprefix("local-dir:")) / "open_clip_model.safetensors"
    with pytest.raises(HdovdError, match=r"tokenizer of ViT-B-16-SigLIP .*pip install 'hdovd\[hf\]'"):
        load_clip("ViT-B-16-SigLIP", str(file), device="cpu")


def test_speed_of_an_unknown_model() -> None:
    with pytest.raises(HdovdError, match=r"ViT-Q-99.*list_models"):
        load_clip("ViT-Q-99", None, random_weights=True)


# --- tokenizers and text towers of Hugging Face: with transformers alone ---


def _save_tokenizer(folder: Path) -> None:
    """Words of PROMPTS in lower case; pads with 1, and ends with it, as SigLIP's does."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = ["<unk>", "</s>", *sorted(set(re.findall(r"\w+", " ".join(PROMPTS).lower())))]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    inner.normalizer, inner.pre_tokenizer = tokenizers.normalizers.Lowercase(), tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="</s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)


def _compare_texts(name: str) -> np.ndarray:
    """The rows of PROMPTS, the same as open_clip's."""
    model, tokens = open_clip.create_model(name, pretrained_text=False).eval(), open_clip.get_tokenizer(name)(PROMPTS)
    rows = load_clip(name, None, device="cpu").embed_names(PROMPTS, ["{}"])
    with torch.inference_mode():
        np.testing.assert_allclose(rows, F.normalize(model.encode_text(tokens), dim=1).numpy(), atol=1e-6)
    assert _nearest(rows) < 0.999
    return rows


def test_siglip_tokenizer_of_the_folder(tmp_path: Path) -> None:
    config, preprocess = FAMILIES["SigLIP2"]
    text = {
        "vocab_size": 100,
        "hf_tokenizer_name": "timm/ViT-B-16-SigLIP2",
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }
    name = _save(tmp_path / "clip", config | {"text_cfg": config["text_cfg"] | text}, preprocess)
    _save_tokenizer(tmp_path / "clip")
    _compare_texts(name)
    teacher = load_clip(name, None, device="cpu")
    assert teacher.hash_prompts(["CAT!"], ["a {}"]) == teacher.hash_prompts(["cat"], ["a {}"])
    assert teacher.hash_prompts(["cat"], ["a {}"]) != teacher.hash_prompts(["zebras"], ["a {}"])
    assert teacher.prompt_notes(["cat", "zebras", "cat " * 10], ["a {}"]) == []
    assert ["cat " * 80 in note for note in teacher.prompt_notes(["cat", "cat " * 80], ["a {}"])] == [True]


def test_text_tower_of_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.RobertaConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        pad_token_id=1,
        max_position_embeddings=64,
    ).save_pretrained(tmp_path / "roberta")
    text = {
        "hf_model_name": str(tmp_path / "roberta"),
        "hf_tokenizer_name": "roberta-base",
        "hf_pooler_type": "mean_pooler",
        "context_length": 32,
    }
    name = _save(tmp_path / "clip", _clip(_vit(), text, quick_gelu=True), {})
    _save_tokenizer(tmp_path / "clip")
    _compare_texts(name)
    assert load_clip(name, None, device="cpu").identity["activation"] == "quickgelu"


def test_folder_without_the_tokenizer(tmp_path: Path, offline: None) -> None:
    pytest.importorskip("transformers")
    config, preprocess = FAMILIES["SigLIP"]
    name = _save(
        tmp_path / "clip",
        config | {"text_cfg": config["text_cfg"] | {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}},
        preprocess,
    )
    with pytest.raises(HdovdError, match=r"(?s)tokenizer of local-dir:.*tokenizer\.json"):
        load_clip(name, None, device="cpu")


def test_tokenizer_out_of_reach_is_named(saved: dict[str, str], offline: None) -> None:
    pytest.importorskip("transformers")
    file = Path(saved["SigLIP"].removeprefix("local-dir:")) / "open_clip_model.safetensors"
    with pytest.raises(
        HdovdError, match=r"(?s)tokenizer of ViT-B-16-SigLIP .*`hf download timm/ViT-B-16-SigLIP` .*HF_HOME"
    ):
        load_clip("ViT-B-16-SigLIP", str(file), device="cpu")
