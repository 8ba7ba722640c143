"""The train step: one jitted function from (state, batch) to (state, metrics), with the state donated."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jmoe import config, optim
from jmoe.batch import Batch
from jmoe.loss import Sums, Totals, forward, loss_terms, run_layers, totals
from jmoe.model.transformer import MaxLogits, RouterStates, Stats, Transformer, router_states, update_routers
from jmoe.optim.adam import keep_unless
from jmoe.optim.averaging import moving_average
from jmoe.optim.qk_clip import qk_clip
from jmoe.sharding import batch_sharding, replicated, tree_shardings
from jmoe.telemetry import describe_attention, describe_routing


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: Array
    """int32 scalar: steps taken; also the position in the data."""
    params: Transformer
    """float32 parameters."""
    opt_state: Any
    """of `jmoe.optim.transformation`."""
    skipped_total: Array
    """int32 scalar: steps skipped so far because their gradients were not finite."""
    skipped_in_a_row: Array
    """int32 scalar: how many of them were the last ones."""
    key: Array
    """the run's random key; what is random at a step folds the step in."""
    ema: Transformer | None = None
    """float32: average of the parameters over the updates, for `Config.ema`."""


class Metrics(NamedTuple):
    """What a step reports; `describe` turns it into plain values."""

    scalars: dict[str, Array]
    stats: Stats
    total: Totals
    routers: RouterStates
    """state of the routers that routed the batch."""
    max_logits: MaxLogits | None = None
    """of each head the highest attention logit over the batch, for `Config.qk_clip`."""


def init_state(settings: config.Config) -> TrainState:
    """The state before the first step: a pure function of the config. `create_state` makes it sharded."""
    key, params_key = jax.random.split(jax.random.key(settings.seed))
    params: Any = Transformer(settings.model, params_key)
    zero = jnp.zeros((), jnp.int32)
    ema = None if settings.ema is None else jax.tree.map(jnp.copy, params)
    return TrainState(zero, params, optim.transformation(settings.optim).init(params), zero, zero, key, ema)


def begin_with(state: TrainState, params: Transformer) -> TrainState:
    """The state before the first step with other parameters, which their average begins with too."""
    return state._replace(params=params, ema=None if state.ema is None else jax.tree.map(jnp.copy, params))


def abstract_state(settings: config.Config, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making it."""
    shapes = jax.eval_shape(partial(init_state, settings))
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        tree_shardings(shapes, mesh),
    )


def create_state(settings: config.Config, mesh: jax.sharding.Mesh) -> TrainState:
    """The state before the first step, each array created on the devices it is sharded over."""
    return make_init(settings, mesh)()


def put_batch(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """This host's rows of a batch, as arrays sharded over the mesh."""
    return jax.tree.map(partial(jax.make_array_from_process_local_data, batch_sharding(mesh)), batch)


def gradients(params: Transformer, batch: Batch, settings: config.Config) -> tuple[Any, Array, Metrics]:
    """Gradient and value of the loss over a global batch, in `settings.accumulation` micro-batches.

    The load-balance loss and the parameter penalty need the assignment counts of the whole batch before the first
    gradient, so with them accumulation runs the layers once more, forward only, to count. That makes the result
    independent of the number of micro-batches.
    """
    total = totals(batch)

    def objective(params, micro_batch, counts):
        sums, max_logits = forward(params, micro_batch, settings)
        measured = None if settings.qk_clip is None else max_logits
        return loss_terms(sums, sums.stats if counts is None else counts, total, settings)[0], (sums, measured)

    def gradient(micro_batch, counts):
        grads, (sums, max_logits) = jax.grad(objective, has_aux=True)(params, micro_batch, counts)
        return (grads, sums), max_logits

    if settings.accumulation == 1:
        (grads, sums), max_logits = gradient(batch, None)
    else:
        micro_batches = jax.tree.map(partial(split_rows, parts=settings.accumulation), batch)
        counts = None
        if settings.loss.load_balance_loss or settings.loss.parameter_penalty:
            counts, _ = scan_sum(lambda part: (run_layers(params, part, settings).stats, None), micro_batches)
        (grads, sums), of_each = scan_sum(lambda part: gradient(part, counts), micro_batches)
        max_logits = jax.tree.map(lambda x: x.max(0), of_each)
    loss, terms = loss_terms(sums, sums.stats, total, settings)
    return grads, loss, Metrics({"loss": loss, **terms}, sums.stats, total, router_states(params), max_logits)


def split_rows(x: Array, parts: int) -> Array:
    """[B, ...] → [parts, B/parts, ...]; each part takes rows from every device's share of the batch."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def scan_sum(f: Callable[[Any], tuple[Any, Any]], xs: Any) -> tuple[Any, Any]:
    """For f(x) = (a, b), one after another over the leading axis: Σ a, of which one is held, and all b, stacked."""
    shapes, _ = jax.eval_shape(f, jax.tree.map(lambda x: x[0], xs))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(so_far, x):
        a, b = f(x)
        return jax.tree.map(jnp.add, so_far, a), b

    return jax.lax.scan(add, zeros, xs)


def train_step(state: TrainState, batch: Batch, settings: config.Config) -> tuple[TrainState, Metrics]:
    """`take_step` at the learning rate of the run's schedule."""
    learning_rate = jnp.asarray(optim.schedule(settings.optim, settings.steps)(state.step), jnp.float32)
    return take_step(state, batch, learning_rate, settings)


def take_step(
    state: TrainState, batch: Batch, learning_rate: Float[Array, ""], settings: config.Config
) -> tuple[TrainState, Metrics]:
    """One optimiser step. Where the loss or a gradient is not finite, parameters, their average and optimiser state
    stay as they are, and the step is counted in `skipped_in_a_row`."""
    grads, loss, metrics = gradients(state.params, batch, settings)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    old: Any = state.params  # optax's types know only dicts, lists and arrays
    direction, opt_state = optim.transformation(settings.optim).update(grads, state.opt_state, old, finite=finite)
    new: Any = optax.apply_updates(old, optax.tree.scale(-learning_rate, direction))
    new = update_routers(new, settings.model, metrics.stats, metrics.total.tokens)
    if settings.qk_clip is not None:
        assert metrics.max_logits is not None
        new = qk_clip(new, metrics.max_logits, settings.qk_clip)
    params, ema = keep_unless(finite, old, new), None
    if settings.ema is not None:
        updates = state.step + 1 - state.skipped_total
        ema = keep_unless(finite, state.ema, moving_average(state.ema, params, settings.ema, updates))
    skipped_total = state.skipped_total + ~finite
    skipped_in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
    metrics.scalars.update(
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        skipped=(~finite).astype(jnp.int32),
        skipped_total=skipped_total,
        skipped_in_a_row=skipped_in_a_row,
    )
    return TrainState(state.step + 1, params, opt_state, skipped_total, skipped_in_a_row, state.key, ema), metrics


class OnMesh:
    """A jitted function that is called with its mesh in use."""

    def __init__(self, jitted: Any, mesh: jax.sharding.Mesh):
        self.jitted = jitted
        self.mesh = mesh

    def __call__(self, *args: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return self.jitted(*args)


def make_init(settings: config.Config, mesh: jax.sharding.Mesh) -> OnMesh:
    """`init_state` jitted for a mesh: () → state; no device holds more of an array than its part, even in passing."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(settings, mesh))
    return OnMesh(jax.jit(partial(init_state, settings), out_shardings=shardings), mesh)


def make_train_step(settings: config.Config, mesh: jax.sharding.Mesh) -> OnMesh:
    """`train_step` jitted for a mesh: (state, batch) → (state, metrics), the state donated, its shardings kept; every
    host can read the metrics."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(settings, mesh))
    step = partial(train_step, settings=settings)
    return OnMesh(jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh))), mesh)


class EvalSums(NamedTuple):
    """Sums of a validation batch; they add up over batches."""

    sums: Sums
    targets: Array
    tokens: Array


def make_eval_step(settings: config.Config, mesh: jax.sharding.Mesh) -> OnMesh:
    """A jitted forward pass: (parameters, batch) → `EvalSums`."""

    def eval_step(params, batch):
        return EvalSums(
            forward(params, batch, settings)[0],
            batch.loss_mask.sum(dtype=jnp.float32),
            (batch.segment_ids > 0).sum(dtype=jnp.float32),
        )

    return OnMesh(jax.jit(eval_step, out_shardings=replicated(mesh)), mesh)


def describe(settings: config.Config, metrics: Metrics) -> dict[str, Any]:
    """A step's metrics as plain values, the router's by `describe_routing`. Waits for the step to end."""
    tokens = float(metrics.total.tokens)
    routing = describe_routing(settings.model, settings.data.seq_len, metrics.stats, tokens, metrics.routers)
    values = {name: np.asarray(value)[()] for name, value in metrics.scalars.items()} | routing
    if metrics.max_logits is not None:
        assert settings.qk_clip is not None
        values |= describe_attention(metrics.max_logits, settings.qk_clip)
    return values


def checkpoint_items(state: TrainState, fingerprints: dict[str, str]) -> dict[str, Any]:
    """The state as the items of a checkpoint; `fingerprints` tell what tokenizer and data it was trained on."""
    return {
        "params": state.params,
        "optimizer": state.opt_state,
        "ema": state.ema,
        "random": {"key": state.key},
        "skipped": {"skipped_total": state.skipped_total, "skipped_in_a_row": state.skipped_in_a_row},
        "data": {"step": state.step, **fingerprints},
    }


def from_checkpoint(items: dict[str, Any]) -> tuple[TrainState, dict[str, str]]:
    """The state and the fingerprints that `checkpoint_items` took apart."""
    data = dict(items["data"])
    step = data.pop("step")
    params, opt_state, ema = (items[name] for name in ("params", "optimizer", "ema"))
    return TrainState(step, params, opt_state, **items["skipped"], **items["random"], ema=ema), data
