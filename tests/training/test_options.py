import math

import pytest

from nnunetv2.training.options import OptionError, TrainingOptions, check_class_names, options_in, split_results_name


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("epochs", 0, "--epochs is 0: expected a whole number from 1 on"),
        ("epochs", 2.5, "--epochs is 2.5"),
        ("iterations", True, "--iterations is True"),
        ("val_iterations", -1, "--val_iterations is -1"),
        ("batch_size", 0, "--batch_size is 0"),
        ("save_every", 0, "--save_every is 0"),
        ("early_stopping", -1, "--early_stopping is -1: expected a whole number from 0 on"),
        ("seed", 2**32, "--seed is 4294967296: expected a whole number from 0 to 4294967295"),
        ("initial_lr", 0, "--initial_lr is 0: expected a number above 0"),
        ("initial_lr", math.nan, "--initial_lr is nan"),
        ("weight_decay", math.inf, "--weight_decay is inf"),
        ("oversample", 1.1, "--oversample is 1.1: expected a number from 0 to 1"),
        ("stop_after_s", 0, "--stop_after is 0: expected a time above 0"),
        ("class_weights", {}, "--class_weights"),
        ("class_weights", {"tumor": -1}, "the weight of tumor is -1"),
        ("class_weights", {"tumor": math.inf}, "the weight of tumor is inf"),
    ],
)
def test_values_that_make_no_sense_are_refused_with_what_was_expected(option, value, complaint):
    with pytest.raises(OptionError) as refused:
        TrainingOptions(**{option: value})
    assert complaint in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["a__b", "_a", "a_", "a/b", "..", "", "a b", "a" * 61, "-a"])
def test_names_that_would_confuse_folders_are_refused(name):
    with pytest.raises(OptionError, match="--results_name"):
        TrainingOptions(results_name=name)


@pytest.mark.parametrize("name", ["low_lr", "lr1e-3", "v2.1", "0", "a" * 60])
def test_other_names_of_results_are_accepted(name):
    assert TrainingOptions(results_name=name).results_name == name


def test_options_are_shown_as_they_are_typed():
    options = TrainingOptions(epochs=5, initial_lr=1e-3, class_weights={"tumor": 4, "edema": 0.5}, stop_after_s=90.0)
    assert str(options) == "--epochs 5 --initial_lr 0.001 --class_weights tumor=4 edema=0.5 --stop_after 90s"
    assert str(TrainingOptions()) == ""


def test_a_checkpoint_keeps_what_is_trained_and_not_how_one_command_trains():
    options = TrainingOptions(epochs=5, seed=0, class_weights={"a": 2.0}, stop_after_s=60.0, results_name="x")
    kept = {"training_options": options.lasting()}
    assert kept == {"training_options": {"epochs": 5, "seed": 0, "class_weights": {"a": 2.0}}}
    assert options_in(kept, "file") == TrainingOptions(epochs=5, seed=0, class_weights={"a": 2.0})
    assert options_in({}, "file") == TrainingOptions()


@pytest.mark.parametrize(
    ("kept", "complaint"),
    [
        ({"warp": 9}, "checkpoint.pth was trained with options that this version does not know: warp"),
        ({"results_name": "../x"}, "does not know: results_name"),
        ({"epochs": "many"}, "checkpoint.pth: --epochs is 'many'"),
        (["epochs"], "does not know"),
    ],
)
def test_odd_options_in_a_checkpoint_name_the_file(kept, complaint):
    with pytest.raises(OptionError, match=complaint):
        options_in({"training_options": kept}, "checkpoint.pth")


def test_the_name_of_a_folder_names_class_and_results():
    assert split_results_name("T", TrainingOptions()) == ("T", TrainingOptions())
    assert split_results_name("T-low", TrainingOptions()) == ("T", TrainingOptions(results_name="low"))
    assert split_results_name("T-low-2", TrainingOptions())[1].results_name == "low-2"
    assert split_results_name("T-low", TrainingOptions(results_name="low"))[1].results_name == "low"
    with pytest.raises(OptionError, match="name different results"):
        split_results_name("T-low", TrainingOptions(results_name="high"))


def test_a_class_that_there_is_not_has_no_weight():
    with pytest.raises(OptionError, match="no class tumour; there are background, tumor"):
        check_class_names({"tumour": 2}, ["background", "tumor"])
