"""Generation: the cache changes no token, and sampling draws from the distribution it says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.config import Dense, InputError, LayerGroup, Model, MoE, Nucleus, TopK
from jmoe.generate import PROMPT_BLOCK, Sampling, generate, sample
from jmoe.model.attention import Place, positions_in_row
from jmoe.model.transformer import Transformer

LAYERS = (
    LayerGroup((Dense(24),)),
    LayerGroup((MoE(8, 16, Nucleus(0.4)), MoE(4, 16, TopK(2))), repeats=2),
)
# Large weights, so that the most probable token changes from place to place.
MODEL = Model(
    vocab_size=64,
    d_model=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    tie_embeddings=False,
    init_std=0.4,
    layers=LAYERS,
)
NEW = 12
PROBABILITIES = np.array([0.12, 0.4, 0.05, 0.28, 0.15])
DRAWS = 20_000


@pytest.fixture(scope="module")
def params():
    return jax.jit(partial(Transformer, MODEL))(jax.random.key(1))


def prompt(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, MODEL.vocab_size, length, np.int32)


@jax.jit
def logits(params, row):
    """The model on one whole row, without a cache."""
    positions, segments = positions_in_row(1, row.shape[0]), jnp.ones((1, row.shape[0]), jnp.int32)
    return params.logits(params(row[None], Place(segments, positions, segments, positions))[0])[0]


def uncached(params, start, choose=lambda logits, _: np.argmax(logits)) -> list[int]:
    """NEW tokens, each from the whole text so far; what stands after it in the row has no effect on it."""
    row = np.zeros(2 * PROMPT_BLOCK + NEW, np.int32)
    row[: len(start)] = start
    for place in range(len(start), len(start) + NEW):
        row[place] = choose(logits(params, row)[place - 1], place)
    return row[len(start) : len(start) + NEW].tolist()


# ----------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("length", [1, PROMPT_BLOCK - 1, PROMPT_BLOCK, PROMPT_BLOCK + 1])
def test_greedy_generation_is_that_of_the_model_without_a_cache(params, length):
    new = generate(params, MODEL, prompt(length), max_new_tokens=NEW, sampling=Sampling(temperature=0.0))
    assert new.dtype == np.int32
    assert new.tolist() == uncached(params, prompt(length))
    assert len(set(new.tolist())) > 2


def test_sampled_generation_is_that_of_the_model_without_a_cache(params):
    sampling = Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=4)
    draw = jax.jit(partial(sample, sampling=sampling))
    expected = uncached(
        params, prompt(5), lambda logits, place: draw(logits, jax.random.fold_in(jax.random.key(4), place))
    )
    assert generate(params, MODEL, prompt(5), max_new_tokens=NEW, sampling=sampling).tolist() == expected


def test_a_seed_determines_the_text(params):
    def text(seed):
        sampling = Sampling(temperature=2.0, seed=seed)
        return generate(params, MODEL, prompt(5), max_new_tokens=NEW, sampling=sampling).tolist()

    assert text(0) == text(0) != text(1)


def test_the_end_of_the_text_ends_it_and_is_left_out(params):
    whole = uncached(params, prompt(5))
    greedy = Sampling(temperature=0.0)
    eos = whole[-1]
    end = whole.index(eos)
    assert generate(params, MODEL, prompt(5), max_new_tokens=NEW, sampling=greedy, eos=eos).tolist() == whole[:end]
    never = next(token for token in range(MODEL.vocab_size) if token not in whole)
    assert generate(params, MODEL, prompt(5), max_new_tokens=NEW, sampling=greedy, eos=never).tolist() == whole


@pytest.mark.parametrize(
    ("tokens", "count", "says"),
    [
        ([], 1, "the prompt is empty"),
        ([64], 1, "token id 64 is outside the vocabulary of 64"),
        ([3, -1], 1, "token id -1 is outside the vocabulary of 64"),
        ([3], 0, "max_new_tokens is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_generated(params, tokens, count, says):
    with pytest.raises(InputError, match=says):
        generate(params, MODEL, np.array(tokens, np.int32), max_new_tokens=count, sampling=Sampling())


# ------------------------------------------------------------------------------------------------------------- sampling


def frequencies(sampling: Sampling, probabilities=PROBABILITIES) -> np.ndarray:
    """How often each token is drawn from logits that are log probabilities up to a constant."""
    logits = jnp.asarray(np.log(probabilities) + 3.0, jnp.float32)
    keys = jax.random.split(jax.random.key(0), DRAWS)
    drawn = jax.jit(jax.vmap(lambda key: sample(logits, key, sampling)))(keys)
    assert drawn.dtype == jnp.int32
    return np.bincount(np.asarray(drawn), minlength=len(probabilities)) / DRAWS


def among(*kept: int, power: float = 1.0) -> np.ndarray:
    """PROBABILITIES to a power, of the tokens kept only."""
    weights = np.where(np.isin(np.arange(len(PROBABILITIES)), kept), PROBABILITIES**power, 0.0)
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), among(0, 1, 2, 3, 4)),
        (Sampling(temperature=0.5), among(0, 1, 2, 3, 4, power=2.0)),
        (Sampling(temperature=2.0), among(0, 1, 2, 3, 4, power=0.5)),
        (Sampling(temperature=0.0), among(1)),
        (Sampling(temperature=0.0, top_k=3, top_p=0.5), among(1)),
        (Sampling(top_k=1), among(1)),
        (Sampling(top_k=3), among(1, 3, 4)),
        (Sampling(top_k=99), among(0, 1, 2, 3, 4)),
        # In order of probability: 0.40, 0.68, 0.83, 0.95, 1.
        (Sampling(top_p=0.01), among(1)),
        (Sampling(top_p=0.39), among(1)),
        (Sampling(top_p=0.41), among(1, 3)),
        (Sampling(top_p=0.67), among(1, 3)),
        (Sampling(top_p=0.69), among(1, 3, 4)),
        (Sampling(top_p=0.94), among(0, 1, 3, 4)),
        (Sampling(top_p=1.0), among(0, 1, 2, 3, 4)),
        # The temperature comes first: squared and normalised, the largest two are 0.58 and 0.28.
        (Sampling(temperature=0.5, top_p=0.57), among(1)),
        (Sampling(temperature=0.5, top_p=0.80), among(1, 3, power=2.0)),
        # Then top-k: of the largest two alone, the first has 0.59.
        (Sampling(top_k=2, top_p=0.58), among(1)),
        (Sampling(top_k=2, top_p=0.60), among(1, 3)),
    ],
)
def test_frequencies_are_the_distribution(sampling, expected):
    found = frequencies(sampling)
    assert (found[expected == 0] == 0).all()
    # Five standard errors.
    np.testing.assert_array_less(np.abs(found - expected), 5 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-12)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("temperature", -0.1, "temperature is -0.1; it must not be negative"),
        ("top_k", 0, "top_k is 0; it must be at least 1"),
        ("top_p", 0.0, r"top_p is 0.0; it must lie in \(0, 1\]"),
        ("top_p", 1.1, r"top_p is 1.1; it must lie in \(0, 1\]"),
    ],
)
def test_impossible_sampling_is_refused(field, value, says):
    with pytest.raises(InputError, match=says):
        Sampling(**{field: value})
