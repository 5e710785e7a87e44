"""Trainable variants: against a dense reference, against interventions, and against the libraries."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel, Lfm2Config, Lfm2Model, LlamaConfig, LlamaForCausalLM

from diag.errors import UserError
from diag.models.families.demo import build_vit
from diag.models.hooks.depth import stacks_of
from diag.models.hooks.interventions import parse as parse_edit
from diag.models.hooks.layers import attention_modules
from diag.models.hooks.seam import attention_calls
from diag.variants import (
    METADATA,
    alphas,
    apply,
    attention_layers,
    layer_numbers,
    parse,
    restore,
    variants_in,
)
from diag.variants.formulas import BALANCE, CHANGES, Broadcast, Sizes, mean_of_visible

OPEN_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 64, "heads": 2, "layers": 2},
}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SMALL = IMAGES[:, :, :32, :32].contiguous()
WORDS = torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(0))
FORMS = (
    *("xsa", "gated_xsa", "gated_xsa=sigmoid", "random_direction", "matched_direction"),
    *("gated", "gated=headwise", "cb", "cb_s"),
    *("affine", "affine=sigmoid", "mixture_of_heads", "mixture_of_heads=0.5"),
)
SAME_AT_START = ("gated_xsa", "cb_s")
"""Variants that are the baseline until something is learned."""


def vit() -> nn.Module:
    return build_vit(16)


def clip() -> nn.Module:
    return CLIP(**OPEN_CLIP)


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False)
    return GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, use_cache=False, **sizes)
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa")


def visual(model: Any) -> nn.Module:
    return model.visual if isinstance(model, CLIP) else model


Case = tuple[Callable[[], nn.Module], Callable[[Any], Tensor]]
CASES: dict[str, Case] = {
    "timm": (vit, lambda model: model(IMAGES)),
    "open_clip": (clip, lambda model: model.encode_image(SMALL)),
    "gpt2": (gpt2, lambda model: model(WORDS).logits),
    "llama": (llama, lambda model: model(WORDS).logits),
}


def built(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build().eval()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


# --- what the model computes ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
@pytest.mark.parametrize("text", SAME_AT_START)
def test_what_starts_at_zero_is_bit_identical_to_the_library(case: Case, text: str, mode: str) -> None:
    build, run = case
    plain, changed = built(build), built(build)
    apply(visual(changed), parse(text))
    with torch.inference_mode(mode == "inference"):
        # PyTorch's fused path for inference rounds otherwise: the library has two results itself
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            outputs = []
            for model in (plain, changed):
                torch.manual_seed(1)  # of dropout
                outputs.append(run(model.train(mode == "train")).detach())
            assert torch.equal(*outputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("text", sorted(set(FORMS) - set(SAME_AT_START)))
def test_the_others_change_something(case: Case, text: str) -> None:
    build, run = case
    plain, changed = built(build), built(build)
    apply(visual(changed), parse(text))
    with torch.inference_mode():
        assert (run(plain) - run(changed)).abs().max() > 1e-4


@pytest.mark.parametrize("layers", ["", ":1"])
def test_xsa_equals_the_intervention(case: Case, layers: str) -> None:
    build, run = case
    plain, changed = built(build), built(build)
    apply(visual(changed), parse(f"xsa{layers}"))
    edit = parse_edit(f"xsa{layers}")
    with torch.inference_mode():
        modules = attention_modules(visual(plain))
        with attention_calls(modules, lambda call: edit.output(call) if edit.at(call.layer) else None):
            wanted = run(plain)
        torch.testing.assert_close(run(changed), wanted, rtol=1e-4, atol=1e-5)


def test_gated_xsa_with_alpha_equals_the_intervention(case: Case) -> None:
    build, run = case
    plain, changed = built(build), built(build)
    apply(visual(changed), parse("gated_xsa"))
    for name, parameter in changed.named_parameters():
        if name.endswith("change.gate"):
            nn.init.constant_(parameter, torch.tensor(0.5).atanh().item())
    edit = parse_edit("gated_xsa=0.5")
    with torch.inference_mode():
        with attention_calls(attention_modules(visual(plain)), edit.output):
            wanted = run(plain)
        torch.testing.assert_close(run(changed), wanted, rtol=1e-4, atol=1e-5)
    found = alphas(visual(changed))
    assert sorted(found) == list(range(len(attention_modules(visual(plain)))))
    assert all(torch.allclose(alpha, torch.tensor(0.5)) for alpha in found.values())


def test_the_seam_sees_y_before_the_change(case: Case) -> None:
    build, run = case
    changed = built(build)
    apply(visual(changed), parse("xsa"))
    calls = []
    with torch.inference_mode(), attention_calls(attention_modules(visual(changed)), calls.append) as seen:
        run(changed)
    assert calls
    assert all(
        (call.output * call.value.repeat_interleave(call.group, 1)).sum(-1).abs().max() > 1e-4
        for call in calls
    )
    # open_clip's own forward hides its projection; ours shows it
    assert set(seen.projection.values()) == {"modified"}


def test_masks_are_those_of_multihead_attention() -> None:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(32, 4)
    changed = copy.deepcopy(plain)
    holder = nn.ModuleDict({"attn": changed})
    apply(holder, parse("gated_xsa"))
    x = torch.randn(6, 3, 32)
    causal = torch.full((6, 6), float("-inf")).triu(1)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    per_head = torch.rand(12, 6, 6) < 0.3
    per_head |= False
    per_head[:, :, 0] = False  # no row may be empty
    cases: list[dict[str, Any]] = [
        {},
        {"attn_mask": causal},
        {"attn_mask": causal != 0},
        {"attn_mask": causal, "is_causal": True},
        {"key_padding_mask": padding},
        {"attn_mask": causal != 0, "key_padding_mask": padding},
        {"attn_mask": per_head},
    ]
    for masks in cases:
        wanted = plain(x, x, x, need_weights=False, **masks)[0]
        torch.testing.assert_close(
            changed(x, x, x, need_weights=False, **masks)[0], wanted, atol=1e-6, rtol=1e-5
        )
    with pytest.raises(RuntimeError, match="need_weights=False"):
        changed(x, x, x)
    with pytest.raises(RuntimeError, match="query, key and value are one tensor"):
        changed(x, x.clone(), x, need_weights=False)


def test_a_pool_is_no_layer() -> None:
    """Its queries are not the tokens: there is no own value."""
    sizes = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}
    vision = OPEN_CLIP["vision_cfg"] | sizes
    model = CLIP(**{**OPEN_CLIP, "embed_dim": 64, "vision_cfg": vision})
    assert isinstance(model.visual.attn_pool.attn, nn.MultiheadAttention)
    assert len(apply(model.visual, parse("xsa"))) == 2
    with torch.inference_mode():
        assert torch.isfinite(model.encode_image(SMALL)).all()


# --- the changes by themselves -------------------------------------------------------------------------


def dense(name: str, y: Tensor, v: Tensor, x: Tensor, change: Any) -> Tensor:
    """The formulas, head by head and token by token, in float64."""
    result = torch.empty_like(y)
    batch, heads, tokens, _ = y.shape
    group = heads // v.shape[1]
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                own, value = y[b, h, t], v[b, h // group, t]
                norm = value.norm()
                unit = value / norm if norm > 0 else torch.zeros_like(value)
                if name in ("xsa", "gated_xsa"):
                    alpha = change.alpha[h] if name == "gated_xsa" else 1.0
                    result[b, h, t] = own - alpha * (own @ unit) * unit
                elif name == "random_direction":
                    direction = change.direction[h, 0].double()
                    result[b, h, t] = own - (own @ direction) * direction
                elif name == "matched_direction":
                    straight, cosine = own / own.norm(), own @ unit / own.norm()
                    beside = change.direction[h, 0].double()
                    beside = beside - (beside @ straight) * straight
                    turned = cosine * straight + (1 - cosine**2).sqrt() * beside / beside.norm()
                    result[b, h, t] = own - (own @ turned) * turned
                elif name == "affine":
                    score = change.scale[h] @ x[b, t]
                    alpha = score.sigmoid() if change.form == "sigmoid" else 0.1 * score.clip(-5, 5) + 0.5
                    beta = (change.running[h] - alpha) / tokens  # on every key
                    result[b, h, t] = alpha * own + beta * v[b, h // group].sum(0)
                elif name == "mixture_of_heads":
                    result[b, h, t] = own * head_gates(change.router @ x[b, t], change)[h]
                else:
                    gate = torch.sigmoid(change.gate @ x[b, t]).view(heads, -1)[h]
                    result[b, h, t] = own * gate
    return result


def head_gates(scores: Tensor, change: Any) -> list[float]:
    """Of one token: the heads that are always on, then the highest others; each group sums to n · w."""
    heads = len(scores) - 2
    on = list(range(change.always))
    on += sorted(range(len(on), heads), key=lambda head: -scores[head])[: change.chosen]
    split = scores[heads:].exp() / scores[heads:].exp().sum() * 2
    gates = [0.0] * heads
    for group, weight in ((on[: change.always], split[0]), (on[change.always :], split[1])):
        total = sum(scores[head].exp().item() for head in group)
        for head in group:
            gates[head] = weight.item() * len(group) * scores[head].exp().item() / total
    return gates


@pytest.mark.parametrize("text", [form for form in FORMS if not form.startswith("cb")])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_changes_equal_their_formulas(text: str, kv_heads: int) -> None:
    variant = parse(text)
    generator = torch.Generator().manual_seed(1)
    change: Any = CHANGES[variant.name](Sizes(12, 4, 8), variant.form, generator).double().eval()
    for drawn in (*change.parameters(), *(change.running for _ in "." if variant.name == "affine")):
        nn.init.normal_(drawn)
    y, v, x = (
        torch.randn(2, 4, 5, 8).double(),
        torch.randn(2, kv_heads, 5, 8).double(),
        torch.randn(2, 5, 12).double(),
    )
    v[0, 0, 1] = 0.0

    def mean() -> Tensor:
        return mean_of_visible(v, None, causal=False)

    with torch.no_grad():
        torch.testing.assert_close(
            change(y, v, x, mean), dense(variant.name, y, v, x, change), atol=1e-7, rtol=1e-6
        )
        half = change.float()(y.bfloat16(), v.bfloat16(), x.float(), mean)
        whole = change.bfloat16()(y.bfloat16(), v.bfloat16(), x.bfloat16(), mean)
    assert half.dtype == whole.dtype == torch.bfloat16


@pytest.mark.parametrize("text", [form for form in FORMS if not form.startswith("cb")])
def test_gradients(text: str) -> None:
    variant = parse(text)
    torch.manual_seed(0)
    change: Any = CHANGES[variant.name](Sizes(6, 4, 3), variant.form, torch.Generator().manual_seed(1))
    change = change.double().eval()
    y, v, x = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 4, 3, 3), (1, 2, 3, 3), (1, 3, 6))
    )
    parameters = tuple(change.parameters())

    def run(y: Tensor, v: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
        names = [name for name, _ in change.named_parameters()]
        inputs = (y, v, x, lambda: mean_of_visible(v, None, causal=True))
        return torch.func.functional_call(change, dict(zip(names, weights, strict=True)), inputs)

    assert torch.autograd.gradcheck(run, (y, v, x, *parameters))


def test_a_zero_value_has_a_finite_gradient() -> None:
    change = CHANGES["xsa"](Sizes(4, 1, 4), "", torch.Generator())
    y, v = torch.randn(1, 1, 2, 4, requires_grad=True), torch.zeros(1, 1, 2, 4, requires_grad=True)
    change(y, v, torch.zeros(1, 2, 4), lambda: v).square().sum().backward()
    assert y.grad is not None
    assert v.grad is not None
    assert torch.isfinite(y.grad).all()
    assert torch.isfinite(v.grad).all()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_mean_is_of_the_values_that_a_query_sees(kv_heads: int) -> None:
    """As attention whose scores are all zero."""
    torch.manual_seed(0)
    value, zero = torch.randn(3, kv_heads, 6, 5), torch.zeros(3, 4, 6, 5)
    seen = (torch.rand(3, 1, 6, 6) < 0.6) | torch.eye(6, dtype=torch.bool)
    of_heads = (torch.rand(3, 4, 6, 6) < 0.6) | torch.eye(6, dtype=torch.bool)
    additive = torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), torch.finfo(torch.float32).min)
    repeated = value.repeat_interleave(4 // kv_heads, 1)
    for mask, causal in ((None, False), (None, True), (seen, False), (of_heads, False), (additive, False)):
        wanted = F.scaled_dot_product_attention(zero, repeated, repeated, mask, is_causal=causal)
        found = mean_of_visible(value, mask, causal)
        found = found.repeat_interleave(4 // found.shape[1], 1).expand_as(wanted)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_the_running_mean_of_affine_is_that_of_training_batches() -> None:
    change: Any = CHANGES["affine"](Sizes(6, 2, 3), "linear", torch.Generator().manual_seed(1))
    y, v, x = torch.randn(2, 2, 4, 3), torch.randn(2, 2, 4, 3), torch.randn(2, 4, 6)
    alpha = (0.1 * x @ change.scale.T + 0.5).clamp(0, 1).mean((0, 1))
    for steps in (1, 2):
        change(y, v, x, lambda: v)
        torch.testing.assert_close(change.running, alpha * (1 - 0.9**steps))
    before = change.running.clone()
    change.eval()(y, v, x, lambda: v)
    assert torch.equal(change.running, before)


def test_the_balance_of_heads_joins_the_gradient_while_training() -> None:
    change: Any = CHANGES["mixture_of_heads"](Sizes(6, 4, 3), "0.5", torch.Generator().manual_seed(1))
    y, v, x = torch.randn(2, 4, 5, 3), torch.randn(2, 4, 5, 3), torch.randn(2, 5, 6)
    gradients = []
    for training in (False, True):
        change.train(training).zero_grad()
        change(y, v, x, lambda: v).square().mean().backward()
        gradients.append(change.router.grad.clone())
    routed = x @ change.router[1:4].T
    share = F.one_hot(routed.argmax(-1), 3).float().mean((0, 1))
    loss = BALANCE * 3 * (routed.softmax(-1).mean((0, 1)) * share).sum()
    (wanted,) = torch.autograd.grad(loss, change.router)
    torch.testing.assert_close(gradients[1] - gradients[0], wanted, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("form", ["", "=0.5"])
@pytest.mark.parametrize("name", ["timm", "gpt2", "llama"])
def test_a_mixture_of_heads_in_a_whole_model_is_the_gated_one(name: str, form: str) -> None:
    """The plain model, whose heads are weighed token by token in front of W_O: shared, and routed ones."""
    build, _ = CASES[name]
    plain, changed = (built(build).double() for _ in range(2))
    apply(changed, parse(f"mixture_of_heads{form}"), seed=3)
    given = IMAGES.double() if name == "timm" else WORDS
    counts, read = [], dict[str, Tensor]()

    def gated(path: str) -> None:
        module: Any = plain.get_submodule(path)
        change = changed.get_submodule(path).change.double()
        heads = change.router.shape[0] - 2

        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            read[path] = args[0] if args else kwargs["hidden_states"]

        def weigh(module: nn.Module, args: Any) -> Any:
            scores = read[path] @ change.router.T
            gates = torch.tensor([[head_gates(token, change) for token in row] for row in scores.detach()])
            counts.append((gates > 0).sum(-1))
            assert bool((gates[..., : change.always] > 0).all())
            return (args[0].unflatten(-1, (heads, -1)) * gates[..., None].double()).flatten(-2)

        module.register_forward_pre_hook(keep, with_kwargs=True)
        names = [part for part in ("proj", "c_proj", "o_proj") if hasattr(module, part)]
        getattr(module, names[0]).register_forward_pre_hook(weigh)

    changed.double()
    paths = [path for path, module in changed.named_modules() if hasattr(module, "change")]
    assert len(paths) == len(attention_modules(plain))
    for path in paths:
        gated(path)

    def ended(model: nn.Module) -> Tensor:
        found = model(given)
        return found if isinstance(found, Tensor) else found.logits

    torch.testing.assert_close(ended(changed), ended(plain), atol=2e-5, rtol=2e-5)
    on = {int(number) for count in counts for number in count.unique()}
    change: Any = changed.get_submodule(paths[0]).change
    assert on == {change.always + change.chosen}
    heads = change.router.shape[0] - 2
    share = float(form.lstrip("=") or change.forms[0])
    assert on == {max(change.always + 1, round(share * heads))}
    ended(changed.train()).square().mean().backward()
    for path in paths:
        gradient = changed.get_submodule(path).change.router.grad
        assert bool(gradient.isfinite().all())
        assert bool(gradient.abs().sum(1)[-2:].all())  # what weighs shared against routed heads


def test_a_mixture_of_heads_has_heads_to_choose_from() -> None:
    with pytest.raises(UserError, match="chooses among heads, and the layer has 2"):
        CHANGES["mixture_of_heads"](Sizes(6, 2, 3), "0.5", torch.Generator())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_broadcasts(causal: bool, scaled: bool) -> None:
    torch.manual_seed(0)
    change = Broadcast(scaled, 3, causal).double()
    if change.scale is not None:
        nn.init.normal_(change.scale)
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    wanted = torch.empty_like(x)
    for t in range(5):
        mean = x[:, : t + 1].mean(1) if causal else x.mean(1)
        wanted[:, t] = x[:, t] + change.scale * mean if change.scale is not None else (x[:, t] + mean) / 2
    torch.testing.assert_close(change(x), wanted)
    assert torch.autograd.gradcheck(change, (x,))


@pytest.mark.parametrize("text", ["cb", "affine"])
def test_a_causal_model_does_not_see_its_future(text: str) -> None:
    model = built(gpt2)
    apply(model, parse(text))
    other = WORDS.clone()
    other[:, -1] = (other[:, -1] + 1) % 60
    with torch.inference_mode():
        before, after = model(WORDS).logits, model(other).logits
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


# --- initialisation, keys, copies ----------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMS)
def test_same_weights_and_same_generator(case: Case, text: str) -> None:
    build, _ = case
    plain, changed = built(build), built(build)
    state = torch.get_rng_state()
    apply(visual(changed), parse(text), seed=3)
    assert torch.equal(state, torch.get_rng_state())
    after = changed.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, after[name]), name
    extra = after.keys() - plain.state_dict().keys()
    assert all(".change." in name for name in extra)
    assert bool(extra) == (text not in ("xsa", "cb"))


def test_directions_differ_by_layer_and_seed() -> None:
    def directions(seed: int) -> list[Tensor]:
        model = built(vit)
        apply(model, parse("random_direction"), seed=seed)
        return [tensor for name, tensor in model.named_buffers() if name.endswith("direction")]

    first, again, other = directions(0), directions(0), directions(1)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert not torch.equal(first[0], first[1])
    assert torch.allclose(first[0].norm(dim=-1), torch.tensor(1.0))


def test_what_was_changed_travels_with_the_weights(case: Case) -> None:
    build, run = case
    changed, other = built(build), built(build, seed=1)
    apply(visual(changed), parse("gated_xsa=sigmoid:1"))
    assert list(variants_in(changed).values()) == ["gated_xsa=sigmoid"]
    buffer = io.BytesIO()
    torch.save(changed.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    kinds = {path: entry[METADATA] for path, entry in loaded._metadata.items() if METADATA in entry}
    assert kinds == variants_in(changed)
    restore(other, kinds)
    other.load_state_dict(loaded)
    with torch.inference_mode():
        assert torch.equal(run(other), run(changed))


def test_a_copy_is_a_model_of_its_own() -> None:
    model = built(vit)
    apply(model, parse("gated_xsa"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    assert variants_in(other) == variants_in(model)
    assert all(not alpha.any() for alpha in alphas(model).values())


@pytest.mark.parametrize("name", ["timm", "open_clip"])
def test_compiles_whole(name: str) -> None:
    build, run = CASES[name]
    for text in ("xsa", "gated_xsa", "gated", "affine", "mixture_of_heads"):
        model = built(build)
        apply(visual(model), parse(text))
        with torch.no_grad():
            wanted = run(model)
        for block in [module for path, module in model.named_modules() if path in variants_in(model)]:
            block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)  # type: ignore[method-assign]
        with torch.no_grad():
            assert torch.equal(run(model), wanted)


def test_trains_under_ddp(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model = built(clip).train()
        apply(model.visual, parse("gated_xsa"))  # type: ignore[arg-type]
        parallel = DistributedDataParallel(model)
        image, text, scale = parallel(SMALL, WORDS)
        (image @ text.T * scale).diagonal().sum().backward()
        gates = [p for name, p in model.named_parameters() if name.endswith("change.gate")]
        assert gates
        assert all(gate.grad is not None and gate.grad.abs().sum() > 0 for gate in gates)
        assert set(variants_in(parallel)) == {f"module.{path}" for path in variants_in(model)}
    finally:
        torch.distributed.destroy_process_group()


def test_autocast_keeps_float32_inside() -> None:
    model = built(vit)
    apply(model, parse("xsa"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(IMAGES)
    with torch.no_grad():
        assert F.cosine_similarity(half.float(), model(IMAGES)).min() > 0.999


# --- mistakes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message", "tip"),
    [
        ("xsb", "there is no attention variant 'xsb'", "did you mean 'xsa'?"),
        ("xsa=0.5", "variant 'xsa' has no form '0.5'", "write xsa"),
        ("gated_xsa=relu", "variant 'gated_xsa' has no form 'relu'", "write gated_xsa=tanh or sigmoid"),
        ("xsa:5-2", "variant xsa:5-2: does not understand '5-2'", "for example xsa:0,5-11"),
    ],
)
def test_spelling_mistakes(text: str, message: str, tip: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    assert (str(caught.value), caught.value.tip) == (message, tip)


def test_a_default_form_is_not_written() -> None:
    assert parse("gated_xsa=tanh").kind == "gated_xsa"
    assert parse("gated-xsa=sigmoid:0-2").kind == "gated_xsa=sigmoid"


def hybrid() -> Lfm2Model:
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    config = Lfm2Config(
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        vocab_size=64,
    )
    return Lfm2Model(config).eval()


def test_layers_have_the_models_own_numbers_as_in_a_probe() -> None:
    model = hybrid()
    assert layer_numbers(model, attention_layers(model)) == {"layers.1.self_attn": 1, "layers.3.self_attn": 3}
    assert apply(model, parse("gated_xsa:3")) == ("layers.3.self_attn",)
    assert list(alphas(model)) == [3]
    for text in ("xsa:0", "xsa:1,2"):
        with pytest.raises(UserError, match=f"there is no layer {text[-1]} whose") as error:
            apply(model, parse(text))
        assert error.value.tip == "layers are 1, 3"
    for model in (
        hybrid(),
        built(vit),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 3),
    ):
        layers = attention_layers(model)
        (stack,) = stacks_of(model, dict.fromkeys(layers))
        places = {place.path: place.index for place in stack.places}
        assert layer_numbers(model, layers) == {path: places[path] for path in layers}


def test_refusals() -> None:
    model = built(vit)
    with pytest.raises(UserError, match="there is no layer 6"):
        apply(model, parse("xsa:6"))
    apply(model, parse("xsa:0"))
    with pytest.raises(UserError, match=r"'blocks\.0\.attn' is changed already"):
        apply(model, parse("gated_xsa"))
    with pytest.raises(UserError, match="Linear has no attention that could be changed"):
        apply(nn.Linear(2, 2), parse("xsa"))
    with pytest.raises(UserError, match=r"the checkpoint changes 'blocks\.9\.attn'"):
        restore(built(vit), {"blocks.9.attn": "xsa"})
    eager = gpt2()
    eager.set_attn_implementation("eager")  # type: ignore[operator]
    with pytest.raises(UserError, match="runs eager attention"):
        apply(eager, parse("xsa"))
    with pytest.raises(UserError, match="which cannot be changed"):
        restore(built(vit), {"head": "xsa"})
