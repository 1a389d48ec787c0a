"""The folder of a run: who holds it, what Ctrl-C leaves of it, and files that were swapped or lost.

(Edited states and metrics are in test_training_files.py.)
"""

import dataclasses
import errno
import itertools
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
from strategies import random_params

import pvt_ref
from pvt_ref import init_params
from pvt_ref.errors import MissingFileError, TrainingError
from pvt_ref.train import fit, lock, loop
from pvt_ref.train.interrupts import Interrupts
from pvt_ref.train.loop import BEST, CURVES, METRICS, STATE

HERE = Path(__file__).parent
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and fork")

#: Of a child process: a training that says "ready" in its second step, and goes on when told.
HELD = f"""
import os, signal, subprocess, sys, warnings
sys.path.insert(0, {str(HERE)!r})
warnings.simplefilter("error")
warnings.simplefilter("ignore", DeprecationWarning)  # of fork, where other libraries have threads
from small_training import CONFIG, DATA, HELD_OUT, RECIPE
from pvt_ref.errors import TrainingError
from pvt_ref.train import fit, loop
loop.draw_curves = lambda *_: None
def train(**options):
    return fit(CONFIG, RECIPE, DATA, HELD_OUT, sys.argv[1], log_steps=1, **options)
def at_step(number, act):
    inner = loop.train_step
    def step(state, *rest):
        if state.step == number:
            act()
        return inner(state, *rest)
    loop.train_step = step
def wait():
    print("ready", flush=True)
    sys.stdin.readline()
"""


def train(folder, **options):
    return fit(CONFIG, RECIPE, DATA, HELD_OUT, folder, log_steps=1, **options)


def start(code: str, folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HELD + code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def run_code(code: str, folder: Path, *before: str) -> list[str]:
    done = subprocess.run(
        [*before, sys.executable, "-c", HELD + code, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != lock.LOCK}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder).finished
    return folder


@pytest.fixture(scope="module")
def halfway_once(tmp_path_factory):
    """After step 6; the first epoch, of four steps, is the best so far."""
    folder = tmp_path_factory.mktemp("halfway")
    assert train(folder, stop_at_step=6).state.best_epoch == 1
    return folder


@pytest.fixture
def halfway(halfway_once, tmp_path):
    return Path(shutil.copytree(halfway_once, tmp_path / "run"))


# One living process -------------------------------------------------------------------------------


def test_a_second_process_is_refused_until_the_first_is_gone_or_killed(whole, tmp_path):
    process = start("at_step(1, wait); train()", tmp_path)
    before = contents(tmp_path)
    (link := tmp_path.with_name("link")).symlink_to(tmp_path)
    for folder, resume in itertools.product((tmp_path, link), (False, True)):
        with pytest.raises(TrainingError, match=rf"another .* \(process {process.pid} on .*Wait"):
            train(folder, resume=resume)
    assert contents(tmp_path) == before
    process.kill()
    process.communicate()
    assert (tmp_path / lock.LOCK).exists()  # a file that nobody holds
    train(tmp_path, resume=True)
    assert not (tmp_path / lock.LOCK).exists()
    assert fingerprint(saved(tmp_path)) == fingerprint(saved(whole))
    assert what_counts(tmp_path) == what_counts(whole)


def test_a_second_thread_is_refused(tmp_path, monkeypatch):
    inside, go_on = threading.Event(), threading.Event()
    inner = loop.train_step

    def step(*args):
        inside.set()
        assert go_on.wait(300)
        return inner(*args)

    monkeypatch.setattr(loop, "train_step", step)
    thread = threading.Thread(target=lambda: train(tmp_path, stop_at_step=2))
    thread.start()
    assert inside.wait(300)
    with pytest.raises(TrainingError, match="another training runs"):
        train(tmp_path, resume=True)
    go_on.set()
    thread.join()
    assert train(tmp_path, resume=True, stop_at_step=3).state.step == 3


@POSIX
def test_a_forked_child_neither_keeps_the_folder_nor_releases_it(tmp_path):
    """The first child leaves the training by its finally; the second lives longer than it."""
    code = """
def fork():
    pid = os.fork()
    if pid == 0:
        sys.exit()  # through all that fit has to clean up
    os.waitpid(pid, 0)
    try:
        train(resume=True)
    except TrainingError as error:
        print("another training runs" in str(error))
    global there
    reader, there = os.pipe()
    if os.fork() == 0:
        os.close(there)
        os.read(reader, 1)  # until the parent has ended
        os._exit(0)
    os.close(reader)
at_step(1, fork)
train(stop_at_step=2)
print(train(resume=True, stop_at_step=3).state.step)
"""
    assert run_code(code, tmp_path) == ["True", "3"]


@POSIX
@pytest.mark.parametrize("child", ["fork", "exec"])
def test_a_child_that_outlives_a_killed_training_does_not_keep_the_folder(child, tmp_path):
    code = f"""
def begin():
    if {child == "fork"}:
        pid = os.fork()
        if pid == 0:
            os.read(0, 1)
            os._exit(0)
    else:
        command = [sys.executable, "-c", "import os; os.read(0, 1)"]
        pid = subprocess.Popen(command, close_fds=False).pid
    wait()
at_step(1, begin); train()
"""
    process = start(code, tmp_path)
    process.kill()
    process.wait()
    assert train(tmp_path, resume=True, stop_at_step=2).state.step == 2
    process.communicate()  # now the child ends, too: there is nothing more to read


def test_what_lies_in_the_place_of_the_lock(tmp_path):
    (tmp_path / lock.LOCK).write_text("process 1 on \x1b[31m" * 1000)
    train(tmp_path, stop_at_step=0)
    (tmp_path / lock.LOCK).mkdir()
    with pytest.raises(TrainingError, match=r"run\.lock: .* cannot be locked \(IsADirectoryError"):
        train(tmp_path, resume=True)
    (tmp_path / lock.LOCK).rmdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / lock.LOCK)
        with pytest.raises(TrainingError, match="not a regular file"):
            train(tmp_path, resume=True)
        (tmp_path / lock.LOCK).unlink()
    assert train(tmp_path, resume=True, stop_at_step=1).state.step == 1


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_try_lock", refuse)
    with pytest.raises(TrainingError, match=r"No locks available.* such as a local disk"):
        train(tmp_path)
    assert not (tmp_path / STATE).exists()


def test_a_lock_on_a_file_that_was_just_removed_is_none(tmp_path, monkeypatch):
    """Its last owner removes it between our opening it and our locking it: a third could enter."""
    inner, removed = lock._try_lock, []

    def remove_and_lock(fd):
        if not removed:
            removed.append(os.fstat(fd).st_ino)
            (tmp_path / lock.LOCK).unlink()
            (tmp_path / "keeps the number in use").write_text("")
        inner(fd)

    monkeypatch.setattr(lock, "_try_lock", remove_and_lock)
    held, other = lock.RunLock(tmp_path), lock.RunLock(tmp_path)
    held.acquire()
    held.check()
    with pytest.raises(TrainingError, match="another"):
        other.acquire()
    other.release()
    assert (tmp_path / lock.LOCK).exists()
    held.release()
    assert len(removed) == 1
    assert not (tmp_path / lock.LOCK).exists()


def test_nothing_is_made_for_a_name_that_was_mistyped(tmp_path):
    with pytest.raises(MissingFileError, match=r"no such folder.*without --resume"):
        train(tmp_path / "rum", resume=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MissingFileError, match="no saved training"):
        train(tmp_path, resume=True)
    assert list(tmp_path.iterdir()) == []


# Signals ------------------------------------------------------------------------------------------


@POSIX
def test_ignored_signals_stay_ignored(tmp_path):
    """As under nohup, or in a shell's background."""
    code = """
def hang_up():
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGINT):
        os.kill(os.getpid(), number)
    print([signal.getsignal(n) == signal.SIG_IGN for n in (signal.SIGHUP, signal.SIGINT)])
at_step(1, hang_up)
print(train().finished)
print([signal.getsignal(n) == signal.SIG_IGN for n in (signal.SIGHUP, signal.SIGINT)])
"""
    shell = ("sh", "-c", "trap '' HUP INT; exec \"$@\"", "sh")
    assert run_code(code, tmp_path, *shell) == ["[True,", "True]", "True", "[True,", "True]"]


@POSIX
def test_handlers_are_replaced_only_if_they_can_be_put_back(monkeypatch):
    own = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: None, signal.SIGHUP: print}
    monkeypatch.setattr(signal, "getsignal", own.get)
    order = []

    def put(number, handler):
        order.append(number)
        own[number] = handler

    monkeypatch.setattr(signal, "signal", put)
    interrupts = Interrupts()
    interrupts.install()
    assert own[signal.SIGTERM] is None  # of a library in C, say
    assert own[signal.SIGINT] == own[signal.SIGHUP] == interrupts._note
    interrupts.restore()
    assert list(own.values()) == [signal.default_int_handler, None, print]
    # Ctrl-C raises nothing while another handler is still or already replaced
    assert order == [signal.SIGINT, signal.SIGHUP, signal.SIGHUP, signal.SIGINT]


def test_a_second_interrupt_waits_for_what_must_not_be_broken_off():
    interrupts, done = Interrupts(), []
    for _ in range(3):
        interrupts._note(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        interrupts.allow(done.append, 1)
    assert (done, interrupts.received) == ([], [signal.SIGINT] * 3)
    interrupts = Interrupts()
    interrupts._note(signal.SIGINT, None)
    assert interrupts.allow(int, "5") == 5  # the first one waits for the step in progress
    with pytest.raises(KeyboardInterrupt):
        interrupts.allow(interrupts._note, signal.SIGINT, None)
    interrupts._note(signal.SIGINT, None)  # allowed no more


@POSIX
def test_interrupts_at_every_line_leave_the_process_as_it_was(tmp_path):
    """One to three times Ctrl-C at each line in turn of what surrounds the steps of a training."""
    code = """
import dataclasses, shutil
from pvt_ref.train import interrupts, lock, metrics, saved
from pvt_ref.checkpoint import whole_file
files = {m.__file__ for m in (loop, interrupts, lock, metrics, saved, whole_file)}
folder, numbers = sys.argv[1], (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
before = [signal.getsignal(n) for n in numbers]
def descriptors():
    paths = [os.path.realpath(f"/dev/fd/{name}") for name in os.listdir("/dev/fd")]
    return [path for path in paths if path.startswith(os.path.realpath(folder))]
def strike(place, times):
    "Trains an epoch of a step, and sends the signal at the first visit of line number place."
    seen = set()
    def trace(frame, event, _):
        where = frame.f_code.co_filename, frame.f_lineno
        if where[0] not in files:
            return None
        if event == "line" and where not in seen:
            seen.add(where)
            if len(seen) == place:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
        return trace
    shutil.rmtree(folder, ignore_errors=True)
    sys.settrace(trace)
    try:
        epoch()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return len(seen)
def epoch(resume=False):
    return fit(CONFIG, recipe, DATA, HELD_OUT, folder, log_steps=1, resume=resume)
recipe = dataclasses.replace(RECIPE, epochs=1, batch_size=27)
total, struck = strike(0, 1), 0
for place in range(1, total + 1, STRIDE):
    strike(place, 1 + place // STRIDE % 3)
    assert [signal.getsignal(n) for n in numbers] == before, (place, numbers)
    left = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    assert left <= {"training.safetensors", "metrics.jsonl", "best.safetensors"}, (place, left)
    assert not descriptors(), place
    if left:
        assert epoch(resume="training.safetensors" in left).finished
    struck += 1
print(struck)
"""
    (struck,) = run_code(code.replace("STRIDE", "7"), tmp_path / "run")
    assert int(struck) > 30


@POSIX
def test_interrupts_at_random_moments_cost_nothing_that_was_saved(whole, tmp_path):
    code = """
import random, threading, time
random.seed(4)
before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
began = time.monotonic(); train(stop_at_step=2); typical = time.monotonic() - began
done = interrupted = 0
while not done:
    stop = threading.Event()
    def send():
        for delay in (random.uniform(0, 2 * typical), *(random.uniform(0, 0.01) for _ in range(2))):
            if stop.wait(delay):
                return
            os.kill(os.getpid(), signal.SIGINT)
    sender = threading.Thread(target=send)
    try:
        sender.start()
        done = train(resume=True, save_seconds=0.0).finished
    except KeyboardInterrupt:
        interrupted += 1
    finally:
        while sender.is_alive():
            try:
                stop.set(); sender.join()
            except KeyboardInterrupt:
                pass
    now = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert now == before
    left = {name for name in os.listdir(sys.argv[1]) if name[0] == "." or "lock" in name}
    assert not left, left
"""
    run_code(code, tmp_path)
    assert fingerprint(saved(tmp_path)) == fingerprint(saved(whole))
    assert what_counts(tmp_path) == what_counts(whole)


# The best weights ---------------------------------------------------------------------------------


def test_best_weights_that_were_lost_damaged_or_swapped_are_missed(halfway, whole, tmp_path):
    best = halfway / BEST
    right = best.read_bytes()
    other = dataclasses.replace(RECIPE, seed=9)
    fit(CONFIG, other, DATA, HELD_OUT, tmp_path / "other", stop_at_step=4)
    (tmp_path / "folder").mkdir()
    wrong = {
        "is not there: the weights of epoch 1, which did best, are lost": None,
        "cannot be read .*does not match its SHA-256": right[:-1] + bytes([right[-1] ^ 1]),
        "cannot be read .*the file is empty": b"",
        "does not hold the weights of epoch 1": (tmp_path / "other" / BEST).read_bytes(),
    }
    for message, content in wrong.items():
        best.unlink(missing_ok=True)
        if content is not None:
            best.write_bytes(content)
        before = contents(halfway)
        with pytest.raises(TrainingError, match=f"best.safetensors {message}.*Put back"):
            train(halfway, resume=True)
        assert contents(halfway) == before
    best.unlink()
    best.mkdir()
    with pytest.raises(TrainingError, match=r"cannot be read .*a directory"):
        train(halfway, resume=True)
    best.rmdir()
    best.write_bytes(right)
    assert train(halfway, resume=True).finished
    assert fingerprint(saved(halfway)) == fingerprint(saved(whole))


def test_a_finished_run_without_its_best_weights_is_not_finished(tmp_path, monkeypatch):
    results = iter([(1.0, 5 / 9), (1.0, 7 / 9), (1.0, 6 / 9)])
    monkeypatch.setattr(loop, "evaluate", lambda *_: next(results))
    assert train(tmp_path).state.best_epoch == 2
    (tmp_path / BEST).unlink()
    with pytest.raises(TrainingError, match="the weights of epoch 2, which did best, are lost"):
        train(tmp_path, resume=True)


def test_best_weights_that_are_lost_while_it_runs_are_missed_at_its_end(tmp_path, monkeypatch):
    results, inner = iter([(1.0, 0.7), (1.0, 0.6), (1.0, 0.5)]), loop.train_step
    monkeypatch.setattr(loop, "evaluate", lambda *_: next(results))

    def step(state, *rest):
        if state.step == 6:
            (tmp_path / BEST).unlink()
        return inner(state, *rest)

    monkeypatch.setattr(loop, "train_step", step)
    with pytest.raises(TrainingError, match="the weights of epoch 1, which did best, are lost"):
        train(tmp_path)
    assert saved(tmp_path).step == RECIPE.epochs * 4  # and nothing else is


@pytest.mark.parametrize("epoch", [1, 2])
def test_ended_between_the_state_and_its_best_weights_it_writes_them_again(
    epoch, whole, tmp_path, monkeypatch
):
    """In epoch 2 there is an older file; it must not pass for the new one."""
    inner, calls = loop._save_best, []

    def end(job, state):
        if state.best_epoch == epoch:
            raise SystemExit
        calls.append(inner(job, state))

    results = {4: 1 / 9, 8: 3 / 9, 12: 2 / 9}

    def measured(job, state, lr):
        return 1.0, {"accuracy": results[state.step]}

    monkeypatch.setattr(loop, "_measure", measured)
    monkeypatch.setattr(loop, "_save_best", end)
    with pytest.raises(SystemExit):
        train(tmp_path / "cut")
    assert (saved(tmp_path / "cut").best_epoch, len(calls)) == (epoch, epoch - 1)
    monkeypatch.setattr(loop, "_save_best", inner)
    train(tmp_path / "cut", resume=True)
    train(tmp_path / "never cut")
    for name in (BEST, STATE):
        assert (tmp_path / "cut" / name).read_bytes() == (
            tmp_path / "never cut" / name
        ).read_bytes()
    model = pvt_ref.load(tmp_path / "cut" / BEST)
    assert loop.weights_sha256(model.params) == saved(tmp_path / "cut").best_sha256


def test_best_weights_from_before_the_first_epoch_are_another_runs(tmp_path, whole):
    train(tmp_path, stop_at_step=1)
    shutil.copy(whole / BEST, tmp_path)
    with pytest.raises(TrainingError, match="is from before the end of the first epoch"):
        train(tmp_path, resume=True)


# The first weights --------------------------------------------------------------------------------


def test_a_run_with_other_first_weights_is_not_continued(tmp_path):
    first, other = (random_params(CONFIG, seed, np.float32) for seed in (8, 9))
    drawn = init_params(CONFIG, np.random.default_rng([RECIPE.seed, 1]))
    for folder, begun, wrong in ((tmp_path / "a", first, other), (tmp_path / "b", None, first)):
        train(folder, first=begun, stop_at_step=1)
        for step in (2, 3):  # the second time, after a resuming that did not say
            with pytest.raises(TrainingError, match=r"first\.sha256 is '.*' there and '.*' here"):
                train(folder, first=wrong, resume=True)
            train(folder, resume=True, stop_at_step=step)
        right = drawn if begun is None else begun
        assert train(folder, first=right, resume=True, stop_at_step=4).state.step == 4


# What is printed ----------------------------------------------------------------------------------


def test_names_in_what_is_shown_are_texts(tmp_path):
    """Markup would vanish, or fail if it is none; a control character would be obeyed."""
    folder = tmp_path / "[red]run[/blue] \x1b[31m"
    (folder / CURVES).mkdir(parents=True)
    with (tmp_path / "seen").open("w+") as file:
        console = Console(file=file, width=60)
        train(folder, stop_at_step=4, console=console)
        (folder / METRICS).unlink()
        train(folder, stop_at_step=5, console=console, resume=True)
        file.seek(0)
        seen = file.read()
    assert "[red]run[/blue] \\x1b[31m/curves.png could not be written: IsADirectoryError" in seen
    assert "[red]run[/blue] \\x1b[31m/metrics.jsonl lacks epochs that were done" in seen
    assert "\x1b" not in seen


def test_a_terminal_that_was_closed_ends_no_training(tmp_path):
    class Closed:
        def write(self, _):
            raise OSError(errno.EIO, "Input/output error")

        flush = isatty = lambda self: False

    console = Console(file=Closed())  # type: ignore[arg-type]
    assert train(tmp_path, console=console).finished
    console.file = None  # type: ignore[assignment]  # nothing more to write at its end
