"""Measure a round's bytes on the wire: per site, each way, against the distinct tensors of the network.

    python -m benchmarks.federated_traffic [--sites 3] [--rounds 3] [--stages 6] [--precision int8 --exchange-every 3]

A real coordinator process serves sites that send the weights of the default 3d_fullres network. Each site reaches it
through a relay that counts every byte of its connection, headers of HTTP included. Also prints the time of an exchange
and the coordinator's peak memory.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from benchmarks.byte_counter import ByteCounter
from nnunetv2.federated.aggregation import matching
from nnunetv2.federated.commands.simulate import LocalSite, running_coordinator
from nnunetv2.federated.protocol import keys, messages
from nnunetv2.federated.site.credential import load_credential
from nnunetv2.federated.site.participant import Participant
from nnunetv2.federated.site.transports.http import HttpTransport
from nnunetv2.training.nnUNetTrainer.variants.federated.federated_training import export_weights

PLANS = {"plans_name": "nnUNetPlans"}


def build_network(num_stages: int):
    """Build the network that nnU-Net plans by default for large isotropic images."""
    import torch
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    features = [min(320, 32 * 2**stage) for stage in range(num_stages)]
    return PlainConvUNet(
        1,
        num_stages,
        features,
        torch.nn.Conv3d,
        [[3] * 3] * num_stages,
        [[1] * 3, *[[2] * 3] * (num_stages - 1)],
        [2] * num_stages,
        3,
        [2] * (num_stages - 1),
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )


def describe(network) -> messages.Registration:
    """Register the network as a trainer would."""
    distinct, aliases = matching.distinct_tensors(network.state_dict())
    data = messages.TrainingData(
        channel_names={"0": "CT"}, labels={"background": 0, "a": 1, "b": 2}, file_ending=".nii.gz"
    )
    return messages.Registration(
        configuration="3d_fullres",
        fold="0",
        trainer="nnUNetTrainerAsymFedAvg",
        num_training_cases=10,
        plans=PLANS,
        dataset_json=data,
        requires_equal_plans=False,
        tensors=tuple(matching.describe_tensors(distinct)),
        aliases=aliases,
    )


class MeasuredSite(threading.Thread):
    """A site that sends the same weights every round and notes bytes and seconds."""

    def __init__(
        self, site: LocalSite, registration: messages.Registration, weights: dict[str, np.ndarray], rounds: int
    ) -> None:
        super().__init__(name=site.name, daemon=True)
        self.site, self.registration, self.weights, self.rounds = site, registration, weights, rounds
        self.sent: list[int] = []
        self.received: list[int] = []
        self.seconds: list[float] = []
        self.error: Exception | None = None

    def run(self) -> None:
        """Register and exchange; an error is kept for the main thread."""
        try:
            self._exchange_all()
        except Exception as error:  # noqa: BLE001  shown by the main thread
            self.error = error

    def _exchange_all(self) -> None:
        credential = load_credential(self.site.credential)
        address = urlsplit(credential.url)
        with ByteCounter((address.hostname, address.port)) as counter:
            through_counter = replace(credential, url=f"http://127.0.0.1:{counter.port}")
            with HttpTransport(through_counter, report=lambda line: None) as client:
                run = keys.run_name("3d_fullres", "0", self.registration.trainer)
                session = Participant(client, site=self.site.name, run=run)
                session.register(self.registration)
                session.start(0, self.weights)
                for number in range(self.rounds):
                    before, start = counter.traffic.snapshot(), time.monotonic()
                    session.exchange(number, self.weights, messages.Update(metrics={"train_losses": -0.5}))
                    self.seconds.append(time.monotonic() - start)
                    after = counter.traffic.snapshot()
                    self.sent.append(after[0] - before[0])
                    self.received.append(after[1] - before[1])


def peak_memory_mib(pid: int) -> float:
    """Return the largest resident size of a process so far (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    import json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", type=int, default=6)
    parser.add_argument("--precision", choices=("float32", "float16", "int8"), default="float32")
    parser.add_argument("--exchange-every", type=int, default=1, metavar="K", help="epochs of a round")
    arguments = parser.parse_args(argv)
    network = build_network(arguments.stages)
    weights, registration = export_weights(network), describe(network)
    unique = sum(values.nbytes for values in weights.values())
    naive = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sites = [
            LocalSite(name=f"site{n}", dataset="0", credential=folder / f"site{n}.json") for n in range(arguments.sites)
        ]
        every = arguments.exchange_every
        options = (
            *("--epochs", str(arguments.rounds * every), "--precision", arguments.precision),
            *(("--exchange-every", str(every)) if every > 1 else ()),
        )
        with running_coordinator(folder / "coordinator", sites, options, show=lambda line: None):
            threads = [MeasuredSite(site, registration, weights, arguments.rounds) for site in sites]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
                if thread.error is not None:
                    raise thread.error
            state = json.loads((folder / "coordinator" / "coordinator.json").read_text(encoding="utf-8"))
            memory = peak_memory_mib(state["pid"])
    print(
        f"{arguments.precision}; distinct tensors in float32: {unique / 2**20:.1f} MiB; the state dict with all "
        f"aliases: {naive / 2**20:.1f} MiB"
    )
    for thread in threads:
        up, down = max(thread.sent) / unique, max(thread.received) / unique
        print(
            f"{thread.name}: sent {max(thread.sent):,} B ({up:.4f} x), received {max(thread.received):,} B "
            f"({down:.4f} x), median exchange {statistics.median(thread.seconds):.2f} s; per epoch of 250 iterations "
            f"{max(thread.sent) / every / 2**20:.2f} MiB and {max(thread.received) / every / 2**20:.2f} MiB"
        )
    print(f"coordinator's peak memory: {memory:.0f} MiB with {arguments.sites} sites")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
