"""Predict images with a trained model: preprocessing, sliding window, ensembling of folds, export."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import GeneratorType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from nnunetv2.configuration import default_num_processes

# The public module is where programs replace functions, so they are looked up there whenever they are called.
from nnunetv2.inference import case_lists
from nnunetv2.inference import predict_from_raw_data as public
from nnunetv2.inference.case_lists import Inputs, Outputs, PathOrText
from nnunetv2.inference.errors import NonFiniteLogitsError
from nnunetv2.inference.export_prediction import estimate_export_bytes
from nnunetv2.inference.export_queue import ExportQueue
from nnunetv2.inference.forward_budget import ForwardBudget, budget_for, is_out_of_memory
from nnunetv2.inference.mirroring import mirrored_mean
from nnunetv2.inference.preprocessing_jobs import PreprocessedCases, without_unprepared
from nnunetv2.inference.tile_accumulation import predict_tiles
from nnunetv2.inference.tile_geometry import Slicer, compute_tile_slicers
from nnunetv2.models import model_folder
from nnunetv2.models.networks import speed_up_on_cpu_
from nnunetv2.utilities.atomic_write import remove_leftovers, save_json_atomically
from nnunetv2.utilities.device import autocast_context
from nnunetv2.utilities.plug_in_kinds import TRAINER

if TYPE_CHECKING:
    from nnunetv2.inference.preprocessing_jobs import Item
    from nnunetv2.plans.label_manager import LabelManager
    from nnunetv2.plans.plans_manager import ConfigurationManager, PlansManager

    Prediction = np.ndarray | tuple[np.ndarray, np.ndarray] | None
    OneOrMany = np.ndarray | Sequence[np.ndarray]

logger = logging.getLogger(__name__)

_MAIN_MEMORY = torch.device("cpu")
_LATER: Any = None  # value of attributes before a model is loaded


class nnUNetPredictor:
    """Holds a model and predicts with it.

    Attributes are public: programs read them, and set them by hand.

    Args:
        tile_step_size: Distance of neighbouring tiles as a fraction of the patch size, above 0 and at most 1; another
            one raises a ValueError.
        use_gaussian: Weigh the centre of a tile more than its rim.
        use_mirroring: Average over mirrored copies, along the axes that training mirrored.
        perform_everything_on_device: Collect logits on the GPU; without effect on other devices.
        device: Where the network runs.
        verbose: Log more about tiles.
        verbose_preprocessing: Log more about preprocessing.
        allow_tqdm: Show progress bars.
    """

    def __init__(
        self,
        tile_step_size: float = 0.5,
        use_gaussian: bool = True,
        use_mirroring: bool = True,
        perform_everything_on_device: bool = True,
        device: torch.device = torch.device("cuda"),
        verbose: bool = False,
        verbose_preprocessing: bool = False,
        allow_tqdm: bool = True,
    ) -> None:
        if not 0 < tile_step_size <= 1:
            raise ValueError(f"tile_step_size must be above 0 and at most 1, got {tile_step_size}")
        self.tile_step_size = tile_step_size
        self.use_gaussian = use_gaussian
        self.use_mirroring = use_mirroring
        self.device = device
        self.verbose = verbose
        self.verbose_preprocessing = verbose_preprocessing
        self.allow_tqdm = allow_tqdm
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        elif perform_everything_on_device:
            logger.debug("perform_everything_on_device has no effect on %s", device.type)
        self.perform_everything_on_device = perform_everything_on_device and device.type == "cuda"

        self.plans_manager: PlansManager = _LATER
        self.configuration_manager: ConfigurationManager = _LATER
        self.list_of_parameters: list[dict[str, Any]] | None = None
        self.network: nn.Module = _LATER
        self.dataset_json: dict[str, Any] = _LATER
        self.trainer_name: str = _LATER
        self.allowed_mirroring_axes: tuple[int, ...] | None = None
        self.label_manager: LabelManager = _LATER
        self._batched_network: nn.Module = _LATER
        self._budget: ForwardBudget | None = None
        self._budget_basis: tuple[torch.device, int] | None = None  # that it was made for
        self._is_device_full = False  # for the current case, which the CPU predicts then

    # Models

    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: PathOrText,
        use_folds: Iterable[int | str] | int | str | None,
        checkpoint_name: str = "checkpoint_final.pth",
        trainer_class: type | None = None,
    ) -> None:
        """Load the model in a folder with plans.json, dataset.json and fold_X/checkpoint.

        Args:
            use_folds: Fold numbers or "all", one or several; their logits are averaged. None: all numbered folds that
                have the checkpoint.
            trainer_class: Builds the network. Default: the class whose name the checkpoint holds.
        """

        def find_trainer(name: str) -> type:
            return public.recursive_find_trainer_class_by_name(name) if trainer_class is None else trainer_class

        if use_folds is None:
            use_folds = self.auto_detect_available_folds(model_training_output_dir, checkpoint_name)
        model = model_folder.load_model_folder(
            model_training_output_dir,
            use_folds,
            checkpoint_name,
            find_trainer=find_trainer,
            fallback=TRAINER.base_class,
        )
        self.manual_initialization(
            model.network,
            model.plans_manager,
            model.configuration_manager,
            model.parameters,
            model.dataset_json,
            model.trainer_name,
            model.mirroring_axes,
        )

    def manual_initialization(
        self,
        network: nn.Module,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        parameters: list[dict[str, Any]] | None,
        dataset_json: dict[str, Any],
        trainer_name: str,
        inference_allowed_mirroring_axes: tuple[int, ...] | None,
    ) -> None:
        """Take a model from memory.

        Args:
            parameters: One state dict per fold. With None, the network's own weights serve, and only
                `predict_sliding_window_return_logits` can be used.
        """
        self.network = self._batched_network = _compiled(network) if _wants_compilation() else network
        self.list_of_parameters = parameters
        self.allowed_mirroring_axes = inference_allowed_mirroring_axes
        self.trainer_name = trainer_name
        self.dataset_json = dataset_json
        self.label_manager = plans_manager.get_label_manager(dataset_json)
        self.configuration_manager = configuration_manager
        self.plans_manager = plans_manager

    @staticmethod
    def auto_detect_available_folds(model_training_output_dir: PathOrText, checkpoint_name: str) -> list[int]:
        """Return the numbers of all folds that have the checkpoint; `fold_all` is never among them."""
        folds = model_folder.find_folds(model_training_output_dir, checkpoint_name)
        logger.info("using folds %s", folds)
        return folds

    # Files

    def predict_from_files(
        self,
        list_of_lists_or_source_folder: Inputs,
        output_folder_or_list_of_truncated_output_files: Outputs,
        save_probabilities: bool = False,
        overwrite: bool = True,
        num_processes_preprocessing: int = default_num_processes,
        num_processes_segmentation_export: int = default_num_processes,
        folder_with_segs_from_prev_stage: PathOrText | None = None,
        num_parts: int = 1,
        part_id: int = 0,
        use_cropped_logits_resampling: bool = False,
    ) -> list[Prediction] | None:
        """Predict image files.

        Args:
            list_of_lists_or_source_folder: A folder of CASE_XXXX files, or per case the list of its channels' files.
            output_folder_or_list_of_truncated_output_files: A folder, or per case a path without ending. None returns
                the results.
            save_probabilities: Also write `.npz` and `.pkl`, or return (segmentation, probabilities).
            overwrite: If False, cases whose files are all there are passed over.
            num_processes_preprocessing, num_processes_segmentation_export: Workers; 0 works between predictions.
            folder_with_segs_from_prev_stage: Predictions of the previous stage; cascades need it.
            num_parts, part_id: Predict only every num_parts-th case, from number part_id on.
            use_cropped_logits_resampling: See `cropped_logits`.

        Returns:
            Segmentations `(*spatial)` in the order of the cases; None for each case that was written. None if nothing
            was left to do.
        """
        arguments = {
            "list_of_lists_or_source_folder": list_of_lists_or_source_folder,
            "output_folder_or_list_of_truncated_output_files": output_folder_or_list_of_truncated_output_files,
            "save_probabilities": save_probabilities,
            "overwrite": overwrite,
            "num_processes_preprocessing": num_processes_preprocessing,
            "num_processes_segmentation_export": num_processes_segmentation_export,
            "folder_with_segs_from_prev_stage": folder_with_segs_from_prev_stage,
            "num_parts": num_parts,
            "part_id": part_id,
        }
        images, outputs, previous_stage = self._prepare_run(arguments)
        if not images:
            logger.info("no cases left to predict")
            return None
        iterator = self._internal_get_data_iterator_from_lists_of_filenames(
            images, previous_stage, outputs, num_processes_preprocessing
        )
        return self.predict_from_data_iterator(
            iterator, save_probabilities, num_processes_segmentation_export, **_if_set(use_cropped_logits_resampling)
        )

    def predict_from_files_sequential(
        self,
        list_of_lists_or_source_folder: Inputs,
        output_folder_or_list_of_truncated_output_files: Outputs,
        save_probabilities: bool = False,
        overwrite: bool = True,
        folder_with_segs_from_prev_stage: PathOrText | None = None,
        use_cropped_logits_resampling: bool = False,
    ) -> list[Prediction] | None:
        """Predict image files one after the other, without any worker. See `predict_from_files`.

        Returns:
            Results in order, or an empty list if they were written. None if nothing was left to do.
        """
        arguments = {
            "list_of_lists_or_source_folder": list_of_lists_or_source_folder,
            "output_folder_or_list_of_truncated_output_files": output_folder_or_list_of_truncated_output_files,
            "save_probabilities": save_probabilities,
            "overwrite": overwrite,
            "folder_with_segs_from_prev_stage": folder_with_segs_from_prev_stage,
        }
        images, outputs, previous_stage = self._prepare_run(arguments)
        if not images:
            logger.info("no cases left to predict")
            return None
        iterator = public.preprocessing_iterator_fromfiles(
            images,
            previous_stage,
            outputs,
            self.plans_manager,
            self.dataset_json,
            self.configuration_manager,
            num_processes=0,
            pin_memory=False,
            verbose=self.verbose,
        )
        results = self.predict_from_data_iterator(
            iterator, save_probabilities, 0, **_if_set(use_cropped_logits_resampling)
        )
        return results if outputs is None else []

    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[Item],
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = default_num_processes,
        use_cropped_logits_resampling: bool = False,
    ) -> list[Prediction]:
        """Predict preprocessed cases.

        They are dicts of `data` (tensor, or the path of a `.npy` that is read and deleted), `data_properties` and
        `ofile` (path without ending; None returns the result).

        A case that cannot be prepared or exported, or whose logits are not finite, does not stop the others.

        Raises:
            FailedCasesError: At the end, if cases failed; the message lists them.
            RuntimeError: At once, if a worker process died, the disk is full, or the network fails in any other way.
        """
        options = _if_set(use_cropped_logits_resampling)
        try:
            with ExportQueue(num_processes_segmentation_export) as exports:
                for number, item in enumerate(without_unprepared(data_iterator, exports.fail)):
                    name = self._name_of(item) or f"number {number}"
                    try:
                        logits = self._predict_item(name, item)
                    except NonFiniteLogitsError as error:
                        exports.fail(name, error)
                        continue
                    num_bytes = estimate_export_bytes(logits, item["data_properties"], save_probabilities)
                    exports.submit(
                        name, num_bytes, _with_options, options, *self._export_call(logits, item, save_probabilities)
                    )
                    del item, logits
                return exports.results()
        finally:
            _stop_workers(data_iterator)
            public.compute_gaussian.cache_clear()
            public.empty_cache(self.device)

    # Arrays

    def predict_single_npy_array(
        self,
        input_image: np.ndarray,
        image_properties: Mapping[str, Any],
        segmentation_previous_stage: np.ndarray | None = None,
        output_file_truncated: PathOrText | None = None,
        save_or_return_probabilities: bool = False,
        use_cropped_logits_resampling: bool = False,
    ) -> Prediction:
        """Predict one image `(c, *spatial)` in the calling process.

        Args:
            image_properties: As the model's reader returns them; `spacing` suffices if nothing is written. Not changed.
            segmentation_previous_stage: `(1, *spatial)`, for cascades.

        Returns:
            The label map `(*spatial)`, or (label map, probabilities), or None if a file is written.
        """
        if output_file_truncated is not None:
            output_file_truncated = os.fspath(output_file_truncated)
            writer = self.plans_manager.image_reader_writer_class()
            if hasattr(writer, "require_properties"):  # readers need not be our subclasses
                writer.require_properties(image_properties)
        adapter = public.PreprocessAdapterFromNpy(
            [input_image],
            [segmentation_previous_stage],
            [image_properties],
            [output_file_truncated],
            self.plans_manager,
            self.dataset_json,
            self.configuration_manager,
            num_threads_in_multithreaded=1,
            verbose=self.verbose,
        )
        item = next(adapter)
        logits = self.predict_logits_from_preprocessed_data(item["data"]).cpu()
        options = _if_set(use_cropped_logits_resampling)
        if output_file_truncated is not None:
            public.export_prediction_from_logits(
                logits,
                item["data_properties"],
                self.configuration_manager,
                self.plans_manager,
                self.dataset_json,
                output_file_truncated,
                save_or_return_probabilities,
                **options,
            )
            return None
        return public.convert_predicted_logits_to_segmentation_with_correct_shape(
            logits,
            self.plans_manager,
            self.configuration_manager,
            self.label_manager,
            item["data_properties"],
            return_probabilities=save_or_return_probabilities,
            **options,
        )

    def predict_from_list_of_npy_arrays(
        self,
        image_or_list_of_images: OneOrMany,
        segs_from_prev_stage_or_list_of_segs_from_prev_stage: OneOrMany | None,
        properties_or_list_of_properties: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        truncated_ofname: PathOrText | Sequence[PathOrText] | None,
        num_processes: int = 3,
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = default_num_processes,
        use_cropped_logits_resampling: bool = False,
    ) -> list[Prediction]:
        """Predict images in memory, in order; single values stand for lists of one."""
        iterator = self.get_data_iterator_from_raw_npy_data(
            image_or_list_of_images,
            segs_from_prev_stage_or_list_of_segs_from_prev_stage,
            properties_or_list_of_properties,
            truncated_ofname,
            num_processes,
        )
        return self.predict_from_data_iterator(
            iterator, save_probabilities, num_processes_segmentation_export, **_if_set(use_cropped_logits_resampling)
        )

    def get_data_iterator_from_raw_npy_data(
        self,
        image_or_list_of_images: OneOrMany,
        segs_from_prev_stage_or_list_of_segs_from_prev_stage: OneOrMany | None,
        properties_or_list_of_properties: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        truncated_ofname: PathOrText | Sequence[PathOrText] | None,
        num_processes: int = 3,
    ) -> Iterator[Item]:
        """Return an iterator for `predict_from_data_iterator` over images in memory; single values become lists."""
        images = _as_list(image_or_list_of_images, np.ndarray)
        previous_stage = _as_list(segs_from_prev_stage_or_list_of_segs_from_prev_stage, np.ndarray)
        properties = _as_list(properties_or_list_of_properties, Mapping)
        outputs = _as_list(truncated_ofname, (str, os.PathLike))
        if outputs is not None:
            outputs = [None if output is None else os.fspath(output) for output in outputs]
        return public.preprocessing_iterator_fromnpy(
            images,
            previous_stage,
            properties,
            outputs,
            self.plans_manager,
            self.dataset_json,
            self.configuration_manager,
            min(num_processes, len(images)),
            self.device.type == "cuda",
            self.verbose_preprocessing,
        )

    # Preprocessed cases

    @torch.inference_mode()
    def predict_logits_from_preprocessed_data(self, data: torch.Tensor) -> torch.Tensor:
        """Return the logits of a case averaged over all folds.

        They are float16 `(classes, *spatial)` in main memory.

        Args:
            data: `(c, *spatial)`, preprocessed, in cascades with the previous stage stacked below.
        """
        if not self.list_of_parameters:
            raise RuntimeError(
                "the predictor has no parameters: initialize it from a model folder, or pass parameters "
                "to manual_initialization"
            )
        total: torch.Tensor | None = None
        for parameters in self.list_of_parameters:
            # 0.03 s for 31 million weights; remembering which ones are loaded would miss changes made by programs.
            _bare(self.network).load_state_dict(parameters)
            logits = self.predict_sliding_window_return_logits(data).to("cpu")
            if len(self.list_of_parameters) == 1:
                return logits
            # Summed in float32: in float16 five folds would lose three bits.
            total = logits.float() if total is None else total.add_(logits)
        assert total is not None
        return total.div_(len(self.list_of_parameters)).half()

    @torch.inference_mode()
    def predict_sliding_window_return_logits(self, input_image: torch.Tensor) -> torch.Tensor:
        """Return the logits of an image `(c, x, y, z)` for the present weights.

        They are float16 `(classes, x, y, z)`.

        Raises:
            ValueError: The image does not have four axes.
            RuntimeError: The logits are not finite.
        """
        if input_image.ndim != 4:
            raise ValueError(f"expected an image (c, x, y, z), got shape {tuple(input_image.shape)}")
        self._prepare_network()
        padded, unpad = public.pad_nd_image(
            input_image, self.configuration_manager.patch_size, "constant", {"value": 0}, True, None
        )
        slicers = self._internal_get_sliding_window_slicers(padded.shape[1:])
        with autocast_context(self._network_device, is_inference=True):
            logits = self._internal_predict_sliding_window_return_logits(
                padded, slicers, self.perform_everything_on_device
            )
        return logits[(slice(None), *unpad[1:])]

    # Points of extension

    def _prepare_run(self, arguments: Mapping[str, Any]) -> tuple[list[list[str]], list[str] | None, list[str | None]]:
        """Record model and settings, then list the cases to predict (see `case_lists`)."""
        output = arguments["output_folder_or_list_of_truncated_output_files"]
        previous_stage = arguments["folder_with_segs_from_prev_stage"]
        folder = _output_folder(output)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            self._write_provenance(folder, arguments)
        if self.configuration_manager.previous_stage_name is not None:
            assert previous_stage is not None, (
                f"this configuration continues {self.configuration_manager.previous_stage_name}: predict the same "
                "images with that one first, then pass the folder of its label maps here "
                "(folder_with_segs_from_prev_stage)"
            )
        elif previous_stage is not None:
            raise ValueError("this configuration has no previous stage, but predictions of one were given")
        return self._manage_input_and_output_lists(
            arguments["list_of_lists_or_source_folder"],
            output,
            previous_stage,
            arguments["overwrite"],
            arguments.get("part_id", 0),
            arguments.get("num_parts", 1),
            arguments["save_probabilities"],
        )

    def _predict_item(self, name: str, item: Item) -> np.ndarray:
        """Return the logits of a preprocessed case."""
        data = item["data"]
        data = _load_and_delete(data) if isinstance(data, (str, os.PathLike)) else data
        logger.info("predicting case %s, shape %s", Path(name).name, tuple(data.shape[1:]))
        return self.predict_logits_from_preprocessed_data(data).cpu().detach().numpy()

    def _name_of(self, item: Item) -> str | None:
        """Return a case's name: the path of its output without ending."""
        if item["ofile"] is None:
            return None
        ending, reader = self.dataset_json["file_ending"], self.plans_manager.image_reader_writer_class
        return case_lists.name_outputs(item["ofile"], ending, reader)[0]

    def _export_call(self, logits: np.ndarray, item: Item, save_probabilities: bool) -> tuple:
        """Return the function that exports a case and its arguments; it writes files where an output is named."""
        properties, output = item["data_properties"], item["ofile"]
        if output is not None:
            return (
                public.export_prediction_from_logits,
                logits,
                properties,
                self.configuration_manager,
                self.plans_manager,
                self.dataset_json,
                output,
                save_probabilities,
            )
        return (
            public.convert_predicted_logits_to_segmentation_with_correct_shape,
            logits,
            self.plans_manager,
            self.configuration_manager,
            self.label_manager,
            properties,
            save_probabilities,
        )

    def _write_provenance(self, folder: Path, arguments: Mapping[str, Any]) -> None:
        plain = dict(arguments)
        public.recursive_fix_for_json_export(plain)
        save_json_atomically(plain, folder / "predict_from_raw_data_args.json")
        save_json_atomically(self.dataset_json, folder / "dataset.json", sort_keys=False)
        save_json_atomically(self.plans_manager.plans, folder / "plans.json", sort_keys=False)

    def _manage_input_and_output_lists(
        self,
        list_of_lists_or_source_folder: Inputs,
        output_folder_or_list_of_truncated_output_files: Outputs,
        folder_with_segs_from_prev_stage: PathOrText | None = None,
        overwrite: bool = True,
        part_id: int = 0,
        num_parts: int = 1,
        save_probabilities: bool = False,
    ) -> tuple[list[list[str]], list[str] | None, list[str | None]]:
        """Return image files, outputs or None, previous stages of cases to predict."""
        cases = case_lists.find_cases(
            list_of_lists_or_source_folder,
            output_folder_or_list_of_truncated_output_files,
            self.dataset_json,
            self.plans_manager.image_reader_writer_class,
            public.create_lists_from_splitted_dataset_folder,
            previous_stage_folder=folder_with_segs_from_prev_stage,
            overwrite=overwrite,
            save_probabilities=save_probabilities,
            part_id=part_id,
            num_parts=num_parts,
        )
        return cases.images, cases.outputs, cases.previous_stage

    def _internal_get_data_iterator_from_lists_of_filenames(
        self,
        input_list_of_lists: list[list[str]],
        seg_from_prev_stage_files: list[str | None],
        output_filenames_truncated: list[str] | None,
        num_processes: int,
    ) -> Iterator[Item]:
        return public.preprocessing_iterator_fromfiles(
            input_list_of_lists,
            seg_from_prev_stage_files,
            output_filenames_truncated,
            self.plans_manager,
            self.dataset_json,
            self.configuration_manager,
            num_processes,
            self.device.type == "cuda",
            self.verbose_preprocessing,
        )

    def _internal_get_sliding_window_slicers(self, image_size: Sequence[int]) -> list[Slicer]:
        """Return the tiles of an image `(*spatial)`; patches of two axes go through a volume slice by slice."""
        return compute_tile_slicers(image_size, self.configuration_manager.patch_size, self.tile_step_size)

    def _internal_predict_sliding_window_return_logits(
        self, data: torch.Tensor, slicers: Sequence[Slicer], do_on_device: bool = True
    ) -> torch.Tensor:
        """Predict the tiles of an image `(c, *spatial)` and blend them; the result is on the device if asked for."""
        results_device = self._network_device if do_on_device else _MAIN_MEMORY
        budget = self._current_budget()
        can_batch = self._uses_own_tiles()
        with public.tqdm(total=len(slicers), disable=not self.allow_tqdm) as bar:
            return predict_tiles(
                self._internal_maybe_mirror_and_predict,
                data,
                slicers,
                classes=self.label_manager.num_segmentation_heads,
                weight=self._tile_weight(results_device),
                device=self._network_device,
                results_device=results_device,
                budget=budget,
                tiles_at_once=lambda voxels: budget.items(voxels) if can_batch else 1,
                leave_device=self._leave_device,
                advance=bar.update,
            )

    def _internal_maybe_mirror_and_predict(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits `(b, classes, *patch)` of tiles `(b, c, *patch)`, averaged over mirrored copies."""
        axes = (self.allowed_mirroring_axes or ()) if self.use_mirroring else ()
        assert not axes or max(axes) <= x.ndim - 3, (
            f"cannot mirror along axes {tuple(axes)}: the tiles have {x.ndim - 2} spatial axes"
        )
        return mirrored_mean(self.network, x, axes, self._current_budget().items(x[:, 0].numel()))

    # Shared by the methods above

    def _tile_weight(self, device: torch.device) -> torch.Tensor | float:
        if not self.use_gaussian:
            return 1.0
        return public.compute_gaussian(
            tuple(self.configuration_manager.patch_size),
            sigma_scale=1.0 / 8,
            value_scaling_factor=10,
            dtype=torch.float32,
            device=device,
        )

    def _prepare_network(self) -> None:
        """Move the network to the device, or to main memory if the device is full."""
        self._is_device_full = False
        try:
            self.network.to(self.device)
        except RuntimeError as error:
            if self.device.type == "cpu" or not is_out_of_memory(error):
                raise
            logger.warning("out of memory on %s: predicting this case on the CPU, which is slower", self.device)
            self._is_device_full = True
            self.network.to(_MAIN_MEMORY)
        self.network.eval()
        self._speed_up(self._network_device)

    @property
    def _network_device(self) -> torch.device:
        return _MAIN_MEMORY if self._is_device_full else self.device

    def _speed_up(self, device: torch.device) -> None:
        if self.network is self._batched_network:  # others may not be made of torch's own layers
            speed_up_on_cpu_(self.network, device)

    def _leave_device(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Move the network to main memory for this case; return a predictor."""
        self.network.to(_MAIN_MEMORY)
        self._speed_up(_MAIN_MEMORY)

        def predict(tiles: torch.Tensor) -> torch.Tensor:
            with autocast_context(_MAIN_MEMORY, is_inference=True):
                return self._internal_maybe_mirror_and_predict(tiles)

        return predict

    def _current_budget(self) -> ForwardBudget:
        """Return how much may enter the network at once; nothing but one tile if it is not the one we were given.

        Programs put exported networks in the place of ours, which take batches of one only.
        """
        if self.network is None or self.network is not self._batched_network:
            return ForwardBudget(0)
        basis = (self.device, self.label_manager.num_segmentation_heads)
        if self._budget is None or self._budget_basis != basis:
            self._budget, self._budget_basis = budget_for(*basis), basis
        return self._budget

    def _uses_own_tiles(self) -> bool:
        """Tell whether tiles may be batched: not if a subclass or program handles them, or the network is compiled."""
        hooks = ("_internal_maybe_mirror_and_predict", "_internal_get_sliding_window_slicers")
        is_ours = all(
            hook not in vars(self) and getattr(type(self), hook) is getattr(nnUNetPredictor, hook) for hook in hooks
        )
        # A compiled network is compiled again for the odd number of tiles that comes last.
        return is_ours and not _is_compiled(self.network)


def _wants_compilation() -> bool:
    return os.environ.get("nnUNet_compile", "").lower() in ("true", "1", "t")


def _compiled(network: nn.Module) -> nn.Module:
    already = _is_compiled(network) or _is_compiled(getattr(network, "module", network))
    return network if already else cast(nn.Module, torch.compile(network))


def _is_compiled(network: nn.Module) -> bool:
    return hasattr(network, "_orig_mod")


def _bare(network: nn.Module) -> nn.Module:
    return getattr(network, "_orig_mod", network)


def _if_set(use_cropped_logits_resampling: bool) -> dict[str, bool]:
    """Pass the option on only where it is used: subclasses and replaced functions may not know it."""
    return {"use_cropped_logits_resampling": True} if use_cropped_logits_resampling else {}


def _with_options(options: Mapping[str, Any], function: Any, *arguments: Any) -> Any:
    return function(*arguments, **options)


def _load_and_delete(path: PathOrText) -> torch.Tensor:
    data = torch.from_numpy(np.load(path))
    Path(path).unlink()
    return data


def _output_folder(outputs: Outputs) -> Path | None:
    if outputs is None:
        return None
    if case_lists.is_path(outputs):
        return Path(outputs)
    return Path(outputs[0]).parent if len(outputs) else None


def _as_list(value: Any, single: type | tuple[type, ...]) -> list | None:
    if value is None:
        return None
    return [value] if isinstance(value, single) else list(value)


def _stop_workers(iterator: Iterable[Item]) -> None:
    """End the workers that prepare an iterator's cases, batchgenerators' or ours."""
    if isinstance(iterator, public.MultiThreadedAugmenter):
        iterator._finish()
    elif isinstance(iterator, (PreprocessedCases, GeneratorType)):
        iterator.close()
