"""Start a training from the weights of another one, and log each tensor's origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.training.options import BY_NAME
from nnunetv2.utilities.json_files import DATASET, read_json

if TYPE_CHECKING:
    from nnunetv2.models.weight_transfer import ChannelsAndClasses, Transfer
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


def start_from_pretrained_weights(trainer: nnUNetTrainer, file: str, *, heads: str | None = None) -> None:
    """Fill a trainer's network from a checkpoint; log each tensor's origin.

    Checkpoints that release 2.8.1 loads are loaded as there, unless `heads` asks for more.

    Args:
        file: A checkpoint of this package or of the release.
        heads: See `TrainingOptions.pretrained_heads`.

    Raises:
        ValueError: A tensor of the network has no counterpart in the file, and no rule for its initial values.
    """
    from nnunetv2.models.networks import adapt_weight_names, bare_network
    from nnunetv2.models.weight_transfer import (
        UnfitWeightsError,
        apply_transfer_,
        fits_outside_heads,
        name_channels_and_classes,
        plan_transfer,
    )
    from nnunetv2.run import load_pretrained_weights as strict

    network = bare_network(trainer.network)
    checkpoint = strict.read_pretrained_checkpoint(file)
    weights = adapt_weight_names(checkpoint["network_weights"], network.state_dict())
    new = name_channels_and_classes(trainer.dataset_json, is_cascaded=trainer.is_cascaded)
    old = _channels_and_classes_of(checkpoint, Path(file))
    fits = fits_outside_heads(network.state_dict(), weights)
    by_name = heads == BY_NAME or (heads is None and not fits)
    try:
        transfer = plan_transfer(network, weights, old=old, new=new, keeps_classes=by_name)
    except UnfitWeightsError as error:
        raise ValueError(
            f"pretrained weights {file}: {error}. Channels, classes and numbers of stages or blocks may differ, but "
            "what both networks have must be alike: train with the plans that the weights were trained with"
        ) from error
    if fits and not by_name:
        strict.copy_pretrained_weights_(network, weights, file)
    else:
        apply_transfer_(network, transfer)
    if trainer.local_rank == 0:
        for line in describe_transfer(transfer, file, old=old, new=new):
            trainer.print_to_log_file(line, add_timestamp=False)


def describe_transfer(transfer: Transfer, file: str, *, old: ChannelsAndClasses, new: ChannelsAndClasses) -> list[str]:
    """Return lines that say which tensors were taken, adapted, begin anew, and were left out."""
    lines = [
        f"Pretrained weights {file}: {len(transfer.taken)} tensors taken, {len(transfer.adapted)} adapted, "
        f"{len(transfer.new)} new, {len(transfer.left_out)} of the file left out"
    ]
    if len(old.channels) == len(new.channels) and old.channels != new.channels:
        lines.append(
            f"NOTE: its channels are {', '.join(map(repr, old.channels))}, those here "
            f"{', '.join(map(repr, new.channels))}; as many, so they are taken in this order"
        )
    lines += [f"  taken     {name}" for name in transfer.taken]
    lines += [f"  adapted   {name}: {how}" for name, how in transfer.adapted.items()]
    lines += [f"  new       {name}: {why}" for name, why in transfer.new.items()]
    return [*lines, *(f"  left out  {name}" for name in transfer.left_out)]


def _channels_and_classes_of(checkpoint: Mapping[str, Any], file: Path) -> ChannelsAndClasses:
    """Return a checkpoint's channels and classes, by its or its model's dataset.json."""
    from nnunetv2.models.weight_transfer import UNKNOWN, name_channels_and_classes

    arguments = checkpoint.get("init_args")
    arguments = arguments if isinstance(arguments, Mapping) else {}
    dataset_json, place = arguments.get("dataset_json"), str(file)
    if not isinstance(dataset_json, Mapping):
        found = next((path for path in _description_files(file, "dataset.json") if path.is_file()), None)
        if found is None:
            return UNKNOWN
        dataset_json, place = read_json(found, required=DATASET), str(found)
    try:
        return name_channels_and_classes(dataset_json, is_cascaded=_is_cascaded(arguments))
    except (AssertionError, RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{place}: the dataset.json of the pretrained weights makes no sense: {error}") from error


def _description_files(file: Path, name: str) -> Sequence[Path]:
    """Return where a file that describes a model lies: beside the folds, or beside the checkpoint."""
    folder = file.absolute().parent
    return folder.parent / name, folder / name


def _is_cascaded(arguments: Mapping[str, Any]) -> bool:
    """Tell whether a checkpoint's configuration has a previous stage, by the plans that it holds."""
    from nnunetv2.plans.plans_manager import PlansManager

    plans, configuration = arguments.get("plans"), arguments.get("configuration")
    if not isinstance(plans, Mapping) or not isinstance(configuration, str):
        return False
    return PlansManager(dict(plans)).get_configuration(configuration).previous_stage_name is not None
