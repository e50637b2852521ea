"""Predict images with the networks of ONNX files: preprocessing, sliding window, average of folds, export."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2.inference.case_lists import CaseLists, Inputs, Outputs, PathOrText, find_cases, is_path, name_outputs
from nnunetv2.inference.errors import NonFiniteLogitsError
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
    estimate_export_bytes,
    export_prediction_from_logits,
)
from nnunetv2.inference.export_queue import ExportQueue
from nnunetv2.inference.onnx.metadata import OnnxFileError
from nnunetv2.inference.onnx.network import OnnxNetwork
from nnunetv2.inference.onnx.tiles import mirrored_mean, predict_image, tile_weights
from nnunetv2.inference.preprocessing_jobs import (
    ArrayCase,
    FileCase,
    Item,
    Model,
    PreprocessedCases,
    preprocess_case,
    without_unprepared,
)
from nnunetv2.plans.plans_manager import PlansManager, determine_num_input_channels
from nnunetv2.utilities.atomic_write import remove_leftovers, save_json_atomically
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

logger = logging.getLogger(__name__)

ENDING = ".onnx"


class OnnxPredictor:
    """Holds the networks of a model, one per fold.

    Methods are those of `nnUNetPredictor` that take files and arrays.

    Args:
        files: The ONNX files of one model's folds, or the folder that holds them and no others.
        device: Where networks run: cpu, or cuda with the package onnxruntime-gpu.
        tile_step_size: Distance of neighbouring tiles as a fraction of the patch size, above 0 and at most 1.
        use_gaussian: Weigh the centre of a tile more than its rim.
        use_mirroring: Average over mirrored copies, along the axes that training mirrored.
        num_threads: Threads of a network on the CPU. Default: OMP_NUM_THREADS, else the cores that may be used.
        verbose: Log more about preprocessing.

    Raises:
        FileNotFoundError: A file or the folder does not exist, or there is no ONNX file in it.
        OnnxFileError: A file cannot be run, or the files are not folds of one model.
    """

    def __init__(
        self,
        files: PathOrText | Sequence[PathOrText],
        *,
        device: str = "cpu",
        tile_step_size: float = 0.5,
        use_gaussian: bool = True,
        use_mirroring: bool = True,
        num_threads: int | None = None,
        verbose: bool = False,
    ) -> None:
        if not 0 < tile_step_size <= 1:
            raise ValueError(f"tile_step_size must be above 0 and at most 1, got {tile_step_size}")
        paths = _list_files(files)
        self.networks = [OnnxNetwork(path, device=device, num_threads=num_threads) for path in paths]
        _require_folds_of_one_model(self.networks)
        self.tile_step_size, self.use_gaussian, self.use_mirroring = tile_step_size, use_gaussian, use_mirroring
        self.verbose = verbose

        self.description = self.networks[0].description
        self.dataset_json = self.description.dataset_json
        self.plans_manager = PlansManager(self.description.plans)
        self.configuration_manager = self.plans_manager.get_configuration(self.description.configuration)
        self.label_manager = self.plans_manager.get_label_manager(self.dataset_json)
        for network in self.networks:
            self._require_fitting_network(network)

    def predict_from_files(
        self,
        list_of_lists_or_source_folder: Inputs,
        output_folder_or_list_of_truncated_output_files: Outputs,
        save_probabilities: bool = False,
        overwrite: bool = True,
        num_processes_preprocessing: int = 3,
        num_processes_segmentation_export: int = 3,
        folder_with_segs_from_prev_stage: PathOrText | None = None,
    ) -> list[Any] | None:
        """Predict image files; see `nnUNetPredictor.predict_from_files`.

        Raises:
            FailedCasesError: Cases failed; the message lists them. The others are there.
        """
        output = output_folder_or_list_of_truncated_output_files
        self._require_previous_stage(folder_with_segs_from_prev_stage is not None)
        cases = find_cases(
            list_of_lists_or_source_folder,
            output,
            self.dataset_json,
            self.plans_manager.image_reader_writer_class,
            create_lists_from_splitted_dataset_folder,
            previous_stage_folder=folder_with_segs_from_prev_stage,
            overwrite=overwrite,
            save_probabilities=save_probabilities,
        )
        if is_path(output):
            self._write_provenance(Path(output), list_of_lists_or_source_folder, save_probabilities)
        if not cases.images:
            logger.info("no cases left to predict")
            return None
        items = PreprocessedCases(_as_file_cases(cases), self._model, num_processes_preprocessing, self.verbose)
        try:
            with ExportQueue(num_processes_segmentation_export) as exports:
                for number, item in enumerate(without_unprepared(items, exports.fail)):
                    name = self._name_of(item) or f"number {number}"
                    logger.info("predicting case %s, shape %s", Path(name).name, item["data"].shape[1:])
                    try:
                        logits = self.predict_logits_from_preprocessed_data(item["data"])
                    except NonFiniteLogitsError as error:
                        exports.fail(name, error)
                        continue
                    num_bytes = estimate_export_bytes(logits, item["data_properties"], save_probabilities)
                    exports.submit(name, num_bytes, self._export, logits, item, save_probabilities)
                    del item, logits
                return exports.results()
        finally:
            items.close()

    def predict_single_npy_array(
        self,
        input_image: np.ndarray,
        image_properties: Mapping[str, Any],
        segmentation_previous_stage: np.ndarray | None = None,
        output_file_truncated: PathOrText | None = None,
        save_or_return_probabilities: bool = False,
    ) -> Any:
        """Predict one image `(c, *spatial)`; see `nnUNetPredictor.predict_single_npy_array`."""
        self._require_previous_stage(segmentation_previous_stage is not None)
        output = None if output_file_truncated is None else os.fspath(output_file_truncated)
        case = ArrayCase(input_image, segmentation_previous_stage, image_properties, output)
        item = preprocess_case(case, self._model, self.verbose)
        logits = self.predict_logits_from_preprocessed_data(item["data"])
        return self._export(logits, item, save_or_return_probabilities)

    def predict_logits_from_preprocessed_data(self, data: np.ndarray) -> np.ndarray:
        """Return the logits of a case averaged over all folds: float16 `(classes, *spatial)`.

        Args:
            data: `(c, *spatial)`, preprocessed, in cascades with the previous stage stacked below.
        """
        if len(self.networks) == 1:
            return self._predict_fold(self.networks[0], data)
        # Summed in float32: in float16 five folds would lose three bits.
        total = self._predict_fold(self.networks[0], data).astype(np.float32)
        for network in self.networks[1:]:
            total += self._predict_fold(network, data)
        total /= len(self.networks)
        return total.astype(np.float16)

    def _predict_fold(self, network: OnnxNetwork, data: np.ndarray) -> np.ndarray:
        axes = self.description.mirroring_axes if self.use_mirroring else ()
        patch_size = self.configuration_manager.patch_size
        return predict_image(
            lambda tiles: mirrored_mean(network, tiles, axes),
            data,
            classes=self.label_manager.num_segmentation_heads,
            tile_size=patch_size,
            tile_step_size=self.tile_step_size,
            weight=tile_weights(patch_size) if self.use_gaussian else 1.0,
        )

    def _export(self, logits: np.ndarray, item: Item, save_probabilities: bool) -> Any:
        """Write the files of a case, or return its label map and if asked for its probabilities."""
        if item["ofile"] is not None:
            export_prediction_from_logits(
                logits,
                item["data_properties"],
                self.configuration_manager,
                self.plans_manager,
                self.dataset_json,
                item["ofile"],
                save_probabilities,
            )
            return None
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            logits,
            self.plans_manager,
            self.configuration_manager,
            self.label_manager,
            item["data_properties"],
            return_probabilities=save_probabilities,
        )

    @property
    def _model(self) -> Model:
        return Model(self.plans_manager, self.configuration_manager, self.dataset_json)

    def _name_of(self, item: Item) -> str | None:
        if item["ofile"] is None:
            return None
        reader = self.plans_manager.image_reader_writer_class
        return name_outputs(item["ofile"], self.dataset_json["file_ending"], reader)[0]

    def _require_previous_stage(self, is_given: bool) -> None:
        previous = self.configuration_manager.previous_stage_name
        if previous is not None and not is_given:
            raise ValueError(
                f"this model continues {previous}: predict the same images with that one first, then give the folder "
                "of its label maps (-prev_stage_predictions, or folder_with_segs_from_prev_stage)"
            )
        if previous is None and is_given:
            raise ValueError("this model has no previous stage, but predictions of one were given")

    def _require_fitting_network(self, network: OnnxNetwork) -> None:
        """Check that the shapes of a network are those of its description."""
        channels = determine_num_input_channels(self.plans_manager, self.configuration_manager, self.dataset_json)
        heads, patch = self.label_manager.num_segmentation_heads, tuple(self.configuration_manager.patch_size)
        found = [tuple(shape[1:]) for shape in (network.input_shape, network.output_shape)]
        expected = [(channels, *patch), (heads, *patch)]
        if found != expected:
            raise OnnxFileError(
                f"{network.file} does not fit its metadata: its network turns {found[0]} into {found[1]}, expected "
                f"{expected[0]} into {expected[1]}. Export the model again"
            )

    def _write_provenance(self, folder: Path, images: Inputs, save_probabilities: bool) -> None:
        """Write down the origin of the predictions, as `nnUNetv2_predict` does."""
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        arguments = {
            "list_of_lists_or_source_folder": os.fspath(images)
            if is_path(images)
            else [list(map(str, i)) for i in images],
            "save_probabilities": save_probabilities,
            "onnx_files": [str(network.file) for network in self.networks],
            "exported_with": self.description.version,
        }
        save_json_atomically(arguments, folder / "predict_from_raw_data_args.json")
        save_json_atomically(self.dataset_json, folder / "dataset.json", sort_keys=False)
        save_json_atomically(self.plans_manager.plans, folder / "plans.json", sort_keys=False)


def _list_files(files: PathOrText | Sequence[PathOrText]) -> list[Path]:
    paths = [Path(files)] if is_path(files) else [Path(file) for file in files]
    if len(paths) == 1 and paths[0].is_dir():
        folder, paths = paths[0], sorted(paths[0].glob(f"*{ENDING}"))
        if not paths:
            raise FileNotFoundError(f"{folder} holds no file that ends in {ENDING}: export a model into it first")
    if not paths:
        raise FileNotFoundError("no ONNX file was given")
    return paths


def _require_folds_of_one_model(networks: Sequence[OnnxNetwork]) -> None:
    first, *others = networks
    for other in others:
        if not first.description.is_fold_of_same_model(other.description):
            raise OnnxFileError(
                f"{other.file} is of another model than {first.file}, and their logits cannot be averaged: name the "
                "files of one model's folds, or put each model into a folder of its own"
            )
    folds = [network.description.fold for network in networks]
    if len(set(folds)) < len(folds):
        raise OnnxFileError(f"a fold is there twice, among {', '.join(str(network.file) for network in networks)}")


def _as_file_cases(cases: CaseLists) -> list[FileCase]:
    outputs: Sequence[str | None] = cases.outputs or [None] * len(cases.images)
    return [
        FileCase(tuple(files), previous, output)
        for files, previous, output in zip(cases.images, cases.previous_stage, outputs)
    ]
