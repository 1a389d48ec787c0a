"""The cards of the weights say what the weights' own metadata say."""

import importlib.util
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tool():
    path = ROOT / "tools" / "model_cards.py"
    spec: Any = importlib.util.spec_from_file_location("model_cards", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_weights_say(tool, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["model_cards.py", "--check"])
    assert tool.main() == 0
    changed = tmp_path / "model_cards.md"
    changed.write_text(tool.CARDS.read_text("utf-8").replace("CIFAR-10", "CIFAR-100"), "utf-8")
    monkeypatch.setattr(tool, "CARDS", changed)
    assert tool.main() == 1
    assert "run python tools/model_cards.py" in capsys.readouterr().out


def test_a_card_has_the_scores_and_the_terms(tool):
    page = tool.CARDS.read_text("utf-8")
    for path in (ROOT / "pvt_ref" / "weights").glob("*.safetensors"):
        assert f"\n## {path.stem}\n" in page
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        info = json.loads(header["__metadata__"]["pvt_ref"])["info"]
        card = page.split(f"\n## {path.stem}\n")[1].split("\n## ")[0]
        scores = [v for key, v in info["training"].items() if "accuracy" in key]
        assert all(f"{score:.4g}" in card for score in scores), path
        assert all(name in card for name in info["classes"])
    with pytest.raises(ValueError, match=r"no row of somebody.safetensors"):
        tool.terms("somebody")
