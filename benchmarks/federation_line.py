"""Measure a training's delay by a federation on its line: real trainers whose iterations only wait.

Two sites, each a process with the real trainer, client and network of 31.2 million parameters, reach a real coordinator
over lines that the kernel shapes (`shaped_lines.py`), or through relays where that cannot be had. Iterations are
replaced by waiting, so that an epoch of the plain trainer, which runs beside the first measurement, takes 30 s on any
machine. The rest is as ever: hooks, copies of weights, exchange, checkpoints. An epoch lasts from one `on_epoch_start`
to the next.

How long the validation takes matters, since it hides the exchange. An epoch has 250 iterations of training and 50 of
validation, which only go forward; backward takes about twice as long as forward, so the validation takes
50 / (3 * 250 + 50) of an epoch, 1.9 s.

On a line of 4 Mbit/s (`measure_slow`), epochs take 60 s, and weights travel in eight bits after every third one. Lines
are that slow from the first epoch on: the initial weights, which come once and in float32, would take minutes.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.federation_coordinator import address, make_federation, running
from benchmarks.federation_load import SlowLine
from benchmarks.shaped_lines import HOST, can_be_shaped, change_rate, enter, shaped_lines
from nnunetv2.federated.privacy.min_cases import VARIABLE as MIN_CASES_VARIABLE
from nnunetv2.federated.site.credential import SiteCredential

GIGABIT, FOUR_MEGABIT = 125e6, 5e5
"""Bytes per second."""
FEATURES = (32, 64, 128, 256, 320, 320)
WANTED, WANTED_ON_SLOW_LINE = 0.05, 0.1
DEFAULT_EVERY = 5
PLAIN = "nnUNetTrainer"
BEGUN = "begun"


@dataclass(frozen=True)
class Pace:
    """How long epochs take, and how many are measured."""

    epoch_s: float = 30.0
    num_epochs: int = 3
    """The training ends before its last epoch, whose validation hides nothing."""

    @property
    def validation_s(self) -> float:
        """Return the part of an epoch that the validation takes."""
        return self.epoch_s * 50 / (3 * 250 + 50)


FAST = Pace()
SLOW_EVERY = 3
SLOW = Pace(epoch_s=60.0, num_epochs=3 * SLOW_EVERY)


@dataclass(frozen=True)
class Epochs:
    """The times of a training's epochs."""

    seconds: list[float]
    waited: list[float]
    """For the exchange, with nothing else to do."""


class EnoughError(Exception):
    """All epochs that are measured are over."""


def train(
    folder: Path, trainer_name: str, credential: SiteCredential | None, namespace: str | None = None, pace: Pace = FAST
) -> Epochs:
    """Train in this process, and return the times of the epochs.

    Args:
        folder: Of this site; a file BEGUN appears there with the first epoch.
        namespace: The network namespace to train in.
    """
    if namespace is not None:
        enter(namespace)
    os.environ.update({root: str(folder / root) for root in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")})
    os.environ[MIN_CASES_VARIABLE] = "1"  # the dataset is tiny
    import torch

    torch.set_num_threads(1)
    plans, dataset_json = make_dataset(folder / "nnUNet_preprocessed")
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = make_trainer_class(trainer_name, pace, folder / BEGUN)(
            plans, "3d_fullres", 0, dataset_json, torch.device("cpu")
        )
        trainer.credential = credential
        with contextlib.suppress(EnoughError):
            trainer.run_training()
    return Epochs([late - early for early, late in zip(trainer.begun, trainer.begun[1:])], trainer.waited)


def make_dataset(preprocessed: Path) -> tuple[dict, dict]:
    """Write a tiny dataset, and return it with plans for a network of real size."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from tiny_dataset import NAME, make_tiny_dataset

    plans = make_tiny_dataset(preprocessed, stages=len(FEATURES))
    configuration = plans["configurations"]["3d_fullres"]
    configuration["patch_size"] = [128] * 3
    configuration["architecture"]["arch_kwargs"]["features_per_stage"] = list(FEATURES)
    return plans, json.loads((preprocessed / NAME / "dataset.json").read_text())


def make_trainer_class(name: str, pace: Pace, begun: Path) -> type:
    """Return a trainer of that name whose iterations wait; it makes the file `begun` when the first epoch begins."""
    import numpy as np
    import torch

    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.training.nnUNetTrainer.variants.federated import nnUNetTrainerFedAvg

    base = nnUNetTrainer if name == PLAIN else getattr(nnUNetTrainerFedAvg, name)

    class Waiting(base):
        def get_dataloaders(self):
            self.begun, self.waited = [], []
            return iter(()), iter(())

        def on_train_start(self):
            super().on_train_start()
            for parameter in self.network.parameters():  # those that the first iteration would have made
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

        def on_epoch_start(self):
            self.begun.append(time.monotonic())
            begun.touch()
            if self.current_epoch == pace.num_epochs:
                raise EnoughError
            super().on_epoch_start()

        def _run_steps(self, phase, step, batches, number):
            end = time.monotonic() + (pace.epoch_s - pace.validation_s if phase == "training" else pace.validation_s)
            while (left := end - time.monotonic()) > 0:
                for parameter in self.network.parameters():  # trained weights stay in memory and caches
                    parameter.detach().add_(self.optimizer.state[parameter]["momentum_buffer"])  # zeros
                time.sleep(min(1.0, max(0.0, left)))
            counts = {name: np.ones(2) for name in ("tp_hard", "fp_hard", "fn_hard")}
            return [{"loss": np.float32(0.5), **counts}] * number

        def report_round(self, aggregate, *, waited_s, **others):
            self.waited.append(waited_s)
            super().report_round(aggregate, waited_s=waited_s, **others)

    Waiting.__name__ = name
    return Waiting


# ---------------------------------------------------------------------------------------------------------- measuring
def measure(folder: Path) -> None:
    """Print the time of an epoch, alone and in a federation."""
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        alone = pool.submit(train, folder / "alone", PLAIN, None)
        is_shaped = can_be_shaped()
        print(
            f"\nepochs of {FAST.epoch_s:.0f} s, {FAST.validation_s:.1f} s of it validation, two sites at 1 Gbit/s "
            f"({'shaped by the kernel' if is_shaped else 'relays'}), load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        never = measure_federation(
            folder / "never", pool, "nnUNetTrainerAsymFedAvg", validate_every=0, is_shaped=is_shaped
        )
        plain = statistics.median(alone.result().seconds)
        print(f"  {PLAIN}: {plain:.2f} s")
        always = measure_federation(
            folder / "always", pool, "nnUNetTrainerAsymFedAvg", validate_every=1, is_shaped=is_shaped
        )
        overlapped = measure_federation(
            folder / "overlapped", pool, "nnUNetTrainerAsymFedAvgOverlapped", validate_every=0, is_shaped=is_shaped
        )
    default = never.seconds + (always.seconds - never.seconds) / DEFAULT_EVERY
    print(f"  nnUNetTrainerAsymFedAvg, no average validated: {never.beside(plain)}")
    print(f"  the same, every average validated: {always.beside(plain)}")
    print(
        f"  the same, every {DEFAULT_EVERY}th validated, from these two: {default / plain - 1:.1%} (wanted: at most "
        f"{WANTED:.0%})"
    )
    print(
        f"  nnUNetTrainerAsymFedAvgOverlapped, no average validated: {overlapped.beside(plain)}; load "
        f"{os.getloadavg()[0]:.1f}",
        flush=True,
    )


@dataclass(frozen=True)
class Cost:
    """Medians over the epochs of all sites, in seconds."""

    seconds: float
    waited: float

    def beside(self, plain: float) -> str:
        """Compare with the epoch of a training without a federation."""
        return (
            f"{self.seconds:.2f} s, {self.seconds / plain - 1:.1%} more; {self.waited:.2f} s of it waiting for the "
            "exchange"
        )


def measure_federation(
    folder: Path, pool: ProcessPoolExecutor, trainer_name: str, *, validate_every: int, is_shaped: bool
) -> Cost:
    """Let two sites train with a coordinator of their own."""
    tokens = make_federation(folder / "federation", 2, num_epochs=FAST.num_epochs + 2, validate_every=validate_every)
    with contextlib.ExitStack() as stack:
        lines = open_lines(stack, folder / "federation", len(tokens), is_shaped=is_shaped)
        trainings: list[Future[Epochs]] = []
        for (site, token), (url, namespace) in zip(tokens.items(), lines):
            credential = SiteCredential(url, "benchmark", site, token, insecure=True)
            trainings.append(pool.submit(train, folder / site, trainer_name, credential, namespace))
        epochs = [training.result() for training in trainings]
    return Cost(
        statistics.median(one for site in epochs for one in site.seconds),
        statistics.median(one for site in epochs for one in site.waited),
    )


def open_lines(
    stack: contextlib.ExitStack, federation: Path, number: int, *, is_shaped: bool
) -> list[tuple[str, str | None]]:
    """Run a coordinator behind so many lines; return where each site reaches it, and from which namespace."""
    if is_shaped:
        namespaces = stack.enter_context(shaped_lines(number, GIGABIT))
        coordinator = stack.enter_context(running(federation, "--host", HOST, "--insecure"))
        return [(coordinator.url, namespace) for namespace in namespaces]
    coordinator = stack.enter_context(running(federation))
    relays = [stack.enter_context(SlowLine(address(coordinator.url), GIGABIT)) for _ in range(number)]
    return [(f"http://127.0.0.1:{relay.port}", None) for relay in relays]


# -------------------------------------------------------------------------------------------------------- a slow line
def measure_slow(folder: Path) -> None:
    """Print the time of rounds of three epochs in eight bits, alone and in a federation, at 4 Mbit/s."""
    if not can_be_shaped():
        print("\nlines of 4 Mbit/s cannot be shaped here: that takes Linux, root, and the commands ip and tc")
        return
    trainers = ("nnUNetTrainerAsymFedAvg", "nnUNetTrainerAsymFedAvgOverlapped")
    with (
        shaped_lines(2 * len(trainers), GIGABIT) as namespaces,
        ProcessPoolExecutor(2 * len(trainers) + 1, multiprocessing.get_context("spawn")) as pool,
        contextlib.ExitStack() as stack,
    ):
        load = os.getloadavg()[0]
        begun = {
            name: begin_on_slow_lines(folder / name, name, namespaces[2 * index : 2 * index + 2], pool, stack)
            for index, name in enumerate(trainers)
        }
        trainings = [one for of_trainer in begun.values() for one in of_trainer]
        slow_down_when_begun(dict(zip(namespaces, sites_of(folder, trainers))), trainings)
        alone = pool.submit(train, folder / "alone", PLAIN, None, None, SLOW)
        rounds = {
            name: [seconds for one in trainings for seconds in rounds_of(one.result())]
            for name, trainings in begun.items()
        }
        plain = statistics.mean(rounds_of(alone.result()))
    print(
        f"\nrounds of {SLOW_EVERY} epochs of {SLOW.epoch_s:.0f} s, {SLOW.validation_s:.1f} s of it validation, "
        f"in int8, two sites at 4 Mbit/s; load {load:.1f} and {os.getloadavg()[0]:.1f}\n  {PLAIN}: {plain:.1f} s"
    )
    for name, seconds in rounds.items():
        print(
            f"  {name}: {statistics.mean(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f}), "
            f"{statistics.mean(seconds) / plain - 1:.1%} more (wanted: at most {WANTED_ON_SLOW_LINE:.0%})",
            flush=True,
        )


def begin_on_slow_lines(
    folder: Path, trainer_name: str, namespaces: list[str], pool: ProcessPoolExecutor, stack: contextlib.ExitStack
) -> list[Future[Epochs]]:
    """Let a site per namespace train with a coordinator of their own, which runs as long as the stack is open."""
    tokens = make_federation(
        folder / "federation",
        len(namespaces),
        num_epochs=SLOW.num_epochs + 2,
        precision="int8",
        exchange_every=SLOW_EVERY,
    )
    coordinator = stack.enter_context(running(folder / "federation", "--host", HOST, "--insecure"))
    return [
        pool.submit(
            train,
            folder / site,
            trainer_name,
            SiteCredential(coordinator.url, "benchmark", site, token, insecure=True),
            namespace,
            SLOW,
        )
        for (site, token), namespace in zip(tokens.items(), namespaces)
    ]


def sites_of(folder: Path, trainers: tuple[str, ...]) -> list[Path]:
    """Return the folders of the sites, in the order of their namespaces."""
    return [folder / name / site for name in trainers for site in ("site000", "site001")]


def slow_down_when_begun(sites: dict[str, Path], trainings: list[Future[Epochs]]) -> None:
    """Give each line its rate when its site has begun the first epoch; raise errors of trainings before."""
    deadline = time.monotonic() + 600
    while sites:
        for training in trainings:
            if training.done():
                training.result()
        begun = [namespace for namespace, site in sites.items() if (site / BEGUN).exists()]
        change_rate(begun, FOUR_MEGABIT)
        sites = {namespace: site for namespace, site in sites.items() if namespace not in begun}
        if time.monotonic() > deadline:
            raise TimeoutError(f"{min(map(str, sites.values()))} has not begun within 10 minutes")
        time.sleep(0.2)


def rounds_of(epochs: Epochs) -> list[float]:
    """Return the times of rounds, without the first one, in which nothing of an earlier one is exchanged."""
    seconds = epochs.seconds
    return [sum(seconds[begin : begin + SLOW_EVERY]) for begin in range(SLOW_EVERY, len(seconds), SLOW_EVERY)]
