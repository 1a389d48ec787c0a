"""A fault in a layer is reported by the layer's unit test, and by nothing before it."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GROUPS, LAST, group

HERE = Path(__file__).parent


def test_the_groups_name_files_that_are_there():
    for name in (*sum(GROUPS, ()), *LAST):
        assert (HERE / name).is_file(), name


def test_layers_come_first_and_pages_last():
    order = ["test_layers.py", "test_properties.py", "test_cost.py", "test_course.py"]
    assert [group(f"tests/{name}::test_x[a/b]") for name in order] == [0, 1, 2, 3]


@pytest.mark.parametrize(("workers", "go_on"), [("0", False), ("2", False), ("0", True)])
def test_after_a_failure_in_a_layer_nothing_later_begins(tmp_path, workers, go_on):
    for name in ("conftest.py", "browsing.py"):
        (tmp_path / name).write_text((HERE / name).read_text(encoding="utf-8"))
    ran = "from pathlib import Path\n\ndef test_it():\n    Path(__file__ + '.ran').touch()\n"
    fails = ran.replace("test_it", "test_fails") + "    assert 2 + 2 == 5, 'the layer'\n"
    for name in ("test_course.py", "test_readme.py", "test_cost.py"):
        (tmp_path / name).write_text(ran)
    (tmp_path / "test_layers.py").write_text(fails + ran.partition("\n")[2])
    many = "import time\n\nimport pytest\n\n@pytest.mark.parametrize('i', range(40))\n"
    (tmp_path / "test_zzz.py").write_text(many + "def test_it(i):\n    time.sleep(0.05)\n")
    command = [sys.executable, "-m", "pytest", "-n", workers, "--maxschedchunk", "1", "-q"]
    command += ["-p", "no:cacheprovider", *(["--go-on"] if go_on else [])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "the layer" in done.stdout
    assert (tmp_path / "test_layers.py.ran").is_file()
    assert (tmp_path / "test_course.py.ran").is_file() == go_on
    assert ("--go-on runs the rest" in done.stdout + done.stderr) != go_on
