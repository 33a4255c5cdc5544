"""The laws of the conformance proof: each is seen to fail on a planted mistake; what is no mistake is told apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from deltaprompt.backbone.sites import Site
from deltaprompt.compose import Adapted, adapted
from deltaprompt.conformance import laws
from deltaprompt.conformance.check import check
from deltaprompt.conformance.laws import Note
from deltaprompt.conformance.shrink import Architecture, known
from deltaprompt.conformance.snapshot import Snapshot
from deltaprompt.conformance.subject import Subject
from deltaprompt.deltas._base import After, Delta, Fixed
from deltaprompt.deltas.bitfit import BitFit
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.prefix import Prefix
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.params import Param, Weights, constant, zeros


def find(name: str) -> Architecture:
    return next(a for a in known() if str(a) == name)


@cache
def made(name: str) -> Subject:
    return Subject.of(find(name))


def subject(name: str = "causal:llama") -> Subject:
    return made(name)


def broken(law: laws.Law, delta: Delta, name: str = "causal:llama") -> str:
    """How a law says that it is broken; nothing where it holds."""
    return "; ".join(note.text for note in law(subject(name), delta) if note.fails)


def limits(law: laws.Law, delta: Delta, name: str = "causal:llama") -> list[str]:
    notes = list(law(subject(name), delta))
    assert [note.text for note in notes if note.fails] == []
    return [note.text for note in notes]


@dataclass(frozen=True)
class Shift(Delta, After):
    """y' = y + v, the delta that mistakes are planted in."""

    at: tuple[str, ...] = ("attn.q",)
    start: float = 0.0
    taxonomy: ClassVar = "addition"

    def selectors(self) -> Sequence[str]:
        return self.at

    def params(self, site: Site) -> Mapping[str, Param]:
        return {"v": Param((1, site.outputs), constant(self.start))}

    def after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        return self.shifted(w["v"], y)

    def shifted(self, v: Tensor, y: Tensor) -> Tensor:
        return y + v


class Idle(Shift):
    def shifted(self, v: Tensor, y: Tensor) -> Tensor:
        return y + 0 * v


class Lost(Shift):
    def shifted(self, v: Tensor, y: Tensor) -> Tensor:
        return y + v.detach() + 0 * v


class Uphill(Shift):
    def shifted(self, v: Tensor, y: Tensor) -> Tensor:
        return y + 2 * v.detach() - v


class Mingled(Shift):
    def shifted(self, v: Tensor, y: Tensor) -> Tensor:
        return y + v.flip(0)  # of a batch: another row's


class First(Shift):
    def shifted(self, v: Tensor, y: Tensor) -> Tensor:
        return y + 0 * v + 0.5


class Forgetful(Shift, Fixed):
    """Numbers of its own that are neither saved nor drawn from a seed."""

    count: ClassVar[Iterator[int]] = iter(range(99))

    def fixed(self, sites: Sequence[Site]) -> Mapping[str, Tensor]:
        return {"c": torch.tensor(float(next(self.count)))}

    def after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        return y + w["v"] + w["c"]


class Changing(Shift):
    identity_at_start = False


def test_the_identity_at_the_start() -> None:
    assert broken(laws.identity, Shift()) == ""
    assert "the start is no identity: the outputs differ by" in broken(laws.identity, Shift(start=1.0))
    assert broken(laws.identity, Changing(start=1.0)) == ""
    assert "the delta says that it is none" in broken(laws.identity, Changing())
    assert broken(laws.identity, Idle()) == "no output changes when its parameters do"
    assert broken(laws.identity, Shift(start=float("nan"))).endswith("the outputs are not finite")


def test_learning() -> None:
    assert broken(laws.learning, Shift()) == ""
    assert "the loss does not fall from" in broken(laws.learning, Uphill())
    assert "whatever the size of the step" in broken(laws.learning, Lost())


@dataclass(frozen=True)
class HalfLost(Shift):
    """One of two tensors gives its gradient away."""

    def params(self, site: Site) -> Mapping[str, Param]:
        return {**super().params(site), "u": Param((1, site.outputs), zeros)}

    def after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        return y + w["v"] + w["u"].detach() + 0 * w["u"]


def test_a_gradient_that_is_lost_is_told_from_one_that_is_zero() -> None:
    assert "the gradient is lost at 0.layers.0.attn.q.u" in broken(laws.learning, HalfLost())
    assert limits(laws.learning, BitFit(at=("attn.k", "attn.v")), "causal:gpt2") == [
        "the loss does not depend on attn.k.bias"  # softmax does not see what is added to all scores
    ]


def test_sites_that_no_text_passes_are_reported() -> None:
    found = limits(laws.learning, BitFit(at=("attn.*",)), "masked:longformer")  # no token is global
    assert found[0].startswith("no text passes attn.query_global.bias, attn.key_global.bias")


def test_a_backbone_that_is_not_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapted, "freeze", lambda model: None)
    monkeypatch.setattr(adapted, "thaw", lambda model: None)
    assert "the backbone has a gradient" in broken(laws.learning, Shift())
    subject().backbone.model.zero_grad()


def test_mixed_rows() -> None:
    assert broken(laws.mixed_rows, Shift()) == ""
    assert broken(laws.mixed_rows, Mingled()).startswith("row 0 of a mixed batch differs from its adaptation alone by")
    assert "slots with different parameters give the same outputs" in broken(laws.mixed_rows, First())


def test_rows_that_cannot_be_told_apart_are_a_limit() -> None:
    [refused] = limits(laws.mixed_rows, Shift(at=("experts.*.up",)), "seq2seq:nllb-moe")
    assert refused.startswith("mixed rows are refused: ")
    assert "sees tokens of all rows in an order of their own" in refused
    dependent = replace(subject(), independent=False)
    [note] = laws.mixed_rows(dependent, Mingled())
    assert note == Note("rows of one batch depend on one another in the model itself", fails=False)


def test_save_and_open(monkeypatch: pytest.MonkeyPatch) -> None:
    assert broken(laws.saving, Shift()) == ""
    assert broken(laws.saving, Forgetful()).startswith("saved and opened again, the outputs differ by")
    stored = Adapted.stored
    monkeypatch.setattr(Adapted, "stored", lambda self, slot: dict(list(stored(self, slot).items())[1:]))
    assert "what is saved is not what is opened: 0.layers.0.attn.q.v" in broken(laws.saving, Shift())


def test_exact_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert broken(laws.removal, Shift()) == ""
    remove = Adapted.remove

    def careless(self: Adapted):
        backbone = remove(self)
        weight = backbone.model.get_output_embeddings().weight
        weight.data[7] *= 1 + 1e-15
        weight.requires_grad_(False)
        return backbone

    before = subject().backbone.model.get_output_embeddings().weight.detach().clone()
    with monkeypatch.context() as patch:
        patch.setattr(Adapted, "remove", careless)
        found = broken(laws.removal, Shift())
    weight = subject().backbone.model.get_output_embeddings().weight
    weight.data.copy_(before)
    weight.requires_grad_()
    assert "removed, it leaves behind the tensor lm_head.weight and 1 more" in found


def test_a_snapshot_sees_hooks_attributes_and_configs() -> None:
    model = subject().backbone.model
    before = subject().before
    assert list(before.differences(Snapshot.of(model))) == []
    layer = model.model.layers[0]
    layer.extra = 1
    handle = layer.register_forward_hook(lambda *_: None)
    model.config.hidden_act = "relu"
    found = list(before.differences(Snapshot.of(model)))
    handle.remove()
    del layer.extra
    model.config.hidden_act = "silu"
    assert [line.split(" of ")[0] for line in found] == ["attributes", "hooks", "config"]


def test_what_a_model_keeps_of_its_passes_by_itself_is_not_left_behind() -> None:
    assert broken(laws.removal, LoRA(), "masked:ibert") == ""  # its quantisation watches the largest numbers


@pytest.mark.parametrize("name", ["causal:llama", "masked:longformer", "seq2seq:t5", "causal:xlnet"])
@pytest.mark.parametrize("delta", [LoRA(), SoftPrompt()], ids=lambda delta: type(delta).__name__)
def test_deltas_keep_the_laws(name: str, delta: Delta) -> None:
    notes: dict[str, list[Note]] = {title: list(law(subject(name), delta)) for title, law in laws.LAWS.items()}
    assert notes == {title: [] for title in laws.LAWS}


def test_a_model_runs_in_float64_where_its_gradients_are_finite_there() -> None:
    assert subject("causal:llama").dtype == torch.float64
    assert subject("masked:longformer").dtype == torch.float32


def test_what_trains_of_a_user_s_is_looked_at_too() -> None:
    trains = subject().before.told["what trains"]
    assert [trains[name] for name in list(trains)[:2]] == [False, True]


# One architecture


def test_outcomes_of_an_architecture() -> None:
    found = check(find("causal:mpt"), ["bitfit", "lora", "prefix"])
    assert [o.state for o in found.outcomes] == ["passed", "passed", "refused"]
    assert found.outcomes[2].reason.startswith("Prefix cannot act at layers.0.attn: MptForCausalLM computes attention")
    assert (found.model, found.problem, found.dtype) == ("causal:mpt", "", "float64")


def test_an_architecture_that_cannot_be_built() -> None:
    found = check(Architecture("masked", "vit", "ViTModel"), ["lora"])
    assert found.outcomes == ()
    assert found.problem.startswith("no tiny ViTModel (masked:vit) can be built")


def test_a_law_that_breaks_or_raises_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(subject: Subject, delta: Delta) -> Iterator[Note]:
        raise ValueError("two\nlines")

    def fails(subject: Subject, delta: Delta) -> Iterator[Note]:
        yield Note("by nature", fails=False)
        yield Note("it broke" if isinstance(delta, LoRA) else "nothing", fails=isinstance(delta, LoRA))

    for law, reasons in ((raises, ["first: ValueError: two lines"] * 2), (fails, ["first: it broke", ""])):
        monkeypatch.setattr("deltaprompt.conformance.check.LAWS", {"first": law})
        found = check(find("causal:llama"), ["lora", "prefix"])
        assert [o.reason for o in found.outcomes] == reasons
    assert found.outcomes[1].limits == ("by nature", "nothing")


def test_sites_that_cannot_be_named_are_a_failure_of_every_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(architecture: Architecture) -> Subject:
        raise KeyError("no embedding")

    monkeypatch.setattr(Subject, "of", refuses)
    found = check(find("causal:llama"), ["lora", "prefix"])
    assert [(o.delta, o.reason) for o in found.outcomes] == [
        (delta, "sites: KeyError: 'no embedding'") for delta in ("lora", "prefix")
    ]


def test_prefixes_stand_in_front_of_their_own_layers_only() -> None:
    model = subject("causal:got_ocr2").backbone.model  # its pictures are read by attention of another make
    implementations = {n: m.config._attn_implementation for n, m in model.named_modules() if "config" in vars(m)}
    with subject("causal:got_ocr2").attached(Prefix()):
        inside = {n: m.config._attn_implementation for n, m in model.named_modules() if "config" in vars(m)}
    changed = {name for name, base in implementations.items() if inside[name] != base}
    assert changed
    assert not any("vision" in name for name in changed)
