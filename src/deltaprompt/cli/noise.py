"""`deltaprompt noise`: labelled rows whose label is likely wrong."""

from __future__ import annotations

from typing import Annotated

import typer

from deltaprompt.cli import console, options
from deltaprompt.errors import ConfigError


def noise(
    context: typer.Context,
    folder: options.Folder,
    file: Annotated[str, typer.Argument(help="Labelled rows, as fit reads them.", metavar="FILE")],
    top: Annotated[int, typer.Option("--top", help="Show so many; with --json all are.", metavar="N")] = 20,
    text: options.Text = None,
    label: options.Label = None,
    field: options.Fields = None,
    drop_empty: options.DropEmpty = False,
    backbone: options.OtherBackbone = None,
    device: options.Device = None,
    batch_size: options.EachBatch = 32,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show the rows whose label is likely wrong, the likeliest first, as a saved adaptation sees them."""
    from deltaprompt.cli.data import labelled_rows
    from deltaprompt.cli.predict import opened
    from deltaprompt.model import Model
    from deltaprompt.model.noise import noise_scores

    model = opened(folder, backbone, device)
    if not isinstance(model, Model):
        raise ConfigError(f"{folder} gives no labels of texts, whose noise could be told")
    examples = labelled_rows(file, context.params, model.features.template.fields)
    scores = noise_scores(model, examples, batch_size)
    order = sorted(range(len(examples)), key=lambda n: -scores[n])
    if as_json:
        for n in order:
            told = {"row": n + 1, "noise": scores[n], "label": examples[n].label, "fields": dict(examples[n].fields)}
            console.print_json(told)
        return
    shown = [
        [f"{n + 1}", f"{scores[n]:.3f}", str(examples[n].label), " ".join(examples[n].fields.values())[:80]]
        for n in order[:top]
    ]
    console.output().print(console.table(["row", "noise", "label", "text"], shown))
