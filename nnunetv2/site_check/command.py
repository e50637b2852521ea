"""The command nnUNetv2_fed_check: a hospital's first day in a federation, within two minutes."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence

from nnunetv2.utilities.command_line import dataset_argument, run_command


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_fed_check`."""
    parser = argparse.ArgumentParser(
        description="Check within two minutes whether this site can take part in a federation: line, machine, data, "
        "permission, GPU. A dummy round of bytes without content measures the line; nothing of the data leaves. "
        "Ends with status 1 if something is in the way."
    )
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        nargs="?",
        type=dataset_argument,
        help="number or name of the dataset; without it, neither data nor plans are looked at",
    )
    parser.add_argument(
        "configuration",
        metavar="CONFIGURATION",
        nargs="?",
        help="what is to be trained; default: 3d_fullres if the plans have it, else their first one",
    )
    parser.add_argument("-p", default="nnUNetPlans", metavar="NAME", help="plans (default: %(default)s)")
    parser.add_argument(
        "-tr", default="nnUNetTrainerAsymFedAvg", metavar="CLASS", help="trainer (default: %(default)s)"
    )
    parser.add_argument(
        "-device", default="cuda", choices=("cuda", "cpu"), help="where the network will run (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu_memory",
        type=_gigabytes,
        metavar="GB",
        help="memory of the GPU that will train, if that is in another machine; nothing is tried then",
    )
    parser.add_argument(
        "--share_extrema", action="store_true", help="as if planned with --share_extrema, for the allow-list"
    )
    parser.add_argument("--all_cases", action="store_true", help="read all cases, however long it takes")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, for programs")
    return parser


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of gigabytes, such as 24")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `nnUNetv2_fed_check`."""
    arguments = build_parser().parse_args(argv)
    from nnunetv2.site_check.checks import Request, run_checks
    from nnunetv2.site_check.findings import describe, has_problem, to_json
    from nnunetv2.utilities.plain_text import printable_json, show

    begun = time.monotonic()
    request = Request(
        dataset=arguments.dataset,
        configuration=arguments.configuration,
        plans=arguments.p,
        trainer=arguments.tr,
        share_extrema=arguments.share_extrema,
        gpu_memory_gb=arguments.gpu_memory,
        device=arguments.device,
        all_cases=arguments.all_cases,
    )
    with contextlib.redirect_stdout(sys.stderr):  # the list alone is the result
        results = run_checks(request)
    findings, forecast, seconds = results.findings, results.forecast, time.monotonic() - begun
    if arguments.json:
        content = to_json(findings, forecast.as_json() if forecast else {}, seconds=seconds)
        show(*printable_json(content, indent=4).split("\n"))
    else:
        show(*describe(findings, list(forecast.lines()) if forecast else [], seconds=seconds))
    return int(has_problem(findings))


def check_entry() -> None:
    """Entry point of the console script `nnUNetv2_fed_check`."""
    run_command(main)
