"""Reuse in attention in plain eager PyTorch, from DESIGN 3.2 alone: it shares no line with sparse_compile.

Per head: A = softmax(Q·Kᵀ·s + mask), O = A·V. Backward: dV = Aᵀ·dO; dA = dO·Vᵀ; dS = A∘(dA − rowsum(dA∘A))·s;
dQ = dS·K; dK = dSᵀ·Q. Reuse replaces dO and dS by the largest part of their differences to a base, and adds
products of batch means of an earlier backward; or it drops whole query rows, for which means stand in.

One head of one sample at a time; nothing here is fast.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
from reference import Recipe, largest
from torch import Tensor, nn

TOKENS, FEATURES, HEADS = 6, 8, 2


@dataclasses.dataclass
class Remembered:
    """Batch means of an earlier backward (or one sample's tensors), by name, and for how many
    backwards they have been used."""

    means: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    age: int = 0


def sparse(residual: Tensor, recipe: Recipe, contracted: int) -> Tensor:
    """The largest part of R [B, H, T, …], the rest zero; ``contracted`` is the dimension n:m goes along."""
    out = torch.zeros_like(residual, memory_format=torch.contiguous_format)
    if recipe.granularity == "element":
        size = residual.abs().flatten().tolist()
        for i in largest(size, round((1 - recipe.ratio) * len(size))):
            out.view(-1)[i] = residual.flatten()[i]
        return out
    n, m = recipe.ratio
    lines, target = (residual, out) if contracted == -1 else (residual.mT, out.mT)
    for index in torch.cartesian_prod(*map(torch.arange, lines.shape[:3])).tolist():
        line = lines[tuple(index)]
        for start in range(0, len(line), m):
            for i in largest(line[start : start + m].abs().tolist(), n):
                target[(*index, start + i)] = line[start + i]
    return out


def softmax_backward(a: Tensor, da: Tensor, scale: float) -> Tensor:
    return a * (da - (da * a).sum(-1, keepdim=True)) * scale


def dense(do: Tensor, a: Tensor, q: Tensor, k: Tensor, v: Tensor, s: float) -> dict[str, Tensor]:
    ds = softmax_backward(a, do @ v.mT, s)
    return {"dq": ds @ k, "dk": ds.mT @ q, "dv": a.mT @ do, "ds": ds}


def by_elements(
    do: Tensor, a: Tensor, q: Tensor, k: Tensor, v: Tensor, s: float, m: dict[str, Tensor], recipe: Recipe
) -> dict[str, Tensor]:
    samples, heads, tokens, keys = a.shape
    dead = [[not bool(do[b, :, t].ne(0).any()) for t in range(tokens)] for b in range(samples)]
    seen = [[bool(a[b, :, :, u].ne(0).any()) for u in range(keys)] for b in range(samples)]

    def without_dead(x: Tensor) -> Tensor:
        x = x.clone()
        x.transpose(1, 2)[torch.tensor(dead)] = 0.0
        return x

    residual = without_dead(do - m["do"])
    for_da, for_dv = sparse(residual, recipe, -1), sparse(residual, recipe, -2)
    da = without_dead(torch.stack([for_da[b] @ v[b].mT + m["do"] @ m["v"].mT for b in range(samples)]))
    ds = without_dead(softmax_backward(a, da, s))
    residual = without_dead(ds - m["ds"])
    for_dq, for_dk = sparse(residual, recipe, -1), sparse(residual, recipe, -2)
    out = {name: torch.zeros_like(x) for name, x in (("dq", q), ("dk", k), ("dv", v))}
    for b in range(samples):
        for h in range(heads):
            base_dk, base_dv = m["ds"][h].mT @ m["q"][h], m["a"][h].mT @ m["do"][h]
            unseen = ~torch.tensor(seen[b])
            base_dk[unseen], base_dv[unseen] = 0.0, 0.0
            out["dq"][b, h] = for_dq[b, h] @ k[b, h] + m["ds"][h] @ m["k"][h]
            out["dk"][b, h] = for_dk[b, h].mT @ q[b, h] + base_dk
            out["dv"][b, h] = a[b, h].mT @ for_dv[b, h] + base_dv
    return {**out, "dq": without_dead(out["dq"]), "ds": ds}


def by_rows(
    do: Tensor, a: Tensor, q: Tensor, k: Tensor, v: Tensor, s: float, m: dict[str, Tensor], recipe: Recipe
) -> dict[str, Tensor]:
    samples, _, tokens, keys = a.shape
    norms = [float(do[b, :, t].norm()) for b in range(samples) for t in range(tokens)]
    distance = [float((do[b, :, t] - m["do"][:, t]).norm()) for b in range(samples) for t in range(tokens)]
    alive = [i for i, norm in enumerate(norms) if norm > 0]
    order = sorted(alive, key=lambda i: -distance[i])
    kept = set(order[: round((1 - recipe.ratio) * len(norms))])
    only = torch.zeros_like(do)
    for i in kept:
        b, t = divmod(i, tokens)
        only[b, :, t] = do[b, :, t]
    out = dense(only, a, q, k, v, s)
    for b in range(samples):
        rows = range(b * tokens, (b + 1) * tokens)
        dropped = [i for i in rows if i in alive and i not in kept]
        for i in dropped:
            out["dq"][b, :, i % tokens] = m["dq"][:, i % tokens]
        total = sum(norms[i] for i in rows)
        share = sum(norms[i] for i in dropped) / total if total else 0.0
        for u in range(keys):
            if out["dv"][b, :, u].ne(0).any():
                out["dk"][b, :, u] += share * m["dk"][:, u]
                out["dv"][b, :, u] += share * m["dv"][:, u]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, memory, recipe):
        ctx.scale = q.shape[-1] ** -0.5
        a = torch.softmax((q @ k.mT * ctx.scale).masked_fill(~mask, -torch.inf), -1)
        ctx.save_for_backward(a, q, k, v)
        ctx.memory, ctx.recipe = memory, recipe
        return a @ v

    @staticmethod
    def backward(ctx, do):
        (a, q, k, v), memory, recipe = ctx.saved_tensors, ctx.memory, ctx.recipe
        if recipe.ratio == 0.0:
            out = dense(do, a, q, k, v, ctx.scale)
            return out["dq"], out["dk"], out["dv"], None, None, None
        known = bool(memory.means) and memory.means["do"].shape[1] == do.shape[2]
        if known:
            method = by_rows if recipe.granularity == "row" else by_elements
            out = method(do, a, q, k, v, ctx.scale, memory.means, recipe)
        else:
            out = dense(do, a, q, k, v, ctx.scale)
        memory.age = memory.age + 1 if known else 0
        if not known or memory.age >= recipe.refresh_every:
            everything = {"do": do, "a": a, "q": q, "k": k, "v": v, **out}
            chosen = recipe.sample
            memory.means = {n: x.mean(0) if chosen is None else x[chosen] for n, x in everything.items()}
            memory.age = 0
        return out["dq"], out["dk"], out["dv"], None, None, None


def fused(module: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def chain(module: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ v


class Attention(nn.Module):
    """[B, T, FEATURES] to the same; ``core`` computes softmax(Q·Kᵀ)·V from the heads and a mask."""

    def __init__(self, core: Callable[..., Tensor]) -> None:
        super().__init__()
        self.query, self.value, self.out = (nn.Linear(FEATURES, FEATURES) for _ in range(3))
        self.key = nn.Linear(FEATURES, FEATURES, bias=False)  # softmax ignores it
        self.core = core

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = [
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        return self.out(self.core(self, *heads, mask).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Two attentions, one after the other."""

    def __init__(self, core: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.second = Attention(core), Attention(core)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x, mask)), mask)


def reference_of(model: Model, recipe: Recipe) -> Model:
    """A copy whose attentions are :class:`_Attention`."""
    model = copy.deepcopy(model)
    for module in (model.first, model.second):
        memory = Remembered()
        module.core = lambda _, q, k, v, mask, memory=memory: _Attention.apply(q, k, v, mask, memory, recipe)
    return model
