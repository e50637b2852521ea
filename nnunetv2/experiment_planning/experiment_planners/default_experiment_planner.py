"""Turn the fingerprint of a dataset into plans.

Spacing, patch, batch and network of each configuration.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.errors import InvalidInputError
from nnunetv2.experiment_planning.experiment_planners.architecture import class_to_build, describe_unet, load_class
from nnunetv2.experiment_planning.experiment_planners.case_geometry import geometry_of
from nnunetv2.experiment_planning.experiment_planners.channel_normalization import choose_normalization
from nnunetv2.experiment_planning.experiment_planners.geometry import (
    coarsen,
    coarsest_axis_first,
    initial_patch_size,
    median_resampled_shape,
    median_target_spacing,
)
from nnunetv2.experiment_planning.experiment_planners.hints import describe_flat_axes, find_too_small
from nnunetv2.experiment_planning.experiment_planners.inputs import (
    checked_spacing,
    count_training_cases,
    read_fingerprint,
)
from nnunetv2.experiment_planning.experiment_planners.network_topology import Topology, get_pool_and_conv_props
from nnunetv2.experiment_planning.experiment_planners.plans_file import write_plans
from nnunetv2.experiment_planning.experiment_planners.splits import adopt_splits
from nnunetv2.experiment_planning.experiment_planners.vram_proxy import PLAIN_UNET, count_feature_map_values
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.preprocessed_data.bad_cases import list_training_cases
from nnunetv2.utilities.atomic_write import copy_atomically, save_json_atomically
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.json_files import read_json

logger = logging.getLogger(__name__)

NO_LIMIT = 999999


class ExperimentPlanner:
    """Plan a dataset for networks of the type PlainConvUNet.

    Memory is not measured: the number of values in all feature maps stands for it (`vram_proxy`), compared with a
    number that is known to fit `UNet_reference_val_corresp_GB`. Subclasses change attributes in their constructor,
    which keeps this signature, or override the methods that decide one thing each.
    """

    encoder_depth_argument = "n_conv_per_stage"
    """Name under which `UNet_class` takes the number of convolutions or blocks of each encoder stage."""

    _unet_class: type | str = PLAIN_UNET

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetPlans",
        overwrite_target_spacing: Sequence[float] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        """Read the files that planning needs.

        Args:
            overwrite_target_spacing: Three floats in array order before transposition, used instead of the median.
            suppress_transpose: Keep the axis order of the images.

        Raises:
            RuntimeError: There is no fingerprint yet.
            InvalidInputError: `overwrite_target_spacing` is no three positive floats.
        """
        self.dataset_name = maybe_convert_to_dataset_name(dataset_name_or_id)
        self.suppress_transpose = suppress_transpose
        self.raw_dataset_folder = str(Path(nnUNet_raw) / self.dataset_name)
        self.preprocessed_dataset_folder = str(Path(nnUNet_preprocessed) / self.dataset_name)
        self.dataset_json = read_json(Path(self.raw_dataset_folder) / "dataset.json")
        self.dataset = list_training_cases(
            self.raw_dataset_folder, Path(self.preprocessed_dataset_folder), self.dataset_json
        )
        self.dataset_fingerprint = read_fingerprint(Path(self.preprocessed_dataset_folder))
        self.num_training_cases: int = count_training_cases(
            self.dataset_json, self.dataset_fingerprint, self.dataset_name, Path(self.preprocessed_dataset_folder)
        )
        if "channel_names" not in self.dataset_json:
            logger.warning(
                "%s: dataset.json has the key 'modality', which is called 'channel_names' by now", self.dataset_name
            )
        adopt_splits(Path(self.raw_dataset_folder), Path(self.preprocessed_dataset_folder))

        self.anisotropy_threshold = ANISO_THRESHOLD
        self.UNet_base_num_features = 32
        self.UNet_max_features_2d, self.UNet_max_features_3d = 512, 320
        self.UNet_blocks_per_stage_encoder: tuple[int, ...] = (2,) * 14
        self.UNet_blocks_per_stage_decoder: tuple[int, ...] = (2,) * 13
        self.UNet_featuremap_min_edge_length = 4
        # The memory of UNet_reference_val_corresp_GB is known to hold so many values at these batch sizes.
        self.UNet_reference_val_3d, self.UNet_reference_val_2d = 560000000, 85000000
        self.UNet_reference_val_corresp_GB = 8
        self.UNet_reference_val_corresp_bs_2d, self.UNet_reference_val_corresp_bs_3d = 12, 2
        self.UNet_reference_com_nfeatures = 32
        self.UNet_vram_target_GB = gpu_memory_target_in_gb
        self.UNet_min_batch_size = 2
        self.max_dataset_covered = 0.05  # a batch holds at most this share of all voxels of the dataset
        # A patch that covers less of the median image than this calls for a configuration of lower resolution.
        self.lowres_creation_threshold = 0.25

        self.preprocessor_name = preprocessor_name
        self.plans_identifier = plans_name
        self.overwrite_target_spacing = checked_spacing(overwrite_target_spacing)
        self.plans: dict[str, Any] | None = None

    @property
    def UNet_class(self) -> type:
        """The network planned for.

        Assign a class, or its dotted path, which spares the import of torch.
        """
        return load_class(self._unet_class)

    @UNet_class.setter
    def UNet_class(self, class_or_path: type | str) -> None:
        self._unet_class = class_or_path

    # ---------------------------------------------------------------- decisions that subclasses may take otherwise

    def determine_reader_writer(self) -> type:
        """Return the class that reads the images, tried on the first of them."""
        from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

        example = next(iter(self.dataset.values()))["images"][0]
        return determine_reader_writer_from_dataset_json(self.dataset_json, example)

    @staticmethod
    def static_estimate_VRAM_usage(
        patch_size: Sequence[int],
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict,
        arch_kwargs_req_import: Sequence[str],
    ) -> int:
        """Return the number of values in one sample's feature maps.

        It stands for memory.
        """
        return count_feature_map_values(
            patch_size, input_channels, output_channels, arch_class_name, arch_kwargs, arch_kwargs_req_import
        )

    def exceeds_memory(self, estimate: float, reference: float, reference_batch_size: int) -> bool:
        """Return whether two samples need more memory than a reference batch."""
        return estimate / reference_batch_size * 2 > reference

    def determine_resampling(self, *args: Any, **kwargs: Any) -> tuple[Any, dict, Any, dict]:
        """Return function and keywords for images, then for labels."""
        from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

        images = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
        labels = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}
        return resample_data_or_seg_to_shape, images, resample_data_or_seg_to_shape, labels

    def determine_segmentation_softmax_export_fn(self, *args: Any, **kwargs: Any) -> tuple[Any, dict]:
        """Return function and keywords that resample the network's output."""
        from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

        return resample_data_or_seg_to_shape, {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}

    def determine_fullres_target_spacing(self) -> np.ndarray:
        """Return the spacing of 3d_fullres in array order, before transposition."""
        if self.overwrite_target_spacing is not None:
            return np.array(self.overwrite_target_spacing)
        return median_target_spacing(geometry_of(self.dataset_fingerprint), self.anisotropy_threshold)

    def determine_normalization_scheme_and_whether_mask_is_used_for_norm(self) -> tuple[list[str], list[bool]]:
        """Return per channel the normalization, and whether it leaves the border at 0.

        Channels in the order of dataset.json.
        """
        chosen = choose_normalization(
            self._channel_names().values(), self.dataset_fingerprint["median_relative_size_after_cropping"]
        )
        return [scheme for scheme, _ in chosen], [use_mask for _, use_mask in chosen]

    def determine_transpose(self) -> tuple[list[int], list[int]]:
        """Return the order of axes that puts the coarsest first, and the way back."""
        if self.suppress_transpose:
            return [0, 1, 2], [0, 1, 2]
        return coarsest_axis_first(self.determine_fullres_target_spacing())

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Name the folder of preprocessed data of a configuration."""
        return f"{self.plans_identifier}_{configuration_name}"

    # ---------------------------------------------------------------- one configuration

    def get_plans_for_configuration(
        self,
        spacing: Sequence[float] | np.ndarray,
        median_shape: Sequence[float] | np.ndarray,
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict[str, int],
    ) -> dict[str, Any]:
        """Find patch, network and batch size for images of this spacing.

        Args:
            spacing: Per axis, transposed; two entries plan a 2d configuration.
            median_shape: Per axis, transposed, at this spacing.
            approximate_n_voxels_dataset: Bounds the batch size, so that a small dataset is not seen whole in a step.
            _cache: Estimates of memory of networks seen before, shared by the configurations of a planning.
        """
        dim = len(spacing)
        if dim not in (2, 3) or not all(s > 0 for s in spacing):
            raise RuntimeError(f"can plan for 2 or 3 positive spacings, got {spacing}")
        is_2d = dim == 2
        reference = self.UNet_reference_val_2d if is_2d else self.UNet_reference_val_3d
        reference *= self.UNet_vram_target_GB / self.UNet_reference_val_corresp_GB
        reference_batch = self.UNet_reference_val_corresp_bs_2d if is_2d else self.UNet_reference_val_corresp_bs_3d

        topology = self._design(spacing, initial_patch_size(spacing, median_shape))
        estimate = self._estimate(topology, _cache)
        while self.exceeds_memory(estimate, reference, reference_batch):
            topology = self._shrink(topology, spacing, median_shape)
            estimate = self._estimate(topology, _cache)

        affordable = round(reference / estimate * reference_batch)
        sensible = round(approximate_n_voxels_dataset * self.max_dataset_covered / np.prod(topology.patch_size))
        batch_size = max(min(affordable, sensible), self.UNet_min_batch_size)
        return self._describe_configuration(data_identifier, batch_size, topology, spacing, median_shape)

    def _design(self, spacing: Sequence[float] | np.ndarray, patch_size: Sequence[float] | np.ndarray) -> Topology:
        return get_pool_and_conv_props(spacing, patch_size, self.UNet_featuremap_min_edge_length, NO_LIMIT)

    def _shrink(
        self, topology: Topology, spacing: Sequence[float] | np.ndarray, median_shape: Sequence[float] | np.ndarray
    ) -> Topology:
        """Shorten the axis that covers most of the median image.

        The step is the divisor of the network for the shorter patch, which may be less deep.
        """
        patch, step = np.array(topology.patch_size), topology.must_be_divisible_by
        ratios = patch / np.asarray(median_shape, dtype=float)
        axis = max(range(len(patch)), key=lambda a: (ratios[a], a))
        tentative = patch.copy()
        tentative[axis] -= step[axis]
        patch[axis] -= self._design(spacing, tentative).must_be_divisible_by[axis]
        if patch[axis] < 1:
            raise InvalidInputError(
                f"no patch is small enough for a GPU memory target of {self.UNet_vram_target_GB} "
                f"GB; the last one tried was {topology.patch_size}"
            )
        return self._design(spacing, patch)

    def _estimate(self, topology: Topology, cache: dict[str, int]) -> int:
        key = f"{topology.patch_size}_{topology.strides}"
        if key not in cache:
            architecture = self._describe_architecture(topology)
            cache[key] = self.static_estimate_VRAM_usage(
                topology.patch_size,
                len(self._channel_names()),
                len(self.dataset_json["labels"]),
                class_to_build(architecture["network_class_name"], self._unet_class),
                architecture["arch_kwargs"],
                architecture["_kw_requires_import"],
            )
        return cache[key]

    def _describe_architecture(self, topology: Topology) -> dict[str, Any]:
        most_features = self.UNet_max_features_2d if len(topology.patch_size) == 2 else self.UNet_max_features_3d
        return describe_unet(
            self._unet_class,
            topology,
            base_features=self.UNet_base_num_features,
            most_features=most_features,
            encoder_depth_argument=self.encoder_depth_argument,
            encoder_depths=self.UNet_blocks_per_stage_encoder,
            decoder_depths=self.UNet_blocks_per_stage_decoder,
        )

    def _describe_configuration(
        self,
        data_identifier: str,
        batch_size: int,
        topology: Topology,
        spacing: Sequence[float] | np.ndarray,
        median_shape: Sequence[float] | np.ndarray,
    ) -> dict[str, Any]:
        schemes, use_mask = self.determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        resample_data, data_kwargs, resample_seg, seg_kwargs = self.determine_resampling()
        resample_output, output_kwargs = self.determine_segmentation_softmax_export_fn()
        return {
            "data_identifier": data_identifier,
            "preprocessor_name": self.preprocessor_name,
            "batch_size": batch_size,
            "patch_size": topology.patch_size,
            "median_image_size_in_voxels": median_shape,
            "spacing": spacing,
            "normalization_schemes": schemes,
            "use_mask_for_norm": use_mask,
            "resampling_fn_data": resample_data.__name__,
            "resampling_fn_seg": resample_seg.__name__,
            "resampling_fn_data_kwargs": data_kwargs,
            "resampling_fn_seg_kwargs": seg_kwargs,
            "resampling_fn_probabilities": resample_output.__name__,
            "resampling_fn_probabilities_kwargs": output_kwargs,
            "architecture": self._describe_architecture(topology),
        }

    # ---------------------------------------------------------------- all configurations

    def plan_experiment(self) -> dict[str, Any]:
        """Plan all suitable configurations; write and return the plans.

        dataset.json is written too.
        """
        forward, backward = (list(map(int, order)) for order in self.determine_transpose())
        geometry = geometry_of(self.dataset_fingerprint)
        target = np.asarray(self.determine_fullres_target_spacing())
        median_shape = median_resampled_shape(geometry, target)[forward]
        configurations = self._plan_configurations(target[forward], median_shape)
        for hint in (describe_flat_axes(median_shape, forward), *find_too_small(configurations).values()):
            if hint is not None:
                logger.warning("%s: %s", self.dataset_name, hint)

        preprocessed = Path(self.preprocessed_dataset_folder)
        preprocessed.mkdir(parents=True, exist_ok=True)
        raw_file = Path(self.raw_dataset_folder) / "dataset.json"
        if read_json(raw_file) == self.dataset_json:
            copy_atomically(raw_file, preprocessed / "dataset.json")
        else:  # with the classes of all sites of a federation
            save_json_atomically(self.dataset_json, preprocessed / "dataset.json", sort_keys=False)
        plans = {
            "dataset_name": str(self.dataset_name),
            "plans_name": self.plans_identifier,
            "original_median_spacing_after_transp": [float(s) for s in geometry.median_spacing()[forward]],
            "original_median_shape_after_transp": [int(round(s)) for s in geometry.median_shape()[forward]],
            "image_reader_writer": self.determine_reader_writer().__name__,
            "transpose_forward": forward,
            "transpose_backward": backward,
            "configurations": configurations,
            "experiment_planner_used": type(self).__name__,
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": self.dataset_fingerprint[
                "foreground_intensity_properties_per_channel"
            ],
        }
        self.plans = plans
        self.save_plans(plans)
        return plans

    def _plan_configurations(self, spacing: np.ndarray, median_shape: np.ndarray) -> dict[str, dict[str, Any]]:
        """Plan 2d always, 3d unless images are single slices, and a low resolution where the patch covers little."""
        cache: dict[str, int] = {}
        num_voxels = float(np.prod(median_shape) * self.num_training_cases)
        configurations: dict[str, dict[str, Any]] = {}
        plan_2d = self.get_plans_for_configuration(
            spacing[1:], median_shape[1:], self.generate_data_identifier("2d"), num_voxels, cache
        )
        configurations["2d"] = {**plan_2d, "batch_dice": True}
        if median_shape[0] == 1:
            return configurations
        fullres = self.get_plans_for_configuration(
            spacing, median_shape, self.generate_data_identifier("3d_fullres"), num_voxels, cache
        )
        lowres = self._plan_lowres(fullres, spacing, median_shape, cache)
        if lowres is not None:
            configurations["3d_lowres"] = {**lowres, "batch_dice": False, "next_stage": "3d_cascade_fullres"}
        configurations["3d_fullres"] = {**fullres, "batch_dice": lowres is not None}
        if lowres is not None:
            configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
        return configurations

    def _plan_lowres(
        self, fullres: dict[str, Any], spacing: np.ndarray, median_shape: np.ndarray, cache: dict[str, int]
    ) -> dict[str, Any] | None:
        """Coarsen until a patch covers enough of the median image; None if that is needless or hardly coarser."""
        lowres, coarse = None, spacing.copy()
        num_patch, num_image = math.prod(fullres["patch_size"]), np.prod(median_shape)
        while num_patch / num_image < self.lowres_creation_threshold:
            coarse = coarsen(coarse)
            exact_shape = spacing / coarse * median_shape
            num_image = np.prod(exact_shape)
            shape = tuple(max(1, round(length)) for length in exact_shape)
            lowres = self.get_plans_for_configuration(
                coarse,
                shape,
                self.generate_data_identifier("3d_lowres"),
                float(num_image * self.num_training_cases),
                cache,
            )
            num_patch = math.prod(lowres["patch_size"])
        if lowres is not None and np.prod(median_shape) / num_image < 2:
            logger.info(
                "3d_lowres is left out: its median image, %s, is hardly smaller than that of 3d_fullres, %s",
                lowres["median_image_size_in_voxels"],
                median_shape.tolist(),
            )
            return None
        return lowres

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Make the plans plain for JSON, in place, and write them to the preprocessed folder."""
        recursive_fix_for_json_export(plans)
        file = Path(self.preprocessed_dataset_folder) / f"{self.plans_identifier}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_plans(plans, file)
        logger.info("Plans written to %s", file)

    def load_plans(self, fname: str) -> None:
        """Take over the plans of a file."""
        self.plans = read_json(Path(fname))

    def _channel_names(self) -> dict[str, str]:
        return self.dataset_json["channel_names" if "channel_names" in self.dataset_json else "modality"]
