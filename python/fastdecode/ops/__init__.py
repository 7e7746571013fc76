"""The kernels as typed functions; `torch.ops.fastdecode.<name>` is the same with every argument positional."""

from .gemv import linear, pack_weight
from .sample import RowStats, Sampled, TargetProbs, TokenLogprobs, row_stats, sample, target_probs, token_logprobs
from .verify import Committed, Verified, commit, verify_chain, verify_chain_greedy

__all__ = [
    "Committed",
    "RowStats",
    "Sampled",
    "TargetProbs",
    "TokenLogprobs",
    "Verified",
    "commit",
    "linear",
    "pack_weight",
    "row_stats",
    "sample",
    "target_probs",
    "token_logprobs",
    "verify_chain",
    "verify_chain_greedy",
]
