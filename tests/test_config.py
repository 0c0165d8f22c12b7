"""The configuration: what composes, and what is refused in one line."""

import copy
import math
import os
import pickle
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import flatten_dict
from omegaconf import OmegaConf
from poetry.core.masonry import api as poetry

from gwpf_baseline.config import (
    check_same_run,
    checked,
    compose_config,
    config_dir,
    from_run_config,
    network_config,
    resumed,
    training_config,
    workbench,
)
from gwpf_baseline.data.settings import read_settings
from gwpf_baseline.exchange.network import Network
from gwpf_baseline.methods import load_method
from gwpf_baseline.utils import ConfigError

PAPER = "method=gwpf_paper"


def test_every_choice_of_every_group_composes() -> None:
    """A file in ``conf`` that does not compose would be found by a user."""
    for file in config_dir().glob("*/*.yaml"):
        cfg = compose_config([f"{file.parent.name}={file.stem}"])
        if file.parent.name != "experiment":
            assert cfg[file.parent.name].name == file.stem
        load_method(dict(cfg.method))
        training_config(cfg)


def test_an_experiment_plays_the_system_that_it_is_named_after() -> None:
    """Unless another one is given."""
    for file in config_dir().glob("experiment/*.yaml"):
        cfg = compose_config([f"experiment={file.stem}"])
        assert file.stem.startswith(f"{cfg.method.name}_"), file.stem


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=nope", "method=nope: must be one of apf, apf_aggressive, cmfl, "),
        ("nokey=1", "nokey=1: must be one of the keys that --cfg job shows"),
        ("method.nokey=1", "method.nokey=1: must be one of the keys"),
        ("num_clients=0", "num_clients=0: must be a whole number >= 1"),
        ("num_clients=2.5", "num_clients=2.5: must be a whole number >= 1"),
        ("num_clients=100000", "num_clients=100000: must be a whole number from 1"),
        ("num_rounds=-1", "num_rounds=-1: must be a whole number >= 1"),
        ("fraction_fit=0", "fraction_fit=0: must be in (0, 1]"),
        ("fraction_fit=x", "fraction_fit=x: must be in (0, 1]"),
        ("lr=abc", "lr=abc: must be a number > 0"),
        ("lr=.nan", "lr=.nan: must be a number > 0"),
        ("lr=inf", "lr=inf: must be a number > 0"),
        ("lr_milestones=20", "lr_milestones=20: must be a list, as in"),
        ("lr_milestones=[0]", "lr_milestones=[0]: must be a list of rounds"),
        ("lr_milestones=[1.5]", "lr_milestones=[1.5]: must be a list of rounds"),
        ("lr_decay=0", "lr_decay=0: must be in (0, 1]"),
        ("lr_decay=2", "lr_decay=2: must be in (0, 1]"),
        ("lr_decay=null", "lr_decay=None: must be in (0, 1]"),
        (
            "quantization.bits=5",
            "quantization.bits=5: must be one of 32, 16, 8, 4, 3, 2",
        ),
        ("quantization.fp16=1", "quantization.fp16=1: must be true or false"),
        ("quantization=8", "quantization=8: must be given by bits, rounding, fp16"),
        ("server_optimizer=adam", "server_optimizer=adam: must be one of fedadagrad"),
        (
            "server_optimizer=fedadam server_optimizer.lr=0",
            "server_optimizer.lr=0: must be a number > 0",
        ),
        ("momentum=1", "momentum=1: must be in [0, 1)"),
        ("weight_decay=-1", "weight_decay=-1: must be a number >= 0"),
        ("local_steps=0", "local_steps=0: must be a whole number >= 1"),
        ("local_epochs=0", "local_epochs=0: must be a number > 0"),
        ("batch_size=0", "batch_size=0: must be a whole number >= 1"),
        ("optimizer=lion", "optimizer=lion: must be one of sgd, adam"),
        ("precision=fp8", "precision=fp8: must be one of fp32, tf32, bf16"),
        ("weighting=mass", "weighting=mass: must be one of uniform, examples"),
        ("seed=-1", "seed=-1: must be a whole number >= 0"),
        ("stop_at=0", "stop_at=0: must be an accuracy in (0, 1]"),
        ("stop_at=1.1", "stop_at=1.1: must be an accuracy in (0, 1]"),
        ("stop_at=nan", "stop_at=nan: must be an accuracy in (0, 1]"),
        ("stop_at=true", "stop_at=True: must be an accuracy in (0, 1]"),
        ("stop_at=soon", "stop_at=soon: must be an accuracy in (0, 1]"),
        (
            "dataset=wikitext-2 model=transformer stop_at=0.9",
            "stop_at=0.9: must be a perplexity >= 1",
        ),
        (
            "dataset=wikitext-2 model=transformer stop_at=inf",
            "stop_at=inf: must be a perplexity >= 1",
        ),
        ("verbose=3", "verbose=3: must be true or false"),
        ("round_timeout=0", "round_timeout=0: must be seconds > 0, or null"),
        ("client_resources.num_cpus=4096", "client_resources.num_cpus=4096: must be"),
        ("partition.alpha=-1", "partition.alpha=-1: must be a number > 0"),
        ("partition=nope", "partition=nope: must be one of dirichlet, disjoint, iid"),
        ("partition=natural_id", "partition=natural_id: must be another"),
        ("model=vgg11 dataset.image_size=8", "model=vgg11: must be one of the models"),
        ("dataset=mnist dataset.path=/no/where", "dataset.path=/no/where: must be"),
        ("method.thaw_budget=0", "method.thaw_budget=0: must be in (0, 1]"),
        ("method.step=0", "method.step=0: must be a number > 0"),
        (f"{PAPER} method.ema=1", "method.ema=1: must be in [0, 1)"),
        (f"{PAPER} method.thaw_quorum=-0.1", "method.thaw_quorum=-0.1: must be in"),
        (
            f"{PAPER} method.thaw_exchange=dice",
            "method.thaw_exchange=dice: must be one of same_round",
        ),
        (f"{PAPER} method.tighten=1", "method.tighten=1: must be true or false"),
        ("method.module=os", "method.module=os: must be one of apf, cmfl, fedavg, "),
        ("method=apf method.control=x", "method.control=x: must be one of aimd, add"),
        ("method=apf method.ema=1", "method.ema=1: must be in [0, 1)"),
        ("method=gaia method.threshold=0", "method.threshold=0: must be a number > 0"),
        ("method=cmfl method.threshold=2", "method.threshold=2: must be in [0, 1]"),
        ("grad_clip=0", "grad_clip=0: must be a number > 0"),
        ("network.uplink_mbps=3", "network.downlink_mbps=None: must be a number > 0"),
        ("network.downlink_mbps=9", "network.uplink_mbps=None: must be a number > 0"),
        (
            "network.uplink_mbps=3 network.downlink_mbps=fast",
            "network.downlink_mbps=fast: must be a number > 0",
        ),
        (
            "network.uplink_mbps=-3 network.downlink_mbps=9",
            "network.uplink_mbps=-3: must be a number > 0",
        ),
        (
            "network.uplink_mbps=3 network.downlink_mbps=9 network.server_gbps=null",
            "network.server_gbps=None: must be a number > 0",
        ),
        (
            "network=null",
            "network=None: must be given by uplink_mbps, downlink_mbps, s",
        ),
        ("network=3", "network=3: must be given by uplink_mbps, downlink_mbps, server"),
        (
            "+network.latency=1",
            "network.latency=1: must be one of uplink_mbps, downlink_mbps, server_gbps",
        ),
        ("+model.seed=1", "model.seed=1: must be left out for lenet5"),
        ("+model.num_classes=1", "model.num_classes=1: must be left out for lenet5"),
        ("+model.width=8", "model.width=8: must be left out for lenet5"),
        (
            "model=vgg11 model.width=0 dataset.image_size=32",
            "model.width=0: must be a whole number >= 1",
        ),
        (
            "model=vgg11 model.width=1.5 dataset.image_size=32",
            "model.width=1.5: must be a whole number >= 1",
        ),
        ("resume=/no/where", "resume=/no/where: must be the folder of a run"),
        ("resume=[]", "resume=[]: must be a folder, or null"),
        ("method=null", "method=null: must be one of apf, apf_aggressive, cmfl, "),
        ("method=[gwpf,apf]", "method.vote_fraction=0.04: must be one of control"),
        ("method=[]", "method=None: must be one of apf, apf_aggressive, cmfl, "),
        ("experiment=5", "experiment=5: must be one of apf_control, "),
        ("dataset=true", "dataset=true: must be one of "),
        ("~method", "method=None: must be one of apf, "),
        ("~seed", "seed=nothing: must be given"),
        ("~method.step", "method.step=nothing: must be given"),
        ("~partition.alpha", "partition.alpha=nothing: must be given"),
        ("+nokey=1", "nokey=1: must be one of num_clients, fraction_fit, "),
        ("+method@nokey=gwpf", "nokey={'name': 'gwpf', "),
        ("+partition.nokey=1", "partition.nokey=1: must be left out for dirichlet"),
        (
            "partition=iid partition.name=dirichlet",
            "partition.alpha=nothing: must be given",
        ),
        (
            "partition.name=nope",
            "partition=nope: must be one of dirichlet, disjoint, iid",
        ),
        ("partition.alpha=true", "partition.alpha=True: must be a number"),
        ("method.name='two words'", "overrides="),
        ("method.name=[]", "method.name=[]: must be a word"),
        ("connect_timeout=nan", "connect_timeout=nan: must be a number >= 0"),
        ("connect_timeout=inf", "connect_timeout=inf: must be at most 9223372036"),
        ("connect_timeout=1e12", "connect_timeout=1000000000000.0: must be at most"),
        ("round_timeout=nan", "round_timeout=nan: must be seconds > 0, or null"),
        ("round_timeout=inf", "round_timeout=inf: must be at most 9223372036"),
        ("client_resources.num_gpus=nan", "client_resources.num_gpus=nan: must be a n"),
        ("client_resources.num_gpus=inf", "client_resources.num_gpus=inf: must be "),
        ("client_resources=null", "client_resources=None: must be given by num_cpus"),
        ("client_threads=100000000000", "client_threads=100000000000: must be at most"),
        ("network.server_gbps=x", "network.server_gbps=x: must be a number > 0"),
        ("persist_optimizer=maybe", "persist_optimizer=maybe: must be true or false"),
        (
            "server_optimizer=fedadam server_optimizer.tau=1e300",
            "server_optimizer.tau=1e+300: must be a number below 2**63",
        ),
        ("stop_at=1" + "0" * 400, "stop_at=1000000000"),
        ("lr=" + "[" * 2000, "overrides="),
        ("dataset.augment=maybe", "dataset.augment=maybe: must be true or false"),
        ("dataset.label=true", "dataset.label=True: must be a name, or null"),
        ("dataset.cache_dir=[]", "dataset.cache_dir=[]: must be a folder, or null"),
        ("dataset.cache_dir=" + "x" * 300, "dataset.cache_dir=xxx"),
        (
            "dataset.test_fraction=0.99999",
            "dataset.test_fraction=0.99999: must be ",
        ),
        (
            "dataset.image_size=1000000",
            "dataset.image_size=1000000: must be a whole number from 1 to 1024, or nu",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(
    override: str, message: str
) -> None:
    """One line: the key, the value, and what would do."""
    with pytest.raises(ConfigError) as caught:
        cfg = checked(compose_config(override.split()))
        if cfg.resume:
            resumed(cfg, override.split())
        workbench(cfg)
    assert str(caught.value).startswith(message)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2000


def _dotted(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the keys of a configuration, those of groups before what is in them."""
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


_FOLDERS = {"dataset.path", "dataset.cache_dir", "resume"}
_TEXTS = {f"dataset.{key}" for key in ("hub", "image", "label", "natural_id")}
# What may stand where, of what otherwise stands nowhere.
_ALLOWED: dict[str, tuple[Any, set[str]]] = {
    "null": (
        None,
        {"stop_at", "norm_bound", "local_epochs", "grad_clip", "round_timeout"}
        | {"network.uplink_mbps", "network.downlink_mbps", "dataset.image_size"}
        | _FOLDERS
        | _TEXTS,
    ),
    "true": (
        True,
        {"persist_optimizer", "quantization.fp16", "verbose", "dataset.augment"}
        | {"method.tighten", "method.aggressive"},
    ),
    "empty list": ([], {"lr_milestones"}),
    "empty group": ({}, set()),
    "nan": (math.nan, set()),
    "inf": (math.inf, set()),
    "minus one": (-1, _FOLDERS),
    "no end": (10**400, set()),
    "word": ("x", {"method.name", "dataset.name"} | _TEXTS | _FOLDERS),
    "empty word": ("", set()),
}
_OTHERS = ["method=apf", "partition=pathological", "server_optimizer=fedadam"]
_CHOSEN = {choice.split("=")[0] for choice in _OTHERS}


@pytest.mark.parametrize("choices", [[], _OTHERS])
def test_no_value_is_taken_that_cannot_be_meant(choices: list[str]) -> None:
    """Nor is any key deleted or made up, and nothing ends but in a line."""
    composed: Any = OmegaConf.to_container(compose_config(choices))
    keys = list(_dotted(composed))
    assert {"method", "method.name", "client_resources.num_gpus"} <= set(keys)
    if choices:  # what the defaults do not have
        keys = [key for key in keys if key.split(".")[0] in _CHOSEN]
    for key in keys:
        group, _, leaf = key.rpartition(".")
        for what in (*_ALLOWED, "deleted", "made up"):
            changed = copy.deepcopy(composed)
            inner = changed
            for name in filter(None, group.split(".")):
                inner = inner[name]
            if what == "deleted":
                del inner[leaf]
            elif what == "made up":
                inner[f"{leaf}_x"] = 1
            else:
                inner[leaf] = _ALLOWED[what][0]
            try:
                cfg = checked(OmegaConf.create(changed))
                read_settings(cfg.dataset)
                if group == "partition":
                    workbench(cfg)
            except ConfigError as error:
                assert str(error).isprintable(), (key, what)
            else:
                assert key in _ALLOWED.get(what, (None, set()))[1], (key, what)


def test_network_is_checked_before_anything_is_built() -> None:
    """None without any bandwidth, else what was set, on the server's own link."""
    assert network_config(checked(compose_config([]))) is None
    assert network_config(checked(compose_config(["network.server_gbps=1"]))) is None
    links = ["network.uplink_mbps=3", "network.downlink_mbps=9"]
    assert network_config(checked(compose_config(links))) == Network(3, 9, 10.0)
    for half in links:
        with pytest.raises(ConfigError, match="^network"):
            checked(compose_config([half]))


def test_an_installed_wheel_finds_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder ``conf`` travels in the wheel, inside the package."""
    monkeypatch.chdir(config_dir().parent)
    with zipfile.ZipFile(tmp_path / poetry.build_wheel(str(tmp_path))) as wheel:
        wheel.extractall(tmp_path / "site")
    printed = subprocess.run(
        [sys.executable, "-m", "gwpf_baseline.main", "--info", "config"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert str(tmp_path / "site" / "gwpf_baseline" / "conf") in printed
    assert "thaw_budget: 0.04" in printed


def test_paths_are_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker process may stand in another folder."""
    monkeypatch.chdir(tmp_path)
    cfg = checked(compose_config(["dataset=mnist", "dataset.path=here"]))
    assert cfg.dataset.path == str(tmp_path / "here")


def test_run_config_reaches_the_same_configuration() -> None:
    """What ``flwr run --run-config`` says is what the command line says."""
    run_config = {
        "method": "fedavg",
        "num_rounds": 3,
        "lr": 0.1,
        "persist_optimizer": True,
        "dataset": "",
        "overrides": "partition.alpha=0.5 client_threads=2",
    }
    overrides = [
        "method=fedavg",
        "num_rounds=3",
        "lr=0.1",
        "persist_optimizer=true",
        "partition.alpha=0.5",
        "client_threads=2",
    ]
    assert from_run_config(run_config) == checked(compose_config(overrides))


@pytest.mark.parametrize("key", ["dataset.path", "dataset.cache_dir", "resume"])
def test_a_run_configs_paths_hold_what_they_like(key: str) -> None:
    """Hydra would read some of it as a list, an interpolation or a key."""
    folder = "/data (1)/a,b=[c]/it's"
    cfg = from_run_config({"dataset": "mnist", key: folder})
    assert OmegaConf.select(cfg, key) == folder


@pytest.mark.parametrize(
    ("run_config", "message"),
    [
        ({"method": 5}, "method=5: must be one of apf, "),
        ({"method": "null"}, "method=null: must be one of apf, "),
        ({"seed": math.nan}, "seed=nan: must be a whole number >= 0"),
        ({"seed": True}, "seed=True: must be a number"),
        ({"lr": "fast and\nloose\x1b[2J"}, "overrides="),
        ({"overrides": "~seed"}, "seed=nothing: must be given"),
        ({"overrides": "+nokey=1"}, "nokey=1: must be one of num_clients, "),
        ({"overrides": "round_timeout=inf"}, "round_timeout=inf: must be at most"),
    ],
)
def test_run_config_is_checked_as_the_command_line_is(
    run_config: dict[str, Any], message: str
) -> None:
    """One line, too."""
    with pytest.raises(ConfigError) as caught:
        from_run_config(run_config)
    assert str(caught.value).startswith(message)
    assert str(caught.value).isprintable()


def test_flowers_run_configuration_has_the_keys_of_ours() -> None:
    """In their order and left as they are; ``overrides`` takes what it cannot hold."""
    pyproject = (config_dir().parent / "pyproject.toml").read_text(encoding="utf-8")
    keys = tomllib.loads(pyproject)["tool"]["flwr"]["app"]["config"]
    assert keys.pop("overrides") == ""
    # Flower's own form of what it hands on, with points between a group and its keys.
    flat = flatten_dict(keys)
    # Real nodes may not answer.
    assert flat.pop("round_timeout") == 600 and set(flat.values()) == {""}
    ours = OmegaConf.load(config_dir() / "config.yaml")
    groups = [key for entry in ours.defaults if entry != "_self_" for key in entry]
    # What a simulation alone has use for.
    others = ["ray", "client_resources", "hydra", "defaults", "backend"]
    assert [*groups, *(key for key in ours if key not in others)] == list(keys)
    assert set(others) < set(ours)
    for group in ("quantization", "network"):
        assert list(OmegaConf.select(ours, group)) == list(keys[group])
    network = {"network.uplink_mbps": 3, "network.downlink_mbps": 9}
    cfg = from_run_config({**flat, **network, "quantization.bits": 8})
    assert (cfg.network.uplink_mbps, cfg.quantization.bits) == (3, 8)


def test_a_run_that_goes_on_by_run_config_is_configured_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clients know nothing else; a path may begin at the user's home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "it's a \\ run"
    folder.mkdir()
    first = from_run_config({"method": "apf", "num_rounds": 5, "lr": 0.1})
    OmegaConf.save(first, folder / "config.yaml")
    again = {"method": "apf", "num_rounds": 9, "lr": 0.1, "stop_at": 0.9}
    resume = {"resume": "~/it's a \\ run"}
    cfg = from_run_config({**again, **resume})
    assert cfg.resume == str(folder)
    check_same_run(cfg)
    with pytest.raises(ConfigError, match="^lr=0.05: must be 0.1, as in the run to"):
        check_same_run(from_run_config({"method": "apf", **resume}))
    with pytest.raises(ConfigError, match="^method.aggressive=None: must be False"):
        check_same_run(from_run_config({"lr": 0.1, **resume}))
    with pytest.raises(ConfigError, match="must be the folder of a run"):
        check_same_run(from_run_config({"resume": "~"}))


@pytest.mark.parametrize(
    ("overrides", "target"),
    [
        ([], None),
        (["stop_at=0.95"], 0.95),
        (["stop_at=1"], 1),
        (["stop_at=120.5", "dataset=wikitext-2", "model=transformer"], 120.5),
    ],
)
def test_a_run_can_be_told_where_to_stop(
    overrides: list[str], target: float | None
) -> None:
    """At an accuracy or a perplexity, as the data is measured by; else at its end."""
    assert checked(compose_config(overrides)).stop_at == target


def test_resume_takes_the_saved_configuration(tmp_path: Path) -> None:
    """Only what does not change the history may be changed."""
    first = ["lr=0.1", "method.thaw_budget=0.3", "num_rounds=5"]
    saved = checked(compose_config(first))
    OmegaConf.save(saved, tmp_path / "config.yaml")

    overrides = [f"resume={tmp_path}", "num_rounds=9", "stop_at=0.9", "lr=0.1"]
    cfg = resumed(checked(compose_config(overrides)), overrides)
    changed = {"num_rounds": 9, "stop_at": 0.9, "resume": str(tmp_path)}
    assert cfg == OmegaConf.merge(saved, changed)

    overrides = [f"resume={tmp_path}", "lr=0.2"]
    with pytest.raises(ConfigError, match="lr=0.2: must be 0.1, as in the run"):
        resumed(checked(compose_config(overrides)), overrides)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (
            "a: [",
            "must be a run's folder, whose config.yaml can be read (while parsing",
        ),
        ("a: " + "[" * 5000, "must be a run's folder, whose config.yaml can be read"),
        ("a: &a [*a]", "must be a run's folder, whose config.yaml can be read"),
        (
            "a: &a [1, 1]\n" + "".join(f"b{i}: &a [*a, *a]\n" for i in range(64)),
            "whose config.yaml can be read (it has the alias *a, which no run writes)",
        ),
        ("- a", "must be a run's folder, whose config.yaml has keys"),
        (
            "seed: 1",
            "whose config.yaml can be used (num_clients=nothing: must be given",
        ),
    ],
)
def test_a_saved_configuration_that_cannot_be_used(
    tmp_path: Path, saved: str, message: str
) -> None:
    """It is no more trusted than the command line."""
    (tmp_path / "config.yaml").write_text(saved)
    overrides = [f"resume={tmp_path}"]
    with pytest.raises(ConfigError) as caught:
        resumed(checked(compose_config(overrides)), overrides)
    assert str(caught.value).startswith(f"resume={tmp_path}: ")
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_threads_that_start_at_once_draw_the_same_initial_weights() -> None:
    """PyTorch's generator is global; nodes of one process must not share a draw."""
    cfg = checked(compose_config(["seed=11"]))
    with ThreadPoolExecutor(8) as pool:
        benches = list(pool.map(workbench, [cfg] * 8))
    assert all(bench is benches[0] for bench in benches)


def test_a_number_that_python_does_not_write_is_named_all_the_same() -> None:
    """Of more than 4300 digits: from a file it can be given in hexadecimal ones."""
    error = ConfigError("seed", 16**5000, "a whole number >= 0")
    assert str(error).startswith("seed=a number too long to show: must be")


def test_an_error_comes_whole_from_another_process() -> None:
    """As from a worker, by pickle; whatever its value is."""
    error = ConfigError("lr", lambda: None, "a number > 0")
    copied = pickle.loads(pickle.dumps(error))
    assert (type(copied), str(copied)) == (ConfigError, str(error))
    assert str(copied).endswith(": must be a number > 0")
