"""Stacks and roles are right: what the finder says is checked against what the models compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from spafit.errors import ModelError
from spafit.stacks import ROLES, Stack, find_stacks, stack_at
from tests import tiny as fixtures
from tests.tiny import BLOCKS, HEADS, NAMES, PARAMETERS, WIDTH, tiny, tiny_inputs

STACKED = [n for n in NAMES if n not in ("swin", "convnext")]
CAUSAL = {*fixtures.DECODERS}


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def run(model: nn.Module, name: str, paths: set[str], **inputs: torch.Tensor) -> list[tuple[str, Any, torch.Tensor]]:
    """One forward pass; (path, first input, first output) of every call of the modules at ``paths``, in order."""
    calls: list[tuple[str, Any, torch.Tensor]] = []
    modules = dict(model.named_modules())

    def hook(path: str) -> Any:
        def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            calls.append((path, given.detach().clone(), first(output).detach().clone()))

        return record

    handles = [modules[p].register_forward_hook(hook(p), with_kwargs=True) for p in paths]
    try:
        model(**(inputs or tiny_inputs(name)))
    finally:
        for handle in handles:
            handle.remove()
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_every_fixture_is_really_tiny(name):
    count = sum(p.numel() for p in tiny(name).parameters())
    assert count == PARAMETERS[name]
    assert count < 200_000
    assert set(PARAMETERS) == set(NAMES)


EXPECTED = {  # name: ((stack, blocks that run), ...)
    **{n: (("encoder", BLOCKS),) for n in ("bert", "roberta", "distilbert", "electra", "albert", "deberta-v2")},
    **{n: (("encoder", BLOCKS),) for n in ("mpnet", "modernbert")},
    "albert-groups": (("encoder", 4),),
    **{n: (("decoder", BLOCKS),) for n in fixtures.DECODERS},
    **{n: (("encoder", 2), ("decoder", BLOCKS)) for n in fixtures.SEQ2SEQ},
    "vit": (("vision", BLOCKS),),
    "dinov2": (("vision", BLOCKS),),
    "clip": (("text", BLOCKS), ("vision", BLOCKS)),
}


@pytest.mark.parametrize("name", STACKED)
def test_names_depth_width_and_heads_agree_with_the_configuration(name):
    stacks = find_stacks(tiny(name))
    assert tuple((s.name, s.num_blocks) for s in stacks) == EXPECTED[name]
    assert all(s.width == WIDTH and s.num_heads == HEADS for s in stacks)


@pytest.mark.parametrize("name", STACKED)
def test_blocks_run_in_the_order_of_block_paths(name):
    model = tiny(name)
    for stack in find_stacks(model):
        calls = run(model, name, set(stack.block_paths))
        assert tuple(path for path, *_ in calls) == stack.block_paths


@pytest.mark.parametrize("name", STACKED)
def test_every_role_is_called_once_per_block_with_the_size_of_its_role(name):
    model = tiny(name)
    for stack in find_stacks(model):
        assert set(stack.roles) <= set(ROLES)
        needed = {"query", "key", "value", "attention_output", "attention_norm", "output_norm"}
        needed |= set() if name == "mixtral" else {"intermediate", "output"}
        assert needed <= set(stack.roles), stack.name
        for role, subs in stack.roles.items():
            for k, sub in enumerate(subs):
                paths = {stack.role_paths(role, b)[k] for b in range(stack.num_blocks)}
                calls = run(model, name, paths)
                # DeBERTa-v2 sends its relative positions through the query and key projections as well.
                times = 2 if name == "deberta-v2" and role in ("query", "key") else 1
                assert len(calls) == times * stack.num_blocks, (role, sub)
                if role.endswith(("attention_output", "norm")) or role == "output":
                    assert all(out.shape[-1] == WIDTH for _, _, out in calls), (role, sub)


@pytest.mark.parametrize("name", STACKED)
def test_branches_and_norms_rebuild_the_block_output(name):
    """Pre-norm: out = in + branches. Post-norm: out = norm(norm(in + attention) + feed-forward). Wrong roles fail."""
    model = tiny(name)
    for stack in find_stacks(model):
        branches = [stack.attention_branch, stack.cross_branch, stack.feed_forward_branch]
        norms = ["attention_norm", "cross_attention_norm", "output_norm"]
        for b, path in enumerate(stack.block_paths):
            if stack.shared and b:
                continue
            paths = {path, *(f"{path}.{sub}" for sub in branches if sub)}
            calls = {p: (given, out) for p, given, out in reversed(run(model, name, paths))}
            state, wanted = calls[path]
            for sub, norm in zip(branches, norms, strict=True):
                if sub is None:
                    assert norm not in stack.roles
                    continue
                state = state + calls[f"{path}.{sub}"][1].reshape(state.shape)
                if not stack.pre_norm:
                    state = model.get_submodule(stack.role_paths(norm, b)[0])(state)
            torch.testing.assert_close(state, wanted, rtol=1e-5, atol=1e-5)


def test_rebuilding_notices_a_wrong_branch():
    """Negative control of the test above: with the intermediate layer's norm swapped the sum is wrong."""
    model = tiny("bert")
    (stack,) = find_stacks(model)
    path = stack.block_paths[0]
    calls = {p: (i, o) for p, i, o in run(model, "bert", {path, f"{path}.{stack.attention_branch}"})}
    state, wanted = calls[path]
    swapped = model.get_submodule(stack.role_paths("output_norm", 0)[0])(
        state + calls[f"{path}.{stack.attention_branch}"][1]
    )
    assert (swapped - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "mpnet", "distilbert", "vit", "clip", "bart"])
def test_input_of_the_attention_output_holds_the_heads_side_by_side(name):
    """softmax(q k / sqrt d) v per head, from the role modules' own outputs, equals the slice of that head."""
    model = tiny(name)
    stack = find_stacks(model)[0]
    inputs = tiny_inputs(name)
    block = stack.num_blocks - 1
    paths = {r: stack.role_paths(r, block)[0] for r in ("query", "key", "value", "attention_output")}
    calls = {p: (i, o) for p, i, o in run(model, name, set(paths.values()), **inputs)}
    rows = calls[paths["query"]][1].shape[0]

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(rows, -1, stack.num_heads, WIDTH // stack.num_heads).transpose(1, 2)

    q, k, v = (heads(calls[paths[r]][1]) for r in ("query", "key", "value"))
    scores = q @ k.transpose(-1, -2) / (WIDTH // stack.num_heads) ** 0.5
    if name == "mpnet":  # learnt relative positions, the same in every block
        length = scores.shape[-1]
        scores = scores + model.encoder.compute_position_bias(torch.zeros(1, length, WIDTH))
    if stack.causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    wanted = scores.softmax(-1) @ v
    torch.testing.assert_close(heads(calls[paths["attention_output"]][0]), wanted, rtol=1e-5, atol=1e-5)


def test_fused_projection_holds_query_key_and_value_in_turn():
    """GPT-2: one module stands under three roles, and its output splits into them in that order."""
    model = tiny("gpt2")
    (stack,) = find_stacks(model)
    assert stack.roles["query"] == stack.roles["key"] == stack.roles["value"] == ("attn.c_attn",)
    paths = {stack.role_paths(r, 0)[0] for r in ("query", "attention_output")}
    calls = {p: (i, o) for p, i, o in run(model, "gpt2", paths)}
    q, k, v = (
        x.reshape(2, -1, HEADS, WIDTH // HEADS).transpose(1, 2)
        for x in calls[stack.role_paths("query", 0)[0]][1].split(WIDTH, -1)
    )
    wanted = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    got = calls[stack.role_paths("attention_output", 0)[0]][0].reshape(2, -1, HEADS, WIDTH // HEADS).transpose(1, 2)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in STACKED if n not in fixtures.VISION])
def test_causal_flag_agrees_with_what_the_first_position_sees(name):
    model = tiny(name)
    inputs = tiny_inputs(name)
    for stack in find_stacks(model):
        if stack.name == "vision":
            assert not stack.causal
            continue
        key = "decoder_input_ids" if stack.name == "decoder" and name in fixtures.SEQ2SEQ else "input_ids"
        changed = {**inputs, key: inputs[key].clone()}
        changed[key][:, -1] = (changed[key][:, -1] + 1) % 64 + 5
        last = {stack.block_paths[-1]}
        before, after = (run(model, name, last, **x)[-1][2] for x in (inputs, changed))
        unmoved = torch.equal(before[:, 0], after[:, 0])
        assert unmoved == stack.causal
        assert not torch.equal(before[:, -1], after[:, -1])


@pytest.mark.parametrize("name", [n for n in STACKED if n != "clip"])
def test_hooks_on_the_blocks_equal_the_hidden_states_that_transformers_gives(name):
    """All of them; the last one only up to the final norm, which transformers has already applied."""
    model = tiny(name)
    for stack in find_stacks(model):
        calls = run(model, name, set(stack.block_paths))
        states = [calls[0][1], *(out for _, _, out in calls)]
        output = model(**tiny_inputs(name), output_hidden_states=True)
        kind = f"{stack.name}_hidden_states" if name in fixtures.SEQ2SEQ else "hidden_states"
        given = output[kind]
        assert len(given) == stack.num_blocks + 1
        normed = name in ("t5", "mbart", *fixtures.DECODERS, "modernbert")
        for ours, theirs in zip(states[: -1 if normed else None], given[: -1 if normed else None], strict=True):
            torch.testing.assert_close(ours.reshape(theirs.shape), theirs, rtol=0, atol=0)
        if normed:
            assert stack.final_norm is not None
            last = model.get_submodule(stack.final_norm)(states[-1]).reshape(given[-1].shape)
            torch.testing.assert_close(last, given[-1], rtol=1e-6, atol=1e-6)
            assert not torch.allclose(states[-1].reshape(given[-1].shape), given[-1], atol=1e-3)


@pytest.mark.parametrize("name", STACKED)
def test_final_norm_is_called_on_the_last_block_or_absent(name):
    model = tiny(name)
    for stack in find_stacks(model):
        assert (stack.final_norm is not None) == stack.pre_norm
        if stack.final_norm is None:
            continue
        calls = run(model, name, {stack.final_norm, stack.block_paths[-1]})
        seen = next(given for path, given, _ in calls if path == stack.final_norm)
        block = next(out for path, _, out in calls if path == stack.block_paths[-1])
        if name == "clip" and stack.name == "vision":
            block = block[:, 0]  # its norm is for the pooled patch only
        assert torch.equal(seen.reshape(block.shape), block)


POST_NORM = {"bert", "roberta", "distilbert", "electra", "albert", "albert-groups", "deberta-v2", "mpnet", "bart"}


@pytest.mark.parametrize("name", STACKED)
def test_pre_norm_and_biases_are_those_of_the_architecture(name):
    for stack in find_stacks(tiny(name)):
        assert stack.pre_norm == (name not in POST_NORM)
        if name in ("llama", "gemma2", "olmo2", "mixtral", "t5", "modernbert"):
            assert not stack.has_biases
            assert stack.bias_roles == ()
        elif name == "qwen2":
            assert stack.has_biases
            assert stack.bias_roles == ("query", "key", "value")
        else:
            assert set(stack.bias_roles) == set(stack.roles)


def test_albert_blocks_are_virtual_and_share_one_module():
    (stack,) = find_stacks(tiny("albert"))
    assert stack.shared
    assert len(set(stack.block_paths)) == 1
    (groups,) = find_stacks(tiny("albert-groups"))
    assert [p[-1] for p in groups.block_paths] == ["0", "0", "1", "1"]
    assert not find_stacks(tiny("bert"))[0].shared


@pytest.mark.parametrize(("name", "path"), [("swin", "encoder.layers"), ("convnext", "encoder.stages")])
def test_stages_of_changing_width_are_refused_and_one_stage_can_be_named(name, path):
    model = tiny(name)
    with pytest.raises(ModelError, match=rf"{path}.*stages \(of width 8, 16\).*stack="):
        find_stacks(model)
    stage = {"swin": "encoder.layers.1.blocks", "convnext": "encoder.stages.1.layers"}[name]
    stack = stack_at(model, stage)
    assert (stack.num_blocks, stack.width, stack.name) == (2, 16, "vision")
    assert [p for p, *_ in run(model, name, set(stack.block_paths))] == list(stack.block_paths)


def test_model_with_one_block_is_found():
    assert find_stacks(tiny("bert", num_hidden_layers=1))[0].num_blocks == 1


def test_decoder_made_of_bert_has_cross_attention():
    from transformers import BertModel

    with torch.random.fork_rng():
        model = BertModel(fixtures.tiny_config("bert", is_decoder=True, add_cross_attention=True)).eval()
    (stack,) = find_stacks(model)
    assert stack.name == "decoder"
    assert stack.causal
    assert stack.roles["cross_query"] == ("crossattention.self.query",)
    assert stack.cross_branch == "crossattention.output.dense"


def test_gpt2_cross_attention_keeps_its_fused_key_and_value_apart_from_its_query():
    (stack,) = find_stacks(tiny("gpt2", add_cross_attention=True))
    assert stack.roles["cross_query"] == ("crossattention.q_attn",)
    assert stack.roles["cross_key"] == stack.roles["cross_value"] == ("crossattention.c_attn",)
    assert stack.roles["cross_attention_norm"] == ("ln_cross_attn",)
    assert stack.roles["output_norm"] == ("ln_2",)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
def test_adapter_wrapped_model_gives_the_same_roles():
    from peft import LoraConfig, get_peft_model

    base = find_stacks(tiny("bert"))[0]
    with torch.random.fork_rng():
        wrapped = get_peft_model(tiny("bert"), LoraConfig(target_modules=["query", "value"], r=2))
    (stack,) = find_stacks(wrapped)
    assert stack.roles == base.roles
    assert stack.path == f"base_model.model.{base.path}"


def plain(norm_first: bool) -> nn.Module:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.tower = nn.ModuleList(
                nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first) for _ in range(2)
            )

    return Plain().eval()


@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_encoder_layers_are_found_without_roles_inside_their_attention(norm_first):
    stack: Stack = find_stacks(nn.Sequential(plain(norm_first), nn.Linear(8, 2)))[0]
    assert (stack.path, stack.width, stack.num_heads) == ("0.tower", 8, 2)
    assert "query" not in stack.roles
    assert (stack.attention_branch, stack.feed_forward_branch) == ("self_attn", "linear2")
    assert (stack.roles["intermediate"], stack.roles["output"]) == (("linear1",), ("linear2",))
    assert (stack.roles["attention_norm"], stack.roles["output_norm"]) == (("norm1",), ("norm2",))
    assert stack.pre_norm is norm_first


def test_plain_module_needs_its_stack_named():
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))))
    with pytest.raises(ModelError, match=r"No stack of blocks in Sequential.*Name the list"):
        find_stacks(net)
    stack = stack_at(net, "1")
    assert stack.block_paths == ("1.0", "1.1", "1.2")
    assert (stack.name, stack.width, stack.attention_branch) == ("encoder", 4, None)


def test_wrong_stack_path_says_what_there_is():
    model = tiny("bert")
    with pytest.raises(
        ModelError, match=r"no module 'encoder\.layers'\. Did you mean 'encoder\.layer'.*lists of modules"
    ):
        stack_at(model, "encoder.layers")
    with pytest.raises(ModelError, match="is a BertPooler"):
        stack_at(model, "pooler")
