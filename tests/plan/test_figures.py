"""A plan's figures: against public parameter counts, the compile check's record, and sums done by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from jaxserve.config import Config, config_from_values, load_config
from jaxserve.plan.deployment import SAMPLER_COLLECTIVES, Deployment
from jaxserve.plan.devices import Devices
from jaxserve.plan.memory import activation_bytes, plan_memory, sampler_bytes
from jaxserve.plan.roofline import decode_rate, prefill_rate
from tests.compile_check import plans, report, steps
from tests.sampling.test_split_vocabulary import EXPECTED

LLAMA_8B, LLAMA_70B = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.3-70B-Instruct"
PARAMETERS = {LLAMA_8B: 8_030_261_248, LLAMA_70B: 70_553_706_496}  # as Hugging Face counts them
GIB = 2**30


def deployment_of(model: str, devices: str, **values) -> Deployment:
    count = Devices.parse(devices).count
    config = config_from_values({"model": model, "tensor_parallel_size": count, "max_model_len": 8192} | values)
    return Deployment.of(config, Devices.parse(devices))


@pytest.mark.parametrize("count", [1, 4, 8])
@pytest.mark.parametrize("model", PARAMETERS)
def test_devices_share_all_parameters_and_a_little_padding(model: str, count: int):
    weight_bytes = deployment_of(model, f"h100:{count}").weight_bytes()
    whole = 2 * PARAMETERS[model]
    assert weight_bytes == whole if count == 1 else whole < weight_bytes * count < 1.003 * whole


RECORD = json.loads((report.RESULTS / "jax-0.10.2.json").read_text())["results"]
STEPS = [entry for entry in RECORD if entry["name"].partition(", ")[2].startswith("decode step of")]  # of models alone


@pytest.mark.parametrize("entry", STEPS, ids=lambda entry: f"{entry['name']} on {entry['target']}")
def test_weights_and_pool_are_what_the_compilers_count(entry: dict):
    (checked,) = [
        d for d in steps.DEPLOYMENTS if entry["name"].startswith(d.name + ",") and d.target.name == entry["target"]
    ]
    deployment = deployment_of(
        LLAMA_8B if "8B" in checked.name else LLAMA_70B,
        f"{checked.target.device}:{checked.target.num_devices}",
        tensor_parallel_size=checked.target.tensor_size,
        data_parallel_size=checked.target.num_data_shards,
        hf_overrides={"num_hidden_layers": entry["layers"]},
    )
    pool_bytes = deployment.pool_bytes(checked.num_blocks)
    assert pool_bytes == pytest.approx(entry["alias_bytes"], rel=0.01)
    table_bytes = (checked.max_num_seqs + 1) * checked.max_model_len * 4
    (sampler,) = [
        e for e in RECORD if e["name"] == f"{checked.name}, sampler 'greedy'" and e["target"] == entry["target"]
    ]
    head_bytes = sampler["argument_bytes"] - sampler["alias_bytes"]  # the forward program has no use for it
    counted = entry["argument_bytes"] - entry["alias_bytes"] - table_bytes + head_bytes
    assert deployment.weight_bytes() == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("compiled", plans.recorded(), ids=lambda one: f"{one.launch_file} on {one.devices}")
def test_plans_of_whole_models_are_what_the_compilers_count(compiled: plans.Comparison):
    deployment = Deployment.of(load_config(compiled.launch_file), Devices.parse(compiled.devices))
    planned = plan_memory(deployment)
    assert deployment.graph.config.num_layers == compiled.layers
    assert planned.weight_bytes == pytest.approx(compiled.compiled_weight_bytes, rel=plans.TOLERANCE)
    assert planned.pool_bytes == pytest.approx(compiled.compiled_pool_bytes, rel=plans.TOLERANCE)
    assert planned.step_bytes >= compiled.compiled_step_bytes, "the estimate must leave room for all that steps take"
    assert deployment.num_collectives()["forward"] == compiled.compiled_num_collectives


def test_every_launch_file_s_plan_is_on_record_and_on_the_page():
    comparisons = plans.recorded()
    assert {one.launch_file: one.devices for one in comparisons} == plans.LAUNCHES
    assert {("h100:1", 32), ("h100:4", 80), ("h100:8", 80)} <= {(one.devices, one.layers) for one in comparisons}
    assert plans.PAGE.read_text() == plans.page(comparisons)


def test_the_record_has_an_8b_on_one_h100_and_a_70b_on_four_and_on_eight():
    found = {(entry["name"].split(",")[0], entry["target"]) for entry in STEPS}
    assert {("Llama 3.1 8B", "h100"), ("Llama 3.3 70B", "h100-4"), ("Llama 3.3 70B", "h100-8")} <= found


@pytest.mark.parametrize("checked", steps.DEPLOYMENTS, ids=lambda d: f"{d.name} on {d.target.name}")
def test_no_compiled_program_holds_more_than_the_estimate(checked: steps.Deployment):
    temporaries = {
        entry["name"].split(", ", 1)[1]: entry["temp_bytes"]
        for entry in RECORD
        if entry["name"].startswith(checked.name + ",") and entry["target"] == checked.target.name
    }
    shards = checked.target.tensor_size
    model = replace(checked.decoder, num_shards=shards)
    largest = checked.buckets.token_sizes[-1]
    assert temporaries[f"largest step of {largest}"] <= activation_bytes(model, largest, 2)
    num_rows = checked.buckets.row_sizes[-1]
    assert temporaries["sampler 'full'"] <= sampler_bytes(model, num_rows, checked.max_model_len)


def test_the_sampler_s_collectives_are_those_that_were_counted():
    assert {variant: sum(kinds.values()) for variant, kinds in EXPECTED.items()} == SAMPLER_COLLECTIVES


@pytest.mark.parametrize(("tensor", "data", "kv_bytes"), [(1, 1, 131072), (2, 1, 65536), (8, 1, 16384), (16, 1, 16384)])
def test_a_token_of_llama_8b_takes_128_kib_of_kv_over_all_devices(tensor: int, data: int, kv_bytes: int):
    """32 layers, K and V of 8 heads of 128 values of 2 bytes; a device has a head at least."""
    spec = deployment_of(LLAMA_8B, f"h100:{tensor * data}", tensor_parallel_size=tensor).spec
    assert spec.block_bytes // spec.block_size // spec.num_shards == kv_bytes


EAGLE3_8B = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "vocab_size": 128256,
    "draft_vocab_size": 32000,
}


def test_a_draft_model_s_weights_and_blocks_count_as_well():
    without = deployment_of(LLAMA_70B, "h100:4")
    drafting = deployment_of(LLAMA_70B, "h100:4", speculative_config={"model": LLAMA_8B})
    draft = deployment_of(LLAMA_8B, "h100:4")
    assert drafting.weight_bytes() == without.weight_bytes() + draft.weight_bytes()
    assert drafting.pool_bytes(100) == without.pool_bytes(100) + draft.pool_bytes(100)
    assert drafting.spec.block_bytes == without.spec.block_bytes + draft.spec.block_bytes
    memory, roomier = plan_memory(drafting), plan_memory(without)
    assert memory.step_bytes > roomier.step_bytes
    assert memory.num_blocks < roomier.num_blocks
    used = memory.weight_bytes + memory.step_bytes + memory.pool_bytes
    assert 0.94 * memory.limit_bytes < used <= memory.limit_bytes


def test_a_draft_head_counts_without_the_embedding_that_it_shares(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(EAGLE3_8B))
    without = deployment_of(LLAMA_8B, "h100")
    drafting = deployment_of(LLAMA_8B, "h100", speculative_config={"method": "eagle3", "model": str(tmp_path)})
    attention, mlp, norms = 2 * 4096 * (32 + 8 + 8) * 128 + 4096 * 4096, 3 * 4096 * 14336, 4 * 4096
    own = 2 * (3 * 4096 * 4096 + attention + mlp + norms + 32000 * 4096) + 4 * 128256
    assert drafting.weight_bytes() - without.weight_bytes() == own
    assert drafting.pool_bytes(100) - without.pool_bytes(100) == without.pool_bytes(100) // 32


def test_requests_at_once_are_what_the_pool_holds_at_full_length():
    config = load_config("configs/llama-3.1-8b-h100.yaml")
    memory = plan_memory(Deployment.of(config, Devices.parse("h100")))
    assert memory.num_full_requests == (memory.num_blocks - 1) // (32768 // 16) == 13
    used = memory.weight_bytes + memory.step_bytes + memory.pool_bytes
    assert 0.94 * memory.limit_bytes < used <= memory.limit_bytes
    two = plan_memory(Deployment.of(config.with_values(data_parallel_size=2), Devices.parse("h100:2")))
    assert two.num_full_requests == 2 * memory.num_full_requests


def test_one_token_at_a_time_reads_the_weights_and_the_cache_at_the_memory_s_rate():
    deployment = deployment_of(LLAMA_8B, "h100")
    read = 2 * (PARAMETERS[LLAMA_8B] - 128256 * 4096) + 1000 * 131072  # of the embedding, a row
    rate = decode_rate(deployment, batch_size=1, context=1000)
    assert rate.step_ms == pytest.approx(read / 3.35e12 * 1e3, rel=1e-6)
    assert rate.tokens_per_s == pytest.approx(1000 / rate.step_ms)
    assert rate.bound == "memory"


def test_a_long_prompt_computes_two_operations_a_parameter_and_sends_two_sums_a_layer():
    deployment = deployment_of(LLAMA_8B, "h100:2", max_num_batched_tokens=8192)
    layers = 32 * (4096 * (32 + 2 * 8 + 32) * 128 + 3 * 4096 * 14336)
    attention = 4 * 8192 * 8193 // 2 * 32 * 128 * 32
    head = 128256 * 4096
    flops = (2 * (layers * 8192 + head) + attention) / 2
    sent = 65 * 8192 * 4096 * 2  # of two devices, each sends one part of two, twice
    rate = prefill_rate(deployment)
    assert rate.step_ms == pytest.approx((flops / 989e12 + sent / 450e9) * 1e3, rel=1e-3)
    assert rate.bound == "compute"


def config_of(**values) -> Config:
    return config_from_values({"model": LLAMA_8B} | values)


def test_data_shards_double_the_tokens_of_a_step_and_leave_its_time():
    one = decode_rate(deployment_of(LLAMA_8B, "h100"), batch_size=8, context=100)
    config = config_of(data_parallel_size=2, max_model_len=8192)
    two = decode_rate(Deployment.of(config, Devices.parse("h100:2")), batch_size=16, context=100)
    assert two.step_ms == pytest.approx(one.step_ms)
    assert two.tokens_per_s == pytest.approx(2 * one.tokens_per_s)
