"""Where requests end: end-of-text, stop ids, stop strings, caps, the context, errors."""

from __future__ import annotations

import pytest
import torch
import toys

from fastdecode.drafters import PromptLookup, SmallModel
from fastdecode.generation import generate, stream
from fastdecode.models import TabularLM, Tokenizer, Want
from fastdecode.testing.drafters import Known
from fastdecode.testing.models import Broken, Chain, noisy

CHAIN = toys.chain()  # 0, 1, 2, ... 12, 0, 1, ...


def along(prompt: list[int], n: int) -> list[int]:
    return [(prompt[-1] + 1 + i) % toys.VOCAB for i in range(n)]


def run(prompt: list[int], length: int = 4, model=CHAIN, **options):
    """With a drafter that knows the text, so that every round is full."""
    options.setdefault("max_new_tokens", 12)
    return generate(
        model, prompt, method=Known([prompt + along(prompt, 40)], toys.VOCAB), draft_length=length, **options
    )


@pytest.mark.parametrize("slot", range(5), ids=["first", "second", "middle", "last-draft", "bonus"])
@pytest.mark.parametrize("kind", ["eos", "stop-id"])
def test_an_end_in_any_slot_of_a_round(slot, kind):
    end = 1 + slot
    model = toys.chain(eos_token_ids=(end,)) if kind == "eos" else CHAIN
    result = run([0], model=model, stop_ids=[end] if kind == "stop-id" else None)
    assert result.tokens == along([0], slot + 1)
    assert (result.finish_reason, result.stop) == ("stop", end)
    assert result.statistics.target_passes == 1
    assert result.statistics.accepted == min(slot + 1, 4)


def test_ignore_eos_keeps_stop_ids():
    model = toys.chain(eos_token_ids=(3,))
    assert run([0], model=model, ignore_eos=True).tokens == along([0], 12)
    assert run([0], model=model, ignore_eos=True, stop_ids=[5]).tokens == along([0], 5)


@pytest.mark.parametrize("cap", range(8))
def test_a_cap_inside_a_round(cap):
    result = run([0], max_new_tokens=cap)
    assert result.tokens == along([0], cap)
    assert (result.finish_reason, result.stop) == ("length", None)
    assert result.statistics.target_passes == -(-cap // 5)
    assert result.statistics.drafted == cap - result.statistics.target_passes  # each pass adds a token of its own


@pytest.mark.parametrize("method", ["plain", "prompt-lookup", "speculative"])
def test_the_context_is_a_cap(method):
    target, draft = toys.native(max_context=16), toys.native(noise=0.15, max_context=16)
    prompts = [[1] * n for n in (16, 15, 14, 3)]
    draft_model = {"draft_model": draft} if method == "speculative" else {}
    results = generate(target, prompts, method=method, max_new_tokens=100, **draft_model)
    assert [len(result.tokens) for result in results] == [0, 1, 2, 13]
    assert {result.finish_reason for result in results} == {"length"}
    free = generate(toys.native(max_context=64), prompts, max_new_tokens=[0, 1, 2, 13])
    assert [result.tokens for result in results] == [result.tokens for result in free]


class Watched(Chain):
    """Notes, by a row's first token, how many tokens it held before and after every pass behind the prompts."""

    def __init__(self, **options) -> None:
        super().__init__(toys.VOCAB, **options)
        self.passes: dict[int, list[tuple[int, int]]] = {}

    def forward(self, tokens, *, cache, num_tokens=None, want=Want.LOGITS, **options):
        counts = [tokens.shape[1]] * len(tokens) if num_tokens is None else num_tokens
        if want:
            for row, (length, count) in enumerate(zip(cache.host_lens, counts)):
                first = int(cache.tokens[row, 0]) if length else int(tokens[row, 0])
                self.passes.setdefault(first, []).append((length, length + count))
        return super().forward(tokens, cache=cache, num_tokens=num_tokens, want=want, **options)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("method", ["known", "small-model"])
def test_drafts_never_pass_a_requests_end(method, length):
    """Neither its cap nor the model's context. The last token of a request is never fed, so no draft may be either."""
    target = Watched(max_context=20)
    draft = Watched(max_context=20)
    prompts = [[first, *along([first], n - 1)] for first, n in ((0, 3), (4, 1), (8, 12), (11, 19), (2, 15))]
    caps = [9, 17, 100, 100, 5]  # the third and fourth end with the context, the last with both
    ends = {prompt[0]: min(len(prompt) + cap, 20) for prompt, cap in zip(prompts, caps)}
    texts = [prompt + along(prompt, 40) for prompt in prompts]
    drafter = Known(texts, toys.VOCAB) if method == "known" else SmallModel(draft)
    results = generate(target, prompts, method=drafter, draft_length=length, max_new_tokens=caps)
    assert [result.tokens for result in results] == [along(prompt, ends[prompt[0]] - len(prompt)) for prompt in prompts]
    for first, end in ends.items():
        # a request that has ended holds end - 1 tokens and is fed its last one until it leaves the batch
        after = [after for before, after in target.passes[first] if before < end - 1]
        assert max(after) == end - 1  # so a budget that is too small shows, too
        assert all(after < end for before, after in draft.passes.get(first, []))
    statistics = results.statistics
    assert statistics.drafted == statistics.accepted == statistics.tokens - statistics.request_passes


@pytest.mark.parametrize("least", range(1, 8))
def test_ends_are_forbidden_below_min_new_tokens(least):
    model = toys.chain(eos_token_ids=(3,))
    plain = generate(model, [0], min_new_tokens=least, max_new_tokens=12)
    assert len(plain.tokens) >= least
    assert 3 not in plain.tokens[: least - 1]
    for options in ({}, {"temperature": 0.8}):
        expected = generate(model, [0], min_new_tokens=least, max_new_tokens=12, stop_ids=[5], **options)
        for drafter in (Known([[0, *along([0], 40)]], toys.VOCAB), SmallModel(noisy(model)), PromptLookup()):
            result = generate(
                model, [0], method=drafter, min_new_tokens=least, max_new_tokens=12, stop_ids=[5], **options
            )
            assert (result.tokens, result.finish_reason) == (expected.tokens, expected.finish_reason)


def test_bias_and_bans_hold_for_every_method():
    options = {"bias": {4: -float("inf"), 7: 30.0}, "ban_ids": [2]}
    expected = generate(CHAIN, [[0], [5]], max_new_tokens=12, **options)
    assert expected[1].tokens == [7] * 12
    bias = torch.zeros(toys.VOCAB)
    bias[4], bias[7] = -float("inf"), 30.0
    same = generate(CHAIN, [[0], [5]], max_new_tokens=12, bias=bias, ban_ids=[2], method="prompt-lookup")
    assert [result.tokens for result in same] == [result.tokens for result in expected]
    banned = generate(CHAIN, [0], max_new_tokens=50, ban_ids=[2, 3], temperature=3.0, method="prompt-lookup")
    assert not {2, 3} & set(banned.tokens)


PIECES = ["a", "b", "ab", "c", "bc", "d", " ", "e", "x", "y", "z", "!", "<end>"]
LETTERS = toys.letters(PIECES)


@pytest.mark.parametrize("length", [1, 3, 8])
@pytest.mark.parametrize(
    ("stop", "tokens", "text", "found"),
    [
        ("c", 3, "bab", "c"),  # the very token
        ("bc", 3, "ba", "bc"),  # across two tokens, before the token of that name
        (["bcbc"], 4, "ba", "bcbc"),  # across three tokens
        (["d ", "cb"], 4, "bab", "cb"),  # the first of several
        (["nothing"], 10, "babcbcd exyz", None),
        ("bab", 2, "", "bab"),  # from the first letter
    ],
)
def test_stop_strings_across_tokens(length, stop, tokens, text, found):
    expected = generate(CHAIN, [0], tokenizer=LETTERS, stop=stop, max_new_tokens=10)
    result = run([0], length, tokenizer=LETTERS, stop=stop, max_new_tokens=10)
    for each in (expected, result):
        assert (len(each.tokens), each.text, each.stop) == (tokens, text, found)
        assert each.finish_reason == ("stop" if found else "length")
    late = run([0], length, tokenizer=LETTERS, stop=stop, max_new_tokens=10, min_new_tokens=10)
    assert len(late.tokens) == 10


@pytest.mark.parametrize("stop", [["cd"], ["cd", "zzzzzzzzzz"], ["zzzzzzzzzz", "cd"]])
def test_a_stop_string_completed_too_early_never_ends_the_request(stop):
    """Also beside a longer string, which is searched for further back."""
    for length in (1, 8):
        late = run([0], length, tokenizer=LETTERS, stop=stop, max_new_tokens=10, min_new_tokens=6)
        assert (len(late.tokens), late.text, late.stop) == (10, "babcbcd exyz", None)
        in_time = run([0], length, tokenizer=LETTERS, stop=stop, max_new_tokens=10, min_new_tokens=5)
        assert (len(in_time.tokens), in_time.text, in_time.stop) == (5, "babcb", "cd")


@pytest.mark.parametrize("stop", [None, "bcbc", ["d ", "xyz!"], "zz", "yz!"])
@pytest.mark.parametrize("method", ["plain", "prompt-lookup"])
def test_streamed_pieces_are_the_result(stop, method):
    prompts = [[0], [4, 5], [0, 1, 2, 3], [11]]
    options = {"tokenizer": LETTERS, "stop": stop, "max_new_tokens": [11, 5, 0, 30], "method": method, "stop_ids": [12]}
    expected = generate(CHAIN, prompts, **options)
    pieces: dict[int, list] = {i: [] for i in range(4)}
    for chunk in stream(CHAIN, prompts, **options):
        pieces[chunk.index].append(chunk)
    for result, chunks in zip(expected, pieces.values()):
        assert [token for chunk in chunks for token in chunk.tokens] == result.tokens
        assert "".join(chunk.text for chunk in chunks) == result.text
        assert [chunk.result is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
        last = chunks[-1].result
        assert (last.tokens, last.text, last.finish_reason) == (result.tokens, result.text, result.finish_reason)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("plain", {}),
        ("plain", {"temperature": 1.0}),
        ("speculative", {}),
        ("speculative", {"temperature": 1.0}),
        ("speculative", {"temperature": 1.0, "rule": "ratio"}),
    ],
    ids=str,
)
def test_a_request_in_error_leaves_the_others_alone(method, options):
    target = toys.table()
    broken = Broken(target, marked=9, first=5)
    prompts = [[1, 2], [9, 3], [4, 5, 6]]
    if method == "speculative":
        options = {**options, "draft_model": noisy(target), "draft_length": 3}
    alone = generate(target, prompts, method=method, max_new_tokens=12, **options)
    results = generate(broken, prompts, method=method, max_new_tokens=12, **options)
    assert [results[i].tokens for i in (0, 2)] == [alone[i].tokens for i in (0, 2)]
    assert [result.finish_reason for result in results] == ["length", "error", "length"]
    # the row of position 5 predicts the sixth token; a round that comes upon it is lost as a whole
    kept = results[1].tokens
    assert kept == alone[1].tokens[: len(kept)] and len(kept) <= 4
    if method == "plain":
        assert len(kept) == 4


def test_everything_forbidden_is_an_error():
    result = generate(CHAIN, [0], ban_ids=list(range(toys.VOCAB)))
    assert (result.tokens, result.finish_reason) == ([], "error")


def test_cache_and_text_agree_after_every_round():
    """The committed cache holds the text but its last token, whatever was rejected."""
    target = toys.table()
    seen = []
    real = target.forward

    def watch(tokens, *, cache, **options):
        for row, length in enumerate(cache.host_lens):
            seen.append((cache.tokens[row, :length].tolist(), int(tokens[row, 0])))
        return real(tokens, cache=cache, **options)

    target.forward = watch  # type: ignore[method-assign]
    result = generate(target, [1, 2, 3], method=SmallModel(noisy(toys.table())), max_new_tokens=20)
    text = [1, 2, 3, *result.tokens]
    for cached, root in seen[1:]:  # the first is the prefill
        assert [*cached, root] == text[: len(cached) + 1]


def test_streamed_text_never_holds_half_a_character():
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = Tokenizer(backend)
    text = "aé€😀 z"
    ids = tokenizer.encode(text)  # one per byte, all different: a table of order 1 can recite them
    law = torch.full((len(alphabet), len(alphabet)), 1e-6, dtype=torch.float64)
    law[ids[:-1], ids[1:]] = 1
    model = TabularLM(law / law.sum(-1, keepdim=True))
    for length in (1, 3, 8):
        options = {"method": Known([ids], len(alphabet)), "draft_length": length, "tokenizer": tokenizer}
        chunks = list(stream(model, ids[:1], max_new_tokens=len(ids) - 1, **options))
        assert "".join(chunk.text for chunk in chunks) == text[1:]
        assert all("\ufffd" not in chunk.text for chunk in chunks)
        stopped = generate(model, ids[:1], stop="€😀", **options)
        assert (stopped.text, stopped.tokens) == ("é", ids[1:10])
        cut = generate(model, ids[:1], max_new_tokens=4, **options)
        assert cut.text == "é\ufffd"
