"""The options of `nnUNetv2_fed_coordinator`, and those that a simulation shares with it."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from nnunetv2.federated.coordinator.http.listen_address import DEFAULT_HOST, DEFAULT_PORT, NOTHING
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.protocol.rounds import DEFAULT_EPOCHS

METHODS = ("networks", "labels", "proximal", "keep_local", "finetune_epochs", "initial_weights")
"""Options that say how sites train that differ; the settings have the same names."""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_fed_coordinator`."""
    parser = argparse.ArgumentParser(
        description="Coordinate a federation. The first start creates it and prints one "
        "invitation per site; later starts go on where the federation was."
    )
    add_address_options(parser)
    add_tls_options(parser)
    group = parser.add_argument_group("what holds for all sites", "Fixed by the first start.")
    add_training_options(group)
    add_round_options(group)
    add_protection_options(group)
    add_method_options(parser)
    return parser


def add_address_options(parser: argparse.ArgumentParser) -> None:
    """Add the folder of the federation, and where the coordinator is reached."""
    where = parser.add_argument_group("where")
    where.add_argument(
        "--folder",
        type=Path,
        default=Path("nnUNet_federation"),
        metavar="F",
        help="folder of the federation (default: ./%(default)s)",
    )
    where.add_argument("--host", help=f"address to listen on (default: as before, at first {DEFAULT_HOST})")
    where.add_argument(
        "--port",
        type=port_number,
        metavar="N",
        help=f"port to listen on, 0 for any free one (default: as before, at first {DEFAULT_PORT})",
    )
    where.add_argument(
        "--url",
        metavar="PUBLIC_URL",
        help="address at which sites reach this coordinator, if it is "
        f"not http://HOST:PORT, for example that of a proxy that adds TLS; {NOTHING}: it is (default: as before)",
    )


def port_number(text: str) -> int:
    """Return a TCP port, for the `type` of an option.

    Raises:
        argparse.ArgumentTypeError: There is no such port.
    """
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no port: expected a number from 0 to 65535")
    return int(text)


def split_words(text: str, option: str) -> tuple[str, ...]:
    """Split the options that another option holds in one text, as a shell would.

    Raises:
        FederationError: A quote is not closed.
    """
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise FederationError(
            f"{option} {text[:200]}: {error}. Close each quote, or put a backslash before it"
        ) from error


def _file_or_nothing(text: str) -> Path | str:
    return NOTHING if text in ("", NOTHING) else Path(text)


def add_tls_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of encrypted connections."""
    tls = parser.add_argument_group(
        "TLS",
        "Beyond this machine, the coordinator speaks TLS, with a private "
        "certificate authority that it makes on its first start and that invitations "
        "carry the fingerprint of. Behind a proxy with TLS, keep to 127.0.0.1. Later starts remember these options; "
        f"--no-tls, --no-insecure and {NOTHING} for a file take them back.",
    )
    tls.add_argument(
        "--tls", action=argparse.BooleanOptionalAction, default=None, help="speak TLS on this machine too, or not"
    )
    tls.add_argument(
        "--tls-certificate",
        type=_file_or_nothing,
        metavar="FILE",
        help="a certificate of your own (PEM, with those between it and its authority)",
    )
    tls.add_argument("--tls-key", type=_file_or_nothing, metavar="FILE", help="its key (PEM, without a password)")
    tls.add_argument(
        "--client-authority",
        type=_file_or_nothing,
        metavar="FILE",
        help="only sites that show a certificate of this authority may connect (PEM)",
    )
    tls.add_argument(
        "--insecure",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="listen beyond this machine without TLS; only where the network itself is protected. Remembered for this "
        "--host and --url only",
    )


def add_training_options(group: argparse._ArgumentGroup) -> None:
    """Add the sites, the length of trainings, and how weights are matched, weighed and sent."""
    group.add_argument("--sites", nargs="+", metavar="NAME", help="names of the sites (asked for at a terminal)")
    group.add_argument("--epochs", type=int, metavar="N", help=f"number of epochs (default: {DEFAULT_EPOCHS})")
    group.add_argument(
        "--iterations", type=int, metavar="N", help="training iterations per epoch (default: the trainer's)"
    )
    group.add_argument(
        "--val-iterations", type=int, metavar="N", help="validation iterations per epoch (default: the trainer's)"
    )
    group.add_argument(
        "--matching",
        choices=("name", "resolution"),
        help="how tensors of different networks are recognised as the same (default: resolution)",
    )
    group.add_argument(
        "--weighting",
        choices=("cases", "uniform"),
        help="sites count by their training cases, or all the same (default: cases)",
    )
    group.add_argument(
        "--exchange-every",
        type=int,
        metavar="K",
        help="epochs between exchanges of weights, a round; fewer exchanges need less of the line and bring the sites "
        "together more rarely (default: 1)",
    )
    group.add_argument(
        "--precision",
        choices=("float32", "float16", "int8"),
        help="how weights travel; float16 halves the traffic, int8 (changes since the last average) quarters it, and "
        "what rounding takes from a round comes with the next one (default: float32)",
    )


def add_round_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of closing a round, and of its validation."""
    group.add_argument(
        "--quorum", type=int, metavar="N", help="sites that suffice to close a round at its deadline (default: all)"
    )
    group.add_argument(
        "--deadline",
        type=float,
        metavar="S",
        help="seconds after its first update at which a round closes with its quorum (default: none)",
    )
    group.add_argument(
        "--late-updates",
        choices=("drop", "carry"),
        help="an update that comes after its round was "
        "closed is dropped, or counts in the round that is open then (default: drop)",
    )
    group.add_argument(
        "--validate-every",
        type=int,
        metavar="N",
        help="every how many rounds the sites validate the "
        "aggregate, so that the best one can be kept; 0: never (default: 5)",
    )


def add_protection_options(group: argparse._ArgumentGroup) -> None:
    """Add the floor of sites, and masks."""
    group.add_argument(
        "--min-sites",
        type=int,
        metavar="N",
        help="no statistics, round or tensor is ever averaged over "
        "fewer sites, whoever leaves or fails; can be raised later, never lowered. With 2, two sites can "
        "compute each other's part of what only they have: take 3 where you can (default: 2; --secure: K)",
    )
    group.add_argument(
        "--secure",
        type=int,
        nargs="?",
        const=3,
        metavar="K",
        help="mask updates and statistics, so that this coordinator learns sums of K sites or more only, and no single "
        "contribution; for 3 to 64 sites, needs the library cryptography (default: in clear; K is 3)",
    )
    group.add_argument(
        "--geometry",
        choices=("list", "quantiles"),
        help="with --secure, what is told of spacings and shapes when sites plan: those of all cases, of nobody in "
        "particular, or order statistics only, which planners of other packages may not read (default: list)",
    )


def add_method_options(parser: argparse.ArgumentParser, *, with_files: bool = True) -> None:
    """Add the options for sites that differ; `with_files`: those that name files too."""
    how = parser.add_argument_group("how sites train that differ", "Fixed by the first start.")
    how.add_argument(
        "--networks",
        choices=("equal", "own"),
        help="equal: sites that plan with --federated hold the same plans. own: from the one pooled fingerprint, each "
        "plans network, patch and batch for itself, with its own -gpu_memory_target or planner; what matches is "
        "averaged (default: equal)",
    )
    how.add_argument(
        "--labels",
        choices=("equal", "union"),
        help="all sites annotate the same classes, or each some of those that all have together; classes are the same "
        "if their names in dataset.json are (default: equal)",
    )
    how.add_argument(
        "--proximal",
        type=float,
        metavar="MU",
        help="keep the weights of a site near those that its round began with: FedProx; 0.001 to 0.1 are usual "
        "(default: none)",
    )
    how.add_argument(
        "--keep-local",
        metavar="WHAT",
        help="tensors of which each site goes on with its own, although their average is part of the common model: "
        "norm, head, or names of modules and tensors with wildcards (default: none)",
    )
    how.add_argument(
        "--finetune-epochs",
        type=int,
        metavar="N",
        help="after the last round each site trains on alone, with the last N learning rates, into "
        "checkpoint_finetuned.pth (default: 0)",
    )
    if with_files:
        how.add_argument(
            "--initial-weights",
            type=Path,
            metavar="FILE",
            help="checkpoint whose weights all sites start from, except for the layers that output classes (default: "
            "random weights, or those that all sites give)",
        )


def method_options(arguments: argparse.Namespace) -> list[str]:
    """Return the options of `add_method_options` that were given, as they are typed."""
    values = {name: getattr(arguments, name) for name in METHODS}
    return [
        word
        for name, value in values.items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
