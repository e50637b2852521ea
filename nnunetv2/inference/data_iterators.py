"""Iterate over cases that are ready for the network. The work is in `preprocessing_jobs`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.synchronize import Event
from queue import Queue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from batchgenerators.dataloading.data_loader import DataLoader

from nnunetv2.inference.preprocessing_jobs import (
    ArrayCase,
    Case,
    FileCase,
    Item,
    Model,
    PreprocessedCases,
    offer,
    preprocess_case,
)

if TYPE_CHECKING:
    from nnunetv2.plans.plans_manager import ConfigurationManager, PlansManager
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

Properties = Mapping[str, Any]


def preprocessing_iterator_fromfiles(
    list_of_lists: Sequence[Sequence[str]],
    list_of_segs_from_prev_stage_files: Sequence[str | None] | None,
    output_filenames_truncated: Sequence[str] | None,
    plans_manager: PlansManager,
    dataset_json: dict,
    configuration_manager: ConfigurationManager,
    num_processes: int,
    pin_memory: bool = False,
    verbose: bool = False,
) -> Iterator[Item]:
    """Yield preprocessed cases in order, as dicts of `data` (tensor), `data_properties` and `ofile`.

    Args:
        list_of_lists: Per case its image files, one per channel.
        output_filenames_truncated: Per case where its prediction goes, without ending.
        num_processes: Workers that prepare cases ahead; 0 prepares each when it is asked for.
        pin_memory: Return tensors in pinned memory, if there is a GPU.

    Raises:
        RuntimeError: A case failed or a worker died. After a failed case, `next()` goes on with the one behind it.
    """
    cases = _file_cases(list_of_lists, list_of_segs_from_prev_stage_files, output_filenames_truncated)
    model = Model(plans_manager, configuration_manager, dataset_json)
    return _iterate(cases, model, num_processes, pin_memory, verbose)


def preprocessing_iterator_fromnpy(
    list_of_images: Sequence[np.ndarray],
    list_of_segs_from_prev_stage: Sequence[np.ndarray | None] | None,
    list_of_image_properties: Sequence[Properties],
    truncated_ofnames: Sequence[str] | None,
    plans_manager: PlansManager,
    dataset_json: dict,
    configuration_manager: ConfigurationManager,
    num_processes: int,
    pin_memory: bool = False,
    verbose: bool = False,
) -> Iterator[Item]:
    """Like `preprocessing_iterator_fromfiles`, for images `(c, *spatial)` in memory. Properties stay unchanged."""
    cases = _array_cases(list_of_images, list_of_segs_from_prev_stage, list_of_image_properties, truncated_ofnames)
    model = Model(plans_manager, configuration_manager, dataset_json)
    return _iterate(cases, model, num_processes, pin_memory, verbose)


def preprocess_fromfiles_save_to_queue(
    list_of_lists: Sequence[Sequence[str]],
    list_of_segs_from_prev_stage_files: Sequence[str | None] | None,
    output_filenames_truncated: Sequence[str] | None,
    plans_manager: PlansManager,
    dataset_json: dict,
    configuration_manager: ConfigurationManager,
    target_queue: Queue,
    done_event: Event,
    abort_event: Event,
    verbose: bool = False,
) -> None:
    """Preprocess cases one after the other into a queue.

    Set `done_event` after the last, `abort_event` on failure.

    For programs with workers of their own. Stops early once `abort_event` is set.
    """
    cases = _file_cases(list_of_lists, list_of_segs_from_prev_stage_files, output_filenames_truncated)
    model = Model(plans_manager, configuration_manager, dataset_json)
    _fill_queue(cases, model, target_queue, done_event, abort_event, verbose)


def preprocess_fromnpy_save_to_queue(
    list_of_images: Sequence[np.ndarray],
    list_of_segs_from_prev_stage: Sequence[np.ndarray | None] | None,
    list_of_image_properties: Sequence[Properties],
    truncated_ofnames: Sequence[str] | None,
    plans_manager: PlansManager,
    dataset_json: dict,
    configuration_manager: ConfigurationManager,
    target_queue: Queue,
    done_event: Event,
    abort_event: Event,
    verbose: bool = False,
) -> None:
    """Like `preprocess_fromfiles_save_to_queue`, for images in memory."""
    cases = _array_cases(list_of_images, list_of_segs_from_prev_stage, list_of_image_properties, truncated_ofnames)
    model = Model(plans_manager, configuration_manager, dataset_json)
    _fill_queue(cases, model, target_queue, done_event, abort_event, verbose)


class _CaseLoader(DataLoader):
    """A finite loader of one case at a time, in order, for batchgenerators' multi-threading."""

    def __init__(
        self, cases: Sequence[Case], preprocessor: DefaultPreprocessor, model: Model, num_threads: int
    ) -> None:
        super().__init__(
            cases,
            1,
            num_threads,
            seed_for_shuffle=1,
            return_incomplete=True,
            shuffle=False,
            infinite=False,
            sampling_probabilities=None,
        )
        self.preprocessor = preprocessor
        self.model = model
        self.indices = list(range(len(cases)))

    def generate_train_batch(self) -> Item:
        """Return the next case as `preprocessing_iterator_fromfiles` would."""
        case = self._data[self.get_indices()[0]]
        return _with_tensor(case.preprocess(self.preprocessor, self.model))


class PreprocessAdapter(_CaseLoader):
    """Load cases from files: `next()` gives one item dict in order, then StopIteration."""

    def __init__(
        self,
        list_of_lists: Sequence[Sequence[str]],
        list_of_segs_from_prev_stage_files: Sequence[str | None] | None,
        preprocessor: DefaultPreprocessor,
        output_filenames_truncated: Sequence[str] | None,
        plans_manager: PlansManager,
        dataset_json: dict,
        configuration_manager: ConfigurationManager,
        num_threads_in_multithreaded: int = 1,
    ) -> None:
        cases = _file_cases(list_of_lists, list_of_segs_from_prev_stage_files, output_filenames_truncated)
        super().__init__(
            cases, preprocessor, Model(plans_manager, configuration_manager, dataset_json), num_threads_in_multithreaded
        )


class PreprocessAdapterFromNpy(_CaseLoader):
    """Load cases from arrays: `next()` gives one item dict in order, then StopIteration."""

    def __init__(
        self,
        list_of_images: Sequence[np.ndarray],
        list_of_segs_from_prev_stage: Sequence[np.ndarray | None] | None,
        list_of_image_properties: Sequence[Properties],
        truncated_ofnames: Sequence[str | None] | None,
        plans_manager: PlansManager,
        dataset_json: dict,
        configuration_manager: ConfigurationManager,
        num_threads_in_multithreaded: int = 1,
        verbose: bool = False,
    ) -> None:
        cases = _array_cases(list_of_images, list_of_segs_from_prev_stage, list_of_image_properties, truncated_ofnames)
        super().__init__(
            cases,
            configuration_manager.preprocessor_class(verbose=verbose),
            Model(plans_manager, configuration_manager, dataset_json),
            num_threads_in_multithreaded,
        )


def _iterate(cases: Sequence[Case], model: Model, num_workers: int, pin_memory: bool, verbose: bool) -> Iterator[Item]:
    if num_workers < 0:
        raise ValueError(f"num_processes must be at least 0, got {num_workers}")
    pin_memory = pin_memory and torch.cuda.is_available()
    return PreprocessedCases(cases, model, num_workers, verbose, lambda item: _with_tensor(item, pin_memory))


def _with_tensor(item: Item, pin_memory: bool = False) -> Item:
    tensor = torch.from_numpy(item["data"])
    return {**item, "data": tensor.pin_memory() if pin_memory else tensor}


def _fill_queue(
    cases: Sequence[Case], model: Model, queue: Queue, done_event: Event, abort_event: Event, verbose: bool
) -> None:
    try:
        for case in cases:
            item = _with_tensor(preprocess_case(case, model, verbose))
            if not offer(item, queue.put, abort_event.is_set):
                return
        done_event.set()
    except Exception:
        abort_event.set()
        raise


def _file_cases(
    list_of_lists: Sequence[Sequence[str]], previous: Sequence[str | None] | None, outputs: Sequence[str | None] | None
) -> list[FileCase]:
    previous, outputs = _one_per_case(len(list_of_lists), previous, outputs)
    return [FileCase(tuple(files), before, output) for files, before, output in zip(list_of_lists, previous, outputs)]


def _array_cases(
    images: Sequence[np.ndarray],
    previous: Sequence[np.ndarray | None] | None,
    properties: Sequence[Properties],
    outputs: Sequence[str | None] | None,
) -> list[ArrayCase]:
    if len(properties) != len(images):
        raise ValueError(f"there are {len(images)} images, but properties of {len(properties)}")
    previous, outputs = _one_per_case(len(images), previous, outputs)
    return [
        ArrayCase(image, before, about, output, number)
        for number, (image, before, about, output) in enumerate(zip(images, previous, properties, outputs))
    ]


def _one_per_case(count: int, previous: Sequence | None, outputs: Sequence | None) -> tuple[Sequence, Sequence]:
    previous = [None] * count if previous is None else previous
    outputs = [None] * count if outputs is None else outputs
    for what, values in (("segmentations of the previous stage", previous), ("output file names", outputs)):
        if len(values) != count:
            raise ValueError(f"there are {count} cases, but {len(values)} {what}")
    return previous, outputs
