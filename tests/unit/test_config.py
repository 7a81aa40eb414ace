"""A configuration is read completely, or rejected with the key, the value and the known keys."""

from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from acpo_dist.config.load import dump, find_config, load_config, shipped_configs, validate, writer_of
from tests.helpers.config import PLUGINS, SMALLEST, refusal, write

HERE = Path(__file__).resolve().parent
SHIPPED = sorted((HERE.parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED or [None], ids=lambda path: path.stem if path else "none-found")
def test_every_shipped_configuration_loads(path):
    assert path is not None, "no file in configs/"
    config = load_config(path)
    assert validate(yaml.safe_load(dump(config)), "its own dump") == config


# Defaults, files and overrides


def test_the_smallest_file_gets_the_defaults_of_every_section(smallest):
    config = load_config(smallest)
    assert config.learner.learning_rate == 3e-4
    assert config.rewards.train[0].weight == 1.0
    assert config.model.adapter.rank == 8
    assert config.run_dir == Path("runs/run-0")


def test_an_override_wins_over_the_file_and_the_last_one_over_the_others(tmp_path):
    path = write(tmp_path / "a.yaml", {**SMALLEST, "run": {"seed": 1, "name": "mine"}})
    config = load_config(path, ["run.seed=2", "run.seed=3"])
    assert (config.run.seed, config.run.name) == (3, "mine")


@pytest.mark.parametrize("text", ["1e-4", "+1E-4", "1.e-4", ".1e-3", "0.0001", "1.0e-4"])
def test_a_float_may_be_written_in_any_usual_way(tmp_path, smallest, text):
    assert load_config(smallest, [f"learner.learning_rate={text}"]).learner.learning_rate == 1e-4
    path = write(tmp_path / "a.yaml", f"{yaml.safe_dump(SMALLEST)}\nlearner: {{learning_rate: {text}}}\n")
    assert load_config(path).learner.learning_rate == 1e-4


@pytest.mark.parametrize("text", ["run.seed", "=3", "run..seed=3", ".seed=3", ""])
def test_an_override_without_key_and_value_is_refused(smallest, text):
    assert f"found `{text}`" in refusal(smallest, text)


def test_an_override_that_is_no_yaml_is_refused(smallest):
    assert "`rewards.train=[1`" in refusal(smallest, "rewards.train=[1")


# extends


def test_a_chain_of_files_merges_mappings_from_the_root_up(tmp_path):
    write(tmp_path / "root.yaml", {**SMALLEST, "run": {"name": "root", "seed": 1, "iterations": 7}})
    write(tmp_path / "middle.yaml", {"extends": "root", "run": {"name": "middle", "seed": 2}})
    leaf = write(tmp_path / "leaf.yaml", {"extends": "middle", "run": {"name": "leaf"}})
    run = load_config(leaf).run
    assert (run.name, run.seed, run.iterations) == ("leaf", 2, 7)


@pytest.mark.parametrize("parent", ["base", "base.yaml", "../here/base", "../here/base.yaml"])
def test_a_parent_is_found_beside_the_file_with_or_without_suffix(tmp_path, monkeypatch, parent):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "here/base.yaml", {**SMALLEST, "run": {"seed": 5}})
    assert load_config(write(tmp_path / "here/leaf.yaml", {"extends": parent})).run.seed == 5


def test_lists_replace_and_do_not_grow(tmp_path):
    two = [{"type": f"{PLUGINS}:Smooth", "name": name} for name in ("a", "b")]
    write(tmp_path / "base.yaml", {**SMALLEST, "rewards": {"train": two, "cut": "image"}})
    leaf = {"extends": "base", "rewards": {"train": [{"type": f"{PLUGINS}:Smooth", "name": "c"}]}}
    rewards = load_config(write(tmp_path / "leaf.yaml", leaf)).rewards
    assert [entry.name for entry in rewards.train] == ["c"]
    assert rewards.cut == "image"


def test_a_plugin_of_another_type_does_not_inherit_the_keys_of_the_old_one(tmp_path):
    base = {**SMALLEST, "model": {"type": f"{PLUGINS}:Captioned", "path": "x"}}
    write(tmp_path / "base.yaml", base)
    leaf = {"extends": "base", "model": {"type": f"{PLUGINS}:Unprompted"}, "data": {"prompts": "none"}}
    assert load_config(write(tmp_path / "leaf.yaml", leaf)).model.channels == 8


def test_a_plugin_of_the_same_type_keeps_the_keys_of_the_base(tmp_path):
    write(tmp_path / "base.yaml", {**SMALLEST, "model": {"type": f"{PLUGINS}:Captioned", "path": "x"}})
    leaf = {"extends": "base", "model": {"type": f"{PLUGINS}:Captioned", "adapter": {"rank": 2}}}
    model = load_config(write(tmp_path / "leaf.yaml", leaf)).model
    assert (model.path, model.adapter.rank) == ("x", 2)


def test_a_list_entry_is_changed_by_its_index_and_the_others_stay(tmp_path):
    two = [{"type": f"{PLUGINS}:Smooth", "name": name} for name in ("a", "b")]
    path = write(tmp_path / "a.yaml", {**SMALLEST, "rewards": {"train": two}})
    train = load_config(path, ["rewards.train.1.weight=2.5"]).rewards.train
    assert [(entry.name, entry.weight) for entry in train] == [("a", 1.0), ("b", 2.5)]


def test_a_file_may_change_a_list_entry_of_its_parent_by_index(tmp_path):
    write(tmp_path / "base.yaml", SMALLEST)
    leaf = write(tmp_path / "leaf.yaml", "extends: base\nrewards:\n  train:\n    0: {weight: 2}\n")
    assert load_config(leaf).rewards.train[0].weight == 2


def test_an_index_beyond_the_list_is_refused_with_its_length(smallest):
    assert "`rewards.train.3`: the list has 1 entries" in refusal(smallest, "rewards.train.3.weight=2")


def test_files_that_extend_each_other_in_a_circle_are_refused_with_the_way_round(tmp_path):
    write(tmp_path / "a.yaml", {"extends": "b"})
    write(tmp_path / "b.yaml", {"extends": "a"})
    assert "is circular: a.yaml -> b.yaml -> a.yaml" in refusal(tmp_path / "a.yaml")


def test_a_file_that_extends_itself_is_refused(tmp_path):
    assert "circular" in refusal(write(tmp_path / "a.yaml", {"extends": "a"}))


@pytest.mark.parametrize(("parent", "message"), [("absent", "no configuration file `absent`"), (["a"], "names one")])
def test_a_parent_that_is_not_there_is_refused(tmp_path, parent, message):
    assert message in refusal(write(tmp_path / "a.yaml", {"extends": parent}))


# Finding and reading files


def test_a_missing_file_does_not_turn_into_a_shipped_one_of_the_same_name(tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    write(shipped / "demo.yaml", SMALLEST)
    monkeypatch.setattr("acpo_dist.config.load._SHIPPED", (shipped,))
    monkeypatch.chdir(tmp_path)
    assert shipped_configs() == ["demo"]
    for source in ("demo", "demo.yaml", "configs/demo.yaml", "configs/demo"):
        assert find_config(source) == shipped / "demo.yaml"
    assert "Shipped: demo" in refusal("my/demo.yaml")
    assert "Shipped: demo" in refusal(tmp_path / "demo.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "cannot be read as YAML"),
        ("- 1", "expected sections at the top level, found list"),
        ("run: {seed: 1}\nrun: {name: x}", "`run` is set twice"),
        ("run: {seed: 1, seed: 2}", "`seed` is set twice"),
        ("", "`rewards` is required and not set"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, message):
    said = refusal(write(tmp_path / "odd.yaml", content))
    assert message in said
    assert "odd.yaml" in said


# Unknown keys, wrong values


@pytest.mark.parametrize(
    ("override", "unknown", "nearest"),
    [
        ("learnr.micro_batch=3", "`learnr`", "`learner`"),
        ("learner.micro_bach=3", "`learner.micro_bach` (value 3)", "`micro_batch`"),
        ("rewards.replica=3", "`rewards.replica`", "`replicas`"),
        ("rewards.train.0.wieght=3", "unknown key `wieght` (value 3)", "`weight`"),
        ("model.pth=x", "unknown key `pth`", "`path`"),
        ("model.adapter.rnk=3", "unknown key `adapter.rnk`", "`rank`"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(smallest, override, unknown, nearest):
    said = refusal(smallest, override)
    assert unknown in said
    assert f"Did you mean {nearest}?" in said
    assert override in said, "the message does not say where the key was set"


def test_an_unknown_key_of_a_plugin_is_placed_and_its_known_keys_listed(smallest):
    said = refusal(smallest, "rewards.train.0.wieght=3")
    assert f"`rewards.train.0`: reward `{PLUGINS}:Smooth`" in said
    assert "Known: type, name, weight" in said
    assert "at least 1 item" not in said, "a consequence is reported beside its cause"


def test_all_problems_are_named_at_once(smallest):
    said = refusal(smallest, "learner.micro_bach=3", "run.iterations=0", "model.pth=x")
    assert all(part in said for part in ("`learner.micro_bach`", "`run.iterations`", "`pth`"))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("rollout.batch_size=many", "rollout.batch_size"),
        ("rollout.batch_size=16.5", "rollout.batch_size"),
        ("rollout.batch_size=true", "rollout.batch_size"),
        ("learner.zero_stage=true", "learner.zero_stage"),
        ("learner.learning_rate=-1e-4", "learner.learning_rate"),
        ("learner.weight_decay=.inf", "learner.weight_decay"),
        ("learner.weight_decay=.nan", "learner.weight_decay"),
        ("learner.zero_stage=5", "learner.zero_stage"),
        ("learner.betas=[0.9]", "learner.betas.1"),
        ("sampler.t_max=1.01", "sampler.t_max"),
        ("rewards.cut=pixels", "rewards.cut"),
        ("run=", "run"),
        ("run=3", "run"),
        ("rewards.train.0.weight=heavy", "weight"),
        ("model=3", "model"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(smallest, override, key):
    assert f"`{key}`" in refusal(smallest, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rewards.train.0.type=two_stram", "unknown reward `two_stram`. Did you mean `two_stream`?"),
        ("model.type=sdxxl", "unknown model `sdxxl`. Did you mean `sdxl`?"),
        ("algorithm.type=acop", "unknown algorithm `acop`. Did you mean `acpo`?"),
        ("algorithm.type=.relative:Class", "cannot be imported from `.relative:Class`"),
        ("algorithm.type=ab_sent.module:Class", "cannot be imported from `ab_sent.module:Class`"),
        (f"algorithm.type={PLUGINS}:Absent", "has no attribute 'Absent'"),
        (f"algorithm.type={PLUGINS}:WithoutConfig", "it has no `Config`"),
        ("rewards.judges=[{name: x}]", "expected a mapping with the key `type`"),
    ],
)
def test_an_unknown_plugin_is_refused(smallest, override, message):
    assert message in refusal(smallest, override)


def test_a_missing_section_is_named(tmp_path):
    said = refusal(write(tmp_path / "a.yaml", {key: SMALLEST[key] for key in ("model", "algorithm")}))
    assert "`rewards` is required and not set" in said


# The loaded object


@pytest.mark.parametrize("section", ["run", "learner", "model", "algorithm"])
def test_a_loaded_configuration_is_frozen(smallest, section):
    config = load_config(smallest)
    part = getattr(config, section)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, section, part)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(part, next(iter(type(part).model_fields)), "x")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["run.dir=/tmp/somewhere", "learner.learning_rate=1e-5", "learner.betas=[0.5, 0.9]", "model.adapter.rank=3"],
        ["run.name='1e5'"],
        ["run.name='007'"],
        ["run.name='yes'"],
        ["run.name=Übung"],
        [f"rewards.judges=[{{type: '{PLUGINS}:ScoresOnly', name: judge}}]"],
    ],
    ids=["defaults", "many", "number-like", "octal-like", "bool-like", "unicode", "judge"],
)
def test_what_is_dumped_loads_as_the_same_configuration(tmp_path, smallest, overrides):
    config = load_config(smallest, overrides)
    again = load_config(write(tmp_path / "dumped.yaml", dump(config)))
    assert again == config
    assert dump(again) == dump(config)
    assert config != load_config(smallest, [*overrides, "run.seed=99"])


def test_a_type_and_what_is_set_beside_it_may_be_given_in_either_order():
    beside = ["algorithm.anchor.budget=0.3", "algorithm.beta=0.02"]
    first, last = (load_config("toy_sdxl", arguments) for arguments in (
        ["algorithm.type=nft", "rollout.samples_per_prompt=4", *beside],
        [*beside, "rollout.samples_per_prompt=4", "algorithm.type=nft"],
    ))  # fmt: skip
    assert first == last
    assert (first.algorithm.anchor.budget, first.algorithm.beta) == (0.3, 0.02)


@pytest.mark.parametrize(
    ("overrides", "algorithm"),
    [
        (["algorithm={type: acpo, reward_weight: 2}", "algorithm.type=draft"], "draft"),
        (["algorithm.reward_weight=2", "run.seed=1", "algorithm.type=draft"], "draft"),
        (["algorithm.type=draft", "algorithm={type: acpo}"], "acpo"),
        (["algorithm.type=refl", "algorithm.type=draft"], "draft"),
    ],
)
def test_the_last_override_wins_also_over_a_type(overrides, algorithm):
    assert load_config("toy_sdxl", overrides).algorithm.type == algorithm


def test_a_list_may_be_set_and_then_one_of_its_types():
    config = load_config(
        "toy_sdxl", ["rewards.train=[{type: sharpness}, {type: two_stream}]", "rewards.train.0.type=saturation"]
    )
    assert [entry.type for entry in config.rewards.train] == ["saturation", "two_stream"]


def test_whole_numbers_are_decimal():
    assert load_config("toy_sdxl", ["run.seed=0x10"]).run.seed == 16
    assert "rollout.batch_size" in refusal("toy_sdxl", "rollout.batch_size=1:30")
    assert load_config("toy_sdxl", ["run.name=010"]).run.name == "010"


@pytest.mark.parametrize(
    ("old", "new"), [("guard.pictures=8", "guard.images"), ("learner.max_refused_steps=2", "learner.max_skipped_steps")]
)
def test_a_renamed_key_is_refused_and_the_message_gives_the_new_name(smallest, old, new):
    assert f"is now `{new}`" in refusal(smallest, old)


@pytest.mark.parametrize("first", ["# acpo_dist 0.0.7\n", ""])
def test_a_run_of_another_version_that_does_not_load_names_that_version(tmp_path, smallest, first):
    text = dump(load_config(smallest)).partition("\n")[2].replace("max_skipped_steps", "max_refused_steps")
    said = refusal(write(tmp_path / "resolved.yaml", first + text))
    assert "learner.max_skipped_steps" in said
    assert ("0.0.7" if first else "earlier") in said


def test_a_dumped_configuration_names_the_version_that_wrote_it(tmp_path, smallest):
    path = write(tmp_path / "resolved.yaml", dump(load_config(smallest)))
    assert writer_of(path) == version("acpo-dist")
    assert writer_of(smallest) is None
