"""Run the steps of a comparison with the commands that people type.

A step that is whole is not run again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nnunetv2.comparison.arms import FEDERATED_TRAINER, Arm
from nnunetv2.comparison.known_results import KnownResults, models_of
from nnunetv2.comparison.plans_patch import patch_plans
from nnunetv2.comparison.scores import POOLED, Score, read_scores
from nnunetv2.comparison.study import Study
from nnunetv2.comparison.study_folder import (
    UNFINISHED,
    StudyFolder,
    link_datasets,
    link_tests,
    pooled_dataset,
    whole_or_nothing,
)
from nnunetv2.federated.commands.simulate import LocalSite, RunningProcess, run_everywhere, running_coordinator
from nnunetv2.training.seeding import SEED_VARIABLE
from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.command_line import find_command
from nnunetv2.utilities.json_files import read_json
from nnunetv2.utilities.plain_text import show

COST_FILE = "cost.json"
SURFACE_TOLERANCE_MM = 1.0


class Runner:
    """The steps of one comparison, in the order in which they need each other."""

    def __init__(self, study: Study, folder: Path, known: KnownResults | None = None) -> None:
        self.study, self.folder = study, StudyFolder(folder)
        self.known = known or KnownResults()
        self._total = len(study.arms) * study.seeds

    def run(self) -> list[Score]:
        """Run all steps that are not whole yet, and return all scores.

        Seed by seed, so that early results hold for all arms.
        """
        link_datasets(self.study, self.folder)
        link_tests(self.study, self.folder)
        scores: list[Score] = []
        for seed in range(self.study.seeds):
            for number, arm in enumerate(self.study.arms):
                if (arm.name, seed) in self.known.scores:
                    scores += self.known.scores[arm.name, seed]
                    continue
                show(
                    f"--- arm {arm.name}, seed {seed} ({seed * len(self.study.arms) + number + 1} of {self._total}) ---"
                )
                self._plan(arm)
                self._train(arm, seed)
                scores += self._test(arm, seed)
        return scores

    # -------------------------------------------------------------------------------------------------- planning
    def _plan(self, arm: Arm) -> None:
        with whole_or_nothing(self.folder.planned(arm.plan_group)) as preprocessed:
            if preprocessed is None:
                return
            sites = self._sites(arm, preprocessed, preprocessed / "no_results", seed=0, work=preprocessed)
            step = f"plan.{arm.plan_group}"
            # Planners have names of their own for plans; here the folder tells the plans of arms apart.
            named = ["-overwrite_plans_name", self.study.plans_name]

            def plan(site: LocalSite) -> list[str]:
                return [*_planning(site), *named, *arm.planning_options_at(site.dataset)]

            if arm.is_federated:
                federation = preprocessed / "federation"
                with running_coordinator(federation, sites, arm.networks_options, show=show_commands) as coordinator:
                    self._everywhere(
                        step, sites, lambda site: [*plan(site), "--federated", arm.planning], coordinator=coordinator
                    )
            else:
                self._everywhere(step, sites, plan)
            for site in sites:
                patch_plans(preprocessed / site.dataset / f"{self.study.plans_name}.json", self.study.plans_patch)
            self._everywhere(
                f"preprocess.{arm.plan_group}",
                sites,
                lambda site: [
                    "nnUNetv2_preprocess",
                    *("-d", site.dataset, "-c", self.study.configuration, "-np", "1"),
                    *("-plans_name", self.study.plans_name, "--no_pbar"),
                ],
            )

    # -------------------------------------------------------------------------------------------------- training
    def _train(self, arm: Arm, seed: int) -> None:
        with whole_or_nothing(self.folder.trained(arm.name, seed)) as results:
            if results is None:
                return
            sites = self._sites(arm, self.folder.planned(arm.plan_group), results, seed=seed, work=results)
            step = f"train.{arm.name}.seed_{seed}"
            begun = time.monotonic()
            cost: dict[str, Any] = {}
            if arm.is_federated:
                length = ("--epochs", self.study.epochs, "--iterations", self.study.iterations)
                settings = [
                    *map(str, (*length, "--val-iterations", self.study.val_iterations)),
                    *arm.networks_options,
                    *arm.coordinator_options,
                ]
                federation = results / "federation"
                with running_coordinator(federation, sites, settings, show=show_commands) as coordinator:
                    self._everywhere(step, sites, lambda site: self._training(arm, site), coordinator=coordinator)
                    cost["bytes"] = read_traffic(federation)
            else:
                self._everywhere(step, sites, lambda site: [*self._training(arm, site), *self._length(arm)])
            cost["seconds"] = time.monotonic() - begun
            save_json_atomically(cost, results / COST_FILE)

    def _training(self, arm: Arm, site: LocalSite) -> list[str]:
        study = self.study
        return [
            *("nnUNetv2_train", site.dataset, study.configuration, study.fold, "-tr", trainer_of(arm)),
            *("-p", study.plans_name, "-device", study.device, "--no_validation", *arm.training_options),
        ]

    def _length(self, arm: Arm) -> list[str]:
        """Return the options that give a network without a coordinator the length of all others."""
        factor = len(self.study.sites) if arm.budget == "all" else 1
        epochs, iterations = self.study.epochs, self.study.iterations * factor
        return [
            *map(str, ("--epochs", epochs, "--iterations", iterations, "--val_iterations", self.study.val_iterations))
        ]

    # --------------------------------------------------------------------------------------------------- testing
    def _test(self, arm: Arm, seed: int) -> list[Score]:
        """Predict all test cases with every model of an arm, and score them."""
        scores: list[Score] = []
        tested: dict[str, Path] = {}
        for model, folder in self._models(arm, seed).items():
            predicted = self.folder.predicted(arm.name, seed, model)
            with whole_or_nothing(predicted) as output:
                if output is not None:
                    digest = digest_model(folder, self.study.fold, arm.checkpoint)
                    if digest in tested:  # all sites of a federation may end with the same network
                        shutil.copytree(tested[digest], output, dirs_exist_ok=True)
                    else:
                        self._predict(arm, seed, model, folder, output)
                    save_json_atomically({"digest": digest}, output / "model.json")
            tested[str(read_json(predicted / "model.json")["digest"])] = predicted
            ending = self.study.sites[0].description()["file_ending"]
            scores += read_scores(predicted / "summary.json", ending=ending, arm=arm.name, seed=seed, model=model)
        return scores

    def _models(self, arm: Arm, seed: int) -> dict[str, Path]:
        """Return the model folders of an arm: name of the site, or `POOLED` -> folder."""
        results = self.folder.trained(arm.name, seed)
        name = f"{trainer_of(arm)}__{self.study.plans_name}__{self.study.configuration}"
        datasets = {POOLED: pooled_dataset(self.study)}
        return {model: results / datasets.get(model, model) / name for model in models_of(arm, self.study)}

    def _predict(self, arm: Arm, seed: int, model: str, folder: Path, output: Path) -> None:
        study, tests = self.study, self.folder.tests
        unused = self.folder.path / "none"
        environment = self._environment(unused, unused, seed)
        whose = LocalSite(name=model, dataset=model, credential=unused / "credential.json", environment=environment)
        label = f"{arm.name}.seed_{seed}.{model}"
        self._everywhere(
            f"predict.{label}",
            [whose],
            lambda site: [
                *("nnUNetv2_predict_from_modelfolder", "-i", str(tests / "images"), "-o", str(output)),
                *("-m", str(folder), "-f", study.fold, "-chk", arm.checkpoint, "-device", study.device),
                *("-npp", "1", "-nps", "1", "--disable_progress_bar"),
            ],
        )
        self._everywhere(
            f"evaluate.{label}",
            [whose],
            lambda site: [
                *("nnUNetv2_evaluate_folder", str(tests / "labels"), str(output), "--surface"),
                *("-tolerance", str(SURFACE_TOLERANCE_MM), "-np", str(os.cpu_count() or 1)),
                *("-djfile", str(folder / "dataset.json"), "-pfile", str(folder / "plans.json")),
            ],
        )

    # ---------------------------------------------------------------------------------------------------- helpers
    def _sites(self, arm: Arm, preprocessed: Path, results: Path, *, seed: int, work: Path) -> list[LocalSite]:
        names = [pooled_dataset(self.study)] if arm.training == "pooled" else [one.name for one in self.study.sites]
        roots = self._environment(preprocessed, results, seed)
        return [
            LocalSite(name=name, dataset=name, credential=work / "credentials" / f"{name}.json", environment=roots)
            for name in names
        ]

    def _environment(self, preprocessed: Path, results: Path, seed: int) -> Mapping[str, str]:
        return {
            "nnUNet_raw": str(self.folder.raw),
            "nnUNet_preprocessed": str(preprocessed),
            "nnUNet_results": str(results),
            SEED_VARIABLE: str(seed),
        }

    def _everywhere(
        self,
        step: str,
        sites: Sequence[LocalSite],
        command_of: Callable[[LocalSite], Sequence[str]],
        *,
        coordinator: RunningProcess | None = None,
    ) -> None:
        run_everywhere(
            sites, command_of, step=step, log_folder=self.folder.logs, show=show_commands, coordinator=coordinator
        )


def show_commands(line: str) -> None:
    """Show which commands run; their output is in the logs."""
    if "] $ " in line:
        show(line)


def trainer_of(arm: Arm) -> str:
    """Return the class of an arm's trainer."""
    return arm.trainer or (FEDERATED_TRAINER if arm.is_federated else "nnUNetTrainer")


def _planning(site: LocalSite) -> list[str]:
    return ["nnUNetv2_plan_and_preprocess", "-d", site.dataset, "--no_pp", "-npfp", "1", "--no_pbar"]


def read_traffic(federation: Path) -> int:
    """Return the bytes between sites and coordinator, which must be running."""
    command = [find_command("nnUNetv2_fed_status"), "--json", "--folder", str(federation)]
    status = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return sum(site["bytes_received"] + site["bytes_sent"] for site in status["sites"])


def digest_model(folder: Path, fold: str, checkpoint: str) -> str:
    """Return the SHA-256 of weights, plans and labels.

    Within an arm, they are all that decides a model's predictions.
    """
    from nnunetv2.models.checkpoint_file import load_checkpoint_file

    plans = {key: value for key, value in read_json(folder / "plans.json").items() if key != "dataset_name"}
    description = read_json(folder / "dataset.json")
    description = {
        key: description.get(key) for key in ("labels", "regions_class_order", "channel_names", "file_ending")
    }
    digest = hashlib.sha256(json.dumps([plans, description], sort_keys=True).encode())
    weights = load_checkpoint_file(folder / f"fold_{fold}" / checkpoint)["network_weights"]
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def read_costs(study: Study, folder: StudyFolder, known: KnownResults) -> dict[str, list[Mapping[str, Any]]]:
    """Return the costs of every arm's trainings.

    Arm -> per seed, `seconds` and, in a federation, `bytes`.
    """
    return {
        arm.name: [
            known.costs.get((arm.name, seed)) or read_json(folder.trained(arm.name, seed) / COST_FILE)
            for seed in range(study.seeds)
        ]
        for arm in study.arms
    }


def remove_unfinished(folder: StudyFolder) -> None:
    """Remove the folders of interrupted steps, and end their processes."""
    for name in ("planned", "trained", "predicted"):
        for old in (folder.path / name).rglob(f"*{UNFINISHED}"):
            stop_processes_of(old)
            shutil.rmtree(old, ignore_errors=True)


def stop_processes_of(folder: Path, within_s: float = 10.0) -> None:
    """End the processes of nnU-Net whose command or environment names a folder.

    Only Linux tells which these are. Those that cannot be killed are left: every attempt has a folder of its own.
    """
    deadline = time.monotonic() + within_s
    while (found := _processes_of(folder)) and time.monotonic() < deadline + within_s:
        is_late = time.monotonic() > deadline
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if is_late else signal.SIGTERM)
        time.sleep(0.2)


def _processes_of(folder: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            command, environment = ((process / name).read_bytes() for name in ("cmdline", "environ"))
            # Who looks at a file of the folder, or has a shell there, is left alone.
            named = [one for one in environment.split(b"\0") if one.startswith(b"nnUNet_")]
            named += [command] if b"nnUNetv2_" in command else []
            if any(os.fsencode(folder) in one for one in named) and int(process.name) != os.getpid():
                found.append(int(process.name))
    return found
