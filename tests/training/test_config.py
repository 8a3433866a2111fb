"""Settings: files, --set, presets, and combinations that make no sense."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric", reason="the trainer needs vaekernels[train]")

import torch
from hypothesis import given
from hypothesis import strategies as st

from vaekernels.training.config import (
    Config,
    DataConfig,
    ObjectiveConfig,
    combinations,
    differences,
    presets,
    settings,
)
from vaekernels.training.data import Arrays, Data, Text
from vaekernels.training.errors import ConfigError

BASE = Config(DataConfig("digits"))


def config(given: str) -> Config:
    """``objective.beta=2 model.kind=conv`` and so on, as on the command line."""
    return settings.changed(BASE, settings.parse_set(given.split()))


# --- files and --set


def test_config_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    for made in (
        BASE,
        config("objective.free_bits=0.25 engine.threads=2 model.kind=conv"),
        *presets.PRESETS.values(),
    ):
        path.write_text(settings.to_toml(made), encoding="utf-8")
        assert settings.load(path) == made == settings.from_toml(settings.to_toml(made))


@given(st.text(), st.floats(1e-300, 1e300), st.integers(0, 2**32 - 1))
def test_odd_names_and_numbers_survive_their_file(name: str, lr: float, seed: int) -> None:
    made = settings.changed(BASE, {"data": {"name": name}, "optim": {"lr": lr}, "engine": {"seed": seed}})
    assert settings.from_toml(settings.to_toml(made)) == made


def test_every_setting_that_may_be_none_is_none_by_default() -> None:
    """TOML has no none: a setting left out of the file is at its default."""
    for table in fields(Config):
        assert is_dataclass(table.default) or table.name == "data"
        kind = type(getattr(BASE, table.name))
        for setting in fields(kind):
            if "None" in str(setting.type):
                assert setting.default is None, f"{table.name}.{setting.name}"


def test_set_reads_numbers_words_and_none() -> None:
    given = [
        "objective.beta=2",
        "optim.lr = 1e-4",
        "objective.clamp=sample",
        "data.name=idx:a=b",
        "model.delta=none",
    ]
    assert settings.parse_set([*given, "engine.tensorboard=false"]) == {
        "objective": {"beta": 2, "clamp": "sample"},
        "optim": {"lr": 1e-4},
        "data": {"name": "idx:a=b"},
        "model": {"delta": None},
        "engine": {"tensorboard": False},
    }
    with_floor = config("objective.free_bits=0.5")
    assert settings.changed(with_floor, settings.parse_set(["objective.free_bits=none"])) == BASE


@pytest.mark.parametrize("option", ["beta=2", "objective.beta", "=2", "objective.=2", ""])
def test_a_set_without_table_key_or_value_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=r"--set takes TABLE.KEY=VALUE, such as objective.beta=2; got"):
        settings.parse_set([option])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objective.beta = -1", "beta must be at least 0, got -1"),
        ("objective.beta = nan", "beta must be finite, got nan"),
        ('objective.clamp = "row"', "clamp must be one of batch, sample; got 'row'"),
        ('objective.free_bits = "much"', "free_bits must be of type float, got 'much'"),
        ("objective.free_bit = 1", "unknown setting objective.free_bit; did you mean objective.free_bits?"),
        ("objective.zzzzzz = 1", "unknown setting objective.zzzzzz; known: beta, anneal, anneal_epochs"),
        ("objectives.beta = 1", "unknown setting objectives; did you mean objective?"),
        ("optim.lr = 0", "lr must be greater than 0, got 0"),
        ("optim.epochs = true", "epochs must be of type int, got True"),
        ("engine.seed = 4294967296", "seed must be at most 4294967295"),
        ("model.word_dropout = 1.5", "word_dropout must be at most 1, got 1.5"),
        ('engine.device = "tpu"', "device must be one of auto, cpu, cuda, mps; got 'tpu'"),
        ("model = []", "model must be a table of settings, got []"),
        ("objective.beta = ", "is not a TOML file"),
        ("objective.beta = 1\nobjective.beta = 2", "is not a TOML file"),
    ],
)
def test_bad_settings_in_a_file_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'data.name = "digits"\n{text}\n')
    with pytest.raises(ConfigError) as raised:
        settings.load(path)
    assert str(path) in str(raised.value) and message in str(raised.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optim": {"epochs": "3"}}, "epochs must be of type int, got '3'"),
        ({"optim": {"epochs": 3.0}}, "epochs must be of type int, got 3.0"),
        ({"optim": {"lr": "0.1"}}, "lr must be of type float, got '0.1'"),
        ({"optim": {"lr": True}}, "lr must be of type float, got True"),
        ({"optim": {"lr": None}}, "lr must be of type float, got None"),
        ({"objective": {"free_bits": False}}, "free_bits must be of type float, got False"),
        ({"engine": {"tensorboard": 1}}, "tensorboard must be of type bool, got 1"),
        ({"engine": {"tensorboard": "no"}}, "tensorboard must be of type bool, got 'no'"),
        ({"data": {"name": 3}}, "name must be of type str, got 3"),
        ({"data": {"name": "caf\udce9"}}, "name must be UTF-8, got 'caf\\udce9'"),
        ({"data": {"name": None}}, "name must be of type str, got None"),
    ],
)
def test_nothing_is_converted_but_whole_numbers_to_real_ones(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        settings.changed(BASE, given)
    assert str(raised.value) == message
    beta = settings.changed(BASE, {"objective": {"beta": 2}}).objective.beta
    assert (beta, type(beta)) == (2.0, float)


def test_all_that_is_wrong_is_said_in_one_line() -> None:
    with pytest.raises(ConfigError) as raised:
        settings.from_toml("data.nmae = 'digits'\noptim.lr = 0\nself = 1")
    assert str(raised.value) == (
        "data lacks a setting: 'name' must be given; unknown setting data.nmae; did you mean data.name?; "
        "lr must be greater than 0, got 0; "
        "unknown setting self; known: data, model, objective, strategy, optim, engine"
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file or directory"):
        settings.load(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not a TOML file: 'utf-8' codec"):
        settings.load(tmp_path / "bytes.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(ConfigError, match=r"the config lacks a setting: .*'data'"):
        settings.load(tmp_path / "empty.toml")


def test_differences_are_named_by_table() -> None:
    assert differences(BASE, config("objective.beta=2 engine.seed=5")) == {
        "objective.beta": (1.0, 2.0),
        "engine.seed": (0, 5),
    }


# --- presets


def test_presets_and_own_data() -> None:
    assert presets.find("digits").data.binarize == "sample"
    assert presets.find("idx:some/file") == Config(DataConfig("idx:some/file"))
    for preset in presets.PRESETS.values():
        combinations.check(preset)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'docstring'; did you mean docstrings"):
        presets.find("docstring")
    with pytest.raises(
        ConfigError, match=r"unknown preset 'mnist'; known: docstrings, .*your own data: idx:PATH"
    ):
        presets.find("mnist")


# --- combinations


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "objective.pi_target=4 objective.capacity=25",
            "objective.capacity and objective.pi_target each set the weight",
        ),
        ("objective.pi_target=4 objective.beta=2", "objective.beta has no meaning with objective.pi_target"),
        (
            "objective.geco_target=4 objective.anneal=linear",
            "objective.anneal has no meaning with objective.geco_target",
        ),
        (
            "objective.capacity=4 objective.free_bits=1",
            "objective.free_bits has no meaning with objective.capacity",
        ),
        ("objective.capacity=4 objective.kl=mean", "objective.kl has no meaning with objective.capacity"),
        ("objective.anneal_epochs=4", "objective.anneal_epochs has no effect without objective.anneal"),
        ("objective.cycles=2", "objective.cycles is for objective.anneal 'cyclical', which is 'none'"),
        (
            "objective.anneal=linear objective.logistic_rate=1",
            "logistic_rate is for objective.anneal 'logistic', which is 'linear'",
        ),
        ("objective.penalty=hinge", "objective.penalty has no effect without objective.free_bits"),
        (
            "objective.clamp=sample",
            "objective.clamp has no effect without objective.free_bits or objective.capacity",
        ),
        ("objective.group=all", "objective.group has no effect without objective.free_bits"),
        (
            "objective.free_bits_decay_epochs=3",
            "objective.free_bits_decay_epochs has no effect without objective.free_bits",
        ),
        (
            "objective.free_bits=1 objective.group=channel",
            "objective.group 'channel' is for latents with positions: set model.latent_channels",
        ),
        ("objective.capacity_gamma=3", "objective.capacity_gamma has no effect without objective.capacity"),
        ("objective.pi_kp=3", "objective.pi_kp has no effect without objective.pi_target"),
        ("objective.geco_speed=3", "objective.geco_speed has no effect without objective.geco_target"),
        ("objective.kl_balance=0.8", "objective.kl_balance is for model.kind 'ladder', which is 'auto'"),
        (
            "objective.layer_balance=true model.kind=ladder",
            "objective.layer_balance has no effect without objective.anneal",
        ),
        (
            "objective.tc_beta=6 model.kind=ladder",
            "objective.tc_beta does not go with model.kind 'ladder': the",
        ),
        (
            "objective.mi_weight=0 objective.pi_target=2",
            "objective.mi_weight has no meaning with objective.pi",
        ),
        ("objective.tc_beta=6 optim.batch_size=1", "optim.batch_size must be at least 2, got 1"),
        ("model.top_dim=3", "model.top_dim is for model.kind 'ladder', which is 'auto'"),
        (
            "model.latent_channels=3 model.kind=mlp",
            "model.latent_channels is for model.kind 'conv', which is 'mlp'",
        ),
        ("model.batch_norm=0.7 model.kind=ladder", "model.batch_norm does not go with model.kind 'ladder'"),
        ("model.delta=0.1 model.kind=linear", "model.delta does not go with model.kind 'linear'"),
        (
            "strategy.aggressive=true strategy.pretrain_epochs=1",
            "strategy.aggressive and strategy.pretrain_epochs are two strategies",
        ),
        ("strategy.inner_steps=7", "strategy.inner_steps has no effect without strategy.aggressive"),
        ("strategy.pretrain_epochs=8", "strategy.pretrain_epochs 8 leaves nothing of optim.epochs 8"),
        ("engine.devices=4 optim.batch_size=3", "optim.batch_size 3 is spread over engine.devices 4"),
        (
            "engine.devices=2 engine.device=cpu model.batch_norm=0.7",
            "model.batch_norm over several engine.devices needs GPUs",
        ),
    ],
)
def test_settings_that_make_no_sense_together_are_both_named(given: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        combinations.check(config(given))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "given",
    [
        "objective.capacity=25 objective.clamp=sample objective.capacity_gamma=3",
        "objective.pi_target=4 objective.pi_ki=0.01 model.delta=0.1",
        "objective.free_bits=1 objective.clamp=sample objective.penalty=mask objective.group=all",
        "objective.anneal=cyclical objective.cycles=2 objective.beta=3 objective.free_bits=1",
        "model.kind=ladder objective.kl_balance=0.8 objective.free_bits=1 model.top_dim=2",
        "strategy.pretrain_epochs=3 objective.anneal=linear objective.free_bits=1",
        "strategy.aggressive=true strategy.inner_steps=7 model.batch_norm=0.7",
    ],
)
def test_settings_that_go_together(given: str) -> None:
    combinations.check(config(given))


def arrays(shape: tuple[int, ...], levels: int | None) -> Arrays:
    x = torch.zeros(8, *shape, dtype=torch.float32 if levels is None else torch.uint8)
    return Arrays("arrays", x, x, "", levels=levels)


TEXT = Text("text", torch.zeros(8, 3, dtype=torch.int64), torch.zeros(8, 3, dtype=torch.int64), "", ("a",))


@pytest.mark.parametrize(
    ("data", "kind", "likelihood"),
    [
        (TEXT, "gru", "categorical"),
        (arrays((1, 8, 8), 2), "mlp", "bernoulli"),
        (arrays((1, 8, 8), 256), "mlp", "discretized-logistic"),
        (arrays((9,), None), "mlp", "gaussian"),
    ],
)
def test_auto_is_decided_by_the_data(data: Data, kind: str, likelihood: str) -> None:
    resolved = combinations.resolve(BASE, data)
    assert (resolved.model.kind, resolved.model.likelihood) == (kind, likelihood)
    assert combinations.resolve(resolved, data) == resolved


@pytest.mark.parametrize(
    ("data", "given", "message"),
    [
        (TEXT, "model.kind=conv", "model.kind 'conv' is for images and vectors, data 'text' is text"),
        (TEXT, "model.likelihood=gaussian", "model.likelihood 'gaussian' is not for text"),
        (
            arrays((1, 8, 8), 2),
            "model.kind=lstm",
            "model.kind 'lstm' is for text, data 'arrays' is 8x8 images",
        ),
        (
            arrays((9,), 2),
            "model.kind=conv",
            "model.kind 'conv' is for images, data 'arrays' is vectors of 9",
        ),
        (arrays((9,), 2), "model.kind=row-gru", "model.kind 'row-gru' is for images"),
        (arrays((1, 3, 9), 2), "model.kind=conv", "model.kind 'conv' needs images of 4x4 and more"),
        (arrays((9,), 2), "model.word_dropout=0.5", "model.word_dropout is for text, data 'arrays'"),
        (
            arrays((9,), 2),
            "model.kind=linear model.likelihood=bernoulli",
            "model.kind 'linear' needs model.likelihood 'gaussian'",
        ),
        (
            arrays((9,), None),
            "model.likelihood=categorical",
            "model.likelihood 'categorical' is for whole numbers",
        ),
        (
            arrays((9,), 7),
            "model.likelihood=bernoulli",
            "model.likelihood 'bernoulli' is for data of two values, data 'arrays' has 7: set data.binarize",
        ),
        (
            arrays((9,), 2),
            "model.sigma=0.5",
            "model.sigma is of the gaussian likelihood, model.likelihood is 'bernoulli'",
        ),
    ],
)
def test_models_that_do_not_fit_the_data(data: Data, given: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        combinations.resolve(config(given), data)
    assert message in str(raised.value)


@pytest.mark.parametrize(("examples", "batch_size", "taken"), [(54, 1, 3), (55, 2, 3), (41, 2, 3)])
def test_batch_norm_refuses_batches_of_one_example(examples: int, batch_size: int, taken: int) -> None:
    x = torch.zeros(examples, 6, dtype=torch.uint8)
    data = Arrays("x", x, x[:4], "", levels=2)
    given = f"model.batch_norm=0.7 optim.batch_size={batch_size}"
    with pytest.raises(
        ConfigError, match=f"optim.batch_size {batch_size} .* batches of one; set .* to {taken}"
    ):
        combinations.resolve(config(given), data)
    combinations.resolve(config(f"model.batch_norm=0.7 optim.batch_size={taken}"), data)
    combinations.resolve(config(f"optim.batch_size={batch_size}"), data)
    images = Arrays("x", torch.zeros(examples, 1, 8, 8), torch.zeros(4, 1, 8, 8), "", levels=None)
    combinations.resolve(config(f"model.kind=conv model.latent_channels=2 {given}"), images)


def test_grey_values_are_no_bernoulli_data() -> None:
    binary = arrays((4,), None)
    wanted = config("model.likelihood=bernoulli")
    assert combinations.resolve(wanted, binary).model.likelihood == "bernoulli"
    binary.train[5, 2] = 0.5
    with pytest.raises(ConfigError, match=r"is for zeros and ones, .* \(first in training example 5\)"):
        combinations.resolve(wanted, binary)


def test_a_setting_is_checked_when_it_is_made() -> None:
    with pytest.raises(ConfigError, match="cycle_ramp must be greater than 0"):
        ObjectiveConfig(cycle_ramp=0)
    with pytest.raises(ConfigError, match="sigma must be greater than 0"):
        config("model.sigma=0")
    with pytest.raises(ConfigError, match="geco_target must be finite"):
        ObjectiveConfig(geco_target=math.inf)
    with pytest.raises(ConfigError, match=r"^name must be of type str, got 3$"):
        DataConfig(3)  # type: ignore[arg-type]
