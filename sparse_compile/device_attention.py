"""An attention on a GPU: as ``device_linear.py``, query rows for rows.

Rows are chosen by what stays on the device; whether zero rows are skipped is decided by how many there were
at the backward before; and whether the op's own backward or Triton's computes the rows is measured once for
every shape (``kernels/choice.py``). Both give the gradients of the same rows. Whether choosing rows pays at
all is measured as well, against the op's own backward of all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from sparse_compile.kernels import choice, on_device, triton
from sparse_compile.kernels.attention import Gradients
from sparse_compile.kernels.attention_cuda import CudaFused, Queries
from sparse_compile.looks import LaterLooks
from sparse_compile.methods.attention import ChosenRows, share_of
from sparse_compile.methods.rows import number_kept
from sparse_compile.methods.sample import Draw
from sparse_compile.settings.reuse import Reuse
from sparse_compile.settings.sample import Sample
from sparse_compile.tally import Tally

# As for linears: see device_linear.py.
_WORTH_SKIPPING = 1 / 16
WORTH_LOOKING = 4e9  # FLOPs of the five products
_LONGEST_PAUSE = 15


class DeviceAttention:
    """What an attention's site keeps for its GPU.

    Attributes:
        kernel: what its last backward ran on.
        by_kernel: whether there is a kernel for some of its rows.
        slower: whether choosing rows was found to be no faster than the backward of all.
    """

    @classmethod
    def of(
        cls,
        do: Tensor,
        forward: object,
        last: DeviceAttention | None,
        settle: Callable[[], None],
        tally: Tally | None = None,
    ) -> DeviceAttention | None:
        """As :meth:`DeviceLinear.of`; None where ``forward`` is none of CUDA's."""
        on_gpu = isinstance(forward, CudaFused)
        if last is not None:
            if on_gpu and last._where == do.device:
                return last
            settle()
        return cls(do.device, tally) if on_gpu else None

    def __init__(self, where: torch.device | None = None, tally: Tally | None = None) -> None:
        self.kernel = ""
        self._where = where
        self.by_kernel = True
        self.slower = False
        self._asked: tuple[object, ...] | None = None
        self._chosen_by: Callable[[Tensor], object] | None = None  # in this backward
        self._tally = tally or Tally()
        self._looks = LaterLooks(_LONGEST_PAUSE, _WORTH_SKIPPING)

    def live_queries(self, do: Tensor, forward: CudaFused) -> Queries | None:
        """The rows of ``do`` [B, H, T, D] that are not zero, or None: nobody looked, or it would not pay."""
        worth_looking = forward.by_kernel and flops_of(forward, len(do) * do.shape[2]) >= WORTH_LOOKING
        if not worth_looking or not self._looks.due():
            return None
        live = on_device.live_queries(do)
        found = self._looks.found(live.sum(), live.numel())
        return Queries(live, None, self._looks.alive) if found else None

    def pays(self, method: Reuse | Sample, do: Tensor, forward: CudaFused) -> bool:
        """Whether to choose rows by ``method``; as :meth:`DeviceLinear.pays`."""
        self._asked = self._asked_of(method, self.sizes(do, forward))
        self.slower = choice.known(self._asked) == "dense"
        return not self.slower

    @classmethod
    def is_faster(cls, method: Reuse | Sample, sizes: tuple[object, ...]) -> bool:
        """Whether ``method`` was not found to be slower, for what :meth:`sizes` says of a backward."""
        return choice.known(cls._asked_of(method, sizes)) != "dense"

    @staticmethod
    def _asked_of(method: Reuse | Sample, sizes: tuple[object, ...]) -> tuple[object, ...]:
        return ("chosen", method.method, *sizes, round(16 * cast(float, method.keep)))

    def draw(
        self, do: Tensor, forward: CudaFused, keep: float, clip: float | None, draw: Draw | Tensor
    ) -> Queries:
        """round(keep · B · T) rows drawn by ‖dO_t‖ over all heads; see :mod:`methods.attention`. ``draw`` may
        be its numbers, on the device."""
        numbers = draw if isinstance(draw, Tensor) else (draw.number(), draw.number())

        def choose(tally: Tensor) -> Queries:
            k = number_kept(keep, len(do) * do.shape[2])
            weights = on_device.drawn_queries(do, k, clip, numbers, tally)
            return Queries(weights != 0, weights, keep)

        self._chosen_by = choose
        return choose(self._tally.on(do.device))

    def choose(self, do: Tensor, mean: Tensor, keep: float) -> tuple[Queries, ChosenRows]:
        """The rows with the largest ‖dO − dŌ‖; see :func:`methods.attention.choose_rows`. By Triton alone."""

        def choose(tally: Tensor) -> tuple[Queries, ChosenRows]:
            b, h, t, d = do.shape
            rows = do.transpose(1, 2).reshape(b * t, h * d)
            base = mean.transpose(0, 1).reshape(t, h * d)
            squares, live = on_device.row_stats(rows, base)
            dropped = on_device.largest(squares, live, number_kept(keep, b * t), base, tally).dropped
            assert dropped is not None
            computed, dropped = (live & ~dropped).view(b, t), dropped.view(b, t)
            norms = torch.linalg.vector_norm(do, dim=(1, 3), dtype=torch.float32)
            chosen = ChosenRows(computed, dropped, share_of(norms, dropped))
            return Queries(computed, computed.to(torch.float32), keep), chosen

        self._chosen_by = choose
        return choose(self._tally.on(do.device))

    def backward(
        self,
        do: Tensor,
        forward: CudaFused,
        queries: Queries | None,
        finish: Callable[[Gradients], Gradients] = lambda gradients: gradients,
    ) -> Gradients:
        """dQ, dK, dV of ``queries``, or of all rows, on whatever is fastest; as ``finish`` makes them."""

        def by_aten() -> Gradients:
            return finish(forward.backward(do if queries is None else queries.apply(do)))

        if queries is None or not forward.by_kernel:
            self.kernel = "aten"
            return by_aten()

        def by_triton() -> Gradients:
            return finish(forward.backward_of_queries(do, queries))

        candidates = {"aten": by_aten, "triton": by_triton}
        with triton.current(do.device):  # whose time is taken
            self.kernel = choice.fastest(self._key(do, forward, queries), candidates)
            self._time_choosing(do, forward, candidates[self.kernel])
        if self.kernel == "aten":
            return by_aten()
        if queries.weights is None:
            count = queries.live.sum(dtype=torch.int32)
            flops = flops_of(forward, 1)
            tally = self._tally.on(do.device)
            on_device.tally_rows(tally, count, queries.live.numel(), zero=True, flops=flops)
        return by_triton()

    def _time_choosing(self, do: Tensor, forward: CudaFused, products: Callable[[], object]) -> None:
        """Choosing rows and their ``products`` against the backward of all rows, if rows were chosen. (To
        renew the means of reuse is not in it.)"""
        choose, self._chosen_by = self._chosen_by, None
        if choose is None or self._asked is None:
            return
        scratch = torch.empty(3, dtype=torch.int64, device=do.device)
        candidates: dict[str, Callable[[], object]] = {
            "dense": lambda: forward.backward(do),
            "chosen": lambda: (choose(scratch), products()),
        }
        choice.fastest(self._asked, candidates)

    def sizes(self, do: Tensor, forward: CudaFused) -> tuple[object, ...]:
        """What the time of a backward depends on, but for the rows."""
        b, h, t, d = forward.shape
        mask = None if forward.mask is None else (forward.mask.dtype, forward.mask.stride(-2) == 0)
        return (
            *("attention", do.device, do.dtype, forward.form, choice.bucket(b), h, choice.bucket(t), d),
            *(forward.k.shape[1], choice.bucket(forward.keys), forward.causal, mask),
        )

    def _key(self, do: Tensor, forward: CudaFused, queries: Queries) -> tuple[object, ...]:
        return (*self.sizes(do, forward), queries.weights is None, round(16 * queries.share))

    def settle(self) -> tuple[int, int, int]:
        """The tally since the last call, on the host."""
        return self._tally.settle()


def flops_of(forward: CudaFused, rows: int) -> int:
    """Of the five products, over so many query rows in all heads."""
    _, heads, _, features = forward.shape
    return 10 * rows * heads * forward.keys * features
