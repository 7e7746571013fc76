"""The cases of golden/verify_chain.json, and the file itself: `python tests/golden_chains.py` writes it.

Inputs are made of integer hashes, so that no generator of any library has to stay as it is for the file to stay valid;
outputs are those of the reference, kept where every decision is clear of rounding.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdecode.testing.reference import verify as reference

PATH = Path(__file__).parent / "golden" / "verify_chain.json"
CLEAR = 1e-4  # margin of every decision, also in float32
RULES = ("ratio", "coupled", "block")
FILTERS: tuple[dict, ...] = (
    {},
    {"temperature": 0.75},
    {"top_k": 10, "top_p": 0.875},
    {"temperature": 1.25, "top_k": 50, "top_p": 0.9375, "min_p": 0.0625},
    {"temperature": 0.0},
)
SHAPES = ((3, 2), (5, 3), (17, 4), (100, 5), (1000, 3))  # V, K


def mixed(*numbers: int | np.ndarray) -> np.ndarray:
    """32 bits of a hash of the numbers."""
    state = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):  # modulo 2^64
        for number in numbers:
            state = (state ^ np.asarray(number, dtype=np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
            state = state ^ (state >> np.uint64(29))
    return np.asarray(state) >> np.uint64(32)


def inputs(case: dict) -> dict:
    """Tensors of the op in float64. The draft's law is a quotient of small integers: the same number everywhere."""
    number, vocab_size, length = case["number"], case["vocab_size"], case["length"]
    ids = np.arange(vocab_size)
    logits = np.array([(mixed(number, 1, i, ids) >> np.uint64(20)) / 512 - 4.0 for i in range(length + 1)])
    likely = np.array([1 << (mixed(number, 1, i, ids) >> np.uint64(29)).astype(np.int64) for i in range(length)])
    weights = likely * (
        1 + np.array([mixed(number, 2, i, ids) >> np.uint64(30) for i in range(length)]).astype(np.int64)
    )
    total = np.cumsum(weights, 1)
    aims = np.array([int(mixed(number, 3, i)) % total[i, -1] for i in range(length)])
    draft = [int((total[i] <= aims[i]).sum()) for i in range(length)]
    drawn = case["drawn"] and case["rule"] != "coupled"
    return {
        "draft_tokens": torch.tensor([draft]),
        "draft_probs": torch.from_numpy(weights / total[:, -1:])[None] if drawn else None,
        "draft_lens": torch.tensor([case["draft_len"]], dtype=torch.int32),
        "target_logits": torch.from_numpy(logits)[None],
        "rule": case["rule"],
        "seed": torch.tensor([case["seed"]]),
        "offset": torch.tensor([case["offset"]]),
        **case["filters"],
    }


def as_dtype(given: dict, dtype: torch.dtype) -> dict:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}


def both(case: dict) -> list[reference.Verified]:
    """By the reference, of float64 and of float32 inputs."""
    return [reference.verify_chain(**as_dtype(inputs(case), dtype)) for dtype in (torch.float64, torch.float32)]


def cases() -> list[dict]:
    """Every rule over every shape and filter, with drafts that were drawn and that were not, and shorter drafts."""
    made = []
    for rule in RULES:
        for shape, (vocab_size, length) in enumerate(SHAPES):
            for chosen, filters in enumerate(FILTERS):
                number = 100 * shape + 10 * chosen
                for drawn in (True, False) if rule != "coupled" else (False,):
                    case = {
                        "rule": rule,
                        "number": number,
                        "vocab_size": vocab_size,
                        "length": length,
                        "draft_len": length - (number // 10 + drawn) % 2,
                        "drawn": drawn,
                        "seed": int(mixed(number, 4)) * 2**32 + int(mixed(number, 5)) - 2**63,
                        "offset": int(mixed(number, 6)) >> 20 << 20 * (chosen % 2),
                        "filters": filters,
                    }
                    double, single = both(case)
                    while min(double.margin[0], single.margin[0]) <= CLEAR:
                        case["number"] += 1
                        double, single = both(case)
                    tokens = double.tokens[0].tolist()
                    assert tokens == single.tokens[0].tolist() and double.status[0] == 0
                    made.append(case | {"tokens": tokens, "num_accepted": int(double.num_accepted[0])})
    return made


def main() -> None:
    about = "verify_chain: tokens of fastdecode.testing.reference; every decision is clear by more than 1e-4"
    lines = ",\n".join(f"  {json.dumps(case)}" for case in cases())
    PATH.write_text(f'{{"about": "{about}",\n"cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
