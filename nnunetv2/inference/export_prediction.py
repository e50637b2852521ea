"""Turn logits into a label map in the image's own space, and write it."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.case_lists import name_outputs
from nnunetv2.inference.cropped_logits import write_labels_near_predictions
from nnunetv2.inference.logit_resampling import (
    find_grid_change,
    follows_default_rules,
    write_labels,
    write_labels_and_probabilities,
)
from nnunetv2.utilities.atomic_write import replacing
from nnunetv2.utilities.device import has_torch, usable_cpu_count
from nnunetv2.utilities.json_files import read_json
from nnunetv2.utilities.restricted_pickle import save_pickle

if TYPE_CHECKING:
    import torch

    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
    from nnunetv2.plans.label_manager import LabelManager
    from nnunetv2.plans.plans_manager import ConfigurationManager, PlansManager
    from nnunetv2.preprocessed_data.datasets import nnUNetBaseDataset

    ArrayOrTensor = np.ndarray | torch.Tensor

logger = logging.getLogger(__name__)


def convert_predicted_logits_to_segmentation_with_correct_shape(
    predicted_logits: ArrayOrTensor,
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    label_manager: LabelManager,
    properties_dict: Mapping[str, Any],
    return_probabilities: bool = False,
    num_threads_torch: int = default_num_processes,
    use_cropped_logits_resampling: bool = False,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Resample logits, decide on labels, undo cropping and transposition.

    Args:
        predicted_logits: `(c, *spatial)` on the network's grid, network axis order.
        properties_dict: The properties that preprocessing recorded for the case; not changed.
        return_probabilities: Also return probabilities; this needs memory for all classes at full size.
        num_threads_torch: Threads for this case.
        use_cropped_logits_resampling: Interpolate each foreground class near where it was predicted only, see
            `cropped_logits`. Has no effect where probabilities are asked for.

    Returns:
        The label map `(*spatial)` in the image's axis order, uint8 (uint16 from 255 foreground labels on), and if
        asked for the float32 probabilities `(c, *spatial)`.
    """
    logits = _as_array(predicted_logits)
    canvas = _Canvas.for_case(plans_manager, label_manager, properties_dict)
    shape, current, new = _target_grid(plans_manager, configuration_manager, properties_dict)
    resampling_fn = configuration_manager.resampling_fn_probabilities
    threads = max(1, min(num_threads_torch, usable_cpu_count()))
    if use_cropped_logits_resampling and return_probabilities:
        logger.warning("use_cropped_logits_resampling is ignored: probabilities need all logits")
    elif use_cropped_logits_resampling:
        with torch_threads(threads):
            write_labels_near_predictions(logits, shape, current, new, resampling_fn, label_manager, canvas.cropped)
        return canvas.labels

    change = find_grid_change(resampling_fn, logits.shape[1:], shape, current, new)
    if change is None or not follows_default_rules(label_manager):
        with torch_threads(threads):
            resampled = resampling_fn(logits, shape, current, new)
            return _convert_whole(resampled, label_manager, canvas, return_probabilities)
    if not return_probabilities:
        write_labels(logits, change, label_manager, canvas.cropped, threads)
        return canvas.labels
    probabilities, inside = canvas.probabilities(len(logits), label_manager)
    write_labels_and_probabilities(logits, change, label_manager, canvas.cropped, inside, threads)
    return canvas.labels, probabilities


def export_prediction_from_logits(
    predicted_array_or_file: ArrayOrTensor,
    properties_dict: Mapping[str, Any],
    configuration_manager: ConfigurationManager,
    plans_manager: PlansManager,
    dataset_json_dict_or_file: Mapping[str, Any] | str,
    output_file_truncated: str,
    save_probabilities: bool = False,
    num_threads_torch: int = default_num_processes,
    use_cropped_logits_resampling: bool = False,
) -> None:
    """Convert logits and write the label map.

    If asked for also `.npz` (probabilities) and `.pkl` (properties).

    Each file appears complete or not at all; the label map comes last, so a case that has one is complete. An output
    named with the ending of a NIfTI file gets no second one, as ITK has it; see `name_outputs`.
    """
    dataset_json = read_dataset_json(dataset_json_dict_or_file)
    labels_path, probabilities_path = name_outputs(
        output_file_truncated, dataset_json["file_ending"], plans_manager.image_reader_writer_class
    )
    export_case(
        predicted_array_or_file,
        properties_dict,
        configuration_manager,
        plans_manager,
        dataset_json,
        labels_path,
        save_probabilities,
        num_threads_torch,
        use_cropped_logits_resampling,
        probabilities_path,
    )


def export_case(
    logits: ArrayOrTensor,
    properties: Mapping[str, Any],
    configuration_manager: ConfigurationManager,
    plans_manager: PlansManager,
    dataset_json: Mapping[str, Any],
    output: str,
    save_probabilities: bool = False,
    num_threads_torch: int = default_num_processes,
    use_cropped_logits_resampling: bool = False,
    probabilities_output: str | None = None,
) -> None:
    """Export a case as `export_prediction_from_logits` does, under exactly the name `output` plus ending.

    Args:
        probabilities_output: Path without ending for the probabilities and properties, if it is another one.
    """
    label_manager = plans_manager.get_label_manager(dataset_json)
    converted = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits,
        plans_manager,
        configuration_manager,
        label_manager,
        properties,
        return_probabilities=save_probabilities,
        num_threads_torch=num_threads_torch,
        use_cropped_logits_resampling=use_cropped_logits_resampling,
    )
    segmentation, probabilities = converted if save_probabilities else (converted, None)
    write_case(
        plans_manager.image_reader_writer_class(),
        segmentation,
        probabilities,
        properties,
        output,
        dataset_json["file_ending"],
        probabilities_output,
    )


def resample_and_save(
    predicted: ArrayOrTensor,
    target_shape: Sequence[int],
    output_file: str,
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    properties_dict: Mapping[str, Any],
    dataset_json_dict_or_file: Mapping[str, Any] | str,
    num_threads_torch: int = default_num_processes,
    dataset_class: type[nnUNetBaseDataset] | None = None,
) -> None:
    """Resample logits to a cascade's next stage and save the label map.

    It has no channel axis.

    Args:
        target_shape: Spatial shape of the preprocessed case in the next stage.
        output_file: Path without ending; `dataset_class` adds its own.
        dataset_class: How the next stage stores its cases. Default: Blosc2.
    """
    from nnunetv2.preprocessed_data.datasets import nnUNetDatasetBlosc2

    label_manager = plans_manager.get_label_manager(read_dataset_json(dataset_json_dict_or_file))
    logits, target_shape = _as_array(predicted), tuple(int(n) for n in target_shape)
    _, spacing, _ = _target_grid(plans_manager, configuration_manager, properties_dict)
    resampling_fn = configuration_manager.resampling_fn_probabilities
    labels: np.ndarray = np.zeros(target_shape, dtype=_label_dtype(label_manager))
    threads = max(1, min(num_threads_torch, usable_cpu_count()))
    change = find_grid_change(resampling_fn, logits.shape[1:], target_shape, spacing, spacing)
    if change is not None and follows_default_rules(label_manager):
        write_labels(logits, change, label_manager, labels, threads)
    else:
        with torch_threads(threads):
            resampled = resampling_fn(logits, target_shape, spacing, spacing)
            labels[...] = _as_array(label_manager.convert_logits_to_segmentation(resampled))
    _save_stage_labels(labels, output_file, configuration_manager.patch_size, dataset_class or nnUNetDatasetBlosc2)


def estimate_export_bytes(logits: np.ndarray, properties: Mapping[str, Any], with_probabilities: bool) -> int:
    """Estimate the memory of an export, logits included.

    Labels, and if asked for float32 probabilities.
    """
    voxels = prod(int(n) for n in properties.get("shape_before_cropping", logits.shape[1:]))
    return logits.nbytes + voxels * (2 + (4 * len(logits) if with_probabilities else 0))


def write_case(
    writer: BaseReaderWriter,
    segmentation: np.ndarray,
    probabilities: np.ndarray | None,
    properties: Mapping[str, Any],
    output: str | os.PathLike[str],
    ending: str,
    probabilities_output: str | None = None,
) -> None:
    """Write the files of a case, each in one step and the label map last.

    `output` is their path without ending.

    Args:
        probabilities_output: The same for the probabilities and properties, if it is another one.
    """
    output = os.fspath(output)
    if probabilities is not None:
        beside = output if probabilities_output is None else probabilities_output
        save_probabilities_file(probabilities, f"{beside}.npz")
        save_pickle(dict(properties), f"{beside}.pkl")
    write_segmentation(writer, segmentation, f"{output}{ending}", properties)


def save_probabilities_file(probabilities: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write probabilities to an `.npz` with the single key `probabilities`.

    numpy.savez_compressed offers no choice of level; level 1 takes a third of the time for files a few percent larger.
    """
    with (
        replacing(path) as written,
        zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("probabilities.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array(file, probabilities, allow_pickle=False)


def write_segmentation(
    writer: BaseReaderWriter, segmentation: np.ndarray, path: str | os.PathLike[str], properties: Mapping[str, Any]
) -> None:
    """Write a label map in one step, whatever the writer does itself.

    Side-cars it writes come along.
    """
    with replacing(path) as written:
        writer.write_seg(segmentation, str(written), properties)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch, where it is installed, use `count` threads for a while."""
    if not has_torch():
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Canvas:
    """The uncropped label map in the image's axis order, and the views of it through which it is filled."""

    def __init__(
        self, shape: Sequence[int], crop: Sequence[Sequence[int]], transpose_backward: Sequence[int], dtype: type
    ) -> None:
        self._shape, self._backward = tuple(shape), tuple(transpose_backward)
        self._forward = tuple(np.argsort(transpose_backward))
        self._crop = tuple(slice(int(start), int(stop)) for start, stop in crop)
        self.labels: np.ndarray = np.zeros([self._shape[i] for i in self._backward], dtype=dtype)
        # In network order, cropped: a view, so values written here show up in `labels`.
        self.cropped = self.labels.transpose(self._forward)[self._crop]

    @classmethod
    def for_case(
        cls, plans_manager: PlansManager, label_manager: LabelManager, properties: Mapping[str, Any]
    ) -> _Canvas:
        return cls(
            properties["shape_before_cropping"],
            properties["bbox_used_for_cropping"],
            plans_manager.transpose_backward,
            _label_dtype(label_manager),
        )

    def probabilities(self, classes: int, label_manager: LabelManager) -> tuple[np.ndarray, np.ndarray]:
        """Return probabilities `(c, *spatial)` of an all-background image, and the view of its cropped part."""
        full = np.zeros((classes, *self.labels.shape), dtype=np.float32)
        if not label_manager.has_regions:
            full[0] = 1
        view = full.transpose((0, *(axis + 1 for axis in self._forward)))
        return full, view[(slice(None), *self._crop)]

    def uncropped(self, probabilities: np.ndarray, label_manager: LabelManager) -> np.ndarray:
        """Let the label manager undo the cropping of probabilities, then bring them into the image's axis order."""
        bbox = [[part.start, part.stop] for part in self._crop]
        full = _as_array(label_manager.revert_cropping_on_probabilities(probabilities, bbox, self._shape))
        return full.transpose((0, *(axis + 1 for axis in self._backward)))


def _convert_whole(
    resampled: ArrayOrTensor, label_manager: LabelManager, canvas: _Canvas, return_probabilities: bool
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Decide on labels from logits of full size, as any resampling function and label manager allow."""
    if not return_probabilities:
        canvas.cropped[...] = _as_array(label_manager.convert_logits_to_segmentation(resampled))
        return canvas.labels
    probabilities = label_manager.apply_inference_nonlin(resampled)
    canvas.cropped[...] = _as_array(label_manager.convert_probabilities_to_segmentation(probabilities))
    return canvas.labels, canvas.uncropped(probabilities, label_manager)


def _target_grid(
    plans_manager: PlansManager, configuration_manager: ConfigurationManager, properties: Mapping[str, Any]
) -> tuple[tuple[int, ...], list[float], list[float]]:
    """Return shape and spacing of the cropped image, and the network's spacing: (shape, network's, image's)."""
    shape = tuple(int(n) for n in properties["shape_after_cropping_and_before_resampling"])
    image_spacing = [properties["spacing"][i] for i in plans_manager.transpose_forward]
    spacing = list(configuration_manager.spacing)
    if len(spacing) != len(shape):  # 2D networks see slices as they are
        spacing = [image_spacing[0], *spacing]
    return shape, spacing, image_spacing


def _save_stage_labels(
    labels: np.ndarray, output_file: str, patch_size: Sequence[int], dataset_class: type[nnUNetBaseDataset]
) -> None:
    from nnunetv2.preprocessed_data.datasets import comp_blosc2_params, nnUNetDatasetBlosc2

    if not issubclass(dataset_class, nnUNetDatasetBlosc2):
        dataset_class.save_seg(labels, output_file)
        return
    blocks, chunks = comp_blosc2_params((1, *labels.shape), tuple(patch_size), labels.itemsize)
    dataset_class.save_seg(labels, output_file, chunks_seg=chunks[1:], blocks_seg=blocks[1:])


def _label_dtype(label_manager: LabelManager) -> type:
    return np.uint8 if len(label_manager.foreground_labels) < 255 else np.uint16


def read_dataset_json(content_or_path: Mapping[str, Any] | str | os.PathLike[str]) -> Mapping[str, Any]:
    """Return a dataset.json that may be given as content or as path."""
    if isinstance(content_or_path, Mapping):
        return content_or_path
    return read_json(content_or_path)


def _as_array(values: ArrayOrTensor) -> np.ndarray:
    if isinstance(values, np.ndarray):
        return values
    values = values.detach().cpu()
    return (values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy()
