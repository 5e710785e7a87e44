"""The monitor: the numbers of `diag.probe`, on due steps only, and a training that does not notice."""

from __future__ import annotations

import copy
import io
import math
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import diag
import diag.studies.monitor.monitor
from diag.attention.call import AttentionCall
from diag.errors import MeasurementError, UserError
from diag.metrics.default import per_input
from diag.studies.monitor.monitor import DEFAULT_METRICS, Monitor
from diag.variants import apply, parse

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2},
}


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return x + self.dropout(
            self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        )


class Noisy(nn.Module):
    """What measuring could disturb: dropout, running statistics, a counter, three random generators."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(0.2), Block(0.2)
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("passes", torch.zeros(1))
        self.passes: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        x = x * (1 + 0.01 * (torch.rand(1, device=x.device) + random.random() + np.random.rand())).float()
        x = self.second(self.first(x))
        return self.norm(x.transpose(1, 2)).transpose(1, 2) / self.passes.clone()


def vit() -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **sizes, proj_drop_rate=0.1)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=32, vocab_size=50)
    return transformers.GPT2LMHeadModel(config)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)


def clip() -> nn.Module:
    return open_clip.CLIP(**copy.deepcopy(CLIP))


def changed_vit() -> nn.Module:
    model = vit()
    apply(model, parse("xsa"))
    return model


def changed_gpt2() -> nn.Module:
    model = gpt2()
    apply(model, parse("gated_xsa"))
    return model


def images(rows: int = 5) -> Tensor:
    return torch.randn(rows, 3, 32, 32)


def tokens(rows: int = 5) -> dict[str, Tensor]:
    mask = torch.ones(rows, 12, dtype=torch.long)
    mask[1:, 9:] = 0
    return {"input_ids": torch.randint(50, (rows, 12)), "attention_mask": mask}


def pairs(rows: int = 5) -> dict[str, Tensor]:
    return {"image": torch.randn(rows, 3, 16, 16), "text": torch.randint(50, (rows, 8))}


def states(rows: int = 5) -> Tensor:
    return torch.randn(rows, 9, 32)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "timm": (vit, images),
    "gpt2": (gpt2, tokens),
    "encoder": (encoder, states),
    "open_clip": (clip, pairs),
    "timm xsa": (changed_vit, images),
    "gpt2 gated_xsa": (changed_gpt2, tokens),
}


def made(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    return build().train(), inputs()


def given(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(batch)


def expected(model: nn.Module, batch: Any, metrics: Any = DEFAULT_METRICS) -> dict[str, float]:
    """What `diag.probe` says of a copy in evaluation mode."""
    table = diag.probe(copy.deepcopy(model).eval(), [batch], metrics=metrics).layers
    # towers follow each other, numbered through
    place = table.groupby(["tower", "layer"], sort=False).ngroup()
    keys = [
        f"attnbias/{metric}/layer_{layer:02d}" for metric, layer in zip(table["metric"], place, strict=True)
    ]
    return {key: mean for key, mean in zip(keys, table["mean"], strict=True) if not math.isnan(mean)}


def assert_numbers(found: dict[str, float], wanted: dict[str, float]) -> None:
    layers = {key: value for key, value in found.items() if not key.endswith("/mean")}
    assert layers == pytest.approx(wanted, rel=1e-6, abs=1e-7)
    assert wanted
    for metric in {key.split("/")[1] for key in wanted}:
        of_layers = [value for key, value in layers.items() if key.split("/")[1] == metric]
        assert found[f"attnbias/{metric}/mean"] == pytest.approx(np.mean(of_layers))


@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_those_of_probe(name: str) -> None:
    model, batch = made(name)
    numbers = Monitor(model, batch).step(0)
    assert_numbers(numbers, expected(model, batch))
    assert all(type(value) is float for value in numbers.values())
    assert model.training


def test_every_metric_and_ratio_is_that_of_probe() -> None:
    model, batch = made("timm")
    chosen = ("default", "stream", "sinks")
    assert_numbers(Monitor(model, batch, metrics=chosen).step(0), expected(model, batch, chosen))


@pytest.mark.parametrize("name", ["timm", "gpt2", "encoder", "open_clip"])
def test_without_a_batch_the_inputs_of_the_step_are_measured(name: str) -> None:
    model, batch = made(name)
    monitor = Monitor(model, rows=3)
    given(model, batch)
    cut = batch[:3].clone() if isinstance(batch, Tensor) else {key: value[:3] for key, value in batch.items()}
    whole = expected(model, batch)
    if isinstance(batch, Tensor):
        batch.zero_()  # a loop may write its next batch into the same memory
    numbers = monitor.step(0)
    assert_numbers(numbers, expected(model, cut))
    assert numbers["attnbias/cos_y_vself/layer_01"] != pytest.approx(whole["attnbias/cos_y_vself/layer_01"])


def test_only_due_steps_are_heard_and_measured() -> None:
    model, _ = made("timm")
    monitor = Monitor(model, every=4)
    heard, numbers = [], {}
    for step in range(10):
        heard.append(bool(model._forward_pre_hooks))
        model(images())
        with torch.no_grad():
            model(torch.zeros(1, 3, 32, 32))  # validation is not what is trained on
        numbers[step] = monitor.step(step)
    assert heard == [step % 4 == 0 for step in range(10)]
    assert [step for step, found in numbers.items() if found] == [0, 4, 8]
    table = monitor.history
    assert list(table.columns) == ["step", "layer", "metric", "value"]
    assert table["step"].unique().tolist() == [0, 4, 8]
    assert len(table) == 3 * 2 * len(DEFAULT_METRICS)
    for row in table.itertuples():
        assert numbers[row.step][f"attnbias/{row.metric}/layer_{row.layer:02d}"] == row.value
    assert [layer.path for layer in monitor.layers] == ["blocks.0.attn", "blocks.1.attn"]


def test_validation_between_forward_and_step_is_not_measured() -> None:
    model, batch = made("timm")
    monitor = Monitor(model)
    model(batch)
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert_numbers(monitor.step(0), expected(model, batch))


@pytest.mark.parametrize(
    ("steps", "measured"),
    [
        (range(150, 210), [200]),  # a resumed run stays on the grid
        (range(0, 50, 10), [0, 20, 40]),  # told every tenth step only
        ([0, 1, 2, 25, 26, 27], [0, 26]),  # a leap: the next step stands in
        ([0, 1, 19, 20, 0, 1, 19, 20], [0, 20, 1, 20]),  # steps of every epoch
    ],
)
def test_steps_of_every_kind_of_loop(steps: Any, measured: list[int]) -> None:
    model, _ = made("encoder")
    every = 100 if 150 in steps else 20
    monitor = Monitor(model, every=every, rows=1, metrics=["cos_y_vself"])
    found = []
    for step in steps:
        model(states(2))
        if monitor.step(step):
            found.append(step)
    assert found == measured


def test_a_step_that_is_told_before_the_forward_pass() -> None:
    model, _ = made("encoder")
    monitor, found = Monitor(model, every=3), []
    for step in range(8):
        if monitor.step(step):
            found.append(step)
        model(states())
    assert found == [1, 3, 6]


# --- nothing changes --------------------------------------------------------------------------------


def trained(monitored: bool, *, fixed: bool, autocast: bool = False) -> list[Tensor]:
    """State, gradients and random draws after twelve steps, measured before, between and after backward."""
    torch.manual_seed(0)
    model = Noisy()
    model.second.eval()  # a mode of its own
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    batch = torch.ones(2, 5, 16) if fixed else None
    monitor = Monitor(model, batch, every=3) if monitored else None
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)  # after the constructor: checking types of its arguments draws, in tests
    measured = 0
    for step in range(12):
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(torch.randn(4, 7, 16)).square().mean()
            if monitor is not None and step % 2:
                measured += bool(monitor.step(step))
            loss = loss + model(torch.randn(4, 7, 16)).square().mean()
        loss.backward()
        if monitor is not None and not step % 2:
            measured += bool(monitor.step(step))
        optimiser.step()
    assert measured == (4 if monitored else 0)
    assert [child.training for child in (model, model.first, model.second, model.norm)] == [
        True,
        True,
        False,
        True,
    ]
    draws = torch.tensor([torch.rand(1).item(), random.random(), np.random.rand()])
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [*model.state_dict().values(), *gradients, draws]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.filterwarnings("ignore:Noisy draws at random")
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_training_is_bit_identical(fixed: bool, autocast: bool) -> None:
    plain = trained(False, fixed=fixed, autocast=autocast)
    assert same(trained(True, fixed=fixed, autocast=autocast), plain)


@pytest.mark.filterwarnings("ignore:Noisy draws at random")
def test_what_is_not_left_untouched_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control: without the care that is taken, training is another one."""
    plain = trained(False, fixed=False)
    assert same(trained(False, fixed=False), plain)
    monkeypatch.setattr(diag.studies.monitor.monitor, "untouched", lambda module: nullcontext())
    assert not same(trained(True, fixed=False), plain)


def test_measuring_inside_autocast_leaves_gradients() -> None:
    """A cast that is made without gradients must not cut the next pass off from its weights."""
    model, batch = made("timm")
    monitor = Monitor(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert monitor.step(0)
        loss = model(batch).float().square().mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def of_calls(calls: list[AttentionCall], tokens: Tensor | None = None) -> dict[str, float]:
    """The numbers of attention calls, in full precision."""
    return {
        f"attnbias/{metric}/layer_{call.layer:02d}": values.mean().item()
        for call in calls
        for metric, values in per_input(call, DEFAULT_METRICS, tokens).items()
    }


def test_inputs_are_measured_under_the_autocast_they_were_trained_under() -> None:
    model, batch = made("timm")
    monitor = Monitor(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(batch)
        calls = diag.capture(copy.deepcopy(model).eval(), batch)
    assert calls[0].output.dtype == torch.bfloat16
    numbers = monitor.step(0)
    wanted = of_calls(calls)
    assert_numbers(numbers, wanted)
    assert numbers != pytest.approx(Monitor(model, batch).step(0), rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):  # a fixed batch has none but that of the moment
        assert_numbers(Monitor(model, batch).step(0), wanted)


class Caching(Block):
    """Keeps positions for the length that it saw first, as rotary embeddings do."""

    positions: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.positions is None or len(self.positions) != x.shape[1]:
            self.positions = torch.linspace(1, 2, x.shape[1])[:, None]
        return super().forward(x * self.positions)


def test_what_a_model_keeps_from_measuring_can_be_trained_with() -> None:
    model = Caching()
    monitor = Monitor(model, torch.randn(2, 6, 16), every=1)
    for step in range(2):
        assert monitor.step(step)
        for tokens in (6, 9):
            model(torch.randn(2, tokens, 16, requires_grad=True)).sum().backward()


def test_a_model_with_a_monitor_can_be_copied_and_saved() -> None:
    model, batch = made("timm")
    monitor = Monitor(model)
    assert model._forward_pre_hooks
    copied = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    copied(batch[:1])  # an average of weights that is run is not what is trained
    model(batch)
    assert_numbers(monitor.step(0), expected(model, batch))
    with Monitor(model) as other:
        assert model._forward_pre_hooks
    assert not model._forward_pre_hooks
    assert other.history.empty


# --- wrappers ---------------------------------------------------------------------------------------


def test_a_compiled_model_is_measured_unwrapped_and_not_compiled_again() -> None:
    from torch._dynamo.testing import CompileCounter

    model, batch = made("encoder")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    monitor = Monitor(compiled, every=2)
    frames = []
    for step in range(5):
        compiled(batch).sum().backward()
        numbers = monitor.step(step)
        assert bool(numbers) == (step % 2 == 0)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1] > 0
    assert_numbers(numbers, expected(model, batch))


def test_a_model_that_is_compiled_in_place_needs_a_fixed_batch() -> None:
    model, batch = made("encoder")
    plain = copy.deepcopy(model)
    model.compile(backend="eager")
    assert_numbers(Monitor(model, batch).step(0), expected(plain, batch))
    monitor = Monitor(model)
    for step in range(2):
        model(batch)
        with nullcontext() if step == 0 else pytest.raises(UserError, match="no forward pass with gradients"):
            assert not monitor.step(step)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_distributed_model_is_measured_by_the_first_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = made("timm")
    wrapped = nn.parallel.DistributedDataParallel(model)
    monitor = Monitor(wrapped, every=1)
    wrapped(batch).sum().backward()
    assert_numbers(monitor.step(0), expected(model, batch))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert monitor.step(1) == {}
    assert not wrapped._forward_pre_hooks


def test_a_part_of_a_model_is_measured_alone() -> None:
    model, batch = made("open_clip")
    monitor = Monitor(model.visual)
    given(model, batch)
    assert_numbers(monitor.step(0), expected(model.visual, batch["image"]))


# --- what is chosen ---------------------------------------------------------------------------------


def test_layers_metrics_and_prefix_are_chosen() -> None:
    model, batch = made("timm")
    numbers = Monitor(model, batch, layers=[1], metrics="entropy", prefix="train").step(0)
    assert list(numbers) == ["train/entropy/layer_01", "train/entropy/mean"]


def test_leading_tokens_are_left_out() -> None:
    model, batch = made("timm")
    numbers = Monitor(model, batch, prefix_tokens=1).step(0)
    calls = diag.capture(copy.deepcopy(model).eval(), batch)
    assert_numbers(numbers, of_calls(calls, torch.arange(17)[None] > 0))
    assert numbers != pytest.approx(Monitor(model, batch).step(0), rel=1e-6)


def test_padding_does_not_count() -> None:
    model, batch = made("gpt2")
    numbers = Monitor(model, batch).step(0)
    real = {key: value[1:, :9] for key, value in batch.items()}
    alone = Monitor(model, {key: value[1:] for key, value in batch.items()}).step(0)
    assert alone == pytest.approx(Monitor(model, real).step(0), rel=1e-4)
    assert alone != pytest.approx(numbers, rel=1e-4)


# --- what goes wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"rows": -1}, "rows=-1"),
        ({"metrics": ["cos_y_vslef"]}, "unknown metric 'cos_y_vslef'"),
        ({"metrics": ["divergence"]}, "neutral image"),
        ({"batch": "text"}, "the fixed batch is a str"),
        ({"batch": {"x": 3}}, "the fixed batch is a dict"),
    ],
)
def test_mistakes_are_told_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Monitor(Block(), **options)


class Handmade(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ((x @ x.transpose(1, 2)).softmax(-1)[..., None] * x[:, None]).sum(2)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (nn.Linear(4, 4), torch.ones(2, 4), "made no self-attention call"),
        (nn.Sequential(Handmade()), torch.ones(2, 5, 4), "computes attention itself, in '0'"),
        (nn.TransformerEncoderLayer(16, 2), torch.ones(5, 3, 16), "are not those of its inputs"),
    ],
)
def test_what_cannot_be_measured_is_told_at_the_first_measurement(
    model: nn.Module, batch: Tensor, message: str
) -> None:
    with pytest.raises((UserError, MeasurementError), match=message):
        Monitor(model, batch).step(0)
    assert model.training


def test_a_layer_that_does_not_exist_is_told() -> None:
    model, batch = made("timm")
    with pytest.raises(UserError, match="no layer 7"):
        Monitor(model, batch, layers=[7]).step(0)


def test_a_model_that_is_never_called_is_told() -> None:
    model, batch = made("timm")
    monitor = Monitor(model)
    model.forward(batch)  # past every hook
    assert monitor.step(0) == {}
    with pytest.raises(UserError, match="no forward pass with gradients of the monitored VisionTransformer"):
        monitor.step(1)


def test_later_failures_are_warned_of_and_training_goes_on() -> None:
    model, batch = made("timm")
    monitor = Monitor(model, batch, every=1)
    assert monitor.step(0)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[0, 0] = torch.nan
    with pytest.warns(UserWarning, match=r"step 1 was not measured: layer 'blocks\.0\.attn' gives"):
        assert monitor.step(1) == {}
    assert model.training
    assert monitor.history["step"].unique().tolist() == [0]


def test_spread_parameters_are_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        """Stands for torch's, which needs several devices."""

    with pytest.raises(UserError, match="spread over processes"):
        Monitor(nn.Sequential(FullyShardedDataParallel()))
