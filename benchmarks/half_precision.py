"""Measure half precision on the wire: the costs of conversion and closing, and the results of small trainings.

    python -m benchmarks.half_precision [--only conversion closing training] [--rounds 30] [--seeds 3]

Bytes are counted by `federated_traffic.py --precision float16`. Closing is the aggregation of three updates in files,
with the rounding of the aggregate to download. The trainings are those of nnU-Net's trainer, of tiny networks at three
sites with cases of their own; between the epochs weights pass through documents as in a federation, but in one process,
so that chance is the same in float32, in float16, and in float16 whose rests are forgotten.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2.federated.aggregation import pooled_validation
from nnunetv2.federated.aggregation.codecs import codec_of, float16
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.document import TensorSpec, open_document, write_document

PROJECT = Path(__file__).resolve().parents[1]
PARAMETERS = 31_200_000
TENSORS = 60
SITES = ("A", "B", "C")
ITERATIONS, VALIDATIONS, CASES = 8, 25, 6
KINDS = ("float32", "float16", "float16 without feedback")
PARTS = ("conversion", "closing", "training")


def fastest(function: Callable[[], Any], repeats: int = 5) -> float:
    """Return the least of the seconds that a function takes."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


# -------------------------------------------------------------------------------------------------- 31.2 M parameters
def large_weights(seed: int) -> dict[str, np.ndarray]:
    """Draw weights of the size of nnU-Net's default 3D network."""
    rng = np.random.default_rng(seed)
    return {
        f"layer.{number:02}": rng.standard_normal(PARAMETERS // TENSORS, np.float32) / 50 for number in range(TENSORS)
    }


def measure_conversion() -> None:
    """Time the steps of a site to send and take over weights."""
    weights = large_weights(0)
    feedback = float16.Float16WithErrorFeedback()
    sent = feedback.encode(weights)
    feedback.settle()
    print(
        f"round with feedback: {fastest(lambda: feedback.encode(weights)):.2f} s, "
        f"widen: {fastest(lambda: [values.astype(np.float32) for values in sent.values()]):.2f} s"
    )


def measure_closing(folder: Path) -> None:
    """Time the aggregation of three updates, and of the file to download where that is one of its own."""
    for precision in ("float32", "float16"):
        documents = [
            write(folder / f"{precision}.{site}", large_weights(seed), precision if seed else "float32")
            for seed, site in enumerate(("before", *SITES))
        ]
        aggregate = fastest(lambda: merge(documents[0], documents[1:], folder / "result", precision), 3)  # noqa: B023
        publish = 0.0
        if precision == "float16":
            publish = fastest(
                lambda: float16.write_rounded(
                    open_document(folder / "result"), folder / "half", open_document(folder / "result").specs
                ),
                3,
            )
        print(f"{precision}: aggregate {aggregate:.2f} s, round and write for the sites {publish:.2f} s")


# ------------------------------------------------------------------------------------------------------------ a round
def write(path: Path, weights: Mapping[str, np.ndarray], precision: str = "float32") -> Path:
    """Write weights as an update."""
    weights = {name: float16.rounded(values) if precision == "float16" else values for name, values in weights.items()}
    specs = {name: TensorSpec.of(values) for name, values in weights.items()}
    write_document(path, messages.Update(), specs, weights.values())
    return path


def merge(before: Path, updates: Sequence[Path], result: Path, precision: str) -> None:
    """Aggregate a complete round as the coordinator does."""
    with ExitStack() as stack:
        previous, *documents = [stack.enter_context(open_document(path)) for path in (before, *updates)]
        sites = dict(zip(SITES, documents))
        codec_of(precision).combine(
            sites,
            dict.fromkeys(sites, 1.0),
            out_path=result,
            previous=previous,
            message=messages.Aggregate(round=0, contributors=dict.fromkeys(sites, 1.0)),
            min_sites=1,
        )


class Wire:
    """The way of the weights through a federation, round by round."""

    def __init__(self, folder: Path, kind: str, initial: Mapping[str, np.ndarray]) -> None:
        self.folder, self.kind = folder, kind
        self.precision = kind.split()[0]
        self._feedback = [float16.Float16WithErrorFeedback() for _ in SITES]
        folder.mkdir()
        self._last = write(folder / "initial", initial)

    def download(self) -> dict[str, np.ndarray]:
        """Return the weights that all sites go on from."""
        with open_document(self._last) as document:
            kept = {name: document.read(name).copy() for name in document.specs}
        if self.precision == "float32":
            return kept
        handed_out = {name: float16.rounded(values) for name, values in kept.items()}
        if self.kind == KINDS[2]:  # then no rest is left for the next round
            write(self._last, {name: values.astype(np.float32) for name, values in handed_out.items()})
        return handed_out

    def send(self, updates: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Let the sites send these weights, and the coordinator close the round."""
        if self.precision == "float16":
            updates = [feedback.encode(weights) for feedback, weights in zip(self._feedback, updates)]
        if self.kind == "float16":
            for feedback in self._feedback:
                feedback.settle()
        paths = [write(self.folder / site, weights) for site, weights in zip(SITES, updates)]
        merge(self._last, paths, self.folder / "result", self.precision)
        self._last = (self.folder / "result").rename(self.folder / "last")


# ---------------------------------------------------------------------------------------------------------- trainings
def make_trainers(folder: Path, rounds: int, rate: float) -> list[Any]:
    """Write a tiny dataset per site, and construct its trainer."""
    import torch

    sys.path.insert(0, str(PROJECT / "tests"))
    from tiny_dataset import NAME, make_dataset_json, make_tiny_dataset, write_case

    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    trainers = []
    for number, site in enumerate(SITES):
        for root in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            os.environ[root] = str(folder / site / root)
        preprocessed = folder / site / "nnUNet_preprocessed"
        plans = make_tiny_dataset(preprocessed, cases=0)
        for case in range(CASES):
            write_case(
                preprocessed / NAME / "nnUNetPlans_3d_fullres",
                preprocessed / NAME / "gt_segmentations",
                f"case_{case:02}",
                np.random.default_rng([number, case]),
            )
        trainer = nnUNetTrainer(
            {**plans, "continue_training": False}, "3d_fullres", 0, make_dataset_json(), torch.device("cpu")
        )
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.initial_lr = rounds, ITERATIONS, rate
        trainer.print_to_log_file = lambda *words, **options: None
        trainer.initialize()
        trainer.on_train_start()
        trainers.append(trainer)
    return trainers


def train(
    folder: Path, kind: str, *, rounds: int, rate: float, seed: int
) -> tuple[float, float, dict[str, np.ndarray]]:
    """Train at all sites; return the loss and the mean Dice of the last aggregate, and that itself."""
    from nnunetv2.training.nnUNetTrainer.variants.federated.network_weights import export_weights, import_weights_
    from nnunetv2.training.seeding import seed_everything

    folder.mkdir()
    seed_everything(seed)
    trainers = make_trainers(folder, rounds, rate)
    wire = Wire(folder / "wire", kind, export_weights(trainers[0].network))
    weights = wire.download()
    for number in range(rounds):
        updates = []
        for index, trainer in enumerate(trainers):
            import_weights_(trainer.network, weights)
            seed_everything(1000 * (1000 * seed + number) + index)
            trainer.current_epoch = number
            trainer.on_train_epoch_start()
            for _ in range(ITERATIONS):
                trainer.train_step(next(trainer.dataloader_train))
            updates.append(export_weights(trainer.network))
        wire.send(updates)
        weights = wire.download()
    found = list(validate(trainers, weights, seed))
    counted = [sum(one[name] for one in found) for name in ("tp_hard", "fp_hard", "fn_hard")]
    dice = statistics.fmean(pooled_validation.dice_per_class(*counted))
    for trainer in trainers:
        trainer._shut_down_dataloaders()
    return (
        statistics.fmean(float(one["loss"]) for one in found),
        dice,
        {name: values.astype(np.float64) for name, values in weights.items()},
    )


def validate(trainers: Sequence[Any], weights: Mapping[str, np.ndarray], seed: int) -> Iterator[dict[str, Any]]:
    """Take the validation steps of all sites on an aggregate."""
    import torch

    from nnunetv2.training.nnUNetTrainer.variants.federated.network_weights import import_weights_
    from nnunetv2.training.seeding import seed_everything

    for trainer in trainers:
        import_weights_(trainer.network, weights)
        seed_everything(seed)
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            for _ in range(VALIDATIONS):
                yield trainer.validation_step(next(trainer.dataloader_val))


def measure_training(folder: Path, *, rounds: int, rates: Sequence[float], seeds: int) -> None:
    """Train with every learning rate and seed in each of the three ways, and print where they end."""
    print("| rate | seed | " + " | ".join(f"{kind}: loss, Dice, distance" for kind in KINDS) + " |")
    for rate, seed in product(rates, range(seeds)):
        with redirect_stdout(StringIO()):  # trainers like to talk
            ends = {
                kind: train(folder / f"{rate}.{seed}.{number}", kind, rounds=rounds, rate=rate, seed=seed)
                for number, kind in enumerate(KINDS)
            }
        reference = ends["float32"][2]
        cells = [f"{loss:.4f}, {dice:.4f}, {distance(weights, reference):.1e}" for loss, dice, weights in ends.values()]
        print(f"| {rate:g} | {seed} | " + " | ".join(cells) + " |", flush=True)


def distance(weights: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> float:
    """Return how far weights are from others, of the size of those."""
    difference = sum(np.square(weights[name] - values).sum() for name, values in reference.items())
    return math.sqrt(difference / sum(np.square(values).sum() for values in reference.values()))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=(1e-2, 1e-5))
    arguments = parser.parse_args(argv)
    os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_cpu_autocast": "0", "MPLBACKEND": "Agg"}
    with tempfile.TemporaryDirectory() as name:
        if "conversion" in arguments.only:
            measure_conversion()
        if "closing" in arguments.only:
            measure_closing(Path(name))
        if "training" in arguments.only:
            measure_training(Path(name), rounds=arguments.rounds, rates=arguments.rates, seeds=arguments.seeds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
