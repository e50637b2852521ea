import pickle
import sys

import pytest

from nnunetv2.training.data_augmentation.late_imports import importing_late

RARELY_NEEDED = "colorsys"  # any module that nobody else imports


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Write a module that imports the rare one at its top, and forget both afterwards."""
    (tmp_path / "user_of_rare.py").write_text(
        f"import {RARELY_NEEDED} as rare\nfrom {RARELY_NEEDED} import rgb_to_hsv\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in (RARELY_NEEDED, "user_of_rare"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield "user_of_rare"
    sys.modules.pop("user_of_rare", None)


def test_a_late_library_is_imported_by_the_first_call(user_module):
    with importing_late(RARELY_NEEDED):
        import user_of_rare
    assert RARELY_NEEDED not in sys.modules
    assert user_of_rare.rgb_to_hsv(0.0, 0.0, 1.0)[2] == 1.0
    assert user_of_rare.rare.rgb_to_hsv(1.0, 0.0, 0.0) == (0.0, 1.0, 1.0)
    assert RARELY_NEEDED in sys.modules


def test_a_library_that_is_there_already_is_used_as_it_is(user_module):
    import colorsys

    with importing_late(RARELY_NEEDED):
        import user_of_rare
    assert user_of_rare.rare is colorsys


def test_others_import_the_real_library_even_after_a_failure(user_module):
    with pytest.raises(ValueError, match="interrupted"), importing_late(RARELY_NEEDED):
        raise ValueError("interrupted")
    import colorsys

    assert colorsys.__spec__ is not None


def test_a_late_function_can_be_sent_to_another_process(user_module):
    with importing_late(RARELY_NEEDED):
        import user_of_rare
    function = pickle.loads(pickle.dumps(user_of_rare.rgb_to_hsv))
    assert function(1.0, 1.0, 1.0) == (0.0, 0.0, 1.0)
