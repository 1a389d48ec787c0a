"""A run whose folder, lock, console or matplotlib is taken away while it lives, and files that lie.

(What else the folder of a run goes through is in test_training_folder.py.)
"""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from kill_training import fingerprint, saved, what_counts
from rich.console import Console
from small_training import CONFIG, DATA, HELD_OUT, RECIPE
from test_training_files import seal, unseal
from test_training_folder import HELD, POSIX, run_code, train

import pvt_ref
from pvt_ref import ModelInfo
from pvt_ref.errors import CheckpointError, TrainingError
from pvt_ref.train import draw_curves, first_non_finite, fit, lock, loop, start_training, train_step
from pvt_ref.train.loop import BEST, CURVES, METRICS, STATE

OTHER = dataclasses.replace(RECIPE, seed=9)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder).finished
    return folder


@pytest.fixture(scope="module")
def halfway_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("halfway")
    train(folder, stop_at_step=6)
    return folder


@pytest.fixture
def halfway(halfway_once, tmp_path):
    return Path(shutil.copytree(halfway_once, tmp_path / "run"))


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    """And two steps more."""
    folder = tmp_path_factory.mktemp("two epochs")
    train(folder, stop_at_step=10)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def at_step(monkeypatch, number: int, act) -> None:
    """Does something once, before the step after so many."""
    inner, done = loop.train_step, []

    def train_step(state, *rest):
        if state.step == number and not done:
            done.append(number)
            act()
        return inner(state, *rest)

    monkeypatch.setattr(loop, "train_step", train_step)


# The folder ---------------------------------------------------------------------------------------


@POSIX
@pytest.mark.parametrize("way", ["moved", "removed", "a file", "lock removed", "lock replaced"])
@pytest.mark.parametrize("second", [False, True])
def test_a_run_whose_folder_is_taken_writes_nothing_further(way, second, tmp_path, monkeypatch):
    run, seen = tmp_path / "run", {}

    def take():
        if way == "moved":
            run.rename(tmp_path / "old")
        elif way in ("removed", "a file"):
            shutil.rmtree(run)
        else:
            (run / lock.LOCK).unlink()
        if way == "a file":
            run.write_text("x")
        if way == "lock replaced":
            (run / lock.LOCK).write_text("")
        if second and way in ("moved", "removed"):
            fit(CONFIG, OTHER, DATA, HELD_OUT, run, log_steps=1, stop_at_step=4)
        elif second and "lock" in way:
            train(run, resume=True, stop_at_step=6)
        seen.update(contents(run) if run.is_dir() else {})

    at_step(monkeypatch, 5, take)
    with pytest.raises(TrainingError, match=r"run: the folder was moved, or another run has taken"):
        train(run)
    assert (contents(run) if run.is_dir() else {}) == seen
    if way == "moved":
        assert train(tmp_path / "old", resume=True).finished


def test_a_run_leaves_the_lock_of_the_one_that_took_its_folder(tmp_path, monkeypatch):
    run, other = tmp_path / "run", lock.RunLock(tmp_path / "run")

    def take():
        run.rename(tmp_path / "old")
        run.mkdir()
        other.acquire()

    at_step(monkeypatch, 5, take)
    with pytest.raises(TrainingError, match="another run has taken it"):
        train(run)
    other.check()
    with pytest.raises(TrainingError, match="another training runs in this folder"):
        train(run)
    other.release()
    assert list(run.iterdir()) == []


def test_a_change_of_the_working_directory_changes_nothing(tmp_path, monkeypatch, whole):
    monkeypatch.chdir(tmp_path)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    at_step(monkeypatch, 5, lambda: os.chdir(elsewhere))
    assert train("run").folder == tmp_path / "run"
    assert list(elsewhere.iterdir()) == []
    assert what_counts(tmp_path / "run") == what_counts(whole)


@POSIX
def test_a_folder_without_a_working_directory(tmp_path, monkeypatch):
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(TrainingError, match="run: there is no working directory any more"):
        train("run")


@POSIX
def test_of_a_training_that_forks_only_the_parent_goes_on(tmp_path, whole):
    code = """
at_step(5, os.fork)
me = os.getpid()
try:
    train()
except TrainingError as error:
    os._exit(7 if me != os.getpid() and "forked from the one that trains here" in str(error) else 8)
assert os.getpid() == me
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert run_code(code, tmp_path) == ["7"]
    assert fingerprint(saved(tmp_path)) == fingerprint(saved(whole))
    assert what_counts(tmp_path) == what_counts(whole)
    assert not (tmp_path / lock.LOCK).exists()


@POSIX
@pytest.mark.parametrize("kind", ["symbolic", "hard", "dangling"])
def test_a_link_in_the_place_of_the_lock_is_not_followed(kind, tmp_path):
    precious, run = tmp_path / "precious", tmp_path / "run"
    run.mkdir()
    if kind != "dangling":
        precious.write_text("precious")
    if kind == "hard":
        os.link(precious, run / lock.LOCK)
    else:
        (run / lock.LOCK).symlink_to(precious)
    with pytest.raises(
        TrainingError, match=r"run\.lock is not a regular file of this folder alone"
    ):
        train(run)
    assert not lock._OPEN
    assert os.path.lexists(run / lock.LOCK)
    assert kind == "dangling" or precious.read_text() == "precious"
    assert precious.exists() == (kind != "dangling")


@POSIX
def test_files_of_other_programs_are_left_alone(tmp_path):
    train(tmp_path, stop_at_step=1)
    ours, theirs = tmp_path / ".0123456789abcdef.tmp", tmp_path / ".my_temporary_xyz.tmp"
    for path in (ours, theirs):
        path.write_text("")
    train(tmp_path, resume=True, stop_at_step=2)
    assert (ours.exists(), theirs.exists()) == (False, True)


# Forks and signals --------------------------------------------------------------------------------


@POSIX
@pytest.mark.skipif(
    sys.version_info >= (3, 13),
    reason="Python 3.13 and 3.14 run no handler of Python's in a child that another thread forked, "
    "with or without this project; such a child ends by SIGKILL only",
)
def test_a_process_forked_by_another_thread_can_be_terminated(tmp_path):
    """The note of a signal is the parent's; the child's own signals do what they did before."""
    code = """
import threading, time
def fork_elsewhere():
    here, there = os.pipe()
    def fork():
        child = os.fork()
        if child == 0:
            os.write(there, b".")  # Python forgets signals that came while it forked
            time.sleep(60)
            os._exit(1)
        os.read(here, 1)
        os.kill(child, signal.SIGTERM)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    thread = threading.Thread(target=fork)
    thread.start(); thread.join()
at_step(1, fork_elsewhere)
print(train(stop_at_step=2).state.step)
"""
    assert run_code(code, tmp_path) == [str(-signal.SIGTERM), "2"]


@POSIX
def test_an_interrupt_while_a_fork_waits_for_the_lock_hangs_no_child():
    """The fork waits for another thread's lock; after Ctrl-C, child and parent can compute."""
    code = f"""
import faulthandler, os, signal, sys, threading, time
faulthandler.dump_traceback_later(200, exit=True)
sys.unraisablehook = lambda _: print("said")  # Python's word on an interrupt in a hook
from pvt_ref.kernels.cpu import threads
from pvt_ref.train import lock
def square(i, scratch):
    return i * i
for owner in (threads._limit, lock._opening):
    inside, leave = threading.Event(), threading.Event()
    def hold():
        threads.holding(owner, lambda: inside.set() or leave.wait(100))
    def interrupt():
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        leave.set()
    others = [threading.Thread(target=hold), threading.Thread(target=interrupt)]
    others[0].start(); inside.wait(); others[1].start()
    waited = time.monotonic()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        held = lock.RunLock(__import__("pathlib").Path({str(Path.cwd())!r}))
        fine = threads.run_pieces(square, range(4), 2) == [0, 1, 4, 9]
        os._exit(0 if fine and owner.lock.acquire(blocking=False) else 1)
    print(leave.is_set(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    for other in others: other.join()
    free = threading.Thread(target=lambda: print(owner.lock.acquire(timeout=60)))
    free.start(); free.join()
    owner.lock = threading.RLock()  # that thread has ended with it
    print(threads.run_pieces(square, range(4), 2) == [0, 1, 4, 9])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["said", "True", "0", "True", "True"] * 2


@POSIX
def test_an_exception_of_a_handler_at_the_end_leaves_neither_lock_nor_handlers(tmp_path):
    """As of a time limit that is up while a training ends."""
    code = """
from pvt_ref.train import interrupts, lock
class TimeIsUp(Exception):
    pass
def up(*_):
    raise TimeIsUp
signal.signal(signal.SIGALRM, up)
numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
before = [signal.getsignal(n) for n in numbers]
codes = {f.__code__ for f in (lock.RunLock.release, interrupts.Interrupts.restore, loop._end)}
def strike(place):
    seen = []
    def profile(frame, event, _):
        if frame.f_code in codes and event != "c_call":
            seen.append(event)
            if len(seen) == place:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGALRM)
    sys.setprofile(profile)
    try:
        fit(CONFIG, RECIPE, DATA, HELD_OUT, f"{sys.argv[1]}/{place}", stop_at_step=0)
    except TimeIsUp:
        pass
    finally:
        sys.setprofile(None)
    assert [signal.getsignal(n) for n in numbers] == before, place
    assert not lock._OPEN, place
    assert not os.path.exists(f"{sys.argv[1]}/{place}/run.lock"), place
    return len(seen)
total = strike(0)
for place in range(1, total + 1):
    strike(place)
print(total)
"""
    (total,) = run_code(code, tmp_path)
    assert int(total) > 10


@pytest.mark.parametrize("where", ["train_step", "first_non_finite", "fit"])
def test_what_numpy_warns_of_is_the_callers_after_an_interrupt(where, tmp_path, monkeypatch):
    """Ctrl-C just where a block ends would keep it from putting back what it had set."""
    params, before = pvt_ref.init_params(CONFIG, np.random.default_rng(0)), np.geterr()
    images = HELD_OUT.batch(slice(0, 2), params.pos_embed1)
    monkeypatch.setenv("PVT_REF_OPS", "reference")
    work = {
        "train_step": lambda: train_step(
            start_training(params, len(DATA), 0), DATA, CONFIG, RECIPE
        ),
        "first_non_finite": lambda: first_non_finite(params, images, CONFIG),
        "fit": lambda: train(tmp_path, stop_at_step=4),
    }[where]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(np.errstate, "__exit__", interrupted)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        after = np.geterr()
        np.seterr(**before)
    assert after == before


# What is shown ------------------------------------------------------------------------------------


@POSIX
def test_a_reader_that_leaves_ends_no_training(tmp_path):
    """As `train | head -1`: rich would end the program, in silence."""
    code = """
from rich.console import Console
done = fit(CONFIG, RECIPE, DATA, HELD_OUT, sys.argv[1], console=Console())
os.write(2, f"{done.finished} {done.state.step}".encode())
"""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", HELD + code, str(tmp_path)],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "True 12")


def test_a_console_that_is_closed_or_knows_no_such_letters_ends_no_training(tmp_path):
    closed = io.StringIO()
    console = Console(file=closed)
    closed.close()
    assert train(tmp_path / "closed", console=console).finished
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    (tmp_path / "rün" / CURVES).mkdir(parents=True)
    assert train(tmp_path / "rün", console=Console(file=plain, width=60)).finished
    plain.seek(0)
    seen = plain.read()
    assert r"r\xfcn/curves.png could not be written" in seen
    assert seen.count("held out: loss") == 3


def test_a_program_that_ends_itself_is_not_kept_from_it(tmp_path):
    class Ends(io.StringIO):
        def write(self, _):
            raise SystemExit(3)

    with pytest.raises(SystemExit):
        train(tmp_path, console=Console(file=Ends()))


def test_a_picture_is_drawn_whatever_a_user_has_set(drawn, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"text.usetex": True, "lines.linewidth": 9}):
        train(tmp_path / "own", stop_at_step=4)
        assert matplotlib.rcParams["lines.linewidth"] == 9
    train(tmp_path / "plain", stop_at_step=4)
    metrics = (tmp_path / "plain" / METRICS).read_bytes()
    (tmp_path / "own" / METRICS).write_bytes(metrics)
    with matplotlib.rc_context({"text.usetex": True, "font.size": 3}):
        draw_curves(tmp_path / "own" / METRICS, tmp_path / "own" / CURVES)
    assert (tmp_path / "own" / CURVES).read_bytes() == (tmp_path / "plain" / CURVES).read_bytes()


def test_a_picture_that_cannot_be_drawn_ends_no_training(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("Failed to process string with tex")

    monkeypatch.setattr(loop, "draw_curves", fail)
    seen = io.StringIO()
    assert train(tmp_path, console=Console(file=seen, width=200)).finished
    assert "curves.png is not up to date: RuntimeError: Failed to process" in seen.getvalue()


# Files that say something else --------------------------------------------------------------------

INFO = ModelInfo(title="stripes", classes=("a", "b", "c"))


@pytest.mark.parametrize("other", ["num_heads", "norm_eps", "classes", "title", "training"])
def test_best_weights_of_another_description_are_refused(other, tmp_path):
    done = train(tmp_path, stop_at_step=6, info=INFO)
    path = tmp_path / BEST
    model = pvt_ref.load(path)
    assert train(tmp_path, stop_at_step=6, info=INFO, resume=True).state.step == 6
    changed = {
        "num_heads": {"num_heads": (2, 1, 1, 1)},
        "norm_eps": {"norm_eps": 1e-3},
        "classes": {"classes": ("c", "b", "a")},
        "title": {"title": "other"},
        "training": {"training": {"accuracy": 1.0}},
    }[other]
    if hasattr(CONFIG, other):
        model = pvt_ref.Model(
            model.params, dataclasses.replace(model.config, **changed), info=model.info
        )
    else:
        info = dataclasses.replace(model.info, **changed)
        model = pvt_ref.Model(model.params, model.config, info=info)
    pvt_ref.save(path, model)
    with pytest.raises(TrainingError, match=rf"best\.safetensors has another {other} than this"):
        train(tmp_path, resume=True, info=INFO)
    assert saved(tmp_path).step == done.state.step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t": 2}, "t is 2 after step 6"),
        ({"t": 0}, "t is 0 after step 6"),
        ({"step": 5}, "t is 6 after step 5"),
        ({"best_accuracy": 0.123}, "best_accuracy is 0.123, which is no share of 9 samples"),
        ({"epoch_loss": -5.0}, "state.epoch_loss is -5.0"),
        ({"epoch_loss": 1e39}, "epoch_loss is 1e"),
        (
            {"best_epoch": 0, "best_accuracy": -1.0, "best_sha256": ""},
            "best_epoch is 0 after step 6",
        ),
    ],
)
def test_a_sealed_state_that_contradicts_itself_is_refused(changes, message, halfway):
    tensors, record = unseal(halfway / STATE)
    seal(halfway / STATE, tensors, record | changes)
    with pytest.raises(CheckpointError, match=f"training.safetensors: .*{message}"):
        train(halfway, resume=True)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def write_lines(folder: Path, lines: list[dict]) -> None:
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def edits(lines: list[dict], number: int, **changes) -> list[dict]:
    return [line | changes if at == number else line for at, line in enumerate(lines, 1)]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda ls: edits(ls, 4, epoch=7), "line 4: epoch is 7 at step 4"),
        (lambda ls: edits(ls, 3, epoch=0.5), "line 3: epoch is 0.5 at step 3"),
        (lambda ls: edits(ls, 8, best_epoch=3), "line 8: best_epoch is 3, in epoch 2"),
        (lambda ls: edits(ls, 4, best_accuracy=1.0), "line 4: the best accuracy is 1.0"),
        (
            lambda ls: edits(ls, 4, held_out_accuracy=0.999, best_accuracy=0.999),
            r"metrics\.jsonl, line \d: .*another run's, or was edited",
        ),
        (lambda ls: ls[:3] + ls[4:], r"metrics\.jsonl, line 4: the line of epoch 1 is missing"),
        (lambda ls: ls[:7] + ls[8:], "line 8: the line of epoch 2 is missing"),
        (lambda ls: ls[:7], "line 7: after it, the line of epoch 2 is missing"),
        (lambda ls: [line for line in ls if line["step"] % 4], "line 4: the line of epoch 1 is"),
        (lambda ls: ls[:4] + ls[3:], "line 5: step is 4, and was 4"),
    ],
)
def test_metrics_that_this_run_cannot_have_written_are_refused(edit, message, two_epochs, tmp_path):
    run = Path(shutil.copytree(two_epochs, tmp_path / "run"))
    write_lines(run, edit(lines_of(run)))
    before = (run / METRICS).read_bytes()
    with pytest.raises(CheckpointError, match=message):
        train(run, resume=True)
    assert (run / METRICS).read_bytes() == before


def test_metrics_of_another_run_are_refused(tmp_path, halfway):
    for recipe, batch in ((OTHER, None), (dataclasses.replace(RECIPE, batch_size=9), 3)):
        other = tmp_path / f"other {batch}"
        fit(CONFIG, recipe, DATA, HELD_OUT, other, log_steps=1, stop_at_step=batch or 4)
        train(halfway.with_name("four"), stop_at_step=4)
        shutil.copy(other / METRICS, halfway.with_name("four"))
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl.* another run's, or was edited"):
            train(halfway.with_name("four"), resume=True)
        shutil.rmtree(halfway.with_name("four"))


def test_metrics_that_were_lost_and_begun_anew_go_on(tmp_path, whole):
    train(tmp_path, stop_at_step=6)
    (tmp_path / METRICS).unlink()
    for end in (7, 8, 10, 12):
        train(tmp_path, resume=True, stop_at_step=end)
    assert [line["step"] for line in lines_of(tmp_path)] == list(range(7, 13))
    assert fingerprint(saved(tmp_path)) == fingerprint(saved(whole))


def test_threads_may_train_beside_each_other(tmp_path, whole):
    """Each has a lock of its own, and gives back only that."""
    threads = [threading.Thread(target=train, args=(tmp_path / name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in "ab":
        assert fingerprint(saved(tmp_path / name)) == fingerprint(saved(whole))
        assert not (tmp_path / name / lock.LOCK).exists()
