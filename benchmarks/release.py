"""A release, built and tried: wheel and sdist, checked by twine; the wheel alone in a fresh environment of each Python
that is here, with `release_smoke.py`; and the size of what was installed.

    python benchmarks/release.py [OUT]     (`make release`; needs build, twine and uv)
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
OF_TORCH = ("torch", "torchgen", "functorch", "nvidia", "triton", "cuda")  # beginnings of what torch brings along


def run(*words: object) -> None:
    subprocess.run(list(map(str, words)), check=True)


def interpreter(version: str) -> Path | None:
    """A Python of this version: one that uv finds, pyenv has, or uv can fetch; else None."""
    here = [str(path) for path in sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))]
    for words in (*here, version):
        found = subprocess.run(
            [sys.executable, "-m", "uv", "python", "find", "--no-project", "--system", words],
            capture_output=True,
            text=True,
        )
        if found.returncode == 0:
            return Path(found.stdout.strip())
    fetched = subprocess.run([sys.executable, "-m", "uv", "python", "install", "--quiet", version], capture_output=True)
    return interpreter(version) if fetched.returncode == 0 else None


def sizes(site: Path) -> Counter[str]:
    """Bytes of the folders and files of a site-packages."""
    found: Counter[str] = Counter()
    for file in site.rglob("*"):
        if file.is_file() and not file.is_symlink():
            found[file.relative_to(site).parts[0]] += file.stat().st_size
    return found


def try_wheel(wheel: Path, python: Path, folder: Path) -> None:
    """Install it without extras, and run the smoke test."""
    own = folder / "bin" / "python"
    run(sys.executable, "-m", "uv", "venv", "--quiet", "--python", python, folder)
    run(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", own, wheel)
    subprocess.run([own, "-I", ROOT / "benchmarks" / "release_smoke.py"], check=True, cwd=folder)
    found = sizes(next(folder.glob("lib/python*/site-packages")))
    of_torch = sum(size for name, size in found.items() if name.startswith(OF_TORCH))
    most = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in found.most_common(8))
    print(
        f"  installed: {found.total() / 1e6:,.0f} MB, of them {of_torch / 1e6:,.0f} MB torch and what it brings; {most}"
    )


def main(out: Path) -> None:
    for old in (*out.glob("hdovd-*.whl"), *out.glob("hdovd-*.tar.gz")):
        old.unlink()
    run(sys.executable, "-m", "build", "--installer", "uv", "--outdir", out, ROOT)
    run(sys.executable, "-m", "twine", "check", "--strict", *out.glob("hdovd-*"))
    (wheel,) = out.glob("hdovd-*.whl")
    missing = []
    for version in PYTHONS:
        python = interpreter(version)
        if python is None:
            missing.append(version)
            continue
        print(f"Python {version}: {python}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            try_wheel(wheel, python, Path(folder) / "env")
    for file in sorted(out.glob("hdovd-*")):
        print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")
    if missing:
        sys.exit(f"not tried, since there is no such Python here: {', '.join(missing)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist")
