"""The door is open: a network that nobody in the package knows goes wherever a PVT goes."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from strategies import normal, rng_of
from toy import TOY, ToyConfig, ToyParams, entered

import pvt_ref
from pvt_ref import REFERENCE, Model, ModelInfo, Preprocessing
from pvt_ref.__main__ import main
from pvt_ref.errors import ArrayTypeError, CheckpointError, ConfigError, ShapeError
from pvt_ref.models.architecture import architecture_of, known_variants
from pvt_ref.report.times import time_stages
from pvt_ref.train import LabelledImages, Recipe, fit
from pvt_ref.tree import named_arrays

CONFIG = ToyConfig()
INFO = ModelInfo(title="a toy", classes=("a", "b", "c", "d"))


@pytest.fixture(autouse=True)
def toy():
    with entered() as row:
        yield row


def params_of(config=CONFIG, dtype: Any = np.float64, seed=0):
    return pvt_ref.init_params(config, rng_of(seed), dtype)


def test_it_is_there_only_while_it_is_entered():
    assert architecture_of(CONFIG) is TOY
    assert "toy_small" in known_variants()
    assert "pvt_tiny" in known_variants()


def test_it_computes_and_its_gradients_are_right():
    params, images = params_of(), normal(1, 2, 3, 8, 12)
    logits, cache = pvt_ref.forward_with_cache(params, images, CONFIG)
    assert logits.shape == (2, 4)
    np.testing.assert_array_equal(logits, pvt_ref.forward(params, images, CONFIG))
    u, v = normal(2, *logits.shape), normal(3, *images.shape)
    grads, dimages = pvt_ref.backward(params, cache, u, CONFIG)
    assert isinstance(grads, ToyParams)
    up, down = (pvt_ref.forward(params, images + h * v, CONFIG) for h in (1e-6, -1e-6))
    np.testing.assert_allclose(((up - down) * u).sum() / 2e-6, (dimages * v).sum(), rtol=1e-7)


def test_its_pyramid_has_one_map():
    params, images = params_of(), normal(1, 2, 3, 8, 12)
    maps, cache = pvt_ref.forward_pyramid_with_cache(params, images, CONFIG)
    assert [x.shape for x in maps] == [(2, 6, 2, 3)]
    grads, _ = pvt_ref.backward_pyramid(params, cache, maps, CONFIG)
    assert not grads.head.weight.any()
    assert grads.embed.weight.any()
    with pytest.raises(ShapeError, match="dmaps must be a list of 1 arrays"):
        pvt_ref.backward_pyramid(params, cache, [*maps, None], CONFIG)


def test_params_of_one_network_do_not_go_with_the_config_of_another():
    pvt = dataclasses.replace(pvt_ref.VARIANTS["pvt_tiny"], img_size=32)
    with pytest.raises(ArrayTypeError, match="they belong to different networks"):
        pvt_ref.forward(params_of(), normal(1, 1, 3, 32, 32), pvt)


def test_an_operation_that_it_never_asks_for_is_refused():
    from pvt_ref.layers.gelu import gelu

    with pytest.raises(ConfigError, match="ops replaces gelu, which a toy never asks for"):
        pvt_ref.forward(
            params_of(), normal(1, 1, 3, 8, 8), CONFIG, ops=REFERENCE.replace(gelu, gelu)
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_file_of_it_is_read_as_it_was_saved(tmp_path, dtype):
    model = Model(params_of(dtype=dtype), CONFIG, info=INFO)
    pvt_ref.save(tmp_path / "toy.safetensors", model)
    again = pvt_ref.load(tmp_path / "toy.safetensors")
    assert again.config == CONFIG
    assert again.info == INFO
    for (key, a), (_, b) in zip(
        named_arrays(again.params), named_arrays(model.params), strict=True
    ):
        assert a.tobytes() == b.tobytes(), key


def test_a_file_of_a_network_that_is_not_entered_is_refused(tmp_path):
    pvt_ref.save(tmp_path / "toy.safetensors", Model(params_of(), CONFIG))
    from pvt_ref.models import architecture

    row = architecture._rows.pop(ToyConfig)
    try:
        with pytest.raises(CheckpointError, match="toy"):
            pvt_ref.load(tmp_path / "toy.safetensors")
    finally:
        architecture.register(row)


def test_a_state_dict_in_a_file_needs_its_configuration(tmp_path):
    import torch

    params = params_of(dtype=np.float32)
    state = {key: torch.tensor(x) for key, x in pvt_ref.to_state_dict(params).items()}
    torch.save(state, tmp_path / "toy.pth")
    model = pvt_ref.load(tmp_path / "toy.pth", CONFIG)
    for (key, a), (_, b) in zip(named_arrays(model.params), named_arrays(params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=key)
    wrong = dataclasses.replace(CONFIG, width=7)
    with pytest.raises(CheckpointError, match="mis-shaped"):
        pvt_ref.load(tmp_path / "toy.pth", wrong)


def test_a_model_of_it_predicts_pictures():
    model = Model(params_of(), CONFIG, info=INFO)
    pictures = [Image.new("RGB", (20, 30), color) for color in ("red", "blue")]
    answers = model.predict(pictures)
    assert [len(answer) for answer in answers] == [4, 4]
    assert {p.label for p in answers[0]} == set("abcd")
    logits = model(model.preprocess(pictures))
    assert int(logits[0].argmax()) == answers[0][0].index
    assert [x.shape for x in model.pyramid(model.preprocess(pictures))] == [(2, 6, 2, 2)]
    assert "toy, 4 classes" in repr(model)


def test_a_new_head_and_other_channels():
    model = Model(params_of(), CONFIG, info=INFO)
    larger = pvt_ref.with_new_head(model, 7, rng_of(0))
    assert larger(normal(1, 2, 3, 8, 8)).shape == (2, 7)
    np.testing.assert_array_equal(larger.params.embed.weight, model.params.embed.weight)


def test_its_bill_counts_what_it_multiplies():
    cost = pvt_ref.count_cost(CONFIG, batch=2)
    assert cost.parameters == 6 * 48 + 6 + 4 * 6 + 4
    assert cost.macs == 2 * (4 * 6 * 48 + 4 * 6)
    assert cost.peak_bytes > 0


def test_its_times_are_those_of_its_stages():
    times = time_stages(params_of(), normal(1, 2, 3, 8, 8), CONFIG, repeats=2)
    assert len(times) == 2
    assert all(t >= 0 for t in times)


def test_without_attention_there_are_no_attention_maps():
    assert pvt_ref.attention_maps(params_of(), normal(1, 2, 3, 8, 8), CONFIG, stages=[1]) == {}


def test_it_learns_stops_and_goes_on(tmp_path):
    rng = rng_of(0)
    labels = rng.integers(0, 4, 40)
    pixels = (60 * labels[:, None, None, None] + rng.integers(0, 40, (40, 3, 8, 8))).astype("uint8")
    data = LabelledImages(pixels, labels, Preprocessing())
    recipe = Recipe(
        **{"epochs": 12, "batch_size": 10, "lr": 0.1, "accumulate": 2, "warmup_epochs": 0},
        **{"crop_padding": 0, "flip": False},
    )
    run = fit(CONFIG, recipe, data, data, tmp_path / "run", info=INFO)
    assert run.finished
    assert run.state.best_accuracy > 0.9  # it is 1 from any first weights
    best = pvt_ref.load(tmp_path / "run" / "best.safetensors")
    assert best.config == CONFIG
    stopped = fit(CONFIG, recipe, data, data, tmp_path / "again", info=INFO, stop_at_step=17)
    assert not stopped.finished
    again = fit(CONFIG, recipe, data, data, tmp_path / "again", info=INFO, resume=True)
    assert again.finished
    for (key, a), (_, b) in zip(
        named_arrays(again.state.params), named_arrays(run.state.params), strict=True
    ):
        assert a.tobytes() == b.tobytes(), key


def test_the_command_line_takes_it(tmp_path, capsys):
    model = Model(params_of(dtype=np.float32), CONFIG, info=INFO)
    pvt_ref.save(tmp_path / "toy.safetensors", model)
    Image.new("RGB", (20, 30), "red").save(tmp_path / "red.png")
    weights = str(tmp_path / "toy.safetensors")
    assert main(["classify", str(tmp_path / "red.png"), "--weights", weights, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)[0]
    assert {p["label"] for p in answer["predictions"]} == set("abcd")
    assert main(["summary", "toy_small"]) == 0
    assert "322" in capsys.readouterr().out  # parameters
    assert main(["summary", weights]) == 0
    assert "a toy" in capsys.readouterr().out
    assert main(["convert", weights, str(tmp_path / "again.safetensors")]) == 0
    assert pvt_ref.load(tmp_path / "again.safetensors").config == CONFIG
