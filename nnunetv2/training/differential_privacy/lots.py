"""Draw lots of patients, and load their batches.

A lot is drawn as the accountant has it: each patient with the same chance, independent of all others, so lots differ in
size, and one may be empty. (nnU-Net draws a fixed number of cases with replacement, which no accountant covers.)

    lots (this process) --> patients, one after the other --> workers: read, crop, augment --> batch of one patient

Some patients are always being loaded ahead, also those of the lots that come next: who is in a lot does not depend on
anything that was learned.
"""

from __future__ import annotations

import multiprocessing
import secrets
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from nnunetv2.training.data_augmentation.augmenters import FAILURE_HINT, choose_start_method, prepare_worker
from nnunetv2.training.data_augmentation.numbered_batches import seed_generators
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.case_workers import end_with_parent
from nnunetv2.utilities.plain_text import log_plainly

READY_PER_WORKER = 2
"""Patients that are loaded ahead."""


def secret_generator() -> np.random.Generator:
    """Return a generator that nobody else can repeat.

    The system's source of secrets seeds it, with 256 bits. Neither nnUNet_seed nor NumPy's global state has any part in
    it: noise that somebody can repeat hides nothing.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(secrets.randbits(256))))


class PoissonSampler:
    """Draw each patient for a lot with the same chance, independent of all others."""

    def __init__(self, patients: Sequence[str], *, rate: float, generator: np.random.Generator) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"the chance of a patient to be drawn must be above 0 and at most 1, not {rate}")
        self._patients, self._rate, self._generator = tuple(patients), rate, generator

    def draw(self) -> list[str]:
        """Return the patients of a lot, possibly none."""
        is_drawn = self._generator.random(len(self._patients)) < self._rate
        return [patient for patient, drawn in zip(self._patients, is_drawn) if drawn]


class PatientLoader(nnUNetDataLoader):
    """Draw patches of one patient at a time, from any of its scans."""

    cases_of: Mapping[str, Sequence[str]] = {}
    patches = 1
    """Per patient. Whether one must show foreground is a matter of chance, not of its place in the batch."""

    _patient: str | None = None

    def load_patient(self, patient: str) -> dict:
        """Return a batch of patches of a patient."""
        self._patient = patient
        return self.generate_train_batch()

    def get_indices(self) -> list[str]:
        """Draw a scan of the patient for each patch."""
        assert self._patient is not None, "load_patient says whose patches"
        cases = self.cases_of[self._patient]
        return [cases[i] for i in np.random.randint(len(cases), size=self.patches)]


class LotStream:
    """Iterate over lots, endlessly: `{"patients": iterator over the batches of its patients}`.

    A lot has to be gone through before the next one is asked for.

    Args:
        sampler: Draws the lots.
        loader: Loads a patient. Workers get copies of it.
        num_workers: Processes that load; 0: this one.
    """

    def __init__(self, sampler: PoissonSampler, loader: PatientLoader, *, num_workers: int) -> None:
        self._sampler, self._loader, self._num_workers = sampler, loader, num_workers
        self._executor: ProcessPoolExecutor | None = None
        # Drawn ahead: the sizes of lots, and their patients, first those that are being loaded.
        self._sizes: deque[int] = deque()
        self._loading: deque[Future[dict]] = deque()
        self._waiting: deque[str] = deque()

    def __iter__(self) -> LotStream:
        return self

    def __next__(self) -> dict[str, Iterator[dict]]:
        """Return the next lot."""
        if not self._num_workers:
            return {"patients": map(self._loader.load_patient, self._sampler.draw())}
        self._load_ahead()
        return {"patients": self._take(self._sizes.popleft())}

    def start(self) -> None:
        """Start the workers early, so that the first patients are on their way."""
        if self._num_workers:
            self._load_ahead()

    def close(self) -> None:
        """End the workers."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None
        self._num_workers = 0
        self._loading.clear()

    def _load_ahead(self) -> None:
        while len(self._loading) < READY_PER_WORKER * self._num_workers:
            if self._waiting:
                self._loading.append(self._submit(self._waiting.popleft()))
            else:
                lot = self._sampler.draw()
                self._sizes.append(len(lot))
                self._waiting.extend(lot)

    def _take(self, size: int) -> Iterator[dict]:
        for _ in range(size):
            batch = self._result(self._loading.popleft())
            self._load_ahead()
            yield batch

    def _submit(self, patient: str) -> Future[dict]:
        if self._executor is None:
            context = multiprocessing.get_context(choose_start_method())
            self._executor = ProcessPoolExecutor(
                self._num_workers, mp_context=context, initializer=_become_worker, initargs=(self._loader,)
            )
        with warnings.catch_warnings():
            # Python 3.12 and later warn of forks beside threads. The workers use one thread and none of ours.
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            return self._executor.submit(_load_patient, patient)

    def _result(self, future: Future[dict]) -> dict:
        try:
            return future.result()
        except BrokenProcessPool as error:
            self.close()
            raise RuntimeError(f"One or more background workers are no longer alive.\n{FAILURE_HINT}") from error


_loader_of_worker: PatientLoader | None = None


def _become_worker(loader: PatientLoader) -> None:
    """Prepare a process that loads patients."""
    global _loader_of_worker
    threading.Thread(target=end_with_parent, daemon=True).start()
    log_plainly()
    prepare_worker()
    seed_generators(secrets.randbits(128))
    _loader_of_worker = loader


def _load_patient(patient: str) -> dict:
    assert _loader_of_worker is not None
    return _loader_of_worker.load_patient(patient)
