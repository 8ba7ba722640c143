"""Text from a model: a key-value cache, and sampling by temperature, top-k and top-p."""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jmoe import config
from jmoe.config import require
from jmoe.model.attention import Place, positions_in_row
from jmoe.model.transformer import Transformer, empty_caches

# Prompts are padded to a multiple of this, so that prompts of similar lengths share one compiled program.
PROMPT_BLOCK = 64


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits."""

    temperature: float = 1.0
    """divides the logits; 0 takes the most probable token [unitless]"""
    top_k: int | None = None
    """only the k most probable tokens [count]"""
    top_p: float | None = None
    """only the smallest set of tokens whose probabilities sum to at least p [probability]"""
    seed: int = 0
    """of the draws [unitless]"""

    def __post_init__(self):
        require(self.temperature >= 0, f"temperature is {self.temperature}; it must not be negative")
        require(self.top_k is None or self.top_k >= 1, f"top_k is {self.top_k}; it must be at least 1")
        require(self.top_p is None or 0 < self.top_p <= 1, f"top_p is {self.top_p}; it must lie in (0, 1]")


def sample(logits: Float[Array, " V"], key: PRNGKeyArray, sampling: Sampling) -> Int[Array, ""]:
    """One token id, int32, drawn from logits [V]. Top-k is applied before top-p, both after the temperature."""
    if sampling.temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32)
    logits = logits / sampling.temperature
    descending = jnp.sort(logits, descending=True)
    if sampling.top_k is not None:
        logits = jnp.where(logits < descending[min(sampling.top_k, logits.size) - 1], -jnp.inf, logits)
        descending = jnp.sort(logits, descending=True)
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(descending)
        kept = jnp.cumsum(probabilities) - probabilities < sampling.top_p
        logits = jnp.where(logits < jnp.min(descending, where=kept, initial=jnp.inf), -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "sampling", "eos", "dtype"))
def _generate(params, prompt, length, key, *, model, max_new_tokens, sampling, eos, dtype):
    padded = prompt.shape[0]
    caches = empty_caches(model, 1, padded + max_new_tokens, dtype)
    key_positions = positions_in_row(1, padded + max_new_tokens)

    def run(tokens, start, written, caches):
        """The model on tokens [S] that stand at `start`, with `written` tokens in the cache afterwards."""
        positions = positions_in_row(1, tokens.shape[0]) + start
        seen = lambda at: (at < written).astype(jnp.int32)  # noqa: E731
        place = Place(seen(positions), positions, seen(key_positions), key_positions, start)
        hidden, _, caches = params(tokens[None], place, dtype=dtype, caches=caches)
        return hidden, caches

    def next_token(hidden, place_in_text):
        return sample(params.logits(hidden)[0, 0], jax.random.fold_in(key, place_in_text), sampling)

    def unfinished(carry):
        count, _, _, last = carry
        return (count < max_new_tokens) & (last != eos)

    def one_more(carry):
        count, out, caches, last = carry
        hidden, caches = run(last[None], length + count - 1, length + count, caches)
        token = next_token(hidden, length + count)
        return count + 1, out.at[count].set(token), caches, token

    hidden, caches = run(prompt, jnp.int32(0), length, caches)
    first = next_token(jax.lax.dynamic_slice_in_dim(hidden, length - 1, 1, axis=1), length)
    out = jnp.zeros(max_new_tokens, jnp.int32).at[0].set(first)
    count, out, _, _ = jax.lax.while_loop(unfinished, one_more, (jnp.int32(1), out, caches, first))
    return out, count


def generate(
    params: Transformer,
    model: config.Model,
    prompt: Int[np.ndarray, " S"],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos: int | None = None,
    dtype: str = "float32",
) -> Int[np.ndarray, " N"]:
    """Continues a prompt.

    Args:
      params: the model's parameters.
      model: its architecture.
      prompt: int32 [S], at least one token id.
      max_new_tokens: most tokens to generate.
      sampling: how tokens are drawn; with temperature 0 the result is that of the model without a cache.
      eos: a token that ends the text; it is not part of the result. None never ends.
      dtype: of the layers' arithmetic.

    Returns:
      int32 [N], N <= max_new_tokens: the new tokens.

    Raises:
      InputError: an empty prompt, a token id outside the vocabulary, or max_new_tokens < 1.
    """
    require(len(prompt) >= 1, "the prompt is empty; generation needs at least one token")
    require(max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    check_tokens(prompt, model.vocab_size)
    padded = np.zeros(-(-len(prompt) // PROMPT_BLOCK) * PROMPT_BLOCK, np.int32)
    padded[: len(prompt)] = prompt
    out, count = _generate(
        params,
        padded,
        np.int32(len(prompt)),
        jax.random.key(sampling.seed),
        model=model,
        max_new_tokens=max_new_tokens,
        sampling=dataclasses.replace(sampling, seed=0),  # static: another seed is not compiled anew
        eos=-1 if eos is None else eos,
        dtype=jnp.dtype(dtype),
    )
    new = np.asarray(out)[: int(count)]
    return new[:-1] if eos is not None and new[-1] == eos else new


def check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    """Raises `InputError` if a token id is outside the vocabulary."""
    tokens = np.asarray(tokens)
    outside = (tokens < 0) | (tokens >= vocab_size)
    require(
        not outside.any(),
        f"token id {tokens[outside].flat[0] if outside.any() else ''} is outside the vocabulary of {vocab_size}",
    )
