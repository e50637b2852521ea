import sys
import threading

from nnunetv2.federated.coordinator import token_bucket
from nnunetv2.federated.coordinator.token_bucket import TokenBucket


def test_what_was_spent_comes_back_with_time():
    bucket = TokenBucket(per_s=2.0, at_once=3)
    for _ in range(3):
        assert bucket.wait_s("A", 10.0) == 0
        bucket.spend("A", 10.0)
    assert bucket.wait_s("A", 10.0) == 0.5
    assert bucket.wait_s("A", 10.25) == 0.25
    assert bucket.wait_s("A", 10.5) == 0
    assert bucket.wait_s("B", 10.0) == 0


def test_threads_together_spend_no_more_than_there_is():
    bucket, begin, outcomes = TokenBucket(per_s=1e-9, at_once=50), threading.Barrier(8), []

    def take() -> None:
        begin.wait()
        outcomes.extend(bucket.take("A", 10.0) for _ in range(100))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert len(outcomes) == 800 and outcomes.count(0.0) == 50


def test_only_so_many_are_remembered(monkeypatch):
    monkeypatch.setattr(token_bucket, "MAX_REMEMBERED", 2)
    bucket = TokenBucket(per_s=1.0, at_once=1)
    for who in "ABAC":
        bucket.spend(who, 0.0)
    assert [bucket.wait_s(who, 0.0) for who in "ABC"] == [2.0, 0.0, 1.0]  # B has been quiet for longest
