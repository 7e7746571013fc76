"""The kernels as typed functions; `torch.ops.fastdecode.<name>` is the same with every argument positional."""

from .attention import Attention, Merged, merge_states, paged_attention, prefix_attention
from .gemv import linear, pack_weight
from .kv import Dequantised, KVReport, kv_append_, kv_dequant, kv_flush_, kv_keep_, kv_report
from .kv_pages import KVPages
from .logits import Penalized, apply_token_bitmask_, penalize
from .sample import (
    RowStats,
    Sampled,
    TargetProbs,
    TokenLogprobs,
    TopkLogits,
    row_stats,
    sample,
    target_probs,
    token_logprobs,
    topk_logits,
)
from .tree import TreeMask, tree_check, tree_mask
from .verify import Committed, Verified, commit, verify_chain, verify_chain_greedy

__all__ = [
    "Attention",
    "Committed",
    "Dequantised",
    "KVPages",
    "KVReport",
    "Merged",
    "Penalized",
    "RowStats",
    "Sampled",
    "TargetProbs",
    "TokenLogprobs",
    "TopkLogits",
    "TreeMask",
    "Verified",
    "apply_token_bitmask_",
    "commit",
    "kv_append_",
    "kv_dequant",
    "kv_flush_",
    "kv_keep_",
    "kv_report",
    "linear",
    "merge_states",
    "pack_weight",
    "paged_attention",
    "penalize",
    "prefix_attention",
    "row_stats",
    "sample",
    "target_probs",
    "token_logprobs",
    "topk_logits",
    "tree_check",
    "tree_mask",
    "verify_chain",
    "verify_chain_greedy",
]
