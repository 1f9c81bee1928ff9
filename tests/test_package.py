"""The house: what importing costs, which layer may import which, how long a file may be."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest
import torch
from _tiny import TINY

import encdiff
from encdiff.evaluation import evaluate_model
from encdiff.models.autoencoder import VQAutoencoder
from encdiff.ops._compiling import asked_once
from encdiff.training import AutoencoderTrainConfig, train_autoencoder

ROOT = Path(__file__).parent.parent
# Bottom up. A module imports its own room and the layers below it, nothing beside or above.
LAYERS = [
    {"errors", "pretrained", "kernels", "_C"},
    {"files", "terminal", "checked"},
    {"distributed"},
    {"ops"},
    {"diffusion", "objectives", "data", "metrics", "profiling", "health"},
    {"models"},
    {"engine", "interop", "edit"},
    {"pictures", "evaluation", "prior"},
    {"training"},
    {"baselines", "fields"},
    {"experiments"},
    {"cli"},
    {"__init__", "__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def python(code: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def imports(path: Path) -> set[str]:
    """Dotted names of every import in the file, `from a import b` as `a.b`; a relative one begins with a dot."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (f"{node.module}." if node.module else "")
            names |= {base + alias.name for alias in node.names}
    return names


def rooms_of(names: set[str]) -> set[str]:
    """The rooms of encdiff among the names; `from encdiff import __version__` is none."""
    parts = (name.split(".") for name in names)
    return {part[1] for part in parts if part[0] == "encdiff" and len(part) > 1 and not part[1].startswith("__")}


def breaches(path: Path, room: str) -> set[str]:
    return {other for other in rooms_of(imports(path)) - {room} if LEVEL.get(other, 99) >= LEVEL[room]}


def test_import_is_light(tmp_path):
    code = "import encdiff, sys; print(sorted({'torch', 'triton', 'numpy', 'encdiff._C'} & sys.modules.keys()))"
    done = python(code, tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_ops_load_no_kernel():
    code = "import encdiff.ops, sys; print(*(n for n in sys.modules if n.startswith('encdiff.kernels.')))"
    done = python(code, ROOT)
    assert done.returncode == 0, done.stderr
    loaded = {name.removeprefix("encdiff.kernels.") for name in done.stdout.split()}
    assert loaded == {"_second", "cross_attention", "cross_attention.plan"}, "plain Python alone before it is chosen"


def test_version_is_the_installed_one():
    try:
        installed = importlib.metadata.version("encdiff")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed: these tests run from the checkout itself")
    assert encdiff.__version__ == installed, "install again: make test does"


def test_public_names_resolve():
    for name in encdiff.__all__:
        assert getattr(encdiff, name), name
        assert name in dir(encdiff)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = encdiff.nonsense


def test_kernels_belong_to_encdiff(tmp_path):
    assert python("import encdiff.kernels", tmp_path).returncode == 0
    assert python("import encdiff.kernels", ROOT).returncode == 0


def test_kernels_refuse_to_be_top_level():
    for name in ("kernels", "kernels.cross_attention.plan"):
        done = python(f"import {name}", ROOT)
        assert done.returncode == 1
        assert "ImportError: imported as 'kernels'" in done.stderr and "encdiff.kernels" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "encdiff").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_layers(path):
    room = path.relative_to(ROOT / "encdiff").parts[0].removesuffix(".py")
    assert room in LEVEL, f"{room} has no layer: give it one in LAYERS"
    assert not any(name.startswith(".") for name in imports(path)), "import by the full name"
    assert not breaches(path, room), f"{room} must not import {breaches(path, room)}"


def test_kernels_import_nothing_of_encdiff():
    for path in (ROOT / "kernels").rglob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - {""} - sys.stdlib_module_names
        assert outside <= {"torch", "triton"}, f"{path.name} imports {outside}"


def test_breaches_are_found(tmp_path):
    bad = tmp_path / "noise.py"
    bad.write_text("def f():\n    from encdiff.models.unet import UNet\n    from encdiff import training, errors\n")
    assert breaches(bad, "ops") == {"models", "training"}


def modules() -> dict[str, Path]:
    """The dotted name of every module of encdiff, kernels included."""
    homes = {"encdiff": ROOT / "encdiff", "encdiff.kernels": ROOT / "kernels"}
    found = ((home, path.relative_to(top)) for home, top in homes.items() for path in top.rglob("*.py"))
    names = {".".join((home, *path.with_suffix("").parts)): homes[home] / path for home, path in found}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def import_graph(modules: dict[str, Path]) -> dict[str, set[str]]:
    """For each module those that it imports: at its top, in a function, or for annotations alone."""
    graph = {}
    for module, path in modules.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = {resolve_name(name, package) for name in imports(path) if "__" not in name}
        graph[module] = {n if n in modules else n.rpartition(".")[0] for n in names} & modules.keys() - {module}
    return graph


def test_no_module_imports_itself_by_way_of_others():
    """A CycleError names the circle."""
    TopologicalSorter(import_graph(modules())).prepare()


def test_circles_are_found(tmp_path):
    texts = {
        "a": "def f():\n    from p.b import g\n",
        "b": "if TYPE_CHECKING:\n    from . import a\n",
        "c": "import p.a\nfrom p import __version__\n",
    }
    paths = {f"p.{name}": tmp_path / f"{name}.py" for name in texts} | {"p": tmp_path / "__init__.py"}
    for name, text in (texts | {"__init__": "from .c import h"}).items():
        (tmp_path / f"{name}.py").write_text(text)
    assert import_graph(paths) == {"p.a": {"p.b"}, "p.b": {"p.a"}, "p.c": {"p.a"}, "p": {"p.c"}}
    with pytest.raises(CycleError):
        TopologicalSorter(import_graph(paths)).prepare()


def test_every_room_is_installed():
    """A package that setup.py does not list is missing from a wheel alone."""
    listed = set(re.findall(r'^ +"(encdiff[.\w]*)",$', (ROOT / "setup.py").read_text(), re.M))
    rooms = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert "encdiff.kernels.cross_attention" in rooms <= listed | {"encdiff.pretrained"}, "add it to packages"


def test_files_are_short():
    folders = ("encdiff", "kernels", "tests", "bench", "tools", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > 400}
    assert not long, f"each of these holds two ideas: {long}"


def test_wrong_arguments_of_the_public_functions_are_named(tmp_path):
    data = encdiff.open_dataset("procedural:2,2,2,2,2,2", 16)
    with pytest.raises(encdiff.InputError, match=r"^dataset is a str, must be a Dataset: open_dataset makes one$"):
        encdiff.train(encdiff.EncDiff(TINY), "procedural", tmp_path / "run", encdiff.TrainConfig())
    with pytest.raises(encdiff.InputError, match=r"^config is a str, must be a TrainConfig: "):
        encdiff.train(encdiff.EncDiff(TINY), data, tmp_path / "run", "quickstart")
    with pytest.raises(encdiff.InputError, match=r"^encode is a str, must be a model or a function of images$"):
        encdiff.evaluate("quickstart", data)
    with pytest.raises(encdiff.InputError, match=r"^dataset is a list, must be a Dataset"):
        encdiff.evaluate(encdiff.EncDiff(TINY), [1, 2])
    with pytest.raises(encdiff.InputError, match=r"^metrics is the text 'mig', must be a list of names$"):
        encdiff.evaluate(encdiff.EncDiff(TINY), data, metrics="mig")
    with pytest.raises(encdiff.InputError, match=r"^scalars are int, must be a torch.Tensor"):
        encdiff.EncDiff(TINY).sample(4)
    with pytest.raises(encdiff.InputError, match=r"^model is a str, must be an EncDiff$"):
        encdiff.SamplingEngine("quickstart")
    with pytest.raises(encdiff.InputError, match=r"^devce is no option here, must be device or one of "):
        encdiff.EncDiff.from_pretrained("quickstart", devce="cuda")
    with pytest.raises(encdiff.InputError, match=r"^dataset is a str, must be a Dataset: open_dataset makes one$"):
        train_autoencoder(VQAutoencoder(32, (1,), 1), "procedural", tmp_path / "run", AutoencoderTrainConfig())
    with pytest.raises(encdiff.InputError, match=r"^model is a str, must be a ConceptModel$"):
        evaluate_model("quickstart", data)
    with pytest.raises(encdiff.InputError, match="^private is given, but is an option of push_to_hub, "):
        encdiff.EncDiff(TINY).save_pretrained(tmp_path / "model", private=True)
    assert not list(tmp_path.iterdir())


def test_completion_offers_the_same_names_before_and_after_rooms_are_loaded():
    code = "import encdiff; a = dir(encdiff); import encdiff.training; assert a == dir(encdiff); print('training' in a)"
    assert python(code, ROOT).stdout.strip() == "True"
    assert {"train", "evaluate", "ops", "models", "__version__"} <= set(dir(encdiff))
    assert encdiff.train.__module__ == "encdiff.training.step", "the function, whatever rooms are loaded"


def test_a_start_loads_no_compiler():
    heavy = "{'torch._dynamo', 'torch.distributed.fsdp'}"
    code = f"import encdiff.training, encdiff.pictures, sys; print(sorted({heavy} & sys.modules.keys()))"
    done = python(code, ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_asked_once_is_what_torch_makes_of_a_function():
    ours, theirs = asked_once(lambda: 0), torch.compiler.assume_constant_result(lambda: 0)
    assert vars(ours) == vars(theirs) != {}
