"""Checkpoints that torch has written, read without torch."""

from __future__ import annotations

import pickle
import subprocess
import sys
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
        for change in ({"offset": 1}, {"strides": (-1, 1)}, {"shape": (3, 3)}, {"storage": "99"}):
            reader.tensors["w"] = type(tensor)(**{**vars(tensor), **change})
            with pytest.raises(FederationError, match="beyond its values|missing or damaged"):
                reader.read("w")


def test_it_needs_no_torch(tmp_path):
    path = save(tmp_path / "c.pth", w=torch.ones(2))
    code = (
        "import sys; from pathlib import Path\n"
        "from nnunetv2.federated.coordinator.models.checkpoint_reader import write_weights\n"
        "write_weights(Path(sys.argv[1]), Path(sys.argv[1] + '.document'))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
