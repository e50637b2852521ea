"""Read plans: a dataset's configurations, and the classes and functions that they name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from nnunetv2.plans.label_manager import get_labelmanager_class_from_plans
from nnunetv2.plans.old_plans import add_architecture, is_old_configuration
from nnunetv2.plans.plug_ins import find_plug_in, recursive_find_resampling_fn_by_name
from nnunetv2.utilities.json_files import PLANS, read_json
from nnunetv2.utilities.plug_in_kinds import PLANNER, PREPROCESSOR
from nnunetv2.utilities.trusted_names import check_folder_name

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
    from nnunetv2.plans.label_manager import LabelManager
    from nnunetv2.plans.plug_ins import Planner, Preprocessor


class ConfigurationManager:
    """One configuration of plans, such as 3d_fullres.

    `configuration` is the dict itself; a change of an entry takes effect, except that classes and functions are looked
    up only once.
    """

    def __init__(self, configuration_dict: dict) -> None:
        self.configuration = (
            add_architecture(configuration_dict) if is_old_configuration(configuration_dict) else configuration_dict
        )

    def __repr__(self) -> str:
        return repr(self.configuration)

    @property
    def data_identifier(self) -> str:
        """Folder of the preprocessed data below the dataset's folder."""
        return check_folder_name(self.configuration["data_identifier"], "data_identifier in the plans")

    @property
    def preprocessor_name(self) -> str:
        """Name of the preprocessor class."""
        return self.configuration["preprocessor_name"]

    @cached_property
    def preprocessor_class(self) -> type[Preprocessor]:
        """The preprocessor class, from anywhere below nnunetv2/preprocessing."""
        return find_plug_in(PREPROCESSOR, self.preprocessor_name)

    @property
    def batch_size(self) -> int:
        """Patches per training step."""
        return self.configuration["batch_size"]

    @property
    def patch_size(self) -> list[int]:
        """Voxels per axis that the network sees; two axes for 2d."""
        return self.configuration["patch_size"]

    @property
    def median_image_size_in_voxels(self) -> list[float]:
        """Median shape of the resampled images."""
        return self.configuration["median_image_size_in_voxels"]

    @property
    def spacing(self) -> list[float]:
        """Target spacing in the order of the transposed array axes; two entries for 2d."""
        return self.configuration["spacing"]

    @property
    def normalization_schemes(self) -> list[str]:
        """Name of the normalization class of each channel."""
        return self.configuration["normalization_schemes"]

    @property
    def use_mask_for_norm(self) -> list[bool]:
        """For each channel, whether only voxels inside the nonzero mask are normalized."""
        return self.configuration["use_mask_for_norm"]

    @property
    def network_arch_class_name(self) -> str:
        """Dotted path of the network class."""
        return self.configuration["architecture"]["network_class_name"]

    @property
    def network_arch_init_kwargs(self) -> dict:
        """The arguments of the network's constructor."""
        return self.configuration["architecture"]["arch_kwargs"]

    @property
    def network_arch_init_kwargs_req_import(self) -> list[str]:
        """Keys of `network_arch_init_kwargs` whose values are dotted paths of classes."""
        return self.configuration["architecture"]["_kw_requires_import"]

    @property
    def pool_op_kernel_sizes(self) -> list[list[int]]:
        """Stride of each stage of the encoder."""
        return self.network_arch_init_kwargs["strides"]

    @cached_property
    def resampling_fn_data(self) -> Callable:
        """Resample images: fn(data, new_shape, current_spacing, new_spacing)."""
        return self._find_resampling_function("resampling_fn_data")

    @cached_property
    def resampling_fn_seg(self) -> Callable:
        """Resample label maps: fn(seg, new_shape, current_spacing, new_spacing)."""
        return self._find_resampling_function("resampling_fn_seg")

    @cached_property
    def resampling_fn_probabilities(self) -> Callable:
        """Resample network outputs: fn(outputs, new_shape, current_spacing, new_spacing)."""
        return self._find_resampling_function("resampling_fn_probabilities")

    @property
    def batch_dice(self) -> bool:
        """Whether the Dice loss pools all samples of a batch."""
        return self.configuration["batch_dice"]

    @property
    def next_stage_names(self) -> list[str] | None:
        """Configurations that continue from this one's predictions."""
        names = self.configuration.get("next_stage")
        return [names] if isinstance(names, str) else names

    @property
    def previous_stage_name(self) -> str | None:
        """The configuration whose predictions this one starts from."""
        return self.configuration.get("previous_stage")

    def _find_resampling_function(self, key: str) -> Callable:
        function = recursive_find_resampling_fn_by_name(self.configuration[key], key)
        return partial(function, **self.configuration[f"{key}_kwargs"])


class PlansManager:
    """The plans of a dataset.

    `plans` is the dict itself, read from a file if a path was given.

    Args:
        plans_file_or_dict: Path of a plans JSON, or its content, which is kept, not copied.
    """

    def __init__(self, plans_file_or_dict: str | os.PathLike[str] | dict) -> None:
        if isinstance(plans_file_or_dict, dict):
            self.plans = plans_file_or_dict
        else:
            self.plans = read_json(plans_file_or_dict, required=PLANS, refuse_duplicates=True)
        self._configurations: dict[str, ConfigurationManager] = {}

    def __repr__(self) -> str:
        return repr(self.plans)

    def get_configuration(self, configuration_name: str) -> ConfigurationManager:
        """Return a configuration with all it inherits; the same object each time.

        Raises:
            RuntimeError: The plans have no configuration of this name, or it inherits from itself.
            ValueError: It inherits from a configuration that does not exist.
        """
        if configuration_name not in self.plans["configurations"]:
            raise RuntimeError(
                f"the plans have no configuration {configuration_name!r}; available: "
                f"{', '.join(self.available_configurations)}"
            )
        if configuration_name not in self._configurations:
            resolved = self._internal_resolve_configuration_inheritance(configuration_name)
            self._configurations[configuration_name] = ConfigurationManager(resolved)
        return self._configurations[configuration_name]

    def _internal_resolve_configuration_inheritance(
        self, configuration_name: str, visited: tuple[str, ...] | None = None
    ) -> dict:
        """Return a configuration with all it inherits; programs call it by this name. `visited` is not used."""
        return resolve_inheritance(self.plans["configurations"], configuration_name)

    def get_label_manager(self, dataset_json: Mapping, **kwargs: Any) -> LabelManager:
        """Build the dataset's label manager; keywords are passed on to it."""
        return self.label_manager_class(
            label_dict=dataset_json["labels"], regions_class_order=dataset_json.get("regions_class_order"), **kwargs
        )

    @property
    def available_configurations(self) -> list[str]:
        """Names of all configurations."""
        return list(self.plans["configurations"])

    @property
    def dataset_name(self) -> str:
        """Folder name of the dataset."""
        return check_folder_name(self.plans["dataset_name"], "dataset_name in the plans")

    @property
    def plans_name(self) -> str:
        """Name of the plans, which is also their file's name without ending."""
        return self.plans["plans_name"]

    @property
    def original_median_spacing_after_transp(self) -> list[float]:
        """Median spacing of the training images, axes transposed."""
        return self.plans["original_median_spacing_after_transp"]

    @property
    def original_median_shape_after_transp(self) -> list[int]:
        """Median shape of the training images, axes transposed."""
        return self.plans["original_median_shape_after_transp"]

    @property
    def transpose_forward(self) -> list[int]:
        """Order into which preprocessing brings the spatial axes."""
        return self.plans["transpose_forward"]

    @property
    def transpose_backward(self) -> list[int]:
        """Order that undoes `transpose_forward`."""
        return self.plans["transpose_backward"]

    @property
    def experiment_planner_name(self) -> str:
        """Name of the planner class that made the plans."""
        return self.plans["experiment_planner_used"]

    @property
    def foreground_intensity_properties_per_channel(self) -> dict[str, dict[str, float]]:
        """Statistics of foreground voxels per channel; the keys are channel numbers as text."""
        for key in ("foreground_intensity_properties_per_channel", "foreground_intensity_properties_by_modality"):
            if key in self.plans:
                return self.plans[key]
        raise KeyError("the plans have no foreground_intensity_properties_per_channel")

    @cached_property
    def image_reader_writer_class(self) -> type[BaseReaderWriter]:
        """The reader and writer of the dataset's images."""
        from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

        return recursive_find_reader_writer_by_name(self.plans["image_reader_writer"])

    @cached_property
    def experiment_planner_class(self) -> type[Planner]:
        """The planner class, from anywhere below nnunetv2/experiment_planning."""
        return find_plug_in(PLANNER, self.experiment_planner_name)

    @cached_property
    def label_manager_class(self) -> type[LabelManager]:
        """The label manager class, from nnunetv2/utilities/label_handling."""
        return get_labelmanager_class_from_plans(self.plans)


def resolve_inheritance(configurations: Mapping[str, dict], name: str) -> dict:
    """Return a deep copy of a configuration, completed by its ancestors' entries.

    Nested dicts are not merged.

    Raises:
        ValueError: The configuration or an ancestor is missing.
        RuntimeError: The configuration is its own ancestor.
    """
    if name not in configurations:
        raise ValueError(f"the plans have no configuration {name!r}; available: {', '.join(configurations)}")
    chain = [name]
    while (parent := configurations[chain[-1]].get("inherits_from")) is not None:
        if parent not in configurations:
            raise ValueError(
                f"configuration {chain[-1]!r} inherits from {parent!r}, which the plans do not have; "
                f"available: {', '.join(configurations)}"
            )
        if parent in chain:
            raise RuntimeError(f"configuration {name!r} inherits from itself: {' -> '.join([*chain, parent])}")
        chain.append(parent)
    resolved: dict = {}
    for ancestor in reversed(chain):
        resolved.update(deepcopy(configurations[ancestor]))
    return resolved


def determine_num_input_channels(
    plans_manager: PlansManager, configuration_or_config_manager: str | ConfigurationManager, dataset_json: Mapping
) -> int:
    """Count the input channels of a network.

    Those of the image, and in a cascade one per foreground label.
    """
    configuration = configuration_or_config_manager
    if isinstance(configuration, str):
        configuration = plans_manager.get_configuration(configuration)
    channel_names = dataset_json["channel_names"] if "channel_names" in dataset_json else dataset_json["modality"]
    if configuration.previous_stage_name is None:
        return len(channel_names)
    return len(channel_names) + len(plans_manager.get_label_manager(dataset_json).foreground_labels)
