"""Write each predicted class into a file of its own, beside the usual label map."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
    read_dataset_json,
    write_case,
    write_segmentation,
)
from nnunetv2.inference.predictor import nnUNetPredictor

if TYPE_CHECKING:
    from nnunetv2.inference.export_prediction import ArrayOrTensor
    from nnunetv2.inference.predictor import Prediction
    from nnunetv2.inference.preprocessing_jobs import Item
    from nnunetv2.plans.plans_manager import ConfigurationManager, PlansManager


def export_prediction_from_logits_singleFiles(
    predicted_array_or_file: ArrayOrTensor,
    properties_dict: Mapping[str, Any],
    configuration_manager: ConfigurationManager,
    plans_manager: PlansManager,
    dataset_json_dict_or_file: Mapping[str, Any] | str,
    output_file_truncated: str,
    save_probabilities: bool = False,
) -> None:
    """Convert logits; write the label map, and per class a mask as `<output>/predictions/<class><ending>`.

    Classes are called as in dataset.json; a region's mask is the union of its labels.
    """
    dataset_json = read_dataset_json(dataset_json_dict_or_file)
    converted = convert_predicted_logits_to_segmentation_with_correct_shape(
        predicted_array_or_file,
        plans_manager,
        configuration_manager,
        plans_manager.get_label_manager(dataset_json),
        properties_dict,
        return_probabilities=save_probabilities,
    )
    segmentation, probabilities = converted if save_probabilities else (converted, None)
    writer, ending = plans_manager.image_reader_writer_class(), dataset_json["file_ending"]
    folder = Path(os.fspath(output_file_truncated), "predictions")
    folder.mkdir(parents=True, exist_ok=True)
    for name, labels in _foreground(dataset_json["labels"]).items():
        mask = np.isin(segmentation, labels).astype(np.uint8)
        write_segmentation(writer, mask, folder / f"{name}{ending}", properties_dict)
    # The label map comes last: a case that has one is complete.
    write_case(writer, segmentation, probabilities, properties_dict, output_file_truncated, ending)


class JHUPredictor(nnUNetPredictor):
    """A predictor whose written cases also have one file per class.

    Returned predictions are the usual ones.
    """

    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[Item],
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = default_num_processes,
        use_cropped_logits_resampling: bool = False,
    ) -> list[Prediction]:
        """See `nnUNetPredictor.predict_from_data_iterator`; logits are always resampled as a whole."""
        return super().predict_from_data_iterator(data_iterator, save_probabilities, num_processes_segmentation_export)

    def _export_call(self, logits: np.ndarray, item: Item, save_probabilities: bool) -> tuple:
        function, *arguments = super()._export_call(logits, item, save_probabilities)
        if item["ofile"] is not None:
            function = export_prediction_from_logits_singleFiles
        return (function, *arguments)


def _foreground(labels: Mapping[str, int | Sequence[int]]) -> dict[str, list[int]]:
    """Return the values of each label or region in dataset.json, without background and ignore."""
    values = {name: list(value) if isinstance(value, (list, tuple)) else [value] for name, value in labels.items()}
    return {name: value for name, value in values.items() if name != "ignore" and value != [0]}
