"""Turn raw cases into what networks see: transposed, cropped, normalized and resampled arrays."""
from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnunetv2.preprocessing.case_workers import process_cases
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.preprocessing.errors import InvalidInputError
from nnunetv2.preprocessing.preprocessors.foreground_locations import sample_foreground_locations
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

if TYPE_CHECKING:
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
    from nnunetv2.utilities.label_handling.label_handling import LabelManager
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

logger = logging.getLogger(__name__)


class DefaultPreprocessor:
    """The preprocessing that plans name by default; subclasses may override any of its methods.

    Args:
        verbose: Log what happens to each case.
    """

    def __init__(self, verbose: bool = True):
        self.verbose = verbose
        self.show_progress_bar = True

    def run_case_npy(self, data: np.ndarray, seg: np.ndarray | None, properties: dict, plans_manager: PlansManager,
                     configuration_manager: ConfigurationManager,
                     dataset_json: dict | str) -> tuple[np.ndarray, np.ndarray, dict]:
        """Preprocess a case that is in memory. The arrays are left unchanged.

        Args:
            data: Images `(c, x, y, z)`.
            seg: Labels `(1, x, y, z)` or None.
            properties: Needs `spacing`. What later steps need to know of the cropping is added to it.

        Returns:
            (images float32, labels int8 or int16, `properties`). Labels are -1 outside the non-zero region; without a
            segmentation they are 0 elsewhere.
        """
        _check_case(data, seg, properties)
        axes = [0, *(axis + 1 for axis in plans_manager.transpose_forward)]
        data = data.astype(np.float32).transpose(axes)
        has_seg = seg is not None
        if has_seg:
            seg = seg.transpose(axes)
        spacing = [properties["spacing"][axis] for axis in plans_manager.transpose_forward]

        properties["shape_before_cropping"] = data.shape[1:]
        data, seg, properties["bbox_used_for_cropping"] = crop_to_nonzero(data, seg)
        old_shape = properties["shape_after_cropping_and_before_resampling"] = data.shape[1:]

        wanted = list(configuration_manager.spacing)
        wanted = spacing[:len(spacing) - len(wanted)] + wanted  # 2d: slices stay as far apart as they are
        grid = (compute_new_shape(old_shape, spacing, wanted), spacing, wanted)

        # Before resampling, which blurs the border of the mask that some normalizations work within.
        data = self._normalize(data, seg, configuration_manager,
                               plans_manager.foreground_intensity_properties_per_channel)
        data = configuration_manager.resampling_fn_data(data, *grid)
        seg = configuration_manager.resampling_fn_seg(seg, *grid)
        if self.verbose:
            logger.info("shape %s with spacing %s became shape %s with spacing %s", old_shape, spacing,
                        data.shape[1:], wanted)

        if has_seg:
            label_manager = plans_manager.get_label_manager(_read_if_path(dataset_json))
            properties["class_locations"] = self._sample_foreground_locations(
                seg, _classes_to_sample(label_manager), verbose=self.verbose)
            seg = self.modify_seg_fn(seg, plans_manager, dataset_json, configuration_manager)
        return data, seg.astype(np.int16 if np.max(seg) > 127 else np.int8), properties

    def run_case(self, image_files: Sequence[str], seg_file: str | None, plans_manager: PlansManager,
                 configuration_manager: ConfigurationManager,
                 dataset_json: dict | str) -> tuple[np.ndarray, np.ndarray, dict]:
        """Read a case with the reader that the plans name, then preprocess it as `run_case_npy` does.

        Args:
            image_files: One per channel, in the order of the channels.
            seg_file: Labels, or None.
            dataset_json: The content of dataset.json, or its path.
        """
        dataset_json = _read_if_path(dataset_json)
        reader = plans_manager.image_reader_writer_class()
        data, properties = reader.read_images(image_files)
        seg = None
        if seg_file is not None:
            seg, _ = reader.read_seg(seg_file)
            if seg.shape[1:] != data.shape[1:]:
                raise InvalidInputError(f"{seg_file} has shape {seg.shape[1:]}, but {image_files[0]} has "
                                        f"{data.shape[1:]}; run nnUNetv2_plan_and_preprocess with "
                                        "--verify_dataset_integrity to find all such cases")
        if self.verbose:
            logger.info("read %s", seg_file or image_files[0])
        return self.run_case_npy(data, seg, properties, plans_manager, configuration_manager, dataset_json)

    def run_case_save(self, output_filename_truncated: str, image_files: Sequence[str], seg_file: str,
                      plans_manager: PlansManager, configuration_manager: ConfigurationManager,
                      dataset_json: dict | str) -> None:
        """Preprocess a case and write it to `{output_filename_truncated}.b2nd`, `_seg.b2nd` and `.pkl`."""
        from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

        data, seg, properties = self.run_case(image_files, seg_file, plans_manager, configuration_manager,
                                              dataset_json)
        data, seg = data.astype(np.float32, copy=False), seg.astype(np.int16, copy=False)
        if not np.isfinite(data.sum(dtype=np.float64)):
            logger.warning("%s: the preprocessed image holds values that are not finite numbers; does %s?",
                           Path(output_filename_truncated).name, image_files[0])
        blocks, chunks = comp_blosc2_params(data.shape, configuration_manager.patch_size, data.itemsize)
        blocks_seg, chunks_seg = comp_blosc2_params(seg.shape, configuration_manager.patch_size, seg.itemsize)
        nnUNetDatasetBlosc2.save_case(data, seg, properties, output_filename_truncated, chunks=chunks, blocks=blocks,
                                      chunks_seg=chunks_seg, blocks_seg=blocks_seg)

    @staticmethod
    def _sample_foreground_locations(seg: np.ndarray, classes_or_regions: Sequence[int | Sequence[int]],
                                     seed: int = 1234, verbose: bool = False, min_num_samples: int = 10000,
                                     min_percent_coverage: float = 0.01) -> dict:
        """Draw voxels of each class; see `sample_foreground_locations`."""
        locations = sample_foreground_locations(seg, classes_or_regions, seed=seed, min_num_samples=min_num_samples,
                                                min_percent_coverage=min_percent_coverage)
        if verbose:
            logger.info("voxels drawn per class: %s", {key: len(drawn) for key, drawn in locations.items()})
        return locations

    def _normalize(self, data: np.ndarray, seg: np.ndarray, configuration_manager: ConfigurationManager,
                   foreground_intensity_properties_per_channel: Mapping[str, dict]) -> np.ndarray:
        """Normalize each channel of `data` as the configuration says; overwrites and returns it."""
        schemes = configuration_manager.normalization_schemes
        if len(data) > len(schemes):
            raise InvalidInputError(f"the image has {len(data)} channels, the plans normalize {len(schemes)}")
        for channel in range(len(data)):
            statistics = foreground_intensity_properties_per_channel.get(str(channel))
            if statistics is None:
                raise InvalidInputError("the plans lack foreground_intensity_properties_per_channel for channel "
                                        f"{channel}")
            normalizer = _find_normalization(schemes[channel])(
                use_mask_for_norm=configuration_manager.use_mask_for_norm[channel], intensityproperties=statistics)
            data[channel] = normalizer.run(data[channel], seg[0])
        return data

    def run(self, dataset_name_or_id: int | str, configuration_name: str, plans_identifier: str,
            num_processes: int) -> None:
        """Preprocess all training cases of a dataset for one configuration.

        What the output folder held before is deleted. If a case fails, the others that are done stay, each complete.

        Args:
            num_processes: Worker processes; 1 works in this process.

        Raises:
            InvalidInputError: The dataset or its plans do not exist.
            CaseFailedError: A case failed, or its worker died; the message names the case.
        """
        from tqdm import tqdm

        from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
        from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
        from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

        dataset_name = maybe_convert_to_dataset_name(dataset_name_or_id)
        raw_folder = Path(nnUNet_raw.require()) / dataset_name
        preprocessed_folder = Path(nnUNet_preprocessed.require()) / dataset_name
        plans_file = preprocessed_folder / f"{plans_identifier}.json"
        _require(raw_folder.is_dir(), f"there is no raw dataset {raw_folder}")
        _require(plans_file.is_file(), f"there is no plans file {plans_file}; run nnUNetv2_plan_experiment first")

        plans_manager = PlansManager(str(plans_file))
        configuration_manager = plans_manager.get_configuration(configuration_name)
        dataset_json = _read_planned_dataset_json(preprocessed_folder, raw_folder)
        if self.verbose:
            logger.info("preprocessing configuration %s: %s", configuration_name, configuration_manager)

        files = get_filenames_of_train_images_and_targets(str(raw_folder), dataset_json)
        _require(len(files) > 0, f"the dataset {raw_folder} has no training cases")
        output_folder = _make_empty_folder(preprocessed_folder, configuration_manager.data_identifier)
        cases = {case: (str(output_folder / case), case_files["images"], case_files["label"], plans_manager,
                        configuration_manager, dataset_json) for case, case_files in files.items()}
        done = process_cases(self.run_case_save, cases, int(num_processes))
        try:
            for _ in tqdm(done, desc="Preprocessing cases", total=len(cases), disable=not self.show_progress_bar):
                pass
        finally:
            done.close()  # stops workers before what they were writing is removed
            for unfinished in output_folder.glob(".partial-*"):
                shutil.rmtree(unfinished, ignore_errors=True)

    def modify_seg_fn(self, seg: np.ndarray, plans_manager: PlansManager, dataset_json: dict,
                      configuration_manager: ConfigurationManager) -> np.ndarray:
        """Return the labels to train on. Override to change them after resampling, for instance to skeletonize."""
        return seg


@cache
def _find_normalization(name: str) -> type[ImageNormalization]:
    from nnunetv2.preprocessing import normalization
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = Path(normalization.__file__).parent
    found = recursive_find_python_class(str(folder), name, normalization.__name__)
    if found is None:
        raise RuntimeError(f"the plans ask for the normalization {name}, which no module in {folder} defines")
    return found


def _check_case(data: np.ndarray, seg: np.ndarray | None, properties: dict) -> None:
    if data.ndim != 4 or len(properties["spacing"]) != 3:
        raise InvalidInputError(f"expected an image (c, x, y, z) and 3 spacings, got shape {data.shape} and spacing "
                                f"{properties['spacing']}")
    if seg is not None and seg.shape[1:] != data.shape[1:]:
        raise InvalidInputError(f"image and segmentation differ in shape: {data.shape[1:]} and {seg.shape[1:]}")


def _classes_to_sample(label_manager: LabelManager) -> list:
    """Return what training may centre patches on: foreground and, with sparse labels, all that is annotated."""
    if label_manager.has_regions:
        classes = list(label_manager.foreground_regions)
    else:
        classes = list(label_manager.foreground_labels)
    if label_manager.has_ignore_label:
        classes.append([-1, *label_manager.all_labels])
    return classes


def _read_if_path(dataset_json: dict | str | os.PathLike[str]) -> dict:
    if isinstance(dataset_json, (str, os.PathLike)):
        return json.loads(Path(dataset_json).read_text(encoding="utf-8"))
    return dataset_json


def _read_planned_dataset_json(preprocessed_folder: Path, raw_folder: Path) -> dict:
    """Return dataset.json as it was when the dataset was planned."""
    planned_file = preprocessed_folder / "dataset.json"
    _require(planned_file.is_file(), f"there is no {planned_file}; run nnUNetv2_plan_experiment first")
    planned, raw_file = _read_if_path(planned_file), raw_folder / "dataset.json"
    if raw_file.is_file() and _read_if_path(raw_file) != planned:
        logger.warning("%s was changed after planning; preprocessing uses the older copy %s. Plan again to use the "
                       "change", raw_file, planned_file)
    return planned


def _make_empty_folder(parent: Path, name: str) -> Path:
    # The name comes from the plans, maybe from elsewhere, and what it names is deleted.
    _require(Path(name).name == name and name not in (".", ".."),
             f"the plans' data_identifier must be the name of a folder, got {name!r}")
    folder = parent / name
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidInputError(message)
