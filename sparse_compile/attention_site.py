"""An attention while it trains: finds the query rows whose gradient is zero and computes the others."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_compile.kernels import attention as kernel
from sparse_compile.kernels import attention_chain
from sparse_compile.methods import exact
from sparse_compile.schedule import Phase
from sparse_compile.site import Site


class AttentionSite(Site):
    """The backward of one attention; see :class:`Site`. Its shape is that of Q, [B, H, T, D]; a row of its
    output gradient is that of one query of one sample, in all heads."""

    def fused_backward(self, do: Tensor, forward: kernel.Fused) -> kernel.Gradients:
        """(dQ, dK, dV) of a fused attention.

        Args:
            do: [B, H, T, D].
            forward: what the forward left.
        """
        self.shape = tuple(forward.q.shape)
        groups = self._live_groups(do, forward.k.shape[2], stored=False)
        if groups is None:
            return kernel.fused_backward(do, forward)
        return kernel.fused_backward_of_rows(do, forward, groups)

    def chain_backward(self, do: Tensor, forward: attention_chain.Chain) -> kernel.Gradients:
        """(dQ, dKᵀ, dV) of an attention that is a chain of products.

        Args:
            do: [B · H, T, D].
            forward: what the forward left.
        """
        (pairs, queries, features), keys = do.shape, forward.v.shape[1]
        self.shape = (pairs // forward.heads, forward.heads, queries, features)
        groups = self._live_groups(do.view(self.shape), keys, stored=True)
        if groups is None:
            return attention_chain.backward(do, forward)
        return attention_chain.backward_of_rows(do, forward, groups)

    def keep(self, phase: Phase) -> float:
        return 1.0

    def _live_groups(self, do: Tensor, keys: int, *, stored: bool) -> list[kernel.Group] | None:
        """The query rows of dO [B, H, T, D] that are not zero; None if all are to be computed.

        Args:
            keys: U.
            stored: whether the forward left the probabilities.
        """
        samples, _, queries, features = self.shape
        products = 4 if stored else 5
        live = None if self.left_alone else exact.live_queries(do)
        if live is not None:
            groups = kernel.groups(live)
            computed = sum(group.queries.numel() for group in groups)
            if exact.skip_pays_in_attention(computed, samples * queries, keys, features, stored=stored):
                self._count(samples * queries - int(live.sum()), computed, keys, products)
                return groups
        self._count(0, samples * queries, keys, products)
        return None

    def _count(self, zero: int, computed: int, keys: int, products: int) -> None:
        samples, heads, queries, features = self.shape
        flops = 2 * keys * heads * features  # of one row in one product
        self.counters.backwards += 1
        self.counters.rows += samples * queries
        self.counters.rows_zero += zero
        self.counters.rows_computed += computed
        self.counters.flops_forward += 2 * flops * samples * queries
        self.counters.flops_backward_dense += products * flops * samples * queries
        self.counters.flops_backward += products * flops * computed

    def forget(self) -> None:
        """Nothing is remembered."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is nothing to take over."""
