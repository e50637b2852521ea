"""Turn raw cases into network inputs: transposed, cropped, normalized and resampled arrays."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np

from nnunetv2.errors import InvalidInputError
from nnunetv2.plans.partial_labels import common_numbers, renumber
from nnunetv2.preprocessed_data.journal import PreprocessingJournal
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.preprocessing.finite_values import require_finite
from nnunetv2.preprocessing.normalization.lookup import find_normalization_class
from nnunetv2.preprocessing.odd_sizes import describe_grids, require_memory, warn_of_odd_size
from nnunetv2.preprocessing.preprocessors.dataset_run import DatasetRun, digest_ingredients, find_run, read_if_path
from nnunetv2.preprocessing.preprocessors.foreground_locations import as_small_integers, sample_foreground_locations
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.preprocessing.worker_count import bytes_to_preprocess, bytes_to_read, choose_num_processes
from nnunetv2.utilities.case_workers import process_cases
from nnunetv2.utilities.progress import follow

if TYPE_CHECKING:
    from nnunetv2.plans.label_manager import LabelManager
    from nnunetv2.plans.plans_manager import ConfigurationManager, PlansManager

logger = logging.getLogger(__name__)

# Of LZ4HC. Level 5 makes files 3 to 9 % smaller than level 1, but takes longer than all other steps together.
_COMPRESSION_LEVEL = 1
_OUR_RESAMPLING = {
    f"nnunetv2.preprocessing.resampling.{module}"
    for module in ("default_resampling", "no_resampling", "resample_torch")
}


class DefaultPreprocessor:
    """The preprocessing that plans name by default; subclasses may override any of its methods.

    Args:
        verbose: Log the steps of each case.
    """

    def __init__(self, verbose: bool = True):
        self.verbose = verbose
        self.show_progress_bar = True

    def run_case_npy(
        self,
        data: np.ndarray,
        seg: np.ndarray | None,
        properties: dict,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        dataset_json: dict | str,
    ) -> tuple[np.ndarray, np.ndarray, dict]:
        """Preprocess a case that is in memory. The arrays are left unchanged.

        Args:
            data: Images `(c, x, y, z)`.
            seg: Labels `(1, x, y, z)` or None.
            properties: Needs `spacing`. The cropping is added to it, for later steps.

        Returns:
            (images float32, labels int8 or int16, `properties`). Labels are -1 outside the non-zero region; without a
            segmentation they are 0 elsewhere.
        """
        _check_case(data, seg, properties)
        has_seg = seg is not None
        seg_dtype = seg.dtype if has_seg else np.dtype(np.int8)
        if has_seg and _takes_small_integers(configuration_manager.resampling_fn_seg):
            seg = as_small_integers(seg)
        data, seg, spacing = self._crop(data, seg, properties, plans_manager.transpose_forward)
        require_finite(data)
        old_shape = data.shape[1:]
        wanted = list(configuration_manager.spacing)
        wanted = spacing[: len(spacing) - len(wanted)] + wanted  # 2d: slices stay as far apart as they are
        grid = (compute_new_shape(old_shape, spacing, wanted), spacing, wanted)
        require_memory(len(data), old_shape, *grid)

        # Before resampling, which blurs the border of the mask that some normalizations work within.
        data = self._normalize(
            data, seg, configuration_manager, plans_manager.foreground_intensity_properties_per_channel
        )
        try:
            data = configuration_manager.resampling_fn_data(data, *grid)
            seg = configuration_manager.resampling_fn_seg(seg, *grid)
        except MemoryError as error:
            raise MemoryError(f"{error} ({describe_grids(old_shape, *grid)})") from error
        if self.verbose:
            logger.info(
                "shape %s with spacing %s became shape %s with spacing %s", old_shape, spacing, data.shape[1:], wanted
            )

        if has_seg:
            label_manager = plans_manager.get_label_manager(read_if_path(dataset_json))
            properties["class_locations"] = self._sample_foreground_locations(
                seg, _classes_to_sample(label_manager), verbose=self.verbose
            )
            if type(self).modify_seg_fn is not DefaultPreprocessor.modify_seg_fn:
                seg = seg.astype(seg_dtype, copy=False)  # users' code may write any label
            seg = self.modify_seg_fn(seg, plans_manager, dataset_json, configuration_manager)
        return data, seg.astype(np.int16 if np.max(seg) > 127 else np.int8, copy=False), properties

    @staticmethod
    def _crop(
        data: np.ndarray, seg: np.ndarray | None, properties: dict, transpose: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, list[float]]:
        """Transpose and crop a case, and note the cropping in `properties`.

        Returns:
            (images as a new float32 array, new labels, spacing of the transposed axes).
        """
        axes = [0, *(axis + 1 for axis in transpose)]
        data = data.transpose(axes)
        properties["shape_before_cropping"] = data.shape[1:]
        data, seg, bbox = crop_to_nonzero(data, None if seg is None else seg.transpose(axes))
        properties["bbox_used_for_cropping"] = bbox
        properties["shape_after_cropping_and_before_resampling"] = data.shape[1:]
        # C order: a copy that keeps the order of a transposed array in memory would slow down later steps
        return data.astype(np.float32, order="C"), seg, [properties["spacing"][axis] for axis in transpose]

    def run_case(
        self,
        image_files: Sequence[str],
        seg_file: str | None,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        dataset_json: dict | str,
    ) -> tuple[np.ndarray, np.ndarray, dict]:
        """Read a case with the plans' reader, then preprocess it as `run_case_npy` does.

        Args:
            image_files: One per channel, in the order of the channels.
            seg_file: Labels, or None.
            dataset_json: The content of dataset.json, or its path. If it says that label files have other values than
                the labels (see `plans/partial_labels.py`), they are mapped.
        """
        dataset_json = read_if_path(dataset_json)
        reader = plans_manager.image_reader_writer_class()
        data, properties = reader.read_images(image_files)
        seg = None if seg_file is None else reader.read_seg(seg_file)[0]
        if seg is not None and seg.shape[1:] != data.shape[1:]:
            raise InvalidInputError(
                f"{seg_file} has shape {seg.shape[1:]}, but {image_files[0]} has "
                f"{data.shape[1:]}; run nnUNetv2_plan_and_preprocess with "
                "--verify_dataset_integrity to find all such cases"
            )
        if seg is not None:
            try:
                seg = renumber(seg, common_numbers(dataset_json))
            except InvalidInputError as error:
                raise InvalidInputError(f"{seg_file}: {error}") from error
        if self.verbose:
            logger.info("read %s", seg_file or image_files[0])
        # Popped, so that run_case_npy holds the only reference and can let go of the voxels once they are cropped.
        arrays = [seg, data]
        del seg, data
        try:
            result = self.run_case_npy(
                arrays.pop(), arrays.pop(), properties, plans_manager, configuration_manager, dataset_json
            )
        except InvalidInputError as error:
            raise InvalidInputError(f"{image_files[0]}: {error}") from error
        except MemoryError as error:
            raise MemoryError(f"{image_files[0]}: {error}") from error
        warn_of_odd_size(str(image_files[0]), properties, plans_manager, configuration_manager)
        return result

    def run_case_save(
        self,
        output_filename_truncated: str,
        image_files: Sequence[str],
        seg_file: str,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        dataset_json: dict | str,
    ) -> None:
        """Preprocess a case and write it to `{output_filename_truncated}.b2nd`, `_seg.b2nd` and `.pkl`."""
        from nnunetv2.preprocessed_data.datasets import comp_blosc2_params, nnUNetDatasetBlosc2

        data, seg, properties = self.run_case(image_files, seg_file, plans_manager, configuration_manager, dataset_json)
        data, seg = data.astype(np.float32, copy=False), seg.astype(np.int16, copy=False)
        blocks, chunks = comp_blosc2_params(data.shape, configuration_manager.patch_size, data.itemsize)
        blocks_seg, chunks_seg = comp_blosc2_params(seg.shape, configuration_manager.patch_size, seg.itemsize)
        nnUNetDatasetBlosc2.save_case(
            data,
            seg,
            properties,
            output_filename_truncated,
            chunks=chunks,
            blocks=blocks,
            chunks_seg=chunks_seg,
            blocks_seg=blocks_seg,
            clevel=_COMPRESSION_LEVEL,
        )

    @staticmethod
    def _sample_foreground_locations(
        seg: np.ndarray,
        classes_or_regions: Sequence[int | Sequence[int]],
        seed: int = 1234,
        verbose: bool = False,
        min_num_samples: int = 10000,
        min_percent_coverage: float = 0.01,
    ) -> dict:
        """Draw voxels of each class; see `sample_foreground_locations`."""
        locations = sample_foreground_locations(
            seg,
            classes_or_regions,
            seed=seed,
            min_num_samples=min_num_samples,
            min_percent_coverage=min_percent_coverage,
        )
        if verbose:
            logger.info("voxels drawn per class: %s", {key: len(drawn) for key, drawn in locations.items()})
        return locations

    def _normalize(
        self,
        data: np.ndarray,
        seg: np.ndarray,
        configuration_manager: ConfigurationManager,
        foreground_intensity_properties_per_channel: Mapping[str, dict],
    ) -> np.ndarray:
        """Normalize each channel of `data` as the configuration says; overwrites and returns it."""
        schemes = configuration_manager.normalization_schemes
        if len(data) > len(schemes):
            raise InvalidInputError(f"the image has {len(data)} channels, the plans normalize {len(schemes)}")
        for channel in range(len(data)):
            statistics = foreground_intensity_properties_per_channel.get(str(channel))
            if statistics is None:
                raise InvalidInputError(
                    f"the plans lack foreground_intensity_properties_per_channel for channel {channel}"
                )
            normalizer = find_normalization_class(schemes[channel])(
                use_mask_for_norm=configuration_manager.use_mask_for_norm[channel], intensityproperties=statistics
            )
            voxels = data[channel]
            normalized = normalizer.run(voxels, seg[0])
            if normalized is not voxels:  # ours overwrite their argument
                data[channel] = normalized
        return data

    def run(
        self,
        dataset_name_or_id: int | str,
        configuration_name: str,
        plans_identifier: str,
        num_processes: int | None = None,
    ) -> None:
        """Preprocess all training cases of a dataset for one configuration.

        Cases that an earlier run has finished stay, if plans, dataset.json, code and the case's files are the same
        still; everything else in the output folder is removed. Where there is no such folder, a run does all cases.
        If a case fails, the others that are done stay, each complete.

        Args:
            num_processes: Worker processes; 1 works in this process. None: as many as cores and free memory allow.

        Raises:
            InvalidInputError: The dataset or its plans do not exist.
            FolderInUseError: Another process preprocesses into the same folder.
            CaseFailedError: A case failed, or its worker died; the message names the case.
        """
        run = find_run(dataset_name_or_id, configuration_name, plans_identifier)
        if common_numbers(run.dataset_json) and type(self).run_case is not DefaultPreprocessor.run_case:
            raise InvalidInputError(
                f"{type(self).__name__} reads cases itself, and this site's label files have other values than the "
                "labels of all sites: number them alike in the raw data, or plan with another preprocessor"
            )
        if self.verbose:
            logger.info("preprocessing configuration %s: %s", configuration_name, run.configuration_manager)
        with PreprocessingJournal(run.output_folder, digest_ingredients(run, self)) as finished:
            open_cases = finished.remaining(run.sources)
            if len(open_cases) < len(run.files):
                logger.info(
                    "%s: %d of %d cases are finished already, from an earlier run",
                    run.output_folder.name,
                    len(run.files) - len(open_cases),
                    len(run.files),
                )
            arguments = {
                case: (
                    str(run.output_folder / case),
                    run.files[case]["images"],
                    run.files[case]["label"],
                    run.plans_manager,
                    run.configuration_manager,
                    run.dataset_json,
                )
                for case in open_cases
            }
            if num_processes is None:
                num_processes = _choose_num_processes(run, len(open_cases))
            with closing(process_cases(self.run_case_save, arguments, int(num_processes))) as done:
                for case, _ in follow(
                    done,
                    total=len(open_cases),
                    description="Preprocessing cases",
                    show_bar=self.show_progress_bar,
                    log_cases=self.verbose,
                ):
                    finished.add(case, run.sources_of(case))

    def modify_seg_fn(
        self,
        seg: np.ndarray,
        plans_manager: PlansManager,
        dataset_json: dict,
        configuration_manager: ConfigurationManager,
    ) -> np.ndarray:
        """Return the labels to train on.

        Override to change them after resampling, for instance to skeletonize.
        """
        return seg


def _check_case(data: np.ndarray, seg: np.ndarray | None, properties: dict) -> None:
    if data.ndim != 4 or len(properties["spacing"]) != 3:
        raise InvalidInputError(
            f"expected an image (c, x, y, z) and 3 spacings, got shape {data.shape} and spacing {properties['spacing']}"
        )
    if seg is not None and seg.shape[1:] != data.shape[1:]:
        raise InvalidInputError(f"image and segmentation differ in shape: {data.shape[1:]} and {seg.shape[1:]}")


def _classes_to_sample(label_manager: LabelManager) -> list:
    """Return the classes to centre patches on.

    With sparse labels, all annotated classes together are one more.
    """
    if label_manager.has_regions:
        classes = list(label_manager.foreground_regions)
    else:
        classes = list(label_manager.foreground_labels)
    if label_manager.has_ignore_label:
        classes.append([-1, *label_manager.all_labels])
    return classes


def _choose_num_processes(run: DatasetRun, num_cases: int) -> int:
    fingerprint = run.fingerprint
    if fingerprint is None:
        case_bytes = bytes_to_read(run.sources.values()) * 2
    else:
        case_bytes = bytes_to_preprocess(
            fingerprint,
            spacing=run.configuration_manager.spacing,
            transpose_forward=run.plans_manager.transpose_forward,
            num_channels=len(run.configuration_manager.normalization_schemes),
        )
    return choose_num_processes(case_bytes, max(1, num_cases))


def _takes_small_integers(resampling_function: Callable) -> bool:
    """Tell whether labels may come as int8. Functions of users expect the float32 that readers return."""
    return getattr(getattr(resampling_function, "func", None), "__module__", None) in _OUR_RESAMPLING
