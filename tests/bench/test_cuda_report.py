"""The table of registers, from what cuobjdump prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastdecode.cli.bench import benchmarks

ROOT = Path(__file__).parents[2]
HEAD = """
Fatbin elf code:
================
arch = sm_90
code version = [1,8]
identifier = ../../csrc/sample/topk_logits_cuda.cu
"""
ANONYMOUS = "_ZN10fastdecode2v052_GLOBAL__N__b1_16_linear_cuda_cu_0d7b13linear_kernelIfLi1EEEvNS_10LinearArgsE"
USAGE = f"""{HEAD}
Resource usage:
 Common:
  GLOBAL:0
 Function shared_kernel:
  REG:44 STACK:32 SHARED:5184 LOCAL:0 CONSTANT[0]:640 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {ANONYMOUS}:
  REG:64 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = f"""{HEAD}
	code for sm_90
		Function : shared_kernel
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED"
        /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
        /*0010*/               @P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0020*/              @!P1 LDG.E R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0030*/                   LDL R5, [R5] ;  /* 0x0 */
        /*0040*/                   STL.128 [R1+0x20], R4 ;  /* 0x0 */
        /*0050*/                   LDS.128 R4, [R2] ;  /* 0x0 */
        /*0060*/                   LD.E.128 R4, desc[UR4][R2.64] ;  /* 0x0 */
		Function : {ANONYMOUS}
        /*0000*/              @!P2 LDGSTS.E.BYPASS.128 [R7], desc[UR18][R14.64] ;  /* 0x0 */
        /*0010*/                   LDGSTS.E.64 [R7], desc[UR18][R14.64] ;  /* 0x0 */
        /*0020*/              @UP0 STG.E.128 desc[UR4][R2.64], R4 ;  /* 0x0 */
        /*0030*/                   STG.E desc[UR4][R2.64], R4 ;  /* 0x0 */
"""


@pytest.fixture
def cuda_report():
    return benchmarks("cuda_report")


def test_kernels(cuda_report):
    found = cuda_report.kernels(USAGE, SASS, {"shared_kernel": "void fastdecode::v0::scan<float, (int)3>(Args, int)"})
    kernel = cuda_report.Kernel
    assert found == [
        kernel("topk_logits", ANONYMOUS, "sm_90", 64, 0, 0, 1, 1),
        kernel("topk_logits", "scan<float, 3>", "sm_90", 44, 5184, 2, 2, 0),
    ]


def test_names_are_short(cuda_report):
    demangled = "void fastdecode::v0::(anonymous namespace)::copy<fastdecode::v0::Half>(fastdecode::Args, long)"
    assert cuda_report.short(demangled) == "copy<Half>"


def test_what_is_no_kernel_is_refused(cuda_report):
    with pytest.raises(ValueError, match="expected CUDA kernels, found none"):
        cuda_report.kernels("", "", {})
    with pytest.raises(ValueError, match="shared_kernel: no code in the disassembly"):
        cuda_report.kernels(USAGE, HEAD, {})


def test_the_committed_table_lists_every_op(cuda_report):
    """It is made by hand, after kernels have changed: this notices only that one is not in it at all."""
    table = (ROOT / "docs" / "cuda-registers.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    assert {row[0].strip("| `") for row in rows} == {
        path.name.removesuffix("_cuda.cu")
        for path in (ROOT / "csrc").glob("*/*_cuda.cu")
        if "__global__" in path.read_text(encoding="utf-8") or "FD_LAUNCH" in path.read_text(encoding="utf-8")
    }
    assert all(len(row) == len(cuda_report.COLUMNS) and re.fullmatch(r"\d+", row[2]) for row in rows)
