"""What a user reads when the installation is broken: one sentence with the fix."""

import importlib.util
from pathlib import Path

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


def test_cuda_kernels_are_loaded_where_torch_has_cuda(monkeypatch, tmp_path):
    """A broken library is an error, not a reason to go on without; a torch without CUDA has no use for it."""
    loaded = []
    for name in ("_C_cpu.so", "_C_cuda.so"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(_lib, "folder", lambda: tmp_path)
    monkeypatch.setattr(torch.ops, "fastdecode", object())
    monkeypatch.setattr(torch.ops, "load_library", lambda path: loaded.append(Path(path).name))
    for version, expected in ((None, ["_C_cpu.so"]), ("13.0", ["_C_cpu.so", "_C_cuda.so"])):
        monkeypatch.setattr(torch.version, "cuda", version)
        loaded.clear()
        _lib.load()
        assert loaded == expected

    def fail(path):
        if path.endswith("_C_cuda.so"):
            raise OSError("undefined symbol: aoti_torch_get_current_cuda_stream")

    monkeypatch.setattr(torch.ops, "load_library", fail)
    with pytest.raises(
        ImportError, match=r"library _C_cuda\.so does not load with torch .*: run `pip install .*undefined"
    ):
        _lib.load()
    (tmp_path / "_C_cuda.so").unlink()
    _lib.load()


def cpu_ops() -> list[str]:
    """Names of the ops that have a kernel for the CPU."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    return sorted(name.removeprefix("fastdecode::") for name in names if name.startswith("fastdecode::"))


@pytest.mark.skipif(_lib.cuda_is_loaded(), reason="the CUDA kernels are there")
@pytest.mark.parametrize("name", cpu_ops())
def test_a_missing_cuda_kernel_names_the_device_and_the_fix(name):
    """Dispatched by hand, as a CUDA tensor would be: there is no GPU here."""
    op = getattr(torch.ops.fastdecode, name).default
    values = {"Tensor": torch.zeros(1), "List[Tensor]": [torch.zeros(1)], "int": 1, "bool": True, "float": 1.0}
    arguments = [values.get(str(argument.type)) for argument in op._schema.arguments]
    option = "--config-settings=cmake.define.FASTDECODE_CUDA=ON"
    message = rf"^{name}: no kernel for cpu: this fastdecode was built without CUDA .*{option}"
    with pytest.raises(NotImplementedError, match=message):
        op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments)


def test_a_missing_simulation_names_the_fix(monkeypatch, tmp_path):
    monkeypatch.setattr(_lib, "folder", lambda: tmp_path)
    with pytest.raises(ImportError, match=r"built without _C_simt: .*FASTDECODE_SIMT=ON"):
        _lib.load_simt()
