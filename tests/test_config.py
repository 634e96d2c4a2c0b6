"""Options are checked before anything is loaded, and a run's options can be used again."""

from __future__ import annotations

import json

import pytest
import yaml

from probing.config import ProbeConfig, read_config, seed_numbers
from spafit.errors import UsageError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": ("meen",)}, "--pooling 'meen'.*Did you mean 'mean'"),
        ({"sites": ("blocks",)}, "Did you mean 'block'"),
        ({"controls": ("random",)}, "word-type, random-encoder"),
        ({"layers": "a-b"}, "--layers 'a-b'"),
        ({"layers": "6-2"}, "write 2-6"),
        ({"max_train": 3}, "at least 10"),
        ({"seeds": ()}, "--seeds is empty"),
        ({"seeds": (1, 1)}, "names one twice"),
        ({"l2": (0.0,)}, "positive"),
        ({"l2": (0.1, float("nan"))}, "--l2 0.1, nan needs positive, finite"),
        ({"l2": (float("inf"),)}, "finite"),
        ({"dtype": "float8"}, "bfloat16"),
        ({"overwrite": "yes"}, "missing, always, never"),
    ],
)
def test_a_bad_option_is_one_sentence_with_the_remedy(options, message):
    with pytest.raises(UsageError, match=message):
        ProbeConfig(**options)


def test_seeds_are_numbers_or_how_many():
    assert seed_numbers(3) == seed_numbers([0, 1, 2]) == (0, 1, 2)
    with pytest.raises(UsageError, match="--seeds 0 is too small"):
        seed_numbers(0)


def test_layers_speak_in_hidden_indices():
    assert ProbeConfig().hidden(4) == [0, 1, 2, 3]
    assert ProbeConfig(layers="0,2-3").hidden(4) == [0, 2, 3]
    with pytest.raises(UsageError, match="hidden 0 to 3"):
        ProbeConfig(layers="0-4").hidden(4)


def test_options_survive_yaml_and_run_json(tmp_path):
    config = ProbeConfig(model="m", tasks=("core", "conllu:x#upos"), seeds=(0, 4), l2=(0.1, 1.0), max_train=50)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.to_dict()))
    (tmp_path / "run.json").write_text(json.dumps({"schema_version": 1, "config": config.to_dict()}))
    for name in ("c.yaml", "run.json"):
        assert ProbeConfig(**read_config(tmp_path / name)) == config
    assert ProbeConfig.from_dict(config.to_dict(), where="here") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-trian: 5", "unknown option 'max-trian'.*max_train"),
        ("max-train: many", "must be int"),
        ("seeds: [a]", "list of int"),
        ("offline: 3", "must be bool"),
        ("layers: null", "must not be empty"),
        ("- 1", "options by name"),
        ("a: [", "not YAML"),
    ],
)
def test_a_bad_configuration_file_names_file_and_option(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_config(tmp_path / "c.yaml")
    assert "c.yaml" in str(caught.value)
