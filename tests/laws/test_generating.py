"""Laws of generation on tiny models: the loss by brute force, a batch against rows alone, training, saving, chats."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from deltaprompt.backbone import Backbone
from deltaprompt.backbone.load import wrap
from deltaprompt.compose import Adapted
from deltaprompt.deltas._base import Delta
from deltaprompt.deltas.adapter import Adapter
from deltaprompt.deltas.ln_tuning import LNTuning
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.features import Encoded
from deltaprompt.features.conversation import pack
from deltaprompt.model import generator as module
from deltaprompt.model.decoding import cut
from deltaprompt.model.generation import Chat, Generation
from deltaprompt.model.generator import Generator, generator, token_losses
from deltaprompt.model.saved import open_
from deltaprompt.trainer import Plan, Training, fit, fit_many, loop
from deltaprompt.types import Example, Message
from tests import backbones_zoo as zoo
from tests import tokenizers_zoo
from tests.adapted_zoo import DELTAS, made, shake

FAMILIES = ["gpt2", "llama", "t5", "bart"]
CAUSAL = ["gpt2", "llama"]
GENERATION = Generation("{text} =>", max_target=12)
PAIRS = {
    "a great movie": "It was great",
    "a bad film, a terrible bad film with bad acting": "terrible acting",
    "good plot": "yes",
    "the cat sat on the mat": "no, it was not there",
    "In summary the dog was good": "a good dog",
}
EXAMPLES = [Example({"text": text, "target": target}) for text, target in PAIRS.items()]
families = pytest.mark.parametrize("family", FAMILIES)
DECODED = [
    *((family, delta) for family in ("gpt2", "t5") for delta in DELTAS),
    *((family, delta) for family in ("llama", "bart") for delta in ("lora", "prefix", "soft_prompt")),
]


def shaken(family: str, *deltas: Delta, generation: Generation | Chat = GENERATION, **how: Any) -> Generator:
    """A generator of its own backbone, its deltas moved from where they start."""
    made = Generator(zoo.build(family, how.pop("dtype", torch.float32)), generation, deltas or [LoRA(rank=2)], **how)
    shake(made.adapted, 0.3)
    return made


# The loss


def by_hand(model: Generator, rows: list[Encoded]) -> float:
    """−log p of every target id by the whole model with all its scores, a row at a time without padding."""
    backbone, losses = model.backbone, list[float]()
    for row in rows:
        (text,) = row.variants
        inputs = {"input_ids": torch.tensor([text.ids]), "attention_mask": torch.ones(1, len(text.ids)).long()}
        if backbone.kind == "seq2seq":
            inputs["decoder_input_ids"] = torch.tensor([text.decoder])
        with torch.no_grad():
            scores = model.adapted(**inputs).logits[0].double()
        probabilities = scores.exp() / scores.exp().sum(-1, keepdim=True)
        losses += [-float(probabilities[at, i].log()) for at, i in zip(text.at, row.targets, strict=True)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("delta", ["lora", "prefix", "soft_prompt"])
@families
def test_the_loss_is_that_of_all_scores_of_the_whole_model(family, delta):
    model = shaken(family, made(delta), dtype=torch.float64, generation=Generation("{text} =>", max_length=60))
    rows = model.encode(EXAMPLES)
    found = float(model(model.collate(rows))["loss"].detach())
    assert_close(found, by_hand(model, rows), rtol=0, atol=1e-6)
    assert_close(model.measure(rows, batch_size=2)["loss"], found, rtol=0, atol=1e-6)


@families
def test_targets_are_the_text_and_an_end_token_behind_the_prompt(family):
    model = shaken(family)
    tokenizer = model.backbone.tokenizer
    for example, row in zip(EXAMPLES, model.encode(EXAMPLES), strict=True):
        (text,) = row.variants
        end = tokenizer.eos_token_id
        said = tokenizer.decode(cut(row.targets[:-1], []), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert said.strip().startswith(example.fields["target"][:4])
        assert row.targets[-1] == end or len(row.targets) == 12
        if model.backbone.kind == "causal":  # one row: what is read gives the next id
            whole = [*text.ids, row.targets[-1]]
            assert [whole[at + 1] for at in text.at] == list(row.targets)
        else:
            assert text.decoder == [model.backbone.config["decoder_start_token_id"], *row.targets[:-1]]


@families
def test_what_is_asked_of_a_text_is_what_its_tokenizer_makes_of_the_whole(family):
    """Prompt and target tokenised apart are the tokens of both together, or of an answer alone."""
    model = shaken(family)
    tokenizer = model.backbone.tokenizer
    for (text, target), row in zip(PAIRS.items(), model.encode(EXAMPLES), strict=True):
        if row.targets[-1] != tokenizer.eos_token_id:
            continue
        ids, own = row.variants[0].ids, list(row.targets)
        if model.backbone.kind == "seq2seq":
            assert ids == tokenizer(f"{text} =>")["input_ids"]
            assert own == tokenizer(target)["input_ids"]
        else:
            assert [*ids, own[-1]] == [*tokenizer(f"{text} => {target}")["input_ids"], tokenizer.eos_token_id]


def test_scores_that_are_too_many_at_once_are_formed_in_parts(monkeypatch):
    model = shaken("llama")
    rows = model.collate(model.encode(EXAMPLES))
    seen = list[int]()
    whole = model(rows)["loss"]
    whole.backward()
    gradients = [p.grad.clone() for _, p in model.parts()]
    model.zero_grad()
    plain = type(model.backbone.head).logits
    monkeypatch.setattr(module, "SCORES", 7 * model.backbone.head.size)
    monkeypatch.setattr(
        type(model.backbone.head), "logits", lambda head, x, r=None: (seen.append(len(x)), plain(head, x, r))[1]
    )
    parts = model(rows)["loss"]
    parts.backward()
    assert max(seen) == 7
    assert_close(parts, whole)
    for (_, p), before in zip(model.parts(), gradients, strict=True):
        assert_close(p.grad, before)


def test_the_head_sees_the_target_positions_alone(monkeypatch):
    model = shaken("gpt2")
    seen, plain = list[int](), token_losses
    monkeypatch.setattr(module, "token_losses", lambda head, x, *rest: (seen.append(len(x)), plain(head, x, *rest))[1])
    rows = model.encode(EXAMPLES)
    model(model.collate(rows))
    assert seen == [sum(len(row.targets) for row in rows)]


# Decoding


@pytest.mark.parametrize(("family", "delta"), DECODED)
def test_a_batch_is_decoded_as_each_row_alone(family, delta):
    model = shaken(family, made(delta))
    together = model.generate(EXAMPLES, 8, batch_size=5)
    assert together == [model.generate([example], 8)[0] for example in EXAMPLES]
    assert together == model.generate(EXAMPLES, 8, batch_size=2)


@families
def test_greedy_decoding_is_the_argmax_of_the_whole_model(family):
    model = shaken(family, LoRA(rank=2), SoftPrompt(length=3), dtype=torch.float64)
    model.backbone.model.generation_config.forced_eos_token_id = None  # BART's, at the longest text
    tokenizer, ends = model.backbone.tokenizer, model.writing.ends
    for example in EXAMPLES:
        (row,) = model.writing.prompts([example])
        (text,) = row.variants
        ids, found = list(text.decoder or text.ids), list[int]()
        for _ in range(8):
            name = "decoder_input_ids" if text.decoder else "input_ids"
            inputs = {"input_ids": torch.tensor([text.ids]), name: torch.tensor([ids])}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            with torch.no_grad():
                found.append(int(model.adapted(**inputs).logits[0, -1].argmax()))
            ids.append(found[-1])
            if found[-1] in ends:
                break
        said = tokenizer.decode(cut(found, ends), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert model.generate([example], 8) == [said.strip()]


@pytest.mark.parametrize("delta", [d for d in DELTAS if d != "unfreeze"])
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_deltas_act_while_texts_are_decoded(family, delta):
    model = shaken(family, made(delta), seeds=[0, 1])
    shake(model.adapted, 1.0)
    with torch.no_grad():
        for _, tensor in model.parts():
            tensor[1] += 0.5 * torch.randn(tensor[1].shape, generator=torch.Generator().manual_seed(3))
    one, other = (model.generate(EXAMPLES * 4, 12, sample=True, slot=slot) for slot in (0, 1))
    assert one != other
    model.adapted.remove()
    bare = Generator(model.backbone, model.generation).generate(EXAMPLES * 4, 12, sample=True)
    assert bare not in (one, other)


@families
def test_beams_find_a_text_that_is_no_less_likely(family):
    model = shaken(family)
    greedy, beams = model.generate(EXAMPLES, 6), model.generate(EXAMPLES, 6, beams=3)
    assert beams == [model.generate([example], 6, beams=3)[0] for example in EXAMPLES]
    assert len(beams) == len(greedy)


def test_what_is_drawn_depends_on_the_seed_alone():
    model = shaken("gpt2")
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    one = model.generate(EXAMPLES, 8, sample=True, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one == model.generate(EXAMPLES, 8, sample=True, seed=1)
    assert one != model.generate(EXAMPLES, 8, sample=True, seed=2)
    assert model.generate(EXAMPLES, 8, sample=True, top_p=1e-6) == model.generate(EXAMPLES, 8)
    assert model.generate(EXAMPLES, 8, sample=True, temperature=1e-4) == model.generate(EXAMPLES, 8)


@families
def test_a_text_ends_at_its_end_token(family):
    model = generator(zoo.build(family), GENERATION, [Adapter(), LNTuning()])
    fit(model, EXAMPLES[:1], training=Training(steps=150, learning_rate=0.2, clip=100, weight_decay=0))
    said = model.generate(EXAMPLES[:1], 30)[0]
    assert said == "It was great"


@families
def test_any_token_may_end_a_text_and_is_no_part_of_it(family, monkeypatch):
    model = shaken(family)
    (prompt,), seen = model.writing.prompts(EXAMPLES[:1]), list[Tensor]()
    plain = type(model.adapted).generate
    monkeypatch.setattr(type(model.adapted), "generate", lambda *given: seen.append(plain(*given)) or seen[-1])
    model.generate(EXAMPLES[:1], 8, sample=True)
    start = 1 if prompt.variants[0].decoder else 0
    (ids,) = (row[start:].tolist() for row in seen[0])
    at = next(i for i in range(2, len(ids)) if ids[i] not in ids[:i])
    model.writing = replace(model.writing, ends=(ids[at],))
    tokenizer = model.backbone.tokenizer
    said = tokenizer.decode(ids[:at], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    assert model.generate(EXAMPLES[:1], 8, sample=True) == [said]
    assert seen[1].shape[1] == start + at + 1


def test_a_decoder_that_starts_from_its_end_token_writes_on():
    """As BART's does."""
    made, tokenizer = zoo.model("bart"), tokenizers_zoo.build("roberta")
    for config in (made.config, made.generation_config):
        config.decoder_start_token_id = tokenizer.eos_token_id
    model = generator(wrap(made, tokenizer), GENERATION)
    assert all(row.variants[0].decoder[0] == tokenizer.eos_token_id for row in model.encode(EXAMPLES))
    assert all(model.generate(EXAMPLES, 4, sample=True))


def test_shared_tokens_in_front_are_run_once(monkeypatch):
    long = "a great movie . It was great , it was terrible ! " * 8
    asked = Generation(long + "{text} =>", max_length=256)
    with zoo.quiet():
        config = zoo.config_of(("Llama", "LlamaForCausalLM", "llama", {**zoo.LLAMA, "max_position_embeddings": 256}))
    torch.manual_seed(0)
    backbone = wrap(zoo.transformers.LlamaForCausalLM(config).eval(), tokenizers_zoo.build("llama"))
    model = generator(backbone, asked, [LoRA(rank=2)])
    shake(model.adapted, 0.3)
    ran = list[int]()
    backbone.base.register_forward_pre_hook(lambda m, args, kw: ran.append(kw["input_ids"].numel()), with_kwargs=True)
    together = model.generate(EXAMPLES, 4)
    shared = sum(ran)
    ran.clear()
    alone = [model.generate([example], 4)[0] for example in EXAMPLES]
    assert together == alone
    assert shared < sum(ran) / 2


# Training


@pytest.mark.parametrize("delta", ["lora", "prefix", "soft_prompt", "reparametrised_prefix"])
@families
def test_training_lowers_the_loss_and_the_best_on_dev_is_kept(family, delta):
    model = generator(zoo.build(family), Generation("{text} =>", max_target=12), [made(delta)])
    rows = model.encode(EXAMPLES)
    before = model.measure(rows)["loss"]
    run = fit(model, EXAMPLES, EXAMPLES, training=Training(steps=40, learning_rate=3e-2, batch_size=5, patience=None))
    assert run.best["loss"] < before - 0.02
    assert run.best["loss"] == min(entry["dev"]["loss"] for entry in run.history)
    assert_close(model.measure(rows)["loss"], run.best["loss"], rtol=0, atol=1e-4)


def learned(model: Generator) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.parts()}


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_two_batches_of_two_are_one_of_four(family):
    """A step's loss is the mean over the tokens of all its targets, however its rows make batches."""
    found = []
    for size, accumulate in ((4, 1), (2, 2), (1, 4)):
        model = generator(zoo.build(family, torch.float64), GENERATION, [LoRA(rank=2)])
        how = Training(steps=4, batch_size=size, accumulate=accumulate, learning_rate=1e-2)
        fit(model, EXAMPLES[:4], training=how)
        found.append(learned(model))
    for name, tensor in found[0].items():
        assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-8)
        assert_close(found[2][name], tensor, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("at", "dropout", "most"),
    [("attn.q", 0.0, 1024), ("attn.q", 0.0, 24), ("attn.q", 0.3, 1024), ("head", 0.0, 1024)],
    ids=["one", "split", "dropout", "head"],
)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_several_seeds_in_one_pass_end_as_each_alone(family, at, dropout, most, monkeypatch):
    """Also where a step's rows are too many tokens for one pass: each row then counts by its target's tokens.

    At the head a row is a target's token, of a seed each, also where scores are formed in parts.
    """
    monkeypatch.setitem(loop.MOST, "cpu", most)
    monkeypatch.setattr(module, "SCORES", 7 * 1024)
    deltas = [LoRA(rank=2, dropout=dropout, at=(at,))]
    how = Training(epochs=3, batch_size=3, learning_rate=1e-2)
    model = Generator(zoo.build(family, torch.float64), GENERATION, deltas, [3, 4])
    runs = fit_many(model, [Plan(EXAMPLES, EXAMPLES[:2], how, seed=seed) for seed in (3, 4)])
    for slot, seed in enumerate((3, 4)):
        alone = generator(zoo.build(family, torch.float64), GENERATION, deltas, seed)
        run = fit(alone, EXAMPLES, EXAMPLES[:2], training=how, seed=seed)
        assert_close(run.best["loss"], runs[slot].best["loss"], rtol=1e-6, atol=1e-6)
        for (name, tensor), (_, own) in zip(model.parts(), alone.parts(), strict=True):
            assert_close(tensor[slot], own[0], rtol=1e-5, atol=1e-7, msg=name)


def test_a_run_that_was_broken_off_goes_on_to_bitwise_the_same(tmp_path, monkeypatch):
    how = Training(epochs=4, batch_size=2, learning_rate=1e-2)
    deltas = [LoRA(rank=2, dropout=0.2)]

    def run(out: Path, resume: bool = False) -> dict[str, Tensor]:
        model = generator(zoo.build("llama"), GENERATION, deltas)
        fit(model, EXAMPLES, EXAMPLES[:2], training=how, seed=5, out=out, resume=resume)
        return learned(model)

    whole, plain, steps = run(tmp_path / "whole"), loop.Loop._one_step, list[int]()

    def one_step(self: loop.Loop, running: Any) -> None:
        steps.append(1)
        if len(steps) == 8:
            raise KeyboardInterrupt
        plain(self, running)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_one_step", one_step)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken")
    again = run(tmp_path / "broken", resume=True)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    name = "adaptation.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    model = generator(zoo.build("llama"), GENERATION, deltas)
    with pytest.raises(ConfigError, match="cannot go on with the run in .*: train was"):
        fit(model, EXAMPLES[1:], EXAMPLES[:2], training=how, seed=5, out=tmp_path / "broken", resume=True)


def test_layers_computed_again_give_the_same_numbers():
    found = []
    for again in (False, True):
        model = generator(zoo.build("llama"), GENERATION, [LoRA(rank=2)])
        fit(model, EXAMPLES, training=Training(steps=3, learning_rate=1e-2, checkpointing=again))
        found.append(learned(model))
    for name, tensor in found[0].items():
        assert_close(found[1][name], tensor)


@pytest.mark.parametrize(
    ("family", "at"),
    [("gpt2", "layers[1:].attn.*"), ("llama", "layers[1:].*"), ("t5", "decoder.*.q"), ("bart", "decoder.layers[1:].*")],
)
def test_frozen_layers_run_once_and_the_numbers_stay(family, at, monkeypatch):
    found, told = [], list[str]()
    monkeypatch.setattr(
        loop.Loop, "run", lambda self, what, plain=loop.Loop.run: told.append(what) or plain(self, what)
    )
    for keep in (True, False):
        model = generator(zoo.build(family, torch.float64), GENERATION, [LoRA(rank=2, at=(at,))])
        how = Training(epochs=3, batch_size=2, learning_rate=1e-2, keep=keep)
        run = fit(model, EXAMPLES, EXAMPLES[:3], training=how)
        found.append((run.best["loss"], learned(model)))
        assert model.once is None
    assert told[0].endswith("kept")
    assert not told[1].endswith("kept")
    assert_close(found[0][0], found[1][0], rtol=0, atol=1e-6)
    for name, tensor in found[0][1].items():
        assert_close(tensor, found[1][1][name], rtol=1e-6, atol=1e-9)


# Saving


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_what_is_opened_writes_the_same(family, delta, tmp_path):
    asked = Generation('{soft:"In summary"} {text}{soft:2} =>', "{target} !", max_length=50, max_target=12, beams=2)
    model = shaken(family, made(delta), generation=asked, seeds=[0, 1])
    model.settle()
    texts, rows = model.generate(EXAMPLES, slot=1), model.encode(EXAMPLES)
    loss = model.measure(rows, slot=1)
    model.save(tmp_path, slot=1)
    model.adapted.remove()
    again = open_(tmp_path, zoo.build(family))
    assert isinstance(again, Generator)
    assert again.generation == asked
    assert again.generate(EXAMPLES) == texts
    assert_close(again.measure(rows)["loss"], loss["loss"], rtol=0, atol=1e-6)


# Conversations

GENERATING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["a", "great movie", "It", "was", "terrible", "yes", "no", "电影", "很", "the cat", ";", "what (", "not )"]


def chatting(family: str = "qwen2", template: str | None = None, positions: int = 512, **how: Any) -> Generator:
    """A generator of conversations on a tiny chat model."""
    spec = zoo.FAMILIES[family]
    with zoo.quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        config = zoo.config_of((*spec[:3], {**spec[3], "max_position_embeddings": positions}))
        model = getattr(zoo.transformers, spec[1])(config).eval()
    tokenizer = copy.deepcopy(tokenizers_zoo.build(spec[2]))
    tokenizer.chat_template = template or tokenizer.chat_template
    return generator(wrap(model, tokenizer), Chat(**how), [LoRA(rank=2)])


def talk(chance: random.Random, system: bool = False) -> Example:
    """A random conversation."""
    said = [" ".join(chance.choices(WORDS, k=chance.randint(1, 9))) for _ in range(2 * chance.randint(1, 4))]
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said)]
    return Example({}, messages=tuple([Message("system", "be good")] * system + turns))


def told(backbone: Backbone, row: Encoded) -> list[tuple[str, bool]]:
    """A row's text in runs, each the assistant's or not, by the places of its targets."""
    (text,) = row.variants
    ids = [*text.ids, row.targets[-1]]
    own = {at + 1 for at in text.at}
    assert [ids[i] for i in sorted(own)] == list(row.targets)
    runs: list[tuple[list[int], bool]] = []
    for i, token in enumerate(ids):
        if not runs or runs[-1][1] != (i in own):
            runs.append(([], i in own))
        runs[-1][0].append(token)
    return [(backbone.tokenizer.decode(some), mine) for some, mine in runs]


@pytest.mark.parametrize("template", [None, GENERATING], ids=["marks", "generation"])
@pytest.mark.parametrize("seed", range(12))
def test_the_loss_is_on_exactly_what_the_assistant_says_and_its_end(seed, template):
    chance = random.Random(seed)
    model = chatting(template=template)
    example = talk(chance, system=seed % 3 == 0)
    (row,) = model.encode([example])
    mine = [text for text, own in told(model.backbone, row) if own]
    assert mine == [f"{m.content}<|im_end|>" for m in example.messages if m.role == "assistant"]
    whole = model.backbone.tokenizer.apply_chat_template([m._asdict() for m in example.messages])["input_ids"]
    ids = [*row.variants[0].ids, row.targets[-1]]
    assert ids == whole[: len(ids)]
    assert model.backbone.tokenizer.decode(whole[len(ids) :]) == "\n"


def test_a_template_that_marks_its_generation_may_rewrite_earlier_turns():
    """As models drop what an earlier turn thought."""
    short = GENERATING.replace("{{ m.content }}", "{{ m.content.split('think ')[-1] }}")
    model = chatting(template=short)
    turns = ("a", "great think was good", "what (", "no")
    messages = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]
    (row,) = model.writing.prompts([Example({}, messages=tuple(messages))])
    want = model.backbone.tokenizer.apply_chat_template(
        [m._asdict() for m in messages[:-1]], tokenize=False, add_generation_prompt=True
    )
    assert model.backbone.tokenizer.decode(row.variants[0].ids) == want
    assert model.generate([Example({}, messages=tuple(messages))], max_new_tokens=2)


def test_a_conversation_that_asks_nothing_is_said():
    with pytest.raises(DataError, match="example 1 has an answer of the assistant's and nothing before it"):
        chatting().generate([Example({}, messages=(Message("assistant", "a"),))])


def test_both_ways_to_the_assistants_part_give_the_same_rows():
    talks = [talk(random.Random(seed)) for seed in range(20)]
    marks, own = (chatting(template=template).encode(talks) for template in (None, GENERATING))
    assert marks == own


@pytest.mark.parametrize("seed", range(8))
def test_a_template_without_special_tokens_for_roles(seed):
    """Llama 2's: what the assistant says begins with the blank that a prompt does not have."""
    model = chatting("llama")
    example = talk(random.Random(seed))
    (row,) = model.encode([example])
    tokenizer = model.backbone.tokenizer
    mine = [text for text, own in told(model.backbone, row) if own]
    said = [m.content for m in example.messages if m.role == "assistant"]
    assert [
        tokenizer.convert_ids_to_tokens(tokenizer(f" {text}</s>", add_special_tokens=False)["input_ids"])
        for text in said
    ]
    assert [text.replace("</s>", "").strip() for text in mine] == [
        tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]).strip() for text in said
    ]
    assert sum(i == tokenizer.eos_token_id for i in row.targets) == len(said)


@pytest.mark.parametrize("seed", range(12))
def test_too_long_a_conversation_ends_with_a_whole_turn_of_the_assistants(seed):
    chance = random.Random(100 + seed)
    example = talk(chance)
    (whole,) = chatting().encode([example])
    turns = [i for i, target in enumerate(whole.targets, 1) if target == whole.targets[-1]]
    lengths = [whole.variants[0].at[n - 1] + 1 for n in turns]  # of rows that end with each turn
    for room in range(lengths[0] + 1, len(whole.variants[0].ids) + 2, 3):
        (row,) = chatting(max_length=room, max_target=1).encode([example])
        kept = max(n for n, length in zip(turns, lengths, strict=True) if length <= room)
        assert row.targets == whole.targets[:kept]
        assert row.variants[0].ids == whole.variants[0].ids[: row.length]
        assert row.length == lengths[turns.index(kept)]


@pytest.mark.parametrize("deltas", [["lora"], ["prefix"], ["soft_prompt"], ["adapter", "prefix"]], ids="+".join)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_packed_conversations_have_the_same_loss(family, deltas):
    talks = [talk(random.Random(seed)) for seed in range(9)]
    plain, packed = (chatting(family, packed=p, max_length=m) for p, m in ((False, 512), (True, 300)))
    losses = []
    for model in (plain, packed):
        model.adapted.remove()
        other = generator(model.backbone, model.generation, [made(name) for name in deltas])
        shake(other.adapted, 0.3)
        rows = other.encode(talks)
        losses.append(other.measure(rows, batch_size=3)["loss"])
        if model is packed:
            assert len(rows) < len(talks)
            assert sum(len(row.parts) for row in rows) == len(talks)
            assert all(sum(row.parts) == row.length <= 300 for row in rows)
    assert_close(losses[1], losses[0], rtol=0, atol=1e-5)


def test_packed_targets_are_those_of_each_conversation():
    talks = [talk(random.Random(seed)) for seed in range(9)]
    plain = chatting().encode(talks)
    packed = pack(plain, 200)
    assert sorted(i for row in packed for i in row.targets) == sorted(i for row in plain for i in row.targets)
    for row in packed:
        (text,), start = row.variants, 0
        for length in row.parts:
            own = [n for n, at in enumerate(text.at) if start <= at < start + length]
            ids = text.ids[start : start + length]
            (one,) = [r for r in plain if r.variants[0].ids == ids and r.targets == tuple(row.targets[n] for n in own)]
            assert [text.at[n] - start for n in own] == one.variants[0].at
            start += length


def test_packing_is_refused_where_texts_would_see_each_other():
    for family in ("bloom", "opt"):
        backbone = zoo.build(family)
        tokenizer = copy.deepcopy(backbone.tokenizer)
        tokenizer.chat_template = tokenizers_zoo.build("chatml").chat_template.replace("<|im_end|>", "<|endoftext|>")
        with pytest.raises(ConfigError, match=r"does not keep the texts of one row apart .*leave packed=True out"):
            generator(wrap(backbone.model, tokenizer), Chat(packed=True))


def test_a_chat_model_learns_what_to_answer():
    model = chatting(packed=True, max_length=100)
    model.adapted.remove()
    model = generator(model.backbone, model.generation, [Adapter(), LoRA(rank=4)])
    talks = [Example({}, messages=(Message("user", q), Message("assistant", a))) for q, a in PAIRS.items()]
    fit(model, talks, talks, training=Training(steps=250, learning_rate=1e-2, patience=None))
    assert model.generate(["good plot", Example({}, messages=talks[0].messages)], 12)[0] == "yes"


def test_a_generator_owns_its_deltas_alone():
    backbone = zoo.build("gpt2")
    Adapted(backbone, [LoRA()])
    with pytest.raises(ConfigError, match="already carries another model's deltas"):
        generator(backbone, GENERATION)
