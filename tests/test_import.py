"""What a user reads when the installation is broken: one sentence with the fix."""

import importlib.util

import pytest
import torch

from fastdecode import _lib


@pytest.mark.parametrize("version", ["2.9.1", "2.1.0+cu118", "1.13.1"])
def test_an_old_torch_is_refused_by_name(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=rf"needs torch >= 2.10 and found {version[:5]}.*pip install -U torch"):
        _lib.load()


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.14.1+cu130", "3.0.0"])
def test_newer_torches_are_taken(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    _lib.load()


def test_a_missing_host_library_names_the_fix(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="library _host is missing: run `pip install"):
        _lib.folder()


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_a_missing_or_broken_kernel_library_names_the_fix(monkeypatch, tmp_path, content):
    if content is not None:
        (tmp_path / "_C_cpu.so").write_bytes(content)
    monkeypatch.setattr(_lib, "folder", lambda: tmp_path)
    monkeypatch.setattr(torch.ops, "fastdecode", object())
    with pytest.raises(ImportError, match=r"library _C_cpu\.so .*run `pip install"):
        _lib.load()
