"""Plants the mistakes of catalogue.toml one at a time, and asks whether the tests notice.

    python tests/planted_bugs/run.py --check                  # does every entry still apply?
    python tests/planted_bugs/run.py --log bugs.jsonl         # all of them; resumes if interrupted
    python tests/planted_bugs/run.py --only gelu-tanh drop-no-rescale
    python tests/planted_bugs/run.py --first tests/test_layers.py -- --ignore tests/test_image.py
    python tests/planted_bugs/run.py --catalogue tests/planted_bugs/segmentation.toml
    python tests/planted_bugs/run.py --catalogue tests/planted_bugs/cuda.toml

For every bug the package and its tests are copied to a temporary folder, one line of the copy is
changed, and pytest runs there until its first failure. The repository itself is never written to.
This folder is not part of the copy, so a test of the catalogue has to be left out with --ignore.

The test files that SHOWN_BY names for the edited source run first, alone, and of their tests those
first whose names hold the source's. Most bugs end there, within seconds. Only if nothing fails does
the whole suite run. --first names other files than SHOWN_BY does. What stands after ``--``
goes to pytest as it is; paths among it are all that runs. Whatever is run for a bug is run without
one before, once, and has to pass.

The exit status is 0 if every bug was caught, 1 if one survived, timed out or did not apply, 2 if
the tests fail without any bug or the arguments make no sense.
"""

import argparse
import ast
import dataclasses
import hashlib
import importlib
import json
import multiprocessing
import multiprocessing.process
import os
import py_compile
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CATALOGUE = HERE / "catalogue.toml"

# what the tests may look at; whichever of these exist are copied
COPIED = (
    "pvt_ref",
    "tests",
    "examples",
    "benchmarks",
    "docs",
    "tools",
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "constraints.txt",
    "mkdocs.yml",
    "Makefile",
    "NOTICE",
    ".ci",
    ".github",
    ".pre-commit-config.yaml",
)
NOT_COPIED = ("planted_bugs", "__pycache__", ".pytest_cache", ".hypothesis", "*.pyc")

CAUGHT, SURVIVED, TIMEOUT = "caught", "SURVIVED", "timeout"
NOT_APPLIED, BROKEN = "did-not-apply", "broken"


@dataclasses.dataclass(frozen=True)
class Bug:
    """One entry of the catalogue."""

    id: str
    file: str
    old: str
    new: str
    why: str
    shows: str
    occurrence: int | None = None

    @property
    def digest(self) -> str:
        """Changes when the edit does, so that a log entry of an older one is not reused."""
        edit = "\0".join((self.file, self.old, self.new, str(self.occurrence)))
        return hashlib.sha256(edit.encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one bug."""

    id: str
    status: str
    by: str  # the test that noticed, or the reason
    seconds: float
    digest: str


class DoesNotApplyError(Exception):
    """The line to be changed is not there, not unique, or not code."""


#: Test files, as in tests/test_NAME.py, that soon notice a mistake in a source. The first entry
#: with which the source's path begins is the one that counts.
SHOWN_BY = {
    "pvt_ref/layers/cross_entropy": "layers cross_entropy_dense segmentation_layers namespaces",
    "pvt_ref/layers/batch_norm": "segmentation_layers layers",
    "pvt_ref/layers/attention": "ops layers properties",
    "pvt_ref/layers/": "layers maps properties",
    "pvt_ref/blocks/conv_mlp": "layers pvt_v2 cost",
    "pvt_ref/blocks/linear_sra": "layers pvt_v2 cost",
    "pvt_ref/blocks/mha": "layers vit",
    "pvt_ref/blocks/": "ops layers planted_gaps golden",
    "pvt_ref/kernels/cuda/capture": "capture kernels_cuda_planted capture_training",
    "pvt_ref/kernels/cuda/launch": "kernels_cuda kernels_cuda_planted kernels_cuda_computed",
    "pvt_ref/kernels/cuda/ladder/": "kernels_cuda_ladder kernels_cuda_products "
    "kernels_cuda_planted",
    "pvt_ref/kernels/cuda/optimizer": "kernels_cuda_computed kernels_cuda_planted loss_scaling "
    "capture_training",
    "pvt_ref/kernels/cuda/": "kernels_cuda_computed kernels_cuda_products kernels_cuda "
    "kernels_cuda_planted",
    "pvt_ref/kernels/": "layers kernels maps ops pvt_v2 properties",
    "pvt_ref/models/vit/files": "vit loading",
    "pvt_ref/models/vit/": "vit report",
    "pvt_ref/models/pvt_v2/files": "pvt_v2_files",
    "pvt_ref/models/pvt_v2/": "pvt_v2",
    "pvt_ref/models/pvt/model": "golden properties planted_gaps",
    "pvt_ref/models/pvt/files": "checkpoint loading",
    "pvt_ref/models/segmentor/files": "segmentation_files",
    "pvt_ref/models/segmentor/": "segmentor twin_segmentor",
    "pvt_ref/models/head_parts": "segmentor heads",
    "pvt_ref/heads/": "heads layers segmentor",
    "pvt_ref/dense.py": "segmentor",
    "pvt_ref/models/architecture": "fine_tuning config_and_params ops planted_gaps properties",
    "pvt_ref/models/": "config_and_params ops planted_gaps properties",
    "pvt_ref/train/captured": "capture_training loss_scaling",
    "pvt_ref/train/on_device": "loss_scaling capture_training kernels_cuda_computed",
    "pvt_ref/train/rates": "fine_tuning",
    "pvt_ref/train/segmentation": "twin_segmentor segmentation_training",
    "pvt_ref/train/data_parallel": "data_parallel",
    "pvt_ref/train/from_folder": "from_folder",
    "pvt_ref/train/options": "training_examples from_folder",
    "pvt_ref/data/samples": "training_parts training_folder",
    "pvt_ref/data/folder": "folder from_folder",
    "pvt_ref/data/pair": "segmentation_data segmentation_training",
    "pvt_ref/data/iou": "segmentation_data segmentor",
    "pvt_ref/data/overlay": "segmentation_data cli_segment",
    "pvt_ref/data/ahead": "folder",
    "pvt_ref/data/labelled": "folder training_parts data_parallel training_files",
    "pvt_ref/train/": "training_parts fine_tuning training_draws training_files training_folder "
    "segmentation_training training training_taken",
    "pvt_ref/checkpoint/": "checkpoint whole_file loading training_files segmentation_files",
    "pvt_ref/report/attention": "properties ops report",
    "pvt_ref/report/": "report cost pvt_v2",
    "pvt_ref/data/augment": "training_parts",
    "pvt_ref/data/photo_augment": "photo_augment",
    "pvt_ref/data/imagenet": "zoo loading",
    "pvt_ref/data/": "zoo image bands training_parts",
    "pvt_ref/zoo.py": "zoo",
    "pvt_ref/ops.py": "ops report planted_gaps",
    "pvt_ref/draws.py": "training_draws planted_gaps",
    "pvt_ref/tree.py": "config_and_params planted_gaps ops repr report",
    "pvt_ref/app.py": "app image config_and_params zoo segmentor",
    "pvt_ref/__main__.py": "cli cli_inputs cli_segment",
    "pvt_ref/api.py": "api bad_input config_and_params ops planted_gaps pvt_v2 segmentor",
    "pvt_ref/arrays.py": "layers properties",
    "pvt_ref/checks.py": "bad_input api properties",
    "examples/": "training_examples examples",
}


# The catalogue --------------------------------------------------------------------------------


def read_catalogue(path: Path = CATALOGUE) -> list[Bug]:
    """All entries, in order; ids are unique, and no field is empty but ``new`` may be."""
    bugs = [Bug(**entry) for entry in tomllib.loads(path.read_text("utf-8"))["bug"]]
    twice = [key for key, count in Counter(bug.id for bug in bugs).items() if count > 1]
    if twice:
        raise ValueError(f"ids occur twice: {', '.join(twice)}")
    for bug in bugs:
        if not all((bug.id, bug.file, bug.old, bug.why, bug.shows)):
            raise ValueError(f"{bug.id}: a field is empty")
        if "\n" in bug.old + bug.new:
            raise ValueError(f"{bug.id}: an edit stays within one line")
    return bugs


def edited(text: str, bug: Bug) -> str:
    """text, the content of bug.file, with the bug in it."""
    pieces = text.split(bug.old)
    found = len(pieces) - 1
    if bug.occurrence is None and found != 1:
        raise DoesNotApplyError(f"{bug.old!r} stands {found} times in {bug.file}, not once")
    if bug.occurrence is not None and (found < 2 or not 1 <= bug.occurrence <= found):
        raise DoesNotApplyError(
            f"{bug.old!r} stands {found} times in {bug.file}; occurrence is {bug.occurrence}"
        )
    at = bug.occurrence or 1
    result = bug.old.join(pieces[:at]) + bug.new + bug.old.join(pieces[at:])
    if _code(text, bug.file) == _code(result, bug.file):
        raise DoesNotApplyError("only a comment changes")
    return result


def _code(text: str, file: str) -> str:
    """What stands in a file besides comments and spaces: Python, or CUDA C++ with ``//`` only."""
    if file.endswith(".py"):
        return ast.dump(ast.parse(text))
    return re.sub(r"//.*|\s", "", text)


def module_of(file: str) -> str:
    """The module that has to import when file was edited; a kernel's text is read, not imported."""
    if not file.endswith(".py"):
        return "pvt_ref"
    return file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


# A copy ---------------------------------------------------------------------------------------


@contextmanager
def copy_with(bug: Bug | None) -> Iterator[Path]:
    """A temporary copy of package and tests, with the bug planted if there is one."""
    with tempfile.TemporaryDirectory(prefix="planted_") as name:
        copy = Path(name).resolve()
        for part in COPIED:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns(*NOT_COPIED))
            elif source.exists():
                shutil.copy2(source, copy / part)
        if bug is not None:
            target = copy / bug.file
            if not target.is_file():
                raise DoesNotApplyError(f"there is no {bug.file}")
            try:
                target.write_text(edited(target.read_text("utf-8"), bug), "utf-8")
                if target.suffix == ".py":
                    py_compile.compile(str(target), cfile=str(copy / "compiled"), doraise=True)
            except (SyntaxError, py_compile.PyCompileError) as error:
                raise DoesNotApplyError(f"{bug.file} does not compile: {error}") from error
            (copy / "compiled").unlink(missing_ok=True)
        yield copy


ONE_THREAD: dict[str, str] = dict.fromkeys(
    ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"
)


def environment(copy: Path) -> dict[str, str]:
    """The copy before the installed package, one thread, no bytecode left behind."""
    return {
        **os.environ,
        **ONE_THREAD,
        # the programs of examples/ import each other
        "PYTHONPATH": os.pathsep.join((str(copy), str(copy / "examples"))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "COLUMNS": "250",
    }


_context = multiprocessing.get_context("forkserver")
_running: set[multiprocessing.process.BaseProcess] = set()
_stopping = threading.Event()


def end(process: multiprocessing.process.BaseProcess) -> None:
    """Ends a process that run_pytest started, with its children."""
    if process.pid is not None and process.is_alive():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def check_import(copy: Path, file: str = "pvt_ref/__init__.py") -> None:
    """Raises unless the copy's package imports, and is the copy's."""
    code = f"import pvt_ref, {module_of(file)}; print(pvt_ref.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=copy,
        env=environment(copy),
        capture_output=True,
        text=True,
        check=False,
    )
    where = ((done.stdout + done.stderr).strip().splitlines() or [""])[-1]
    if done.returncode != 0:
        raise DoesNotApplyError(f"import fails: {where}")
    if copy not in Path(where).resolve().parents:
        raise DoesNotApplyError(f"imported {where}, not the copy in {copy}")


# Checking the catalogue -----------------------------------------------------------------------


def check(bug: Bug) -> Result:
    """Whether the bug applies, compiles, and leaves a package that can be imported."""
    start = time.monotonic()
    try:
        with copy_with(bug) as copy:
            check_import(copy, bug.file)
        status, reason = "applies", ""
    except DoesNotApplyError as error:
        status, reason = NOT_APPLIED, str(error)
    return Result(bug.id, status, reason, round(time.monotonic() - start, 2), bug.digest)


# Running the tests ----------------------------------------------------------------------------


#: Imported once, before any bug; every run forks from there and starts within a moment.
PRELOADED = [
    "numpy",
    "pytest",
    "rich.table",
    "safetensors.numpy",
    "scipy.special",
    "hypothesis",  # pytest would rewrite its asserts every time
    "_hypothesis_pytestplugin",
    "xdist.plugin",
    "torch",
    "transformers.models.pvt.modeling_pvt",
]
_IMPORT_FAILED = 97


def run_pytest(copy: Path, file: str, arguments: list[str], timeout: float | None):
    """Exit status (None after a timeout) and output of pytest in the copy, in a forked process.

    Raises:
        DoesNotApplyError: if the module that was edited cannot be imported from the copy.
    """
    if _stopping.is_set():
        raise KeyboardInterrupt
    with tempfile.NamedTemporaryFile("w+", errors="replace") as output:
        process = _context.Process(
            target=_pytest_in, args=(str(copy), file, arguments, output.name)
        )
        process.start()
        _running.add(process)
        process.join(timeout)
        late = process.is_alive()
        end(process)
        process.join()
        _running.discard(process)
        text = Path(output.name).read_text("utf-8", errors="replace")
    if process.exitcode == _IMPORT_FAILED:
        raise DoesNotApplyError(f"import fails: {(text.strip().splitlines() or [''])[-1]}")
    return (None if late else process.exitcode), text


def _pytest_in(copy: str, file: str, arguments: list[str], output: str) -> None:
    """The forked process: imports the package from the copy, then runs pytest there."""
    os.setsid()  # so that a test's own children end with it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this
    with open(output, "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(copy)
    os.environ.update(environment(Path(copy)))
    os.environ.pop("PVT_REF_OPS", None)  # the tests choose the table themselves, as in CI
    sys.dont_write_bytecode = True
    sys.path[:0] = [copy, str(Path(copy) / "examples")]
    try:
        import pvt_ref

        importlib.import_module(module_of(file))
        found = Path(pvt_ref.__file__).resolve()
        assert Path(copy) in found.parents, f"imported {found}, not the copy in {copy}"
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(_IMPORT_FAILED)
    import pytest

    class NamesakesFirst:
        """Tests with the edited source's table first; of those, tests that bear its name first."""

        @pytest.hookimpl(wrapper=True, tryfirst=True)
        def pytest_collection_modifyitems(self, items):
            result = yield  # tests/conftest.py sorts them too
            name, other = Path(file).stem, "[reference" if "/kernels/" in file else "[blocked"
            layers = {path.stem for path in Path("pvt_ref/layers").glob("*.py")}

            def key(item) -> tuple[bool, bool, bool]:
                cases = set(re.split(r"[\[\]-]", item.nodeid)[1:])
                return other in item.nodeid, name not in item.nodeid, bool(cases & layers)

            items.sort(key=key)
            return result

    status = int(pytest.main(arguments, plugins=[NamesakesFirst()]))
    sys.stdout.flush()
    os._exit(status)


#: How the emulation of CUDA (tests/cuda_on_cpu) says, in pytest's summary, what g++ refused.
_NOT_COMPILED = re.compile(r"KernelError: \w+ does not compile")


def first_failure(output: str) -> str:
    """The test that failed first, from pytest's short summary."""
    for line in output.splitlines():
        for word in ("FAILED ", "ERROR "):
            if line.startswith(word):
                return line.removeprefix(word).split(" - ")[0].strip()
    return ""


class Tests:
    """The tests in parts; a bug that one part does not notice is given to the next.

    Args:
        first: test files to begin with, in place of those that SHOWN_BY names.
        extra: arguments for pytest; paths among them are the only part.
        timeout: seconds a part may take with a bug; None for three times what it takes without,
            and 30.
    """

    def __init__(self, first: list[str], extra: list[str], timeout: float | None):
        self.first, self.extra, self.timeout = first, extra, timeout
        self._timeouts: dict[tuple[str, ...], float] = {}
        self._lock = threading.Lock()

    def parts(self, file: str) -> list[tuple[str, ...]]:
        """pytest's arguments for a bug in file, one part after another."""
        options = ("-x", "-q", "-p", "no:cacheprovider")
        options += ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # plugins are loaded already
        options += tuple(self.extra)
        if any((ROOT / argument.split("::")[0]).exists() for argument in paths_in(self.extra)):
            return [(*options, *self.first)]
        first = self.first or shown_by(file)
        # file by file: pytest would drop those that a folder among the arguments contains
        every = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py"))
        return [(*options, *part) for part in (first, every) if part]

    def seconds(self, part: tuple[str, ...]) -> float:
        """How long a part may take with a bug; leaves the program if it fails without one."""
        if part not in self._timeouts:
            with self._lock:  # one waits for the other rather than run the same
                if part not in self._timeouts:
                    took = run_without_bug(list(part))
                    self._timeouts[part] = self.timeout or 3 * took + 30
        return self._timeouts[part]


def shown_by(file: str) -> list[str]:
    """The test files that SHOWN_BY names for a source."""
    names = next((SHOWN_BY[start] for start in SHOWN_BY if file.startswith(start)), "")
    return [f"tests/test_{name}.py" for name in names.split()]


def paths_in(extra: list[str]) -> list[str]:
    """Those pytest arguments that are neither options nor the values of options."""
    takes_value = {"-k", "-m", "-p", "-o", "-c", "-W", "-n"}
    found, skip = [], False
    for argument in extra:
        if skip:
            skip = False
        elif argument.startswith("-"):
            skip = argument in takes_value or (argument.startswith("--") and "=" not in argument)
        else:
            found.append(argument)
    return found


def run_bug(bug: Bug, tests: Tests) -> Result:
    """Plants the bug and runs the tests until the first failure."""
    seconds = 0.0

    def result(status: str, by: str) -> Result:
        return Result(bug.id, status, by, round(seconds, 1), bug.digest)

    try:
        with copy_with(bug) as copy:
            for part in tests.parts(bug.file):
                timeout = tests.seconds(part)
                start = time.monotonic()
                status, output = run_pytest(copy, bug.file, [*part, "--tb=no"], timeout)
                seconds += time.monotonic() - start
                if status is None:
                    return result(TIMEOUT, f"no result in {timeout:.0f} s")
                by = first_failure(output)
                if not bug.file.endswith(".py") and _NOT_COMPILED.search(output):
                    return result(NOT_APPLIED, f"{bug.file} does not compile: {by}")
                # 1: a test failed; 2: it failed while it was collected. Where none is named, it is
                # not pytest that has failed
                if status in (1, 2) and by:
                    return result(CAUGHT, by)
                if status != 0:
                    last = output.strip().splitlines()[-1:] or [""]
                    return result(BROKEN, f"pytest ended with {status}: {last[0]}")
    except DoesNotApplyError as error:
        return result(NOT_APPLIED, str(error))
    return result(SURVIVED, "")


def run_without_bug(part: list[str]) -> float:
    """Seconds that the tests take on the unedited copy; leaves the program if they fail."""
    print("without a bug: python -m pytest " + " ".join(part), flush=True)
    start = time.monotonic()
    with copy_with(None) as copy:
        try:
            status, output = run_pytest(copy, "pvt_ref/__init__.py", part, None)
        except DoesNotApplyError as error:
            sys.exit(refuse(f"the unedited copy: {error}"))
    if status != 0:
        print("\n".join(output.splitlines()[-40:]))
        sys.exit(refuse(f"the tests must pass without any bug; pytest ended with {status}"))
    seconds = time.monotonic() - start
    print(f"passes in {seconds:.1f} s", flush=True)
    return seconds


def refuse(message: str) -> int:
    """Prints the message; the exit status that goes with it."""
    print(message, file=sys.stderr)
    return 2


# The log and the table ------------------------------------------------------------------------


def read_log(path: Path | None) -> dict[str, Result]:
    """The last result recorded for each id."""
    if path is None or not path.exists():
        return {}
    recorded = {}
    for line in path.read_text("utf-8").splitlines():
        try:
            result = Result(**json.loads(line))
        except (ValueError, TypeError):
            continue  # a line cut short by an interruption
        recorded[result.id] = result
    return recorded


def work_through(
    bugs: list[Bug], do: Callable[[Bug], Result], workers: int, log: Path | None
) -> dict[str, Result]:
    """do(bug) for all bugs, a line each as they end; results by id."""
    results: dict[str, Result] = {}
    lock = threading.Lock()

    def one(bug: Bug) -> None:
        if _stopping.is_set():
            return
        result = do(bug)
        if _stopping.is_set():
            return  # its tests were ended, which says nothing about the bug
        with lock:
            results[bug.id] = result
            number = f"[{len(results)}/{len(bugs)}]"
            print(f"{number} {bug.id}: {result.status} {result.by}".rstrip(), flush=True)
            if log is not None:
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(dataclasses.asdict(result)) + "\n")

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(one, bug) for bug in bugs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            _stopping.set()
            for future in futures:
                future.cancel()
            for process in list(_running):
                end(process)
            raise
    return results


def print_table(bugs: list[Bug], results: dict[str, Result]) -> None:
    """One line a bug in the catalogue's order, then the counts; the others' reasons at the end."""
    width = max((len(bug.id) for bug in bugs), default=0)
    print()
    for bug in bugs:
        if bug.id in results:
            r = results[bug.id]
            print(f"{bug.id:{width}}  {r.status:13}  {r.seconds:6.1f} s  {r.by}".rstrip())
    counts = Counter(result.status for result in results.values())
    print("\n" + ", ".join(f"{count} {status}" for status, count in counts.most_common()))
    for bug in bugs:
        if bug.id in results and results[bug.id].status == SURVIVED:
            print(f"\n{bug.id} in {bug.file}: {bug.why}\n  - {bug.old}\n  + {bug.new}")
            print(f"  shows: {bug.shows}")


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """Own arguments, and those after ``--`` for pytest."""
    own, extra = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, extra = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n", 1)[0], epilog="After --: arguments for pytest."
    )
    parser.add_argument(
        "--catalogue", type=Path, default=CATALOGUE, help="another list of bugs (catalogue.toml)"
    )
    parser.add_argument("--only", nargs="+", metavar="ID", help="these bugs only")
    parser.add_argument("--file", nargs="+", metavar="FILE", help="bugs of these sources only")
    parser.add_argument("--workers", type=int, default=2, help="bugs at the same time (2)")
    parser.add_argument("--list", action="store_true", help="print the catalogue and stop")
    parser.add_argument(
        "--check", action="store_true", help="only see whether every entry applies and imports"
    )
    parser.add_argument("--log", type=Path, help="JSON lines; ids recorded there are skipped")
    parser.add_argument(
        "--retry", action="store_true", help="run those again that the log has as not caught"
    )
    parser.add_argument(
        "--first", nargs="+", default=[], metavar="TEST_FILE", help="run these first"
    )
    parser.add_argument(
        "--timeout", type=float, help="seconds a part (three times its run without a bug, and 30)"
    )
    return parser.parse_args(own), extra


def main() -> int:
    """The program; returns its exit status."""
    options, extra = arguments()
    os.environ.update(ONE_THREAD)  # before NumPy is loaded where all runs fork from
    os.environ["HF_HUB_OFFLINE"] = "1"
    _context.set_forkserver_preload(PRELOADED)
    bugs = read_catalogue(options.catalogue)
    unknown = set(options.only or ()) - {bug.id for bug in bugs}
    if unknown:
        return refuse(f"not in the catalogue: {', '.join(sorted(unknown))}")
    if options.only:
        bugs = [bug for bug in bugs if bug.id in options.only]
    if options.file:
        bugs = [bug for bug in bugs if bug.file in options.file]
    if options.list:
        for bug in bugs:
            print(f"{bug.id}  ({bug.file})\n    {bug.why}; shows: {bug.shows}")
        print(f"\n{len(bugs)} bugs")
        return 0
    if options.check:
        results = work_through(bugs, check, options.workers, None)
        bad = [r for r in results.values() if r.status == NOT_APPLIED]
        print(f"\n{len(results) - len(bad)} of {len(results)} apply and import")
        for r in bad:
            print(f"{r.id}: {r.by}")
        return 1 if bad else 0

    recorded = read_log(options.log)
    done = {
        bug.id: recorded[bug.id]
        for bug in bugs
        if bug.id in recorded
        and recorded[bug.id].digest == bug.digest
        and not (options.retry and recorded[bug.id].status != CAUGHT)
    }
    todo = [bug for bug in bugs if bug.id not in done]
    if todo:
        tests = Tests(options.first, extra, options.timeout)
        done |= work_through(todo, lambda bug: run_bug(bug, tests), options.workers, options.log)
    print_table(bugs, done)
    return 0 if all(result.status == CAUGHT for result in done.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
