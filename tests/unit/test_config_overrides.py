"""The type of a key determines how the value of an override is parsed; no value is silently changed."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from acpo_dist.config.load import load_config
from acpo_dist.core.errors import LONGEST, AcpoError, ConfigError

ODD = [
    "no", "on", "1e3", "007", ": ", "a: b", "#", "photo #1, x", "'single'", '"double"', "{a: b}", "[1, 2]", "~", "- a",
    "!!python/object:os.system", "&a *a", "1:30", "0x10", "1_000", ".5", "1.", "-0", "+3", "nan", ".inf", "null",
    "true", "2001-01-01", "%", "@", "`", "?", "|", ">", "\\", "  spaces  ", "a\nb", "\t", "é", "\u2028", "=", "a=b",
]  # fmt: skip


def value_at(config, key):
    found = config.to_mapping()
    for part in key.split("."):
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("key", ["run.name", "tracking.experiment", "data.prompt_column"])
def test_a_text_key_takes_its_text_literally(key, text):
    assert value_at(load_config("toy_sdxl", [f"{key}={text}"]), key) == text


@pytest.mark.parametrize("text", [text for text in ODD if text != "null"])
def test_a_text_key_that_may_be_null_takes_every_other_text_literally(text):
    assert load_config("toy_sdxl", [f"model.negative_prompt={text}"]).model.negative_prompt == text


@pytest.mark.parametrize("text", ["runs/my run #1", "runs/007", "runs/{a}", "1e3", "no"])
def test_a_path_key_takes_its_text_literally(text):
    assert load_config("toy_sdxl", [f"run.dir={text}"]).run.dir == Path(text)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.negative_prompt=null", None),
        ("run.dir=", None),
        ("run.iterations=1e3", 1000),
        ("run.iterations=007", 7),
        ("learner.learning_rate=1e-4", 1e-4),
        ("learner.zero_stage=null", None),
        ("learner.betas=[0.8, 0.9]", [0.8, 0.9]),
        ("tracking.mlflow=off", False),
        ("guard.drift=null", None),
        ("guard.drift={warn: 1, stop: 2}", {"warn": 1.0, "stop": 2.0}),
        ("algorithm.anchor.weight=auto", "auto"),
        ("algorithm.anchor.weight=3", 3.0),
        ("rewards.train.0.weight=2", 2.0),
        ("rewards.train.0.hinge=1.5", 1.5),
        ("rewards.pool.two_stream.runtime_env.env_vars.A=1 #2", "1 #2"),
        ("model.tuning.targets=[to_q, 'a#b']", ["to_q", "a#b"]),
    ],
)
def test_numbers_switches_lists_and_mappings_are_read_as_yaml(override, value):
    assert value_at(load_config("toy_sdxl", [override]), override.partition("=")[0]) == value


@pytest.mark.parametrize(
    "override",
    ["run.iterations=3 #x", "run.iterations=1:30", "rewards.judges=[] #x", "learner.betas=[0.9", "run.seed=on"],
)
def test_a_value_that_yaml_would_cut_or_change_is_refused_with_its_key(override):
    with pytest.raises(ConfigError) as caught:
        load_config("toy_sdxl", [override])
    assert override.partition("=")[0] in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        f"run.iterations={'9' * 5000}", f"{'x' * 5000}=1", f"run.{'y' * 5000}=1", f"model.type={'z' * 5000}",
        f"rewards.train={'[' * 5000}", f"{'.'.join('a' * 5000)}=1", f"sampler.solver={'q' * 5000}", f"w{'w' * 5000}",
        f"rewards.train=[{'{type: x}, ' * 500}]", f"rewards.train.0.hinge={'h' * 5000}", "run.seed=" + "\n" * 700 + "x",
    ],
)  # fmt: skip
def test_the_message_is_short_for_any_input(override):
    with pytest.raises(AcpoError) as caught:
        load_config("toy_sdxl", [override])
    assert len(str(caught.value)) <= LONGEST


def leaves(section, prefix=""):
    """Dotted keys of all sections with the annotations of their fields."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if hasattr(type(value), "model_fields"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.annotation


def test_random_overrides_end_in_their_value_or_in_one_short_message():
    draw = random.Random(20)
    keys = list(leaves(load_config("toy_sdxl")))
    accepted = 0
    for _ in range(700):
        key, annotation = draw.choice(keys)
        text = draw.choice([*ODD, "3", "0.5", "".join(draw.choices("01ae.#:,-{}[]'\" \t_!&*%", k=draw.randint(0, 12)))])
        try:
            config = load_config("toy_sdxl", [f"{key}={text}"])
        except AcpoError as error:
            assert len(str(error)) <= LONGEST, (key, text)
            continue
        accepted += 1
        # pydantic itself reads numbers from text; a text that it takes for something else must not differ.
        try:
            plain = TypeAdapter(annotation).validate_python(text)
        except ValidationError:
            continue
        found = value_at(config, key)
        if isinstance(plain, str | Path) and not isinstance(found, str):
            assert found is None or isinstance(found, int | float), (key, text, found)
        elif isinstance(plain, int | float | str | Path):
            assert found == (str(plain) if isinstance(plain, Path) else plain), (key, text, found)
    assert accepted > 100


def test_a_configuration_is_checked_without_importing_torch_or_model_libraries():
    code = (
        "import sys\nfrom acpo_dist.config.load import load_config, shipped_configs\n"
        "from acpo_dist.core.errors import ConfigError\n"
        "for overrides in ([], ['model.tunning.rank=3']):\n"
        "    refused = 0\n"
        "    for name in shipped_configs():\n"
        "        try:\n            load_config(name, overrides)\n"
        "        except ConfigError:\n            refused += 1\n"
        "    heavy = {'torch', 'diffusers', 'transformers', 'bitsandbytes', 'peft', 'ray'} & set(sys.modules)\n"
        "    print(refused, len(shipped_configs()), *heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    valid, misspelt = (line.split() for line in done.stdout.splitlines())
    assert valid == ["0", misspelt[1]] and misspelt == [misspelt[1]] * 2, "refused, known, heavy libraries"
