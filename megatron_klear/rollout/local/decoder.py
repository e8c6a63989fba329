"""A decoder for sampling: the policy's forward pass with a key-value cache, from its Hugging Face weights.

Plain torch on one device, whatever layout the trainer has. Each sequence has a row of the cache and a length of its
own, so prompts need no padding on the left and a row can be given to the next sequence at any time.

Values are rounded where the trainer rounds them, so that on the CPU a token's log-prob in bf16 is the trainer's to a
few 1e-6 wherever both send it through the same experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_klear.models.architecture import Architecture

_KEY_BLOCK = 16
"""Keys are read in blocks of so many: on the CPU torch rounds the attention of a token over other numbers otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _MLP:
    """A gated MLP: [2 * ffn, H] and [H, ffn]."""

    gate_up: Tensor
    down: Tensor

    def __call__(self, hidden: Tensor, weights: Tensor | None = None) -> Tensor:
        """Tokens [n, H], each output times its weight [n, 1] where there are some."""
        gate, up = F.linear(hidden, self.gate_up).chunk(2, dim=-1)
        inner = F.silu(gate) * up
        if weights is not None:
            inner = (inner * weights).to(hidden.dtype)  # before the last matrix, as Megatron weighs experts
        return F.linear(inner, self.down)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mixture:
    """A router [experts, H], computed in fp32 as the trainer's is, and its experts."""

    router: Tensor
    experts: tuple[_MLP, ...]
    chosen: int
    normalised: bool
    routes: list[Tensor] | None = None
    """Takes the experts [tokens, chosen] of every pass, where they are kept."""

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden.float(), self.router.float())
        chosen = self.choose(logits)
        if self.routes is not None:
            self.routes.append(chosen)
        weights = logits.gather(-1, chosen).softmax(-1) if self.normalised else logits.softmax(-1).gather(-1, chosen)
        out = torch.zeros_like(hidden, dtype=torch.float32)
        for number in torch.unique(chosen).tolist():  # type: ignore[no-untyped-call]
            tokens, place = (chosen == number).nonzero(as_tuple=True)
            own = self.experts[number](hidden[tokens], weights[tokens, place, None])
            out.index_add_(0, tokens, own.float())
        return out.to(hidden.dtype)

    def choose(self, logits: Tensor) -> Tensor:
        """The experts [tokens, chosen] that tokens of these logits [tokens, experts] go through."""
        return logits.topk(self.chosen, dim=-1).indices


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """Weights of one layer, under short names; biases and query/key norms where the family has them."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Tensor
    mlp_norm: Tensor
    mlp: _MLP | _Mixture


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """Keys (rotated) and values of every layer, [layers, rows, kv_heads, capacity, head_dim], and each row's length."""

    keys: Tensor
    values: Tensor
    lengths: Tensor  # [rows] int64, on the device

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return int(self.keys.shape[3])


class Decoder:
    """The model's forward pass. Weights are set by `load`; until then there are none."""

    def __init__(
        self,
        architecture: Architecture,
        inverse_frequencies: Tensor,
        attention_scaling: float,
        dtype: torch.dtype,
        device: torch.device,
        keep_routes: bool = False,
    ) -> None:
        """With `keep_routes`, `routes` has the experts of the last pass."""
        self._routes: list[Tensor] | None = [] if keep_routes else None
        self.architecture, self.dtype, self.device = architecture, dtype, device
        self.weights: dict[str, Tensor] = {}
        self._layers: list[_Layer] = []
        self._head: Tensor | None = None
        self._inverse_frequencies = inverse_frequencies.to(device, torch.float32)
        self._scale = attention_scaling**2 / architecture.head_dim**0.5

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take all weights, in the decoder's precision; the old ones are overwritten in place where there are any."""
        seen = set()
        for name, tensor in weights:
            seen.add(name)
            if name in self.weights:
                self.weights[name].copy_(tensor)
            else:
                self.weights[name] = tensor.detach().to(self.device, self.dtype, copy=True)
        missing = set(self.weights) - seen
        if missing:
            raise ValueError(f"weights were not sent: {', '.join(sorted(missing)[:3])}")
        self._layers = [self._layer(index) for index in range(self.architecture.num_layers)]
        head = self.weights["model.embed_tokens.weight" if self.architecture.tied_embeddings else "lm_head.weight"]
        # The trainer's logits are not rounded; a GPU would take too long, or too much memory, to do without here.
        self._head = head.float() if self.device.type == "cpu" else head

    def free(self) -> None:
        """Drop the fused copies of the weights; `load` makes them again."""
        self._layers, self._head = [], None

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache."""
        a = self.architecture
        shape = (a.num_layers, rows, a.num_kv_heads, capacity + -capacity % _KEY_BLOCK, a.head_dim)
        return Cache(
            keys=torch.zeros(shape, dtype=self.dtype, device=self.device),
            values=torch.zeros(shape, dtype=self.dtype, device=self.device),
            lengths=torch.zeros(rows, dtype=torch.int64, device=self.device),
        )

    @property
    def keeps_routes(self) -> bool:
        """Whether `routes` is to be had."""
        return self._routes is not None

    @property
    def routes(self) -> Tensor:
        """Experts [tokens, layers, chosen] int64 that the tokens of the last `prefill` or `step` went through."""
        assert self._routes, "made without keep_routes, or nothing was read yet"
        return torch.stack(self._routes, dim=1)

    @torch.no_grad()
    def prefill(self, cache: Cache, rows: Sequence[int], tokens: Tensor) -> Tensor:
        """Read one prompt [n] into all `rows` of the cache; the logits [V] after its last token."""
        count = tokens.shape[0]
        padding = -count % _KEY_BLOCK
        self._forget_routes()
        cosine, sine = self._angles(torch.arange(count, device=self.device))
        hidden = self._embed(tokens)
        index = torch.as_tensor(rows, device=self.device)
        for number, layer in enumerate(self._layers):
            query, key, value = self._project(layer, hidden, cosine, sine)
            cache.keys[number, index, :, :count] = key.transpose(0, 1)
            cache.values[number, index, :, :count] = value.transpose(0, 1)
            q, k, v = (F.pad(t.transpose(0, 1)[None], (0, 0, 0, padding)) for t in (query, key, value))
            attended = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self._scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            hidden = self._finish(layer, hidden, attended[0, :, :count].transpose(0, 1).reshape(count, -1))
        cache.lengths[index] = count
        return self._logits(hidden[-1:])[0]

    @torch.no_grad()
    def step(self, cache: Cache, rows: Tensor, tokens: Tensor) -> Tensor:
        """Append one token [B] to each of `rows` [B] (ascending, int64, on the device); logits [B, V] fp32."""
        lengths = cache.lengths[rows]
        longest = int(lengths.max()) + 1
        longest += -longest % _KEY_BLOCK
        self._forget_routes()
        cosine, sine = self._angles(lengths)
        hidden = self._embed(tokens)
        visible = torch.arange(longest, device=self.device)[None] <= lengths[:, None]
        whole = len(rows) == cache.keys.shape[1]
        for number, layer in enumerate(self._layers):
            query, key, value = self._project(layer, hidden, cosine, sine)
            cache.keys[number, rows, :, lengths] = key
            cache.values[number, rows, :, lengths] = value
            keys, values = cache.keys[number, :, :, :longest], cache.values[number, :, :, :longest]
            if not whole:
                keys, values = keys[rows], values[rows]
            # The queries of a head's group as its positions: products of matrices, fast on a CPU in bf16 too.
            attended = F.scaled_dot_product_attention(
                query.reshape(len(tokens), keys.shape[1], -1, query.shape[2]),
                keys,
                values,
                attn_mask=visible[:, None, None],
                scale=self._scale,
            )
            hidden = self._finish(layer, hidden, attended.reshape(len(tokens), -1))
        cache.lengths[rows] = lengths + 1
        return self._logits(hidden)

    def _layer(self, index: int) -> _Layer:
        def get(name: str) -> Tensor:
            return self.weights[f"model.layers.{index}.{name}"]

        a = self.architecture
        return _Layer(
            input_norm=get("input_layernorm.weight"),
            qkv=torch.cat([get(f"self_attn.{part}_proj.weight") for part in "qkv"]),
            qkv_bias=torch.cat([get(f"self_attn.{part}_proj.bias") for part in "qkv"]) if a.qkv_bias else None,
            q_norm=get("self_attn.q_norm.weight") if a.qk_norm else None,
            k_norm=get("self_attn.k_norm.weight") if a.qk_norm else None,
            output=get("self_attn.o_proj.weight"),
            mlp_norm=get("post_attention_layernorm.weight"),
            mlp=self._mlp(get),
        )

    def _mlp(self, get: Callable[[str], Tensor]) -> _MLP | _Mixture:
        def gated(prefix: str) -> _MLP:
            gate_up = torch.cat([get(f"{prefix}gate_proj.weight"), get(f"{prefix}up_proj.weight")])
            return _MLP(gate_up=gate_up, down=get(f"{prefix}down_proj.weight"))

        experts = self.architecture.experts
        if experts is None:
            return gated("mlp.")
        return _Mixture(
            router=get("mlp.gate.weight"),
            experts=tuple(gated(f"mlp.experts.{number}.") for number in range(experts.count)),
            chosen=experts.chosen,
            normalised=experts.normalised,
            routes=self._routes,
        )

    def _forget_routes(self) -> None:
        if self._routes is not None:
            self._routes.clear()

    def _embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weights["model.embed_tokens.weight"])

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.float()[:, None] * self._inverse_frequencies[None]
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos()[:, None], angles.sin()[:, None]

    def _project(self, layer: _Layer, hidden: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = self.architecture
        projected = F.linear(self._norm(hidden, layer.input_norm), layer.qkv, layer.qkv_bias)
        projected = projected.view(len(hidden), a.num_heads + 2 * a.num_kv_heads, a.head_dim)
        query, key, value = torch.split(projected, [a.num_heads, a.num_kv_heads, a.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            query, key = self._norm(query, layer.q_norm), self._norm(key, layer.k_norm)
        return _rotate(query, cosine, sine), _rotate(key, cosine, sine), value

    def _finish(self, layer: _Layer, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + F.linear(attended, layer.output)
        return hidden + layer.mlp(self._norm(hidden, layer.mlp_norm))

    def _logits(self, hidden: Tensor) -> Tensor:
        assert self._head is not None, "no weights: call load"
        return F.linear(self._norm(hidden, self.weights["model.norm.weight"]).to(self._head.dtype), self._head).float()

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight, self.architecture.norm_eps)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cosine + torch.cat([-second, first], dim=-1) * sine).to(x.dtype)
