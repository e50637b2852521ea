"""Write the networks of a trained model into ONNX files, and compare the answers."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import cast

import numpy as np
import torch
from torch import nn

from nnunetv2.inference.onnx.metadata import ModelDescription, encode_metadata
from nnunetv2.inference.onnx.network import OnnxNetwork
from nnunetv2.model_sharing.onnx_description import describe_model
from nnunetv2.models.model_folder import find_folds, load_model_folder
from nnunetv2.plans.plans_manager import determine_num_input_channels
from nnunetv2.utilities.atomic_write import replacing
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plug_in_kinds import TRAINER

logger = logging.getLogger(__name__)

# Of the largest logit. onnxruntime and torch sum in another order, and differ in the sixth digit.
_TOLERANCE = 1e-3
# Before 13, attributes of many operators were no inputs yet; torch's tracing exporter ends with 20.
_OPSETS = (13, 20)


class OnnxExportError(RuntimeError):
    """A network cannot be expressed in ONNX."""


def export_to_onnx(
    model_folder: str | os.PathLike[str],
    output_folder: str | os.PathLike[str],
    *,
    folds: Iterable[int | str] | None = None,
    checkpoint_name: str = "checkpoint_final.pth",
    opset: int = 17,
) -> list[Path]:
    """Write `fold_X.onnx` for each fold of a model, and return the files.

    Each appears complete, and after onnxruntime has answered as torch does.

    Args:
        folds: Fold numbers or "all". Default: all numbered ones that have the checkpoint.
        opset: Version of ONNX's operators.

    Raises:
        FileNotFoundError: The folder is no model, or a fold is missing.
        ImportError: The packages of the extra `onnx` are not installed.
        OnnxExportError: ONNX, in this version, has no such operator, or the network decides by the values it sees.
    """
    onnx = _import_onnx()
    _require_opset(opset)
    folds = find_folds(model_folder, checkpoint_name) if folds is None and Path(model_folder).is_dir() else folds
    folds = [] if folds is None else list(folds)
    model = load_model_folder(
        model_folder,
        folds,
        checkpoint_name,
        find_trainer=recursive_find_trainer_class_by_name,
        fallback=TRAINER.base_class,
    )
    channels = determine_num_input_channels(model.plans_manager, model.configuration_manager, model.dataset_json)
    shape = (channels, *model.configuration_manager.patch_size)
    target = Path(output_folder)
    target.mkdir(parents=True, exist_ok=True)
    files = []
    for fold, parameters in zip(folds, model.parameters):
        model.network.load_state_dict(parameters)
        description = describe_model(model, model.configuration_name, fold=fold, checkpoint=checkpoint_name)
        file = target / f"fold_{fold}.onnx"
        logger.info("exporting fold %s to %s", fold, file)
        with replacing(file) as written:
            _write(model.network.eval(), shape, description, written, opset, onnx)
        files.append(file)
    return files


def _write(
    network: nn.Module, shape: tuple[int, ...], description: ModelDescription, file: Path, opset: int, onnx: ModuleType
) -> None:
    """Write a network that takes batches of tiles `(c, *patch)`, and check its answers."""
    content, decisions = _trace(network, shape, opset)
    model = onnx.load_model_from_string(content)
    onnx.helper.set_model_props(model, encode_metadata(description))
    onnx.save_model(model, str(file))
    _require_same_answers(network, OnnxNetwork(file), shape, decisions)


def _trace(network: nn.Module, shape: tuple[int, ...], opset: int) -> tuple[bytes, list[str]]:
    """Return a network as ONNX, and the places where it decided in Python, which are fixed from now on."""
    content = BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            # By tracing: torch's other exporter needs a further package, onnxscript.
            torch.onnx.export(
                network,
                (torch.zeros(1, *shape),),
                cast(str, content),
                input_names=["image"],
                output_names=["logits"],
                dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
                opset_version=opset,
                dynamo=False,
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError, ValueError, IndexError) as error:
            raise OnnxExportError(f"the network cannot be exported to ONNX: {_first_line(error)}") from error
    decisions = [
        f"{warning.filename}, line {warning.lineno}"
        for warning in caught
        if issubclass(warning.category, torch.jit.TracerWarning)
        and not Path(warning.filename).is_relative_to(Path(torch.__file__).parent)
    ]
    return content.getvalue(), decisions


def _require_same_answers(
    network: nn.Module, exported: OnnxNetwork, shape: tuple[int, ...], decisions: list[str]
) -> None:
    """Compare the answers to several inputs; once exported, a network that decides in Python goes one way only."""
    for tiles in _examples(shape):
        with torch.inference_mode():
            expected = network(torch.from_numpy(tiles)).numpy()
        try:
            found = exported(tiles)
        except Exception as error:  # each kind of failure has a class of its own, without a common one
            raise OnnxExportError(f"onnxruntime cannot run the exported network: {_first_line(error)}") from error
        difference = np.abs(found - expected).max() / max(1.0, np.abs(expected).max())
        if not difference <= _TOLERANCE:
            places = (
                f" It decides in Python by what it sees: {'; '.join(dict.fromkeys(decisions))}" if decisions else ""
            )
            raise OnnxExportError(
                f"the exported network answers otherwise than the original: logits differ by {difference:.2g} of the "
                f"largest.{places}"
            )


def _examples(shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield batches of one and two, of different means and spreads, for networks that decide by such."""
    # None is constant: instance normalization would blow rounding up to a thousandth.
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, *shape)).astype(np.float32)
    yield noise
    yield noise[:1] * 3 - 5
    yield noise[:1] / 10 + 5


def _require_opset(opset: int) -> None:
    oldest, newest = _OPSETS
    if not oldest <= opset <= newest:
        raise ValueError(f"the version of ONNX's operators (-opset) must be {oldest} to {newest}, got {opset}")


def _import_onnx() -> ModuleType:
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the package {error.name} is missing, which exports to ONNX need: pip install onnx onnxruntime"
        ) from error
    return onnx


def _first_line(error: BaseException) -> str:
    """Return the part of torch's messages that names the failure."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0]
