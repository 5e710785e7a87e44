"""transformer-lens as a second, independent route to the same numbers: `tl:FOLDER` or `tl:ORG/NAME`.

Its bridge computes attention itself and shows values, pattern and output at hook points. It keeps
whole patterns, so it is for short lengths. Nothing is folded into the weights: the values are those
of the checkpoint, and the table is that of `hf:`, soft caps and sinks included: what is shown is what
multiplies the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diag.errors import MeasurementError, UserError
from diag.models.families.hf import commit_of, folder_or_repository
from diag.models.family import Family
from diag.models.names.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformer_lens.model_bridge import TransformerBridge

    from diag.models.base import Model
    from diag.models.hooks.layers import Layer
    from diag.models.hooks.seam import OnCall, Sightings


def load(spec: ModelSpec, *, device: str | torch.device, dtype: torch.dtype) -> Model:
    """Loads `tl:NAME` through `TransformerBridge`. Raises UserError as `diag.models.load` does."""
    from diag.models.base import Model
    from diag.models.families.hf.files import is_causal, load_config
    from diag.models.families.hf.load import text_tower

    bridge, tokenizer = bridge_of(spec, device=device, dtype=dtype)
    config, module = load_config(spec), bridge.original_model
    causal = is_causal(config)
    # the calls carry no mask, so a window that hides keys would be read as full causal attention
    window = getattr(config, "sliding_window", None)
    tower = replace(
        text_tower(module, tokenizer, _layers(bridge, spec), source=spec.name, causal=causal, window=window),
        forward=lambda batch: bridge(batch.data, return_type="logits"),
        also=(),
        ending="next-token logits" if causal else "token states",
        capture=lambda layers, on_call: lens_calls(bridge, layers, on_call, causal=causal),
    )
    facts = {"model_type": config.model_type, "commit": commit_of(spec)}
    return Model(spec.given, spec.family, spec.resolved, module, {"text": tower}, facts=facts)


def bridge_of(
    spec: ModelSpec, *, device: str | torch.device, dtype: torch.dtype
) -> tuple[TransformerBridge, Any]:
    """The bridge around a model in Hugging Face format, and its tokenizer.

    Raises UserError as `load` does.
    """
    from transformer_lens.model_bridge import TransformerBridge

    from diag.models.families.hf.files import check_weights, load_config, load_tokenizer, reading
    from diag.models.families.hf.formats import ADAPTER, CONFIG
    from diag.models.loading import ready

    if spec.checkpoint is not None or spec.random_init:
        raise UserError(
            f"'{spec.resolved}' takes the weights of its folder only",
            "put them beside config.json: -m tl:FOLDER",
        )
    folder = Path(spec.name)
    in_gguf = any(folder.glob("*.gguf")) and not (folder / CONFIG).exists()
    if in_gguf or (folder / ADAPTER).is_file():
        held = "a model in GGUF" if in_gguf else "an adapter"
        raise UserError(
            f"folder '{spec.name}' holds {held}, which tl: names do not read", f"-m hf:{spec.name} reads it"
        )
    load_config(spec)
    if folder.is_dir():
        check_weights(folder)
    tokenizer = load_tokenizer(spec)
    tip = "transformer-lens loads language models in Hugging Face format; try -m hf:" + spec.name
    with reading(spec, "model.safetensors", tip=tip):
        bridge = TransformerBridge.boot_transformers(
            str(folder.resolve()) if folder.is_dir() else spec.name,  # `neox` is one of its names for a hub's
            hf_config_overrides=dict(spec.model_args) or None,
            device=str(device),
            dtype=dtype,
            tokenizer=tokenizer,
            trust_remote_code=spec.trust_remote_code,
            revision=spec.revision,
        )
    ready(bridge.original_model, spec.resolved, device=device, dtype=dtype)
    bridge.eval()
    return bridge, tokenizer


def folded(bridge: TransformerBridge, spec: ModelSpec) -> None:
    """Folds norms and value biases into the weights, as HookedTransformer did where nothing else was asked.

    Raises UserError where transformer-lens does not do that to such a model.
    """
    from diag.models.loading import quiet, theirs

    with quiet(), theirs(f"transformer-lens does not fold '{spec.name}'", "its hooks are right as loaded"):
        bridge.enable_compatibility_mode(disable_warnings=True)


def hooks_shown(bridge: TransformerBridge, ids: Tensor) -> dict[int, dict[str, Tensor]]:
    """`hook_v` and `hook_z` of each layer with attention, `[batch, token, head, dim]`. ids: `[batch, token]`.

    Raises UserError where transformer-lens does not run the model.
    """
    import torch

    from diag.models.loading import theirs

    shown: dict[int, dict[str, Tensor]] = {}

    def keep(number: int, name: str, tensor: Tensor, hook: Any) -> None:
        shown.setdefault(number, {})[name] = tensor.detach().clone()

    hooks = [
        (f"blocks.{number}.attn.{name}", partial(keep, number, name))
        for number, block in enumerate(bridge.blocks)
        if hasattr(block, "attn")
        for name in ("hook_v", "hook_z")
    ]
    failed = theirs("transformer-lens does not run the model", "it is a route of its own: -m hf:NAME")
    with torch.inference_mode(), failed, bridge.hooks(fwd_hooks=hooks):
        bridge(ids, return_type="logits")
    return shown


@contextmanager
def lens_calls(
    bridge: TransformerBridge, layers: Sequence[Layer], on_call: OnCall, *, causal: bool
) -> Iterator[Sightings]:
    """The seam of transformer-lens: `hook_v`, `hook_pattern` and `hook_z` of each layer become one call.

    The pattern is in place of queries and keys; the output is what the output projection reads.
    Raises MeasurementError, naming the layer, if a layer finishes without all three.
    """
    from diag.attention.call import AttentionCall
    from diag.models.hooks.seam import Sightings

    sightings = Sightings()
    seen: dict[int, dict[str, Tensor]] = {layer.index: {} for layer in layers}

    def keep(layer: Layer, what: str, tensor: Tensor, hook: Any) -> None:
        seen[layer.index][what] = tensor

    def at_output(layer: Layer, tensor: Tensor, hook: Any) -> Tensor | None:
        parts = seen[layer.index]
        if not {"value", "pattern"} <= parts.keys():
            return None
        seen[layer.index] = {}
        output = tensor.transpose(1, 2)  # [batch, head, token, dim]
        call = AttentionCall(
            layer=layer.index,
            module=layer.path,
            query=None,
            key=None,
            value=parts["value"].transpose(1, 2),  # [batch, kv_head, token, dim]
            output=output,
            mask=None,
            causal=causal,
            scale=output.shape[-1] ** -0.5,
            pattern=parts["pattern"],
        )
        sightings.calls[layer.path] += 1
        sightings.projection[layer.path] = "as captured"
        replaced = on_call(call)
        return None if replaced is None else replaced.to(tensor.dtype).transpose(1, 2)

    def finished(layer: Layer, module: nn.Module, args: Any, output: Any) -> None:
        if layer.path not in sightings.calls:
            raise MeasurementError(
                f"layer '{layer.path}' finished without showing its values, pattern and output",
                "leave the layer out with --layers, or use the hf: family",
            )

    hooks: list[tuple[str, Callable[..., Any]]] = []
    with ExitStack() as undone:
        for layer in layers:
            hooks += [
                (f"{layer.path}.hook_v", partial(keep, layer, "value")),
                (f"{layer.path}.hook_pattern", partial(keep, layer, "pattern")),
                (f"{layer.path}.hook_z", partial(at_output, layer)),
            ]
            undone.callback(layer.module.register_forward_hook(partial(finished, layer)).remove)
        with bridge.hooks(fwd_hooks=hooks):
            yield sightings


def _layers(bridge: TransformerBridge, spec: ModelSpec) -> tuple[Layer, ...]:
    from diag.models.hooks.layers import Layer

    attention = [(number, block.attn) for number, block in enumerate(bridge.blocks) if hasattr(block, "attn")]
    if not attention:
        raise UserError(f"'{spec.resolved}' has no attention block", f"try -m hf:{spec.name}")
    return tuple(Layer(i, f"blocks.{number}.attn", module) for i, (number, module) in enumerate(attention))


FAMILY = Family(
    "tl",
    load=load,
    named=folder_or_repository,
    folders=True,
    needs=("transformer_lens",),
    packages=("transformer-lens",),
    commit=commit_of,
    reads_text=lambda spec: True,
)
