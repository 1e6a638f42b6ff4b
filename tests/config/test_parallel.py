"""Settings of several hosts, checked before anything starts."""

from __future__ import annotations

import pytest

from jaxserve.config import config_from_values
from jaxserve.config_parallel import parse_address
from jaxserve.engine.core import EngineCore
from jaxserve.engine.hosts.facts import difference, facts_of
from jaxserve.engine.hosts.ray_workers import follower_config
from jaxserve.errors import ConfigError
from tests.checkpoints import save_random_llama

TWO = {"model": "m", "nnodes": 2, "tensor_parallel_size": 2, "dist_init_addr": "10.0.0.1:5000"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"node_rank": 2}, "node_rank is 2, but nnodes is 2: ranks are 0 to 1"),
        ({"dist_init_addr": None}, "give dist_init_addr too"),
        ({"dist_init_addr": "10.0.0.1"}, "must be host:port of rank 0"),
        ({"dist_init_addr": "::1:99999"}, "must be host:port of rank 0"),
        ({"dist_init_addr": "0.0.0.0:5000"}, "dist_init_addr is 0.0.0.0:5000, by which no other host can reach rank 0"),
        ({"dist_init_addr": "[::]:5000"}, "by which no other host can reach rank 0"),
        ({"dist_init_addr": "*:5000"}, "by which no other host can reach rank 0"),
        ({"tensor_parallel_size": 3}, "must be a multiple of nnodes"),
        ({"nnodes": 1}, "dist_init_addr is for several hosts, but nnodes is 1"),
        ({"distributed_executor_backend": "ray", "node_rank": 1}, "you start rank 0 alone"),
        ({"distributed_executor_backend": "ray", "nnodes": 1}, "'ray' is for several hosts, but nnodes is 1"),
    ],
)
def test_settings_that_do_not_go_together(changes, words):
    with pytest.raises(ConfigError, match=".*") as raised:
        config_from_values(TWO | changes)
    assert words in str(raised.value)


def test_ray_finds_the_address_by_itself():
    config = config_from_values(TWO | {"distributed_executor_backend": "ray", "dist_init_addr": None})
    assert config.parallel.dist_init_addr is None


@pytest.mark.parametrize("address", ["host", ":5000", "host:", "host:0", "::1", "host:70000"])
def test_addresses_without_a_host_or_a_port_are_refused(address):
    with pytest.raises(ConfigError, match="host:port"):
        parse_address(address)


def test_facts_tell_settings_and_weights_apart_but_not_places(tmp_path):
    models = [save_random_llama(tmp_path / str(index)) for index in range(2)]
    other = save_random_llama(tmp_path / "other", initializer_range=0.3)
    facts = [facts_of(config_from_values(TWO | {"model": str(model)})) for model in models]
    assert difference(*facts) is None
    renamed = config_from_values(TWO | {"model": str(models[0]), "node_rank": 1, "served_model_name": "x"})
    assert difference(facts[0], facts_of(renamed)) is None
    changed = facts_of(config_from_values(TWO | {"model": str(models[0]), "dtype": "float32"}))
    assert difference(facts[0], changed) == 'dtype is "float32" here, but "auto" on node rank 0'
    assert "checkpoint is" in str(difference(facts[0], facts_of(config_from_values(TWO | {"model": str(other)}))))
    older = facts[0] | {"version of jax": "0.1"}
    assert "version of jax is 0.1 here" in str(difference(facts[0], older))


def test_followers_that_ray_starts_are_told_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "draft"):
        (tmp_path / name).mkdir()
    drafts = {"method": "draft_model", "model": "draft", "num_speculative_tokens": 2}
    config = config_from_values(TWO | {"model": "model", "speculative_config": drafts, "api_key": ("secret",)})
    follower = follower_config(config, 1)
    assert follower.model.model == str(tmp_path / "model")
    assert follower.speculative.speculative_config is not None
    assert follower.speculative.speculative_config.model == str(tmp_path / "draft")
    assert (follower.parallel.node_rank, follower.server.api_key) == (1, ())


def test_one_process_alone_does_not_start_a_part_of_a_group():
    with pytest.raises(ConfigError, match="nnodes is 2: only 'jaxserve serve' runs on several hosts"):
        EngineCore(config_from_values(TWO))
