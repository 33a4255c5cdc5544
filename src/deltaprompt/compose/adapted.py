"""`Adapted`: a backbone with deltas at its sites.

Attaching, slots, removal, freezing, counting and merging are written here, once for all methods.

Every delta becomes `Patch`es, one a site, held by PyTorch's own forward hooks on the backbone's modules; nothing of the
backbone is replaced or renamed. After `remove` it is bitwise what it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltaprompt.backbone import Backbone, attention
from deltaprompt.backbone.layers import layers_of
from deltaprompt.compose.freezing import freeze, thaw
from deltaprompt.compose.layout import layouts_of
from deltaprompt.compose.merging import Mark, mark_merge, merged, take_mark_back
from deltaprompt.compose.patch import IDS, Patch
from deltaprompt.compose.placing import instances, sites_of
from deltaprompt.compose.recomputing import AGAIN, SHARE, Recomputing, differentiable, has_own_backward, rest
from deltaprompt.compose.routing import Index, Routing, check_slot
from deltaprompt.compose.stack import Common, Stack
from deltaprompt.deltas._base import After, Before, Delta, Fixed, KeyValue, Reparametrised, Shared, VirtualTokens
from deltaprompt.errors import ConfigError

if TYPE_CHECKING:
    from transformers import GenerationConfig

SHARED = "shared"  # where a site's name stands in the stored name of a tensor, for those of all sites of a delta


class Adapted(nn.Module):
    """A frozen backbone and the patches of its deltas; an `nn.Module` that owns both.

    Args:
        backbone: it is frozen until `remove`.
        deltas: in the order in which they act at a site.
        slots: adaptations that live side by side.
        seeds: one a slot; what its parameters start from.
    """

    def __init__(
        self, backbone: Backbone, deltas: Sequence[Delta], slots: int = 1, seeds: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        seeds = [0] * slots if seeds is None else seeds
        if slots < 1 or len(seeds) != slots:
            raise ConfigError(
                f"{len(seeds)} seeds for {slots} slots; one or more slots, and a seed for each, are possible"
            )
        self.backbone = backbone
        self.model = backbone.model
        self.deltas: tuple[Delta, ...] = ()
        self.slots = slots
        self.seeds = tuple(seeds)
        self.routing = Routing()
        self.recomputing = Recomputing(self.routing)
        self.patches = nn.ModuleList()
        self.commons = nn.ModuleList()  # one a delta
        self._handles: list[RemovableHandle] = []
        self._attached = False
        self._begun = 0  # patches that were ever made: each starts from a seed of its own
        self._before_merge: dict[str, Tensor] | None = None
        self._mark: Mark | None = None  # of the merge
        for delta in instances(deltas):
            self._take(delta, *self._made(delta))
        freeze(self.model)
        self._hook()

    def grow(self, slots: int) -> None:
        """As many more slots, whose tensors are zero until they are written."""
        for stack in cast(list[Stack], [*self.commons, *self.patches]):
            stack.grow(slots)
        if self.slots == 1:
            self.tell_layouts()
        self.slots += slots
        self.seeds += (0,) * slots

    # Attaching and removing

    def attach(self, delta: Delta) -> None:
        """Puts one more delta around those that are there, started from the slots' seeds.

        Where others have deltas on the backbone too, these all then lie around theirs; so it is after `unmerge`.
        """
        self._check_open()
        common, patches = self._made(*instances([delta]))
        self._unhook()
        self._take(delta, common, patches)
        self._hook()

    def detach(self, number: int = -1) -> None:
        """Takes one delta away, by its place in `deltas`; the others keep what they have learned and their order."""
        self._check_open()
        if not -len(self.deltas) <= number < len(self.deltas):
            raise ConfigError(f"there is no delta {number}; this backbone carries {len(self.deltas)}, counted from 0")
        number %= len(self.deltas)
        self._unhook()
        self.deltas = tuple(delta for n, delta in enumerate(self.deltas) if n != number)
        self.commons = nn.ModuleList(common for n, common in enumerate(self.commons) if n != number)
        self.patches = nn.ModuleList(patch for patch in self._placed() if patch.number != number)
        for patch in self._placed():
            patch.number -= patch.number > number
        self._hook()

    def remove(self) -> Backbone:
        """Takes every delta away and gives the backbone back as it was, bitwise; what is merged stays merged."""
        self._release()
        self.patches, self.commons = nn.ModuleList(), nn.ModuleList()
        self._before_merge = None
        return self.backbone

    def _release(self) -> None:
        """The hooks taken away, and the backbone no longer frozen by this."""
        if self.recomputing.always:
            self.checkpointing(False)
        self._unhook()
        if self._attached:
            thaw(self.model)
        self._attached = False

    def _check_open(self) -> None:
        if not self._attached:
            raise ConfigError("the deltas are merged or removed; unmerge() first, or make a new Adapted")

    def _made(self, delta: Delta) -> tuple[Common, list[Patch]]:
        """A delta's patches, one a site, and what they share; nothing is attached yet."""
        sites = sites_of(delta, self.backbone)
        anywhere = next(self.model.parameters())
        shared = delta.shared(sites) if isinstance(delta, Shared) else {}
        fixed = delta.fixed(sites) if isinstance(delta, Fixed) else {}
        common = Common(shared, fixed, self.slots, self.routing, anywhere)
        common.start([_mixed(seed, -1 - self._begun) for seed in self.seeds])
        patches: list[Patch] = []
        for site in sites:
            module = self.model.get_submodule(site.path)
            own = list(module.parameters())
            like = next((p for p in own if p.dtype == anywhere.dtype), next(iter(own), anywhere))
            patch = Patch(len(self.deltas), delta, site, self.slots, self.routing, like, common)
            patch.start([_mixed(seed, self._begun + len(patches)) for seed in self.seeds])
            patch.begin(module)
            patches.append(patch)
        return common, patches

    def _take(self, delta: Delta, common: Common, patches: Sequence[Patch]) -> None:
        self.deltas += (delta,)
        self.commons.append(common)
        self.patches.extend(patches)
        self._begun += len(patches)

    def _placed(self) -> list[Patch]:
        return cast(list[Patch], list(self.patches))

    def _hook(self) -> None:
        """Registers the hooks that the patches need, in the order of the deltas."""
        torch.compiler.reset()  # compiled code does not notice hooks that come later, and would run without them
        if self.slots > 1:
            self.tell_layouts()
        changed = {patch.site.path for patch in self._placed() if isinstance(patch.delta, Before)}
        for patch in self._placed():
            self._hook_at_site(patch, patch.site.path in changed)
        for layer in layers_of(self.model):
            self._handles.append(layer.register_forward_pre_hook(self.recomputing.enter))
        if has_own_backward(self.model):
            embedding = self.model.get_submodule(self.backbone.sites[self.backbone.input_embedding].path)
            self._handles.append(embedding.register_forward_hook(differentiable))
        for stacks in (self.commons, self.patches):
            stacks.train(self.training)
        self._attached = True

    def tell_layouts(self) -> None:
        """Tells the patches where the rows of a batch are at their sites, which they ask where rows may differ."""
        with self.routing.at(None):
            layouts = layouts_of(self.backbone, {patch.site.path for patch in self._placed()})
        for patch in self._placed():
            patch.layout = layouts.get(patch.site.path, "rows")

    def _hook_at_site(self, patch: Patch, changed: bool) -> None:
        """A patch's hooks; `changed` where a delta at its site changes what enters."""
        site, delta = patch.site, patch.delta
        module = self.model.get_submodule(site.path)
        if isinstance(delta, After) and (site.entry or changed or site.kind == "layer"):
            entry = self.model.get_submodule(site.entry or site.path)
            self._handles.append(entry.register_forward_pre_hook(patch.enter, prepend=True, with_kwargs=True))
        elif isinstance(delta, Before):
            self._handles.append(module.register_forward_pre_hook(patch.enter, prepend=True, with_kwargs=True))
        if isinstance(delta, After):
            self._handles.append(module.register_forward_hook(patch.leave))
        if isinstance(delta, VirtualTokens):
            for other in _other_readers(self.model, module, site.inputs):
                self._handles.append(other.register_forward_pre_hook(patch.known, prepend=True, with_kwargs=True))
        if isinstance(delta, KeyValue):
            attention.install(self.model, site.path)
            attention.hooks_at(module).append(patch)

    def _unhook(self) -> None:
        torch.compiler.reset()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if not self._attached:
            return
        for patch in self._placed():
            if isinstance(patch.delta, KeyValue):
                attention.take_away(self.model.get_submodule(patch.site.path), patch)
        for layer in layers_of(self.model):
            self.recomputing.leave(layer)
        attention.release(self.model)

    # Running

    def forward(self, *args: Any, adaptation: Index = None, **inputs: Any) -> Any:
        """The backbone's own forward; `adaptation` is a slot, or one slot a row [rows]."""
        self.route(adaptation)
        return self.model(*args, **inputs)

    def states(self, inputs: Mapping[str, Tensor], adaptation: Index = None) -> Tensor:
        """The last hidden states [b, s, d] without the head."""
        self.route(adaptation)
        return self.backbone.states(inputs)

    def route(self, index: Index) -> None:
        """The rows of the passes to come belong to `index`."""
        check_slot(index, self.slots)
        self.routing.index = index

    @contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """Within it every row stands for `times` rows that follow one another."""
        index = self.routing.index
        with self.routing.at(index.repeat_interleave(times) if isinstance(index, Tensor) else index):
            yield

    @contextmanager
    def generating(self, index: Index = None, each: int = 1) -> Iterator[None]:
        """Within it the model's own `generate` has the slots of `index`: one for all rows, or one a row [rows].

        Args:
            index: the slots.
            each: sequences searched or drawn for each row, the larger of num_beams and num_return_sequences.

        What is gathered of the slots is kept until it is left: neither `index` nor what the slots hold may change.
        """
        check_slot(index, self.slots)
        with self.routing.at(index, each), self.routing.steady():
            yield

    def generate(
        self, inputs: Mapping[str, Tensor], adaptation: Index = None, config: GenerationConfig | None = None
    ) -> Tensor:
        """The tokens that the model adds to its inputs; those that all rows share in front are run once.

        See `generation.generate`.
        """
        from deltaprompt.compose.generation import generate

        return generate(self, inputs, adaptation, config)

    def checkpointing(self, on: bool = True, share: float = SHARE) -> None:
        """Whether the backward pass computes layers again, to save memory; also those that are in evaluation mode.

        transformers' own switch does so as well: either way a layer runs again in the slots of its own forward pass.

        Args:
            on: whether.
            share: of the layers, from the lowest delta's on. What the last ones keep is free again when the others
                need room to be computed in, so that three quarters save much in less time; 1 for the least memory.
        """
        if not 0.0 < share <= 1.0:
            raise ConfigError(f"layers to compute again: got a share of {share}; above 0 and up to 1 is possible")
        if on:
            self._check_open()
        if not self.model.supports_gradient_checkpointing:
            raise ConfigError(
                f"{type(self.model).__name__} cannot compute its layers again; train it without checkpointing"
            )
        self.recomputing.always = on
        self.model._set_gradient_checkpointing(enable=on, gradient_checkpointing_func=AGAIN)
        changed = [self.model.get_submodule(patch.site.path) for patch in self._placed()]
        rest(list(layers_of(self.model)), changed, share)

    # Its tensors

    def parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The stacked tensors by stored name: `<number of the delta>.<site>.<tensor>`, or `….shared.<tensor>`."""
        for number, common in enumerate(cast(list[Stack], list(self.commons))):
            for name, tensor in common.tensors.items():
                yield f"{number}.{SHARED}.{name}", tensor
        for patch in self._placed():
            for name, tensor in patch.tensors.items():
                yield f"{patch.number}.{patch.site.name}.{name}", tensor

    def parameter_count(self) -> int:
        """Trainable numbers of one adaptation."""
        stacks = cast(list[Stack], [*self.commons, *self.patches])
        return sum(spec.size for stack in stacks for spec in stack.specs.values())

    @torch.no_grad()
    def stored(self, slot: int = 0) -> dict[str, Tensor]:
        """What is kept of one slot, by stored name: what trains, and of a reparametrised delta what it computes."""
        self._check_open()
        computed = {str(n) for n, delta in enumerate(self.deltas) if isinstance(delta, Reparametrised)}
        kept = {name: t.detach()[slot] for name, t in self.parts() if name.partition(".")[0] not in computed}
        for patch in self._placed():
            if str(patch.number) in computed:
                for name, tensor in patch.slot(slot, self.model.get_submodule(patch.site.path)).items():
                    kept[f"{patch.number}.{patch.site.name}.{name}"] = tensor
        return kept

    @torch.no_grad()
    def settle(self) -> None:
        """Every reparametrised delta becomes the plain one that it computes; outputs stay as they are."""
        if not any(isinstance(delta, Reparametrised) for delta in self.deltas):
            return
        kept = [self.stored(slot) for slot in range(self.slots)]
        deltas = [plain(delta) for delta in self.deltas]
        self._unhook()
        self.deltas, self.patches, self.commons = (), nn.ModuleList(), nn.ModuleList()
        for delta in deltas:
            self._take(delta, *self._made(delta))
        for name, tensor in self.parts():
            tensor.copy_(torch.stack([each[name] for each in kept]))
        self._hook()

    # In the backbone's own weights

    @torch.no_grad()
    def merge(self, slot: int = 0) -> Backbone:
        """The backbone, its own weights having taken up one slot's deltas; nothing is attached until `unmerge`.

        Raises:
            SiteError: a delta has no form in weights, or a site has no tensor to take it up. Nothing is changed then.
        """
        self._check_open()
        check_slot(slot, self.slots)
        new: dict[str, Tensor] = {}
        for patch in self._placed():
            new |= merged(patch, slot, self.model, new)
        own = {name: self.model.get_parameter(name) for name in new}
        self._before_merge = {name: p.detach().clone() for name, p in own.items()}
        for name, tensor in new.items():
            own[name].copy_(tensor)
        self._mark = mark_merge(self.model)
        self._release()
        return self.backbone

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes `merge` back: the backbone's weights are bitwise what they were, and the deltas are attached again."""
        if self._before_merge is None:
            raise ConfigError("nothing is merged; merge() first")
        take_mark_back(self.model, self._mark)
        for name, tensor in self._before_merge.items():
            self.model.get_parameter(name).copy_(tensor)
        self._before_merge = None
        freeze(self.model)
        self._hook()


def plain(delta: Delta) -> Delta:
    """The delta whose tensors are saved: itself, or the plainer one that a reparametrised delta computes."""
    return delta.plain() if isinstance(delta, Reparametrised) else delta


def carries_deltas(model: nn.Module) -> bool:
    """Whether any patch is attached to a model."""
    return next(patches_on(model), None) is not None


def patches_on(model: nn.Module) -> Iterator[Patch]:
    """The patches that are attached to a model, once for each of their hooks."""
    hooks = (
        hook.__self__ if isinstance(hook, MethodType) else hook
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values(), *attention.hooks_of(module))
    )
    return (hook for hook in hooks if isinstance(hook, Patch))


def _other_readers(model: nn.Module, embedding: nn.Module, rows: int) -> Iterator[nn.Module]:
    """What else reads the same ids: embeddings of a decoder or of each layer (Gemma 4), routers (DeepSeek V4)."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            if module is not embedding and module.num_embeddings == rows:
                yield module
        elif IDS in signature(module.forward).parameters and embedding not in module.modules():
            yield module


def _mixed(seed: int, place: int) -> int:
    """A seed for the patch at that place: apart for each (seed, place)."""
    return (seed * 1_000_003 + place * 7_919 + 17) % 2**63
