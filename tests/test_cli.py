"""The command line, run in process; once as a user would."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from strategies import rng_of

import pvt_ref
from pvt_ref import VARIANTS
from pvt_ref.__main__ import main
from pvt_ref.models import architecture
from pvt_ref.models.architecture import known_variants
from pvt_ref.models.vit import VIT


def run(capsys, *argv: str) -> tuple[int, str, str]:
    status = main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_summary_prints_the_bill(capsys):
    status, out, _ = run(capsys, "summary", "pvt_small", "--size", "512", "768")
    cost = pvt_ref.count_cost(VARIANTS["pvt_small"], (512, 768))
    assert status == 0
    assert "pvt_small, image 512x768" in out
    assert "24,485,864" in out  # parameters
    assert f"{cost.macs / 1e6:,.2f}" in out
    assert f"{cost.peak_bytes / 2**20:,.2f}" in out
    assert "attn.sr x4" in out  # stage 2 has four blocks
    for i, grid in enumerate(("128x192", "64x96", "32x48", "16x24"), start=1):
        assert f"stage {i}: grid {grid}" in out


def test_summary_of_a_vit_a_square_and_the_pyramid(capsys):
    assert "22,050,664" in run(capsys, "summary", "deit_s_16")[1]
    assert (
        "image 64x64, batch 2, float64"
        in run(capsys, "summary", "pvt_tiny", "--size", "64", "--batch", "2", "--dtype", "float64")[
            1
        ]
    )
    assert "classifier" not in run(capsys, "summary", "pvt_tiny", "--pyramid")[1]


@pytest.mark.parametrize("name", known_variants())
def test_summary_knows_the_published_variants_of_all_networks_and_their_aliases(name, capsys):
    status, out, err = run(capsys, "summary", name)
    assert (status, err) == (0, "")
    cost = pvt_ref.count_cost(known_variants()[name])
    assert out.startswith(f"{name}, image 224x224, batch 1, float32\n")
    total = out.splitlines()[-1]
    assert total.split()[-4:] == [
        f"{cost.parameters:,}",
        f"{cost.macs / 1e6:,.2f}",
        f"{cost.peak_bytes / 2**20:,.2f}",
        f"{cost.cache_bytes / 2**20:,.2f}",
    ]


def test_an_alias_is_the_variant_that_it_stands_for(capsys):
    alias, name = (run(capsys, "summary", n)[1] for n in ("pvt_v1_huge", "pvt_huge_v2"))
    assert alias.partition(",")[2] == name.partition(",")[2]


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_summary_of_what_is_shipped_and_of_its_file(name, capsys, tmp_path):
    model = pvt_ref.load(name)
    path = str(tmp_path / "own.safetensors")
    pvt_ref.save(path, model)
    tables = [run(capsys, "summary", of)[1] for of in (name, path)]
    (first, second) = (text[text.index("stage 1") :] for text in tables)
    assert first == second
    cost = pvt_ref.count_cost(model.config)
    assert f"{cost.parameters:,}" in first
    assert first.split()[-1] == f"{cost.cache_bytes / 2**20:,.2f}"


def test_the_pyramid_of_a_vit_is_one_map(capsys):
    status, out, err = run(capsys, "summary", "vit_s_16", "--pyramid")
    assert (status, err) == (0, "")
    assert "stage 1: grid 14x14" in out
    assert "classifier" not in out


def test_the_pyramid_of_a_network_without_one_is_refused(capsys, monkeypatch):
    row = dataclasses.replace(VIT, forward_pyramid=None, backward_pyramid=None)
    monkeypatch.setitem(architecture._rows, row.config_type, row)
    status, out, err = run(capsys, "summary", "vit_s_16", "--pyramid")
    assert (status, out) == (2, "")
    assert "a ViT has no pyramid" in err


def test_help_names_every_variant(capsys):
    with pytest.raises(SystemExit):
        main(["summary", "--help"])
    text = capsys.readouterr().out.replace("\n", " ")
    assert all(name in text for name in known_variants())


def test_summary_of_an_impossible_size_says_what_fits(capsys):
    status, out, err = run(capsys, "summary", "pvt_tiny", "--size", "200", "224")
    assert status == 2
    assert not out
    assert "200x224 does not fit" in err
    assert "192x224" in err
    status, _, err = run(capsys, "summary", "pvt_tiny", "--size", "1", "2", "3")
    assert status == 2
    assert "a side or (H, W)" in err


def test_convert_writes_our_format_and_says_what_it_recognised(capsys, tmp_path):
    import torch

    config = VARIANTS["pvt_tiny"]
    params = pvt_ref.init_params(config, rng_of(0))
    state = {k: torch.tensor(x) for k, x in pvt_ref.to_state_dict(params).items()}
    torch.save(state, tmp_path / "pvt_tiny.pth")
    target = tmp_path / "tiny.safetensors"
    status, out, _ = run(capsys, "convert", str(tmp_path / "pvt_tiny.pth"), str(target))
    assert status == 0
    assert "pvt_tiny" in out
    assert str(target) in out
    model = pvt_ref.load(target)
    assert model.config == config
    for key, x in pvt_ref.to_state_dict(model.params).items():
        np.testing.assert_array_equal(x, state[key].numpy(), err_msg=key)


def test_convert_takes_the_eps_that_no_file_tells(capsys, tmp_path):
    config = dataclasses.replace(VARIANTS["pvt_tiny"], projection_norm_eps=1e-6)
    source = tmp_path / "a.safetensors"
    pvt_ref.save(source, pvt_ref.Model(pvt_ref.init_params(config, rng_of(0)), config))
    for given, expected in (
        ([], (1e-6, 1e-6)),
        (["--eps", "1e-3"], (1e-3, 1e-3)),
        (["--eps", "1e-6", "1e-5"], (1e-6, 1e-5)),
    ):
        target = tmp_path / "b.safetensors"
        assert run(capsys, "convert", "--force", str(source), str(target), *given)[0] == 0
        found = pvt_ref.load(target).config
        assert (found.norm_eps, found.projection_norm_eps) == expected


def test_tables_are_plain_ascii():
    done = subprocess.run(
        [sys.executable, "-m", "pvt_ref", "summary", "pvt_tiny"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"13,229,288" in done.stdout
    assert b"?" not in done.stdout


def test_convert_of_what_is_not_there_or_not_weights(capsys, tmp_path):
    target = tmp_path / "x.safetensors"
    status, _, err = run(capsys, "convert", str(tmp_path / "nothing.pth"), str(target))
    assert status == 2
    assert "nothing.pth" in err
    (tmp_path / "text.pth").write_text("hello")
    status, _, err = run(capsys, "convert", str(tmp_path / "text.pth"), str(target))
    assert status == 2
    assert "text.pth" in err
    assert not target.exists()


def test_module_runs_as_a_program_and_needs_no_torch():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['pvt_ref', 'summary', 'pvt_tiny']\n"
        "try: runpy.run_module('pvt_ref', run_name='__main__')\n"
        "except SystemExit as e: assert not e.code\n"
        "loaded = {'torch', 'cupy', 'transformers', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "13,229,288" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "pvt_ref", "--version"], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == f"pvt_ref {pvt_ref.__version__}"


@pytest.mark.parametrize("name", sorted(pvt_ref.__all__))
def test_every_public_name_is_there_and_documented(name):
    assert getattr(pvt_ref, name).__doc__


def test_classify_says_what_pictures_show(capsys, tmp_path):
    photo = str(Path(__file__).parents[1] / "examples" / "chelsea.jpg")
    blank = str(tmp_path / "a.png")
    Image.new("RGB", (40, 40)).save(blank)
    model = pvt_ref.load("digits")
    expected = [answer for name in (photo, blank) for answer in model.predict([name], top=2)]
    assert expected[0][0].label != expected[1][0].label
    arguments = ["classify", photo, blank, "--weights", "digits", "--top", "2"]
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    for name, answers, text in zip((photo, blank), expected, out.split("\n\n"), strict=True):
        heading, _, _, *rows = text.splitlines()
        assert heading == name
        assert [row.split()[0] for row in rows] == [a.label for a in answers]
        assert [float(row.split()[1]) for row in rows] == pytest.approx(
            [a.probability for a in answers], abs=1e-4
        )
    for order in (1, -1):  # whichever of the two comes first in the alphabet
        names, answers = (photo, blank)[::order], expected[::order]
        arguments = ["classify", *names, "--weights", "digits", "--top", "2", "--json"]
        _, out, _ = run(capsys, *arguments)
        for name, answer, record in zip(names, answers, json.loads(out), strict=True):
            assert (record["image"], record["weights"]) == (name, "digits")
            assert [p["index"] for p in record["predictions"]] == [a.index for a in answer]
            assert [p["label"] for p in record["predictions"]] == [a.label for a in answer]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png"], "there is no file"),
        ([__file__], "not a picture"),
        ([__file__, "--top", "0"], "top is 0"),
        ([__file__, "--weights", "nowhere.pth"], "no such file"),
    ],
)
def test_classify_explains_what_is_wrong(arguments, message, capsys):
    status, out, err = run(capsys, "classify", *arguments)
    assert (status, out) == (2, "")
    assert message in err
