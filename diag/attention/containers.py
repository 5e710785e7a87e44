"""What the statistics of one call are: plain containers that PyTorch and Triton both fill."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SoftmaxStatistics:
    """Per query row, float32, `[batch, head, token]`. Rows that see no key hold no meaning.

    Entropy and Σ A² are those of the call's sampled rows, `[batch, head, row]`, where it has a sample.
    """

    log_normaliser: Tensor | None
    """lse_i; None where only the pattern is known, or several maps are added up"""
    entropy: Tensor
    """-Σ_j A_ij ln A_ij, in nats; NaN where several maps are added up, anything where weights are negative"""
    sum_of_squares: Tensor
    """Σ_j A_ij²; NaN where several maps are added up"""
    self_weight: Tensor
    """A_ii"""
    first_weight: Tensor
    """A_i0, the weight on the first key that anyone sees"""
    row_sum: Tensor | None = None
    """Σ_j A_ij over tokens, of all rows; None of a softmax over tokens, where it is 1"""
    received: Float[Tensor, "set batch head key"] | None = None
    """Σ_i A_ij over the rows that give, for each set of them; None where it was not summed up on the way"""
    negative: Tensor | None = None
    """whether a row that sees a key has a negative weight, `[batch, head]`; None where none can have one, or
    where several maps are added up"""


@dataclass(frozen=True, eq=False)
class ValueStatistics:
    """Norms, products and sums of one call's values and outputs, float32.

    A token that no query sees has a value of 0, a row that sees no key an output of 0. Where keys are not the
    tokens' own, what needs v_i is NaN.
    """

    value_norm: Float[Tensor, "batch kv_head key"]
    """‖v_i‖"""
    uniform: Float[Tensor, "batch some_head token"]
    """v_i·u_i, u_i = Σ_j v_j over the visible j in S; of query heads where the mask differs between these"""
    uniform_norm: Float[Tensor, "batch some_head token"]
    """‖u_i‖"""
    output_norm: Float[Tensor, "batch head token"]
    """‖y_i‖"""
    product: Float[Tensor, "batch head token"]
    """y_i·v_i"""
    partner: Float[Tensor, "batch head token"]
    """y_i·Σ_j v̂_j over the visible j in S, i among them"""
    exclusive_norm: Float[Tensor, "batch head token"]
    """‖z_i‖"""
    value_total: Float[Tensor, "batch kv_head value_dim"]
    """Σ_j v̂_j over S"""
    output_total: Float[Tensor, "batch head value_dim"]
    """Σ_i ŷ_i over the rows that count"""
    exclusive_total: Float[Tensor, "batch head value_dim"]
    """Σ_i ẑ_i over the rows that count and whose z is more than rounding"""
