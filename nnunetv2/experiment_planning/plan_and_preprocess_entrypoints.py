"""The commands nnUNetv2_plan_and_preprocess, nnUNetv2_extract_fingerprint, nnUNetv2_plan_experiment and
nnUNetv2_preprocess."""

from __future__ import annotations

import logging
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence

from nnunetv2.utilities.command_line import dataset_argument, run_command

logger = logging.getLogger(__name__)

_BY_MACHINE = "Default: as many as the machine has cores and free memory for."
CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")
FEDERATED_TRAINER = "nnUNetTrainerAsymFedAvg"
"""With which sites that have planned together go on."""


def plan_and_preprocess_entry() -> None:
    run_command(plan_and_preprocess_main)


def extract_fingerprint_entry() -> None:
    run_command(extract_fingerprint_main)


def plan_experiment_entry() -> None:
    run_command(plan_experiment_main)


def preprocess_entry() -> None:
    run_command(preprocess_main)


# ------------------------------------------------------------------------------------------------ commands


def plan_and_preprocess_main(argv: Sequence[str] | None = None) -> None:
    parser = build_plan_and_preprocess_parser()
    arguments = parser.parse_args(argv)
    if arguments.share_extrema and arguments.federated != "ffe":
        parser.error("--share_extrema needs --federated ffe: otherwise nothing is shared")
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        plan_federated_experiments,
        print_summary,
        write_overview,
    )

    checks = {
        "num_processes": arguments.npfp,
        "check_dataset_integrity": arguments.verify_dataset_integrity,
        "clean": arguments.clean,
        "without_bad_cases": arguments.without_bad_cases,
        "verbose": arguments.verbose,
        "show_progress_bar": _shows_bars(arguments),
    }
    planning = _planning_keywords(arguments)
    # One dataset at a time, because a planner may name its plans by the dataset.
    if arguments.federated is None:
        extract_fingerprints(arguments.d, arguments.fpe, **checks)
        plans_names = [plan_experiments([dataset], arguments.pl, **planning) for dataset in arguments.d]
    else:
        plans_names = [
            plan_federated_experiments(
                [dataset],
                arguments.federated,
                arguments.fpe,
                arguments.pl,
                share_extrema=arguments.share_extrema,
                **checks,
                **planning,
            )
            for dataset in arguments.d
        ]
    if not arguments.no_pp:
        for dataset, plans_name in zip(arguments.d, plans_names):
            _preprocess([dataset], plans_name, arguments)
    for dataset, plans_name in zip(arguments.d, plans_names):
        print_summary(dataset, plans_name, trainer=arguments.federated and FEDERATED_TRAINER)
        write_overview(dataset)


def extract_fingerprint_main(argv: Sequence[str] | None = None) -> None:
    arguments = _parse_what_is_known(build_extract_fingerprint_parser(), argv)
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints

    extract_fingerprints(
        arguments.d,
        arguments.fpe,
        arguments.np,
        arguments.verify_dataset_integrity,
        arguments.clean,
        arguments.verbose,
        _shows_bars(arguments),
        arguments.without_bad_cases,
    )


def plan_experiment_main(argv: Sequence[str] | None = None) -> None:
    arguments = _parse_what_is_known(build_plan_experiment_parser(), argv)
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments

    plan_experiments(arguments.d, arguments.pl, **_planning_keywords(arguments))


def preprocess_main(argv: Sequence[str] | None = None) -> None:
    arguments = _parse_what_is_known(build_preprocess_parser(), argv)
    _preprocess(arguments.d, arguments.plans_name, arguments, without_bad_cases=arguments.without_bad_cases)


def _parse_what_is_known(parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """Parse a command line, and warn of options that the command does not know.

    Scripts pass the options of one command to the others, which have always gone on without them.
    """
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        logger.warning("%s does not know %s and goes on without", parser.prog, " ".join(unknown))
    return arguments


def _planning_keywords(arguments: Namespace) -> dict:
    return {
        "gpu_memory_target_in_gb": arguments.gpu_memory_target,
        "preprocess_class_name": arguments.preprocessor_name,
        "overwrite_target_spacing": arguments.overwrite_target_spacing,
        "overwrite_plans_name": arguments.overwrite_plans_name,
    }


def _preprocess(
    datasets: Sequence[int | str], plans_name: str, arguments: Namespace, *, without_bad_cases: bool = False
) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess

    more = {"without_bad_cases": True} if without_bad_cases else {}
    preprocess(datasets, plans_name, arguments.c, arguments.np, arguments.verbose, _shows_bars(arguments), **more)


def _shows_bars(arguments: Namespace) -> bool:
    """Tell whether there are progress bars, which lines of a log would tear apart."""
    return not (arguments.no_pbar or arguments.verbose)


# ------------------------------------------------------------------------------------------------ parsers


def build_plan_and_preprocess_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Fingerprint datasets, plan networks for them and preprocess their cases.")
    _add_dataset_option(parser)
    _add_fingerprint_options(parser)
    parser.add_argument(
        "-npfp",
        type=_at_least_one,
        default=None,
        metavar="N",
        help=f"Processes that extract the fingerprint. {_BY_MACHINE}",
    )
    _add_planning_options(parser)
    parser.add_argument("--no_pp", action="store_true", help="Stop after planning.")
    _add_preprocessing_options(parser)
    _add_output_options(parser)
    parser.add_argument(
        "--federated",
        nargs="?",
        choices=("ffe", "asym"),
        const="ffe",
        default=None,
        help="Plan as a member of the federation joined with nnUNetv2_fed_join. ffe (the default): all "
        "sites plan from the pooled fingerprint of their data, alike or, where the federation has --networks own, "
        "each for its own GPU; no image leaves the site. "
        "asym: this site plans for itself, networks may differ.",
    )
    parser.add_argument(
        "--share_extrema",
        action="store_true",
        help="With --federated ffe: let the smallest and largest foreground voxel of each channel "
        "leave the site too. Nothing in nnU-Net needs them. They are in the pooled fingerprint if "
        "all sites share them.",
    )
    return parser


def build_extract_fingerprint_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Extract the fingerprint of datasets: shapes, spacings and intensities.")
    _add_dataset_option(parser)
    _add_fingerprint_options(parser)
    parser.add_argument(
        "-np", type=_at_least_one, default=None, metavar="N", help=f"Number of processes. {_BY_MACHINE}"
    )
    _add_output_options(parser)
    return parser


def build_plan_experiment_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Plan networks for datasets whose fingerprint has been extracted.")
    _add_dataset_option(parser)
    _add_planning_options(parser)
    return parser


def build_preprocess_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Preprocess datasets that have been planned.")
    _add_dataset_option(parser)
    parser.add_argument("-plans_name", default="nnUNetPlans", help="Name of the plans. Default: nnUNetPlans")
    _add_preprocessing_options(parser)
    _add_bad_cases_option(parser)
    _add_output_options(parser)
    return parser


def _add_dataset_option(parser: ArgumentParser) -> None:
    parser.add_argument(
        "-d",
        nargs="+",
        type=dataset_argument,
        required=True,
        metavar="DATASET",
        help="Numbers of the datasets, such as 4, or their names, such as Dataset004_Hippocampus.",
    )


def _add_fingerprint_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "-fpe",
        default="DatasetFingerprintExtractor",
        metavar="CLASS",
        help="Class that extracts the fingerprint. Default: DatasetFingerprintExtractor",
    )
    parser.add_argument(
        "--verify_dataset_integrity",
        action="store_true",
        help="Check all files first. Do this once for every new dataset.",
    )
    _add_bad_cases_option(parser)
    parser.add_argument(
        "--clean", action="store_true", help="Extract the fingerprint even if there is one from an earlier run."
    )


def _add_bad_cases_option(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--without_bad_cases",
        action="store_true",
        help="Check all files, and go on without the cases that cannot be read or do not fit together. They are listed "
        "with their faults, here and in bad_cases.json of the preprocessed dataset.",
    )


def _add_planning_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "-pl",
        default="ExperimentPlanner",
        metavar="CLASS",
        help="Class that plans. Default: ExperimentPlanner; nnUNetPlannerResEncM, L and XL are stronger.",
    )
    parser.add_argument(
        "-gpu_memory_target",
        type=float,
        default=None,
        metavar="GB",
        help="GPU memory to plan for. Default: what the planner is made for. Give the plans another "
        "name if you change it.",
    )
    parser.add_argument(
        "-preprocessor_name",
        default="DefaultPreprocessor",
        metavar="CLASS",
        help="Class that preprocesses, noted in the plans. Default: DefaultPreprocessor",
    )
    parser.add_argument(
        "-overwrite_target_spacing",
        nargs=3,
        type=float,
        default=None,
        metavar="MM",
        help="Spacing of 3d_fullres in the order of the array axes (slices first). Also changes the "
        "order of axes, 3d_lowres and the spacing of 2d. Give the plans another name.",
    )
    parser.add_argument(
        "-overwrite_plans_name", default=None, metavar="NAME", help="Name of the plans instead of the planner's own."
    )


def _add_preprocessing_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "-c",
        nargs="+",
        default=list(CONFIGURATIONS),
        metavar="CONFIGURATION",
        help=f"Configurations to preprocess. Default: {' '.join(CONFIGURATIONS)}; those that the plans "
        f"do not have are passed over.",
    )
    parser.add_argument(
        "-np",
        nargs="+",
        type=_at_least_one,
        default=None,
        metavar="N",
        help="Processes that preprocess: one number, or one for each configuration. Fewer need less "
        f"memory. {_BY_MACHINE}",
    )


def _add_output_options(parser: ArgumentParser) -> None:
    parser.add_argument("--verbose", action="store_true", help="Log each step instead of showing progress bars.")
    parser.add_argument("--no_pbar", action="store_true", help="Show no progress bars.")


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a number of processes; it must be 1 or more")
    return int(text)
