"""Checkpoints that torch has written, read without torch."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from nnunetv2.federated.coordinator.models.checkpoint_reader import CheckpointReader, write_weights
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.protocol.document import open_document


def save(path, **weights):
    content = {
        "network_weights": OrderedDict(weights),
        "logging": {"lrs": [np.float32(0.5), np.float64("nan")], "more": np.arange(3)},
        "init_args": {"device": torch.device("cpu"), "plans": {"a": [1, {2}]}},
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.ones(2)}}},
    }
    torch.save(content, path)
    return path


def test_every_kind_of_floating_point_tensor_is_read(tmp_path):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(3, 4, 5, 6, generator=generator)
    tensors = {
        "module.a.weight": whole,
        "part": whole[1:, :, 2],
        "last": whole.to(memory_format=torch.channels_last),
        "double": whole.double(),
        "half": whole.half(),
        "brain": whole.bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(whole[0]),
        "steps": torch.tensor(7),
    }
    with CheckpointReader(save(tmp_path / "c.pth", **tensors)) as reader:
        assert set(reader.tensors) == {name.removeprefix("module.") for name in tensors} - {"steps"}
        for name in reader.tensors:
            expected = tensors.get(name, whole).detach().float().numpy()
            found = reader.read(name)
            assert found.dtype == np.float32 and found.shape == expected.shape
            np.testing.assert_array_equal(found, expected, err_msg=name)


def test_weights_become_a_document(tmp_path):
    write_weights(save(tmp_path / "c.pth", w=torch.ones(2, 3), b=torch.zeros(2).half()), tmp_path / "weights")
    with open_document(tmp_path / "weights") as document:
        assert {name: str(spec) for name, spec in document.specs.items()} == {"w": "F32[2, 3]", "b": "F32[2]"}


class Evil:
    def __reduce__(self):
        return print, ("this pickle has run",)


def test_nothing_in_a_checkpoint_is_run(tmp_path, capsys):
    torch.save({"network_weights": {"w": torch.ones(1)}, "evil": Evil()}, tmp_path / "c.pth")
    with CheckpointReader(tmp_path / "c.pth") as reader:
        assert list(reader.tensors) == ["w"]
    assert "has run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.write_bytes(b"no zip"), "no complete zip archive"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "no complete zip archive"),
        (lambda path: torch.save([1], path), "no network_weights"),
        (lambda path: torch.save({"network_weights": {"steps": torch.tensor(1)}}, path), "it has 0 tensors"),
        (lambda path: torch.save({"network_weights": {"w": torch.tensor([np.nan])}}, path), "w holds NaN"),
        (lambda path: replace_pickle(path, b"no pickle"), "data.pkl is damaged"),
        (lambda path: replace_pickle(path, pickle.dumps({"network_weights": 3})), "no network_weights"),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_its_name(tmp_path, damage, complaint):
    path = save(tmp_path / "c.pth", w=torch.ones(2))
    damage(path)
    with pytest.raises(FederationError, match=complaint) as refused:
        write_weights(path, tmp_path / "weights")
    assert str(path) in str(refused.value) and not (tmp_path / "weights").exists()


def replace_pickle(path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)


def test_a_tensor_that_reaches_beyond_its_values_is_refused(tmp_path):
    path = save(tmp_path / "c.pth", w=torch.ones(2, 3))
    with CheckpointReader(path) as reader:
        tensor = reader.tensors["w"]
        for change in (
            {"offset": 1},
            {"offset": -1},
            {"strides": (-1, 1)},
            {"strides": (1,)},
            {"shape": (3, 3)},
            {"shape": (-1, -6)},
            {"shape": (7, 1), "strides": (0, 0)},
            {"storage": "99"},
        ):
            reader.tensors["w"] = type(tensor)(**{**vars(tensor), **change})
            with pytest.raises(FederationError, match="beyond its values|missing or damaged"):
                reader.read("w")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: save(path, w=torch.zeros(1).expand(400, 400)), "far more values than the file"),
        (lambda path: save(path, w=torch.zeros(1).expand(2, 2)), "w reaches beyond its values, or has more"),
        (lambda path: save(path, **{f"w{i}": MANY for i in range(99)}), "far more values than the file"),
        (lambda path: save(path, w=torch.zeros((1,) * 9)), r"w has the shape .1, 1, 1, 1, 1, 1, 1, 1, 1."),
        (lambda path: save_compressed(path, w=torch.zeros(100)), "archive/data/0 is compressed"),
        (lambda path: replace_pickle(path, b"\x80\x02]r\xff\xff\xff\xff."), "no network_weights"),
        (lambda path: replace_pickle(path, b"\x80\x05\x96" + (10**12).to_bytes(8, "little")), "data.pkl is damaged"),
    ],
)
def test_a_small_file_does_not_ask_for_much_memory(tmp_path, damage, complaint):
    damage(tmp_path / "c.pth")
    tracemalloc.start()
    try:
        with pytest.raises(FederationError, match=complaint):
            write_weights(tmp_path / "c.pth", tmp_path / "weights")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


MANY = torch.zeros(4000)


def save_compressed(path, **weights) -> None:
    with zipfile.ZipFile(save(path, **weights)) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in content.items():
            archive.writestr(f"archive/{name.partition('/')[2]}", part, zipfile.ZIP_DEFLATED if "data/0" in name else 0)


def test_it_needs_no_torch(tmp_path):
    path = save(tmp_path / "c.pth", w=torch.ones(2))
    code = (
        "import sys; from pathlib import Path\n"
        "from nnunetv2.federated.coordinator.models.checkpoint_reader import write_weights\n"
        "write_weights(Path(sys.argv[1]), Path(sys.argv[1] + '.document'))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
