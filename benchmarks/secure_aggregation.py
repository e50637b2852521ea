"""Measure masked rounds: bytes, processor time and memory, and whether the average is exact.

    python -m benchmarks.secure_aggregation [--sites 64] [--stages 6] [--folder F]
                                            [--only bytes site coordinator round line]

    bytes        an upload beside the plain one, with 3 to 64 sites and 1 to 10 groups
    site         processor time of a site's masked update beside the plain one, and beside the streams that it takes
    coordinator  processor time of closing a round of 8 sites beside a plain one
    round        many sites, one round with one and one with three of them gone: exact average, the coordinator's memory
    line         the time of a round of 8 sites behind one line of 1 Gbit/s, beside the same round in clear

6 stages are nnU-Net's 31.2 million parameters. `round` needs some 260 MB of disk per site for a while. Linux; `line`
needs root, and the commands ip and tc.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.federation import network_specs, sampled_memory
from benchmarks.federation_coordinator import Running, running
from benchmarks.federation_line import GIGABIT
from benchmarks.shaped_lines import HOST, can_be_shaped, enter, shaped_lines
from nnunetv2.federated.aggregation.weighted_mean import aggregate_documents, write_computed
from nnunetv2.federated.coordinator.members import create_federation
from nnunetv2.federated.coordinator.storage.store import Store
from nnunetv2.federated.exchanges.masked_codecs import MaskedWeights
from nnunetv2.federated.exchanges.secure_sums import RoundPlan, SecureSum
from nnunetv2.federated.exchanges.steps.secure_sum import Opened
from nnunetv2.federated.privacy.secure_aggregation import protocol
from nnunetv2.federated.privacy.secure_aggregation.key_agreement import (
    ENVELOPE_OVERHEAD,
    generate_private_key,
    public_key_of,
)
from nnunetv2.federated.privacy.secure_aggregation.masking import SEED_BYTES, apply_masks_
from nnunetv2.federated.privacy.secure_aggregation.protocol import CHECK_WORDS, Cohort, Lane
from nnunetv2.federated.protocol import keys, messages
from nnunetv2.federated.protocol.api import FederationSettings, Secure
from nnunetv2.federated.protocol.document import TensorSpec, document_size, open_document, write_document
from nnunetv2.federated.protocol.invitation import Invitation
from nnunetv2.federated.protocol.secure_messages import MaskedUpdate
from nnunetv2.federated.site.credential import load_credential
from nnunetv2.federated.site.enrolment import join
from nnunetv2.federated.site.participant import Participant
from nnunetv2.federated.site.transports.http import HttpTransport

MIB = 2**20
RUN = keys.run_name("3d_fullres", "0", "nnUNetTrainerFedAvg")
FIGURES = {"changes": 2, "training": 1, "validated": 2, "earlier": 2}
CASES = 100
LINE_ROUNDS = 6


# ------------------------------------------------------------------------------------------------------------- bytes
def measure_bytes(specs: Mapping[str, TensorSpec]) -> None:
    """Print the size of a masked upload beside the plain one."""
    plain = document_size(messages.Update(metrics={"train_losses": -0.5}), specs)
    size = sum(spec.size for spec in specs.values())
    for sites in (3, 8, 32, 64):
        for groups in (1, 10):
            lanes = {f"{number:016x}": ("U32", size // groups) for number in range(groups)}
            lanes |= {name: ("U64", words) for name, words in FIGURES.items()}
            seeds = sites * len(lanes)
            masked = {f"masked.{name}": TensorSpec(kind, (CHECK_WORDS + n,)) for name, (kind, n) in lanes.items()}
            masked |= {
                f"envelope.site{number:03d}": TensorSpec("U8", (ENVELOPE_OVERHEAD + SEED_BYTES * seeds,))
                for number in range(sites)
            }
            masked["commitments"] = TensorSpec("U8", (seeds, SEED_BYTES))
            found = document_size(MaskedUpdate(lanes=dict.fromkeys(lanes, "0" * 64)), masked)
            print(
                f"bytes: {sites} sites, {groups} groups: {found / plain:.5f} of a plain upload ({found / 1e6:.1f} MB)"
            )


# -------------------------------------------------------------------------------------------------------- in process
def make_cohort(num_sites: int) -> tuple[Cohort, dict[str, bytes]]:
    """Return a cohort, and the private keys of its sites."""
    private = {f"site{number:03d}": generate_private_key() for number in range(num_sites)}
    public = {name: public_key_of(key) for name, key in private.items()}
    return Cohort("benchmark", f"runs/{RUN}/rounds/0", public, dict.fromkeys(private, bytes(32))), private


@contextmanager
def cpu_seconds(seconds: list[float]) -> Iterator[None]:
    """Append the processor time of the block."""
    begin = time.process_time()
    yield
    seconds.append(time.process_time() - begin)


def mask_update(
    cohort: Cohort, site: str, private_key: bytes, lane: Lane, weights: Sequence[np.ndarray], path: Path
) -> np.ndarray:
    """Write the masked update of a site, as its outbox does; return its commitments."""
    shared = protocol.share_keys(cohort, site, private_key, [lane])
    words, begin, codec = protocol.with_check_words(lane, CASES), CHECK_WORDS, MaskedWeights()
    for values in weights:
        out = words[begin : begin + values.size]
        codec.encode_("t", values, values, weight=CASES, bits=10, exponent=3, out=out)
        begin += values.size
    protocol.mask_input_(words, lane, site, shared)
    message = MaskedUpdate(lanes={lane.name: lane.context(cohort).hex()})
    specs = {f"masked.{lane.name}": TensorSpec("U32", (lane.length,)), "commitments": TensorSpec.of(shared.commitments)}
    write_document(path, message, specs, [words, shared.commitments])
    return shared.commitments


def random_weights(specs: Mapping[str, TensorSpec]) -> list[np.ndarray]:
    """Return values for tensors of a network."""
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.05, spec.size).astype(np.float32) for spec in specs.values()]


def measure_site(specs: Mapping[str, TensorSpec], folder: Path) -> None:
    """Print the processor time of a masked update beside a plain one, and beside that of its streams."""
    weights = random_weights(specs)
    shaped = [values.reshape(spec.shape) for values, spec in zip(weights, specs.values(), strict=True)]
    millions = sum(values.size for values in weights) / 31.2e6
    for num_sites in (3, 8, 32):
        cohort, private = make_cohort(num_sites)
        lane = Lane("w", cohort.sites, "U32", sum(values.size for values in weights))
        plain, masked, streams = [], [], []
        words = np.ones(lane.length, "<u4")
        for _ in range(3):
            with cpu_seconds(plain):
                assert all(np.isfinite(values).all() for values in weights)
                write_document(folder / "plain", messages.Update(), specs, shaped)
            with cpu_seconds(masked):
                mask_update(cohort, "site000", private["site000"], lane, weights, folder / "masked")
            with cpu_seconds(streams):
                apply_masks_(words, plus=[bytes([n]) * SEED_BYTES for n in range(num_sites)], minus=[])
        more, stream = min(masked) - min(plain), min(streams)
        limit = (0.35 + 0.04 * num_sites) * millions
        print(
            f"site: {num_sites} sites: plain {min(plain):.3f} s, masked {min(masked):.3f} s of processor time; "
            f"{more:.3f} s more (limit {limit:.2f} s), {more / stream:.2f} times what {num_sites} streams take"
        )


def measure_coordinator(specs: Mapping[str, TensorSpec], folder: Path, num_sites: int = 8) -> None:
    """Print the processor time of closing a masked round beside a plain one."""
    weights = random_weights(specs)
    shaped = [values.reshape(spec.shape) for values, spec in zip(weights, specs.values(), strict=True)]
    cohort, private = make_cohort(num_sites)
    lane = Lane("w", cohort.sites, "U32", sum(values.size for values in weights))
    commitments = {}
    for site in cohort.sites:
        write_document(folder / f"{site}.plain", messages.Update(), specs, shaped)
        commitments[site] = mask_update(cohort, site, private[site], lane, weights, folder / f"{site}.masked")
    write_document(folder / "before", messages.Aggregate(round=0, contributors={}), specs, shaped)
    message = messages.Aggregate(round=1, contributors={})
    plain, masked, one_gone = [], [], []
    with open_document(folder / "before") as before:
        for _ in range(2):
            documents = {site: open_document(folder / f"{site}.plain") for site in cohort.sites}
            with cpu_seconds(plain):
                aggregate_documents(
                    documents, dict.fromkeys(documents, 1.0), out_path=folder / "out", message=message, previous=before
                )
            for gone, seconds in ((0, masked), (1, one_gone)):
                sites = cohort.sites[gone:]
                opened = open_sum(folder, cohort, lane, sites, private, commitments)
                begins = np.cumsum([CHECK_WORDS, *(spec.size for spec in specs.values())])
                places = dict(zip(specs, map(int, begins), strict=False))

                def mean_of(name: str, opened: Opened = opened, places: Mapping[str, int] = places) -> np.ndarray:
                    mean = np.empty(specs[name].size, np.float32)
                    for at, words in enumerate(opened.parts(lane.name, places[name], mean.size, 1 << 15)):
                        total = CASES * len(opened.survivors[lane.name])
                        part = MaskedWeights().decode(words, words, total=total, bits=10, exponent=3)
                        mean[at << 15 : (at + 1) << 15] = part
                    return mean.reshape(specs[name].shape)

                with cpu_seconds(seconds):
                    write_computed(folder / "out", message, specs, mean_of)
    print(
        f"coordinator: {num_sites} sites: plain {min(plain):.2f} s, masked {min(masked):.2f} s "
        f"({min(masked) / min(plain):.2f} times; limit 1.1), with one gone {min(one_gone):.2f} s of processor time"
    )


def open_sum(
    folder: Path,
    cohort: Cohort,
    lane: Lane,
    sites: Sequence[str],
    private: Mapping[str, bytes],
    commitments: Mapping[str, np.ndarray],
) -> Opened:
    """Return a sum of masked updates on the disk; its masks follow from seeds that are made up."""
    plus = [bytes([number + 1]) * SEED_BYTES for number, _ in enumerate(sites)]
    gone = [site for site in cohort.sites if site not in sites]
    masks = protocol.Masks(tuple(plus), tuple(bytes([99]) * SEED_BYTES for _ in range(len(gone) * len(sites))))
    uploads = {site: open_document(folder / f"{site}.masked") for site in sites}
    found = SecureSum(cohort, (lane,), 3, dict.fromkeys(cohort.sites, CASES))
    return Opened(found, {lane.name: tuple(sites)}, uploads, {lane.name: masks}, ())


# --------------------------------------------------------------------------------------------------------- real HTTP
def measure_round(specs: Mapping[str, TensorSpec], folder: Path, num_sites: int) -> None:
    """Play two rounds with a real coordinator, with one and with three sites gone after their masks were agreed on."""
    names = tuple(f"site{number:03d}" for number in range(num_sites))
    settings = FederationSettings(
        federation="benchmark",
        sites=names,
        num_epochs=3,
        validate_every=0,
        min_sites=3,
        secure=Secure(k=3),
        quorum=protocol.threshold_of(num_sites),
        deadline_s=1e6,
    )
    (folder / "sites").mkdir()
    with Store(folder / "federation") as store:
        create_federation(store, settings, now=time.time())
        secrets = {one.member: one.secret for one in store.load_invitations().values()}
    coordinator = Running(folder / "federation")
    coordinator.start()
    try:
        sites = join_all(coordinator.url, settings, secrets, specs, folder / "sites")
        with ThreadPoolExecutor(num_sites) as pool:
            list(pool.map(lambda site: site.register(), sites))
            list(pool.map(lambda site: site.start(), sites))
        base = dict(zip(specs, random_weights(specs), strict=True))
        for number, gone in ((0, 1), (1, 3)):
            play_round(sites, base, specs, coordinator, number=number, gone=gone)
    finally:
        coordinator.process.terminate()
        coordinator.process.wait()


class MeasuredSite:
    """A site that joins, registers, and does each step of a masked round when it is told to."""

    def __init__(self, url: str, settings: FederationSettings, name: str, secret: str, folder: Path) -> None:
        file = folder / f"{name}.json"
        join(Invitation(url, settings.federation, name, secret, secure=True), path=file)
        credential = load_credential(file)
        self.name = name
        self.transport = HttpTransport(credential, report=lambda line: None)
        self.participant = Participant(
            self.transport, site=name, run=RUN, credential=credential, credential_file=file, report=lambda line: None
        )
        self.registration: messages.Registration | None = None
        self.initial: Mapping[str, np.ndarray] = {}

    def register(self) -> None:
        """Register."""
        assert self.registration is not None
        self.participant.register(self.registration)

    def start(self) -> None:
        """Receive the weights that the next round starts from."""
        self.participant.start(0, self.initial)

    def plan(self, number: int) -> RoundPlan:
        """Return the plan of the round's sum."""
        plan = self.participant._masked._plan(keys.RoundKey(RUN, number))
        assert plan is not None
        return plan

    def upload(self, number: int, plan: RoundPlan, weights: Mapping[str, np.ndarray]) -> None:
        """Mask and send."""
        masked = self.participant._masked
        numbers = masked._numbers(plan, weights, messages.Update(metrics={"train_losses": -0.5}))
        self.sent = masked._masking.upload(keys.UploadKey(RUN, number), plan.sum, numbers, masked._weight)

    def finish(self, number: int, plan: RoundPlan) -> Mapping[str, np.ndarray]:
        """Take the other two steps, and return the average."""
        masked = self.participant._masked
        upload, survivors = keys.UploadKey(RUN, number), keys.SurvivorsKey(RUN, number)
        document = masked._masking.unmask(upload, survivors, keys.RoundKey(RUN, number), plan.sum, self.sent)
        masked._outbox.drop(str(upload))
        return self.participant._read(document)


def join_all(
    url: str, settings: FederationSettings, secrets: Mapping[str, str], specs: Mapping[str, TensorSpec], folder: Path
) -> list[MeasuredSite]:
    """Let all sites join."""
    initial = {name: np.zeros(spec.shape, np.float32) for name, spec in specs.items()}
    sites = []
    for name in settings.sites:
        site = MeasuredSite(url, settings, name, secrets[name], folder)
        site.initial = initial
        site.registration = registration_of(specs)
        sites.append(site)
    return sites


def registration_of(specs: Mapping[str, TensorSpec]) -> messages.Registration:
    """Return the registration of a site."""
    return messages.Registration(
        configuration="3d_fullres",
        fold="0",
        trainer="nnUNetTrainerFedAvg",
        num_training_cases=CASES,
        plans={"plans_name": "nnUNetPlans", "dataset_name": "Dataset001"},
        dataset_json=messages.TrainingData(
            channel_names={"0": "CT"}, labels={"background": 0, "liver": 1}, file_ending=".nii.gz"
        ),
        requires_equal_plans=False,
        tensors=tuple(messages.TensorEntry(name=n, dtype="F32", shape=spec.shape) for n, spec in specs.items()),
    )


def play_round(
    sites: list[MeasuredSite],
    base: Mapping[str, np.ndarray],
    specs: Mapping[str, TensorSpec],
    coordinator: Running,
    *,
    number: int,
    gone: int,
) -> None:
    """Play one round without the last sites, and compare the average with the sum of integers."""
    present, missing = sites[: len(sites) - gone], sites[len(sites) - gone :]
    for site in missing:
        site.participant.report_failure(number, "away")
    exact: dict[str, np.ndarray] = {name: np.zeros(spec.size, np.uint32) for name, spec in specs.items()}
    memory_before, cpu_before = memory_of(coordinator), coordinator.cpu_seconds()
    per_site: list[float] = []
    with sampled_memory(coordinator.process.pid) as samples:
        for index, site in enumerate(present):
            factor = np.float32(1 + 0.01 * index)
            weights = {name: (values * factor).reshape(specs[name].shape) for name, values in base.items()}
            plan = site.plan(number)
            with cpu_seconds(per_site):
                site.upload(number, plan, weights)
            for name, values in weights.items():
                one = np.empty(values.size, np.uint32)
                exponent, bits = plan.exponents[name], plan.weight_bits
                MaskedWeights().encode_(name, values, values, weight=CASES, bits=bits, exponent=exponent, out=one)
                exact[name] += one
        begin = time.monotonic()
        with ThreadPoolExecutor(len(present)) as pool:
            answers = [pool.submit(site.finish, number, site.plan(number)) for site in present]
            averages = [answer.result() for answer in answers]
        seconds = time.monotonic() - begin
    for site in missing:
        site.start()
    total = CASES * len(present)
    for name, words in exact.items():
        exponent, bits = plan.exponents[name], plan.weight_bits
        mean = MaskedWeights().decode(words, words, total=total, bits=bits, exponent=exponent).astype(np.float32)
        assert all(np.array_equal(one[name].reshape(-1), mean) for one in averages[:: len(averages) // 2 or 1]), name
    peak = samples[-1].anonymous - memory_before
    print(
        f"round: {len(sites)} sites, {gone} gone: exact; a site's update {statistics.median(per_site):.2f} s of "
        f"processor time; from the last upload to the average at all {seconds:.1f} s; the coordinator "
        f"{coordinator.cpu_seconds() - cpu_before:.1f} s, its memory {peak:.0f} MiB over idle (limit 64)"
    )


# -------------------------------------------------------------------------------------------------------------- line
def measure_line(specs: Mapping[str, TensorSpec], folder: Path, num_sites: int = 8) -> None:
    """Print the times of rounds over one line, masked and in clear."""
    if not can_be_shaped():
        print("line: a line of 1 Gbit/s cannot be shaped here: that takes Linux, root, and the commands ip and tc")
        return
    seconds = {}
    for kind in ("clear", "masked"):
        (folder / kind).mkdir()
        seconds[kind] = play_on_a_line(specs, folder / kind, num_sites, is_masked=kind == "masked")
    clear, masked = (statistics.median(one) for one in seconds.values())
    print(
        f"line: {num_sites} sites behind one line of 1 Gbit/s: a round takes {masked:.1f} s masked "
        f"({min(seconds['masked']):.1f} to {max(seconds['masked']):.1f}), {clear:.1f} s in clear "
        f"({min(seconds['clear']):.1f} to {max(seconds['clear']):.1f}): {masked / clear:.2f} times (limit 1.3)"
    )


def play_on_a_line(specs: Mapping[str, TensorSpec], folder: Path, num_sites: int, *, is_masked: bool) -> list[float]:
    """Return the times of rounds, each from the first site's begin to the last one's end."""
    names = tuple(f"site{number:03d}" for number in range(num_sites))
    settings = FederationSettings(
        federation="benchmark",
        sites=names,
        num_epochs=LINE_ROUNDS + 1,
        validate_every=0,
        min_sites=3,
        secure=Secure(k=3) if is_masked else None,
    )
    with Store(folder / "federation") as store:
        create_federation(store, settings, now=time.time())
        secrets = {one.member: one.secret for one in store.load_invitations().values()}
    with (
        shaped_lines(1, GIGABIT) as [namespace],
        running(folder / "federation", "--host", HOST, "--insecure") as coordinator,
        ProcessPoolExecutor(num_sites, multiprocessing.get_context("spawn")) as pool,
    ):
        sites = [
            pool.submit(
                take_part,
                Invitation(coordinator.url, "benchmark", name, secrets[name] or "", secure=is_masked),
                folder / f"{name}.json",
                namespace,
                specs,
            )
            for name in names
        ]
        moments = [site.result() for site in sites]
    rounds = [(min(begins), max(ends)) for begins, ends in (zip(*several) for several in zip(*moments))]
    return [end - begin for begin, end in rounds[1:]]  # the first one waits for sites that begin late


def take_part(
    invitation: Invitation, file: Path, namespace: str, specs: Mapping[str, TensorSpec]
) -> list[tuple[float, float]]:
    """Take part in all rounds from this process; return when each began and ended."""
    logging.disable(logging.WARNING)
    enter(namespace)
    join(invitation, path=file, insecure=True)
    credential = load_credential(file)
    participant = Participant(
        HttpTransport(credential, report=lambda line: None),
        site=invitation.site,
        run=RUN,
        credential=credential,
        credential_file=file,
    )
    weights: Mapping[str, np.ndarray] = {name: np.zeros(spec.shape, np.float32) for name, spec in specs.items()}
    participant.register(registration_of(specs))
    participant.start(0, weights)
    moments = []
    for number in range(LINE_ROUNDS):
        begin = time.monotonic()
        weights, _ = participant.exchange(number, weights, messages.Update(metrics={"train_losses": -0.5}))
        moments.append((begin, time.monotonic()))
    return moments


def memory_of(coordinator: Running) -> float:
    """Return the anonymous memory of a process in MiB."""
    from benchmarks.federation_coordinator import Memory

    return Memory.of(coordinator.process.pid).anonymous


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=64)
    parser.add_argument("--stages", type=int, default=6)
    parser.add_argument("--only", nargs="+", choices=("bytes", "site", "coordinator", "round", "line"))
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    specs = network_specs(arguments.stages)
    print(f"{sum(spec.size for spec in specs.values()) / 1e6:.1f} million parameters in {len(specs)} tensors")
    measurements: dict[str, Callable[[Path], None]] = {
        "bytes": lambda folder: measure_bytes(specs),
        "site": lambda folder: measure_site(specs, folder),
        "coordinator": lambda folder: measure_coordinator(specs, folder),
        "round": lambda folder: measure_round(specs, folder, arguments.sites),
        "line": lambda folder: measure_line(specs, folder),
    }
    for name in arguments.only or measurements:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            measurements[name](Path(folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
