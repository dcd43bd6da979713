"""The laboratory of docs/losses.md, as it is written there, on a small system."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import jax
import optax
import pytest

from tests import runs
from ulsad_jax import inspect_losses
from ulsad_jax.methods.ulsad import losses
from ulsad_jax.methods.ulsad.networks import NETWORKS
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import data as data_lib
from ulsad_jax.runs import loss_inspection, setup, steps

STEP = 200


@pytest.fixture(scope="module")
def page():
    return (runs.REPOSITORY / "docs" / "losses.md").read_text()


@pytest.fixture(scope="module")
def mine(page, tmp_path_factory):
    """The folder with the page's files, which Python finds."""
    root = tmp_path_factory.mktemp("laboratory")
    for path, text in re.findall(r"```python\n# (\S+)\n(.*?)```", page, re.S):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(text)
    sys.path.insert(0, str(root / "mine"))
    yield root / "mine"
    sys.path.remove(str(root / "mine"))


@pytest.fixture(scope="module")
def fields(data):
    """What makes the page's config small: all training images in one batch."""
    config = runs.make_config(data)
    count = len(data_lib.open_data(config, "bottle").train)
    return runs.FIELDS | {
        "dataset.name": "mvtec_ad",
        "dataset.category": "bottle",
        "dataset.root": str(data),
        "dataset.cache_dir": config.dataset.cache_dir,
        "evaluation.original_resolution": False,
        "train.batch_size": count,
        "train.num_epochs": 1,
    }


@pytest.fixture(scope="module")
def config(mine, fields):
    config = importlib.import_module("my_config").get_config()
    config.update_from_flattened_dict(fields)
    return config


@pytest.fixture(scope="module")
def document(config):
    return loss_inspection.inspect(config, step=STEP)


def test_total_is_made_of_shares(document):
    terms = dict(document["terms"])
    total = terms.pop("total")
    assert terms.keys() == {
        *("local", "attention", "consistency"),
        *("charbonnier", "hardest", "small_code"),
    }
    assert sum(term["share"] for term in terms.values()) == pytest.approx(1)
    for term in terms.values():
        assert term["share"] * total["value"] == pytest.approx(
            term["weight"] * term["value"]
        )
        assert not term["findings"]
    assert document["error"] == document["warning"] == ""


def test_each_term_has_a_gradient_for_what_it_uses(document):
    used = {
        name: {n for n, norm in term["gradient_norm"].items() if norm}
        for name, term in document["terms"].items()
    }
    local, global_ = {"local"}, {"global"}
    assert used == {
        "local": local,
        "charbonnier": local,
        "hardest": local,
        "attention": global_,
        "small_code": global_,
        "consistency": local | global_,
        "total": local | global_,
    }


def test_gradient_norms_are_those_of_the_weighted_terms(config, document):
    """Of each term in a config of its own, differentiated through the networks."""
    config = config_lib.resolve(config)
    made = setup.make(config)
    x, image = loss_inspection._first_batch(config, made, "bottle")
    key = steps.initial_key(0, "bottle")
    state = steps.make_init(made.method, made.spec(len(image)))(key)

    @jax.jit
    def differentiate(variables, x, image, numbers):
        def loss(params):
            outputs, _ = made.method.networks.apply(
                variables | {"params": params},
                x,
                image,
                train=True,
                mutable=["batch_stats"],
            )
            loss_fn = losses.make_loss_fn(config.losses)
            return loss_fn(outputs, step=STEP, numbers=numbers)[0]

        gradient = jax.grad(loss)(variables["params"])
        return {name: optax.tree.norm(gradient[name]) for name in NETWORKS}

    for name, term in document["terms"].items():
        weights = {
            other: {"weight": entry["weight"] * (name in (other, "total"))}
            for other, entry in config.losses.items()
        }
        norms = differentiate(state.model, x, image, weights)
        expected = {network: float(norm) for network, norm in norms.items()}
        assert term["gradient_norm"] == pytest.approx(expected, rel=1e-3), name


def test_training_begins_with_the_values_that_were_shown(config, tmp_path):
    """All of its images are in one batch, so that both standardise alike."""
    shown = loss_inspection.inspect(config, step=0)["terms"]
    runs.train(config, tmp_path / "run")
    (epoch,) = runs.read_metrics(tmp_path / "run")
    for name, term in shown.items():
        assert epoch[f"loss/{name}"] == pytest.approx(term["value"], rel=1e-3), name
    assert shown["attention"]["findings"] == ["no gradient", "value 0"]
    assert epoch["validation/hardest"] > epoch["validation/local"]


def test_schedule(config, document):
    later = loss_inspection.inspect(config, step=999)["terms"]["attention"]
    assert document["terms"]["attention"]["value"] == pytest.approx(later["value"] / 2)


def infinite(outputs):
    return 1 / (0 * outputs["local"].mean((1, 2, 3)))


def root_of_nothing(outputs):
    return (0 * outputs["local"].mean((1, 2, 3))) ** 0.5


def run_command(monkeypatch, config, *, as_json):
    for flag, value in {"_CONFIG": config, "_STEP": 0, "_JSON": as_json}.items():
        monkeypatch.setattr(inspect_losses, flag, SimpleNamespace(value=value))
    inspect_losses.main(["program"])


@pytest.mark.parametrize(
    ("term", "finding", "message"),
    [
        ("infinite", "value not finite", r"finite value of loss term 'bad' on the fir"),
        ("root_of_nothing", "gradient not finite", r"finite gradient of .*'bad' on"),
    ],
)
def test_what_is_not_finite_is_shown_and_fails(
    config, monkeypatch, capsys, term, finding, message
):
    config = config.copy_and_resolve_references()
    config.losses.bad = {"term": f"{__name__}:{term}", "weight": 0.5}
    with pytest.raises(SystemExit, match=message):
        run_command(monkeypatch, config, as_json=True)
    document = json.loads(capsys.readouterr().out)  # strict JSON: no NaN
    assert document["terms"]["bad"]["findings"][0] == finding
    assert document["terms"]["bad"]["gradient_norm"]["local"] is None
    assert document["terms"]["local"]["findings"] == []
    finite = finding != "value not finite"
    assert (document["terms"]["local"]["share"] is not None) == finite
    assert "NaN" not in json.dumps(document)


def test_warning_is_below_the_table(config, monkeypatch, capsys):
    config = config.copy_and_resolve_references()
    config.losses.consistency.weight = 0.0
    run_command(monkeypatch, config, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("bottle, first batch of")
    assert lines[-1].startswith("No loss term trains the local network (predicted_glob")
    assert lines[-1].endswith(
        "(At step 0; a term with a schedule may train it later: see --step.)"
    )
    (line,) = [line for line in lines if line.startswith("consistency")]
    assert line.endswith("weight 0")


def test_command_of_the_page(page, mine, fields):
    """As it is written there, with flags that make it small."""
    (line,) = re.findall(r"python -m ulsad_jax\.inspect_losses .*", page)
    flags = {k: v for k, v in fields.items() if not isinstance(v, tuple)}
    done = subprocess.run(
        [
            sys.executable,
            *shlex.split(line.replace("mine/my_config.py", str(mine / "my_config.py")))[
                1:
            ],
            "--config.image_size=(64, 64)",
            *(f"--config.{field}={value}" for field, value in flags.items()),
        ],
        cwd=runs.REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(mine)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shown = re.search(r"\n```\n(panel.*?)\n```", page, re.S)[1].splitlines()
    printed = done.stdout.splitlines()
    assert printed[1].split() == shown[1].split()
    names = [line.split()[0] for line in shown[1:]]
    assert [line.split()[0] for line in printed[1:]] == names
