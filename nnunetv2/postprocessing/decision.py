"""Decide for which classes to keep the largest component only.

Counts of voxels per case decide it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from nnunetv2.evaluation.case_files import list_pairs
from nnunetv2.evaluation.confusion import Confusion
from nnunetv2.evaluation.summary import counted_labels, labels_of, plain_class, score_classes, summarize
from nnunetv2.postprocessing.case_state import CaseState, open_case, try_entries
from nnunetv2.utilities.map_cases import map_cases

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
    from nnunetv2.plans.label_manager import LabelManager

logger = logging.getLogger(__name__)

LabelOrRegion = int | tuple[int, ...]
Counts = dict[str, Confusion]
"""Case (its file name) -> agreement of prediction and reference."""


@dataclass
class Decision:
    """Which removals pay, and the scores before and after them."""

    folder_predictions: str
    folder_ref: str
    classes: list[LabelOrRegion]
    ignore_label: int | None
    before: Counts
    after: Counts
    accepted: list[LabelOrRegion | list[int]] = field(default_factory=list)
    """Values of `labels_or_regions`, in the order in which they apply: a list of labels for all foreground."""
    changed: set[str] = field(default_factory=set)
    """Cases from which something is removed."""

    @property
    def names(self) -> list[str]:
        """File names of all cases."""
        return list(self.before)

    def summary_before(self) -> dict[str, Any]:
        """Return the content of summary.json for the predictions."""
        return self._summary(self.before, self.folder_predictions)

    def summary_after(self, folder: str) -> dict[str, Any]:
        """Return the content of summary.json for the postprocessed predictions, which lie in `folder`."""
        return self._summary(self.after, folder)

    def _summary(self, counts: Counts, folder: str) -> dict[str, Any]:
        metrics = self.score(counts)
        cases = [
            {
                "metrics": metrics[name],
                "prediction_file": os.path.join(folder, name),
                "reference_file": os.path.join(self.folder_ref, name),
            }
            for name in counts
        ]
        return {"metric_per_case": cases, **summarize([case["metrics"] for case in cases])}

    def score(self, counts: Counts, classes: Sequence[LabelOrRegion] | None = None) -> dict[str, dict]:
        """Return the metrics of each case, of all classes by default."""
        classes = self.classes if classes is None else classes
        return {name: score_classes(confusion, classes, self.ignore_label) for name, confusion in counts.items()}

    def mean_dice(
        self, counts: Counts, classes: Sequence[LabelOrRegion] | None = None
    ) -> tuple[float, dict[LabelOrRegion, float]]:
        """Return the mean Dice over the classes, and of each of them."""
        result = summarize(list(self.score(counts, classes).values()), warn=False)
        return result["foreground_mean"]["Dice"], {which: scores["Dice"] for which, scores in result["mean"].items()}


def decide(
    folder_predictions: str,
    folder_ref: str,
    reader: BaseReaderWriter,
    file_ending: str,
    label_manager: LabelManager,
    num_processes: int,
    *,
    hidden: Collection[int] = (),
) -> Decision:
    """Find the removals that pay; see `determine_postprocessing`. Each file is read once.

    Args:
        hidden: Labels that the references do not have although they may be there: nothing is known of them.

    Raises:
        FileNotFoundError: There are no predictions, or one has no reference.
    """
    pairs = list_pairs(folder_ref, folder_predictions, file_ending, chill=True)
    foreground = [int(label) for label in label_manager.foreground_labels if label not in hidden]
    named = label_manager.foreground_regions if label_manager.has_regions else foreground
    classes = [plain_class(entry) for entry in named]
    files = [file for pair in pairs.values() for file in pair]
    labels = counted_labels(classes, label_manager.ignore_label)
    opened = map_cases(partial(open_case, reader=reader, labels=labels), pairs, num_processes, files)
    states = {name: state for name, (state, _) in opened.items()}
    before = {name: confusion for name, (_, confusion) in opened.items()}
    decision = Decision(folder_predictions, folder_ref, classes, label_manager.ignore_label, before, dict(before))
    trials = _Trials(states, num_processes, files)
    _try_all_foreground(decision, trials, foreground)
    if len(classes) > 1:
        for group in group_disjoint(classes):
            _try_classes(decision, trials, group)
    return decision


def group_disjoint(classes: Sequence[LabelOrRegion]) -> list[list[LabelOrRegion]]:
    """Split classes into runs without a common label.

    Removing voxels of one leaves the others of its run alone.
    """
    groups: list[list[LabelOrRegion]] = []
    taken: set[int] = set()
    for entry in classes:
        labels = set(labels_of(entry))
        if not groups or labels & taken:
            groups.append([])
            taken = set()
        groups[-1].append(entry)
        taken |= labels
    return groups


class _Trials:
    """The cases, and which removals of the last trial are still to be carried out."""

    def __init__(self, states: Mapping[str, CaseState], num_processes: int, files: Sequence[str]) -> None:
        self._states, self._num_processes, self._files = dict(states), num_processes, files
        self.accepted: list[int] = []

    def run(self, entries: Sequence[LabelOrRegion]) -> list[dict[str, Confusion]]:
        """Return, per entry and case, the confusion of the voxels to remove."""
        labels = [labels_of(entry) for entry in entries]
        cases = {name: (state, self.accepted, labels) for name, state in self._states.items()}
        results = map_cases(try_entries, cases, self._num_processes, self._files)
        self.accepted = []
        self._states = {name: state for name, (state, _) in results.items()}
        return [{name: removals[number] for name, (_, removals) in results.items()} for number in range(len(entries))]


def _try_all_foreground(decision: Decision, trials: _Trials, labels: list[int]) -> None:
    (removals,) = trials.run([tuple(labels)])
    counts = _after(decision.after, removals)
    (old_mean, old), (new_mean, new) = decision.mean_dice(decision.after), decision.mean_dice(counts)
    # Comparisons with NaN, a class that is nowhere, are False: it neither speaks for a removal nor against it.
    if new_mean > old_mean and not any(new[which] < old[which] for which in decision.classes):
        logger.info("largest component of all foreground: kept, mean Dice %.5f instead of %.5f", new_mean, old_mean)
        trials.accepted = [0]
        _accept(decision, labels, removals, counts)
    else:
        logger.info("largest component of all foreground: not kept, mean Dice %.5f against %.5f", new_mean, old_mean)


def _try_classes(decision: Decision, trials: _Trials, entries: Sequence[LabelOrRegion]) -> None:
    for number, (entry, removals) in enumerate(zip(entries, trials.run(entries))):
        counts = _after(decision.after, removals)
        old, new = (decision.mean_dice(of, [entry])[1][entry] for of in (decision.after, counts))
        if new > old:
            logger.info("largest component of %s: kept, Dice %.5f instead of %.5f", entry, new, old)
            trials.accepted.append(number)
            _accept(decision, entry, removals, counts)
        else:
            logger.info("largest component of %s: not kept, Dice %.5f against %.5f", entry, new, old)


def _accept(decision: Decision, entry: LabelOrRegion | list[int], removals: Counts, counts: Counts) -> None:
    decision.accepted.append(entry)
    decision.after = counts
    decision.changed |= {name for name, removal in removals.items() if removal.counts.any()}


def _after(counts: Counts, removals: Counts) -> Counts:
    return {
        name: confusion.moved_to(0, removals[name]) if removals[name].counts.any() else confusion
        for name, confusion in counts.items()
    }
