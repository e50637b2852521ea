"""Keys: text that knows its parts, whichever class they have."""

import json

import pytest

from nnunetv2.federated.protocol.keys import ExchangeKey, FineKey, NumberedKey, RoundKey, RunKey
from nnunetv2.federated.protocol.messages import Aggregate, Message, Update


class TeaKey(ExchangeKey[Update, Aggregate]):
    """A key that only this test knows."""

    kind, pattern = "tea", "tea/{site}[/{again}]"

    def __new__(cls, site: str, again: int = 0):
        return cls._named(f"tea/{site}/{again}" if again else f"tea/{site}", site=site, again=again)


def test_a_key_is_its_text():
    key = RoundKey("r", 7)
    assert key == "runs/r/rounds/7" and {key: 1}["runs/r/rounds/7"] == 1
    assert (f"{key}", type(str(key)), json.dumps({"key": key})) == (key, str, '{"key": "runs/r/rounds/7"}')
    assert isinstance(key, RunKey) and isinstance(key, NumberedKey) and (key.run, key.number) == ("r", 7)


@pytest.mark.parametrize(("text", "parts"), [("tea/A", ("A", 0)), ("tea/A/3", ("A", 3))])
def test_what_stands_in_brackets_may_be_absent(text, parts):
    key = TeaKey.parse(text)
    assert (key, key.site, key.again) == (text, *parts)


@pytest.mark.parametrize("text", ["tea", "tea/", "tea/A/0", "tea/A/03", "tea/A/1000", "tea/.A", "tea/A/3/", "tea/A\n"])
def test_other_text_is_no_key(text):
    assert TeaKey.parse(text) is None


@pytest.mark.parametrize("run", ["", ".hidden", "a/b", "a\0", "x" * 129])
def test_parts_are_checked_when_a_key_is_made(run):
    with pytest.raises(ValueError, match="cannot be part of a key"):
        RoundKey(run, 0)


def test_a_key_names_the_messages_that_are_exchanged_under_it():
    assert TeaKey.__orig_bases__[0].__args__ == (Update, Aggregate)
    assert all(issubclass(one, Message) for one in TeaKey.__orig_bases__[0].__args__) and FineKey().again == 0
