"""A GPT-2 of 12 layers, 768 wide: texts behind one instruction, whose tokens are run once, or again with every row.

Three things are done in turns: scoring two labels of one token, scoring four labels of three tokens (by hand: every
label behind every text as a row of its own, as an evaluation harness does), and generating eight tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn.functional import pad
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import deltaprompt as dp
from benchmarks.paired import Pair, pair, turns
from deltaprompt.backbone import Backbone, shared
from deltaprompt.backbone.load import demo_folder, wrap

INSTRUCTION = "the following text was written by a customer about a product and says how good it was ; " * 4
TEXT = "it came late and the box was torn but all that i had wanted was in it and works well"
TEXTS = [dp.Example({"text": TEXT[3 * (n % 7) :]}) for n in range(32)]
SHORT = {"bad": "bad", "good": "good"}
LONG = {name: f"{name} on the whole" for name in ("bad", "good", "poor", "fine")}


def backbone() -> Backbone:
    """A causal model with random weights and the demo's tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo_folder())
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=101, eos_token_id=102, pad_token_id=0)
    torch.manual_seed(0)
    return wrap(GPT2LMHeadModel(config).eval(), tokenizer, kind="causal", name="")


def whole(call: Callable[[], object]) -> Callable[[], object]:
    """The same call where nothing is shared."""

    def run() -> object:
        kept, shared.SAVED = shared.SAVED, 1 << 62
        try:
            return call()
        finally:
            shared.SAVED = kept

    return run


@torch.inference_mode()
def by_hand(model: dp.Model) -> torch.Tensor:
    """log p of every label behind every text [texts, labels], each a row of its own: logits everywhere, then a sum."""
    rows = [encoded.variants[0].ids for encoded in model.encode(TEXTS)]
    answers = [model.features.answer_ids(words) for words in LONG.values()]
    found = []
    for ids in rows:
        both = [torch.tensor(ids + answer) for answer in answers]
        longest = max(map(len, both))
        batch = torch.stack([pad(row, (0, longest - len(row))) for row in both])
        mask = torch.stack([torch.arange(longest) < len(row) for row in both]).long()
        scores = model.backbone.model(input_ids=batch, attention_mask=mask).logits.log_softmax(-1)
        each = scores[:, :-1].gather(-1, batch[:, 1:, None])[..., 0]
        found.append(torch.stack([s[len(ids) - 1 : len(row) - 1].sum() for s, row in zip(each, both, strict=True)]))
    return torch.stack(found)


def run(rounds: Mapping[str, int]) -> list[Pair]:
    """All pairs."""
    on, times = backbone(), min(rounds["base"], 3)
    template = INSTRUCTION + "{text} ; it was {mask}"
    short = dp.adapt(on, dp.Task(template, SHORT), [dp.LoRA()])
    length = len(short.encode(TEXTS)[0].variants[0].ids)
    batch = next(short.features.batches(short.encode(TEXTS), len(TEXTS)))
    inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
    told = f"{shared.shared_length(inputs)} of {length} tokens shared"
    config = GenerationConfig(max_new_tokens=8, min_new_tokens=8, pad_token_id=0)

    def pairs_of(name: str, ours: Callable[[], object], peers: Mapping[str, Callable[[], object]]) -> list[Pair]:
        took = turns({"ours": ours, **peers}, times)
        return [pair(f"{name}, {told}: {peer}", took["ours"], took[peer]) for peer in peers]

    def score() -> object:
        return short.probabilities(TEXTS)

    def generate() -> object:
        return short.adapted.generate(inputs, config=config)

    pairs = pairs_of("scoring 2 labels", score, {"whole rows": whole(score)})
    pairs += pairs_of("generating 8 tokens", generate, {"whole rows": whole(generate)})
    short.adapted.remove()
    long = dp.adapt(on, dp.Task(template, LONG), [dp.LoRA()])

    def candidates() -> object:
        return long.probabilities(TEXTS)

    peers = {"whole rows": whole(candidates), "each label a row": lambda: by_hand(long)}
    return pairs + pairs_of("scoring 4 labels of 4 tokens", candidates, peers)


if __name__ == "__main__":
    from benchmarks.__main__ import show

    show(run({"base": 5}))
