"""Lots: who is drawn how often, and what the workers load."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_federation import wait_until

from nnunetv2.training.differential_privacy.lots import LotStream, PoissonSampler, secret_generator

NAMES = [f"P{number:02}" for number in range(20)]


class Numbers:
    """A loader that says who was asked for, and where."""

    def load_patient(self, patient: str) -> dict:
        if patient == "broken":
            raise RuntimeError("case 17: no such file")
        if patient == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"data": torch.zeros(2), "patient": patient, "process": os.getpid()}


class GivenLots:
    """A sampler whose lots are known, then empty for ever."""

    def __init__(self, *lots):
        self._lots = list(lots)

    def draw(self):
        return self._lots.pop(0) if self._lots else ["last"]


@pytest.mark.slow
def test_each_patient_is_drawn_with_its_chance_independent_of_the_others():
    """Over 10^5 lots: counts within five standard errors, and so are the counts of pairs and of lots in a row."""
    rate, number = 0.15, 100_000
    sampler = PoissonSampler(NAMES, rate=rate, generator=secret_generator())
    drawn = np.zeros((number, len(NAMES)), bool)
    index = {name: i for i, name in enumerate(NAMES)}
    for step in range(number):
        drawn[step, [index[name] for name in sampler.draw()]] = True

    def off(share, expected, trials=number):
        return np.abs(share - expected) / math.sqrt(expected * (1 - expected) / trials)

    assert off(drawn.mean(0), rate).max() < 5  # of 20 values, one beyond 5 in 10^5 trials of this test
    pairs = (drawn.T.astype(float) @ drawn) / number
    assert off(pairs[np.triu_indices(len(NAMES), 1)], rate**2).max() < 5.5
    assert off((drawn[1:] & drawn[:-1]).mean(), rate**2, (number - 1) * len(NAMES)) < 5
    sizes = drawn.sum(1)
    empty = (1 - rate) ** len(NAMES)
    assert off((sizes == 0).mean(), empty) < 5
    assert sizes.var() == pytest.approx(len(NAMES) * rate * (1 - rate), rel=0.05)


def test_everybody_can_be_in_every_lot():
    sampler = PoissonSampler(NAMES, rate=1.0, generator=secret_generator())
    assert sampler.draw() == NAMES


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1])
def test_chances_that_are_none_are_refused(rate):
    with pytest.raises(ValueError, match="chance of a patient"):
        PoissonSampler(NAMES, rate=rate, generator=secret_generator())


@pytest.mark.parametrize("seed", [0, 1])
def test_lots_do_not_follow_from_a_seed(seed, monkeypatch):
    monkeypatch.setenv("nnUNet_seed", str(seed))
    lots = []
    for _ in range(2):
        np.random.seed(seed)
        sampler = PoissonSampler(NAMES, rate=0.5, generator=secret_generator())
        lots.append([sampler.draw() for _ in range(20)])
    assert lots[0] != lots[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_gives_the_patients_of_each_lot_in_order(num_workers):
    lots = [["a", "b", "c"], [], ["a"], list("defghij"), []]
    stream = LotStream(GivenLots(*lots), Numbers(), num_workers=num_workers)
    stream.start()
    try:
        batches = [list(next(stream)["patients"]) for _ in lots]
    finally:
        stream.close()
    assert [[batch["patient"] for batch in lot] for lot in batches] == lots
    processes = {batch["process"] for lot in batches for batch in lot}
    assert (processes == {os.getpid()}) == (num_workers == 0)


def test_what_fails_in_a_worker_is_raised_with_its_text():
    stream = LotStream(GivenLots(["a", "broken"]), Numbers(), num_workers=1)
    try:
        with pytest.raises(RuntimeError, match="case 17: no such file"):
            list(next(stream)["patients"])
    finally:
        stream.close()


def test_a_worker_that_was_killed_is_noticed():
    stream = LotStream(GivenLots(["deadly"]), Numbers(), num_workers=1)
    try:
        with pytest.raises(RuntimeError, match="background workers are no longer alive"):
            list(next(stream)["patients"])
    finally:
        stream.close()


def test_no_more_patients_are_loaded_ahead_than_workers_need():
    asked = []

    class Counting(GivenLots):
        def draw(self):
            asked.append(1)
            return ["a"] * 50

    stream = LotStream(Counting(), Numbers(), num_workers=1)
    try:
        stream.start()
        assert len(stream._loading) == 2 and len(asked) == 1
    finally:
        stream.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_end_with_the_process_that_started_them(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:  # a process that is killed while its workers wait
        stream = LotStream(GivenLots(*[["a"]] * 3), Numbers(), num_workers=1)
        found = next(iter(next(stream)["patients"]))
        os.write(writer, str(found["process"]).encode())
        signal.pause()
    worker = int(os.read(reader, 100))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

    def has_ended() -> bool:
        try:
            stat = Path(f"/proc/{worker}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        return stat.rpartition(")")[2].split()[0] == "Z"

    wait_until(has_ended)
