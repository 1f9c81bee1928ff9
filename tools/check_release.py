"""What a release holds, and that it works where no checkout is: `make wheel`, or

    python tools/check_release.py dist          # what is in the one wheel and the one sdist there
    python tools/check_release.py dist --try    # then install the wheel into a fresh environment and use it

Exits with 1 and one line for each thing that is missing, too much, or names a folder of this machine.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"encdiff": "encdiff", "kernels": "encdiff/kernels", "csrc": "encdiff/csrc"}  # as in setup.py
BESIDE = (
    "CHANGELOG.md CITATION.cff LICENSE MANIFEST.in PKG-INFO README.md constraints.txt pyproject.toml setup.cfg setup.py"
)
LIBRARY = "encdiff/_C.abi3.so"
CONSTRAINTS = ROOT / "constraints.txt"
EXAMPLE = """import importlib.metadata, re
readme = importlib.metadata.metadata("encdiff").get_payload()
examples = re.findall(r"```python\\n(.*?)```", readme, re.DOTALL)
assert examples, "README has no example"
exec("".join(examples))
"""


def sources(root: Path) -> set[str]:
    """Every file of the package, relative to the checkout `root`, without what builds and imports leave."""
    files = (path for room in ROOMS for path in (root / room).rglob("*") if path.is_file())
    kept = (path for path in files if path.suffix != ".so" and "__pycache__" not in path.parts)
    return {path.relative_to(root).as_posix() for path in kept}


def read(archive: Path) -> dict[str, bytes]:
    """Name and content of every file: of a wheel as they are, of an sdist without its one folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    with tarfile.open(archive) as sdist:
        files = {member.name: sdist.extractfile(member).read() for member in sdist if member.isfile()}
    return {name.removeprefix(archive.name.removesuffix(".tar.gz") + "/"): held for name, held in files.items()}


def wheel_problems(name: str, files: dict[str, bytes], root: Path = ROOT) -> list[str]:
    """What is wrong with a wheel of this file name: its library is there if and only if its tag says so."""
    project, version, *_, platform = name.removesuffix(".whl").split("-")
    info = f"{project}-{version}.dist-info/"
    wanted = {path.replace(room := path.split("/")[0], ROOMS[room], 1) for path in sources(root)}
    wanted |= {info + part for part in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
    wanted |= set() if platform == "any" else {LIBRARY}
    scripts = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
    entries = files.get(info + "entry_points.txt", b"").decode().splitlines()
    missing = [f"{name}: no entry point {line}" for n, v in scripts.items() if (line := f"{n} = {v}") not in entries]
    return missing + difference(name, files.keys() - {info + "top_level.txt"}, wanted) + places(name, files)


def sdist_problems(name: str, files: dict[str, bytes], root: Path = ROOT) -> list[str]:
    held = {path for path in files if not path.startswith("encdiff.egg-info/")}
    return difference(name, held, sources(root) | set(BESIDE.split())) + places(name, files)


def difference(archive: str, held: set[str], wanted: set[str]) -> list[str]:
    missing = [f"{archive}: without {path}" for path in sorted(wanted - held)]
    return missing + [f"{archive}: should not hold {path}" for path in sorted(held - wanted)]


def places(archive: str, files: dict[str, bytes]) -> list[str]:
    """Absolute or climbing names, and files whose content names a folder of the machine that built them."""
    paths = [f"{archive}: a path outside it, {path}" for path in files if re.match(r"/|.*\.\./", path)]
    here = [f"{folder}/" for folder in (ROOT, sys.prefix, tempfile.gettempdir())]
    found = [(path, place) for path, held in files.items() for place in here if place.encode() in held]
    return paths + [f"{archive}: {path} names {place}" for path, place in found]


def sizes(files: dict[str, bytes]) -> str:
    """Unpacked bytes of each folder, the largest first."""
    total: dict[str, int] = {}
    for path, held in files.items():
        folder = str(PurePosixPath(path).parent)
        total[folder] = total.get(folder, 0) + len(held)
    ordered = sorted(total.items(), key=lambda pair: -pair[1])
    return "\n".join(f"  {size / 1e6:8.3f} MB  {folder}" for folder, size in ordered[:8])


def try_wheel(wheel: Path) -> None:
    """Install it into a fresh environment and do there what README begins with; a failure raises."""
    with tempfile.TemporaryDirectory(prefix="encdiff-release-") as place:
        programs = Path(place, "venv", "bin")
        venv.create(programs.parent, with_pip=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "ENCDIFF"))}
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        shutil.copy(CONSTRAINTS, place)  # by its name, since pip takes a path with spaces for two
        pip = {"CACHE_DIR": cache / "pip", "CONSTRAINT": CONSTRAINTS.name, "DISABLE_PIP_VERSION_CHECK": 1, "QUIET": 1}
        ours = {"XDG_CACHE_HOME": str(Path(place, "cache")), **{f"PIP_{k}": str(v) for k, v in pip.items()}}

        def run(*command: str) -> str:
            print("$", *(argument.splitlines()[0] for argument in command), flush=True)
            program = [str(programs / command[0]), *command[1:]]
            done = subprocess.run(program, cwd=place, env=kept | ours, stdout=subprocess.PIPE, text=True)
            print(done.stdout, end="", flush=True)
            done.check_returncode()
            return done.stdout

        torch = re.search(r"^torch==\S+", CONSTRAINTS.read_text(), re.M)[0]
        run("pip", "install", torch)  # first and exactly, so that nothing else chooses one
        run("pip", "install", str(wheel.resolve()))
        version = run("encdiff", "--version")
        assert version.split()[-1] == wheel.name.split("-")[1], f"the wheel {wheel.name} says it is {version}"
        run("encdiff", "doctor", "--kernels", "adamw")
        run("encdiff", "swap", "quickstart", "--pairs", "1", "--steps", "5", "--out", "swap.png")
        assert Path(place, "swap.png").read_bytes().startswith(b"\x89PNG")
        run("python", "-c", EXAMPLE)
        built = list(Path(place, "cache").rglob("_C.so"))
        assert not built or wheel.stem.endswith("-any"), f"{built[0]} was built: the wheel's own library was not taken"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dist", type=Path, help="the folder with one wheel and one sdist")
    parser.add_argument("--try", dest="tried", action="store_true", help="install the wheel and use it: minutes")
    options = parser.parse_args()
    (wheel,), (sdist,) = options.dist.glob("*.whl"), options.dist.glob("*.tar.gz")
    problems = []
    for archive, check in ((wheel, wheel_problems), (sdist, sdist_problems)):
        files = read(archive)
        print(f"{archive.name}: {archive.stat().st_size / 1e6:.1f} MB, {len(files)} files\n{sizes(files)}")
        problems += check(archive.name, files)
    print(*problems, sep="\n", file=sys.stderr, end="\n" if problems else "")
    if options.tried and not problems:
        try_wheel(wheel)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
