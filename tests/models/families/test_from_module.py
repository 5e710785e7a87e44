"""A user's own module with ready batches."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from diag.errors import UserError
from diag.models.families.from_module import from_module
from diag.models.hooks.meaning import meaning_of
from diag.models.hooks.seam import attention_calls


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Mixer(nn.Module):
    """Modules whose names say nothing, registered against the order in which they run."""

    def __init__(self) -> None:
        super().__init__()
        self.later = Block()
        self.sooner = Block()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        return self.later(self.sooner(x, mask), mask)


def test_layers_are_found_in_the_order_of_their_calls() -> None:
    model, (tower,), samples = from_module(Mixer().eval(), [torch.randn(2, 5, 16)] * 2)
    assert [layer.path for layer in tower.layers] == ["sooner", "later"]
    assert (model.family, tower.name, tower.token_sets) == ("module", "module", ("all",))
    ids = [tower.encode([sample]).ids for sample in samples]
    assert ids == [("000000", "000001"), ("000002", "000003")]


def test_a_dict_goes_in_by_name_and_its_mask_says_what_is_real() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    _, (tower,), samples = from_module(Mixer().eval(), [{"x": torch.randn(2, 4, 16), "attention_mask": mask}])
    batch = tower.encode(samples)
    assert batch.real is not None
    assert torch.equal(batch.real, mask.bool())
    calls = []
    with torch.inference_mode(), tower.capture(tower.layers, calls.append):
        tower.forward(batch)
    assert calls[0].visibility.keys.tolist() == mask.bool().tolist()


def test_batches_are_read_once_and_cut_at_the_limit() -> None:
    drawn = []

    def stream():
        for i in range(9):
            drawn.append(i)
            yield torch.randn(3, 5, 16)

    _, (tower,), samples = from_module(Mixer().eval(), stream(), limit=4)
    assert [len(tower.encode([sample]).ids) for sample in samples] == [3, 1]
    assert len(drawn) <= 3


with warnings.catch_warnings(action="ignore"):  # strided ones are on their way out
    STRIDED, JAGGED = (
        torch.nested.nested_tensor([torch.ones(5, 16), torch.ones(3, 16)], layout=layout)
        for layout in (torch.strided, torch.jagged)
    )


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batch was given"),
        (["text"], "a batch is a str"),
        ([{"x": 3}], "a batch is a dict"),
        ([{"x": torch.ones(2, 3), "y": torch.ones(3)}], "differ in rows"),
        ([torch.ones(0, 5, 16)], r"^batch 0 holds no inputs: its shape is \[0, 5, 16\]"),
        (
            [torch.ones(2, 5, 16), torch.ones(0, 5, 16)],
            r"^batch 1 holds no inputs: its shape is \[0, 5, 16\]",
        ),
        ([{"x": torch.ones(0, 5, 16)}], r"^'x' of batch 0 holds no inputs: its shape is \[0, 5, 16\]"),
        ([torch.ones(2, 0, 16)], r"^batch 0 holds no tokens: its shape is \[2, 0, 16\]"),
        ([STRIDED], "^batch 0 is a nested tensor, of inputs of several lengths"),
        (
            [{"x": JAGGED}],
            "^'x' of batch 0 is a nested tensor",
        ),
    ],
)
def test_batches_that_are_none(batches: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_module(Mixer(), batches)


def test_a_module_that_takes_whole_batches_only_is_given_them() -> None:
    class OfThree(Mixer):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            if len(x) != 3:
                raise RuntimeError(f"made for 3 inputs, not {len(x)}")
            return super().forward(x, attention_mask)

    _, (tower,), samples = from_module(OfThree().eval(), [torch.randn(3, 5, 16)])
    assert [layer.path for layer in tower.layers] == ["sooner", "later"]
    assert len(tower.encode(samples).ids) == 3
    for rows in (2, 4):
        with pytest.raises(RuntimeError, match=f"made for 3 inputs, not {rows}"):
            from_module(OfThree().eval(), [torch.randn(rows, 5, 16)])


def test_modules_that_cannot_be_seen_are_refused() -> None:
    with pytest.raises(UserError, match="made no self-attention call"):
        from_module(nn.Linear(4, 4).eval(), [torch.ones(2, 4)])
    with warnings.catch_warnings(action="ignore"):  # torch.jit is on its way out
        traced = torch.jit.trace(Mixer().eval(), torch.ones(2, 5, 16))
    with pytest.raises(UserError, match="not visible from Python"):
        from_module(traced, [torch.ones(2, 5, 16)])


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("kind", ["encoder", "attention"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_watched_module_leaves_torchs_fused_path_and_nothing_else_changes(kind: str, padded: bool) -> None:
    torch.manual_seed(0)
    module: nn.Module = nn.MultiheadAttention(64, 4, batch_first=True)
    if kind == "encoder":
        module = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 3)
    module.eval().requires_grad_(False)
    x, padding = torch.randn(3, 20, 64), torch.arange(20) >= torch.tensor([[20], [15], [5]])
    mask = padding if padded else None

    def run() -> Tensor:
        if kind == "encoder":
            return module(x, src_key_padding_mask=mask)
        return module(x, x, x, key_padding_mask=mask, need_weights=False)[0]

    before = torch.backends.mha.get_fastpath_enabled()
    with torch.inference_mode():
        torch.backends.mha.set_fastpath_enabled(False)
        plain = run()
        torch.backends.mha.set_fastpath_enabled(True)
        fused = run()
        with attention_calls(
            meaning_of(module, lambda _: run(), None, None, inputs=3).towers[0].layers, lambda call: None
        ):
            watched = run()
        torch.backends.mha.set_fastpath_enabled(before)
    assert torch.equal(watched, plain)
    assert not torch.equal(fused, plain)  # it is another route: docs/models.md says so
    real = ~padding if padded else torch.ones_like(padding)
    torch.testing.assert_close(watched[real], fused[real], atol=2e-6, rtol=0)
    if kind == "encoder" and padded:
        assert (fused[~real] == 0).all()
        assert (watched[~real] != 0).any()


def test_padding_of_an_encoder_that_is_not_seen_cuts_no_row_of_its_decoder() -> None:
    """LED's encoder weighs bands, which no product shows; its mask is not the decoder's."""
    sizes = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sizes |= {"max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32}
    model = transformers.LEDModel(
        transformers.LEDConfig(vocab_size=60, d_model=16, attention_window=4, **sizes)
    ).eval()
    given = {
        "input_ids": torch.randint(4, 50, (2, 12)),
        "attention_mask": torch.ones(2, 12, dtype=torch.long),
    }
    given["attention_mask"][1, 8:] = 0
    _, (tower,), samples = from_module(model, [given])
    batch = tower.encode(list(samples))
    assert batch.real is None
    assert [layer.path for layer in tower.layers] == [f"decoder.layers.{i}.self_attn" for i in range(2)]
