"""Laws of many adaptations on one backbone: mixed in a batch, each answers as it does alone."""

import pickle

import pytest
import torch

import deltaprompt as dp
from deltaprompt import registry
from deltaprompt.compose import Adapted, Stack
from deltaprompt.errors import ConfigError, StoreError
from deltaprompt.model.group import Group
from tests import backbones_zoo as zoo

TEXTS = ("a good movie", "one two three bad good movie it was", "so")
FAMILIES = ("bert", "gpt2", "llama", "t5", "bart", "gemma")
TASKS = (
    dp.Task("{text} it was {mask}", {"a": "good", "b": "bad"}),
    dp.Task("{soft:3} {text} {mask}", {"x": "one", "y": "two", "z": "three"}, dp.SoftVerbalizer()),
    dp.Task("so {text} {mask}", {"a": "good movie", "b": "bad"}),
)
DELTAS = {
    "lora": [dp.LoRA(2)],
    "wider lora": [dp.LoRA(4, alpha=3)],
    "adapter": [dp.Adapter(3)],
    "prefix": [dp.Prefix(2)],
    "longer prefix": [dp.Prefix(5), dp.LoRA(3)],
    "soft prompt": [dp.SoftPrompt(2)],
    "nothing": [],
}


@torch.no_grad()
def saved(backbone, task, deltas, folder, text):
    """Saves an adaptation whose tensors are all noise, and returns its answer alone."""
    model = dp.adapt(backbone, task, deltas)
    try:
        generator = torch.Generator().manual_seed(len(str(folder)) + len(text))
        for _, p in model.parts():
            p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=0.3)
        model.save(folder)
        return model.predict([text])[0]
    finally:
        model.adapted.remove()


def apart(found, expected):
    return max(abs(f["scores"][n] - p) for f, e in zip(found, expected, strict=True) for n, p in e["scores"].items())


def made(backbone, folder, deltas=DELTAS, tasks=TASKS):
    """Folders of adaptations, a text for each, and the answers alone."""
    folders, texts, expected = [], [], []
    for name, each in deltas.items():
        for number, task in enumerate(tasks):
            folders.append(folder / f"{name} {number}")
            texts.append(TEXTS[len(folders) % len(TEXTS)])
            expected.append(saved(backbone, task, each, folders[-1], texts[-1]))
    return folders, texts, expected


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_of_a_mixed_batch_has_its_own_adaptation(family, tmp_path):
    backbone = zoo.build(family)
    before = {name: t.clone() for name, t in backbone.model.state_dict().items()}
    folders, texts, expected = made(backbone, tmp_path)
    many = dp.open_many(folders, backbone)
    names = [folder.name for folder in folders]
    assert many.names == tuple(names)
    for batch_size in (32, 5, 1):
        assert apart(many.predict(texts, names, batch_size), expected) < 1e-5
    many.remove()
    assert many.parameter_count() == 0
    assert all(torch.equal(t, before[name]) for name, t in backbone.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.model.modules())


@pytest.mark.parametrize("name", sorted(registry.variants("deltas")))
def test_every_delta_beside_a_lora(name, tmp_path):
    backbone, text = zoo.build("llama"), TEXTS[1]
    delta = registry.variant("deltas", name)
    given = {"bottleneck": 3} if name in ("adapter", "parallel_adapter") else {}
    options = {"rank": 2} if name in ("lora", "dora", "vera", "loreft") else given
    folders, texts, expected = made(
        backbone, tmp_path, {"own": [delta(**options)], "lora": [dp.LoRA(2)], "none": []}, TASKS[:2]
    )
    many = dp.open_many(folders, backbone)
    assert apart(many.predict(texts, many.names), expected) < 1e-5
    assert apart(many.predict([text, texts[0]], [many.names[2], many.names[0]])[1:], expected[:1]) < 1e-5
    many.remove()


def test_they_come_and_go_while_it_predicts(tmp_path):
    backbone = zoo.build("bert")
    folders, texts, expected = made(backbone, tmp_path)
    names = [folder.name for folder in folders]
    many = dp.open_many(folders[:1], backbone)
    for number in range(1, len(folders)):
        assert many.add(folders[number]) == names[number]
        shown = slice(0, number + 1)
        assert apart(many.predict(texts[shown], names[shown]), expected[shown]) < 1e-5
    held = many.parameter_count()
    for _ in range(3):
        many.drop(names[4])
        many.add(folders[4])
    assert many.parameter_count() == held
    assert apart(many.predict(texts, names), expected) < 1e-5
    for name in names[:-2]:
        many.drop(name)
    assert apart(many.predict(texts[-2:], names[-2:]), expected[-2:]) < 1e-5
    many.remove()


def test_memory_is_the_sum_of_the_weights_and_patches_are_as_many_as_sorts(tmp_path):
    backbone = zoo.build("bert")
    folders, _, _ = made(backbone, tmp_path, {f"lora {i}": [dp.LoRA(2)] for i in range(6)}, TASKS[:1])
    model = dp.open(folders[0], backbone)
    one, hooks = model.parameter_count(), len(model.adapted.patches)
    model.adapted.remove()
    many = dp.open_many(folders, backbone)
    assert many.parameter_count() == 6 * one
    assert sum(len(m._forward_hooks) for m in backbone.model.modules()) == hooks
    many.remove()


def test_where_rows_cannot_differ_each_adaptation_is_run_by_itself(tmp_path):
    backbone = zoo.build("deberta-v3")  # whose q and k also map positions that all rows share
    deltas = {"lora": [dp.LoRA(2, at=("attn.q", "attn.v"))], "wider": [dp.LoRA(3, at=("attn.q", "attn.v"))]}
    folders, texts, expected = made(backbone, tmp_path, deltas, TASKS[:1])
    many = dp.open_many(folders, backbone)
    assert apart(many.predict(texts, many.names), expected) < 1e-5
    many.remove()


def test_what_is_wrong_is_told_and_leaves_all_as_it_was(tmp_path):
    backbone = zoo.build("bert")
    folders, texts, expected = made(backbone, tmp_path / "a", {"lora": [dp.LoRA(2)]}, TASKS[:2])
    other = zoo.build("gpt2")
    saved(other, TASKS[0], [dp.LoRA(2)], tmp_path / "gpt", TEXTS[0])
    many = dp.open_many(folders, backbone)
    with pytest.raises(dp.DeltaPromptError, match="there is no adaptation 'lora 3'; did you mean 'lora 1' or 'lora 0'"):
        many.predict(texts[:1], "lora 3")
    with pytest.raises(dp.DeltaPromptError, match="1 adaptations for 2 texts; name one for all, or one a text"):
        many.predict(texts, ["lora 0"])
    with pytest.raises(dp.DeltaPromptError, match="predict takes a list, and got one text"):
        many.predict("a text", "lora 0")
    with pytest.raises(dp.DeltaPromptError, match="there is already an adaptation 'lora 0'"):
        many.add(folders[0])
    with pytest.raises(dp.DeltaPromptError, match="was made on the backbone"):
        many.add(tmp_path / "gpt")
    with pytest.raises(dp.DeltaPromptError, match="there is no folder"):
        many.add(tmp_path / "missing")
    tensors = tmp_path / "a" / "lora 0" / "adaptation.safetensors"
    data = tensors.read_bytes()
    tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(dp.DeltaPromptError, match="is not the file that was saved"):
        many.add(folders[0], name="again")
    assert many.names == ("lora 0", "lora 1")
    assert apart(many.predict(texts, many.names), expected) < 1e-5
    with pytest.raises(dp.DeltaPromptError, match="already carries a model's deltas"):
        dp.open_many([], backbone)
    many.remove()
    with pytest.raises(dp.DeltaPromptError, match="open_many takes a list of folders, and got one"):
        dp.open_many(folders[0], backbone)
    with pytest.raises(dp.DeltaPromptError, match="two folders are called 'lora 1'"):
        dp.open_many([folders[1], folders[1]], backbone)


def test_another_models_deltas_are_refused(tmp_path):
    backbone = zoo.build("bert")
    saved(backbone, TASKS[0], [dp.BitFit()], tmp_path / "bias", TEXTS[0])
    saved(backbone, TASKS[0], [], tmp_path / "bare", TEXTS[0])
    many = dp.open_many([tmp_path / "bare"], backbone)
    model = dp.adapt(backbone, TASKS[0], [dp.LoRA(2)])
    for call in (lambda: many.predict(TEXTS, "bare"), lambda: many.add(tmp_path / "bias")):
        with pytest.raises(ConfigError, match="already carries a model's deltas, which would act here too; take them"):
            call()
    model.adapted.remove()
    many.add(tmp_path / "bias")
    assert many.predict(TEXTS[:2], ["bare", "bias"])


def test_weights_that_changed_are_another_backbone(tmp_path):
    backbone = zoo.build("bert")
    saved(backbone, TASKS[0], DELTAS["lora"], tmp_path / "one", TEXTS[0])
    many = dp.open_many([tmp_path / "one"], backbone)
    with torch.no_grad():
        backbone.model.get_input_embeddings().weight.mul_(2)
    with pytest.raises(StoreError, match="They differ in their fingerprint"):
        many.add(tmp_path / "one", "two")


def test_memory_that_runs_out_leaves_nothing_behind(tmp_path, monkeypatch):
    backbone = zoo.build("bert")
    saved(backbone, TASKS[0], DELTAS["lora"], tmp_path / "one", TEXTS[0])
    saved(backbone, TASKS[0], DELTAS["wider lora"], tmp_path / "two", TEXTS[0])

    def full(self, *given):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Stack, "grow", full)
        with pytest.raises(MemoryError):
            dp.open_many([tmp_path / "one", tmp_path / "two"], backbone)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.model.modules())
    many = dp.open_many([tmp_path / "one"], backbone)
    expected = many.predict(TEXTS, "one")
    with monkeypatch.context() as patch:
        patch.setattr(Group, "take_over", full)
        with pytest.raises(MemoryError):
            many.add(tmp_path / "two")
    assert many.predict(TEXTS, "one") == expected
    many.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.model.modules())


def test_what_grew_takes_no_memory_of_others_and_no_room_with_it():
    adapted = Adapted(zoo.build("bert"), [dp.LoRA(2, at=("attn.q", "attn.v"))], 2)
    adapted.grow(1)
    parts = [p for _, p in adapted.parts()]
    packed = torch.nn.utils.parameters_to_vector(parts)
    torch.nn.utils.vector_to_parameters(torch.ones_like(packed), parts)
    adapted.grow(1)
    assert all(bool((p[:3] == 1).all()) and not p[3].any() for p in parts)
    adapted.grow(1)
    again = pickle.loads(pickle.dumps(adapted))
    for p, copied in zip(parts, (p for _, p in again.parts()), strict=True):
        assert torch.equal(p, copied)
        assert copied.untyped_storage().nbytes() == copied.nbytes
