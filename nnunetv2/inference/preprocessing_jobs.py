"""Preprocess cases ahead of the network, in threads or processes, and keep their order.

A case leaves here as a dict: `data` (float32 `(c, *spatial)`, in cascades with the one-hot previous stage stacked
below the image's channels), `data_properties` and `ofile` (output path without ending, or None).
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunetv2.inference.errors import UnpreparedCaseError
from nnunetv2.plans.partial_labels import without_raw_values
from nnunetv2.utilities.plain_text import log_plainly

if TYPE_CHECKING:
    from nnunetv2.plans.plans_manager import ConfigurationManager, PlansManager

# A process needs seconds to start and copies each case. Reading, resampling and compressing release the interpreter
# lock, so threads serve as well, until there is so much to do that Python's own work would slow the network down.
_CASES_WORTH_PROCESSES = 8
_BYTES_WORTH_PROCESSES = 2**30

Item = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """The parts of the model that preprocessing needs."""

    plans_manager: PlansManager
    configuration_manager: ConfigurationManager
    dataset_json: Mapping[str, Any]


@dataclass(frozen=True)
class FileCase:
    """A case in image files."""

    files: Sequence[str]
    previous_stage_file: str | None
    output: str | None

    @property
    def name(self) -> str:
        """The path that the case is written to, or else its first image."""
        return self.output or self.files[0]

    @property
    def input_bytes(self) -> int:
        """Size of the image files on disk."""
        return sum(Path(file).stat().st_size for file in self.files if Path(file).is_file())

    def preprocess(self, preprocessor: Any, model: Model) -> Item:
        """Read and preprocess the case.

        Raises:
            FileNotFoundError: The previous stage has no label map of it.
        """
        if self.previous_stage_file is not None and not Path(self.previous_stage_file).is_file():
            raise FileNotFoundError(f"there is no prediction of the previous stage, {self.previous_stage_file}")
        data, seg, properties = preprocessor.run_case(
            list(self.files),
            self.previous_stage_file,
            model.plans_manager,
            model.configuration_manager,
            without_raw_values(model.dataset_json),  # the previous stage has predicted the model's own labels
        )
        return _as_item(data, seg if self.previous_stage_file is not None else None, properties, self.output, model)


@dataclass(frozen=True)
class ArrayCase:
    """A case in memory: an image `(c, *spatial)` and its properties.

    Of these only `spacing` is needed.
    """

    image: np.ndarray
    previous_stage: np.ndarray | None
    properties: Mapping[str, Any]
    output: str | None
    number: int = 0

    @property
    def name(self) -> str:
        """The path that the case is written to, or else its number."""
        return self.output or f"number {self.number}, shape {np.shape(self.image)}"

    @property
    def input_bytes(self) -> int:
        """Size of the image in memory."""
        return self.image.nbytes

    def preprocess(self, preprocessor: Any, model: Model) -> Item:
        """Preprocess the case. Preprocessors add entries to the properties: ours is a copy."""
        from nnunetv2.preprocessing.odd_sizes import warn_of_odd_size

        data, seg, properties = preprocessor.run_case_npy(
            self.image,
            self.previous_stage,
            dict(self.properties),
            model.plans_manager,
            model.configuration_manager,
            model.dataset_json,
        )
        warn_of_odd_size(Path(self.name).name, properties, model.plans_manager, model.configuration_manager)
        return _as_item(data, seg if self.previous_stage is not None else None, properties, self.output, model)


Case = FileCase | ArrayCase


def preprocess_case(case: Case, model: Model, verbose: bool) -> Item:
    """Preprocess a case with the configuration's preprocessor.

    Raises:
        UnpreparedCaseError: Any step failed; it holds the error and the name of the case.
    """
    try:
        preprocessor = model.configuration_manager.preprocessor_class(verbose=verbose)
        item = case.preprocess(preprocessor, model)
        _check_channels(item["data"], preprocessor, model)
        return item
    except Exception as error:
        raise UnpreparedCaseError(case.name, f"{type(error).__name__}: {error}") from error


class PreprocessedCases(Iterator[Item]):
    """Hands out cases preprocessed, in their order; workers prepare those that come next.

    A case that fails raises when it is its turn, and does not end the iteration: callers that catch the error can go on
    with the next case.

    Args:
        num_workers: How many cases are worked on ahead; 0 prepares each case when it is asked for.
        finish: Applied to each item in the calling thread.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        model: Model,
        num_workers: int,
        verbose: bool,
        finish: Callable[[Item], Item] = lambda item: item,
    ) -> None:
        self._cases, self._to_do = cases, iter(cases)
        self._model, self._verbose, self._finish = model, verbose, finish
        self._num_workers = min(num_workers, len(cases))
        self._executor: Executor | None = None
        self._waiting: deque[Future] = deque()

    def __next__(self) -> Item:
        """Return the next case.

        Raises:
            UnpreparedCaseError: It failed.
            RuntimeError: A worker process died, and the iteration is over. Programs look for how the text begins,
                "Background workers died.".
        """
        if self._num_workers == 0:
            return self._finish(preprocess_case(next(self._to_do), self._model, self._verbose))
        self._submit_ahead()
        if not self._waiting:
            self.close()
            raise StopIteration
        return self._finish(self._result(self._waiting.popleft()))

    def close(self) -> None:
        """Stop the workers; a case that one of them is at is not waited for."""
        self._to_do = iter(())
        self._waiting.clear()
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None

    def _submit_ahead(self) -> None:
        for case in islice(self._to_do, self._num_workers + 1 - len(self._waiting)):  # one is ready, others are made
            self._executor = self._executor or _open_executor(self._cases, self._num_workers)
            self._waiting.append(self._executor.submit(preprocess_case, case, self._model, self._verbose))

    def _result(self, future: Future) -> Item:
        try:
            return future.result()
        except BrokenProcessPool as error:
            self.close()
            raise RuntimeError(
                "Background workers died. A preprocessing process was killed, most often for lack of memory: use "
                "fewer (-npp). If none could start, a script that predicts needs `if __name__ == '__main__':` around "
                "its own code."
            ) from error


def without_unprepared(
    items: Iterable[Item], on_failure: Callable[[str, UnpreparedCaseError], object]
) -> Iterator[Item]:
    """Yield the items that can be prepared.

    Call `on_failure` with the name and error of each case that cannot.
    """
    items = iter(items)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except UnpreparedCaseError as error:
            on_failure(error.case, error)
            continue
        yield item


def _open_executor(cases: Sequence[Case], num_workers: int) -> Executor:
    is_much = len(cases) >= _CASES_WORTH_PROCESSES and sum(case.input_bytes for case in cases) > _BYTES_WORTH_PROCESSES
    if num_workers > 1 and is_much:
        return ProcessPoolExecutor(
            num_workers, mp_context=multiprocessing.get_context("spawn"), initializer=log_plainly
        )
    return ThreadPoolExecutor(num_workers, thread_name_prefix="preprocessing")


def _as_item(
    data: np.ndarray, previous_stage: np.ndarray | None, properties: Mapping[str, Any], output: str | None, model: Model
) -> Item:
    if previous_stage is not None:
        data = np.vstack((data, _one_hot(previous_stage[0], model, data.dtype)))
    return {"data": np.ascontiguousarray(data, dtype=np.float32), "data_properties": properties, "ofile": output}


def _check_channels(data: np.ndarray, preprocessor: object, model: Model) -> None:
    """Check that a case has as many channels as the network; preprocessors of others may make their own."""
    from nnunetv2.plans.plans_manager import determine_num_input_channels
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    expected = determine_num_input_channels(model.plans_manager, model.configuration_manager, model.dataset_json)
    if type(preprocessor) is DefaultPreprocessor and len(data) != expected:
        names = (model.dataset_json.get("channel_names") or model.dataset_json.get("modality", {})).values()
        raise ValueError(f"it has {len(data)} channels, but the model expects {expected} ({', '.join(names)})")


def _one_hot(labels: np.ndarray, model: Model, dtype: np.dtype) -> np.ndarray:
    from nnunetv2.plans.label_manager import convert_labelmap_to_one_hot

    foreground = model.plans_manager.get_label_manager(model.dataset_json).foreground_labels
    return convert_labelmap_to_one_hot(labels, foreground, dtype)


def offer(item: Item, put: Callable[..., None], is_aborted: Callable[[], bool]) -> bool:
    """Put an item into a bounded queue.

    Give up and return False once the consumer has stopped.
    """
    from queue import Full

    while not is_aborted():
        try:
            put(item, timeout=0.1)
        except Full:
            continue
        return True
    return False
