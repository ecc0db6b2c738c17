"""The frozen CLIP: loaded through open_clip with its own preprocessing, tokenizer and activation.

The only file of the commands that imports open_clip. n pictures or texts, D embedding size.
"""

import hashlib
import json
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor
from tqdm import tqdm

from hdovd.cache import hash_file, hash_tables
from hdovd.core import HdovdError, counted, is_file, require_readable, shorten
from hdovd.core.text_files import read_json
from hdovd.pipelines.common.device import choose, pick_device
from hdovd.pipelines.common.options import Precision
from hdovd.pipelines.teachers.base import Activation, Name, prompts
from hdovd.pipelines.teachers.preprocessing import Preprocessing

_TEXT_BATCH = 256
CPU_BATCH = 64  # embedded by each thread alone: larger ones are no faster, and take longer to stop
LARGEST_BATCH = 1_024  # each worker process has two of them ready
BATCH_GAIN = 1.03  # a larger batch that is no faster than this only takes memory


@dataclass(slots=True)
class ClipTeacher:
    """A CLIP ready to embed: a `base.Teacher`."""

    model: Any
    transform: Preprocessing
    tokenizer: Any
    device: torch.device
    precision: Precision
    dim: int
    identity: dict[str, Any]
    notes: Sequence[str]
    made_with: dict[str, Any]
    halves: list[int] = field(default_factory=list)  # batches that it went down to for want of memory

    @property
    def input_size(self) -> tuple[int, int]:
        return self.transform.size

    @property
    def temperature(self) -> float:
        """Of its softmax over cosines."""
        return 1 / float(self.model.logit_scale.exp())

    @property
    def fit(self) -> Callable[[Tensor], Tensor]:
        return self.transform.fit

    @property
    def preprocessing(self) -> dict[str, Any]:
        return self.transform.inputs()

    @torch.inference_mode()
    def embed_images(self, pixels: Tensor) -> np.ndarray:
        """(n, 3, *input_size) uint8 -> (n, D) float32, L2-normalised."""
        return self.embed_preprocessed(self.transform.normalise(pixels.to(self.device, non_blocking=True)))

    def embed_preprocessed(self, pixels: Tensor) -> np.ndarray:
        """(n, 3, *input_size) float32 as open_clip's own transform gives it -> (n, D) float32, L2-normalised."""
        return self.in_memory(lambda start, stop: self._encode(pixels[start:stop]), 0, len(pixels))

    def in_memory(self, embed: Callable[[int, int], np.ndarray], start: int, stop: int) -> np.ndarray:
        """The rows that `embed` gives for pictures `start` to `stop`, in halves where they do not fit into the GPU's
        memory.

        Raises HdovdError if not even one picture fits.
        """
        try:
            return embed(start, stop)
        except torch.OutOfMemoryError as error:
            if stop - start == 1:
                raise HdovdError(f"{self.device} has no memory for one picture: {error}") from error
            half = -(-(stop - start) // 2)
        if half not in self.halves:
            self.halves.append(half)
            tqdm.write(f"out of memory with {stop - start} pictures at a time: going on with {half}", file=sys.stderr)
        return np.concatenate(
            [self.in_memory(embed, first, min(first + half, stop)) for first in (start, start + half)]
        )

    def best_batch(self) -> int:
        """On a GPU the batch that was doubled as long as that fitted and made it faster; on a CPU CPU_BATCH."""
        if self.device.type != "cuda":
            return CPU_BATCH
        best, rate, size = 1, 0.0, 16
        while size <= LARGEST_BATCH and (faster := self._rate(size)) > BATCH_GAIN * rate:
            best, rate, size = size, faster, 2 * size
        return best

    def _rate(self, size: int) -> float:
        """Pictures a second; 0 if so many do not fit."""
        try:
            pixels = torch.zeros(size, 3, *self.input_size, device=self.device)
            self._encode(pixels)
            since = time.perf_counter()
            for _ in range(4):
                self._encode(pixels)
        except torch.OutOfMemoryError:
            return 0.0
        return 4 * size / (time.perf_counter() - since)

    @torch.inference_mode()
    def _encode(self, pixels: Tensor) -> np.ndarray:
        with self.autocast():
            return _normalised(self.model.encode_image(pixels.to(self.device)))

    @torch.inference_mode()
    def embed_names(self, names: Sequence[Name], templates: Sequence[str]) -> np.ndarray:
        """Names -> (n, D) float32: mean over a row's prompts of normalised embeddings, normalised again (METHOD section
        2).

        Holds a batch of prompts and the n rows, however many prompts there are.
        """
        mean, count = np.zeros((len(names), self.dim), np.float32), np.zeros((len(names), 1), np.float32)
        for rows, texts in _prompt_batches(names, templates):
            with self.autocast():
                embeddings = _normalised(self.model.encode_text(self.tokenizer(texts).to(self.device)))
            np.add.at(mean, rows, embeddings)
            np.add.at(count, rows, 1)
        mean /= count
        return np.asarray(mean / np.linalg.norm(mean, axis=1, keepdims=True), np.float32)

    def hash_prompts(self, names: Sequence[Name], templates: Sequence[str]) -> str:
        return hash_tables(self.tokenizer(texts).numpy() for _, texts in _prompt_batches(names, templates))

    def prompt_notes(self, names: Sequence[Name], templates: Sequence[str]) -> list[str]:
        length, cut = self.tokenizer([""]).shape[1], dict[str, None]()
        for _, texts in _prompt_batches(names, templates):
            room = max(length, *(2 + len(text.encode()) for text in texts))  # a byte a token, one before and one after
            fits = (self.tokenizer(texts, context_length=room)[:, :length] == self.tokenizer(texts)).all(dim=1).tolist()
            cut |= {text: None for text, whole in zip(texts, fits, strict=True) if not whole}
        told = f"{counted(len(cut), 'prompt is', 'prompts are')} longer than the {length} tokens of the text tower"
        return [f"note: {told}, and cut: {shorten([*cut], 4)}"] if cut else []

    def peak_memory_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def autocast(self) -> torch.autocast:
        """In the precision asked for."""
        return torch.autocast(self.device.type, self.precision.dtype, enabled=self.precision is not Precision.FP32)


def load_clip(
    model: str,
    pretrained: str | None,
    *,
    device: str = "auto",
    precision: Precision = Precision.AUTO,
    activation: Activation = Activation.AUTO,
    random_weights: bool = False,
    cached: Callable[[dict[str, Any]], Precision | None] = lambda _: None,
) -> ClipTeacher:
    """Load a CLIP by open_clip's names.

    Args:
        model: `local-dir:PATH`, `hf-hub:NAME`, or a built-in name, which needs `pretrained`.
        pretrained: a tag of open_clip, or a checkpoint file.
        random_weights: do without `pretrained`, to measure speed.
        cached: the precision that a cache holds embeddings in of the CLIP of this identity, if it does; what `auto`
        takes.

    Raises HdovdError if the model or its weights cannot be had, or if the activation is not the one wanted.
    """
    target = pick_device(device)
    if ":" in model and pretrained is not None:
        raise HdovdError(f"--pretrained goes with a model name; {model} brings its own weights")
    choose(precision, target, training=False)  # refused before weights are loaded
    config = _model_config(model, pretrained, random_weights)
    quick_gelu, notes = _activation(model, pretrained, config, activation)
    tokenizer = _tokenizer(model, config, random_weights)  # first: weights may take minutes
    of_file, said = _preprocessing_of_file(model, pretrained)
    overrides: dict[str, Any] = {"device": target, "force_preprocess_cfg": of_file}
    if quick_gelu != bool(config.get("quick_gelu", False)):
        overrides["quick_gelu"] = quick_gelu
    try:
        net = _built(model, pretrained, random_weights, overrides)
    except Exception as error:  # open_clip raises whatever its loaders raise
        raise HdovdError(
            f"CLIP {model}{f' with {pretrained}' if pretrained else ''} cannot be loaded: {error}"
            + _how_to_fetch(repositories(model, pretrained, config))
        ) from error
    if quick_gelu and not any(isinstance(module, QuickGELU) for module in net.modules()):
        raise HdovdError(f"--clip {model} has activations of its own, and no QuickGELU: leave --activation out")
    identity: dict[str, Any] = {
        "architecture": _hash_config(config),
        "weights_sha256": _hash_weights(net),
        "activation": str(Activation.QUICK_GELU if quick_gelu else Activation.GELU),
    }
    own = cached(identity)
    chosen, line = choose(precision, target, training=False, own=own, whose="the cache's")
    identity["compute_dtype"] = str(chosen.dtype).removeprefix("torch.")
    notes += [line] if line else []
    if own not in (None, chosen):
        notes.append(
            f"note: --precision {precision}: the cache's embeddings of this CLIP are {own}, of which none serves: all "
            f"are made anew. --precision auto extends them"
        )
    transform = Preprocessing.of(net.visual.preprocess_cfg)
    shown = ", ".join(f"{k} {v}" for k, v in transform.inputs().items() if k in ("size", "mean", "std", "resize_mode"))
    notes.append(f"preprocessing: {shown}{said}")
    if trunk := config["vision_cfg"].get("timm_model_name"):
        notes.append(f"image encoder: timm's {trunk}, with its own activations")
    with torch.inference_mode():  # asked of the model itself: no attribute for it is common to all families
        dim = int(net.encode_image(torch.zeros(1, 3, *transform.size, device=target)).shape[1])
    _round_weights(net.visual, chosen.dtype)
    return ClipTeacher(
        net, transform, tokenizer, target, chosen, dim, identity, tuple(notes), _made_with(model, pretrained, target)
    )


def _made_with(model: str, pretrained: str | None, device: torch.device) -> dict[str, Any]:
    openai = pretrained is not None and is_file(pretrained) and _is_openai_file(Path(pretrained))
    return {
        "clip": "local-dir" if model.startswith("local-dir:") else model,
        "pretrained": pretrained and Path(pretrained).name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        **({"weights": "openai"} if openai else {}),  # whatever the file is called
    }


def _prompt_batches(names: Sequence[Name], templates: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
    """All prompts and the rows that they are of, _TEXT_BATCH at a time."""
    left = prompts(names, templates)
    while batch := list(islice(left, _TEXT_BATCH)):
        yield [row for row, _ in batch], [text for _, text in batch]


def _hash_config(config: dict[str, Any]) -> str:
    """The architecture, apart from the activation, which the identity names by itself: one model has one hash under all
    its names.
    """
    shape = {name: value for name, value in config.items() if name != "quick_gelu"}
    return hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _model_config(model: str, pretrained: str | None, random_weights: bool) -> dict[str, Any]:
    if model.startswith(("local-dir:", "hf-hub:")):
        kind, _, place = model.partition(":")
        read = open_clip.factory._get_hf_config if kind == "hf-hub" else _config_of_folder
        try:
            config = dict(read(place)["model_cfg"])
            return config | {tower: dict(config[tower]) for tower in ("vision_cfg", "text_cfg")}
        except HdovdError:
            raise
        except Exception as error:  # open_clip raises whatever its loaders raise
            raise HdovdError(
                f"--clip {model}: no open_clip config could be read there ({error!r})"
                + _how_to_fetch(repositories(model, None, {}))
            ) from error
    config = open_clip.get_model_config(model)
    if config is None:
        raise HdovdError(
            f"--clip {model}: open_clip knows no such model; python -c 'import open_clip; "
            f"print(open_clip.list_models())' lists them, and local-dir:PATH or hf-hub:NAME take one from elsewhere"
        )
    known = pretrained is not None and (open_clip.get_pretrained_cfg(model, pretrained) or is_file(pretrained))
    if not (known or random_weights):
        wrong = "" if pretrained is None else f", and {pretrained} is neither a file nor a tag of {model}"
        raise HdovdError(
            f"--clip {model} needs --pretrained TAG_OR_FILE, or its weights would be random{wrong}; tags: "
            + (", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none known")
        )
    return dict(config)


def _config_of_folder(folder: str) -> Any:
    """What open_clip_config.json holds. Raises HdovdError without it, or without weights beside it."""
    file, where = Path(folder, "open_clip_config.json"), f"--clip local-dir:{folder}:"
    if not file.is_file():
        raise HdovdError(f"{where} no {file}; the folder must hold open_clip_config.json and the weights")
    weights = [file for file in Path(folder).iterdir() if file.suffix in (".safetensors", ".bin", ".pth")]
    for one in weights:
        require_readable(one)
    if not weights:
        raise HdovdError(f"{where} no weights (*.safetensors, *.bin, *.pth) in {folder}")
    return read_json(file, where)


def repositories(model: str, pretrained: str | None, config: dict[str, Any]) -> list[str]:
    """Where Hugging Face has the weights, for a tag or an hf-hub name, and the configuration of a text tower that is
    one of its own.
    """
    hub = (open_clip.get_pretrained_cfg(model, pretrained) if pretrained else {}).get("hf_hub", "")
    names = [
        model.removeprefix("hf-hub:") if model.startswith("hf-hub:") else "/".join(hub.split("/")[:2]),
        config.get("text_cfg", {}).get("hf_model_name"),
    ]
    return [name for name in names if name]


def _how_to_fetch(repositories: Sequence[str]) -> str:
    """A line for an error."""
    if not repositories:
        return ""
    commands = " and ".join(f"`hf download {name}`" for name in repositories)
    return (
        f"\nOffline nodes: {commands} where there is internet; bring the cache that this fills here "
        f"(~/.cache/huggingface, or HF_HOME) and set HF_HUB_OFFLINE=1; or give --clip local-dir:PATH"
    )


def _tokenizer(model: str, config: dict[str, Any], random_weights: bool) -> Any:
    """open_clip's tokenizer for the model, which for SigLIP, CLIPA and others is one of Hugging Face's."""
    hugging_face = config["text_cfg"].get("hf_tokenizer_name")
    if hugging_face and random_weights:  # whose texts mean nothing: do without a download
        return partial(_one_token, length=config["text_cfg"].get("context_length", 77))
    try:
        return open_clip.get_tokenizer(model)
    except ImportError as error:
        raise HdovdError(
            f"the tokenizer of {model} is one of Hugging Face's: pip install 'hdovd[hf]' ({error})"
        ) from error
    except Exception as error:  # open_clip raises whatever its loaders raise
        way = _how_to_fetch([hugging_face] if hugging_face else [])
        if hugging_face and model.startswith("local-dir:"):  # open_clip looks for it nowhere else
            way = "\nThe folder must hold its files too: tokenizer.json and tokenizer_config.json"
        raise HdovdError(f"the tokenizer of {model} cannot be loaded: {error}{way}") from error


def _one_token(texts: Sequence[str], length: int, context_length: int | None = None) -> Tensor:
    return torch.ones(len(texts), context_length or length, dtype=torch.long)


def _preprocessing_of_file(model: str, pretrained: str | None) -> tuple[dict[str, Any] | None, str]:
    """What a file of weights wants done to pictures, None for open_clip's default, and what to tell the user about how
    that is known.

    open_clip takes its default for every file; but all weights that it knows for SigLIP, CLIPA or MobileCLIP want
    another one.
    """
    if pretrained is None or open_clip.get_pretrained_cfg(model, pretrained):
        return None, ""
    default, known = asdict(open_clip.transform.PreprocessCfg()), []
    for tag in open_clip.list_pretrained_tags_by_model(model):
        told = open_clip.transform.merge_preprocess_dict(default, open_clip.get_pretrained_cfg(model, tag))
        wanted = {name: told[name] for name in ("mean", "std", "interpolation", "resize_mode")}
        if wanted not in known:
            known.append(wanted)
    if len(known) == 1:
        return known[0], f"; that of all weights that open_clip knows for {model}, as a file does not say"
    note = (
        f"; open_clip's default for {model}, as a file does not say: where its weights want another, give their tag, "
    )
    return None, note + "or local-dir:PATH"


def _activation(
    model: str, pretrained: str | None, config: dict[str, Any], wanted: Activation
) -> tuple[bool, list[str]]:
    """Whether the weights were trained with QuickGELU, and what to tell the user about how that is known."""
    configured = bool(config.get("quick_gelu", False))
    kind = "quickgelu" if configured else "gelu"
    if wanted is not Activation.AUTO:
        return wanted is Activation.QUICK_GELU, [f"activation: {wanted}, as asked"]
    if ":" in model or pretrained is None:
        return configured, [f"activation: {kind}, from the model's own config"]
    if tag := open_clip.get_pretrained_cfg(model, pretrained):
        trained = bool(tag.get("quick_gelu", configured))
        return trained, [f"activation: {'quickgelu' if trained else 'gelu'}, as tag {pretrained} was trained"]
    if _is_torchscript(pretrained) or _is_openai_file(Path(pretrained)):
        return True, ["activation: quickgelu, because the file is OpenAI's"]
    return configured, [
        f"activation: {kind}, from the config of {model}; the file {pretrained} does not say which it was trained "
        "with: if its authors used the other one, give --activation"
    ]


def _is_openai_file(path: Path) -> bool:
    """True if the file is one that open_clip names by its sha256 in OpenAI's address of it."""
    known = {
        part
        for name, tag in open_clip.list_pretrained()
        if tag == "openai"
        for part in str(open_clip.get_pretrained_cfg(name, tag).get("url", "")).split("/")
        if len(part) == 64
    }
    return hash_file(path) in known


def _is_torchscript(pretrained: str | None) -> bool:
    """True for a TorchScript archive, the form in which OpenAI published its weights."""
    if pretrained is None or not is_file(pretrained) or not zipfile.is_zipfile(pretrained):
        return False
    with zipfile.ZipFile(pretrained) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _built(model: str, pretrained: str | None, random_weights: bool, overrides: dict[str, Any]) -> Any:
    """open_clip's model with its weights, in eval mode."""
    archive = _is_torchscript(pretrained)
    net = open_clip.create_model(
        model,
        None if archive else pretrained,
        pretrained_text=False,
        require_pretrained=not (random_weights or archive),
        **overrides,
    )
    if archive:
        state = torch.jit.load(pretrained, map_location="cpu").state_dict()  # runs no Python code, unlike a pickle
        net.load_state_dict(
            {k: v.float() for k, v in state.items() if k not in ("input_resolution", "context_length", "vocab_size")}
        )
    return net.eval().requires_grad_(False)


def _hash_weights(net: Any) -> str:
    """sha256 over names and float32 values of all weights: the same for every file format."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _round_weights(tower: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round the large weights once, which autocast would do for every batch anew: on a CPU that takes longer than the
    batch.
    """
    for module in tower.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.MultiheadAttention):
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.to(dtype)


def _normalised(embeddings: Tensor) -> np.ndarray:
    return np.asarray(F.normalize(embeddings.float(), dim=1).cpu().numpy())
