"""What installs the project, and what runs it for others, says one thing in all places."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCKED = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("tools/locked/*.txt")}
WORKFLOWS = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob(".github/*/*.yml")}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    """Release by name, of lines such as ``name==1.2 ; marker``."""
    found = re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, flags=re.MULTILINE)
    return {canonical(name): release for name, release in found}


CONSTRAINTS = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))


def requirements(extra: str) -> set[str]:
    """Names that an extra asks for by itself, its own extras included."""
    names = {canonical(re.match(r"[\w.-]+", line)[0]) for line in PROJECT["dependencies"]}
    for line in PROJECT["optional-dependencies"][extra]:
        name, nested = re.match(r"([\w.-]+)(?:\[([^\]]*)\])?", line).groups()
        if canonical(name) == "pvt-ref":
            names |= set().union(*(requirements(part) for part in nested.split(",")))
        else:
            names.add(canonical(name))
    return names


def test_every_extra_that_make_installs_has_a_list():
    wanted = set(re.findall(r"\.venv/\.stamp-(\w+)", MAKEFILE))
    assert wanted == set(LOCKED) >= {"examples", "test"}


@pytest.mark.parametrize("extra", sorted(LOCKED))
def test_a_list_holds_what_its_extra_asks_for_in_the_pinned_releases(extra):
    locked = pins(LOCKED[extra])
    # PyTorch's builds differ in their hashes; the Makefile installs it by itself
    assert requirements(extra) - {"torch"} <= set(locked)
    assert {"hatchling", "editables"} <= set(locked)
    emscripten_only = {"httpx2-jsfetch"}
    for name, release in locked.items():
        assert name in emscripten_only or CONSTRAINTS[name] == release, name
    assert "torch" in CONSTRAINTS


@pytest.mark.parametrize("extra", sorted(LOCKED))
def test_every_file_in_a_list_is_named_by_its_hash(extra):
    packages = [p for p in re.split(r"\n(?=\w)", LOCKED[extra]) if "==" in p]
    assert len(packages) > 20
    for package in packages:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", package), package.splitlines()[0]
    assert "://" not in LOCKED[extra]  # no index of somebody's own


def test_make_installs_from_these_lists_with_their_hashes():
    assert "--require-hashes -r $<" in MAKEFILE
    assert "tools/locked/%.txt" in MAKEFILE


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_workflows_name_actions_by_commit_and_have_no_rights_to_spare(name):
    text = WORKFLOWS[name]
    used = re.findall(r"uses: (\S+)(.*)", text)
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), action
    assert text.count("persist-credentials: false") == text.count("actions/checkout@")
    assert re.search(r"^permissions: \{\}$", text, flags=re.MULTILINE)
    jobs = re.split(r"\n  (?=\w+:)", text.split("\njobs:", 1)[1])[1:]
    assert len(jobs) >= 2
    for job in jobs:
        rights = set(re.findall(r"^      ([\w-]+: (?:read|write))$", job, flags=re.MULTILINE))
        if "actions/checkout@" in job:  # runs what others wrote, and may only read
            assert rights == {"contents: read"}, job
        else:
            assert rights in MAY_WRITE, job
            assert not re.search(r"\b(make|pip|npm|python|bash)\b|\.ci/", without_pypi(job)), job


#: Of jobs that run nothing but actions, git and gh: to Pages; to a branch or a release; proof of
#: who built a file; to PyPI.
MAY_WRITE = (
    {"pages: write", "id-token: write"},
    {"contents: write"},
    {"id-token: write", "attestations: write"},
    {"id-token: write"},
)


def without_pypi(job: str) -> str:
    return re.sub(r"#.*|pypa/gh-action-pypi-publish|environment: pypi", "", job)


def test_a_release_is_proved_before_it_is_published():
    needed = r"\n  (\w+):(?: #[^\n]*)?\n    needs: (\w+)"
    jobs = dict(re.findall(needed, WORKFLOWS["release.yml"]))
    assert jobs == {"attest": "build", "publish": "attest", "announce": "publish"}
    assert "password" not in WORKFLOWS["release.yml"]
    assert "secrets." not in "".join(WORKFLOWS.values())


def test_the_documentation_tells_notebooks_its_repository_and_readers_its_address():
    docs = WORKFLOWS["docs.yml"]
    assert "REPOSITORY: ${{ github.repository }}@${{ github.sha }}" in docs
    assert 'echo "The site is at $ADDRESS"' in docs
    assert "steps.deployment.outputs.page_url" in docs.split("ADDRESS:")[1]
    written = "".join(WORKFLOWS.values())  # so that a fork needs no change
    assert not re.search(r"github\.com/(?!\$REPOSITORY)[\w-]+/|github\.repository ==", written)


def test_wheels_are_tested_on_every_platform():
    lanes = re.findall(
        r"- \{ name: .*?, os: (\w+).*?python: \"(\S+)\", how: (\w+)", WORKFLOWS["ci.yml"]
    )
    assert {system for system, _, _ in lanes} == {"ubuntu", "macos", "windows"}
    assert "ubuntu-24.04-arm" in WORKFLOWS["ci.yml"]
    assert {"locked", "lowest", "alone"} == {how for _, _, how in lanes}
    script = (ROOT / ".ci" / "wheel").read_text(encoding="utf-8")
    assert all(re.search(rf"^  {how}\)$", script, re.MULTILINE) for _, _, how in lanes)
    lowest = next(python for _, python, how in lanes if how == "lowest")
    assert PROJECT["requires-python"] == f">={lowest}"


def test_the_oldest_and_the_newest_python_are_tested():
    assert PROJECT["requires-python"] == ">=3.11"
    tested = re.findall(r'python: "([\d.]+)", os', WORKFLOWS["ci.yml"])
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    oldest, newest = re.search(r"For Python ([\d.]+\d) to ([\d.]+\d)\.", text).groups()
    assert (tested[0], tested[-1]) == (oldest, newest)


def test_ci_begins_with_readmes_two_commands_in_environments_of_their_own():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    steps = re.findall(r"^step \"?(.*?)\"?$", script, flags=re.MULTILINE)
    assert steps[:2] == ["make demo", "make test"]
    assert script.count('copy "$scratch/') == 2
    before = script[: script.index("step lint")]
    installed = re.findall(r"make .* (\w[\w-]*)$|pip install|make venv", before, flags=re.MULTILINE)
    assert installed == ["demo", "test"]


def test_terms_of_what_others_made_lie_beside_it():
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for path in re.findall(r"\b(?:pvt_ref|examples)/[\w./]+\.(?:txt|md|jpg)", notice):
        assert (ROOT / path).is_file(), path
    assert "NOTICE" in PROJECT["license-files"]
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "[yyyy]" not in licence
    assert "Copyright 2026 The pvt_ref authors" in licence
    weights = (ROOT / "pvt_ref" / "weights" / "README.md").read_text(encoding="utf-8")
    for path in ROOT.glob("pvt_ref/weights/*.safetensors"):
        assert path.name in weights
    words = (ROOT / "pvt_ref" / "data" / "imagenet_classes.LICENSE.txt").read_text(encoding="utf-8")
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in words
