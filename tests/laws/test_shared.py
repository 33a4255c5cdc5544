"""Tokens that all rows begin with are run once: answers, scores of answers and what is generated stay what they are."""

import pytest
import torch
from torch.testing import assert_close
from transformers import GenerationConfig

import deltaprompt as dp
from deltaprompt.backbone import shared
from deltaprompt.compose import Adapted
from deltaprompt.conformance.choose import chosen_models
from deltaprompt.conformance.shrink import backbone as backbone_of
from deltaprompt.errors import ConfigError
from tests import backbones_zoo as zoo
from tests.adapted_zoo import DELTAS, adapted_to, made, shake

FAMILIES = ("gpt2", "llama", "bloom", "falcon", "mistral")
PAIRS = [*((d, f) for d in DELTAS for f in ("gpt2", "llama")), *(("lora", f) for f in FAMILIES[2:])]
WINDOW = 60
TEXTS = ("a good movie", "one two three bad good movie it was", "so", "it was", "one two")
INSTRUCTION = "one two three good movie it was bad so one two three"
WORDS = {"one": {"a": "good", "b": "bad"}, "several": {"a": "good movie", "b": "bad", "c": "one two three"}}


@pytest.fixture
def passes(monkeypatch):
    """Every batch is worth it; counts the batches whose shared tokens were run, and how many tokens these were."""
    lengths = []
    plain = shared._run

    def counted(backbone, inputs, length, each=1):
        begun = plain(backbone, inputs, length, each)
        if begun is not None:
            lengths.append(length)
        return begun

    monkeypatch.setattr(shared, "SAVED", 1)
    monkeypatch.setattr(shared, "_run", counted)
    monkeypatch.setattr(shared, "TRIED", shared.WeakKeyDictionary())
    return lengths


def plainly(call):
    """What a call gives where nothing is worth it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "SAVED", float("inf"))
        return call()


def build(family):
    """A backbone; Mistral's with a window of attention that its texts fit in."""
    backbone = zoo.build(
        family, torch.float32 if family == "bloom" else torch.float64
    )  # padding is NaN in Bloom's double
    if family == "mistral":
        return windowed(backbone, WINDOW)
    return backbone


def windowed(backbone, window):
    backbone.model.config.sliding_window = window
    vars(backbone).pop("config", None)  # as it was
    return backbone


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_answers_are_those_of_whole_rows(name, family, words, passes):
    task = dp.Task(f"{INSTRUCTION} {{text}} it was {{mask}}", WORDS[words])
    model = dp.adapt(build(family), task, [made(name)])
    shake(model.adapted)
    examples = [dp.Example({"text": text}) for text in TEXTS]
    found = model.probabilities(examples)
    assert len(passes) == 2  # the trial and the batch
    assert passes[1] >= len(INSTRUCTION.split())
    assert_close(found, plainly(lambda: model.probabilities(examples)), rtol=0, atol=1e-5)
    assert_close(model.probabilities(examples, batch_size=1), found, rtol=0, atol=1e-5)
    assert len(passes) == 2  # a row alone shares nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_keeps_a_token_of_its_own(family, passes):
    """All rows the same: all but the last token is shared."""
    model = dp.adapt(build(family), dp.Task("{text} {mask}", WORDS["one"]))
    examples = [dp.Example({"text": "one two three"})] * 3
    found = model.probabilities(examples)
    assert_close(found, plainly(lambda: model.probabilities(examples)), rtol=0, atol=1e-5)
    assert_close(found, found[:1].expand(3, -1), rtol=0, atol=1e-6)


def test_rows_of_another_adaptation_each_share_nothing(passes, tmp_path):
    backbone = zoo.build("llama")
    task = dp.Task(f"{INSTRUCTION} {{text}} {{mask}}", WORDS["one"])
    for name in ("first", "second"):
        model = dp.adapt(backbone, task, [dp.LoRA(2)])
        shake(model.adapted, 0.2 if name == "first" else 0.3)
        model.save(tmp_path / name)
        model.adapted.remove()
    many = dp.open_many([tmp_path / "first", tmp_path / "second"], backbone)
    mixed = many.predict(TEXTS[:2], ["first", "second"])
    assert not passes
    alone = many.predict(TEXTS, "first")
    assert len(passes) == 2
    assert abs(alone[0]["score"] - mixed[0]["score"]) < 1e-5


def test_training_runs_whole_rows(passes):
    model = dp.adapt(zoo.build("llama"), dp.Task(f"{INSTRUCTION} {{text}} {{mask}}", WORDS["one"]), [dp.LoRA(2)])
    examples = [dp.Example({"text": text}, "a") for text in TEXTS]
    model.train()
    for batch in model.features.batches(model.encode(examples), 8):
        model(batch)["loss"].backward()
        with torch.no_grad():
            model(batch)  # its rows would draw dropout together
    assert not passes


# Generation


def prompts(backbone, side="left"):
    """Three rows with four tokens in front that all share, two of them padded."""
    ids = torch.arange(30).reshape(3, 10) * 5 % (backbone.vocabulary - 8) + 7
    lengths = (10, 7, 6)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        mask[row, 10 - n :] = 1
        ids[row, 10 - n : 14 - n] = ids[0, :4]
    ids[mask == 0] = backbone.tokenizer.pad_token_id
    return {"input_ids": ids, "attention_mask": mask}


HOW = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "drawn": {"do_sample": True, "num_return_sequences": 2},
    "penalised": {"repetition_penalty": 1.5},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("name", "family"), [*(("lora", f) for f in FAMILIES), ("prefix", "gpt2"), ("prefix", "llama")]
)
def test_what_is_generated_stays(name, family, how, passes):
    adapted = shake(Adapted(build(family), [made(name)], 2))
    inputs, config = prompts(adapted.backbone), GenerationConfig(max_new_tokens=5, pad_token_id=0, **HOW[how])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = adapted.generate(inputs, 1, config)
        assert passes[1:] == [4]
        torch.manual_seed(0)
        assert torch.equal(found, plainly(lambda: adapted.generate(inputs, 1, config)))
    with adapted.generating(1, 3 if how == "beams" else 2):
        torch.manual_seed(0)
        whole = adapted.model.generate(**inputs, generation_config=config)
    assert found.shape == (3 * config.num_return_sequences if config.num_return_sequences else 3, 5)
    assert torch.equal(found, whole[:, 10:])


SETTINGS = [
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 2},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"guidance_scale": 1.5},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("own", [True, False])
def test_settings_that_see_columns_share_nothing(setting, own, passes):
    """Whether they are given, or the model's own."""
    adapted = adapted_to("llama", "lora")
    given = {"max_new_tokens": 3, "pad_token_id": 0, **({} if own else setting)}
    if own:
        adapted.model.generation_config.update(**setting)
    assert adapted.generate(prompts(adapted.backbone), None, GenerationConfig(**given)).shape == (3, 3)
    assert not passes


@pytest.mark.parametrize("setting", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_the_models_own_settings_count(setting, passes):
    adapted, config = adapted_to("llama", "lora"), GenerationConfig(max_new_tokens=3, pad_token_id=0)
    adapted.model.generation_config.update(**setting)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = adapted.generate(prompts(adapted.backbone), None, config)
        torch.manual_seed(0)
        assert torch.equal(found, plainly(lambda: adapted.generate(prompts(adapted.backbone), None, config)))
    assert passes[1:] == [4]
    adapted.model.generation_config.update(return_dict_in_generate=True)
    with pytest.raises(ConfigError, match="generate gives tokens alone"):
        adapted.generate(prompts(adapted.backbone), None, config)


def test_rows_of_a_slot_each_and_encoder_decoders_are_generated_as_ever(passes):
    adapted, config = adapted_to("llama", "lora", 2), GenerationConfig(max_new_tokens=3, pad_token_id=0)
    inputs = prompts(adapted.backbone)
    mixed = adapted.generate(inputs, torch.tensor([0, 1, 0]), config)
    assert not passes
    assert torch.equal(mixed[1:2], adapted.generate({n: t[1:2] for n, t in inputs.items()}, 1, config))
    answers = adapted_to("t5", "lora", 1)
    rows = zoo.inputs_of(answers.backbone)
    both = {n: rows[n] for n in ("input_ids", "attention_mask")}
    assert answers.generate(both, config=GenerationConfig(max_new_tokens=3, decoder_start_token_id=0)).shape[0] == 2


def test_more_than_tokens_is_refused():
    adapted = adapted_to("llama", "lora")
    with pytest.raises(ConfigError, match=r"generate gives tokens alone; .* within adapted.generating\(\)"):
        adapted.generate(prompts(adapted.backbone), config=GenerationConfig(return_dict_in_generate=True))


# Where it would not be exact


def test_a_window_that_padding_would_fill_shares_nothing(passes):
    """Mistral's layers see so many columns: padding between the shared tokens and a row's own would take some."""
    backbone = build("mistral")
    padded = prompts(backbone)
    whole = {n: t[:1].repeat(3, 1) for n, t in padded.items()}
    assert shared.begun(backbone, padded, more=WINDOW) is None
    assert shared.begun(backbone, padded, more=WINDOW - 10).length == 4
    assert shared.begun(backbone, whole, more=WINDOW).length == 9


@pytest.mark.parametrize("window", [20, 22, 24, 26, 40])
def test_answers_that_follow_are_within_the_window_too(window, passes):
    task = dp.Task("one two three good movie {text} it was {mask}", {"a": "good movie so bad it", "b": "bad"})
    model = dp.adapt(windowed(build("mistral"), window), task)
    examples = [dp.Example({"text": text}) for text in (*TEXTS, "one two three good movie one two three")]
    longest = max(row.length for row in model.encode(examples))
    found = model.probabilities(examples)
    assert_close(found, plainly(lambda: model.probabilities(examples)), rtol=0, atol=1e-5)
    assert bool(passes) == (longest + max(model.features.answer_lengths) - 1 <= window)


def test_a_window_of_the_models_own_making_is_seen(passes):
    """GPT-Neo's lies in a buffer, where its cache does not know of it."""
    backbone = zoo.build("gpt_neo")
    window, inputs = backbone.config["window_size"], prompts(backbone)
    assert shared.begun(backbone, inputs, more=window - 10).length == 4
    assert shared.begun(backbone, inputs, more=window) is None


def test_positions_by_length_share_nothing(passes):
    backbone = zoo.build("llama")
    backbone.model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    vars(backbone).pop("config", None)
    assert shared.begun(backbone, prompts(backbone)) is None
    assert not passes


@pytest.mark.parametrize("name", ["mpt", "mamba", "roformer"])
def test_models_that_count_columns_or_keep_states_share_nothing(name, passes):
    (architecture,) = chosen_models(f"causal:{name}")
    backbone = backbone_of(architecture)
    assert shared.begun(backbone, prompts(zoo.build("llama"))) is None
    assert shared.TRIED[backbone.model] is False


def test_a_trial_that_tells_nothing_is_made_again(passes):
    adapted = adapted_to("llama", "lora")
    parts = dict(adapted.parts())
    kept = {name: p.detach().clone() for name, p in parts.items()}
    with torch.no_grad():
        for p in parts.values():
            p.fill_(float("nan"))
        assert shared.begun(adapted.backbone, prompts(adapted.backbone)) is None
        for name, p in parts.items():
            p.copy_(kept[name])
        assert shared.begun(adapted.backbone, prompts(adapted.backbone)).length == 4


def test_what_is_not_a_padded_batch_of_texts_shares_nothing():
    inputs = prompts(zoo.build("llama"))
    assert shared.shared_length(inputs) == 4
    assert shared.shared_length({**inputs, "token_type_ids": inputs["input_ids"]}) == 0
    assert shared.shared_length({n: t.flip(1) for n, t in inputs.items()}) == 0  # padded on the right
    assert shared.shared_length({"input_ids": inputs["input_ids"]}) == 0
    moved = (inputs["attention_mask"].cumsum(1) + 7).clamp(min=0)
    assert shared.shared_length({**inputs, "position_ids": moved}) == 0
    inputs["input_ids"][1, 3] += 1
    assert shared.shared_length(inputs) == 0
