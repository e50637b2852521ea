"""Compare federated with local and with pooled training on your own data.

Every dataset is a site; its imagesTs and labelsTs are its test cases. All arms train networks of equal length with the
commands that people type, a coordinator and the sites as processes of this machine. Every model is then tested at every
site. The report states the conclusions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nnunetv2.utilities.command_line import add_device_option, run_command
from nnunetv2.utilities.plain_text import show

DEFAULT_ARMS = ("alone", "pooled", "ffe", "asym", "asym-resolution")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_fed_compare`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "-d",
        dest="sites",
        nargs="+",
        required=True,
        metavar="ID",
        help="datasets; each one is a site of the federation",
    )
    parser.add_argument(
        "--external", nargs="+", default=[], metavar="ID", help="datasets that nobody trains on, only tested on"
    )
    parser.add_argument("-c", dest="configuration", default="3d_fullres", help="configuration (default: %(default)s)")
    parser.add_argument("-f", dest="fold", default="all", help="fold, or all training cases (default: %(default)s)")
    parser.add_argument("-p", dest="plans_name", default="nnUNetPlans", help="name of the plans (default: %(default)s)")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=DEFAULT_ARMS,
        metavar="NAME",
        help="what is compared: alone, pooled (iterations of one site), pooled-all (of all sites together), ffe, "
        "ffe-uniform, asym, asym-resolution, and those of --arms_file (default: " + " ".join(DEFAULT_ARMS) + ")",
    )
    parser.add_argument("--arms_file", type=Path, metavar="FILE", help="JSON with further arms: name -> fields")
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="trainings of every arm (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument("--iterations", type=int, default=250, metavar="N", help="per epoch (default: %(default)s)")
    parser.add_argument(
        "--val_iterations", type=int, default=50, metavar="N", help="per epoch, for the curves (default: %(default)s)"
    )
    parser.add_argument(
        "--plans_patch",
        type=Path,
        metavar="FILE",
        help="JSON merge patch of every plans file, for example to smaller networks",
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="new folder of the comparison; the report lies in it"
    )
    parser.add_argument(
        "--known",
        type=Path,
        nargs="+",
        default=[],
        metavar="RESULT.json",
        help="of the same comparison in other folders or on other machines: what they hold is not trained again",
    )
    parser.add_argument("--c", dest="go_on", action="store_true", help="go on with an interrupted comparison")
    add_device_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `nnUNetv2_fed_compare`."""
    arguments = build_parser().parse_args(argv)
    from nnunetv2.comparison.arms import choose_arms, read_arms
    from nnunetv2.comparison.known_results import read_known
    from nnunetv2.comparison.report import REPORT, find, write_report
    from nnunetv2.comparison.running import Runner, read_costs, remove_unfinished
    from nnunetv2.comparison.study import Study, check_study, find_datasets, open_study
    from nnunetv2.comparison.study_folder import list_tests
    from nnunetv2.utilities.json_files import read_json

    further = read_arms(arguments.arms_file) if arguments.arms_file else {}
    study = Study(
        sites=find_datasets(arguments.sites),
        external=find_datasets(arguments.external),
        arms=choose_arms(arguments.arms, further),
        seeds=arguments.seeds,
        epochs=arguments.epochs,
        iterations=arguments.iterations,
        val_iterations=arguments.val_iterations,
        configuration=arguments.configuration,
        fold=arguments.fold,
        plans_name=arguments.plans_name,
        plans_patch=read_json(arguments.plans_patch) if arguments.plans_patch else {},
        device=arguments.device,
    )
    check_study(study)
    known = read_known(arguments.known, study, list_tests(study))
    folder = arguments.folder.resolve()
    with open_study(folder, study, go_on=arguments.go_on):
        runner = Runner(study, folder, known)
        remove_unfinished(runner.folder)
        scores = runner.run()
        write_report(find(study, scores, read_costs(study, runner.folder, known)), runner.folder)
    show(f"Report: {folder / REPORT}")
    return 0


def compare_entry() -> None:
    """Entry point of the console script."""
    run_command(main)
