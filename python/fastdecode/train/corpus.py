"""The training text: sources of the Python standard library, by committed list and hash.

`data/train.sha256` and `data/heldout.sha256` hold one `sha256  path` line per file, relative to the
standard library's folder, in the format of `sha256sum`. They were made with `PYTHON_VERSION`;
another version has other files, and `load` refuses what does not match.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from pathlib import Path

PYTHON_VERSION = "3.11.7"
NUM_HELDOUT_FILES = 40
DATA = Path(__file__).parent / "data"

# Generated tables, data files and build records: no prose, no code that anybody wrote.
_EXCLUDED = re.compile(
    r"site-packages/|__pycache__/|encodings/(cp|iso|mac|koi|tis|hp)|pydoc_data/|_sysconfigdata|_pydecimal"
    r"|lib2to3/tests/data/|test/encoded_modules/|test/bad|test/test_importlib/data|config-"
)


def stdlib_folder() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def candidates(folder: Path) -> list[str]:
    """Relative paths of all files that are UTF-8, parse as Python and are longer than 400 bytes, sorted."""
    found = []
    for path in folder.rglob("*.py"):
        name = path.relative_to(folder).as_posix()
        if _EXCLUDED.search(name):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue
        if len(text) > 400:
            found.append(name)
    return sorted(found)


def make_lists(folder: Path) -> tuple[list[str], list[str]]:
    """Split the candidates into training and held-out files; the split depends on the names' hashes only."""
    names = candidates(folder)
    sizes = {n: (folder / n).stat().st_size for n in names}
    # Held out: files of ordinary length. Very long ones would dominate the score, very short ones say nothing.
    middle = [n for n in names if 4_000 <= sizes[n] <= 60_000]
    heldout = set(sorted(middle, key=lambda n: hashlib.sha256(n.encode()).digest())[:NUM_HELDOUT_FILES])
    return [n for n in names if n not in heldout], sorted(heldout)


def write_lists(folder: Path) -> None:
    """Write `data/*.sha256`; run once per Python version, by `python -m fastdecode.train lists`."""
    for split, names in zip(("train", "heldout"), make_lists(folder), strict=True):
        lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
        (DATA / f"{split}.sha256").write_text("".join(lines))


def heldout_names() -> list[str]:
    """Paths of the held-out files, relative to the standard library's folder; of any Python, with or without hashes."""
    return [line.split("  ", 1)[1] for line in (DATA / "heldout.sha256").read_text().splitlines()]


def load(split: str, folder: Path | None = None) -> dict[str, str]:
    """Read the files of `split` ("train" or "heldout"): relative path -> text.

    Raises:
        FileNotFoundError: a listed file is missing (some distributions strip `test/`).
        ValueError: a file's hash differs from the committed one.
    """
    folder = folder or stdlib_folder()
    texts = {}
    for line in (DATA / f"{split}.sha256").read_text().splitlines():
        digest, name = line.split("  ", 1)
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"fastdecode.train: {path} is missing; use CPython {PYTHON_VERSION} with its test folder"
            )
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(
                f"fastdecode.train: {path}: expected the file of CPython {PYTHON_VERSION}, got another hash"
            )
        texts[name] = data.decode("utf-8")
    return texts
