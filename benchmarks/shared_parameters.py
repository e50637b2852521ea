"""Measure how much sites with networks of their own share, by name and by resolution: no training is needed.

    python -m benchmarks.shared_parameters breastus --folder WORK [--data FOLDER] [--arms own asym asym-resolution]

Lays out the datasets of a study of `benchmarks.studies`, plans each arm of `own_networks.json` with real commands (a
coordinator and the sites as processes, over HTTP), builds the planned networks, and matches them as a coordinator does
when registration closes. Prints a table in Markdown. Arms that are planned already are not planned again.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.studies import TASKS, Task, dataset_name, local_sites, write_datasets
from nnunetv2.comparison.arms import Arm, choose_arms, read_arms
from nnunetv2.federated.aggregation import matching
from nnunetv2.federated.commands.simulate import run_everywhere, running_coordinator
from nnunetv2.utilities.json_files import read_json

PLANS = "nnUNetPlans"
ARMS_FILE = Path(__file__).with_name("own_networks.json")


def plan(arm: Arm, task: Task, raw: Path, work: Path) -> dict[str, dict[str, Any]]:
    """Plan an arm with real commands; return the plans of each site."""
    roots = {"nnUNet_raw": str(raw), "nnUNet_preprocessed": str(work), "nnUNet_results": str(work / "none")}
    sites = local_sites(task, work / "credentials", roots)
    files = {site.name: work / site.dataset / f"{PLANS}.json" for site in sites}
    if all(file.exists() for file in files.values()):
        return {site: read_json(file) for site, file in files.items()}
    with running_coordinator(work / "federation", sites, arm.networks_options, show=lambda line: None):
        run_everywhere(
            sites,
            lambda site: [
                *("nnUNetv2_plan_and_preprocess", "-d", site.dataset, "--federated", arm.planning, "--no_pp"),
                *("-npfp", "1", "--no_pbar", "-overwrite_plans_name", PLANS, *arm.planning_options_at(site.dataset)),
            ],
            step="plan",
            log_folder=work / "logs",
            show=lambda line: None,
        )
    return {site: read_json(file) for site, file in files.items()}


def manifest_of(plans: Mapping[str, Any], dataset_json: Mapping[str, Any], configuration: str) -> matching.Manifest:
    """Return the tensors of the network that plans describe."""
    from nnunetv2.models.networks import build_network
    from nnunetv2.plans.plans_manager import PlansManager, determine_num_input_channels
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    manager = PlansManager(dict(plans))
    description, labels = manager.get_configuration(configuration), manager.get_label_manager(dict(dataset_json))
    network = build_network(
        nnUNetTrainer.build_network_architecture,
        plans_manager=manager,
        configuration_manager=description,
        dataset_json=dict(dataset_json),
        num_output_channels=labels.num_segmentation_heads,
        enable_deep_supervision=True,
        num_input_channels=determine_num_input_channels(manager, description, dataset_json),
    )
    return matching.describe_tensors(matching.distinct_tensors(network.state_dict())[0])


def shared_by_all(matched: matching.Matching, sites: Sequence[str]) -> int:
    """Return how many parameters all sites have in common."""
    return sum(
        math.prod(matched.entries[name].shape) for name, holders in matched.shared.items() if len(holders) == len(sites)
    )


def rows(arm: Arm, task: Task, raw: Path, work: Path) -> Iterator[str]:
    """Yield the rows of an arm, one per site."""
    planned = plan(arm, task, raw, work)
    manifests = {
        site: manifest_of(plans, read_json(raw / dataset_name(task, site) / "dataset.json"), task.configuration)
        for site, plans in planned.items()
    }
    matches = [matching.match_by(rule, manifests) for rule in ("name", "resolution")]
    for site, plans in planned.items():
        described = plans["configurations"][task.configuration]
        patch = " x ".join(map(str, described["patch_size"]))
        stages = described["architecture"]["arch_kwargs"]["n_stages"]
        total = matching.count_parameters(manifests[site])
        by_rule = " | ".join(
            f"{matched.coverage[site][0] / total:.1%}, {shared_by_all(matched, task.sites) / total:.1%}"
            for matched in matches
        )
        yield (
            f"| {arm.name} | {site} | {' '.join(arm.planning_options_at(dataset_name(task, site))) or 'default'} | "
            f"{patch} | {described['batch_size']} | {stages} | {total / 1e6:.2f} M | {by_rule} |"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, build, match, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FEDNNUNET_DATA", "../shared/data")))
    parser.add_argument("--folder", type=Path, required=True, help="a new folder")
    parser.add_argument("--arms", nargs="+", default=["own", "own-smaller", "own-planners", "asym", "equal-smallest"])
    parser.add_argument("--arms_file", type=Path, default=ARMS_FILE)
    arguments = parser.parse_args(argv)
    task, folder = TASKS[arguments.task], arguments.folder.resolve()
    raw = folder / "nnUNet_raw"
    if not raw.exists():
        write_datasets(task, arguments.data.resolve(), raw)
    print("Shared: with any other site, with all of them.\n")
    print("| arm | site | planning options | patch | batch | stages | parameters | shared by name | by resolution |")
    print("|---|---|---|---|---|---|---|---|---|")
    for arm in choose_arms(arguments.arms, read_arms(arguments.arms_file)):
        for row in rows(arm, task, raw, folder / arm.name):
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
