"""What a site has masked is made once, and what it has promised it keeps, whatever goes down."""

import json
import threading

import numpy as np
import pytest
from patience import PATIENCE_S

from nnunetv2.federated.errors import FederationError, RefusedError
from nnunetv2.federated.protocol.document import TensorSpec, file_digest
from nnunetv2.federated.protocol.secure_messages import MaskedUpdate
from nnunetv2.federated.site.outbox import LOCK_FILE, SPENT_FILE, Outbox
from nnunetv2.federated.site.private_files import locked

KEY, CONTEXT = "runs/r/uploads/3", "c" * 64
MESSAGE = MaskedUpdate(lanes={"w": "0" * 64})


def put(outbox, value=1, key=KEY, context=CONTEXT):
    return outbox.put(key, context, MESSAGE, {"masked.w": TensorSpec("U32", (4,))}, [np.full(4, value, np.uint32)])


def test_what_was_masked_first_is_what_is_sent_after_a_crash(tmp_path):
    with put(Outbox(tmp_path)) as first:
        digest = file_digest(first.path)
    again = Outbox(tmp_path)
    again.check_context(KEY, CONTEXT)
    with again.held(KEY) as held:
        assert file_digest(held.path) == digest
    with put(again, value=2) as second:  # a training that was done again found something else
        assert file_digest(second.path) == digest


def test_a_lost_document_is_not_made_again(tmp_path):
    with put(Outbox(tmp_path)) as document:
        document.path.unlink()
    with pytest.raises(RefusedError) as refused:
        Outbox(tmp_path).check_unspent(KEY, CONTEXT)
    assert refused.value.code == "round_spent"
    with pytest.raises(RefusedError):
        put(Outbox(tmp_path), context="d" * 64)
    put(Outbox(tmp_path), key="runs/r/uploads/4", context="d" * 64).close()


def test_a_document_of_another_context_is_not_sent(tmp_path):
    put(Outbox(tmp_path)).close()
    with pytest.raises(RefusedError, match="a second time"):
        Outbox(tmp_path).check_context(KEY, "d" * 64)


def test_a_crash_between_document_and_promise_is_made_good(tmp_path):
    put(Outbox(tmp_path)).close()
    (tmp_path / SPENT_FILE).unlink()
    outbox = Outbox(tmp_path)
    outbox.check_context(KEY, CONTEXT)
    outbox.held(KEY).path.unlink()
    with pytest.raises(RefusedError):
        Outbox(tmp_path).check_unspent(KEY, "d" * 64)


def test_a_torn_line_of_promises_is_one_that_was_not_made(tmp_path):
    put(Outbox(tmp_path)).close()
    with (tmp_path / SPENT_FILE).open("a") as file:
        file.write('{"kind":"answ')
    outbox = Outbox(tmp_path)
    outbox.promise_survivors("runs/r/survivors/3", "e" * 64)
    lines = [json.loads(line) for line in (tmp_path / SPENT_FILE).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["masked", "answered"]


@pytest.mark.parametrize("content", ["no JSON\n", '{"kind": "masked"}\n', "[]\n"])
def test_promises_that_cannot_be_read_let_nothing_out(tmp_path, content):
    (tmp_path / SPENT_FILE).write_text(content)
    with pytest.raises(FederationError, match="nothing is sent"):
        Outbox(tmp_path)


def test_a_site_answers_for_one_set_of_survivors_per_exchange(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.promise_survivors("runs/r/survivors/3", "e" * 64)
    outbox.promise_survivors("runs/r/survivors/3", "e" * 64)
    outbox.promise_survivors("runs/r/survivors/4", "f" * 64)
    with pytest.raises(RefusedError) as refused:
        Outbox(tmp_path).promise_survivors("runs/r/survivors/3", "f" * 64)
    assert refused.value.code == "second_set"


def test_an_exchange_that_is_over_stays_so_until_a_person_says_that_all_begins_anew(tmp_path):
    outbox = Outbox(tmp_path)
    put(outbox).close()
    outbox.drop(KEY)
    assert outbox.held(KEY) is None and outbox.is_closed(KEY) and outbox.has_promises
    outbox.start_anew()
    assert not outbox.has_promises and not outbox.is_closed(KEY)
    with pytest.raises(RefusedError):  # a context is used once, whatever anybody says
        Outbox(tmp_path).check_unspent(KEY, CONTEXT)
    put(Outbox(tmp_path), context="d" * 64).close()


def test_documents_of_rounds_that_went_on_are_deleted(tmp_path):
    outbox = Outbox(tmp_path)
    put(outbox).close()
    put(outbox, key="runs/r/uploads/4", context="d" * 64).close()
    outbox.drop_others(["runs/r/uploads/4"])
    assert outbox.held(KEY) is None
    outbox.held("runs/r/uploads/4").close()


def test_a_line_that_another_process_is_writing_is_not_taken_for_a_torn_one(tmp_path):
    Outbox(tmp_path).promise_survivors("runs/r/survivors/0", "d" * 64)
    whole = (tmp_path / SPENT_FILE).read_text()
    found: list[Outbox] = []
    reader = threading.Thread(target=lambda: found.append(Outbox(tmp_path)), daemon=True)
    with locked(tmp_path / LOCK_FILE):
        (tmp_path / SPENT_FILE).write_text(whole + whole[:20])
        reader.start()
        reader.join(0.5)  # long enough to show a fault, and none is shown for lack of time
        assert not found and (tmp_path / SPENT_FILE).read_text() == whole + whole[:20]
        (tmp_path / SPENT_FILE).write_text(whole + whole)
    reader.join(PATIENCE_S)
    assert found and (tmp_path / SPENT_FILE).read_text() == whole + whole
