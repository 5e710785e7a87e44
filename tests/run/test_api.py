"""`diag.probe` and `diag.capture` from Python: named models, and one's own modules with ready batches."""

from __future__ import annotations

import copy
import importlib
import math
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left
from torch.utils.checkpoint import checkpoint
from transformers import Lfm2Config, Lfm2Model

import diag
from diag.errors import UserError
from diag.metrics.catalogue import RATIOS
from diag.metrics.default import METRICS
from diag.metrics.names import GROUPS

FAST = ["cos_y_vself", "entropy"]


class Block(nn.Module):
    """Attention over `x[batch, token, 16]` with two heads of eight."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def split(self, x: Tensor) -> Tensor:
        """`[q k v, batch, head, token, dim]`"""
        return self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.second = Block()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        return self.second(self.first(x, mask), mask)


class Masked(Block):
    """Hands options to PyTorch's function."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.split(x), **self.options)
        return x + self.out(y.transpose(1, 2).flatten(2))


class MaskedInside(nn.Module):
    """Hands them to PyTorch's module, which takes a causal bias only where it is told of causality too."""

    def __init__(self, attn_mask: Tensor | None = None, is_causal: bool = False) -> None:
        super().__init__()
        self.inside = nn.MultiheadAttention(16, 2, batch_first=True)
        mask = additive(9, -math.inf) if attn_mask is None else attn_mask
        self.options = {"attn_mask": mask, "is_causal": is_causal or isinstance(mask, CausalBias)}

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x, x, x, need_weights=False, **self.options)[0]


def additive(tokens: int, entry: float) -> Tensor:
    """What hides later keys."""
    return torch.full((tokens, tokens), entry).triu(1)


WAYS: dict[str, Callable[[int], dict[str, Any]]] = {
    "is_causal": lambda tokens: {"is_causal": True},
    "boolean": lambda tokens: {"attn_mask": torch.ones(tokens, tokens).tril().bool()},
    "lower right": lambda tokens: {"attn_mask": causal_lower_right(tokens, tokens)},
    "upper left": lambda tokens: {"attn_mask": causal_upper_left(tokens, tokens)},
    "-100": lambda tokens: {"attn_mask": additive(tokens, -100.0)},
    "-1e3": lambda tokens: {"attn_mask": additive(tokens, -1e3)},
    "-1e4": lambda tokens: {"attn_mask": additive(tokens, -1e4)},
    "lowest": lambda tokens: {"attn_mask": additive(tokens, torch.finfo(torch.float32).min)},
    "-inf": lambda tokens: {"attn_mask": additive(tokens, -math.inf)},
}
"""Ways of saying the same."""


@pytest.fixture
def mixer() -> Mixer:
    torch.manual_seed(0)
    return Mixer().eval()


def batches(*rows: int, tokens: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, tokens, 16, generator=generator) for n in rows]


def means(run: diag.Probe) -> pd.Series:
    return run.layers.set_index(["layer", "metric"])["mean"]


# --- named models


def test_a_name_and_a_source_give_tables_and_figures() -> None:
    run = diag.probe("demo:vit-p16", "demo", limit=3)
    assert set(run.layers["metric"]) == {*METRICS, *RATIOS}
    assert len(run.layers) == 6 * len({*METRICS, *RATIOS})
    assert len(run.heads) == 3 * len(run.layers)
    assert list(run.layers)[:6] == ["model", "tower", "layer", "module", "tokens", "metric"]
    assert list(run.layers)[6:11] == ["mean", "std", "ci_low", "ci_high", "n"]
    assert "head" in run.heads
    assert run.layers["n"].eq(3).all()
    assert run.failed == {}
    assert len(run.samples) == 3 * len(run.heads)
    cosine, selfish, context = (means(run)[0, m] for m in ("cos_y_vself", "self_part", "context_part"))
    assert cosine == pytest.approx(selfish + context, abs=1e-6)


def test_the_plots_are_figures_by_name() -> None:
    figures = diag.probe("demo:vit-p16", "demo", limit=2, metrics=FAST).plot()
    assert "curves-demo-vit-p16-vision-patch" in figures
    assert all(isinstance(figure, Figure) for figure in figures.values())


def test_every_way_of_giving_the_same_images(noise: Path) -> None:
    files = sorted(noise.iterdir())[:3]
    pictures = [Image.open(file).convert("RGB") for file in files]
    runs = [
        diag.probe("demo:vit-p16", given, limit=3, metrics=FAST)
        for given in (noise, str(noise), diag.images(noise), pictures, (p for p in pictures), tuple(pictures))
    ]
    assert means(runs[0]).nunique() == 12
    for run in runs[1:]:
        pd.testing.assert_series_equal(means(run), means(runs[0]), check_exact=True)


def test_photographs_are_the_same_opened_by_their_paths_and_in_a_tar(noise: Path, tmp_path: Path) -> None:
    """One lies on its side, of another a colour is transparent."""
    album, exif = tmp_path / "album", Image.Exif()
    album.mkdir()
    exif[0x0112] = 6
    first, second, third = (Image.open(file) for file in sorted(noise.iterdir())[:3])
    first.save(album / "a.jpg", exif=exif, quality=95)
    clear = np.asarray(second)[20, 20].tolist()
    second.save(album / "b.png", transparency=tuple(clear))
    third.convert("L").save(album / "c.png")
    files = sorted(album.iterdir())
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for file in files:
            tar.add(file, f"./{file.name}")
    opened = [Image.open(file) for file in files]
    runs = [
        diag.probe("demo:vit-p16", given, limit=3, metrics=FAST)
        for given in (album, tmp_path / "a.tar", files, opened)
    ]
    for run in runs[1:]:
        pd.testing.assert_series_equal(means(run), means(runs[0]), check_exact=True)
    upright = Image.fromarray(np.rot90(np.asarray(Image.open(files[0])), 3))
    pixels = np.asarray(Image.open(files[1]).convert("RGB"))
    black = np.where((pixels == clear).all(-1, keepdims=True), 0, pixels)
    by_hand = [upright, Image.fromarray(black), Image.open(files[2]).convert("RGB")]
    expected = means(diag.probe("demo:vit-p16", by_hand, limit=3, metrics=FAST))
    pd.testing.assert_series_equal(means(runs[0]), expected, check_exact=True)


def test_every_way_of_giving_the_same_text(tmp_path: Path) -> None:
    text = "How the standard library is documented, in a few words. " * 8
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.text").write_bytes(f"\ufeff{text}".encode())
    runs = [
        diag.probe("demo:lm", given, limit=2, seq_len=16, metrics=FAST)
        for given in (
            *(tmp_path / "a.txt", tmp_path / "b.text", diag.texts(tmp_path)),
            *([text], iter([text]), [f"\ufeff{text}"]),
        )
    ]
    assert runs[0].layers["n"].eq(2).all()
    assert runs[0].layers["n_tokens"].eq(16).all()
    for run in runs[1:]:
        pd.testing.assert_series_equal(means(run), means(runs[0]), check_exact=True)


def test_one_name_is_a_list_of_one() -> None:
    run = diag.probe("demo:vit-p16", "demo", limit=1, metrics="entropy", tokens="cls", layers=2)
    (row,) = run.layers.to_dict("records")
    assert (row["metric"], row["tokens"], row["layer"]) == ("entropy", "cls", 2)


def test_a_ratio_brings_what_it_is_made_of() -> None:
    run = diag.probe("demo:lm", "demo", limit=2, seq_len=16, metrics=["self_specific_fraction"])
    found = means(run)
    assert set(run.layers["metric"]) == {"self_specific_fraction", *RATIOS["self_specific_fraction"]}
    samples = run.samples.groupby(["layer", "metric", "input"], observed=True)["value"].mean()
    ratio = samples[3, "excess"].mean() / samples[3, "cos_y_vself"].mean()
    assert found[3, "self_specific_fraction"] == pytest.approx(ratio, rel=1e-9)


def test_a_failed_input_is_told_and_left_out(tmp_path: Path, noise: Path) -> None:
    for name in ("00.png", "01.png"):
        (tmp_path / name).write_bytes((noise / name).read_bytes())
    (tmp_path / "005.png").write_bytes(b"broken")
    run = diag.probe("demo:vit-p16", tmp_path, metrics=FAST)
    assert list(run.failed) == ["005.png"]
    assert run.layers["n"].eq(2).all()
    for file in tmp_path.iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"no input could be read: cannot read image '00\.png'") as caught:
        diag.probe("demo:vit-p16", tmp_path, metrics=FAST)
    assert caught.value.tip


# --- layers that are not measured


@pytest.fixture(scope="module")
def hybrid() -> nn.Module:
    """Five blocks, of which the fourth, layer 3, has softmax attention."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    kinds = ["full_attention" if layer == 3 else "conv" for layer in range(5)]
    torch.manual_seed(0)
    return Lfm2Model(Lfm2Config(**sizes, num_hidden_layers=5, layer_types=kinds, vocab_size=32)).eval()


IDS = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layers", [None, [3], -2, "3", ["-2"]])
def test_layers_of_a_hybrid_keep_their_numbers(hybrid: nn.Module, layers: Any) -> None:
    found = diag.probe(hybrid, [{"input_ids": IDS}], metrics=["cos_y_vself"], layers=layers)
    assert list(found.layers["layer"]) == [3]
    convolution = "no softmax attention (Lfm2ShortConv)"
    assert found.skipped == {f"layers.{index}": convolution for index in (0, 1, 2, 4)}
    assert found.depths == {"module": 5}
    if layers is None:
        low, high = found.plot()["curves-Lfm2Model-module-all"].axes[0].get_xlim()
        assert (low < 0, high > 4) == (True, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0]}, "layer 0 ('layers.0') is not measured: no softmax attention"),
        ({"layers": "last"}, "layer -1 is layer 4 ('layers.4'), which is not measured: no softmax attention"),
        ({"layers": 5}, "no layer 5"),
        ({"intervene": ["xsa:2-3"]}, "--intervene xsa:2-3: layer 2 ('layers.2') is not measured"),
    ],
)
def test_a_layer_without_attention_is_refused_by_name(hybrid: nn.Module, options: dict, message: str) -> None:
    with pytest.raises(UserError) as told:
        diag.probe(hybrid, [{"input_ids": IDS}], metrics=["cos_y_vself"], **options)
    assert str(told.value).startswith(message)
    assert told.value.tip in ("layers that are measured: 3", "layers are 0 to 4, or -1 to -5 from the last")


class Plain(nn.Module):
    """A block without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


@pytest.mark.parametrize(("behind", "known"), [((), True), ((Plain,), False)])
def test_what_needs_every_block_is_undefined_where_one_is_not_measured(behind: tuple, known: bool) -> None:
    torch.manual_seed(0)
    own = [nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True) for _ in range(2)]
    model = nn.Sequential(*own, *(block() for block in behind)).eval()
    found = diag.probe(model, batches(2), metrics=["secondary_sinks", "cos_y_vself"])
    assert list(found.layers.query("metric == 'secondary_sinks'")["mean"].notna()) == [known, known]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["entrpy"]}, "unknown metric 'entrpy'"),
        ({"metrics": []}, "--metrics names nothing"),
        ({"layers": []}, "--layers names nothing"),
        ({"layers": [-7]}, "no layer -7"),
        ({"layers": [6]}, "no layer 6"),
        ({"tokens": ["registers"]}, "no token set 'registers'"),
        ({"limit": 0}, "--limit"),
        ({"layers": 1.5}, "--layers is a whole number"),
        ({"dtype": "int8"}, "--dtype"),
        ({"device": "cuda:77"}, "device 'cuda:77' is not available"),
    ],
)
def test_options_that_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        diag.probe("demo:vit-p16", "demo", **options)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (None, "the model is a NoneType"),
        (nn.Linear, "the model is the class Linear"),
        (Path("demo:vit-p16"), "the model is a PosixPath"),
    ],
)
def test_what_is_no_model_is_told(model: Any, said: str) -> None:
    with pytest.raises(UserError) as told:
        diag.probe(model, "demo")
    assert str(told.value) == said
    assert told.value.tip == "give its name as text, or an nn.Module that is built"


def test_one_batch_is_not_a_list_of_batches(mixer: Mixer) -> None:
    """Its rows would be taken for batches, and their tokens for inputs."""
    (batch,) = batches(3)
    for given, kind in ((batch, "Tensor"), ({"x": batch}, "dict")):
        with pytest.raises(UserError) as told:
            diag.probe(mixer, given)
        assert str(told.value) == f"one batch was given (a {kind}), where several are due"


def test_rows_are_counted_from_the_end_too() -> None:
    (call, *_) = diag.capture("demo:lm", "demo", limit=1, seq_len=8, layers=0)
    whole = diag.pattern_rows(call)
    for rows in ([-1, 2], -1, torch.tensor([-8])):
        chosen = torch.as_tensor(rows).reshape(-1)
        torch.testing.assert_close(diag.pattern_rows(call, rows), whole[:, :, chosen])
    with pytest.raises(UserError, match=r"no query row \[0, 8\]") as told:
        diag.pattern_rows(call, [0, 8])
    assert told.value.tip == "rows are 0 to 7, or -1 to -8 from the last"
    with pytest.raises(UserError, match="rows are float32"):
        diag.pattern_rows(call, torch.tensor([0.5]))


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        ("demo:lm", {"a": "a text " * 99}, "neither all PIL images nor all strings"),
        ("demo:lm", [Image.new("RGB", (8, 8))], "has no vision tower"),
        ("demo:vit-p16", ["text"], "has no text tower"),
        ("demo:vit-p16", [], "neither all PIL images nor all strings"),
        ("demo:lm", ["short", "too"], "gives no sample"),
    ],
)
def test_inputs_that_do_not_fit(model: str, given: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        diag.probe(model, given)


# --- own modules


def test_a_module_gives_the_numbers_of_its_own_formula(mixer: Mixer) -> None:
    given = batches(3, 2)
    run = diag.probe(mixer, given, metrics=FAST)
    assert set(run.layers["module"]) == {"first", "second"}
    assert set(run.layers["model"]) == {"Mixer"}
    with torch.inference_mode():
        q, k, v = mixer.first.split(torch.cat(given)).double()
        pattern = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
        cosine = F.cosine_similarity(pattern @ v, v, dim=-1).mean(-1)  # [input, head]
        entropy = -(pattern * pattern.log()).sum(-1).mean(-1)
    assert means(run)[0, "cos_y_vself"] == pytest.approx(cosine.mean().item(), abs=1e-6)
    assert means(run)[0, "entropy"] == pytest.approx(entropy.mean().item(), abs=1e-6)
    heads = run.heads.set_index(["layer", "metric", "head"])["mean"]
    np.testing.assert_allclose(heads[0, "cos_y_vself"], cosine.mean(0), atol=1e-6)
    first = run.samples[(run.samples["layer"] == 0) & (run.samples["metric"] == "entropy")]
    np.testing.assert_allclose(first["value"].to_numpy().reshape(5, 2), entropy, atol=1e-6)
    assert list(first["input"].unique()) == [f"{i:06d}" for i in range(5)]


def test_a_stream_of_dicts_is_read_as_far_as_the_limit(mixer: Mixer) -> None:
    drawn = []

    def stream() -> Iterator[dict[str, Tensor]]:
        for number, batch in enumerate(batches(*[2] * 10)):
            drawn.append(number)
            yield {"x": batch}

    run = diag.probe(mixer, stream(), metrics=FAST, limit=5)
    assert run.layers["n"].eq(5).all()
    assert len(drawn) <= 4
    whole = diag.probe(mixer, [torch.cat(batches(2, 2, 2))[:5]], metrics=FAST)
    np.testing.assert_allclose(means(run), means(whole), atol=1e-6)


def test_one_token_alone_has_nothing_to_measure(mixer: Mixer) -> None:
    with pytest.raises(UserError, match=r"none of the metrics has a number \(1 token per input\)") as caught:
        diag.probe(mixer, [torch.randn(2, 1, 16)], metrics=FAST)
    assert "more tokens" in str(caught.value.tip)


def test_padding_does_not_count(mixer: Mixer) -> None:
    (x,) = batches(2)
    padded = torch.cat([x, torch.full((2, 3, 16), 9.0)], dim=1)
    mask = torch.cat([torch.ones(2, 7), torch.zeros(2, 3)], dim=1).long()
    run = diag.probe(mixer, [{"x": padded, "attention_mask": mask}])
    bare = diag.probe(mixer, [x])
    np.testing.assert_allclose(means(run), means(bare)[means(run).index], atol=2e-5)
    unmasked = diag.probe(mixer, [padded])
    assert abs(means(unmasked)[0, "entropy"] - means(bare)[0, "entropy"]) > 0.1


@pytest.mark.parametrize("inside", ["function", "MultiheadAttention"])
def test_every_way_of_being_causal_gives_the_same_table(inside: str) -> None:
    """Every metric of attention; also for PyTorch's own objects, whose memory holds no mask."""
    ways = (
        WAYS if inside == "function" else {name: WAYS[name] for name in ("is_causal", "lower right", "-inf")}
    )
    (x,) = batches(3, tokens=9)
    runs = {}
    for name, options in ways.items():
        torch.manual_seed(0)
        module = (Masked if inside == "function" else MaskedInside)(**options(9)).eval()
        runs[name] = diag.probe(
            module, [x], metrics=sorted(GROUPS.keys() - {"stream", "divergence", "followed", "untrained"})
        )
        (call,) = diag.capture(module, x)
        assert torch.equal(diag.pattern_rows(call) > 0, torch.ones(3, 2, 9, 9).tril().bool()), name
    whole = means(runs["is_causal"])
    for name, run in runs.items():
        np.testing.assert_allclose(means(run), whole, rtol=0, atol=1e-6, err_msg=name)
    assert whole[0, "entropy_normalized"] > 0.9
    free = diag.probe(Masked().eval(), [x], metrics=["entropy"])
    assert means(free)[0, "entropy"] > whole[0, "entropy"] + 0.1


def test_tokens_of_an_own_module_lie_in_a_line_only_where_they_were_given_in_one() -> None:
    """Patches of images do not: what needs places is undefined, and no sink is called one on text."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.block = nn.Conv2d(3, 16, 4, 4), Block()

        def forward(self, pixels: Tensor) -> Tensor:
            return self.block(self.embed(pixels).flatten(2).transpose(1, 2))

    placed = ["output_from_near", "cos_y_vnear", "attention_distance", "sink_on_text"]
    torch.manual_seed(0)
    images = diag.probe(Patches().eval(), [torch.randn(3, 3, 16, 16)], metrics=[*placed, "entropy"])
    assert set(images.layers.loc[images.layers["mean"].notna(), "metric"]) == {"entropy"}
    line = diag.probe(Block().eval(), batches(3, tokens=9), metrics=placed)
    assert set(line.layers.loc[line.layers["mean"].notna(), "metric"]) == {*placed[:3]}


def test_layers_whose_sink_classes_are_undefined_are_named(tmp_path: Path) -> None:
    """Also from Python, and in what is saved: here the projection does not read the heads' outputs."""

    class Scaled(Block):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            q, k, v = self.split(x)
            heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return x + self.out(heads * heads.std())

    run = diag.probe(nn.Sequential(Scaled()).eval(), batches(2), metrics=["sink_event", "sink_no_op"])
    (said,) = run.notes
    assert said.startswith("what sinks do (no-op, broadcast) is empty where the output projection is not")
    assert said.endswith(": 0")
    run.save(tmp_path / "saved")
    assert diag.Probe.load(tmp_path / "saved").notes == [said]
    assert diag.probe("demo:vit-p16", "demo", limit=2, metrics=["sink_event", "sink_no_op"]).notes == []


def test_causality_up_to_the_last_of_more_keys_is_named() -> None:
    class Attention(Block):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            q, k, v = self.split(x)
            return F.scaled_dot_product_attention(q[:, :, -4:], k, v, causal_lower_right(4, 7))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.cached = Block(), Attention()

        def forward(self, x: Tensor) -> Tensor:
            x = self.own(x)
            return x + self.cached(x).mean()

    run = diag.probe(Both().eval(), batches(2), metrics=FAST)
    assert run.skipped == {"cached": "4 queries over 7 keys: causal up to the last key, as with a cache"}
    assert set(run.layers["module"]) == {"own"}


def test_nested_tensors_are_refused_by_name() -> None:
    class Attention(Block):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            parts = self.split(x).transpose(2, 3)  # [q k v, batch, token, head, dim]
            rows = [[part[0], part[1, :4]] for part in parts]
            q, k, v = (torch.nested.nested_tensor(row, layout=torch.jagged).transpose(1, 2) for row in rows)
            return F.scaled_dot_product_attention(q, k, v)

    module = nn.Sequential(Attention()).eval()
    with pytest.raises(UserError, match="layer '0' attends over nested tensors, of several lengths"):
        diag.probe(module, batches(2), metrics=FAST)


class Checkpointed(nn.Module):
    """Forgets in between what a backward pass computes again."""

    def __init__(self, mixer: Mixer, reentrant: bool) -> None:
        super().__init__()
        self.mixer, self.reentrant = mixer, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.mixer, x, use_reentrant=self.reentrant)


class WithParameters(nn.Module):
    """Runs a module with parameters that it is given."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.mixer, dict(self.mixer.named_parameters()), (x,))


class InPlace(nn.Module):
    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = copy.deepcopy(mixer)
        self.mixer.compile(backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    "around",
    [
        partial(Checkpointed, reentrant=False),
        partial(Checkpointed, reentrant=True),
        WithParameters,
        InPlace,
        partial(torch.compile, backend="eager"),
    ],
)
def test_a_module_is_the_same_however_it_is_run(
    mixer: Mixer, around: Callable[[nn.Module], nn.Module]
) -> None:
    expected = diag.probe(mixer, batches(2), metrics=FAST)
    found = diag.probe(around(mixer).eval(), batches(2), metrics=FAST)
    apart = ["module", "model"]
    pd.testing.assert_frame_equal(found.layers.drop(columns=apart), expected.layers.drop(columns=apart))
    given = [name.removeprefix("mixer.") for name in found.layers["module"]]
    assert given == expected.layers["module"].tolist()


def test_vmap_is_named() -> None:
    class Mapped(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda one: super(Mapped, self).forward(one[None])[0])(x)

    with pytest.raises(UserError, match=r"^layer '0' runs under torch\.vmap") as error:
        diag.probe(Mapped(Block()).eval(), batches(2), metrics=FAST)
    assert "without it" in error.value.tip


def test_a_module_is_left_as_it_was(mixer: Mixer) -> None:
    (x,) = batches(2)
    before = mixer(x)
    weights = {name: value.clone() for name, value in mixer.state_dict().items()}
    diag.probe(mixer, [x], metrics=FAST)
    assert torch.equal(mixer(x), before)
    assert all(torch.equal(value, weights[name]) for name, value in mixer.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in mixer.modules())
    assert all(parameter.requires_grad for parameter in mixer.parameters())


def test_the_dtype_in_the_table_is_the_modules_own(mixer: Mixer) -> None:
    run = diag.probe(mixer.bfloat16(), [batches(2)[0].bfloat16()], metrics=FAST)
    assert run.layers["dtype"].eq("bfloat16").all()
    assert diag.probe(mixer.float(), batches(2), metrics=FAST).layers["dtype"].eq("float32").all()


# --- capture


def test_captured_calls_rebuild_their_output() -> None:
    calls = diag.capture("demo:lm", ["The statement is explained in the section below. " * 4], seq_len=12)
    assert [call.layer for call in calls] == list(range(6))
    for call in calls:
        assert call.causal
        pattern = diag.pattern_rows(call)
        assert pattern.shape == (*call.output.shape[:3], call.tokens)
        assert torch.allclose(pattern.sum(-1), torch.ones(()), atol=1e-5)
        assert torch.equal(pattern, pattern.tril())
        assert torch.allclose(pattern @ call.value, call.output, atol=1e-5)


def test_weights_of_chosen_rows() -> None:
    (call,) = diag.capture("demo:vit-p16", "demo", layers=[3], limit=2)
    assert (call.module, call.batch, call.heads, call.tokens) == ("blocks.3.attn", 2, 3, 17)
    (causal,) = diag.capture("demo:lm", "demo", layers=[0], seq_len=6, limit=1)
    assert torch.allclose(
        diag.pattern_rows(causal, [4, 0]), diag.pattern_rows(causal)[:, :, [4, 0]], atol=1e-6
    )
    whole = diag.pattern_rows(call)
    rows = diag.pattern_rows(call, [0, 16, 5])
    assert torch.allclose(rows, whole[:, :, [0, 16, 5]], atol=1e-6)
    assert not torch.allclose(rows[:, :, 0], rows[:, :, 1], atol=1e-3)


def test_a_modules_batch_is_captured_whole(mixer: Mixer) -> None:
    (x,) = batches(70)
    calls = diag.capture(mixer, x)
    assert [(call.module, call.batch) for call in calls] == [("first", 70), ("second", 70)]
    q, k, v = mixer.first.split(x)
    for got, expected in ((calls[0].query, q), (calls[0].key, k), (calls[0].value, v)):
        assert torch.allclose(got, expected, atol=1e-6)
    (one,) = diag.capture(mixer, {"x": x}, layers=1)
    assert one.module == "second"


def test_more_inputs_than_a_model_takes_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from diag.run.api import load

    def one_by_one(*args: object, **options: object) -> object:
        model = load(*args, **options)  # type: ignore[arg-type]
        return replace(model, towers={"vision": replace(model.towers["vision"], max_batch=1)})

    monkeypatch.setattr("diag.run.api.load", one_by_one)
    with pytest.raises(UserError, match="takes 1 input at once, 3 were given"):
        diag.capture("demo:vit-p16", "demo", limit=3)
    assert len(diag.capture("demo:vit-p16", "demo", limit=1)) == 6


def test_the_package_hands_out_its_names() -> None:
    assert {"probe", "capture", "images", "texts", "pattern_rows", "METRICS"} <= set(dir(diag))
    for name in diag.__all__:
        assert getattr(diag, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'prob'"):
        _ = diag.prob


def test_the_package_is_known_by_the_name_that_it_is_installed_by() -> None:
    import attnbias
    import attnbias.collect
    import attnbias.errors
    from attnbias.studies.compare import compare

    assert attnbias is diag
    assert attnbias.errors.UserError is UserError is attnbias.UserError
    assert attnbias.collect is diag.collect
    assert compare.__module__ == "diag.studies.compare"
    with pytest.raises(ModuleNotFoundError, match=r"attnbias\.nothing"):
        importlib.import_module("attnbias.nothing")


def test_a_text_and_an_image_alone_and_paths_as_words(noise: Path) -> None:
    text = "the cat sat on the mat . " * 20
    one, listed = (
        diag.probe("demo:lm", given, metrics=FAST, seq_len=16, limit=2) for given in (text, [text])
    )
    pd.testing.assert_series_equal(means(one), means(listed), check_exact=True)
    files = sorted(noise.iterdir())[:2]
    picture = Image.open(files[0]).convert("RGB")
    alone, several, paths = (
        diag.probe("demo:vit-p16", given, metrics=FAST) for given in (picture, [picture], [str(files[0])])
    )
    for run in (alone, paths):
        pd.testing.assert_series_equal(means(run), means(several), check_exact=True)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (torch.zeros(2, 9, dtype=torch.long), "tensors"),
        ({"input_ids": torch.zeros(2, 9)}, "tensors"),
        ([torch.zeros(2, 9)], "tensors"),
        ([1, 2, 3], "numbers"),
        ([[1, 2], [3, 4]], "numbers"),
    ],
)
def test_ready_tensors_do_not_go_with_a_name(given: Any, what: str) -> None:
    with pytest.raises(UserError) as told:
        diag.probe("demo:lm", given)
    assert str(told.value) == f"inputs are {what}, and 'demo:lm' makes its own of texts or images"
    assert "the model as an object" in str(told.value.tip)


def test_names_and_weights_of_a_name() -> None:
    options: dict[str, Any] = {"limit": 1, "metrics": FAST}
    trained = diag.probe("demo:vit-p16", "demo", **options)
    called = diag.probe("demo:vit-p16", "demo", name="mine", **options)
    assert set(called.layers["model"]) == {"mine"}
    pd.testing.assert_series_equal(means(called), means(trained), check_exact=True)
    random = diag.probe("timm:vit_tiny_patch16_224", "demo", random_init=True, layers=0, **options)
    assert set(random.layers["weights"]) == {"random"}
    with pytest.raises(UserError, match=r"nowhere\.pt"):
        diag.probe("timm:vit_tiny_patch16_224", "demo", checkpoint="nowhere.pt", **options)


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_the_numbers_do_not_depend_on_torchs_default_format(default: torch.dtype) -> None:
    batches = [torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))]
    torch.manual_seed(0)
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    options = {"intervene": ["gated_xsa=0.5"], "limit": 2}

    def found() -> list[pd.DataFrame]:
        own = diag.probe(module, batches, metrics=["default", "sinks", "nmi", "overlap"], **options)
        named = diag.probe("demo:vit-p16", "demo", metrics=["cos_y_vself", "stream", "position"], **options)
        text = diag.probe("demo:lm", ["the cat sat on the mat . " * 20], metrics=FAST, seq_len=32, **options)
        return [run.heads for run in (own, named, text)]

    expected = found()
    torch.set_default_dtype(default)
    try:
        given = found()
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(expected, given, strict=True):
        pd.testing.assert_frame_equal(one, other)
