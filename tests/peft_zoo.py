"""PEFT's adapters on the tiny backbones, with random weights: what folders are compared with."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch

from deltaprompt.backbone import Backbone
from tests import backbones_zoo as zoo

FAMILIES = ("bert", "gpt2", "llama", "t5")
METHODS = ("lora", "dora", "ia3", "prompt", "prefix")
LENGTH = 3
TARGETS = {
    "bert": ["query", "value", "intermediate.dense"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "t5": ["q", "v", "wi"],
}
TASKS = {
    "masked": "FEATURE_EXTRACTION",
    "encoder": "FEATURE_EXTRACTION",
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
}


def config_of(method: str, family: str, **more: Any) -> Any:
    """A config of PEFT's; it has no task type for masked language models but where a prompt needs one."""
    kind = _shared(family).kind
    if method in ("prompt", "prefix"):
        cls = peft.PromptTuningConfig if method == "prompt" else peft.PrefixTuningConfig
        return cls(**{"task_type": TASKS[kind], "num_virtual_tokens": LENGTH, **more})
    turned = {"fan_in_fan_out": family == "gpt2", "task_type": None if kind == "masked" else TASKS[kind]}
    if method == "ia3":
        targets = TARGETS.get(family)
        return peft.IA3Config(
            **{**turned, "target_modules": targets, "feedforward_modules": (targets or [])[-1:], **more}
        )
    low_rank = {"r": 4, "lora_alpha": 6, "use_dora": method == "dora", "target_modules": TARGETS.get(family)}
    return peft.LoraConfig(**{**turned, **low_rank, **more})


@torch.no_grad()
def made(family: str, config: Any, seed: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """A model of PEFT's on a fresh backbone, every number of its adapter random."""
    with zoo.quiet():
        model = peft.get_peft_model(zoo.build(family, dtype).model, config).eval()
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.requires_grad:
            around = 1.0 if "ia3_l" in name or "magnitude" in name else 0.0
            p.copy_((torch.randn(p.shape, generator=g) * 0.5 + around).to(p))
    return model


def opened(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Any:
    """PEFT's model of a folder, on a fresh backbone."""
    with zoo.quiet():
        return peft.PeftModel.from_pretrained(zoo.build(family, dtype).model, folder).eval()


def scores(model: Any, family: str, prompted: bool = False, **how: Any) -> torch.Tensor:
    """The scores of a padded batch at the text's real positions; `prompted` puts virtual ids in front."""
    backbone = _shared(family)
    inputs = zoo.inputs_of(backbone)
    with torch.no_grad():
        found = model(**rows(backbone, LENGTH if prompted else 0), **how)[0]
    mask = inputs.get("decoder_attention_mask", inputs["attention_mask"])
    return found[:, -mask.shape[1] :][mask.bool()]


@cache
def _shared(family: str) -> Backbone:
    """A backbone that only its vocabulary is asked of."""
    return zoo.build(family)


def rows(backbone: Backbone, virtual: int = 0) -> dict[str, torch.Tensor]:
    """Two rows, one of them padded, with so many virtual ids in front."""
    inputs = zoo.inputs_of(backbone)
    front = backbone.vocabulary + torch.arange(virtual).expand(2, -1)
    inputs["input_ids"] = torch.cat([front, inputs["input_ids"]], dim=1)
    inputs["attention_mask"] = torch.cat([torch.ones_like(front), inputs["attention_mask"]], dim=1)
    return inputs
