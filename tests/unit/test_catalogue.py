"""`deltaprompt methods`: every delta says what it is, and what it trains, without being attached."""

import json
import re
import sys
from types import ModuleType

import pytest

from deltaprompt import catalogue, registry
from deltaprompt.compose import Adapted
from deltaprompt.errors import ConfigError, DeltaPromptError
from tests import backbones_zoo as zoo
from tests.command import succeeds


@pytest.mark.parametrize("family", ["bert", "mpnet", "llama", "t5"])
def test_every_method_counts_what_it_would_train(family):
    backbone = zoo.build(family)
    found = {method.name: method for method in catalogue.methods(backbone)}
    assert list(found) == sorted(registry.variants("deltas"))
    for name, method in found.items():
        delta = registry.variant("deltas", name)()
        if method.problem is not None:
            with pytest.raises(DeltaPromptError, match=re.escape(method.problem)):
                Adapted(backbone, [delta])
            continue
        adapted = Adapted(backbone, [delta])
        assert method.parameters == adapted.parameter_count() > 0
        assert method.sites == len(adapted.patches)
        adapted.remove()


def test_every_method_says_its_formula_its_source_and_its_kind():
    for method in catalogue.methods():
        assert "=" in method.formula or "->" in method.formula
        assert any(digit.isdigit() for digit in method.source)
        assert method.taxonomy in ("addition", "specification", "reparametrisation")
        assert method.selectors
        assert method.parameters is None


def test_a_method_without_a_source_is_an_error(monkeypatch):
    module = ModuleType("nowhere", "y' = y + b, as everybody knows.")
    monkeypatch.setitem(sys.modules, "nowhere", module)
    delta = type("Nothing", (), {"__module__": "nowhere"})()
    with pytest.raises(ConfigError, match="the first line of nowhere must be a formula and its source"):
        catalogue.stated(delta)


def test_the_command_prints_a_table_or_json():
    assert "Hu et al. 2022" in succeeds("methods").stdout
    found = json.loads(succeeds("methods", "--json").stdout)["methods"]
    assert {method["name"] for method in found} == set(registry.variants("deltas"))
    lora = next(method for method in found if method["name"] == "lora")
    assert lora["merges"]
    assert lora["parameters"] is None


def test_the_command_counts_on_a_backbone():
    run = succeeds("methods", "--backbone", "demo", "--json")
    found = {method["name"]: method for method in json.loads(run.stdout)["methods"]}
    assert found["lora"]["parameters"] == 6 * 2 * 8 * (384 + 384)  # layers, q and v, rank, sizes
    assert found["bitfit"]["sites"] > 0
