"""`attnbias attend`: one token of one input → what it attends to, whose values, and its output's parts."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from diag.cli import options
from diag.cli.app import app, records, say_failures
from diag.cli.defaults import completed
from diag.cli.options import Read, fields_of, output, whole_numbers, with_options
from diag.cli.streams import answer
from diag.errors import say
from diag.results.decimals import fixed

if TYPE_CHECKING:
    import pandas as pd

    from diag.studies.attend import Attended


def _pair(text: str | None, flag: str, form: str) -> tuple[int, int] | None:
    """`3,4` → (3, 4). Raises UserError."""
    if text is None:
        return None
    first, second = whole_numbers(text, flag, f"{flag} {form}, for example {flag} 3,4", count=2)
    return first, second


def _layer(text: str | None) -> int | None:
    """`3` → 3, `last` → -1. Raises UserError."""
    if text is None or text == "last":
        return None if text is None else -1
    return whole_numbers(text, "--layer", "--layer takes a number, or last", count=1)[0]


@dataclass(frozen=True, kw_only=True)
class AttendOptions:
    """What `attnbias attend` can be told."""

    model: Annotated[
        list[str],
        Option("-m", "--model", help="Model name, repeatable: [family:]name[@revision] or a folder."),
    ]
    image: Annotated[str | None, Option(help="An image file, or demo:NAME [default: demo:astronaut].")] = None
    text: Annotated[str | None, Option(help="The text itself, a text file, or 'demo'.")] = None
    layer: Annotated[
        str | None,
        Option(help="The model's own number of a layer; -1 or last is its last [default: last]."),
        Read(_layer),
    ] = None
    depth: Annotated[
        float | None,
        Option(help="Instead of --layer: 0 is the first layer, 1 the last."),
    ] = None
    head: Annotated[int | None, Option(help="One query head [default: the mean over heads].")] = None
    patch: Annotated[
        str | None,
        Option(help="The target patch as ROW,COLUMN of the first model's grid [default: the middle]."),
        Read(partial(_pair, flag="--patch", form="ROW,COLUMN")),
    ] = None
    pixel: Annotated[
        str | None,
        Option(help="Instead of --patch: X,Y in the first model's resized image."),
        Read(partial(_pair, flag="--pixel", form="X,Y")),
    ] = None
    token: Annotated[
        int | None,
        Option(help="The target token of a text, or of --question [default: -1, the last]."),
    ] = None
    seq_len: Annotated[
        int | None, Option(help="Tokens of the text [default: 128, or as many as there are].")
    ] = None
    top: Annotated[int, Option(help="List so many of the most attended tokens.")] = 10
    saliency: Annotated[
        bool,
        Option(
            "--saliency",
            help="Compare what keys receive, in every layer, with gradients of the class logit or the loss.",
        ),
    ] = False
    question: Annotated[
        str | None, Option(help="Ask a vision-language model about --image; its language model is looked at.")
    ] = None
    general: Annotated[
        str | None,
        Option(help="What --question is compared with [default: the prompt of the model's name]."),
    ] = None
    checkpoint: options.Checkpoint = None
    model_args: options.ModelArgs = None
    random_init: options.RandomInit = False
    trust_remote_code: options.TrustRemoteCode = False
    out: Annotated[Path | None, output("Folder [default: runs/attend-NAME-KEY].")] = None
    overwrite: options.Overwrite = False
    device: options.Device = "auto"
    dtype: options.Dtype = "float32"
    as_json: options.AsJson = False
    quiet: options.QuietFolder = False


@app.command()
@with_options
def attend(given: AttendOptions) -> None:
    """Show what one patch or token attends to, how alike their values are, and what it gets back."""
    from diag.show.terminal import StderrListener
    from diag.studies.attend import AttendPlan, read, run_attend

    models, fields = tuple(given.model), fields_of(given, AttendPlan)
    plan = AttendPlan.checked(models=models, **completed(models, fields, quiet=given.quiet))
    with StderrListener(quiet=given.quiet) as listener:
        folder = run_attend(plan, given.out, overwrite=given.overwrite, listener=listener)
    found = read(folder)
    with answer(folder):
        if given.as_json:
            print(json.dumps(_document(found, folder, given.top), indent=1, ensure_ascii=False))
        elif given.quiet:
            print(folder)
        else:
            print("\n\n".join("\n".join(_block(entry, found, given.top)) for entry in found.models))
    if not given.as_json and not given.quiet:
        say(f"folder: {folder}")
    if found.failed:
        say_failures(found.failed)
        raise SystemExit(3)


def _block(entry: Any, found: Attended, top: int) -> list[str]:
    """Of one model: the target, its most attended tokens, and its split. At most 80 columns wide."""
    from diag.results.caveats import with_caveats
    from diag.show.figures.strip import printable
    from diag.show.figures.tables import title_lines
    from diag.show.terminal import columns, text_width

    tokens, numbers = _of_model(entry, found)
    first, visible = tokens.iloc[0], int(tokens["weight"].notna().sum())
    mean = first["head"] == "mean"
    head = f"mean over {entry['heads']} heads" if mean else f"head {first['head']}"
    if entry["tower"] == "vision":
        target = "patch {},{} of {}×{}".format(*entry["target"], *entry["grid"])
    else:
        target = f"token {entry['target']} '{printable(entry['target_text'])}'"
    rows = [
        {
            "rank": f"{token['rank']:>4}",
            "token": _name(token),
            "weight": f"{token['weight']:>6.4f}",
            "× uniform": f"{token['weight'] * visible:>9.1f}",
            "value cosine": fixed(token["value_cosine"]).rjust(12),
        }
        for _, token in _most(tokens, top).iterrows()
    ]
    said = f"{entry['input']} · layer {entry['layer']} · {head} · target {target} · sees {visible}"
    return [
        *title_lines(with_caveats(entry["given"], entry), text_width()),
        *textwrap.wrap(said, text_width(), initial_indent="  ", subsequent_indent="  "),
        *columns(rows).splitlines(),
        *_split(numbers, mean),
        *_agreement(entry, found),
        *_gaze(entry, found),
    ]


def _split(numbers: pd.Series, mean: bool) -> list[str]:
    """cos(y, v) in its two parts, its nulls, and ‖y‖² in its two parts."""
    bias, own, context, uniform, partner = (
        "–" if numbers[name] != numbers[name] else fixed(numbers[name])
        for name in ("cos_y_vself", "self_part", "context_part", "cos_y_vuniform", "cos_y_vpartner")
    )
    energy = numbers["removed_energy"]
    shares = f"{energy:.0%} along v, {fixed(100 * (1 - energy), 0)}% exclusive"
    norms = "means over heads"  # norms and signed projections of several heads do not add up
    if not mean:
        parts = {"‖y‖": "output_norm", "along v": "projection", "exclusive": "exclusive_norm"}
        norms = ", ".join(f"{words} {fixed(numbers[name])}" for words, name in parts.items())
    return [
        f"cos(y,v) {bias} = self {own} + context {context}",
        f"nulls    uniform {uniform}, partner {partner}",
        f"‖y‖²     {shares} ({norms})",
    ]


def _agreement(entry: Any, found: Attended) -> list[str]:
    """How far what keys receive agrees with |g·x|: in this layer, in all of them, and in the best head."""
    from diag.results.agreement import ALL, GRADIENT_X_INPUT
    from diag.results.looks import MEAN

    if found.agreement is None:
        return []
    rows = found.agreement
    rows = rows[(rows["model"] == entry["given"]) & (rows["saliency"] == GRADIENT_X_INPUT)]
    here = rows[(rows["head"] == MEAN) & (rows["layer"] == entry["layer"])]["rho"]
    heads = rows[~rows["head"].isin([MEAN, ALL])].dropna(subset="rho")
    if heads.empty:
        return ["saliency undefined: fewer than 4 keys, or all alike"]
    best = heads.loc[heads["rho"].idxmax()]
    (whole,) = rows[rows["head"] == ALL]["rho"]
    this = "".join(f"this layer {fixed(rho)}, " for rho in here)
    return [
        f"saliency |g·x| of the {entry['explained']}: ρ with received attention",
        f"         {this}all layers {fixed(whole)}, best head {fixed(best['rho'])} "
        f"(layer {best['layer']}, head {best['head']})",
    ]


def _gaze(entry: Any, found: Attended) -> list[str]:
    """What the question changes in this layer: attention to the image, its entropy, contrast, gaze shift."""
    from diag.results.gaze import per_layer

    if found.gaze is None:
        return []
    here = found.gaze[(found.gaze["model"] == entry["given"]) & (found.gaze["layer"] == entry["layer"])]
    if here.empty:
        return ["image    not read in this layer, which attends in windows or without a softmax"]
    numbers, most = per_layer(here).iloc[0], here.loc[here["contrast"].idxmax()]
    where = f"image token {most['token']}" if here["row"].isna().any() else f"{most['row']},{most['col']}"
    asked, general, uniform = (fixed(numbers[name]) for name in ("entropy", "entropy_general", "uniform"))
    masses = (f"{numbers[name]:.1%}" for name in ("image_mass", "image_mass_general"))
    return [
        "image    {} of the last token's attention, in general {}".format(*masses),
        f"entropy  {asked} over the image, in general {general}, uniform {uniform}",
        f"contrast largest at {where} ({fixed(most['contrast'], 2)}), "
        f"gaze shift {fixed(numbers['gaze_shift'])}",
    ]


def _document(found: Attended, folder: Path, top: int) -> dict[str, Any]:
    from diag.results.caveats import caveats

    models = []
    for entry in found.models:
        tokens, numbers = _of_model(entry, found)
        heads = found.decomposition[found.decomposition["model"] == entry["given"]]
        models.append(
            {
                **{key: entry[key] for key in ("given", "resolved", "layer", "module", "target", "n_tokens")},
                "caveats": caveats(entry),
                "head": tokens["head"].iloc[0],
                "most_attended": records(_most(tokens, top)),
                "decomposition": records(numbers.to_frame().T.infer_objects())[0],
                "heads": records(heads[heads["head"] != "mean"]),
                **_agreements(entry, found),
                **_gazes(entry, found),
            }
        )
    return {"folder": str(folder), "models": models, "failed": dict(found.failed)}


def _agreements(entry: Any, found: Attended) -> dict[str, Any]:
    if found.agreement is None:
        return {}
    rows = found.agreement[found.agreement["model"] == entry["given"]]
    return {"explained": entry["explained"], "agreement": records(rows)}


def _gazes(entry: Any, found: Attended) -> dict[str, Any]:
    from diag.results.gaze import per_layer

    if found.gaze is None:
        return {}
    rows = found.gaze[found.gaze["model"] == entry["given"]]
    return {"question": entry["question"], "general": entry["general"], "gaze": records(per_layer(rows))}


def _of_model(entry: Any, found: Attended) -> tuple[pd.DataFrame, pd.Series]:
    """The tokens of one model, and the numbers of the head (or mean) that they are of."""
    tokens = found.tokens[found.tokens["model"] == entry["given"]]
    heads = found.decomposition[found.decomposition["model"] == entry["given"]]
    return tokens, heads[heads["head"] == tokens["head"].iloc[0]].iloc[0]


def _most(tokens: pd.DataFrame, top: int) -> pd.DataFrame:
    return tokens[tokens["rank"] <= top].sort_values("rank")


def _name(token: pd.Series) -> str:
    import pandas as pd

    from diag.show.figures.strip import printable

    if token["kind"] == "text":
        name = f"{token['token']} '{printable(token['text'])}'"
    else:
        placed = token["kind"] in ("patch", "image") and not pd.isna(token["row"])
        name = f"{token['row']},{token['col']}" if placed else f"{token['kind']}"
    return f"{name} (itself)" if token["is_target"] else name
