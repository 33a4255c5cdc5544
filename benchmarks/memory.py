"""What autograd keeps of a pass of BERT base with LoRA on every linear map, 8 rows of 128 tokens: ours against PEFT's.

The same numbers train on both sides, and their gradients are compared. Counted are saved tensors, each storage once,
without the model's own. `python -m benchmarks.memory` runs this alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

import deltaprompt as dp
from benchmarks.delta_steps import BATCH, EVERY, LENGTH, encoder
from benchmarks.paired import Pair, pair, turns
from benchmarks.prompt_classification import RANK
from deltaprompt.backbone.load import demo_folder, wrap
from deltaprompt.compose import Adapted
from deltaprompt.memory import kept, predicted

ALPHA = 16.0
CLOSE = 1e-4  # of the largest gradient: float32, summed in another order


def by_peft(size: str) -> nn.Module:
    """The encoder with PEFT's LoRA on every linear map, all of it trained (B does not start at zero)."""
    import peft

    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="FEATURE_EXTRACTION",
    )
    return peft.get_peft_model(encoder(size), config).eval()


def ours(size: str, theirs: nn.Module, frozen: bool = False) -> Adapted:
    """The encoder with our LoRA, of the same weights and the same A and B; in the modes of `fit`."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(demo_folder()))
    backbone = wrap(encoder(size), tokenizer, kind="encoder", name="random")
    adapted = Adapted(backbone, [dp.LoRA(RANK, ALPHA, at=EVERY, freeze_a=frozen)])
    for patch, name, tensor in tensors(adapted):
        tensor.data[0].copy_(theirs.get_parameter(in_peft(patch, name)))
    adapted.model.eval()
    return adapted


def tensors(adapted: Adapted) -> list[tuple[Any, str, nn.Parameter]]:
    """Every patch's A and B."""
    return [(patch, name, tensor) for patch in adapted.patches for name, tensor in patch.tensors.items()]


def in_peft(patch: Any, name: str) -> str:
    """What PEFT calls a tensor."""
    return f"base_model.model.{patch.site.path}.lora_{name.upper()}.default.weight"


def loss_of(model: nn.Module) -> Tensor:
    """The loss of the one batch."""
    ids = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 20000 + 1000
    mask = torch.ones_like(ids)
    mask[:, LENGTH - 20 :] = torch.arange(BATCH)[:, None] % 2
    return model(input_ids=ids, attention_mask=mask).last_hidden_state.square().mean()


def bytes_kept(model: nn.Module) -> float:
    """Megabytes that autograd keeps of the pass; the backward pass is taken too, so that gradients are there."""
    model.zero_grad()
    with kept(model) as counted:
        loss = loss_of(model)
        found = counted.bytes
    loss.backward()
    return found / 1e6


def check(adapted: Adapted, theirs: nn.Module) -> None:
    """An error where a gradient is not PEFT's."""
    for patch, name, tensor in tensors(adapted):
        expected = theirs.get_parameter(in_peft(patch, name)).grad
        if tensor.grad is None or expected is None:
            continue
        apart = float((tensor.grad[0] - expected).abs().max() / expected.abs().max())
        if apart > CLOSE:
            raise AssertionError(f"{patch.site.name}.{name}: gradients are {apart:.1e} apart")


def steps(adapted: Adapted, rounds: int) -> Pair:
    """A step with checkpointing against one without, both ours."""

    def step(on: bool) -> Callable[[], None]:
        def run() -> None:
            adapted.checkpointing(on)
            loss_of(adapted).backward()
            adapted.zero_grad()

        return run

    times = turns({"on": step(True), "off": step(False)}, rounds)
    return pair("LoRA step on all linear maps, base, checkpointing: against none", times["on"], times["off"])


def operations(adapted: Adapted) -> Pair:
    """The operations of a step with checkpointing against those of one without, which no other process disturbs."""
    found = {}
    for on in (True, False):
        adapted.checkpointing(on)
        with FlopCounterMode(display=False) as counter:
            loss_of(adapted).backward()
        adapted.zero_grad()
        found[on] = counter.get_total_flops() / 1e9
    return Pair.of_sizes("LoRA step, base, checkpointing: operations, against none", found[True], found[False], "GFLOP")


def run(rounds: dict[str, int]) -> list[Pair]:
    """All pairs."""
    size = "base"
    theirs = by_peft(size)
    peer = bytes_kept(theirs)
    plain, frozen = ours(size, theirs), ours(size, theirs, frozen=True)
    found = {}
    for name, adapted, share in (
        ("LoRA", plain, None),
        ("LoRA, A frozen", frozen, None),
        ("LoRA, checkpointing", plain, 0.75),
        ("LoRA, all layers computed again", plain, 1.0),
        ("LoRA, A frozen, checkpointing", frozen, 0.75),
    ):
        adapted.checkpointing(share is not None, share or 1.0)
        found[name] = bytes_kept(adapted)
        check(adapted, theirs)
        adapted.checkpointing(False)
    pairs = [Pair.of_sizes(f"kept bytes, {name}: against peft's LoRA", mb, peer) for name, mb in found.items()]
    pairs += [operations(plain), steps(plain, rounds[size])]
    told = predicted(plain.remove(), list(plain.deltas), BATCH, LENGTH).kept / 1e6
    return [*pairs, Pair.of_sizes("kept bytes, LoRA: predicted against measured", told, found["LoRA"])]


if __name__ == "__main__":
    from benchmarks.__main__ import show

    show(run({"base": 5}))
