"""Every family, held to the same promises: loads, lists, encodes, is seen, is left as it was.

One more is made of one file, `made_family.py`, and its line in the table; nothing else knows of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from checkpoints import OPEN_CLIP_SIZES, save_open_clip, save_timm
from commands import Ended
from torch import Tensor, nn

from diag.attention.call import AttentionCall
from diag.attention.pattern import attend
from diag.errors import UserError
from diag.inputs.items import Inputs
from diag.measure.meaning import understood
from diag.models import known, load
from diag.models.base import Batch, Model, Tower
from diag.models.families import FAMILIES
from diag.models.families.from_module import from_module
from diag.models.hooks.content import INPUTS
from diag.models.hooks.layout import PLAIN
from diag.models.hooks.seam import attention_calls
from diag.models.names.resolve import listing, parse
from diag.models.names.spec import ModelSpec
from diag.studies import attend as attending

CPU = {"device": "cpu", "dtype": torch.float32}
MADE = ("made", "made_family")
"""The line in the table that a family of this file's tests takes."""


@dataclass(frozen=True)
class Case:
    """What to load, and what its first batch must look like."""

    family: str
    kind: str
    tower: str
    paths: str
    tokens: int | None
    prefix: tuple[str, ...] = ()
    causal: bool = False
    kv_heads: int = 4
    heads: int = 4
    layers: int = 2
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.family}-{self.kind}-{self.tower}"


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
CASES = [
    Case("timm", "vit_tiny_patch16_224", "vision", "blocks.{}.attn", 17, ("cls",), arguments=VIT),
    Case(
        "timm",
        "deit_tiny_distilled_patch16_224",
        "vision",
        "blocks.{}.attn",
        18,
        ("cls", "cls"),
        arguments=VIT,
    ),
    Case(
        "timm",
        "vit_small_patch14_reg4_dinov2",
        "vision",
        "blocks.{}.attn",
        21,
        ("cls", *["registers"] * 4),
        arguments=VIT,
    ),
    Case(
        "timm",
        "swin_tiny_patch4_window7_224",
        "vision",
        "layers.{}.blocks.0.attn",
        None,
        heads=2,
        kv_heads=2,
        arguments={
            "img_size": 32,
            "window_size": 4,
            "embed_dim": 16,
            "depths": (1, 1),
            "num_heads": (2, 2),
        },
    ),
    Case(
        "open_clip",
        "tiny",
        "vision",
        "visual.transformer.resblocks.{}.attn",
        17,
        ("cls",),
        heads=1,
        kv_heads=1,
    ),
    Case("open_clip", "tiny", "text", "transformer.resblocks.{}.attn", 16, causal=True, heads=2, kv_heads=2),
    Case("hf", "gpt2", "text", "h.{}.attn", 12, causal=True),
    Case("hf", "neox", "text", "layers.{}.attention", 12, causal=True),
    Case("hf", "llama", "text", "layers.{}.self_attn", 12, causal=True, kv_heads=2),
    Case("hf", "qwen3", "text", "layers.{}.self_attn", 12, causal=True, kv_heads=2),
    Case("hf", "bert", "text", "encoder.layer.{}.attention.self", 12),
    Case("hf", "t5", "text", "encoder.block.{}.layer.0.SelfAttention", 12),
    Case("hf", "vit", "vision", "layers.{}.attention", 17, ("cls",)),
    Case("hf", "dinov2", "vision", "encoder.layer.{}.attention", 19, ("cls", "registers", "registers")),
    Case("hf", "dinov3", "vision", "model.layer.{}.attention", 19, ("cls", "registers", "registers")),
    Case("hf", "clip", "vision", "vision_model.encoder.layers.{}.self_attn", 17, ("cls",)),
    Case("hf", "clip", "text", "text_model.encoder.layers.{}.self_attn", 12, causal=True),
    Case("hf", "siglip", "vision", "vision_model.encoder.layers.{}.self_attn", 16),
    Case("hf", "siglip", "text", "text_model.encoder.layers.{}.self_attn", 12),
    Case("hf", "qwen2_5_vl", "vision", "visual.blocks.{}.attn", None),
    Case("hf", "qwen2_5_vl", "text", "language_model.layers.{}.self_attn", 12, causal=True, kv_heads=2),
    Case("tl", "gpt2", "text", "blocks.{}.attn", 12, causal=True),
    Case("tl", "llama", "text", "blocks.{}.attn", 12, causal=True, kv_heads=2),
    Case("diffusers", "sd3", "vision", "transformer_blocks.{}.attn", 349, heads=2, kv_heads=2, layers=3),
    Case("demo", "vit-p16", "vision", "blocks.{}.attn", 17, ("cls",), heads=3, kv_heads=3, layers=6),
    Case("demo", "vit-p4", "vision", "blocks.{}.attn", 257, ("cls",), heads=3, kv_heads=3, layers=6),
    Case("demo", "lm", "text", "h.{}.attn", 12, causal=True, heads=3, kv_heads=3, layers=6),
    Case("made", "tiny~1", "text", "layers.layers.{}.self_attn", 12, causal=True, kv_heads=2, heads=2),
    Case("own", "encoder", "module", "layers.{}.self_attn", 9),
]


@pytest.fixture(scope="module")
def load_case(
    folder_of: Callable[[str], Path],
    embedded: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[Case], Model]]:
    loaded: dict[tuple[str, str], Model] = {}
    patch = pytest.MonkeyPatch()
    patch.setattr("diag.models.families.demo.EMBEDDED", embedded)
    open_clip.factory._MODEL_CONFIGS["tiny"] = OPEN_CLIP_SIZES

    def build(case: Case) -> Model:
        if case.family == "timm":
            file = save_timm(tmp_path_factory.mktemp("timm"), case.kind, **case.arguments)
            spec = ModelSpec(case.kind, "timm", case.kind, checkpoint=file, model_args=case.arguments)
        elif case.family == "open_clip":
            file = save_open_clip(tmp_path_factory.mktemp("open_clip"))
            spec = ModelSpec(case.kind, "open_clip", "tiny", checkpoint=file)
        elif case.family == "demo":
            spec = ModelSpec(case.kind, "demo", case.kind)
        elif case.family == "made":
            with pytest.MonkeyPatch.context() as with_line:
                with_line.setitem(FAMILIES, *MADE)
                return load(ModelSpec(case.kind, "made", case.kind), **CPU)
        elif case.family == "own":
            return own_encoder()
        else:
            spec = ModelSpec(case.kind, case.family, str(folder_of(case.kind)))
        return load(spec, **CPU)

    def get(case: Case) -> Model:
        key = (case.family, case.kind)
        if key not in loaded:
            loaded[key] = build(case)
        return loaded[key]

    yield get
    patch.undo()
    del open_clip.factory._MODEL_CONFIGS["tiny"]


def own_encoder() -> Model:
    """PyTorch's own encoder: nn.MultiheadAttention, whose fused fast path no hook could see into."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    return from_module(module, (torch.randn(2, 9, 32) for _ in range(3)))[0]


def first_batch(tower: Tower, inputs: Inputs) -> Batch:
    """Two samples where the tower takes them, one where a batch holds one."""
    size = min(2, tower.max_batch or 2)
    samples = tower.samples(inputs, None if tower.name != "text" or tower.facts["context"] == 16 else 12)
    return tower.encode([sample for sample, _ in zip(samples, range(size), strict=False)])


def tensors_of(output: Any) -> list[Tensor]:
    """Every tensor in what a model returned."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output
    if not isinstance(output, tuple | list) and not hasattr(output, "values"):
        return []
    return [tensor for value in values for tensor in tensors_of(value)]


def hooks_on(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.fixture(params=CASES, ids=[case.id for case in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def tower(case: Case, load_case: Callable[[Case], Model]) -> Tower:
    return load_case(case).tower(case.tower)


@pytest.fixture
def module(case: Case, tower: Tower, load_case: Callable[[Case], Model]) -> nn.Module:
    return load_case(case).module


@pytest.fixture
def batch(tower: Tower, case: Case, photographs: Inputs, texts: Inputs) -> Batch:
    return first_batch(tower, photographs if case.tower == "vision" else texts)


@pytest.fixture(autouse=True)
def same_switches() -> Iterator[None]:
    """Plain forwards take the same path as captured ones: an active seam has no fused fast path."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.inference_mode():
        yield
    torch.backends.mha.set_fastpath_enabled(before)


def collect(tower: Tower, batch: Batch) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    with tower.capture(tower.layers, calls.append):
        tower.forward(batch)
    return calls


def test_every_family_file_has_a_case() -> None:
    assert {case.family for case in CASES} == {*FAMILIES, "made", "own"}


def test_layers_are_listed_in_depth_order(case: Case, tower: Tower) -> None:
    assert [layer.path for layer in tower.layers] == [case.paths.format(i) for i in range(case.layers)]
    assert [layer.index for layer in tower.layers] == list(range(case.layers))
    assert tower.prefix == case.prefix


def test_what_is_known_is_what_the_tests_of_meaning_find(
    case: Case, tower: Tower, load_case: Callable[[Case], Model], photographs: Inputs, texts: Inputs
) -> None:
    if case.family in ("own", "tl"):
        pytest.skip("its layers were found by the tests" if case.family == "own" else "it has its own route")
    model = load_case(case)
    context = None if tower.name != "text" or tower.facts["context"] == 16 else 12
    samples = list(tower.samples(photographs if case.tower == "vision" else texts, context))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known, "KNOWN", frozenset())
        tested = understood(model, tower, samples)
    is_known = known.is_known(model.module, tower.layers)
    taken = understood(model, tower, samples)
    assert (taken.meaning["tested"], tested.meaning["tested"]) == (not is_known, True)
    if is_known:
        assert [(layer.index, layer.path, layer.form.calls) for layer in tested.layers] == [
            (layer.index, layer.path, None) for layer in tower.layers
        ]
        plain = {(layer.form.layout, layer.form.runs, layer.form.value_from) for layer in tested.layers}
        assert plain == {(PLAIN, 1, "own")}
        found = tested.meaning
        assert (found["rows"], found["random"], found["padded_windows"]) == (INPUTS, False, [])
        assert (tested.skipped, tested.depth) == ({}, len(tower.layers))


def test_every_line_of_what_is_known_has_a_case(load_case: Callable[[Case], Model]) -> None:
    lines = set()
    for case in CASES:
        model = load_case(case)
        tower = model.tower(case.tower)
        if tower.capture is attention_calls and known.is_known(model.module, tower.layers):
            lines |= known.kinds_of(model.module, tower.layers)
    assert lines == known.KNOWN


def test_every_layer_gives_calls_of_the_right_shape(case: Case, tower: Tower, batch: Batch) -> None:
    calls = collect(tower, batch)
    order = list(dict.fromkeys(call.layer for call in calls))
    assert order == list(range(case.layers))
    for call in calls:
        assert (call.heads, call.kv_heads) == (case.heads, case.kv_heads)
        assert call.module == tower.layers[call.layer].path
        assert case.tokens is None or call.tokens == case.tokens
        assert call.visibility.rule in (("causal",) if case.causal else ("full", "general"))
    if case.tower == "vision" and case.tokens:
        patches = batch.sets["image"][0] if tower.marks else tower.tokens_in("patch", case.tokens)
        side = tower.facts["image_size"] // tower.facts["patch_size"]
        assert patches.sum() == side**2
        assert tower.marks or case.tokens - len(case.prefix) == side**2


def test_the_output_can_be_rebuilt_from_the_call(tower: Tower, batch: Batch) -> None:
    for call in collect(tower, batch):
        rebuilt = attend(call)
        assert (rebuilt - call.output).norm() < 1e-5 * call.output.norm()


def test_observing_changes_nothing(tower: Tower, batch: Batch) -> None:
    plain = tensors_of(tower.forward(batch))
    with tower.capture(tower.layers, lambda call: None):
        observed = tensors_of(tower.forward(batch))
    assert len(plain) == len(observed) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, observed, strict=True))


def test_replacing_the_output_changes_the_model(tower: Tower, batch: Batch) -> None:
    plain = tensors_of(tower.forward(batch))
    with tower.capture(tower.layers[-1:], lambda call: torch.zeros_like(call.output)):
        changed = tensors_of(tower.forward(batch))
    assert not all(torch.equal(a, b) for a, b in zip(plain, changed, strict=True))


def test_nothing_is_left_behind(tower: Tower, batch: Batch, module: nn.Module) -> None:
    plain = tensors_of(tower.forward(batch))
    before = hooks_on(module)  # transformers and transformer-lens put up some of theirs in a first forward
    collect(tower, batch)

    def fail(call: AttentionCall) -> None:
        raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"), tower.capture(tower.layers, fail):
        tower.forward(batch)
    assert hooks_on(module) == before
    assert all(torch.equal(a, b) for a, b in zip(plain, tensors_of(tower.forward(batch)), strict=True))


def test_facts_can_be_stored(case: Case, tower: Tower, batch: Batch) -> None:
    json.dumps(dict(tower.facts))
    assert len(batch.ids) == len(set(batch.ids)) > 0
    if case.tower == "text":
        assert tower.facts["bos"] == (
            "no" if case.causal and "clip" not in case.family + case.kind else "yes"
        )


# --- a family of one file and one line


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, *MADE)


def test_names_of_a_new_family_are_resolved_and_listed(made: None, attnbias: Callable[..., Ended]) -> None:
    spec = parse("made:tiny~1")
    assert (spec.resolved, spec.family) == ("made:tiny~1", "made")
    assert parse("tiny~2").resolved == "made:tiny~2"
    assert [row["resolves_to"] for row in listing("made:tiny")] == ["made:tiny~1", "made:tiny~2"]
    assert "made:tiny~2  text, 32" in attnbias("models", "tiny~2").out
    for typed, tip in [("made:tini~1", "'tiny~1'"), ("tinny~2", "'tiny~2'"), ("mad:tiny~1", "'made'")]:
        with pytest.raises(UserError) as caught:
            parse(typed)
        assert tip in (caught.value.tip or "")
    with pytest.raises(UserError, match="only hf: models can be spread"):
        load(spec, device="spread", dtype=torch.float32)


def test_a_new_family_is_unknown_without_its_line() -> None:
    """A negative control of the test above."""
    with pytest.raises(UserError, match="there is no family 'made'"):
        parse("made:tiny~1")
    assert listing("tiny~1") == []


def test_a_new_family_is_probed_looked_at_and_compared(made: None, attnbias: Callable[..., Ended]) -> None:
    given = ("--texts", "demo", "--limit", 2, "--seq-len", 12, "--metrics", "cos_y_vself")
    both = attnbias("probe", "-m", "made:tiny~1", "-m", "tiny~2", *given, "-o", "run")
    assert both.code == 0, both.err
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert [model["resolved"] for model in manifest["models"]] == ["made:tiny~1", "made:tiny~2"]
    found = attending.attend(
        attending.AttendPlan(models=("made:tiny~1",), text="a cat sat", layer=1, token=4)
    )
    assert "".join(found.tokens["text"]) == "a cat sat"
    compared = attnbias("compare", "run", "-o", "compared")
    assert compared.code == 0, compared.err
    assert all(label in compared.out for label in ("made:tiny~1", "tiny~2"))
    assert "only weights differ" in compared.out  # one architecture: the names differ in their weights
