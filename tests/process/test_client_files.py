"""
The whole of: the client that `pillion-sidecar client` lays out, and which `pillion` an interpreter gets with it on PYTHONPATH.

Called from: pytest.
Must never: import the shim here; it would become the package. Interpreters are started for it, in venvs of their own.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pillion
from guard import repository
from pillion_sidecar.client_bundle import install as install_module
from support.deadlines import Deadline

SHIM = Path(install_module.__file__).with_name("shim.py")
SHOW = "import pillion, pillion.wire.names as names; print(pillion.__file__); print(names.__file__)"
FINDER = """
import importlib.util, sys
class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "pillion":
            return importlib.util.spec_from_file_location(name, {init!r}, submodule_search_locations=[{folder!r}])
sys.meta_path.append(Finder)
"""


@pytest.fixture(scope="module")
def laid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the init container leaves on the volume, with the group's and the others' bits masked."""
    folder = tmp_path_factory.mktemp("client")
    before = os.umask(0o077)
    try:
        install_module.lay_out(folder)
    finally:
        os.umask(before)
    return folder


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A virtual environment with nothing in it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=60)
    return tmp_path / "venv"


def site(venv: Path) -> Path:
    return next(venv.glob("lib/python3*/site-packages"))


def install(folder: Path, *, protocol: int | None = None) -> Path:
    """A client in `folder`, of another protocol when one is given; its `__init__.py`."""
    target = folder / "pillion"
    shutil.copytree(Path(pillion.__file__).parent, target, ignore=shutil.ignore_patterns("__pycache__"))
    if protocol is not None:
        wire = target / "wire" / "__init__.py"
        wire.write_text(re.sub(r"(PROTOCOL_VERSION: Final = )\d+", rf"\g<1>{protocol}", wire.read_text()))
    return target / "__init__.py"


def run(venv: Path, laid: Path, code: str = SHOW, *more: Path) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join(str(each) for each in (*more, laid))
    return subprocess.run(
        [venv / "bin" / "python", "-c", code],
        env={"PYTHONPATH": path, "PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"},  # as on a read-only mount
        cwd=venv,
        capture_output=True,
        text=True,
        timeout=Deadline.PROCESS_START.s,
    )


def found(done: "subprocess.CompletedProcess[str]") -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def bundled(laid: Path) -> list[str]:
    package = laid / "pillion" / "bundled" / "pillion"
    return [str(package / "__init__.py"), str(package / "wire" / "names.py")]


def test_where_none_is_installed_the_sidecars_own_is_used(venv: Path, laid: Path) -> None:
    """An image without Pillion gets the laid-out client, submodules too, and nothing of the shim is left in the package."""
    assert found(run(venv, laid)) == bundled(laid)
    names = found(run(venv, laid, "import pillion; print(*vars(pillion))"))
    own = found(run(venv, laid, "import pillion; print(*vars(pillion))", laid / "pillion" / "bundled"))
    assert sorted(names) == sorted(own)


def test_an_installed_one_of_the_same_protocol_wins(venv: Path, laid: Path) -> None:
    """What the image has in site-packages is used, although PYTHONPATH comes before it."""
    init = install(site(venv))
    assert found(run(venv, laid)) == [str(init), str(init.parent / "wire" / "names.py")]


def test_an_installed_one_of_another_protocol_gives_way_with_a_warning(venv: Path, laid: Path) -> None:
    """The sidecar's own is used, and the log says which was passed over and why."""
    init = install(site(venv), protocol=99)
    done = run(venv, laid)
    assert found(done) == bundled(laid)
    assert f"{init} is installed, and its protocol is 99" in done.stderr


def test_an_editable_install_counts_as_installed(venv: Path, laid: Path, tmp_path: Path) -> None:
    """A path file in site-packages, as hatchling leaves it, and a finder of its own, as setuptools does, both win."""
    init = install(tmp_path / "checkout")
    path_file = site(venv) / "editable.pth"
    path_file.write_text(f"{tmp_path / 'checkout'}\n")
    assert found(run(venv, laid))[0] == str(init)
    (site(venv) / "editable_finder.py").write_text(FINDER.format(init=str(init), folder=str(init.parent)))
    path_file.write_text("import editable_finder\n")
    assert found(run(venv, laid))[0] == str(init)


@pytest.mark.parametrize("content", ["", "raise RuntimeError('somebody else')"])
def test_somebody_elses_package_of_this_name_gives_way(venv: Path, laid: Path, content: str) -> None:
    """A package without our protocol is never run; a folder that only has the name neither."""
    folder = site(venv) / "pillion"
    folder.mkdir()
    assert found(run(venv, laid)) == bundled(laid)
    (folder / "__init__.py").write_text(content)
    done = run(venv, laid)
    assert found(done) == bundled(laid)
    assert "its protocol is none" in done.stderr


def test_what_stands_before_it_on_the_path_is_the_users_choice(venv: Path, laid: Path, tmp_path: Path) -> None:
    """The folder is put at the end of PYTHONPATH: an entry of the user's before it is found first."""
    init = install(tmp_path / "own", protocol=99)
    assert found(run(venv, laid, SHOW, tmp_path / "own"))[0] == str(init)


def test_a_python_that_is_too_old_is_told_so(venv: Path, laid: Path, tmp_path: Path) -> None:
    """The error names what is needed, the version and the interpreter; an installed client that fits is used all the same."""
    folder = tmp_path / "client"
    shutil.copytree(laid, folder)
    shim = folder / "pillion" / "__init__.py"
    shim.write_text(shim.read_text().replace("MIN_PYTHON = (3, 11)", "MIN_PYTHON = (9, 1)"))
    done = run(venv, folder)
    assert done.returncode == 1
    assert f"ImportError: pillion needs Python 9.1 or newer; {venv / 'bin' / 'python'} is Python 3." in done.stderr
    init = install(site(venv))
    assert found(run(venv, folder))[0] == str(init)


def test_the_shim_is_read_by_older_pythons_and_knows_what_the_client_needs() -> None:
    """Its syntax is that of Python 3.6, and its least version is the one in client/pyproject.toml."""
    tree = ast.parse(SHIM.read_text(), feature_version=(3, 6))
    values = {
        target.id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Tuple, ast.Constant))
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    project = tomllib.loads((repository.ROOT / "client" / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=" + ".".join(str(number) for number in values["MIN_PYTHON"])
    assert values["BUNDLED"] == install_module.BUNDLED


def test_threads_that_import_at_once_get_one_whole_package(venv: Path, laid: Path) -> None:
    """Eight threads import it first of all; each waits until it is whole, and all have the same module."""
    code = (
        "import concurrent.futures as futures, importlib\n"
        "def get(_):\n"
        "    package = importlib.import_module('pillion')\n"
        "    return id(package), package.SaveHandle.__module__\n"
        "print(len(set(futures.ThreadPoolExecutor(8).map(get, range(8)))))"
    )
    assert found(run(venv, laid, code)) == ["1"]


def test_only_sources_are_laid_out_and_everybody_may_read_them(laid: Path) -> None:
    """The trainer's Python may be another: no bytecode; its user may be another: whatever the umask, all is readable."""
    files = [path for path in (laid / "pillion").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".py", ".typed"}
    source = Path(pillion.__file__).parent
    copied = {path.relative_to(laid / "pillion" / "bundled" / "pillion") for path in files if "bundled" in path.parts}
    assert copied == {path.relative_to(source) for path in source.rglob("*") if path.suffix in (".py", ".typed")}
    for path in [laid / "pillion", *(laid / "pillion").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_it_can_be_laid_out_again_after_any_end(tmp_path: Path) -> None:
    """A second run replaces the first, also when the first was killed in the middle; nothing else in the folder is touched."""
    (tmp_path / "other").write_text("kept")
    (tmp_path / ".pillion-killed" / "new").mkdir(parents=True)
    install_module.lay_out(tmp_path)
    stale = tmp_path / "pillion" / "stale.py"
    stale.write_text("")
    install_module.lay_out(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "pillion"]
    assert not stale.exists()


def test_a_folder_that_cannot_be_written_is_an_error_with_its_name(tmp_path: Path) -> None:
    """The init container fails with the path and the reason."""
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "pillion_sidecar", "client", "--to", tmp_path / "file"],
        capture_output=True,
        text=True,
        timeout=Deadline.PROCESS_START.s,
    )
    assert done.returncode == 69
    assert f"cannot be installed in {tmp_path / 'file'}" in done.stderr
