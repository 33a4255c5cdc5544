"""Adapt any pretrained language model with prompts, label words, prototypes and deltas; keep the result in one file.

Importing costs nothing: a name brings in what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltaprompt.backbone import Backbone, load
    from deltaprompt.calibrations.batch import BatchCalibration
    from deltaprompt.calibrations.contextual import Contextual
    from deltaprompt.calibrations.contextualised import Contextualised
    from deltaprompt.calibrations.domain_pmi import DomainPMI
    from deltaprompt.data import (
        few_sentences,
        few_shot,
        read,
        read_chats,
        read_entities,
        read_pairs,
        read_relations,
        read_tagged,
    )
    from deltaprompt.deltas._position_shift import PositionShift
    from deltaprompt.deltas.adapter import Adapter
    from deltaprompt.deltas.bitfit import BitFit
    from deltaprompt.deltas.ia3 import IA3
    from deltaprompt.deltas.lora import LoRA
    from deltaprompt.deltas.prefix import Prefix
    from deltaprompt.deltas.soft_prompt import SoftPrompt
    from deltaprompt.errors import DeltaPromptError
    from deltaprompt.estimators import FewShotClassifier, FewShotTagger
    from deltaprompt.interchange import open_peft, save_peft
    from deltaprompt.model import Model, Task, adapt
    from deltaprompt.model.episodic import Episodic
    from deltaprompt.model.generation import Chat, Generation
    from deltaprompt.model.generator import Generator, generator
    from deltaprompt.model.learner import Learner
    from deltaprompt.model.many import Many, open_many
    from deltaprompt.model.noise import noise_scores
    from deltaprompt.model.saved import open_ as open
    from deltaprompt.model.tagger import Tagger
    from deltaprompt.model.tagging import Tagging
    from deltaprompt.model.with_masks import WithMasks
    from deltaprompt.templates import Template
    from deltaprompt.trainer import Plan, Run, Training, fit, fit_many, fit_typing
    from deltaprompt.types import Example, Message, Span
    from deltaprompt.verbalizers.automatic import Automatic
    from deltaprompt.verbalizers.dect import DecT
    from deltaprompt.verbalizers.hierarchical import Hierarchical
    from deltaprompt.verbalizers.hyper_proto import HyperProto
    from deltaprompt.verbalizers.knowledgeable import Knowledgeable
    from deltaprompt.verbalizers.label_descriptions import LabelDescriptions
    from deltaprompt.verbalizers.label_words import LabelWords
    from deltaprompt.verbalizers.linear_probe import LinearProbe
    from deltaprompt.verbalizers.nn_shot import NNShot
    from deltaprompt.verbalizers.proto_net import ProtoNet
    from deltaprompt.verbalizers.proto_verb import ProtoVerb
    from deltaprompt.verbalizers.prototypes import Prototypes
    from deltaprompt.verbalizers.rules import Rules
    from deltaprompt.verbalizers.soft import SoftVerbalizer
    from deltaprompt.verbalizers.spherical_prototypes import SphericalPrototypes
    from deltaprompt.verbalizers.written import Written

__version__ = "0.1.0"
__all__ = [
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

_WHERE = {
    "Backbone": "backbone",
    "BatchCalibration": "calibrations.batch",
    "DeltaPromptError": "errors",
    "Chat": "model.generation",
    "Episodic": "model.episodic",
    "Example": "types",
    "FewShotClassifier": "estimators",
    "FewShotTagger": "estimators",
    "Generation": "model.generation",
    "Generator": "model.generator",
    "LabelDescriptions": "verbalizers.label_descriptions",
    "LabelWords": "verbalizers.label_words",
    "Learner": "model.learner",
    "Many": "model.many",
    "Message": "types",
    "Model": "model",
    "Plan": "trainer",
    "PositionShift": "deltas._position_shift",
    "Prototypes": "verbalizers.prototypes",
    "Run": "trainer",
    "SoftVerbalizer": "verbalizers.soft",
    "Span": "types",
    "Tagger": "model.tagger",
    "Tagging": "model.tagging",
    "Task": "model",
    "Template": "templates",
    "Training": "trainer",
    "adapt": "model",
    "few_sentences": "data",
    "few_shot": "data",
    "fit": "trainer",
    "fit_many": "trainer",
    "fit_typing": "trainer",
    "generator": "model.generator",
    "load": "backbone",
    "WithMasks": "model.with_masks",
    "noise_scores": "model.noise",
    "open": "model.saved",
    "open_many": "model.many",
    "open_peft": "interchange",
    "read": "data",
    "read_chats": "data",
    "read_entities": "data",
    "read_pairs": "data",
    "read_relations": "data",
    "read_tagged": "data",
    "save_peft": "interchange",
}


def __getattr__(name: str) -> object:
    """A public name, found when it is first asked for and then kept."""
    if name in _WHERE:
        found: object = vars(import_module(f"{__name__}.{_WHERE[name]}"))["open_" if name == "open" else name]
    elif (found := _variant(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def _variant(name: str) -> object:
    """The delta, verbalizer or calibration of that class name, which needs no line here.

    `LowRankAdapter` is in the file `low_rank_adapter`.
    """
    from deltaprompt.registry import variant, variants

    for kind in ("deltas", "verbalizers", "calibrations"):
        file = next((file for file in variants(kind) if file.replace("_", "") == name.lower()), None)
        found = None if file is None else variant(kind, file)
        if found is not None and found.__name__ == name:
            return found
    return None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
