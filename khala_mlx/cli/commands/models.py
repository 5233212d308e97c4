"""`khala models`: list, download, verify, remove."""

from __future__ import annotations

import sys
from typing import Any

import click

from khala_mlx.cli.options import json_option
from khala_mlx.cli.terminal import OneLineErrors, Progress, command, report


@click.group(cls=OneLineErrors)
def models() -> None:
    """Models on this machine."""


@models.command("list")
@json_option
@command
def list_models(as_json: bool) -> None:
    """List the bundled demo model and those that were downloaded."""
    from khala_mlx.library import models as found
    from khala_mlx.storage.paths import models_folder
    from khala_mlx.text import shown

    every = found()
    if as_json:
        report({"folder": str(models_folder()), "models": every}, as_json)
        return
    for each in every:
        size = f"{each.get('bytes', 0) / 1e9:.2f} GB"
        about = each.get("damaged") or f"{each['dtype']}, {size}, {shown(each['licence'])}"
        click.echo(f"{shown(each['name']):<40}  {about}")


@models.command()
@click.argument("repository")
@click.option("--name", help="What it is called here.  [default: OWNER--NAME]")
@click.option("--revision", help="Branch, tag or commit.  [default: the newest]")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]))
@click.option(
    "--quantize",
    type=click.Choice(["4", "6", "8", "mxfp4", "mxfp8"]),
    help="Quantize the language models.",
)
@click.option("--tokenizer", metavar="FILE", help="Llama 3.1's, if not beside the weights.")
@click.option("--accept-licence", is_flag=True, help="Accept the licence of the weights unasked.")
@json_option
@command
def download(
    repository: str, name: str | None, revision: str | None, accept_licence: bool, as_json: bool,
    **how: Any,
) -> None:  # fmt: skip
    """Fetch weights from the Hugging Face Hub and convert them; resume where it stopped.

    HF_ENDPOINT names a mirror, HF_HUB_OFFLINE=1 forbids the network, KHALA_MODELS is where models
    are kept. The model is then used by its repository's name.

    \b
    khala models download liujiafeng/Shao-MusicGeneration-v1.0
    khala generate -m liujiafeng/Shao-MusicGeneration-v1.0 --tags "slow rock"
    """
    from khala_mlx.library import download as fetch

    how = {option: value for option, value in how.items() if value is not None}

    def accept(repo: str, licence: str) -> bool:
        click.echo(f"The weights in {repo} are under the licence: {licence}.", err=True)
        if accept_licence:
            return True
        if not sys.stdin.isatty():
            click.echo("Accept it with --accept-licence.", err=True)
            return False
        return click.confirm("Do you accept it?", err=True)

    folder = fetch(
        repository, name=name, revision=revision, accept=accept, on_progress=Progress(), **how
    )
    report({"model": folder.name, "folder": str(folder)}, as_json)


@models.command()
@click.argument("name")
@json_option
@command
def remove(name: str, as_json: bool) -> None:
    """Delete a downloaded model, and what has come of one."""
    from khala_mlx.library import remove as delete

    freed = delete(name)
    report({"removed": name, "freed": f"{freed / 1e9:.2f} GB"}, as_json)


@models.command()
@click.argument("model")
@click.option("--against", metavar="FULL", help="Compare with the model it was quantized from.")
@click.option(
    "--frames",
    # More would hold probabilities of gigabytes.
    type=click.IntRange(1, 1024),
    default=64,
    show_default=True,
    help="How much song to compare on, with --against.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="With --against.")
@click.option("--record", is_flag=True, help="Store what the model gives here, instead.")
@json_option
@command
def verify(
    model: str, against: str | None, frames: int, seed: int, record: bool, as_json: bool
) -> None:
    """Tell whether MODEL computes here what it did where it was known to be right.

    Compares greedy tokens, superres and codec with the goldens in the model's folder, on this
    device and in the model's dtype and quantization; exits with 1 where they do not hold. With
    --against, how far a quantized model is from the one it came from.
    """
    from khala_mlx.pipeline.khala import Khala
    from khala_mlx.quality import goldens

    if against and record:
        raise click.UsageError("--against and --record exclude each other.")
    khala = Khala.from_pretrained(model, keep_loaded=False)
    if against:
        full = Khala.from_pretrained(against, keep_loaded=False)
        _report_distance(khala, full, frames, seed, as_json)
    elif record:
        report({"goldens": str(goldens.record(khala))}, as_json)
    else:
        told = goldens.check(khala)
        report(told, as_json)
        if not told["holds"]:
            click.get_current_context().exit(1)


def _report_distance(packed: Any, full: Any, frames: int, seed: int, as_json: bool) -> None:
    from khala_mlx.quality.divergence import against

    told = against(packed, full, frames=frames, seed=seed)
    if not as_json:
        shares = ("top1_agreement", "codes_changed")
        told |= {name: f"{told[name]:.2%}" for name in shares}
        told["kl_nats"] = f"{told['kl_nats']:.4g}"
    report(told, as_json)
