"""Some thousands of damaged files; fuzz_checkpoints.py makes as many as one likes."""

import dataclasses
import json
import random
import time

import fuzz_checkpoints
import fuzz_layouts
import numpy as np
import pytest
import spelt_layouts

from pvt_ref import Model, from_state_dict, init_params, to_state_dict
from pvt_ref.checkpoint import load


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_damaged_files_are_refused_or_load_exactly(kind):
    lines = []
    outcomes, failures = fuzz_checkpoints.run((kind,), 0, 0, 1000, lines.append)
    assert not failures, "\n".join(lines)
    assert sum(outcomes.values()) == 1000
    assert outcomes[kind, "refused"] > 500  # the damage is real
    assert outcomes[kind, "the same"] > 0  # and not every damage matters


@pytest.mark.parametrize("kind", ["legacy", "resealed", "lies"])
def test_what_no_checksum_can_tell_is_refused_or_gives_some_model(kind):
    lines = []
    outcomes, failures = fuzz_checkpoints.run((kind,), 0, 0, 500, lines.append)
    assert not failures, "\n".join(lines)
    assert sum(outcomes.values()) == 500
    assert outcomes[kind, "refused"] > 200
    assert outcomes[kind, "another model"] > 0


@pytest.mark.parametrize("kind", fuzz_layouts.KINDS)
def test_files_of_other_projects_are_refused_or_load_what_they_say(kind):
    lines = []
    outcomes, failures = fuzz_checkpoints.run((kind,), 0, 0, 150, lines.append)
    assert not failures, "\n".join(lines)
    assert sum(outcomes.values()) == 150
    assert outcomes[kind, "refused"] > 60
    assert outcomes[kind, "right"] > 20


def good_case(kind, name, **changes):
    """An undamaged file of the layout of that name, and the model in it, from safetensors."""
    layout = next(x for x in fuzz_layouts.LAYOUTS[kind] if x.name == name)
    config = fuzz_layouts.CONFIGS[kind][0]
    config = config if layout.head is not False else fuzz_layouts.bare(config)
    state = dict(fuzz_layouts.good_state(kind, layout, config))
    case = fuzz_layouts.Case(kind, layout, config, state, "safetensors", argument=config)
    case = dataclasses.replace(case, **changes)
    fuzz_layouts.write(case)
    return case


ALL_LAYOUTS = [(kind, x.name) for kind in fuzz_layouts.KINDS for x in fuzz_layouts.LAYOUTS[kind]]


@pytest.mark.parametrize(("kind", "name"), ALL_LAYOUTS)
def test_the_second_reader_sees_what_it_is_for(tmp_path, kind, name):
    case = good_case(kind, name)
    model = load(fuzz_layouts.put(case, tmp_path / "f"), case.argument)
    assert fuzz_layouts.wrong(case, model) == ""
    state = to_state_dict(model.params)

    def judged(case=case, config=model.config, source=model.source, **changes):
        params = from_state_dict({**state, **changes}, config)
        return fuzz_layouts.wrong(case, Model(params, config, source))

    key = next(key for key in state if key.endswith("attn.proj.weight"))
    assert "other numbers" in judged(**{key: state[key].T.copy()})
    assert "other numbers" in judged(**{key: np.nextafter(state[key], np.float32(9))})
    heads = {"num_heads": (1, 1, 1, 1) if kind == "pvt_v2" else 1}
    assert "not the one" in judged(config=dataclasses.replace(model.config, **heads))
    assert "eps is" in judged(config=dataclasses.replace(model.config, norm_eps=1e-3))
    extra = good_case(kind, name, state={**case.state, "more.weight": np.ones(2, np.float32)})
    assert "'more.weight', which was left out" in judged(case=extra)
    inside = {f"a.{k}": x for k, x in case.state.items()} | {"b.weight": np.ones(2, np.float32)}
    beside = good_case(kind, name, state=inside)
    assert "nothing says so" in judged(case=beside)
    assert judged(case=beside, source="left out: 'b.weight'") == ""


@pytest.mark.parametrize("kind", fuzz_layouts.KINDS)
def test_a_config_json_is_taken_at_its_word(tmp_path, kind):
    fields = spelt_layouts.config_json(fuzz_layouts.CONFIGS[kind][0])
    text = json.dumps(fields).encode()
    case = good_case(kind, "hugging face", json_text=text, argument=None)
    model = load(fuzz_layouts.put(case, tmp_path / "f"))
    assert fuzz_layouts.wrong(case, model) == ""
    for name in ("num_attention_heads", "layer_norm_eps", "hidden_dropout_prob"):
        other = fields | {name: fuzz_layouts.CONFIGS["vit"][0].mlp_ratio}
        told = dataclasses.replace(case, json_text=json.dumps(other).encode())
        assert "config.json has" in fuzz_layouts.wrong(told, model)
    relu = dataclasses.replace(case, json_text=text.replace(b'"gelu"', b'"relu"'))
    assert "is not computed so" in fuzz_layouts.wrong(relu, model)
    names = dataclasses.replace(case, json_text=text.replace(b'"class 1"', b'"cat"', 1))
    assert "classes are" in fuzz_layouts.wrong(names, model)


def test_a_good_file_must_be_loaded(monkeypatch):
    def refuse(path, config=None, **more):
        raise fuzz_checkpoints.CheckpointError(f"{path}: no")

    def undamaged(kind, rng, damages):
        return good_case(kind, "timm")

    monkeypatch.setattr(fuzz_checkpoints, "load", refuse)
    monkeypatch.setattr(fuzz_layouts, "make_case", undamaged)
    lines = []
    _, failures = fuzz_checkpoints.run(("pvt_v2",), 0, 3, 1, lines.append)
    assert len(failures) == 1
    assert "a good file was refused" in lines[0]


@pytest.mark.parametrize("kind", fuzz_layouts.KINDS)
def test_every_layout_and_damage_is_drawn(kind):
    rng = random.Random(0)
    cases = [fuzz_layouts.make_case(kind, rng, fuzz_checkpoints.DAMAGES) for _ in range(150)]
    assert {case.layout.name for case in cases} == {x.name for x in fuzz_layouts.LAYOUTS[kind]}
    assert {case.container for case in cases} == {"zip", "legacy", "safetensors"}
    done = {how for case in cases for how in case.done}
    assert done >= {how.__name__ for how in fuzz_layouts.OF_CONTENT} | {"bytes", "change_header"}
    assert any(not case.done for case in cases)


def other_numbers(path, config):
    params = init_params(fuzz_checkpoints.CONFIG, np.random.default_rng(1))
    return Model(params, fuzz_checkpoints.CONFIG)


def foreign_exception(path, config):
    raise KeyError(path)


def huge_allocation(path, config):
    return bytearray(2**40)


def endless_loop(path, config):
    if hasattr(fuzz_checkpoints.signal, "setitimer"):
        while True:
            time.sleep(0)
    raise fuzz_checkpoints.Hang("not done")


@pytest.mark.parametrize(
    ("loader", "problem"),
    [
        (other_numbers, "silently different"),
        (foreign_exception, "KeyError"),
        (huge_allocation, "MemoryError"),
        (endless_loop, "not done"),
    ],
)
def test_the_fuzzer_sees_what_it_is_for(monkeypatch, loader, problem):
    fuzz_checkpoints.sample("pth")
    monkeypatch.setattr(fuzz_checkpoints, "load", loader)
    monkeypatch.setattr(fuzz_checkpoints, "SECONDS", 0.1)
    lines = []
    _, failures = fuzz_checkpoints.run(("pth",), 0, 7, 1, lines.append)
    assert len(failures) == 1
    assert problem in lines[0]
    assert "--kind pth --seed 0 --start 7 --count 1" in lines[0]
