"""Muon: Moonlight's formula for each matrix by itself, on any mesh, with the work shared out."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jmoe import config, hlo, optim, sharding, training
from jmoe.checkpoint import Checkpoints
from jmoe.model.layers import parameter
from jmoe.optim.newton_schulz import POLAR_EXPRESS, STANDARD, coefficients, orthogonalise
from jmoe.optim.roles import by_path, sides, update_scale
from jmoe.optim.spread import as_matrices

L, D, N, G, H = 2, 32, 8, 4, 8
MODEL = config.Model(
    vocab_size=64,
    d_model=D,
    num_heads=N,
    num_kv_heads=G,
    head_dim=H,
    tie_embeddings=False,
    layers=(
        config.LayerGroup(
            (
                config.MoE(8, 32, config.TopK(2), widths="hybrid"),
                config.MoE(8, 24, config.TopK(2, bias_rate=0.01), shared_d_ff=16, shared_gate=True),
                config.Dense(48),
            ),
            repeats=L,
        ),
    ),
)
MUON = config.Muon(clip_norm=1e9, iteration_dtype="float32")
ONE, MANY = config.Mesh(), config.Mesh(fsdp=2, expert=2, tensor=2)


@cache
def parameters():
    return training.init_state(config.Config(model=MODEL)).params


def gradients(step):
    """As if from a loss: of full rank, and none for buffers."""
    rng = np.random.default_rng(step)

    def of(variable):
        if optim.roles.role(sharding.logical_axes(variable)) == "buffer":
            return jax.tree.map(jnp.zeros_like, variable)
        return variable.replace(jnp.asarray(rng.normal(size=variable.shape), jnp.float32))

    return jax.tree.map(of, parameters(), is_leaf=sharding.is_variable)


@cache
def compiled(settings, mesh_sizes):
    """The update as a program for a mesh, and what puts a tree there."""
    mesh = sharding.make_mesh(mesh_sizes)

    def put(tree):
        return jax.device_put(tree, sharding.tree_shardings(tree, mesh))

    transformation = optim.transformation(settings)
    args = put(gradients(0)), put(transformation.init(parameters())), put(parameters())
    shardings = jax.tree.map(lambda x: x.sharding, args[:2])
    with jax.set_mesh(mesh):
        return jax.jit(transformation.update, out_shardings=shardings).lower(*args).compile(), put, args[1]


def run(settings, mesh_sizes=ONE, steps=2):
    """The directions of each step, and the last state."""
    update, put, state = compiled(settings, mesh_sizes)
    directions = []
    for step in range(steps):
        direction, state = update(put(gradients(step)), state, put(parameters()))
        directions.append(jax.tree.map(np.asarray, by_path(direction)))
    return directions, state


# ------------------------------------------------------------------------------------------------- one matrix at a time


def plain(x, triples=(STANDARD,) * 5):
    """The iteration as the papers write it, in float64."""
    x = x / np.linalg.norm(x)
    for a, b, c in triples:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16), (32, 1)], ids=str)
def test_the_iteration_is_the_plain_one_and_optax_s(shape):
    x = np.random.default_rng(0).normal(size=shape)
    got = orthogonalise(jnp.asarray(x, jnp.float32), (STANDARD,) * 5)
    np.testing.assert_allclose(got, plain(x), atol=2e-5)
    theirs = optax.contrib._muon.orthogonalize_via_newton_schulz(jnp.asarray(x, jnp.float32), jnp.array(STANDARD))
    np.testing.assert_allclose(got, theirs, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_update_has_the_root_mean_square_of_the_config(dtype):
    """Exactly where the iteration converges, as Polar Express does; to its tolerance with the standard coefficients,
    which leave singular values between 0.7 and 1.2."""
    for shape in ((32, 32), (16, 64), (96, 16)):
        x = jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)
        for muon, within in (config.Muon(), 0.15), (config.Muon(coefficients="polar-express", iterations=8), 0.02):
            update = np.asarray(orthogonalise(x, coefficients(muon)), np.float32) * update_scale(muon, *shape)
            assert abs(np.sqrt(np.mean(update**2)) / 0.2 - 1) < within, (shape, muon.coefficients)


def test_polar_express_is_its_paper_s():
    """Its worst singular value after 5 steps, from 1e-3 up (arXiv 2505.16932, Figure 1), against the standard's."""

    def values(triples):
        x = np.geomspace(1e-3, 1.0, 500)
        for a, b, c in triples:
            x = a * x + b * x**3 + c * x**5
        return x

    five = coefficients(config.Muon(coefficients="polar-express"))
    assert five == POLAR_EXPRESS[:5]
    error = np.abs(1 - values(five)).max()
    assert 0.1 < error < 0.25 < np.abs(1 - values((STANDARD,) * 5)).max()
    np.testing.assert_allclose(values(coefficients(config.Muon(coefficients="polar-express", iterations=10))), 1, 1e-3)


def test_a_matrix_without_a_gradient_stays():
    assert not np.asarray(orthogonalise(jnp.zeros((4, 6)), (STANDARD,) * 5)).any()


# -------------------------------------------------------------------------------------------------------- a whole model


def cells(path, array):
    """The matrices of a parameter by its name, as views that can be written; None for what AdamW has."""
    *_, name = path.removesuffix(".weight").split(".")
    if name in ("query", "key", "value"):
        return [layer.reshape(D, -1) for layer in array]
    if name == "out":
        return [layer.reshape(-1, D) for layer in array]
    if ".buckets." in path:
        return [expert for layer in array for expert in layer]
    if name in ("gate", "up", "down", "router", "shared"):
        return list(array)
    return None


def test_a_model_s_updates_are_moonlight_s_matrix_by_matrix():
    """Scanned layers, experts of several widths, grouped queries, dense layers, shared experts, routers: a plain loop
    over 2-D matrices in float64, and AdamW for all else."""
    got, _ = run(MUON)
    params = {path: np.asarray(v[...], np.float64) for path, v in by_path(parameters()).items()}
    momentum = {path: np.zeros(p.shape) for path, p in params.items()}
    m, v = ({path: np.zeros(p.shape) for path, p in params.items()} for _ in range(2))
    matrices = 0
    for step in range(2):
        for path, variable in by_path(gradients(step)).items():
            g, expected = np.asarray(variable[...], np.float64), np.zeros(variable.shape)
            momentum[path] = 0.95 * momentum[path] + g
            m[path], v[path] = 0.9 * m[path] + 0.1 * g, 0.95 * v[path] + 0.05 * g * g
            if cells(path, g) is None:
                hats = m[path] / (1 - 0.9 ** (step + 1)), v[path] / (1 - 0.95 ** (step + 1))
                expected = hats[0] / (np.sqrt(hats[1]) + 1e-8)
            else:
                for out, matrix in zip(cells(path, expected), cells(path, g + 0.95 * momentum[path]), strict=True):
                    out[:] = 0.2 * math.sqrt(max(matrix.shape)) * plain(matrix)
                    matrices += step == 0
            decay = 0.0 if path.endswith((".bias", ".p")) else 0.1
            np.testing.assert_allclose(got[step][path][...], expected + decay * params[path], atol=1e-4, err_msg=path)
    assert matrices == L * (3 * 4 + 3 * 8 + 3 * 8 + 3 + 3 + 2 + 1)


def test_heads_apart_are_matrices_of_their_own():
    for axes, shape, expected in (
        (("layers", "embed", "kv_heads", "head_dim"), (L, D, G, H), (L * G, D, H)),
        (("layers", "heads", "head_dim", "embed"), (L, N, H, D), (L * N, H, D)),
        (("layers", "expert", "expert_mlp", "embed"), (L, 3, 5, D), (L * 3, 5, D)),
    ):
        x, seen = np.random.default_rng(0).normal(size=shape), []
        back = as_matrices(jnp.asarray(x), sides(axes, "apart"), lambda x, seen=seen: seen.append(x) or 2 * x)
        assert seen[0].shape == expected
        np.testing.assert_allclose(back, 2 * x, rtol=1e-6)
        head = x[1, :, 2] if axes[1] == "embed" else x[1, 2]
        np.testing.assert_allclose(seen[0][expected[0] // L + 2], head, rtol=1e-6)


def test_normuon_follows_its_paper():
    """Algorithm 1 of arXiv 2510.05491, whose rows are our columns: the outputs."""
    settings = config.NorMuon(clip_norm=1e9, weight_decay=0.0, output_decay=0.9, iteration_dtype="float32")
    params = {"up": parameter(jnp.ones((2, 3, 12, 8)), "layers", "expert", "embed", "expert_mlp")}
    transformation = optim.transformation(settings)
    state, update = transformation.init(params), jax.jit(transformation.update)
    momentum, squares = np.zeros((2, 3, 12, 8)), np.zeros((2, 3, 8))
    for step in range(3):
        g = np.random.default_rng(step).normal(size=momentum.shape) * np.geomspace(0.1, 1, 8)
        direction, state = update({"up": params["up"].replace(jnp.asarray(g, jnp.float32))}, state, params)
        momentum = 0.95 * momentum + g
        for place in np.ndindex(2, 3):
            o = plain(g[place] + 0.95 * momentum[place]) * 0.2 * math.sqrt(12)
            squares[place] = 0.9 * squares[place] + 0.1 * (o**2).mean(0)
            o /= np.sqrt(squares[place])
            expected = 0.2 * math.sqrt(12 * 8) / np.linalg.norm(o) * o
            np.testing.assert_allclose(direction["up"][...][place], expected, atol=1e-4)
    assert len(jax.tree.leaves(state)) == 3  # momentum, mean squares, the count of what AdamW has: nothing


# --------------------------------------------------------------------------------------------------------------- meshes


APART = config.NorMuon(clip_norm=1e9, heads="apart", iteration_dtype="float32")


@pytest.mark.parametrize(
    "settings, mesh",
    [(MUON, MANY), pytest.param(APART, config.Mesh(data=4, expert=2), marks=pytest.mark.slow)],
    ids=["Muon", "NorMuon"],
)
def test_a_mesh_changes_no_direction(devices, settings, mesh):
    got, want = run(settings, mesh), run(settings)
    for (path, here), there in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(here, there, atol=2e-5, err_msg=jax.tree_util.keystr(path))
    for path, momentum in by_path(got[1]).items():
        if sharding.is_variable(momentum):
            expected = sharding.spec(*sharding.logical_axes(momentum))
            assert momentum[...].sharding.spec == expected, path


def test_no_device_has_a_whole_stack_and_none_does_another_s_work(devices):
    """Read off the compiled program: no array in it, so no collective's result, comes near the experts' stack, and the
    products are those of a device's share of the matrices; what is above it, is from stacks that do not divide by 8."""
    program, _, _ = compiled(MUON, MANY)
    text = program.as_text()
    stack = by_path(parameters())["layers.0.1.feed_forward.experts.buckets.0.gate"].size
    assert largest(text) < stack / 2
    work = hlo.work(text)
    assert 1 <= work.products / (products(parameters()) / 8) < 1.4
    assert not work.unknown_loops and set(work.collectives) == {"all-to-all", "all-reduce"}


def largest(text):
    """Elements of the largest array of a program."""
    computations, _ = hlo.parse(text)
    shapes = (shape for of in computations.values() for instruction in of.values() for shape in instruction.shapes)
    return max(math.prod(shape.dims) for shape in shapes)


def products(tree):
    """FLOPs of the iteration: three products for each of 5 steps, of the smaller side."""
    total = 0
    for path, variable in by_path(tree).items():
        for matrix in cells(path, np.zeros(variable.shape, np.int8)) or ():
            small, large = sorted(matrix.shape)
            total += 5 * (2 * small * small * large * 2 + 2 * small**3)
    return total


def test_the_state_goes_on_exactly_and_on_any_mesh(devices, tmp_path):
    """Saved on a mesh, restored there: the next direction is the same bit for bit; restored on one device, so is the
    state."""
    update, put, _ = compiled(MUON, MANY)
    _, state = run(MUON, MANY)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(2, {"optimizer": state}, metadata={})
    checkpoints.wait()
    for on in (state, compiled(MUON, ONE)[2]):
        _, restored = checkpoints.restore({"optimizer": on})
        jax.tree.map(np.testing.assert_array_equal, restored["optimizer"], state)
        if on is state:
            args = put(gradients(2)), put(parameters())
            again, expected = (update(args[0], s, args[1]) for s in (restored["optimizer"], state))
            jax.tree.map(np.testing.assert_array_equal, again, expected)
    checkpoints.close()


def test_momentum_is_half_of_adamw_s_state():
    """Or a quarter in bfloat16: what is kept for the matrices, over AdamW's two moments."""

    def matrix_bytes(settings):
        state = jax.eval_shape(optim.transformation(settings).init, parameters())
        return sum(
            v.size * v.dtype.itemsize
            for v in jax.tree.leaves(state, is_leaf=sharding.is_variable)
            if sharding.is_variable(v) and optim.roles.role(sharding.logical_axes(v)) in config.Muon().matrices
        )

    adamw = matrix_bytes(config.AdamW())
    assert matrix_bytes(MUON) / adamw == 0.5
    assert matrix_bytes(config.Muon(momentum_dtype="bfloat16")) / adamw == 0.25
