from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.model_families import CONFIGS, write_tiny_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from slime.backends.megatron_utils.names import (
    HFDirectory,
    ModelShape,
    NameMapError,
    ParallelPlace,
    all_parameters,
    check_checkpoint,
    fill_local,
    hf_tensors,
    local_tensor,
    map_parameter,
    read_shape,
    shape_of,
)

DEEPSEEK = CONFIGS["deepseek_v3"]
YARN = DEEPSEEK["rope_parameters"]


@pytest.fixture(params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ModelShape, HFDirectory]:
    write_tiny_model(request.param, tmp_path)
    return read_shape(tmp_path), HFDirectory(tmp_path)


def test_every_family_goes_to_megatron_and_back_bit_for_bit(checkpoint: tuple[ModelShape, HFDirectory]) -> None:
    shape, source = checkpoint
    back: dict[str, Tensor] = {}
    for parameter in all_parameters(shape):
        for name, tensor in hf_tensors(parameter, [local_tensor(parameter, source.read)]):
            assert name not in back
            back[name] = tensor
    assert back.keys() == source.shapes.keys()
    for name, tensor in back.items():
        assert tensor.dtype == source.tensor(name).dtype
        assert torch.equal(tensor, source.tensor(name)), name


def test_a_part_is_filled_in_place_as_it_is_made_anew(checkpoint: tuple[ModelShape, HFDirectory]) -> None:
    shape, source = checkpoint
    for parameter in all_parameters(shape, padded_vocab_size=256):
        part = replace(parameter, rank=1, num_shards=2) if parameter.layout.is_sharded else parameter
        out = torch.full(part.local_shape(part.rank), torch.nan, dtype=torch.float64)
        fill_local(part, source.read, out)
        assert torch.equal(out, local_tensor(part, source.read).double()), part.name
    with pytest.raises(NameMapError, match=r"output_layer.weight must have shape .*, the model has \(3, 2\)"):
        fill_local(part, source.read, torch.empty(3, 2))


def test_shards_of_ranks_make_up_the_whole(checkpoint: tuple[ModelShape, HFDirectory]) -> None:
    """TP2, PP2, EP2, experts split among 2 (ETP), a padded vocabulary."""
    shape, source = checkpoint
    places = [
        ParallelPlace(
            layers=range(2 * stage, 2 * stage + 2),
            tp_rank=tp,
            tp_size=2,
            ep_rank=ep,
            ep_size=2,
            etp_rank=tp,
            etp_size=2,
            padded_vocab_size=256,
            shards_down_projections=True,
        )
        for stage in range(2)
        for ep in range(2)
        for tp in range(2)
    ]
    back: dict[str, Tensor] = {}
    for first, second in zip(places[::2], places[1::2], strict=True):
        for name in _local_names(shape, first):
            parts = [local_tensor(map_parameter(shape, place, name), source.read) for place in (first, second)]
            mapped = map_parameter(shape, first, name)
            back |= dict(hf_tensors(mapped, parts[: mapped.num_shards]))
    assert back.keys() == source.shapes.keys()
    assert all(torch.equal(tensor, source.tensor(name)) for name, tensor in back.items())


def _local_names(shape: ModelShape, place: ParallelPlace) -> list[str]:
    """Names as a chunk calls them: layers and experts from 0."""
    names = []
    for parameter in all_parameters(shape):
        parts = parameter.name.split(".")
        if parts[0] == "decoder" and parts[1] == "layers":
            if int(parts[2]) not in place.layers:
                continue
            parts[2] = str(place.layers.index(int(parts[2])))
            if "local_experts" in parts:
                at = parts.index("local_experts") + 1
                per_rank = shape.size("experts") // place.ep_size
                if int(parts[at]) // per_rank != place.ep_rank:
                    continue
                parts[at] = str(int(parts[at]) % per_rank)
        names.append(".".join(parts))
    return names


def test_grouped_queries_lie_group_by_group(tmp_path: Path) -> None:
    model = write_tiny_model("qwen2", tmp_path)
    shape, source = read_shape(tmp_path), HFDirectory(tmp_path)
    name = "decoder.layers.0.self_attention.linear_qkv."
    attention = model.model.layers[0].self_attn
    q, k, v = (projection.weight.detach() for projection in (attention.q_proj, attention.k_proj, attention.v_proj))
    whole = local_tensor(map_parameter(shape, ParallelPlace(layers=range(4)), name + "weight"), source.read)
    assert torch.equal(whole, torch.cat([q[:16], k[:8], v[:8], q[16:], k[8:], v[8:]]))
    place = ParallelPlace(layers=range(4), tp_rank=1, tp_size=2)
    bias = local_tensor(map_parameter(shape, place, name + "bias"), source.read)
    assert torch.equal(
        bias, torch.cat([attention.q_proj.bias[16:], attention.k_proj.bias[8:], attention.v_proj.bias[8:]])
    )


def test_more_ranks_than_query_groups_hold_rows_of_the_interleaved_tensor(tmp_path: Path) -> None:
    write_tiny_model("qwen3", tmp_path)
    shape, source = read_shape(tmp_path), HFDirectory(tmp_path)
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    whole = local_tensor(map_parameter(shape, ParallelPlace(layers=range(4)), name), source.read)
    parts = [
        local_tensor(map_parameter(shape, ParallelPlace(layers=range(4), tp_rank=rank, tp_size=4), name), source.read)
        for rank in range(4)
    ]
    assert torch.equal(torch.cat(parts), whole)
    back = dict(hf_tensors(map_parameter(shape, ParallelPlace(layers=range(4), tp_size=4), name), parts))
    assert torch.equal(
        back["model.layers.0.self_attn.v_proj.weight"], source.tensor("model.layers.0.self_attn.v_proj.weight")
    )


@pytest.mark.parametrize(
    ("local", "fused"),
    [
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        ("mlp.experts.local_experts.1.linear_fc1.weight", "mlp.experts.linear_fc1.weight1"),
        ("mlp.experts.local_experts.0.linear_fc2.weight", "mlp.experts.linear_fc2.weight0"),
    ],
)
def test_names_of_both_specs_mean_the_same(local: str, fused: str) -> None:
    shape = shape_of(AutoConfig.for_model(**CONFIGS["qwen3_moe"]))
    place = ParallelPlace(layers=[2, 3], ep_rank=1, ep_size=2)
    mapped = map_parameter(shape, place, f"decoder.layers.1.{local}")
    assert map_parameter(shape, place, f"module.module.decoder.layers.1.{fused}").hf == mapped.hf
    assert mapped.name.startswith("decoder.layers.3.")
    assert "expert" not in local or f"experts.{2 + int(local.split('.')[3])}." in mapped.name


def test_padding_of_the_vocabulary_is_zero_on_the_rank_that_holds_it(tmp_path: Path) -> None:
    write_tiny_model("llama-tied", tmp_path)
    shape, source = read_shape(tmp_path), HFDirectory(tmp_path)
    place = ParallelPlace(layers=range(4), tp_rank=3, tp_size=4, padded_vocab_size=400)
    mapped = map_parameter(shape, place, "embedding.word_embeddings.weight")
    assert torch.equal(local_tensor(mapped, source.read), torch.zeros(100, 32))
    output = map_parameter(shape, place, "output_layer.weight")
    assert [name for name, _ in output.hf] == ["model.embed_tokens.weight"]
    assert hf_tensors(output, [torch.zeros(100, 32)] * 4) == []


def test_a_tensor_missing_or_unknown_or_of_another_shape_is_named() -> None:
    shape = shape_of(AutoConfig.for_model(**CONFIGS["deepseek_v3"] | {"num_hidden_layers": 2}))
    found = {name: size for parameter in all_parameters(shape) for name, size in parameter.hf}
    check_checkpoint(shape, found)
    router_bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    with pytest.raises(NameMapError, match=f"tensor {router_bias} is missing"):
        check_checkpoint(shape, {name: size for name, size in found.items() if name != router_bias})
    with pytest.raises(
        NameMapError, match=r"tensor model.norm.weight has shape \(3,\), config.json asks for \(4096,\)"
    ):
        check_checkpoint(replace(shape, hidden_size=4096), found | _of_hidden_size(shape, 4096))
    with pytest.raises(NameMapError, match=r"tensor model.layers.0.lora.weight of the checkpoint is in no table"):
        check_checkpoint(shape, found | {"model.layers.0.lora.weight": (3,)})


def _of_hidden_size(shape: ModelShape, size: int) -> dict[str, tuple[int, ...]]:
    wide = {name: axes for parameter in all_parameters(replace(shape, hidden_size=size)) for name, axes in parameter.hf}
    return wide | {"model.norm.weight": (3,)}


def test_a_rank_asks_for_what_it_holds_and_no_more(tmp_path: Path) -> None:
    write_tiny_model("qwen3_moe", tmp_path)
    shape, source = read_shape(tmp_path), HFDirectory(tmp_path)
    place = ParallelPlace(layers=[1], tp_rank=1, tp_size=2, ep_rank=1, ep_size=2, etp_rank=1, etp_size=2)
    num_read = num_held = 0

    def read(name: str, axis: int, start: int, stop: int) -> Tensor:
        nonlocal num_read
        part = source.read(name, axis, start, stop)
        num_read += part.nbytes
        return part

    for name in _local_names(shape, place):
        num_held += local_tensor(map_parameter(shape, place, name), read).nbytes
    assert num_read == num_held


def test_only_files_of_the_index_are_read(tmp_path: Path) -> None:
    """Some models are published with the same weights under other names beside them."""
    model = write_tiny_model("llama", tmp_path, max_shard_size="20KB")
    save_file({"output.weight": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    source = HFDirectory(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert source.shapes.keys() == model.state_dict().keys()
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "output.weight" in HFDirectory(tmp_path).shapes
    with pytest.raises(NameMapError, match=r"holds no \*.safetensors"):
        HFDirectory(tmp_path / "nowhere")


def test_a_parameter_that_no_table_has_is_named() -> None:
    shape = shape_of(AutoConfig.for_model(**CONFIGS["qwen3"]))
    for name in ("linear_fc3.weight", "experts.linear_fc1.weight0"):
        with pytest.raises(NameMapError, match=rf"decoder.layers.0.mlp.{name} of the Megatron model is in no table of"):
            map_parameter(shape, ParallelPlace(layers=[0]), f"decoder.layers.0.mlp.{name}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "model_type gpt2 has no Megatron name map; known: llama, "),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias and mlp_bias must be false"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [1]}, "every layer must have experts"),
        ({"model_type": "qwen2", "hidden_act": "gelu"}, "hidden_act must be silu, got gelu"),
        (DEEPSEEK | {"norm_topk_prob": False}, "norm_topk_prob must be True with num_experts_per_tok 2"),
        (DEEPSEEK | {"num_experts_per_tok": 1}, "norm_topk_prob must be False with num_experts_per_tok 1"),
        (DEEPSEEK | {"topk_group": 2}, "num_experts_per_tok 2 must be twice topk_group 2"),
        (DEEPSEEK | {"rms_norm_eps": 1e-5}, "rms_norm_eps must be 1e-6 for deepseek_v3, got 1e-05"),
        (DEEPSEEK | {"rope_parameters": CONFIGS["llama"]["rope_parameters"]}, "default or yarn, got llama3"),
        (DEEPSEEK | {"rope_parameters": YARN | {"mscale": None}}, "both mscale and mscale_all_dim or neither"),
        (DEEPSEEK | {"rope_parameters": YARN | {"attention_factor": 1.5}}, "no attention_factor"),
    ],
)
def test_configs_that_megatron_cannot_express_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(NameMapError, match=message):
        shape_of(AutoConfig.for_model(**fields))
