from __future__ import annotations

import pytest

from attention_inputs import SCHEMES, Inputs, make, plain_attention
from fastdecode.testing.reference import attention as reference
from support import DTYPES, assert_as_good_as_torch


def check(ops, inputs: Inputs, what: str = "") -> None:
    """Against the reference, by the rule of `assert_as_good_as_torch`."""
    out, lse, status = inputs(ops.paged_attention)
    want = inputs(reference.paged_attention)
    assert status.tolist() == want.status.tolist(), what
    plain, plain_lse = plain_attention(inputs)
    assert_as_good_as_torch(out, want.out, plain, f"{what} out")
    assert_as_good_as_torch(lse, want.lse, plain_lse, f"{what} lse")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", [*SCHEMES, "fp8_static"])
def test_every_scheme_equals_reference(ops, scheme, dtype):
    for layout in ("HND", "NHD"):
        check(ops, make(scheme=scheme, dtype=dtype, layout=layout), f"{scheme} {dtype} {layout}")
