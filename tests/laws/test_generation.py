"""Generation by transformers' own `generate`: rows with an adaptation each, beams, draws, caches of either kind."""

import pytest
import torch
from torch.testing import assert_close

from deltaprompt.errors import ConfigError
from tests.adapted_zoo import DELTAS, adapted_to, inputs_for

FAMILIES = ["gpt2", "qwen2", "t5"]
PAIRS = [*((d, f) for d in DELTAS for f in FAMILIES), ("bitfit", "opt")]  # OPT's feed-forward maps see [b * s, d]
pairs = pytest.mark.parametrize(("name", "family"), PAIRS)
INDEX = torch.tensor([1, 0])


def prepared(name, family):
    """An adapted model of two slots, and two prompts for it, one of them padded."""
    adapted = adapted_to(family, name, 2, torch.float32)
    inputs = inputs_for(name, adapted.backbone, "left" if adapted.backbone.kind == "causal" else "right")
    return adapted, {n: t for n, t in inputs.items() if not n.startswith("decoder")}


def generate(adapted, inputs, index, each=1, **how):
    fixed = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    with adapted.generating(index, each):
        return adapted.model.generate(**inputs, **(fixed | how), output_logits=True)


@pairs
def test_beams_of_a_mixed_batch_are_those_of_each_row_alone(name, family):
    adapted, inputs = prepared(name, family)
    mixed = generate(adapted, inputs, INDEX, 2, num_beams=2, num_return_sequences=2).sequences.view(2, 2, -1)
    for row, slot in enumerate(INDEX.tolist()):
        alone = {n: t[row : row + 1] for n, t in inputs.items()}
        found = generate(adapted, alone, slot, num_beams=2, num_return_sequences=2).sequences
        assert torch.equal(mixed[row], found)
    assert (adapted.routing.index, adapted.routing.each) == (None, 1)


CACHED = [*((d, "qwen2") for d in DELTAS), *(("prefix", f) for f in ("gpt2", "mistral", "t5", "bart")), ("lora", "t5")]


@pytest.mark.parametrize(("name", "family"), CACHED)
def test_a_cache_of_fixed_size_gives_what_a_growing_one_gives(name, family):
    """With padding, where transformers writes out the mask, and without, where it leaves it to the kernel."""
    adapted, inputs = prepared(name, family)
    whole = {n: t[:1] for n, t in inputs.items()}
    for rows, index in ((inputs, INDEX), (whole, 1)):
        grown, fixed = (generate(adapted, rows, index, cache_implementation=kind) for kind in ("dynamic", "static"))
        assert torch.equal(fixed.sequences, grown.sequences)
        assert_close(torch.stack(fixed.logits), torch.stack(grown.logits), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "family"), [("lora", "qwen2"), ("prefix", "gpt2"), ("soft_prompt", "t5")])
def test_sequences_are_drawn_in_the_slot_of_their_row(name, family):
    adapted, inputs = prepared(name, family)
    with torch.random.fork_rng():
        drawn = generate(adapted, inputs, INDEX, 3, do_sample=True, num_return_sequences=3)
    first = drawn.logits[0].unflatten(0, (2, 3))  # [rows, drawn, vocabulary]
    for row, slot in enumerate(INDEX.tolist()):
        alone = generate(adapted, inputs, slot).logits[0][row]
        assert_close(first[row], alone.expand(3, -1), rtol=0, atol=1e-4)
    assert not torch.allclose(*(generate(adapted, inputs, slot).logits[0] for slot in (0, 1)))


def test_tokens_guessed_from_the_prompt_change_nothing():
    adapted, inputs = prepared("prefix", "qwen2")
    row = {n: t[:1].repeat(1, 3) for n, t in inputs.items()}
    guessed = generate(adapted, row, 1, prompt_lookup_num_tokens=2)
    assert torch.equal(guessed.sequences, generate(adapted, row, 1).sequences)


def test_beams_that_were_not_told_of_are_refused():
    adapted, inputs = prepared("lora", "qwen2")
    with pytest.raises(ConfigError, match=r"2 adaptations were named for 4 rows; .*with adapted.generating\(adaptat"):
        generate(adapted, inputs, INDEX, num_beams=2)
    with pytest.raises(ConfigError, match="adaptation 2 was named; 0 to 1 are possible"):
        generate(adapted, inputs, 2)
    assert generate(adapted, inputs, 1, num_beams=2).sequences.shape[0] == 2
