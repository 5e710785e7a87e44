"""Layers without softmax: their calls against the recurrence itself, written out densely in float64."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from checkpoints import DIFFUSION
from reference import reference
from surveys import layers_on, meaning_on
from torch import Tensor, nn

from diag.attention.call import AttentionCall
from diag.attention.pattern import pattern_rows
from diag.attention.value_spread import ANCHORS
from diag.errors import MeasurementError, UserError
from diag.metrics.default import METRICS, per_input
from diag.models.hooks.depth import BESIDE
from diag.models.hooks.linear import FunctionMixing, Mixing, Role, mixers_told, role_of
from diag.models.hooks.seam import attention_calls
from diag.models.hooks.seen import EVERYTHING, NOT_LINEAR, REASONS
from diag.run.api import probe

TOKENS = 11
Given = Mapping[str, Any]
Dense = Callable[[Given], Tensor]
"""The weights of a recurrence from its arguments, `[batch, head, token, token]`, or where each channel has
its own `[batch, channel, token, token]`."""


def double(given: Given, *names: str) -> list[Tensor]:
    return [given[name].detach().double() for name in names]


def delta_rule(given: Given) -> Tensor:
    """S ← e^g S, S ← S + β k (v − kᵀS)ᵀ, y = qᵀS/√d; g of each token, or of each channel of keys."""
    query, key, g, beta = double(given, "query", "key", "g", "beta")
    batch, tokens, heads = given["value"].shape[:3]
    query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    query, key = (x.repeat_interleave(heads // x.shape[2], 2) for x in (query, key))
    decay = (g[..., None].expand(key.shape) if g.ndim == 3 else g).exp()
    found = torch.zeros(batch, heads, tokens, tokens, dtype=torch.float64)
    for j in range(tokens):
        read = key[:, j] * beta[:, j, :, None]  # what is left of the value of j, as it is read by a key
        for i in range(j, tokens):
            if i > j:
                read = read * decay[:, i]
                own = (key[:, i] * read).sum(-1, keepdim=True)
                read = read - beta[:, i, :, None] * key[:, i] * own
            found[:, :, i, j] = (query[:, i] * read).sum(-1) / query.shape[-1] ** 0.5
    return found


def state_space(given: Given) -> Tensor:
    """h ← e^{A dt} h + dt B x, y = C·h + D x, of heads (Mamba-2)."""
    dt, a, b, c, skip, bias = double(given, "dt", "A", "B", "C", "D", "dt_bias")
    dt = F.softplus(dt + bias).clamp(*given["dt_limit"]).transpose(1, 2)  # [batch, head, token]
    b, c = (x.repeat_interleave(dt.shape[1] // x.shape[2], 2).transpose(1, 2) for x in (b, c))
    passed = (a[:, None] * dt).cumsum(-1)
    decay = (passed[..., :, None] - passed[..., None, :]).exp().tril()
    return c @ b.transpose(-1, -2) * decay * dt[..., None, :] + torch.eye(TOKENS) * skip[:, None, None]


def state_space_of_channels(given: Given) -> Tensor:
    """The same of channels with A of each state (Mamba)."""
    dt, a, b, c, skip, bias = double(given, "dt", "A", "B", "C", "D", "delta_bias")
    dt = F.softplus(dt + bias[:, None])  # [batch, channel, token]
    passed = a[:, :, None] * dt[:, :, None].cumsum(-1)  # [batch, channel, state, token]
    decay = (passed[..., :, None] - passed[..., None, :]).exp().tril()
    weights = torch.einsum("bni,bnj,bcnij->bcij", c, b, decay) * dt[..., None, :]
    return weights + torch.eye(TOKENS) * skip[:, None, None]


def rwkv(given: Given) -> Tensor:
    """Σ_j e^{k_j + (i-j-1) w} v_j with u in the place of −w for oneself, over the sum of its weights."""
    key, decay, first = double(given, "key", "time_decay", "time_first")
    place = torch.arange(TOKENS)
    ago = place[:, None] - place - 1
    scores = key.transpose(1, 2)[:, :, None, :] - decay.exp()[:, None, None] * ago
    scores = torch.where(ago == -1, (key + first).transpose(1, 2)[:, :, None, :], scores)
    return scores.masked_fill(ago < -1, -torch.inf).softmax(-1)


def gated_recurrence(given: Given) -> Tensor:
    """h ← a h + x, y = h, of channels (Griffin)."""
    gate = (given["recurrent_gate"] * ~given["reset"]).double().transpose(1, 2)  # [batch, channel, token]
    found = torch.zeros(*gate.shape, TOKENS, dtype=torch.float64)
    for j in range(TOKENS):
        found[..., j:, j] = torch.cat([torch.ones_like(gate[..., :1]), gate[..., j + 1 :].cumprod(-1)], -1)
    return found


def relu_attention(given: Given) -> Tensor:
    """relu(q)·relu(k) over its sum (EfficientViT); the arguments are behind the relu."""
    query, key = double(given, "q", "k")
    weights = query @ key.transpose(-1, -2)
    return weights / (weights.sum(-1, keepdim=True) + 1e-5)


def mlstm(given: Given) -> Tensor:
    """q·k/√d e^{F_i - F_j + i_j - m_i} over its sum, or over e^{-m_i} if that is more."""
    query, key, gain, forget = double(given, "query", "key", "igate", "fgate")
    passed = F.logsigmoid(forget).cumsum(-1)
    exponent = passed[..., :, None] - passed[..., None, :] + gain[..., None, :]
    exponent = exponent.masked_fill(torch.ones(TOKENS, TOKENS).triu(1) > 0, -torch.inf)
    most = torch.maximum(exponent.amax(-1, keepdim=True), passed[..., None])
    weights = query @ key.transpose(-1, -2) / key.shape[-1] ** 0.5 * (exponent - most).exp()
    return weights / (torch.maximum(weights.sum(-1, keepdim=True).abs(), (-most).exp()) + 1e-6)


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"vocab_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
KINDS = {"layer_types": ["linear_attention", "full_attention"]}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
DELTA |= {"linear_value_head_dim": 12} | KINDS
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
EACH = {"num_key_value_heads": 4}
ALONE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}

MODELS: dict[str, tuple[dict[str, Any], Dense]] = {
    "Qwen3Next": (
        SMALL | DELTA | EXPERTS | {"head_dim": 8, "shared_expert_intermediate_size": 16},
        delta_rule,
    ),
    "Qwen3_5Text": (SMALL | DELTA | {"head_dim": 8}, delta_rule),
    "OlmoHybrid": (SMALL | DELTA | {"linear_num_key_heads": 4}, delta_rule),
    "KimiLinear": (
        SMALL
        | LATENT
        | EXPERTS
        | KINDS
        | {"linear_num_heads": 4, "linear_head_dim": 8, "q_lora_rank": None}
        | EACH,
        delta_rule,
    ),
    "Bamba": (SMALL | MAMBA2 | {"attn_layer_indices": [1]}, state_space),
    "Zamba2": (
        SMALL
        | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "mamba", "hybrid", "mamba"]}
        | {"hybrid_layer_ids": [2], "num_mem_blocks": 1, "adapter_rank": 4}
        | {"n_mamba_heads": 4, "mamba_d_state": 8, "mamba_ngroups": 2},
        state_space,
    ),
    "GraniteMoeHybrid": (
        SMALL | MAMBA2 | {"layer_types": ["mamba", "attention"], "num_local_experts": 0},
        state_space,
    ),
    "NemotronH": (
        SMALL
        | {"layers_block_type": ["mamba", "attention"], "head_dim": 8, "mamba_num_heads": 4}
        | {"mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2},
        state_space,
    ),
    "Mamba2": (ALONE | {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2}, state_space),
    "Mamba": (ALONE | {"state_size": 4}, state_space_of_channels),
    "FalconMamba": (ALONE | {"state_size": 4}, state_space_of_channels),
    "Jamba": (
        SMALL
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}
        | {"mamba_d_state": 4, "mamba_dt_rank": 2},
        state_space_of_channels,
    ),
    "Rwkv": (ALONE | {"context_length": 64}, rwkv),
    "xLSTM": (ALONE | {"num_heads": 2, "mode": "inference"}, mlstm),
    "RecurrentGemma": (
        SMALL | {"lru_width": 32, "head_dim": 8, "block_types": ["recurrent", "attention"]},
        gated_recurrence,
    ),
}


def ids(tokens: int = TOKENS) -> Tensor:
    return torch.randint(1, 64, (2, tokens), generator=torch.Generator().manual_seed(1))


def model_of(name: str) -> nn.Module:
    """Random weights that are not at their start, at which all of a channel's decays are alike."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name][0])
    module = transformers.AutoModel.from_config(config).eval()
    for path, parameter in module.named_parameters():
        if path.endswith(".D"):  # y is not so near to D v that nothing but rounding is left beside it
            nn.init.normal_(parameter, std=0.01)
        elif path.endswith(("A_log", "dt_bias", "time_decay", "time_first", "recurrent_param")):
            nn.init.normal_(parameter, std=0.3)
        elif parameter.ndim == 2:
            parameter.data.mul_(4)
    module.config.use_cache = False
    return module


def seen_in(module: nn.Module, given: Tensor, called: str) -> tuple[AttentionCall, Mixing, str]:
    """The first call of a layer without softmax, the recurrence behind it, and what the layer's V is."""
    layers = [layer for layer in layers_on(module, given) if layer.form.mixer == "linear"]
    mixings, calls = list[Mixing](), list[AttentionCall]()

    def told(mixing: Mixing) -> Any:
        mixings.append(mixing)
        return mixing.run()[0]

    with torch.inference_mode():
        plain = module(given)
        with attention_calls(layers, calls.append):
            watched = module(given)
        with mixers_told([layers[0].module], told):
            module(given)
    one, other = (x if isinstance(x, Tensor) else x[0] for x in (plain, watched))
    assert torch.equal(one, other)
    assert layers[0].form.recurrence is not None
    assert called in layers[0].form.recurrence.called
    return calls[0], mixings[0], layers[0].form.value_from


def weighed(weights: Tensor, value: Tensor) -> Tensor:
    """A V; one head whose channels have weights of their own is `[batch, 1, token, channel]`."""
    value = value.double()
    if weights.shape[1] == value.shape[1]:
        return weights @ value
    return (weights @ value[:, 0].transpose(1, 2)[..., None])[..., 0].transpose(1, 2)[:, None]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_the_recurrence_of_the_values(name: str) -> None:
    model, dense = model_of(name), MODELS[name][1]
    call, mixing, value_from = seen_in(model, ids(), "")
    assert isinstance(mixing, FunctionMixing)
    assert (call.query, call.key, call.pattern, call.maps) == (None, None, None, ())
    assert (call.has_pattern, call.causal, call.tokens, call.batch) == (False, True, TOKENS, 2)
    weights = dense(mixing.bound.arguments)
    assert not weights.triu(1).any()
    torch.testing.assert_close(call.output.double(), weighed(weights, call.value), rtol=1e-4, atol=1e-6)
    # a convolution, or the token before, is in front of the values
    assert value_from == ("own" if name == "xLSTM" else "mixed")
    if weights.shape[1] == call.heads:
        assert_metrics_are_those_of(call, weights)


def assert_metrics_are_those_of(call: AttentionCall, weights: Tensor) -> None:
    everything = [list(range(call.tokens))] * call.batch
    measured = per_input(call)
    expected = reference(replace(call, pattern=weights), anchors=everything)
    # the uniform null is of the values and of which of them are seen, whatever the weights are
    seen = torch.ones_like(weights).tril() if call.causal else torch.ones_like(weights)
    uniform = replace(call, pattern=seen / seen.sum(-1, keepdim=True))
    expected["cos_y_vuniform"] = reference(uniform, anchors=everything)["cos_y_vuniform"]
    for name, numbers in measured.items():
        if METRICS[name].of_weights:
            assert numbers.isnan().all(), name
        elif call.tokens <= ANCHORS or "partial" not in name:
            # where y is nearly parallel to v, what is left of it is known to fewer digits
            atol = 2e-4 if "exclusive" in name else 2e-5
            np.testing.assert_allclose(numbers, expected[name], rtol=1e-4, atol=atol, err_msg=name)
    assert {name for name in measured if METRICS[name].of_weights} == {
        *("self_part", "context_part", "self_weight", "self_weight_ratio", "first_weight"),
        *("entropy", "entropy_p15", "entropy_normalized", "effective_keys"),
    }


def lightning(model: nn.Module, given: Tensor) -> tuple[AttentionCall, Tensor, Tensor]:
    """A lightning layer's call, and its values and weights by its formula: q·k e^{-slope (i-j)}."""
    (layer,) = (layer for layer in layers_on(model, given) if layer.form.mixer == "linear")
    calls, read = list[AttentionCall](), list[Tensor]()
    kept = layer.module.register_forward_pre_hook(
        lambda _, args, kwargs: read.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    with attention_calls([layer], calls.append), torch.inference_mode():
        model(given)
    kept.remove()
    qkv = F.silu(F.linear(read[0].double(), layer.module.qkv_proj.weight.double()))
    query, key, value = qkv.unflatten(-1, (4, 24)).transpose(1, 2).split(8, -1)
    place = torch.arange(TOKENS)
    decay = (-layer.module.slope_rate.double() * (place[:, None] - place)).exp().tril()
    return calls[0], value, query @ key.transpose(-1, -2) * decay


def minimax() -> nn.Module:
    torch.manual_seed(0)
    kinds = ["full_attention", "linear_attention"]
    config = SMALL | {"head_dim": 8, "block_size": 4, "num_local_experts": 2, "num_experts_per_tok": 1}
    return transformers.MiniMaxModel(transformers.MiniMaxConfig(**config, layer_types=kinds)).eval()


def test_lightning_attention_is_written_out_in_its_forward() -> None:
    call, value, weights = lightning(minimax(), ids())
    torch.testing.assert_close(call.value.double(), value.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(call.output.double(), (weights @ value).detach(), rtol=1e-4, atol=1e-6)
    assert_metrics_are_those_of(call, weights.detach())


def test_linear_attention_of_a_diffusion_transformer_is_written_out_in_its_processor() -> None:
    """relu(q)·relu(k) over its sum, of Sana; the attention over text beside it is none of the layers."""
    name, sizes = DIFFUSION["sana"]
    torch.manual_seed(0)
    model, latents = getattr(diffusers, name)(**sizes).eval(), torch.randn(2, 4, 4, 4)
    given = {"encoder_hidden_states": torch.randn(2, 7, 32), "timestep": torch.tensor([500.0, 500.0])}
    layers, calls, read = layers_on(model, latents, **given), list[AttentionCall](), list[Tensor]()
    assert [layer.path for layer in layers] == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    (layer, _) = layers
    kept = layer.module.register_forward_pre_hook(lambda _, args: read.append(args[0].double()))
    with attention_calls([layer], calls.append), torch.no_grad():
        model(latents, **given)
    kept.remove()
    exact = copy.deepcopy(layer.module).double()
    query, key, value = (
        part(read[0]).unflatten(-1, (2, 8)).transpose(1, 2).detach()
        for part in (exact.to_q, exact.to_k, exact.to_v)
    )
    weights = query.relu() @ key.relu().transpose(-1, -2)
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(calls[0].value.double(), value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(calls[0].output.double(), weights @ value, rtol=1e-4, atol=1e-6)
    assert (calls[0].causal, layer.form.value_from) == (False, "own")
    assert_metrics_are_those_of(calls[0], weights)


def test_relu_attention_over_images_sees_all_tokens_and_its_ones_are_no_values() -> None:
    torch.manual_seed(0)
    model = timm.create_model("efficientvit_b0").eval()
    call, mixing, value_from = seen_in(model, torch.randn(2, 3, 128, 128), "LiteMLA._attn")
    assert isinstance(mixing, FunctionMixing)
    assert (call.causal, call.tokens, call.value.shape[-1], value_from) == (False, 64, 16, "mixed")
    weights = relu_attention(mixing.bound.arguments)
    torch.testing.assert_close(call.output.double(), weights @ call.value.double(), rtol=1e-4, atol=1e-5)
    assert_metrics_are_those_of(call, weights)


# --- what a library that is not here calls, and what is no recurrence


def chunk_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, None]:
    """Gated linear attention in the manner of its libraries, `[batch, token, head, dim]`, and a state."""
    passed = g.cumsum(1).transpose(1, 2)
    decay = (passed[..., :, None] - passed[..., None, :]).exp().tril()
    return torch.einsum("bhij,bjhd->bihd", torch.einsum("bihd,bjhd->bhij", q, k) * decay, v), None


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Softmax attention that cannot be looked into, but by its name."""
    return torch.einsum("bihd,bjhd,bjhe->bihe", q, k, v)


def unnamed(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Softmax attention under a name that says nothing."""
    return torch.einsum("bhij,bjhd->bihd", torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1), v)


def squared_scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Called a recurrence, and not linear in its values."""
    return chunk_gla(q, k, v.square(), g)[0]


def mixed_scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """A recurrence over values that the module has mixed before."""
    return chunk_gla(q, k, v, g)[0]


class Mixer(nn.Module):
    """A layer that hands queries, keys, values and decays to a function, by its name."""

    def __init__(self, function: str, heads: int = 3) -> None:
        super().__init__()
        self.function, self.heads = function, heads
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        v = v.cumsum(1) if self.function == "mixed_scan" else v
        y = globals()[self.function](q, k, v, -q[..., 0].square())
        return self.out((y[0] if isinstance(y, tuple) else y).flatten(2))


@pytest.mark.parametrize("heads", [1, 3, 8])
def test_a_function_is_known_by_its_arguments(heads: int) -> None:
    """With as many tokens as heads, too, and where these are one."""
    module, x = (
        nn.Sequential(Mixer("chunk_gla", heads), Mixer("chunk_gla", heads)).eval(),
        torch.randn(2, 8, 24),
    )
    layers, calls = layers_on(module, x), list[AttentionCall]()
    assert [(layer.path, layer.form.mixer, layer.form.value_from) for layer in layers] == [
        ("0", "linear", "own"),
        ("1", "linear", "own"),
    ]
    with attention_calls(layers, calls.append) as sightings, torch.inference_mode():
        module(x)
    q, k, v = module[0].qkv(x).unflatten(-1, (3, heads, -1)).unbind(2)
    y, _ = chunk_gla(q, k, v, -q[..., 0].square())
    assert torch.equal(calls[0].value, v.transpose(1, 2))
    assert torch.equal(calls[0].output, y.transpose(1, 2))
    assert sightings.projection == {"0": "as captured", "1": "as captured"}


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("flash_attn_func", "Mixer made no self-attention call"),
        ("squared_scan", f"no layer attends to its own tokens ({REASONS[NOT_LINEAR]})"),
        ("mixed_scan", f"no layer attends to its own tokens ({REASONS[EVERYTHING]})"),
    ],
)
def test_what_is_no_recurrence_over_own_values_is_refused(function: str, why: str) -> None:
    with pytest.raises(UserError) as told:
        layers_on(Mixer(function).eval(), torch.randn(2, 21, 24))
    assert str(told.value).startswith(why)


def test_a_softmax_inside_is_a_softmax_whatever_it_is_called() -> None:
    (layer,) = layers_on(Mixer("unnamed").eval(), torch.randn(2, 21, 24))
    assert (layer.form.mixer, layer.form.value_from) == ("softmax", "own")


def test_roles_are_read_off_arguments() -> None:
    def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor) -> None: ...

    def chunk_rwkv(r: Tensor, k: Tensor, v: Tensor, w: Tensor) -> None: ...

    def rotated(q: Tensor, k: Tensor, cos: Tensor) -> None: ...

    def eager_attention_forward(query: Tensor, key: Tensor, value: Tensor) -> None: ...

    def selective_state_update(
        state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor
    ) -> None: ...

    assert role_of(selective_scan) == Role("u", gate="z", channels_first=True)
    assert role_of(chunk_rwkv) == role_of(chunk_gla) == Role("v")
    assert [role_of(one) for one in (rotated, eager_attention_forward, selective_state_update)] == [None] * 3


# --- what is done to the call


@pytest.mark.parametrize("name", ["Qwen3Next", "Mamba", "MiniMax"])
def test_an_intervention_changes_what_the_model_goes_on_with(name: str) -> None:
    """Also behind a gate that the recurrence itself applies (Mamba)."""
    model = minimax() if name == "MiniMax" else model_of(name)
    layer = next(layer for layer in layers_on(model, ids()) if layer.form.mixer == "linear")
    read = dict[str, Tensor]()
    projection = layer.module.out_proj
    with torch.inference_mode():
        plain = model(ids())[0]
        with attention_calls([layer], lambda call: call.output.clone()):
            same = model(ids())[0]
        kept = projection.register_forward_pre_hook(lambda _, args: read.update(x=args[0]))
        with attention_calls([layer], lambda call: torch.zeros_like(call.output)):
            model(ids())
        kept.remove()
    torch.testing.assert_close(same, plain)
    assert not read["x"].any()


def test_what_needs_a_softmax_changes_the_layers_that_have_one() -> None:
    """Where no layers are named; a layer without softmax that is named is refused."""
    model, given = model_of("Qwen3Next"), [{"input_ids": ids()}]
    plain, *changed = (
        probe(model, given, metrics=["cos_y_vself"], intervene=edit).layers.set_index("layer")["mean"]
        for edit in ([], ["gated"], ["mask_self"], ["uniform"], ["xsa"])
    )
    for gone in changed[:2]:
        assert gone[0] == plain[0]
    assert changed[1][1] != plain[1]
    assert (changed[2] != plain).all()
    np.testing.assert_allclose(changed[3], 0, atol=1e-6)
    with pytest.raises(MeasurementError, match=r"'layers.0.linear_attn' has no softmax: there is no A_ii"):
        probe(model, given, metrics=["cos_y_vself"], intervene=["mask_self:0"])


def test_functions_are_put_back_also_by_threads_that_overlap_and_after_an_error() -> None:
    space, before = globals(), chunk_gla
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with mixers_told([Mixer("chunk_gla")], lambda mixing: mixing.run()[0]):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)

    def fails() -> None:
        with mixers_told([Mixer("chunk_gla")], lambda mixing: mixing.run()[0]):
            thread.start()
            inside.wait(10)
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fails()
    assert space["chunk_gla"] is not before  # another thread is still watching
    q = torch.randn(1, 4, 2, 3)
    assert torch.equal(space["chunk_gla"](q, q, q, q[..., 0])[0], before(q, q, q, q[..., 0])[0])
    leave.set()
    thread.join()
    assert space["chunk_gla"] is before


def test_weights_are_asked_in_vain() -> None:
    module, x = Mixer("chunk_gla").eval(), torch.randn(2, 8, 24)
    calls = list[AttentionCall]()
    with attention_calls(layers_on(module, x), calls.append):
        module(x)
    with pytest.raises(MeasurementError) as told:
        pattern_rows(calls[0])
    assert str(told.value) == "layer '' has no softmax, and so no attention weights"
    assert told.value.tip == "choose a layer whose mixer is softmax"


# --- hybrids


def test_a_mixer_beside_attention_in_its_block_holds_no_place() -> None:
    torch.manual_seed(0)
    config = transformers.FalconH1Config(**SMALL, **MAMBA2, mamba_d_ssm=64)
    (tower,) = meaning_on(transformers.FalconH1Model(config).eval(), ids(), use_cache=False).towers
    assert [(layer.index, layer.path, layer.form.mixer) for layer in tower.layers] == [
        (0, "layers.0.self_attn", "softmax"),
        (1, "layers.1.self_attn", "softmax"),
    ]
    assert tower.skipped == {f"layers.{i}.mamba": BESIDE for i in range(2)}


class Both(Mixer):
    """Attention and a recurrence side by side in one module (Hymba), in either order."""

    def __init__(self, order: str, queries: int | None = None) -> None:
        super().__init__("chunk_gla")
        self.order, self.queries = order, queries
        self.norms = nn.ModuleList([nn.LayerNorm(24), nn.LayerNorm(24)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        made = dict[str, Tensor]()
        for what in self.order.split():
            if what == "recurrence":
                made[what] = chunk_gla(q, k, v, -q[..., 0].square())[0]
            else:
                query, key, value = (each.transpose(1, 2) for each in (q[:, : self.queries], k, v))
                if what == "attention":
                    y = F.scaled_dot_product_attention(query, key, value)
                else:
                    y = (query @ key.mT * 8**-0.5).softmax(-1) @ value
                made[what] = y.transpose(1, 2)
        return x + self.out(
            sum(norm(y.flatten(2)) for norm, y in zip(self.norms, made.values(), strict=True))
        )


@pytest.mark.parametrize("order", ["attention recurrence", "recurrence attention", "recurrence eager"])
def test_a_mixer_beside_attention_in_one_module_is_named(order: str) -> None:
    """What is measured of the layer is its attention, also where others of the model are recurrences."""
    torch.manual_seed(0)
    module, x = nn.Sequential(Both(order), Mixer("chunk_gla"), Both(order)).eval(), torch.randn(2, 9, 24)
    found = probe(module, [x], metrics=["cos_y_vself"], batch_size=1)
    assert list(found.layers["mixer"]) == ["softmax", "linear", "softmax"]
    assert found.skipped == {f"{i} (chunk_gla)": BESIDE for i in (0, 2)}
    stream = x.double()
    for number, layer in enumerate(copy.deepcopy(module).double()):
        q, k, v = layer.qkv(stream).unflatten(-1, (3, 3, 8)).unbind(2)
        y = chunk_gla(q, k, v, -q[..., 0].square())[0].transpose(1, 2)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        y, first = (y, 1) if number == 1 else ((q @ k.mT * 8**-0.5).softmax(-1) @ v, 0)
        expected = F.cosine_similarity(y, v, dim=-1)[..., first:].mean().item()
        assert found.layers["mean"][number] == pytest.approx(expected, abs=1e-5)
        stream = layer(stream)


def test_a_mixer_beside_attention_of_one_query_is_the_layer() -> None:
    orders = ("attention recurrence", "recurrence attention")
    module = nn.Sequential(*(Both(order, queries=1) for order in orders)).eval()
    assert [layer.form.mixer for layer in layers_on(module, torch.randn(2, 9, 24))] == ["linear", "linear"]


def test_padding_on_either_side_is_no_partner() -> None:
    """The numbers of a text are the same alone and in a batch."""
    model, texts = model_of("Qwen3Next"), torch.cat([ids(), ids().flip(1)])
    real = torch.ones_like(texts)
    real[1, :4], real[2, 7:] = 0, 0
    whole = probe(model, [{"input_ids": texts, "attention_mask": real}]).samples
    for number in range(4):
        alone = probe(model, [{"input_ids": texts[number : number + 1, real[number].bool()]}]).samples
        both = [
            frame.set_index(["layer", "head", "metric"])["value"].sort_index()
            for frame in (whole[whole["input_index"] == number], alone)
        ]
        np.testing.assert_allclose(*both, atol=2e-5)


def test_a_hybrid_has_numbers_of_both_kinds_and_gaps() -> None:
    found = probe(
        model_of("Bamba"), [{"input_ids": ids()}], metrics=["default", "first_key_received", "row_sum"]
    )
    layers = found.layers.drop_duplicates("layer").set_index("layer")
    assert list(layers["mixer"]) == ["linear", "softmax"]
    assert (found.skipped, np.isnan(layers["row_sum"][0]), layers["row_sum"][1]) == ({}, True, 1.0)
    undefined = found.layers[(found.layers["layer"] == 0) & found.layers["mean"].isna()]
    assert {*undefined["metric"]} == {
        *(name for name, metric in METRICS.items() if metric.of_weights),
        *("first_key_received", "row_sum"),
    }
    assert found.layers[found.layers["layer"] == 1]["mean"].notna().all()
