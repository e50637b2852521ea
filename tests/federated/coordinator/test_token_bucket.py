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


def test_only_so_many_are_remembered(monkeypatch):
    monkeypatch.setattr(token_bucket, "MAX_REMEMBERED", 2)
    bucket = TokenBucket(per_s=1.0, at_once=1)
    for who in "ABAC":
        bucket.spend(who, 0.0)
    assert [bucket.wait_s(who, 0.0) for who in "ABC"] == [2.0, 0.0, 1.0]  # B has been quiet for longest
