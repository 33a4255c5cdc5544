"""The public names: these and no others, each of them there, and none of them paid for before it is used."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import deltaprompt
from deltaprompt.registry import variant, variants

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "accelerate", "sklearn", "numpy")


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has after some code."""
    code = f"import sys\n{code}\nprint('modules', *sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_the_public_names():
    assert deltaprompt.__all__ == [
        "IA3",
        "Adapter",
        "Automatic",
        "Backbone",
        "BatchCalibration",
        "BitFit",
        "Chat",
        "Contextual",
        "Contextualised",
        "DecT",
        "DeltaPromptError",
        "DomainPMI",
        "Episodic",
        "Example",
        "FewShotClassifier",
        "FewShotTagger",
        "Generation",
        "Generator",
        "Hierarchical",
        "HyperProto",
        "Knowledgeable",
        "LabelDescriptions",
        "LabelWords",
        "Learner",
        "LinearProbe",
        "LoRA",
        "Many",
        "Message",
        "Model",
        "NNShot",
        "Plan",
        "PositionShift",
        "Prefix",
        "ProtoNet",
        "ProtoVerb",
        "Prototypes",
        "Rules",
        "Run",
        "SoftPrompt",
        "SoftVerbalizer",
        "Span",
        "SphericalPrototypes",
        "Tagger",
        "Tagging",
        "Task",
        "Template",
        "Training",
        "WithMasks",
        "Written",
        "__version__",
        "adapt",
        "few_sentences",
        "few_shot",
        "fit",
        "fit_many",
        "fit_typing",
        "generator",
        "load",
        "noise_scores",
        "open",
        "open_many",
        "open_peft",
        "read",
        "read_chats",
        "read_entities",
        "read_pairs",
        "read_relations",
        "read_tagged",
        "save_peft",
    ]
    assert set(deltaprompt.__all__) <= set(dir(deltaprompt))


@pytest.mark.parametrize("name", deltaprompt.__all__)
def test_every_name_resolves(name):
    found = vars(deltaprompt).get(name) or deltaprompt.__getattr__(name)
    assert found is not None
    assert vars(deltaprompt)[name] is found


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'LoRa'"):
        deltaprompt.__getattr__("LoRa")


def test_the_version_is_the_packages():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == deltaprompt.__version__


def test_importing_costs_nothing():
    assert modules_after("import deltaprompt").isdisjoint((*HEAVY, "rich", "typer", "pydantic"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *(
            [c, "--help"]
            for c in ("fit", "predict", "inspect", "export", "import", "demo", "pretrain", "search", "compare")
        ),
    ],
)
def test_help_answers_without_torch(arguments):
    code = f"sys.argv = ['deltaprompt', *{arguments}]\nfrom deltaprompt.cli import app\napp(standalone_mode=False)"
    assert modules_after(code).isdisjoint(HEAVY)


@pytest.mark.parametrize("kind", ["verbalizers", "calibrations"])
def test_every_verbalizer_and_calibration_is_public_by_its_name(kind):
    found = {variant(kind, name) for name in variants(kind)}
    assert {getattr(deltaprompt, cls.__name__) for cls in found} == found


def test_every_delta_is_public_by_its_name_without_a_line_for_it():
    code = "import deltaprompt\nprint(deltaprompt.AdapterBias().at)\nassert 'torch' in sys.modules"
    assert "deltaprompt.deltas.adapter_bias" in modules_after(code)
    assert "AdapterBias" not in (ROOT / "src/deltaprompt/__init__.py").read_text()
