"""How an engine uses the ops: its own model and KV cache, any draft, then `verify_chain` and `commit`.

Run `python examples/own_loop.py [folder]` with a Hugging Face causal LM; without one a small random Llama is made.
"""

import sys

import torch
import transformers

from fastdecode import Status, ops


@torch.inference_mode()
def speculative(model, prompt: list[int], new_tokens: int, num_drafts: int, **law) -> tuple[list[int], int]:
    """Generated tokens and target passes; `law` is the sampling filters and the seed."""
    text, passes = list(prompt), 0
    lengths, finished = torch.tensor([len(text)], dtype=torch.int32), torch.tensor([False])
    cap = torch.tensor([len(text) + new_tokens], dtype=torch.int32)
    cache = transformers.DynamicCache()
    if text[:-1]:
        model(torch.tensor([text[:-1]]), past_key_values=cache)  # the last token is slot 0 of the first round
    while not finished:
        draft = ngram_draft(text, num_drafts)
        logits = model(torch.tensor([text[-1:] + draft]), past_key_values=cache).logits  # [1, K + 1, V]
        drafts = torch.tensor([draft], dtype=torch.int64)
        # offset: absolute position of the token that row 0 predicts
        verified = ops.verify_chain(drafts, target_logits=logits, rule="coupled", offset=lengths.long(), **law)
        if int(verified.status) & Status.ERRORS:  # such a row emits nothing: without this the loop would not end
            raise ArithmeticError(f"no token can be drawn at position {len(text)}: {Status(int(verified.status))!r}")
        committed = ops.commit(verified.tokens, verified.num_emitted, lengths, finished, max_lengths=cap)
        count = int(committed.num_committed)
        text += verified.tokens[0, :count].tolist()
        if count < len(draft) + 1:
            cache.crop(count - len(draft) - 1)  # negative: forget as many rejected drafts
        passes += 1
    return text[len(prompt) :], passes


def ngram_draft(text: list[int], most: int) -> list[int]:
    """What followed the last two tokens where they occurred before."""
    for i in range(len(text) - 3, -1, -1):
        if text[i : i + 2] == text[-2:]:
            return text[i + 2 : i + 2 + most]
    return []


@torch.inference_mode()
def plain(model, prompt: list[int], new_tokens: int, **law) -> list[int]:
    """One token per pass, drawn by `sample`."""
    text, cache, fed = list(prompt), transformers.DynamicCache(), list(prompt)
    for _ in range(new_tokens):
        logits = model(torch.tensor([fed]), past_key_values=cache).logits[:, -1]
        fed = ops.sample(logits, offset=len(text), **law).tokens.tolist()
        text += fed
    return text[len(prompt) :]


def main(arguments: list[str]) -> None:
    torch.manual_seed(0)
    if arguments:
        model = transformers.AutoModelForCausalLM.from_pretrained(arguments[0])
    else:
        sizes = {"vocab_size": 16, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        config = transformers.LlamaConfig(num_attention_heads=4, initializer_range=0.1, **sizes)
        model = transformers.LlamaForCausalLM(config)
    model, prompt, new_tokens = model.double().eval(), [1, 2, 3, 4, 1, 2], 96
    model.generation_config.eos_token_id = None  # the loops here have no end-of-text id either
    for temperature in (0.0, 0.3):
        law = {"temperature": temperature, "seed": 1}
        tokens, passes = speculative(model, prompt, new_tokens, num_drafts=4, **law)
        assert tokens == plain(model, prompt, new_tokens, **law), "the coupled rule gives the tokens of plain sampling"
        if temperature == 0:
            config = transformers.GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
            greedy = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
            assert tokens == greedy, "and at temperature 0 those of model.generate"
        print(f"temperature {temperature}: {new_tokens / passes:.2f} tokens per pass, equal to plain decoding")


if __name__ == "__main__":
    main(sys.argv[1:])
