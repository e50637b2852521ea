"""What plans, dataset.json and checkpoints of strangers may name."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from nnunetv2.imageio.reader_writer_registry import (
    determine_reader_writer_from_dataset_json,
    recursive_find_reader_writer_by_name,
)
from nnunetv2.preprocessing.normalization.lookup import find_normalization_class
from nnunetv2.preprocessing.resampling.utils import recursive_find_resampling_fn_by_name
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.get_network_from_plans import find_network_class, get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from nnunetv2.utilities.trusted_names import UntrustedNameError, locate_argument, may_be_named

UNET = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
KWARGS = {
    "n_stages": 2,
    "features_per_stage": [4, 8],
    "conv_op": "torch.nn.modules.conv.Conv2d",
    "kernel_sizes": 3,
    "strides": [1, 2],
    "n_conv_per_stage": 1,
    "n_conv_per_stage_decoder": 1,
    "norm_op": None,
    "nonlin": "torch.nn.LeakyReLU",
}
IMPORTED = ["conv_op", "norm_op", "nonlin"]

NOT_TO_BE_CALLED = [
    "os.system",
    "posix.system",
    "subprocess.run",
    "subprocess.Popen",
    "builtins.exec",
    "builtins.eval",
    "pty.spawn",
    "importlib.import_module",
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "torch.utils.cpp_extension.load",
    "torch.compile",
    "numpy.load",
    "pathlib.Path",
    "shutil.rmtree",
    "webbrowser.open",
    # what allowed packages have imported, and what they define themselves but no network needs
    "torch.nn.functional.importlib",
    "torch.nn.init.warnings",
    "torch.nn.functional.torch",
    "torch.nn.functional.grad",
    "torch.nn.modules.module.functools",
    "torch.nn.modules.container.OrderedDict",
    "torch.nn.functional.Tensor",
    "torch.nn.modules.module.register_module_forward_hook",
    "torch.nn.utils.skip_init",
    "torch.nn.Parameter",
    "torch.nn.parallel.parallel_apply",
    "torch.nn.parallel.data_parallel",
    "dynamic_network_architectures.architectures.unet.Union",
    "dynamic_network_architectures.architectures.unet.torch",
    "dynamic_network_architectures.building_blocks.helper.np",
    "nnunetv2.run.run_training.run_training",
    "nnunetv2.paths.os",
    "nnunetv2.utilities.atomic_write.replacing",
    "nnunetv2.utilities.find_class_by_name.importlib",
    "nnunetv2.federated.coordinator.http.tls.subprocess",
    "nnunetv2.inference.predictor.nnUNetPredictor",
    "nnunetv2.training.nnUNetTrainer.nnUNetTrainer.nnUNetTrainer",
]
NO_PATHS = [
    "system",
    "",
    ".",
    "torch.nn.",
    ".torch.nn.ReLU",
    "torch..nn.ReLU",
    "torch.nn.Module.__init__",
    "torch.nn.modules.module._global_forward_hooks",
    "__main__.run",
    "__builtins__.exec",
    "torch/nn.ReLU",
    "../nets.Net",
    "torch.nn.ReLU()",
    "torch.nn.ReLU\n",
    "torch.nn. ReLU",
]
LEAD_NOWHERE = [
    "torch.nn.NoSuchThing",
    "torch.nn.os.system",
    "torch.nn.functional.importlib.import_module",
    "torch.nn.Module.compile",
    "nnunetv2.paths.os.system",
    "nnunetv2.no_such_module.Net",
    "no_such_package.Net",
    "dynamic_network_architectures.architectures.unet.np.load",
]


@pytest.mark.parametrize("path", [*NOT_TO_BE_CALLED, *NO_PATHS])
def test_networks_are_given_nothing_but_parts_of_networks(path):
    with pytest.raises(UntrustedNameError, match="as nonlin") as info:
        get_network_from_plans(UNET, {**KWARGS, "nonlin": path}, IMPORTED, 1, 2)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("path", NOT_TO_BE_CALLED)
def test_a_network_class_is_a_torch_module_of_a_known_package(path):
    with pytest.raises(UntrustedNameError, match=r"as network_class_name, which is no torch\.nn\.Module"):
        find_network_class(path)


@pytest.mark.parametrize("path", LEAD_NOWHERE)
def test_what_does_not_exist_is_said_to_be_missing(path):
    with pytest.raises(ImportError, match=r"as nonlin, which does not exist"):
        get_network_from_plans(UNET, {**KWARGS, "nonlin": path}, IMPORTED, 1, 2)


@pytest.mark.slow
def test_nothing_is_imported_to_refuse_a_name():
    """Importing these would open a browser, print a poem, or run a program of the user's."""
    code = textwrap.dedent("""
        import sys
        from nnunetv2.utilities.get_network_from_plans import find_network_class, get_network_from_plans
        from nnunetv2.utilities.trusted_names import UntrustedNameError
        for path in ("antigravity.Net", "this.d", "my_program.Net", "my_program.deep.Net", "lib2to3.main.main"):
            for call in (find_network_class,
                         lambda path: get_network_from_plans("torch.nn.ReLU", {"a": path}, ["a"], 1, 1)):
                try:
                    call(path)
                except (UntrustedNameError, ImportError):
                    continue
                raise SystemExit(f"{path} was taken")
            assert path.split(".")[0] not in sys.modules, path
        """)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "path",
    [
        "torch.nn.LeakyReLU",
        "torch.nn.modules.activation.LeakyReLU",
        "torch.nn.InstanceNorm3d",
        "torch.nn.Conv3d",
        "torch.nn.modules.dropout.Dropout3d",
        "torch.nn.GELU",
        "torch.nn.functional.gelu",
        "torch.nn.functional.relu",
        "torch.nn.init.kaiming_normal_",
        "dynamic_network_architectures.building_blocks.residual.BasicBlockD",
        "dynamic_network_architectures.building_blocks.residual.BottleneckD",
        "dynamic_network_architectures.building_blocks.patch_encode_decode.LayerNormNd",
        "dynamic_network_architectures.initialization.weight_init.InitWeights_He",
        "nnunetv2.training.loss.dice.MemoryEfficientSoftDiceLoss",
    ],
)
def test_parts_of_networks_are_found(path):
    assert locate_argument(path, "nonlin").__name__ == path.split(".")[-1]


@pytest.mark.parametrize("name", ["PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet"])
def test_networks_of_the_library_are_found(name):
    assert find_network_class(f"dynamic_network_architectures.architectures.unet.{name}").__name__ == name
    # importing these takes a torchvision that fits torch
    assert may_be_named("dynamic_network_architectures.architectures.primus.PrimusM")


def test_classes_from_python_are_taken_as_they_are():
    class Mine(torch.nn.Module):
        def __init__(self, input_channels, num_classes, nonlin):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Conv2d(input_channels, num_classes, 1), nonlin())

    network = get_network_from_plans(Mine, {"nonlin": torch.nn.Tanh}, ["nonlin"], 2, 3)
    assert network.layers(torch.zeros(1, 2, 4, 4)).shape == (1, 3, 4, 4)


@pytest.mark.parametrize("names", ["nonlin", None, {"nonlin": 1}])
def test_arguments_to_look_up_are_a_list(names):
    with pytest.raises(UntrustedNameError, match="_kw_requires_import"):
        get_network_from_plans(UNET, KWARGS, names, 1, 2)


# ----------------------------------------------------------------------------------------------- what users may allow
@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a network of a user, below it an environment with a library, both importable."""
    net = """
        import os
        from functools import partial
        from os import system
        import torch

        class Net(torch.nn.Module):
            def __init__(self, input_channels, num_classes, nonlin):
                super().__init__()
                self.layers = torch.nn.Sequential(torch.nn.Conv2d(input_channels, num_classes, 1), nonlin())

        def make_nonlin():
            return torch.nn.Tanh()

        Sharp = partial(torch.nn.LeakyReLU, 0.3)
        Command = partial(os.system, "true")
        """
    folder, library = tmp_path / "own", tmp_path / "own" / "environment"
    for package in (folder / "own_nets", library / "own_library"):
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("from os import system\n")
        (package / "net.py").write_text(textwrap.dedent(net))
    (folder / "own_module.py").write_text(textwrap.dedent(net))
    (folder / "colorsys.py").write_text(textwrap.dedent(net))  # Python has a module of this name
    monkeypatch.syspath_prepend(str(library))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] in ("own_nets", "own_library", "own_module")]:
        del sys.modules[name]


def build(module: str, nonlin: str) -> torch.nn.Module:
    return get_network_from_plans(f"{module}.Net", {"nonlin": nonlin}, ["nonlin"], 2, 3)


@pytest.mark.parametrize("module", ["own_nets.net", "own_module"])
def test_networks_in_a_folder_of_the_user_are_found(module, own, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(own.parent / "none"), str(own)]))
    assert isinstance(build(module, "torch.nn.ReLU").layers[1], torch.nn.ReLU)
    assert isinstance(build(module, f"{module}.make_nonlin").layers[1], torch.nn.Tanh)
    assert build(module, f"{module}.Sharp").layers[1].negative_slope == 0.3
    for path in (f"{module}.system", f"{module}.Command", f"{module}.os"):
        with pytest.raises(UntrustedNameError, match=path):
            build(module, path)


def test_a_package_that_the_user_lists_is_taken(own, monkeypatch):
    with pytest.raises(
        UntrustedNameError,
        match=r"own_library\.net\.Net as network_class_name.*set "
        r"nnUNet_extPackages=own_library",
    ):
        build("own_library.net", "torch.nn.ReLU")
    assert "own_library" not in sys.modules
    monkeypatch.setenv("nnUNet_extPackages", f"another{os.pathsep}own_library.net")
    assert isinstance(build("own_library.net", "own_library.net.make_nonlin").layers[1], torch.nn.Tanh)
    for path in ("own_library.net.system", "own_library.system", "own_library_2.net.Net", "own_libraries.Net"):
        with pytest.raises((UntrustedNameError, ImportError), match=path):
            build("own_library.net", path)


def test_libraries_below_a_folder_of_the_user_are_not_its_modules(own, monkeypatch):
    """A home folder may hold whole environments."""
    monkeypatch.setenv("nnUNet_extTrainer", str(own))
    assert may_be_named("own_nets.net.Net") and not may_be_named("own_library.net.Net")
    assert not may_be_named("colorsys.Net"), "a library comes before a folder with a module of its name"


def test_no_advice_is_given_to_allow_what_comes_with_python():
    for path in ("os.system", "nnunetv2.run.run_training.run_training", "torch.load"):
        with pytest.raises(UntrustedNameError) as info:
            locate_argument(path, "nonlin")
        assert "nnUNet_extPackages=" not in str(info.value)


# ------------------------------------------------------------------------------------------------- names of folders
@pytest.mark.parametrize("name", ["../Dataset002_Other", "..", "", "a/b", "a\\b", "/tmp/x", None, 4, "a\0"])
def test_plans_name_no_folder_outside_of_their_place(name):
    with pytest.raises(UntrustedNameError, match="data_identifier in the plans is"):
        _ = ConfigurationManager({"data_identifier": name}).data_identifier
    with pytest.raises(UntrustedNameError, match="dataset_name in the plans is"):
        _ = PlansManager({"dataset_name": name}).dataset_name


# -------------------------------------------------------------------------------------------------- names of classes
LOOKUPS = {
    "normalization_schemes": find_normalization_class,
    "resampling_fn_data": lambda name: (
        ConfigurationManager({"resampling_fn_data": name, "resampling_fn_data_kwargs": {}}).resampling_fn_data
    ),
    "preprocessor_name": lambda name: ConfigurationManager({"preprocessor_name": name}).preprocessor_class,
    "image_reader_writer": lambda name: PlansManager({"image_reader_writer": name}).image_reader_writer_class,
    "experiment_planner_used": lambda name: PlansManager({"experiment_planner_used": name}).experiment_planner_class,
    "label_manager": lambda name: PlansManager({"label_manager": name}).label_manager_class,
    "overwrite_image_reader_writer": lambda name: determine_reader_writer_from_dataset_json(
        {"overwrite_image_reader_writer": name, "file_ending": ".nii.gz"}
    ),
    "trainer's name": recursive_find_trainer_class_by_name,
}


@pytest.mark.parametrize("field", LOOKUPS)
@pytest.mark.parametrize(
    "name",
    [
        "__init__",
        "_find",
        "__builtins__",
        "../SimpleITKIO",
        "a/b",
        "a\\b",
        "os.system",
        "",
        " ",
        7,
        None,
        ["LabelManager"],
        {"name": "LabelManager"},
        "SimpleITKIO\n",
    ],
    ids=repr,
)
def test_names_that_no_class_has_are_refused(field, name):
    if (field, name) in (("overwrite_image_reader_writer", None), ("trainer's name", "_find")):
        return  # dataset.json names none; some trainers of the release are called `_Primus_...`
    with pytest.raises(UntrustedNameError, match=f"{field}.* is .*expected the plain name"):
        LOOKUPS[field](name)


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("normalization_schemes", "np"),
        ("normalization_schemes", "ABC"),
        ("normalization_schemes", "Path"),
        ("resampling_fn_data", "np"),
        ("resampling_fn_data", "InvalidInputError"),
        ("resampling_fn_data", "torch"),
        ("resampling_fn_data", "contextmanager"),
        ("resampling_fn_data", "recursive_find_resampling_fn_by_name"),
        ("preprocessor_name", "Path"),
        ("preprocessor_name", "ZScoreNormalization"),
        ("preprocessor_name", "os"),
        ("image_reader_writer", "gzip"),
        ("image_reader_writer", "Path"),
        ("image_reader_writer", "Fault"),
        ("experiment_planner_used", "os"),
        ("experiment_planner_used", "DatasetFingerprintExtractor"),
        ("experiment_planner_used", "plan_experiments"),
        ("label_manager", "sigmoid"),
        ("label_manager", "convert_labelmap_to_one_hot"),
        ("overwrite_image_reader_writer", "Path"),
        ("overwrite_image_reader_writer", "stack_channels"),
    ],
)
def test_names_that_mean_something_else_are_refused(field, name):
    try:
        with pytest.raises(UntrustedNameError, match=f"{field}.* is {name!r}, which is .*: expected a "):
            LOOKUPS[field](name)
    except RuntimeError as error:  # no module there binds it
        pytest.fail(str(error))


@pytest.mark.slow
def test_a_trainer_is_checked_even_where_assertions_are_off():
    code = (
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        "try:\n    find('Path')\nexcept AssertionError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=False)
    assert "no subclass of nnUNetTrainer" in done.stdout, done.stderr


def test_names_that_are_meant_are_found():
    assert find_normalization_class("CTNormalization").__name__ == "CTNormalization"
    assert recursive_find_resampling_fn_by_name("resample_torch_fornnunet").__name__ == "resample_torch_fornnunet"
    assert recursive_find_reader_writer_by_name("NibabelIOWithReorient").__name__ == "NibabelIOWithReorient"
    for field, name in (
        ("preprocessor_name", "DefaultPreprocessor"),
        ("label_manager", "LabelManager"),
        ("experiment_planner_used", "nnUNetPlannerResEncM"),
        ("overwrite_image_reader_writer", "SimpleITKIOWithReorient"),
    ):
        assert LOOKUPS[field](name).__name__ == name
