"""Pictures that take no time: drawing the curves and examples of a short training takes longer than its steps."""

import pytest


def _write_curves(curves, folder):
    (folder / "progress.png").write_bytes(b"picture")


def _write_examples(path, *_, **__):
    path.write_bytes(b"picture")


@pytest.fixture
def real_pictures():
    """Ask for this fixture to have pictures drawn."""


@pytest.fixture(autouse=True)
def stand_in_pictures(request, monkeypatch):
    """Let trainings write the files of their pictures, but not draw them."""
    if "real_pictures" in request.fixturenames:
        return
    monkeypatch.setattr("nnunetv2.training.logging.progress_plot.draw_progress", _write_curves)
    monkeypatch.setattr(
        "nnunetv2.training.data_augmentation.example_picture.save_augmentation_examples", _write_examples
    )
