"""What `benchmarks/release.py` runs in an environment that holds the wheel and nothing more: every module is imported,
and a tiny world goes from pictures to detections.

    python -I release_smoke.py
"""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.metadata import requires
from pathlib import Path

TINY = (
    "train.epochs=1",
    "train.batch_size=4",
    "train.workers=0",
    "detector.backbone.fpn_channels=16",
    "input.short_side=96",
    "input.long_side=128",
    "inference.score_threshold=0.0",
)


def modules() -> tuple[int, list[str]]:
    """How many modules can be imported, and those that need an extra: they say so, or miss a package of one."""
    import hdovd
    from hdovd.core import HdovdError

    found, extras = 0, list[str]()
    optional = [needed for needed in requires("hdovd") or () if "extra ==" in needed]
    for module in pkgutil.walk_packages(hdovd.__path__, "hdovd."):
        if module.name != "hdovd.__main__":
            try:
                import_module(module.name)
                found += 1
                continue
            except HdovdError as error:
                known = "hdovd[" in str(error)
            except ModuleNotFoundError as error:
                known = any(needed.startswith(str(error.name).replace("_", "-")) for needed in optional)
            if not known:
                raise SystemExit(f"{module.name} cannot be imported, and not for want of an extra")
            extras.append(module.name)
    return found, extras


def clip(folder: Path) -> str:
    """A tiny random CLIP, in open_clip's form."""
    import open_clip
    from safetensors.torch import save_file

    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    folder.mkdir()
    state = {name: value.contiguous() for name, value in open_clip.CLIP(**config).state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return f"local-dir:{folder}"


def run(*words: object) -> None:
    """`hdovd WORDS`, by the command that the wheel installed."""
    ran = subprocess.run([Path(sys.prefix, "bin", "hdovd"), *map(str, words)], capture_output=True, text=True)
    assert ran.returncode == 0, f"hdovd {' '.join(map(str, words))}\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"


def main() -> None:
    from hdovd.pipelines.demo.world import make_world

    for words in (("--version",), ("--help",), ("demo", "--help"), ("detect", "--help")):
        run(*words)
    found, extras = modules()
    print(f"  --help; {found} modules imported, {len(extras)} need an extra: {', '.join(extras)}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        make_world(root / "world", train_images=24, val_images=8, seed=3, workers=1)
        data = ("--data", root / "world", "--protocol", root / "world" / "protocol.toml", "--device", "cpu")
        annotations = root / "world" / "annotations"
        boxes = json.loads((annotations / "instances_train2017.json").read_text())["annotations"]
        proposals = [{"image_id": box["image_id"], "bbox": box["bbox"], "score": 0.9} for box in boxes]
        (root / "proposals.json").write_text(json.dumps(proposals))
        nouns = (
            "--vocabulary",
            root / "world" / "vocabulary.txt",
            "--captions",
            annotations / "captions_train2017.json",
        )
        made_from = (
            "--clip",
            clip(root / "clip"),
            "--precision",
            "fp32",
            "--proposals",
            root / "proposals.json",
            *nouns,
        )
        run("extract-clip", *data, "--cache", root / "cache", *made_from)
        settings = [word for setting in TINY for word in ("--set", setting)]
        run("train", *data, "--cache", root / "cache", "--recipe", "demo", "--out", root / "run", *settings)
        run("eval", root / "run", *data[:2], "--device", "cpu")
        run("detect", root / "run", root / "world" / "val2017", "--out", root / "found", "--device", "cpu")
        assert len(list((root / "found" / "pictures").iterdir())) == 8
    print("  extract-clip, train, eval and detect of a tiny world: done")


if __name__ == "__main__":
    main()
