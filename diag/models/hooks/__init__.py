"""How a model is watched and changed while it runs: attention calls, blocks, the stream between them.

What is here. `seam` turns a model's attention calls into `AttentionCall`s. `block_parts` reads from the names
of a block's parts which modules return what is added to the residual stream, and `residual` hands out the
stream around them. `interventions` are the changes, as functions: of a call's output, of a branch's update,
or, by way of `output_gates`, of the logits of a model's own output gate.

What it sees. Modules from outside: forward hooks on the listed layers, and the PyTorch functions that run
between them. The model's own code and weights are untouched. What a layer used arrives as it used it, in its
format, on its device; the output with somebody watching is the output without, to the bit.

What it tests. `survey` watches every module in one pass and runs those that called attention again with one
element changed; `axis` tells from that whose tokens a call is of, `content` from two passes whose rows it has
and which of its tokens are of no input, and `meaning` what is measured then. `layout` finds heads by what the
projection reads, `depth` gives layers the model's own numbers.

What it trusts. Names, for what is loaded before anything runs, and for what a block's parts are called.
Numbers in paths, for the order of blocks. Addresses, for masks: the tensor that one layer got, given again to
the next, still holds the same.

What it checks. On the first batch `diag.measure.reconstruction` rebuilds A V from each call,
`residual.check_states` the block from its updates and `residual.projection_error` the attention update from
the heads; `Sightings.projection` says whether the output projection read Y as it was captured. A listed layer
that finishes without a call is an error that names it, and so is a block whose branch never ran: a blind
probe must not look like a result. Traced and scripted modules that attend are refused.

What is left behind: nothing. Everything attached is a context manager that takes itself off, also after an
exception; but for hooks only one attribute of `torch.nn.functional` is replaced, for the length of one call.
While a model runs, compiled code is written code (`in_python`), and references to attention functions of
xformers and flash-attn, where these are loaded, go through one that a function mode sees.

What bit people:

- A function mode alone saw 0 of 12 calls of open_clip and torchvision: it is off inside
  `multi_head_attention_forward`. Patching the attribute alone saw 0 of 12 of open_clip's vision tower, which
  takes a fused path, while its text tower looked fine. The seam does both, and a mode that is on keeps
  `nn.MultiheadAttention` and `nn.TransformerEncoder` off their fused paths, which run no hooks; the latter's
  would also nest padded batches.
- Eager attention makes no call at all. Softmax over square scores in a layer without a call is its sign.
- An unpadded Llama hands over V with its KV heads, a padded one with repeated heads. Left padding leaves rows
  that see nothing. CLIP's text tower is causal by argument only, without a mask.
- Windows sit in the batch (Swin), in turn (Qwen2.5-VL), or in an axis of their own (Hiera); SAM has no axis
  of heads. Swin hides its neighbour's patches with -100, which elsewhere is a distance bias.
- Encoder and decoder of one length have cross-attention of as many queries as keys. Fused XCiT attends over
  channels. A decoder is given its memory by name, in front of its own ids: which tensor is changed matters.
- A mask that was dropped gives its address to the next one: a mask whose structure is remembered is kept.
- A gate or norm between attention and W_O makes what the projection reads another thing than Y.
- A branch is changed by a hook before those that watch it, or they would see what is not added. OPT flattens
  tokens for its MLP and Swin its grid, so updates are brought into the block's shape and back.
"""
