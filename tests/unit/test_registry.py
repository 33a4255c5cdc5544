"""The registry: variants by name, their options checked, their stored form."""

import dataclasses
import json
import math
import re
import types

import pytest

from deltaprompt import registry
from deltaprompt.deltas.lora import LoRA
from deltaprompt.errors import ConfigError

DELTAS = list(registry.variants("deltas"))


def test_a_file_is_a_variant():
    assert {"lora", "adapter", "bitfit", "ia3", "prefix", "soft_prompt"} <= set(DELTAS)
    assert not any(name.startswith("_") for name in DELTAS)
    assert registry.variant("deltas", "lora") is LoRA


@pytest.mark.parametrize("name", DELTAS)
def test_a_description_is_turned_back(name):
    made = registry.variant("deltas", name)()
    stored = json.loads(json.dumps(registry.describe("deltas", made)))
    assert stored["kind"] == name
    assert registry.from_description("deltas", stored) == made
    assert type(registry.from_description("deltas", stored)) is type(made)


@pytest.mark.parametrize("name", DELTAS)
def test_options_are_fields_that_are_frozen_and_have_a_default(name):
    made = registry.variant("deltas", name)()
    first = dataclasses.fields(made)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, first, None)


def test_options_are_used():
    assert registry.build("deltas", "lora", {"rank": 4, "at": ["attn.k"]}) == LoRA(rank=4, at=("attn.k",))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("loar", {}, "no delta 'loar'; did you mean 'lora'"),
        ("lora", {"rnk": 4}, "delta 'lora' has no option 'rnk'; did you mean 'rank'?"),
        ("lora", {"zzz": 4}, "delta 'lora' has no option 'zzz'; possible: gated, rank, alpha"),
        ("lora", {"rank": "much"}, "delta 'lora', option rank: got 'much'"),
        ("lora", {"rank": 0}, "lora: got rank=0, dropout=0.0; rank >= 1 and 0 <= dropout < 1 are possible"),
        ("lora", {"dropout": 1.0}, "lora: got rank=8, dropout=1.0"),
        ("adapter", {"bottleneck": 0}, "adapter: got bottleneck=0"),
        ("adapter", {"activation": "glu"}, "delta 'adapter', option activation: got 'glu'"),
        ("prefix", {"length": 0}, "prefix: got length=0"),
        ("soft_prompt", {"length": -1}, "soft_prompt: got length=-1"),
        ("ia3", {"at": "attn.k"}, "delta 'ia3', option at: got 'attn.k'"),
        ("lora", {"rank": True}, "delta 'lora', option rank: got True; a number is possible"),
        ("p_tuning", {"hidden": True}, "delta 'p_tuning', option hidden: got True; a number is possible"),
        ("dora", {"alpha": math.nan}, "delta 'dora', option alpha: got nan; a finite number is possible"),
        ("vera", {"d_initial": "nan"}, "delta 'vera', option d_initial: got nan; a finite number is possible"),
        ("parallel_adapter", {"scale": "inf"}, "option scale: got inf; a finite number is possible"),
    ],
)
def test_a_wrong_option_is_an_error(name, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        registry.build("deltas", name, options)


def test_a_stored_form_needs_its_kind():
    with pytest.raises(ConfigError, match="a delta needs the key 'kind'; possible: adapter, adapter_bias, bitfit"):
        registry.from_description("deltas", {"rank": 4})


def test_others_add_variants_by_entry_points(monkeypatch):
    entry = types.SimpleNamespace(name="mine", value="deltaprompt.deltas.lora")
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == "deltaprompt.deltas" else [])
    registry.variants.cache_clear()
    try:
        assert registry.variant("deltas", "mine") is LoRA
    finally:
        registry.variants.cache_clear()


def test_a_module_with_two_public_dataclasses_is_an_error(monkeypatch):
    monkeypatch.setattr(registry, "variants", lambda kind: {"odd": "deltaprompt.types"})
    with pytest.raises(ConfigError, match="deltaprompt.types must define one public dataclass, it defines"):
        registry.variant("deltas", "odd")
