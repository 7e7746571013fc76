"""Checkpoints on disk, made once."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(name) -> (folder, transformers model in float32); made once per session, so do not change either."""
    tiny = pytest.importorskip("tiny_checkpoints", exc_type=ImportError)  # needs transformers
    made = {}

    def get(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = tiny.build(*tiny.CHECKPOINTS[name])
            model.save_pretrained(folder)
            made[name] = folder, model
        return made[name]

    return get
