import json

import pytest

from nnunetv2.training import splits

TEN = [f"case_{i:02}" for i in range(10)]


def make_report():
    lines = []
    return lines, lines.append


def test_the_splits_of_ten_cases_are_those_of_the_reference(tmp_path):
    _, report = make_report()
    folds = splits.load_or_create_splits(tmp_path / "splits_final.json", lambda: TEN[::-1], report)
    assert [[key[-2:] for key in fold["val"]] for fold in folds] == [
        ["00", "07"],
        ["03", "09"],
        ["04", "06"],
        ["01", "08"],
        ["02", "05"],
    ]
    assert all(sorted(fold["train"] + fold["val"]) == TEN for fold in folds)
    assert json.loads((tmp_path / "splits_final.json").read_text()) == folds


def test_an_existing_split_file_is_used_as_it_is(tmp_path):
    mine = [{"train": ["a"], "val": ["b"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(mine))
    lines, report = make_report()
    assert splits.load_or_create_splits(tmp_path / "splits_final.json", lambda: TEN, report) == mine
    assert "splits_final.json" in lines[0] and "1" in lines[0]


def test_four_cases_cannot_be_split(tmp_path):
    with pytest.raises(ValueError, match="cannot split 4 training cases into 5 folds"):
        splits.load_or_create_splits(tmp_path / "splits_final.json", lambda: TEN[:4], print)
    assert not (tmp_path / "splits_final.json").exists()


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "splits_final.json").write_text('{"train": []}')
    with pytest.raises(ValueError, match="splits_final.json .*must hold a list"):
        splits.load_or_create_splits(tmp_path / "splits_final.json", lambda: TEN, print)


def test_fold_seven_of_five_is_the_random_split_of_the_reference():
    lines, report = make_report()
    train, val = splits.choose_fold([{"train": [], "val": []}] * 5, 7, lambda: TEN[::-1], report)
    assert [key[-2:] for key in train] == ["04", "06", "00", "09", "01", "07", "02", "08"]
    assert [key[-2:] for key in val] == ["03", "05"]
    assert any("fold 7 is not among the 5 splits" in line for line in lines)


def test_a_negative_fold_is_refused():
    with pytest.raises(ValueError, match="fold -1"):
        splits.choose_fold([{"train": ["a"], "val": ["b"]}], -1, lambda: TEN, print)


def test_cases_on_both_sides_are_named():
    lines, report = make_report()
    splits.choose_fold([{"train": ["a", "b"], "val": ["b"]}], 0, lambda: TEN, report)
    assert any("WARNING" in line and "b" in line for line in lines)


def test_cases_that_are_not_preprocessed_are_named():
    with pytest.raises(FileNotFoundError, match="1 cases of splits_final.json are not in there: b"):
        splits.require_preprocessed(["a", "b"], ["a"], "there")


def test_a_dataset_class_that_lists_no_cases_can_train_on_those_of_the_file(tmp_path):
    def identifiers():
        raise NotImplementedError

    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": ["a"], "val": ["b"]}]))
    assert splits.split_cases(path, 0, identifiers, str(tmp_path), print) == (["a"], ["b"])


@pytest.mark.parametrize(
    ("split", "problem"),
    [
        ({"train": ["a"], "val": []}, "fold 0 of .*splits_final.json has no validation cases"),
        ({"train": [], "val": ["a"]}, "fold 0 of .*splits_final.json has no training cases"),
        ({"train": [], "val": []}, "has no training and no validation cases"),
    ],
)
def test_an_empty_list_is_named(tmp_path, split, problem):
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([split]))
    with pytest.raises(ValueError, match=problem):
        splits.split_cases(path, 0, lambda: TEN, str(tmp_path), print)


@pytest.mark.parametrize("split", [{"train": "a", "val": ["b"]}, {"train": [1], "val": ["b"]}, {"train": ["a"]}, ["a"]])
def test_the_fold_that_is_none_is_named(tmp_path, split):
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": ["a"], "val": ["b"]}, split]))
    with pytest.raises(ValueError, match="splits_final.json must hold a list.*fold 1 is none"):
        splits.load_or_create_splits(path, lambda: TEN, print)
