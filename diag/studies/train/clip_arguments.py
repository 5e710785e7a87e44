"""Arguments of open_clip_train: from a YAML file and the command line, and what is wrong with them.

A file's keys are open_clip_train's flags without their dashes (`train-data: …`, `local-loss: true`), and
`global-batch-size`, which is divided by the number of processes. Everything that open_clip_train would find
out late, refuse with exit code 0 or wait for ever is checked before it starts.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diag.errors import UserError, did_you_mean
from diag.inputs.document import read_document
from diag.models.families.open_clip import OWN_CONFIGS

GLOBAL_BATCH = "global-batch-size"
HELP = "its flags: python -m open_clip_train.main --help"


def open_clip_train() -> Any:
    """The module `open_clip_train.main`, with the model configs of this package known to open_clip.

    Raises UserError where what it needs is not installed.
    """
    try:
        import open_clip
        from open_clip_train import main
    except ImportError as error:
        raise UserError(
            f"open_clip_train needs '{error.name}', which is not installed", 'pip install "attnbias[train]"'
        ) from None
    for config in OWN_CONFIGS.glob("*.json"):
        if open_clip.get_model_config(config.stem) is None:
            open_clip.add_model_config(config)
    return main


def read_arguments(arguments: Sequence[str], config: Path | None, label: str) -> tuple[list[str], Namespace]:
    """What open_clip_train is called with, as a list and as it will read it.

    label: ends the run's name where none is given (`ViT-B-16-LABEL-seed0`), the same in every process and
        for every seed, so that `--resume latest` finds it; what only evaluates keeps open_clip's dated name.
    Raises UserError as the module says.
    """
    settings = {} if config is None else _settings(config)
    batch = settings.pop(GLOBAL_BATCH, None)
    argv = [*_flags(settings), *arguments]
    given = _parsed(argv)
    if batch is not None and not any(word.split("=")[0] == "--batch-size" for word in arguments):
        argv += ["--batch-size", str(_per_process(batch, given, config))]
    if given.name is None and _trains(given):
        argv += ["--name", re.sub(r"[^\w.-]+", "-", f"{given.model}-{label}-seed{given.seed}")]
    given = _parsed(argv)
    _refuse_unknown_model(given)
    _refuse_existing_run(given)
    _refuse_missing_data(given)
    return argv, given


def _parsed(argv: Sequence[str]) -> Namespace:
    from open_clip_train.params import parse_args

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse_args(list(argv))
    except SystemExit as ended:
        if not ended.code:
            raise  # --help has been printed
    problem = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
    unknown = problem.partition("unrecognized arguments: ")[2].split()
    near = did_you_mean(unknown[0].split("=")[0], known_flags()) if unknown else None
    raise UserError(f"open_clip_train: {problem}", near or HELP)


def known_flags() -> tuple[str, ...]:
    """Every flag of open_clip_train, `--train-data` and so on."""
    from open_clip_train.params import parse_args

    return tuple(f"--{name.replace('_', '-')}" for name in vars(parse_args([])))


# --- a file of arguments


def _settings(config: Path) -> dict[str, Any]:
    document = read_document(config, "flags", like="configs/clip-cc12m-b16.yaml")
    read = document.data
    if not isinstance(read, dict):
        raise UserError(f"'{config}' holds no flags", "write one 'flag: value' per line, without dashes")
    known = [*(flag.removeprefix("--") for flag in known_flags()), GLOBAL_BATCH]
    for key in read:
        if key not in known:
            raise document.error(
                (key,), f"open_clip_train has no flag '{key}'", did_you_mean(key, known) or HELP
            )
    return read


def _flags(settings: Mapping[str, Any]) -> list[str]:
    """`{epochs: 2, local-loss: true, image-std: [1, 1, 1]}` → `--epochs 2 --local-loss --image-std 1 1 1`."""
    flags = []
    for key, value in settings.items():
        if value is None or value is False:
            continue
        flags.append(f"--{key}")
        if isinstance(value, Mapping):
            flags += [f"{name}={inner}" for name, inner in value.items()]
        elif value is not True:
            flags += map(str, value if isinstance(value, list) else [value])
    return flags


def _per_process(batch: object, given: Namespace, config: Path | None) -> int:
    """The batch size of each process. Raises UserError where the whole cannot be divided evenly."""
    parts = _processes() * given.accum_freq
    if not isinstance(batch, int) or batch < 1 or batch % parts:
        raise UserError(
            f"{config}: {GLOBAL_BATCH} {batch} cannot be divided by {_processes()} processes × "
            f"--accum-freq {given.accum_freq}",
            "take a number of processes that divides it, or give --batch-size (per process)",
        )
    return batch // parts


def _processes() -> int:
    """Processes of the run, as open_clip_train counts them."""
    from open_clip_train.distributed import world_info_from_env

    return world_info_from_env()[2]


# --- what would be found out late


def _trains(given: Namespace) -> bool:
    return given.train_data is not None or given.dataset_type == "synthetic"


def _refuse_unknown_model(given: Namespace) -> None:
    import open_clip

    if ":" not in given.model and open_clip.get_model_config(given.model) is None:
        near = did_you_mean(given.model, open_clip.list_models())
        raise UserError(f"open_clip has no model '{given.model}'", near or "'attnbias models' lists them")


def _is_url(path: str) -> bool:
    """`s3://…`, `https://…`, and WebDataset's `pipe:…`."""
    return re.match(r"\w\w+:", path) is not None


def _refuse_existing_run(given: Namespace) -> None:
    """open_clip_train ends with exit code 0 here, and under torchrun the other processes wait for ever."""
    from open_clip_train.distributed import world_info_from_env

    resume = given.resume
    if resume not in (None, "latest") and not _is_url(resume) and not os.path.isfile(resume):
        raise UserError(f"--resume '{resume}' does not exist", "--resume latest, or a checkpoint")
    if given.name is None or resume == "latest":
        return
    folder = Path(given.logs) / given.name
    if (folder / (f"out-{world_info_from_env()[1]}" if given.log_local else "out.log")).exists():
        raise UserError(
            f"the run '{folder}' exists", "--resume latest goes on with it; --name NAME starts another"
        )


def _refuse_missing_data(given: Namespace) -> None:
    if not (_trains(given) or given.val_data or given.imagenet_val or given.imagenet_v2):
        raise UserError("there is nothing to train or evaluate on", "give --train-data SHARDS after '--'")
    for flag, data in (("--train-data", given.train_data), ("--val-data", given.val_data)):
        if data and (given.dataset_type == "webdataset" or data.endswith(".tar")):
            _refuse_missing_shards(flag, data, given)
        elif data and not Path(data).is_file():
            raise UserError(
                f"{flag} '{data}' does not exist", "give a CSV file, or shards: 'DIR/{0000..2175}.tar'"
            )
    if given.imagenet_val:
        _refuse_other_classes(Path(given.imagenet_val))


def _refuse_missing_shards(flag: str, data: str, given: Namespace) -> None:
    """open_clip_train logs a shard that is not there and goes on; with none, it goes round for ever."""
    from open_clip_train.data import expand_urls, get_dataset_size

    shards = [shard for part in data.split("::") for shard in expand_urls(part)[0]]
    local = [shard for shard in shards if not _is_url(shard)]
    missing = [shard for shard in local if not os.path.isfile(shard)]
    if missing:
        shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise UserError(
            f"{flag}: {len(missing)} of {len(shards)} shards are not there: {shown}",
            f"{flag} 'DIR/cc12m-train-{{0000..2175}}.tar', in quotes",
        )
    if flag != "--train-data" or "::" in data:
        return
    readers = given.workers * _processes()
    if len(shards) < readers and not given.dataset_resampled:
        raise UserError(
            f"{len(shards)} shards are too few for {readers} readers "
            f"({_processes()} processes × --workers {given.workers})",
            "give fewer --workers, or --dataset-resampled",
        )
    if given.train_num_samples is None and not (local and get_dataset_size(data)[0]):
        raise UserError("the number of training samples is not known", "give --train-num-samples N")


def _refuse_other_classes(folder: Path) -> None:
    """Zero-shot accuracy takes the n-th folder for ImageNet's n-th class, whatever its name."""
    from open_clip_train.zero_shot import IMAGENET_CLASSNAMES

    classes = sum(entry.is_dir() for entry in folder.iterdir()) if folder.is_dir() else 0
    if classes != len(IMAGENET_CLASSNAMES):
        raise UserError(
            f"--imagenet-val '{folder}' has {classes} class folders, ImageNet has {len(IMAGENET_CLASSNAMES)}",
            "one folder per class, named by WordNet id: DIR/n01440764/*.JPEG",
        )
