"""The mixture-of-experts feed-forward: route, dispatch to experts, combine; beside it the shared expert."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jmoe import config
from jmoe.model.expert_parallel import apply_experts
from jmoe.model.experts import Experts
from jmoe.model.layers import SwiGLU, normal, parameter
from jmoe.model.router import Router, RouterStats
from jmoe.sharding import shard


class SharedExpert(nnx.Module):
    """A SwiGLU that every token passes, weighed by sigmoid(x · weight) if it has a gate (Qwen2-MoE)."""

    def __init__(self, moe: config.MoE, model: config.Model, key: PRNGKeyArray):
        experts_key, weight_key = jax.random.split(key)
        self.swiglu = SwiGLU(model.d_model, moe.shared_d_ff, model.init_std, experts_key)
        weight = normal(weight_key, (model.d_model, 1), model.init_std)
        self.weight = parameter(weight, "embed", "router") if moe.shared_gate else None

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        out = self.swiglu(x)
        if self.weight is None:
            return out
        logit = jnp.matmul(x.astype(jnp.float32), self.weight[...], precision=jax.lax.Precision.HIGHEST)
        return (jax.nn.sigmoid(logit) * out).astype(x.dtype)


class MoE(nnx.Module):
    """y_t = Σ_{e chosen by t} w_te · expert_e(x_t) + w_t,identity · x_t + shared(x_t)."""

    def __init__(self, moe: config.MoE, model: config.Model, key: PRNGKeyArray):
        router_key, experts_key, shared_key = jax.random.split(key, 3)
        self.router = Router(moe, model, router_key)
        self.experts = Experts(moe, model, experts_key)
        self.shared = SharedExpert(moe, model, shared_key) if moe.shared_d_ff else None
        self.identity = moe.identity_experts > 0

    def __call__(
        self, x: Float[Array, "B S D"], valid: Bool[Array, "B S"], transport: config.Transport = config.Automatic()
    ) -> tuple[Float[Array, "B S D"], RouterStats]:
        """Returns the layer's output and the router's statistics over the `valid` tokens."""
        B, S, D = x.shape
        routing = self.router(x, valid)
        tokens = shard(x.reshape(B * S, D), "batch", None)
        out, dropped = apply_experts(
            tokens, routing.expert_ids, routing.combine_weights, self.experts.weights(), transport
        )
        stats = routing.stats._replace(dropped=routing.stats.dropped + dropped)
        if self.identity:
            out += (routing.identity_weights[:, None] * tokens).astype(x.dtype)
        out = out.reshape(B, S, D)
        return (out if self.shared is None else out + self.shared(x)), stats
