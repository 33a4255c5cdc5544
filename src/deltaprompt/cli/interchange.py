"""`deltaprompt export` and `deltaprompt import`: adaptations as PEFT folders, and PEFT folders as adaptations."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaprompt.cli import console, options
from deltaprompt.errors import ConfigError

if TYPE_CHECKING:
    from deltaprompt.model import Model

PeftFolder = Annotated[
    Path, typer.Argument(help="The folder with adapter_config.json and adapter_model.safetensors.", metavar="FOLDER")
]
PeftOut = Annotated[Path, typer.Argument(help="The PEFT folder to write.", metavar="OUT")]
Uniform = Annotated[
    bool,
    typer.Option(
        "--uniform",
        help="One rank and alpha for all modules, for engines that read no rank_pattern and alpha_pattern (vLLM).",
        rich_help_panel=options.OUTPUT,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--backbone",
        help="The model that the adapter is of; default: the one that the folder names.",
        rich_help_panel=options.MODEL,
        metavar="NAME",
        show_default=False,
    ),
]


def export(
    folder: options.Folder,
    out: PeftOut,
    backbone: options.OtherBackbone = None,
    uniform: Uniform = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write a saved adaptation's deltas as a PEFT folder, which peft and the engines that read its folders open.

    LoRA, DoRA, IA3, a soft prompt or a prefix. Its template and label words stay behind: whoever runs the folder puts
    the template around each text.
    """
    from deltaprompt.cli.predict import opened
    from deltaprompt.interchange import save_peft
    from deltaprompt.interchange.folder import config_of
    from deltaprompt.model import Model

    model = opened(folder, backbone, "cpu")
    written = save_peft(model, out, uniform=uniform)
    config = config_of(out)
    words = _words(model) if isinstance(model, Model) else {}
    template = model.record()["template"]
    if as_json:
        told = {"out": str(out), "bytes": written, "method": config["peft_type"], "template": template}
        console.print_json({**told, "labels": words})
        return
    console.output().print(
        f"{config['peft_type']} for {config['base_model_name_or_path']}, {console.size(written)} in {out}",
        markup=False,
        soft_wrap=True,
    )
    console.note(f"put this template around each text: {template}")
    if words:
        console.note("and read its answer at {mask}: " + ", ".join(f"{'|'.join(w)} = {n}" for n, w in words.items()))
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        console.note("its modules differ in rank or scale; for engines that read no patterns (vLLM), add --uniform")


def import_(
    folder: PeftFolder,
    out: options.Out = None,
    backbone: Base = None,
    template: options.Template = None,
    describe: options.Describe = None,
    verbalizer: options.VerbalizerOption = None,
    max_length: options.MaxLength = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Make an adaptation of a PEFT folder, with a template and what stands for each label.

    LoRA, DoRA, IA3, prompt tuning or prefix tuning, on the model that it was trained on.
    """
    from deltaprompt.cli.recipe import BackboneTable
    from deltaprompt.cli.task import loaded, task_for
    from deltaprompt.interchange import open_peft
    from deltaprompt.interchange.folder import config_of

    if out is None:
        raise ConfigError("an imported adapter is kept in a folder; name it: --out DIR")
    table = _task_table(template, describe, verbalizer, max_length)
    config = config_of(folder)
    name = backbone or config.get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"{folder} does not name the model that it is of; name it: --backbone NAME")
    base = loaded(BackboneTable(name, device=device, dtype=dtype or "float32"), [template])
    model = open_peft(folder, base, task_for(table, base, ()))
    written = model.save(out, training={"imported": str(folder.resolve()), "peft_type": config["peft_type"]})
    told = {"out": out, "bytes": written, "method": config["peft_type"], "parameters": model.parameter_count()}
    if as_json:
        console.print_json(told)
        return
    screen = console.output()
    screen.print(
        f"{config['peft_type']} on {name}: {told['parameters']:,} parameters, {console.size(written)} in {out}",
        markup=False,
        soft_wrap=True,
    )
    screen.print(f"use it: deltaprompt predict {shlex.quote(out)} FILE", markup=False, soft_wrap=True)


def _task_table(
    template: str | None, describe: list[str] | None, verbalizer: str | None, max_length: int | None
) -> Any:
    """The task's options as a recipe's table."""
    from deltaprompt.cli.recipe import build, labels_of, overlaid
    from deltaprompt.registry import variant_of

    if not describe:
        raise ConfigError(
            "an adapter has no labels; name them and what stands for each: --labels good=great --labels bad=terrible"
        )
    if isinstance(labels := labels_of(describe), str):
        raise ConfigError(f"{labels} has words without the names of their labels; give a .toml or .json file with them")
    given = {
        "template": template,
        "labels": labels,
        "verbalizer": variant_of("verbalizers", verbalizer) if verbalizer else None,
        "max_length": max_length,
    }
    return build(overlaid({}, {"task": given})).task


def _words(model: Model) -> dict[str, list[str]] | None:
    """The label words of an adaptation that answers by words."""
    from deltaprompt.verbalizers.label_words import LabelWords

    if not isinstance(model.verbalizer, LabelWords):
        return None
    return {label: [some] if isinstance(some, str) else list(some) for label, some in model.verbalizer.words.items()}
