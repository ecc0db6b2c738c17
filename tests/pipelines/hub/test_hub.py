"""Runs and caches that go to the Hub and come back, by the real huggingface_hub and a server on this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from command_runs import Ran
from hub_server import READ_ONLY, TOKEN, Hub, Repository

from hdovd.cache import Catalog
from hdovd.cache.hub import LIST, pulled
from hdovd.cache.identity import sealed
from hdovd.cli.main import main
from hdovd.pipelines.runs import RunFolder

Contents = Callable[[Path], dict[str, str]]
ENVIRONMENT = ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    with Hub() as server:
        for name in ENVIRONMENT:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        new_machine(monkeypatch, tmp_path / "here")
        yield server
        assert server.faults == []


def new_machine(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """As a process of another user: huggingface_hub reads its variables when it is imported."""
    monkeypatch.setenv("HF_HOME", str(home / "huggingface"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    pulled.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def hdovd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """A command, in this process as a new one, whose output holds no token."""

    def run(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["hdovd", *map(str, words)])
        forget(monkeypatch)
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        found = capsys.readouterr()
        for token in (TOKEN, READ_ONLY):
            assert token not in found.out + found.err
        return Ran(code, found.out, found.err)

    return run


@pytest.fixture
def own_run(distilled: RunFolder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(distilled.path, tmp_path / "run"))


def front_matter(repository: Repository) -> dict[str, object]:
    text = repository.commits[repository.head]["README.md"].decode()
    found: dict[str, object] = yaml.safe_load(text.split("---\n")[1])
    return found


def one_line(ran: Ran) -> str:
    """The error, after bars of progress."""
    assert ran.code == 1, ran
    before, _, line = ran.err.rpartition("error: ")
    assert before == "" or before[-1] in "\r\n"
    assert line.count("\n") == 1
    return line


def test_a_run_goes_to_the_hub_and_comes_back(
    hub: Hub, hdovd: Callable[..., Ran], own_run: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is pushed is enough for eval, detect, export, runs diff and train --init, with the same results."""
    data = ["--data", world, "--device", "cpu"]
    assert hdovd("eval", own_run, *data).code == 0
    ran = hdovd("push", own_run, "hf://me/umbrellas", "--license", "apache-2.0")
    assert ran.code == 0, ran
    assert "stays here: checkpoint.pt, detections.json (checkpoint.pt is a pickle, and for --resume alone)" in ran.out
    repository = hub.repositories["model", "me/umbrellas"]
    assert repository.private
    assert len(repository.commits) == 2  # made, and one commit
    assert f"hf://me/umbrellas@{repository.head}" in ran.out
    pushed = set(repository.commits[repository.head]) - {".gitattributes", "README.md", LIST}
    assert pushed == {
        "config.toml", "run.json", "class_embeddings.safetensors", "model.safetensors", "log.jsonl", "log.csv",
        "metrics.json",
    }  # fmt: skip
    assert not any(TOKEN.encode() in data for data in repository.commits[repository.head].values())

    ap = json.loads((own_run / "metrics.json").read_text())["ap50"]
    shutil.move(own_run, tmp_path / "elsewhere")
    new_machine(monkeypatch, tmp_path / "there")
    assert hdovd("eval", "hf://me/umbrellas", *data).code == 0
    (folder,) = (tmp_path / "there" / "cache" / "hdovd" / "hub" / "runs").iterdir()
    assert folder.name == f"me--umbrellas@{repository.head}"
    assert json.loads((folder / "metrics.json").read_text())["ap50"] == ap
    links = {file.name for file in folder.iterdir() if file.is_symlink()}
    assert links == {"class_embeddings.safetensors", "model.safetensors"}  # the rest may be written anew
    picture = next((world / "val2017").iterdir())
    ran = hdovd("detect", "hf://me/umbrellas", picture, "--out", tmp_path / "found", "--device", "cpu")
    assert ran.code == 0, ran
    assert hdovd("runs", "diff", "hf://me/umbrellas", tmp_path / "elsewhere").code == 0
    out = tmp_path / "model.safetensors"
    ran = hdovd("export", f"hf://me/umbrellas@{repository.head}", "--format", "safetensors", "--out", out)
    assert ran.code == 0, ran
    assert len(list(folder.parent.iterdir())) == 1


def test_the_card_of_a_run(hub: Hub, hdovd: Callable[..., Ran], own_run: Path, world: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    hdovd("eval", own_run, "--data", world, "--device", "cpu")
    levels = {level: entry["key"] for level, entry in RunFolder(own_run).record()["cache"]["levels"].items()}
    report = tmp_path / "audit.json"
    report.write_text(json.dumps({"levels": levels, "leaks": 0, "unknown": 2, "checks": [{}] * 11}))
    assert hdovd("push", own_run, "hf://me/card", "--audit", report, "--license", "mit").code == 0
    repository = hub.repositories["model", "me/card"]
    text = repository.commits[repository.head]["README.md"].decode()
    card = ModelCard(text)
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == ("mit", "hdovd", "object-detection")
    ap = json.loads((own_run / "metrics.json").read_text())["ap50"]
    assert {one.metric_name: one.metric_value for one in card.data.eval_results or []} == {
        f"AP50 {group}": pytest.approx(value, abs=0.01) for group, value in ap.items() if value is not None
    }
    assert "| Audit | no leak found; 2 of 11 checks could not be made in full |" in text
    assert f"novel {ap['novel']:.1f}, base {ap['base']:.1f}" in text
    assert "hdovd detect hf://me/card photos/ --classes" in text
    assert (own_run / "config.toml").read_text().strip() in text
    assert all(f"{level} `{key}`" in text for level, key in levels.items())
    report.write_text(json.dumps({"levels": {"class": "another"}, "leaks": 0, "unknown": 0, "checks": []}))
    assert "is not of these features" in one_line(hdovd("push", own_run, "hf://me/card", "--audit", report))


def test_a_cache_goes_to_the_hub_and_comes_back(
    hub: Hub,
    hdovd: Callable[..., Ran],
    training_cache: Path,
    world: Path,
    micro_settings: list[str],
    tmp_path: Path,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = Path(shutil.copytree(training_cache, tmp_path / "cache"))
    assert hdovd("push", cache, "hf://me/features", "--public").code == 0
    repository = hub.repositories["dataset", "me/features"]
    assert not repository.private
    assert front_matter(repository)["task_categories"] == ["object-detection"]
    text = repository.commits[repository.head]["README.md"].decode()
    for product in Catalog(cache).products():
        assert f"| {product.level} | `{product.key}` | {product.rows} |" in text
    assert str(tmp_path) not in text
    before = contents(cache)
    shutil.move(cache, tmp_path / "away")
    new_machine(monkeypatch, tmp_path / "there")
    pushed = repository.commits[repository.head]
    assert {name for name in before if not name.startswith((".", "runs/"))} == set(pushed) - {
        ".gitattributes", "README.md", LIST,
    }  # fmt: skip
    ran = hdovd("cache", "verify", "hf://me/features")
    assert ran.code == 0, ran
    job = ["--data", world, "--protocol", world / "protocol.toml", "--device", "cpu", "--val-every", 0, *micro_settings]
    assert hdovd("train", *job, "--cache", "hf://me/features", "--out", tmp_path / "one").code == 0
    assert hdovd("train", *job, "--cache", tmp_path / "away", "--out", tmp_path / "two").code == 0
    one, two = (RunFolder(tmp_path / name) for name in ("one", "two"))
    assert (one.path / "model.safetensors").read_bytes() == (two.path / "model.safetensors").read_bytes()
    assert one.record()["cache"]["path"] == "hf://me/features"
    assert hdovd("push", one.path, "hf://me/small").code == 0
    assert front_matter(hub.repositories["model", "me/small"])["datasets"] == ["me/features"]
    ran = hdovd("cache", "gc", "hf://me/features", "--drop-set", "default", "--yes")
    assert "hf://me/features is read only: write into a folder, and hdovd push it" in one_line(ran)
    assert Catalog("hf://me/features").sets().keys() == {"default"}
    ran = hdovd("train", *job, "--cache", tmp_path / "away", "--init", "hf://me/small", "--out", tmp_path / "three")
    assert ran.code == 0, ran
    assert "--init hf:/me/small: " in ran.out


def test_without_a_network_after_one_download(
    hub: Hub, hdovd: Callable[..., Ran], own_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert hdovd("push", own_run, "hf://me/run").code == 0
    line = one_line(hdovd("runs", "diff", "hf://me/other", own_run))
    assert "there is no such repository of this kind, or it is private" in line
    assert hdovd("runs", "diff", "hf://me/run", own_run).code == 0
    asked = len(hub.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hdovd("runs", "diff", "hf://me/run", own_run).code == 0
    shutil.rmtree(tmp_path / "here" / "cache")  # Hugging Face's own is enough
    assert hdovd("runs", "diff", "hf://me/run", own_run).code == 0
    assert len(hub.asked) == asked
    new_machine(monkeypatch, tmp_path / "there")
    line = one_line(hdovd("runs", "diff", "hf://me/run", own_run))
    assert "HF_HUB_OFFLINE is set, and Hugging Face's cache does not have all of it: pull it once where" in line
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.shutdown()
    hub.server_close()
    assert "the Hub is not to be reached" in one_line(hdovd("runs", "diff", "hf://me/run", own_run))


def test_what_was_changed_or_is_not_whole_is_refused(
    hub: Hub, hdovd: Callable[..., Ran], own_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert hdovd("push", own_run, "hf://me/run").code == 0
    repository = hub.repositories["model", "me/run"]
    good = repository.head
    listed = json.loads(repository.commits[good][LIST])

    def told(**files: bytes | None) -> str:
        repository.change(**{name.replace("__", "."): data for name, data in files.items()})
        ran = hdovd("runs", "diff", "hf://me/run", own_run)
        repository.commit(repository.commits[good])
        return one_line(ran)

    weights = repository.commits[good]["model.safetensors"]
    for wrong in (weights[:-1] + bytes([weights[-1] ^ 1]), None):
        line = told(model__safetensors=wrong)
        assert "hf://me/run is not what was pushed, at " in line
        found = hashlib.sha256(wrong).hexdigest() if wrong else "of no file"
        assert f"model.safetensors has SHA-256 {found}, expected {listed['files']['model.safetensors']}. If" in line
        assert "push it again, or give @REVISION of an earlier one" in line
    of_all = listed | {"files": listed["files"] | {"model.safetensors": "0" * 64}}
    outside = sealed({"format": 1, "files": {"../../../escaped": "0" * 64}})
    for tree in (of_all, outside, []):
        line = told(hdovd__json=json.dumps(tree).encode())
        assert "its hdovd.json is damaged, or was changed since it was pushed" in line
    newer = json.dumps(sealed({"format": 2, "content": []})).encode()
    assert "was pushed by a newer hdovd (format 2, not 1): update this one" in told(hdovd__json=newer)
    assert "it has no hdovd.json: it was not made by hdovd push" in told(hdovd__json=None)
    assert hdovd("runs", "diff", f"hf://me/run@{good}", own_run).code == 0
    assert "it has no such revision" in one_line(hdovd("runs", "diff", f"hf://me/run@{'0' * 40}", own_run))
    assert "expected hf://USER/NAME, or hf://USER/NAME@REVISION" in one_line(hdovd("runs", "diff", "hf://run", own_run))


@pytest.mark.parametrize("name", ["model.safetensors", "config.toml", LIST])
@pytest.mark.parametrize("short", [False, True])
def test_what_was_damaged_here_is_downloaded_anew(
    hub: Hub,
    hdovd: Callable[..., Ran],
    own_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    short: bool,
) -> None:
    """That file alone, once; without a network it is said which it is."""
    assert hdovd("push", own_run, "hf://me/run").code == 0
    assert hdovd("runs", "diff", "hf://me/run", own_run).code == 0
    (blob,) = {file.resolve() for file in (tmp_path / "here" / "huggingface").rglob(name) if file.is_file()}
    good = blob.read_bytes()
    blob.write_bytes(good[:-9] if short else good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    shutil.rmtree(tmp_path / "here" / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = one_line(hdovd("runs", "diff", "hf://me/run", own_run))
    if name != LIST:
        assert f"{name} has SHA-256 {hashlib.sha256(blob.read_bytes()).hexdigest()}, expected " in line
    else:
        assert "its hdovd.json is damaged" in line
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.asked.clear()
    ran = hdovd("runs", "diff", "hf://me/run", own_run)
    assert ran.code == 0, ran
    if name != LIST:
        assert ran.out.count(f"hf://me/run: {name} is not what was pushed, and is downloaded anew") == 1
    assert [asked.rpartition("/")[2] for asked in hub.asked if asked.startswith("GET") and "/resolve/" in asked] == [
        name
    ]
    assert blob.read_bytes() == good


def test_what_is_wrong_again_is_not_downloaded_for_ever(hub: Hub, hdovd: Callable[..., Ran], own_run: Path) -> None:
    hdovd("push", own_run, "hf://me/run")
    hub.repositories["model", "me/run"].change(**{"config.toml": b"mine"})
    for _ in range(2):
        hub.asked.clear()
        line = one_line(hdovd("runs", "diff", "hf://me/run", own_run))
        assert ": config.toml has SHA-256 " in line
    assert sum(asked.startswith("GET") and asked.endswith("config.toml") for asked in hub.asked) == 1


def test_what_is_not_listed_is_not_used(hub: Hub, hdovd: Callable[..., Ran], own_run: Path, tmp_path: Path) -> None:
    hdovd("push", own_run, "hf://me/run")
    repository = hub.repositories["model", "me/run"]
    repository.commit(repository.commits[repository.head] | {"checkpoint.pt": b"evil", "README.md": b"mine"})
    assert hdovd("runs", "diff", "hf://me/run", own_run).code == 0
    assert not list((tmp_path / "here" / "cache").rglob("checkpoint.pt"))


def test_who_may_not(
    hub: Hub, hdovd: Callable[..., Ran], own_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hdovd("push", own_run, "hf://me/run")
    repository = hub.repositories["model", "me/run"]
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    assert "your token may not do this: take one that may write" in one_line(hdovd("push", own_run, "hf://me/run"))
    new_machine(monkeypatch, tmp_path / "there")
    repository.gated = True
    assert "its owner has to let you in" in one_line(hdovd("runs", "diff", "hf://me/run", own_run))
    repository.gated = False
    monkeypatch.delenv("HF_TOKEN")
    assert "or it is private: look at the name, and log in" in one_line(hdovd("runs", "diff", "hf://me/run", own_run))
    assert "log in (hf auth login, or HF_TOKEN)" in one_line(hdovd("push", own_run, "hf://me/new"))
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN} with letters\nthat no header takes")
    one_line(hdovd("push", own_run, "hf://me/new"))  # and holds no token, as of all commands here


def test_pushing_again_replaces_what_was_there(hub: Hub, hdovd: Callable[..., Ran], own_run: Path, world: Path) -> None:
    hdovd("eval", own_run, "--data", world, "--device", "cpu")
    hdovd("push", own_run, "hf://me/run")
    repository = hub.repositories["model", "me/run"]
    repository.commit(repository.commits[repository.head] | {"picture.png": b"mine"})
    (own_run / "metrics.json").unlink()
    assert hdovd("push", own_run, "hf://me/run").code == 0
    files = repository.commits[repository.head]
    assert "metrics.json" not in files
    assert files["picture.png"] == b"mine"
    assert "not evaluated" in files["README.md"].decode()
    assert hdovd("runs", "diff", "hf://me/run", own_run).code == 0


def test_wrong_sources_are_told_before_the_hub_is_asked(
    hub: Hub,
    hdovd: Callable[..., Ran],
    own_run: Path,
    copied_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "no feature cache at" in one_line(hdovd("push", tmp_path, "hf://me/run"))
    assert "expected hf://USER/NAME" in one_line(hdovd("push", own_run, "me/run"))
    assert "expected a folder, and hf://USER/NAME" in one_line(hdovd("push", own_run, "hf://me/run@main"))
    part = next((copied_cache / "instance").rglob("c/0/0"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert "is damaged, as said above, and is not pushed" in one_line(hdovd("push", copied_cache, "hf://me/run"))
    weights = own_run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert "model.safetensors" in one_line(hdovd("push", own_run, "hf://me/run"))
    line = one_line(hdovd("train", "--cache", copied_cache, "--out", "hf://me/run"))
    assert "--out hf:/me/run: train into a folder; hdovd push puts it on the Hub" in line
    assert hub.asked == []
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr(sys.modules[__name__], "forget", lambda _: None)
    line = one_line(hdovd("push", own_run, "hf://me/run"))
    assert line == 'hf://me/run needs the package huggingface_hub: pip install "hdovd[hub]"\n'
