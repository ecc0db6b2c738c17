"""Pushing: what of a run or a cache goes to the Hub, in one commit, so that nobody sees half of it, with a card."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

from hdovd.cache import Catalog, Level, is_hub
from hdovd.cache.catalog import NAMED
from hdovd.cache.hub import KINDS, LIST, file_list, hub_client, repository
from hdovd.config.recipe import outside_code
from hdovd.core import HdovdError, __version__, counted, log, shorten
from hdovd.core.text_files import read_json
from hdovd.data import METRICS
from hdovd.pipelines.cache_tools.config import CheckConfig
from hdovd.pipelines.cache_tools.verify import check_cache
from hdovd.pipelines.common.console import size
from hdovd.pipelines.common.tensors import load_tensors
from hdovd.pipelines.hub.config import PushConfig
from hdovd.pipelines.runs import RunFolder, ap, read_run
from hdovd.pipelines.runs.folder import FILES
from hdovd.pipelines.teachers.openclip import repositories

WEIGHTS = ("class_embeddings.safetensors", "model.safetensors", "best.safetensors")
OF_RUN = ("config.toml", "run.json", *WEIGHTS, "log.jsonl", "log.csv", "metrics.json")
OF_CACHE = ("zarr.json", *Level, "sets", NAMED)  # not `runs`, whose paths are of this machine


def push(config: PushConfig) -> str:
    """Push a run or a cache; returns the commit. Raises HdovdError for bad input, what is damaged, and what the Hub
    refuses.
    """
    config.check()
    files = _run_files(config.source) if config.kind == "run" else _cache_files(config.source)
    written = {LIST: file_list(files), "README.md": card(config).encode(), **files}
    repo, options = repository(config.to)[0], {"repo_type": KINDS[config.kind]}
    log(f"pushes {counted(len(files), 'file')}, {size(sum(file.stat().st_size for file in files.values()))}")
    with hub_client(config.to) as client:
        api, ours = client.HfApi(), {*FILES, *OF_CACHE}
        api.create_repo(repo, private=not config.public, exist_ok=True, **options)
        changes = [
            *(
                client.CommitOperationDelete(name)
                for name in api.list_repo_files(repo, **options)
                if name.split("/")[0] in ours and name not in files
            ),
            *(client.CommitOperationAdd(name, content) for name, content in written.items()),
        ]
        done = api.create_commit(repo, changes, commit_message=f"hdovd push: {config.kind}", **options)
    log(f"pushed {config.source}: {config.to}, or for good {config.to}@{done.oid}")
    return str(done.oid)


def _run_files(source: Path) -> dict[str, Path]:
    """Raises HdovdError if some of it is damaged."""
    RunFolder.open(source).class_embeddings()
    found = {name: source / name for name in OF_RUN if (source / name).is_file()}
    for name in found.keys() & {*WEIGHTS}:
        load_tensors(found[name])
    if left := sorted(file.name for file in source.iterdir() if file.name not in found):
        log(f"stays here: {shorten(left)} (checkpoint.pt is a pickle, and for --resume alone)")
    return found


def _cache_files(source: Path) -> dict[str, Path]:
    """Raises HdovdError if some of it is damaged."""
    if check_cache(CheckConfig(cache=source)).findings:
        raise HdovdError(f"{source} is damaged, as said above, and is not pushed: hdovd cache verify --repair")
    return {name: source / name for name in Catalog(source).folder.sizes("") if name.split("/")[0] in OF_CACHE}


def card(config: PushConfig) -> str:
    """README.md of the repository, from what the run or the cache knows of itself. Raises HdovdError for an audit of
    another one.
    """
    about: dict[str, Any] = {"run": None, "audit": None, "dataset": None}
    where: Callable[[], str | None] = partial(str, config.source)
    if config.kind == "run":
        run, known = RunFolder.open(config.source), read_run(config.source)
        recipe, where = run.written_recipe(), run.cache_url
        about |= {
            "run": known,
            "metric": METRICS[known.metric],
            "protocol": run.protocol(),
            "oracle": run.saw_novel,
            "recipe": recipe.to_toml().rstrip(),
            "detector": recipe.detector.name,
            "code": outside_code(recipe),
            "dataset": repository(str(known.cache))[0] if is_hub(str(known.cache)) else None,
            "sets": {"": {level: entry["key"] for level, entry in known.levels.items()}},
        }
    else:
        catalog = Catalog(config.source)
        sets = {name: {str(level): key for level, key in one.levels.items()} for name, one in catalog.sets().items()}
        about |= {"products": catalog.products(), "sets": sets}
    if config.audit is not None:
        about["audit"] = read_json(config.audit, "--audit")
        if about["audit"].get("levels") not in about["sets"].values():
            raise HdovdError(f"--audit {config.audit} is not of these features: hdovd audit --json makes one of them")
    clip = _clip(where, [levels.get("class", "") for levels in about["sets"].values()])
    names = repositories(clip["clip"], clip.get("pretrained"), {}) if clip.get("clip") else []
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.PackageLoader("hdovd", "pipelines/pages"),
    )
    return environment.get_template("card.md").render(
        about,
        ap=ap,
        repo=repository(config.to)[0],
        url=config.to,
        license=config.license,
        clip={"clip": None, "pretrained": None} | clip,
        base_model=next(iter(names), None),
        version=__version__,
    )


def _clip(cache: Callable[[], str | None], keys: list[str]) -> dict[str, str]:
    """What the first class embeddings of these keys were made with; empty if the cache is not here any more."""
    try:
        products = [Catalog(str(cache())).find(Level.CLASS, key) for key in keys]
    except HdovdError:
        products = []
    return next((dict(product.attributes["made_with"]) for product in products if product is not None), {})
