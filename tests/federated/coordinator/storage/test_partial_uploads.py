"""Uploads that break and go on."""

import hashlib
import os

import pytest

from nnunetv2.federated.coordinator.storage.partial_uploads import KEPT_FOR_S, WORTH_KEEPING_BYTES, PartialUploads
from nnunetv2.federated.errors import RefusedError

KEY, D1, D2 = "runs/r/rounds/0", "1" * 64, "2" * 64
CONTENT = os.urandom(WORTH_KEEPING_BYTES + 10)


@pytest.fixture
def uploads(tmp_path):
    return PartialUploads(tmp_path)


def begin(uploads: PartialUploads, digest=D1, content=CONTENT, offset=0, key=KEY, site="A"):
    with uploads.writing(key, site, digest, offset=offset) as upload:
        upload.read_beginning()
        upload.append(content)
        return upload


def test_what_has_arrived_stays_and_counts_in_the_digest(uploads):
    begin(uploads)
    assert uploads.offset(KEY, "A", D1) == len(CONTENT)
    again = begin(uploads, content=b"rest", offset=len(CONTENT))
    assert again.hexdigest() == hashlib.sha256(CONTENT + b"rest").hexdigest()
    assert again.path.read_bytes() == CONTENT + b"rest"


def test_little_is_not_worth_keeping(uploads):
    begin(uploads, content=b"little")
    assert uploads.offset(KEY, "A", D1) == 0


def test_an_earlier_byte_is_gone_back_to(uploads):
    begin(uploads)
    begin(uploads, content=b"x", offset=WORTH_KEEPING_BYTES)
    assert uploads.offset(KEY, "A", D1) == WORTH_KEEPING_BYTES + 1


def test_a_gap_is_refused(uploads):
    with pytest.raises(RefusedError) as info, uploads.writing(KEY, "A", D1, offset=5):
        pass
    assert info.value.code == "wrong_offset"


def test_the_newest_request_writes(uploads):
    with uploads.writing(KEY, "A", D1, offset=0) as old:
        old.append(CONTENT)
        with uploads.writing(KEY, "A", D1, offset=len(CONTENT)) as new:
            with pytest.raises(RefusedError) as info:
                old.append(b"from a connection that is half dead")
            assert info.value.code == "taken_over"
            with pytest.raises(RefusedError, match="begun anew"):
                old.read_beginning()
            new.append(b"rest")
    assert new.path.read_bytes() == CONTENT + b"rest"


def test_what_is_complete_is_nobody_elses(uploads):
    """Else a site could have one thing checked and another one stored."""
    with uploads.writing(KEY, "A", D1, offset=0) as first:
        first.append(CONTENT)
        first.complete()
        with pytest.raises(RefusedError) as info, uploads.writing(KEY, "A", D1, offset=0):
            pass
        assert info.value.code == "taken_over", "the sender asks again, and hears that it is stored"
        assert first.path.read_bytes() == CONTENT and uploads.offset(KEY, "A", D1) == 0
        first.discard()
    assert list(begin(uploads).path.parent.iterdir()) == [begin(uploads).path]


def test_who_was_overtaken_does_not_complete(uploads):
    with uploads.writing(KEY, "A", D1, offset=0) as old:
        old.append(CONTENT)
        with uploads.writing(KEY, "A", D1, offset=0) as new:
            with pytest.raises(RefusedError) as info:
                old.complete()
            assert info.value.code == "taken_over"
            new.append(CONTENT)
            new.complete()
            assert new.path.read_bytes() == CONTENT


def test_a_document_made_anew_replaces_the_one_before(uploads, tmp_path):
    begin(uploads)
    begin(uploads, site="B")
    begin(uploads, digest=D2)
    assert [uploads.offset(KEY, site, digest) > 0 for site, digest in (("A", D1), ("A", D2), ("B", D1))] == [
        False,
        True,
        True,
    ]


def test_what_nobody_goes_on_with_is_removed(uploads):
    path = begin(uploads).path
    uploads.remove_old()
    assert path.exists()
    uploads.remove_old(now=path.stat().st_mtime + KEPT_FOR_S + 1)
    assert not path.exists()


def test_what_somebody_writes_or_stores_is_not_old(uploads):
    with uploads.writing(KEY, "A", D1, offset=0) as stalled, uploads.writing(KEY, "B", D2, offset=0) as stored:
        stalled.append(CONTENT)
        stored.append(CONTENT)
        stored.complete()
        uploads.remove_old(now=stalled.path.stat().st_mtime + 2 * KEPT_FOR_S)
        assert stalled.path.read_bytes() == stored.path.read_bytes() == CONTENT


def test_what_a_crash_kept_from_being_stored_is_removed(tmp_path):
    with PartialUploads(tmp_path).writing(KEY, "A", D1, offset=0) as upload:
        upload.append(CONTENT)
        upload.complete()
        PartialUploads(tmp_path).remove_old()
    assert not list(tmp_path.iterdir())
