"""The picture of a training's curves, and the thread that writes it."""

from __future__ import annotations

import logging
import math
import pickle

import pytest

from nnunetv2.training.logging.background_reports import BackgroundReporter
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.logging.progress_plot import draw_progress

pytestmark = pytest.mark.usefixtures("real_pictures")

PNG = b"\x89PNG\r\n"


def filled_logger(folder, epochs: int = 3) -> MetaLogger:
    meta = MetaLogger(folder, False)
    for epoch in range(epochs):
        for key in ("train_losses", "val_losses", "lrs"):
            meta.log(key, 1 / (epoch + 1), epoch)
        meta.log("dice_per_class_or_region", [0.5], epoch)
        meta.log("mean_fg_dice", math.nan if epoch == 0 else 0.5, epoch)
        meta.log("epoch_start_timestamps", 10.0 * epoch, epoch)
        meta.log("epoch_end_timestamps", 10.0 * epoch + 8, epoch)
    return meta


def test_the_picture_is_written_whole_beside_the_curves(tmp_path):
    meta = filled_logger(tmp_path)
    meta.plot_progress_png(str(tmp_path))
    meta.local_logger.wait_for_plot()
    assert (tmp_path / "progress.png").read_bytes().startswith(PNG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["progress.csv", "progress.json", "progress.png"]


def test_nothing_is_drawn_before_the_first_epoch(tmp_path):
    draw_progress(filled_logger(tmp_path, epochs=0).get_checkpoint(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_curve_of_the_user_may_be_shorter(tmp_path):
    meta = filled_logger(tmp_path)
    meta.my_fantastic_logging["mine"] = [1]
    draw_progress(meta.get_checkpoint(), tmp_path)
    assert (tmp_path / "progress.png").exists()


def test_the_newest_curves_are_written_last(tmp_path):
    written, values = [], []
    reporter = BackgroundReporter([lambda curves, folder: written.append(curves["lrs"])])
    for epoch in range(20):
        values.append(epoch)
        reporter.write_soon({"lrs": values}, tmp_path)
    reporter.wait()
    assert written[-1] == list(range(20))


def test_a_report_that_fails_stops_neither_the_others_nor_the_training(tmp_path, caplog):
    def fail(curves, folder):
        raise KeyError("lrs")

    written = []
    reporter = BackgroundReporter([fail, lambda curves, folder: written.append(folder)])
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            reporter.write_soon({}, tmp_path)
            reporter.wait()
    assert written == [tmp_path, tmp_path] and "fail of" in caplog.text


def test_a_missing_folder_is_reported(tmp_path, caplog):
    meta = filled_logger(tmp_path)
    with caplog.at_level(logging.WARNING):
        meta.plot_progress_png(tmp_path / "missing")
        meta.local_logger.wait_for_plot()
    assert "draw_progress of" in caplog.text and "write_csv of" in caplog.text


@pytest.mark.slow
def test_a_logger_that_draws_can_be_copied_to_another_process(tmp_path):
    meta = filled_logger(tmp_path)
    meta.plot_progress_png(tmp_path)
    copied = pickle.loads(pickle.dumps(meta))
    meta.local_logger.wait_for_plot()
    assert copied.get_value("lrs", None) == meta.get_value("lrs", None)
