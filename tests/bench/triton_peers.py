"""The Triton peers give what they should, by Triton's interpreter; run by test_gpu.py in a process of its own."""

import torch

from bench import gpu_peers

torch.manual_seed(0)
for rows, vocab_size in ((1, 1), (3, 33), (2, 5000), (1, 20000)):
    logits = 3 * torch.randn(rows, vocab_size)
    logits[:, ::7] = -torch.inf
    logits[:, vocab_size // 2] = 9.0
    largest, argmax, logsumexp, entropy = gpu_peers.triton_row_stats(logits)
    probs = torch.softmax(logits.double(), -1)
    assert torch.equal(largest, logits.amax(-1)) and torch.equal(argmax, logits.argmax(-1))
    assert torch.allclose(logsumexp.double(), logits.double().logsumexp(-1), atol=1e-5)
    assert torch.allclose(entropy.double(), torch.special.entr(probs).sum(-1), atol=1e-4)

    words = torch.randint(-(2**31), 2**31, (rows, (vocab_size + 31) // 32)).int()
    allowed = (words[..., None] >> torch.arange(32) & 1).flatten(-2)[:, :vocab_size] == 1
    expected = logits.masked_fill(~allowed, -torch.inf)
    gpu_peers.triton_bitmask(logits, words)
    assert torch.equal(logits, expected)

law = torch.tensor([0.5, 0.25, 0.0, 0.125, 0.125])
drawn = gpu_peers.triton_race(law.log().repeat(4000, 1), torch.ones(4000))
assert torch.allclose(torch.bincount(drawn, minlength=5) / 4000, law, atol=0.03)
