"""The modelling file that goes with an exported model, against jmoe; two models together have every kind of part."""

import ast
import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import config, training
from jmoe.batch import Batch
from jmoe.checkpoint import flatten
from jmoe.convert.exporting import Options, export
from jmoe.convert.huggingface import names, own
from jmoe.convert.importing import import_
from jmoe.convert.mapping import parameter_shapes, pieces
from jmoe.convert.runs import Run, write_run
from jmoe.convert.verify import verify
from jmoe.data.tokenizer import byte_tokenizer
from jmoe.generate import Sampling, generate
from jmoe.json_form import encode
from jmoe.loss import totals
from jmoe.model.attention import Place
from jmoe.model.transformer import Transformer, update_routers

LOSS = config.Loss(
    load_balance_loss=0.1,
    sequence_balance_loss=0.05,
    router_z_loss=0.02,
    dynamic_loss=0.01,
    parameter_penalty=0.03,
    z_loss=1e-3,
)
STEERED = config.MoE(8, 12, config.Nucleus(0.4, max_slots=3, experts_per_token=2.5), widths="hybrid")
BALANCED = config.MoE(
    8,
    8,
    config.TopK(2, score="sigmoid", groups=2, scale=1.5, bias_rate=0.05),
    identity_experts=2,
    shared_d_ff=8,
    shared_gate=True,
)
FIXED = config.MoE(6, (8, 8, 8, 12, 12, 16), config.Nucleus(0.5), identity_experts=1)
SOFTMAX = config.MoE(4, 8, config.TopK(3, renormalise=False, scale=2.0), shared_d_ff=8)
MODELS = {
    "grouped": config.Model(
        vocab_size=260,
        d_model=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_base=500.0,
        layers=(config.LayerGroup((config.Dense(24),)), config.LayerGroup((STEERED, BALANCED), repeats=2)),
    ),
    "whole": config.Model(
        vocab_size=260,
        d_model=24,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        qk_norm_over="projection",
        qkv_bias=True,
        norm_eps=1e-3,
        tie_embeddings=False,
        layers=(config.LayerGroup((FIXED, SOFTMAX)),),
    ),
}
B, S = 4, 24
STEPS = 4
LEARNING_RATE = 0.3

pytestmark = pytest.mark.torch
torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")


def packed_batch(seed: int) -> Batch:
    """Rows of one or two documents and padding on both sides; the last token of a row predicts none."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 260, (B, S + 1)).astype(np.int32)
    start, middle, end = (rng.integers(*bounds, (B, 1)) for bounds in ((0, 4), (6, 16), (18, S + 2)))
    at = np.arange(S)[None]
    segments = np.where((at >= start) & (at < end), 1 + (at >= middle), 0).astype(np.int32)
    positions = np.where(segments == 2, at - middle, at - start) * (segments > 0)
    mask = np.zeros((B, S), bool)
    mask[:, :-1] = (segments[:, :-1] > 0) & (segments[:, :-1] == segments[:, 1:])
    return Batch(tokens[:, :-1], np.where(mask, tokens[:, 1:], 0), segments, positions.astype(np.int32), mask)


def random_values(model: config.Model) -> dict[str, np.ndarray]:
    """Gains and biases that are not all the same, thresholds in (0, 1), scores that decide."""
    rng, values = np.random.default_rng(0), {}
    for name, shape in parameter_shapes(model).items():
        std = 0.5 if "/router/" in name else 0.1
        value = rng.uniform(0.3, 0.6, shape) if name.endswith("/p") else std * rng.normal(size=shape)
        values[name] = (value + name.endswith("/gain")).astype(np.float32)
    return values


class Case:
    """A model on both sides."""

    def __init__(self, model, folder):
        self.settings = config.Config(model=model, loss=LOSS, data=config.Data(seq_len=S))
        self.run, self.folder = folder / "run", folder / "exported"
        values = random_values(model)
        write_run(self.run, self.settings, byte_tokenizer(), lambda writer: writer.write_all(values.__getitem__))
        assert export(self.run, self.folder, Options(max_shard_size="20KB")).model_type == "jmoe"
        shapes = jax.eval_shape(partial(Transformer, model), jax.random.key(0))
        self.params = jax.tree.unflatten(jax.tree.structure(shapes), [jnp.asarray(v) for v in values.values()])
        self.load = partial(transformers.AutoModelForCausalLM.from_pretrained, self.folder, trust_remote_code=True)
        self.step = jax.jit(self._step)

    def _step(self, params, batch):
        """SGD, and what led to it: the moved parameters, the loss and its terms, gradients, logits."""
        gradients, loss, metrics = training.gradients(params, batch, self.settings)
        moved = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, gradients)
        moved = update_routers(moved, self.settings.model, metrics.stats, totals(batch).tokens)
        place = Place(batch.segment_ids, batch.positions, batch.segment_ids, batch.positions)
        return moved, loss, metrics.scalars, gradients, params.logits(params(batch.tokens, place)[0])

    def inputs(self, batch):
        """The batch as the modelling file takes it; the tokens that end a document are predicted from within it."""
        tensor = lambda x: torch.tensor(np.asarray(x)).long()  # noqa: E731
        tokens, mask, positions = map(tensor, (batch.tokens, batch.segment_ids, batch.positions))
        return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "labels": tokens}

    def tensors(self, params):
        """jmoe's parameters under the names of the modelling file."""
        parameters = {name: np.asarray(value) for name, value in flatten(params).items()}
        found = pieces(self.settings.model, names.OWN)
        return {p.name: p.to_tensor(parameters[p.parameter][(*p.index, ...)]) for p in found}


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory) -> Case:
    return Case(MODELS[request.param], tmp_path_factory.mktemp(request.param))


def assert_close(got, want, tolerance=1e-5):
    """Within `tolerance` of the largest value."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max() + 1e-30)


def test_the_modelling_file_stands_by_itself():
    tree = ast.parse(own.MODELLING_FILE.read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        name.split(".")[0]
        for n in nodes
        for name in ([n.module] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names])
    }
    assert names == {"math", "dataclasses", "typing", "torch", "transformers"}


def test_every_tensor_is_loaded_and_no_other(case):
    model, info = case.load(output_loading_info=True)
    assert not any(info.values()), info
    got = model.state_dict()
    want = case.tensors(case.params)
    if case.settings.model.tie_embeddings:
        want["lm_head.weight"] = want["model.embed_tokens.weight"]
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_array_equal(got[name], tensor)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_what_is_exported_comes_back_bit_for_bit(case, tmp_path, dtype):
    """Rounded once, in bfloat16, but for the state of routers; settings of model and loss as they were."""
    export(case.run, tmp_path / "exported", Options(dtype=dtype))
    import_(tmp_path / "exported", tmp_path / "back")
    assert "differ by" in verify(tmp_path / "exported", tmp_path / "back")
    was, back = Run(case.run), Run(tmp_path / "back")
    assert (back.settings.model, back.settings.loss) == (was.settings.model, was.settings.loss)
    for name in parameter_shapes(was.settings.model):
        exact = dtype == "float32" or name.endswith(("router/bias", "router/p"))
        expected = was.read(name) if exact else was.read(name).astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(back.read(name), expected)


def test_logits_loss_and_gradients(case):
    """Of rows with several documents and padding on both sides."""
    batch = packed_batch(0)
    _, loss, terms, gradients, logits = case.step(case.params, jax.tree.map(jnp.asarray, batch))
    model = case.load()
    outputs = model(**case.inputs(batch))
    tokens = batch.segment_ids > 0
    assert_close(outputs.logits.detach()[tokens], np.asarray(logits)[tokens])
    assert_close(outputs.loss.detach(), loss)
    for name, term in outputs.terms.items():
        assert_close(term.detach(), terms[name])
    assert min(float(term.detach()) for term in outputs.terms.values()) > 0

    outputs.loss.backward()
    want = case.tensors(gradients)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert_close(parameter.grad, want[name], 2e-5)


def test_greedy_generation_token_for_token(case):
    """Two prompts at once, the shorter one padded on the left, with the cache and without."""
    prompts, new = [np.arange(3, 12, dtype=np.int32), np.array([7, 50, 2, 33], np.int32)], 12
    options = {"max_new_tokens": new, "sampling": Sampling(temperature=0.0)}
    want = [generate(case.params, case.settings.model, prompt, **options) for prompt in prompts]
    longest = max(map(len, prompts))
    padded = [np.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts]
    mask = [np.arange(longest) >= longest - len(prompt) for prompt in prompts]
    inputs = {name: torch.tensor(np.array(x)).long() for name, x in (("input_ids", padded), ("attention_mask", mask))}
    model = case.load()
    for use_cache in (True, False):
        got = model.generate(**inputs, max_new_tokens=new, do_sample=False, use_cache=use_cache, pad_token_id=0)
        np.testing.assert_array_equal(got[:, longest:], want)


def test_training_runs_along(case):
    """SGD on the same rows: the losses, and what moves without a gradient, the biases and thresholds of routers."""
    params, model = case.params, case.load()
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    got, want = [], []
    for i in range(STEPS):
        batch = packed_batch(i % 2)
        params, loss, *_ = case.step(params, jax.tree.map(jnp.asarray, batch))
        want.append(float(loss))
        outputs = model(**case.inputs(batch))
        outputs.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        model.update_routers(outputs)
        got.append(float(outputs.loss.detach()))
    assert want[-2] < want[0] - 0.05 and want[-1] < want[1] - 0.05
    np.testing.assert_allclose(got, want, rtol=1e-4)
    reached, began = case.tensors(params), case.tensors(case.params)
    for name, buffer in model.named_buffers():
        assert (reached[name] != began[name]).any(), name
        np.testing.assert_allclose(buffer, reached[name], rtol=1e-4, atol=1e-6)


def test_in_bfloat16_routers_stay_float32(case):
    inputs = case.inputs(packed_batch(0))
    model = case.load(dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        full = "router" in name or "shared_expert_gate" in name
        assert tensor.dtype == (torch.float32 if full else torch.bfloat16), name
    low, high = (float(m(**inputs).loss.detach()) for m in (model, case.load()))
    assert low != high and abs(low - high) < 2e-2 * high


def test_what_is_saved_loads_again(case, tmp_path):
    """Through save_pretrained, with which others pass models on; and under gradient checkpointing nothing changes."""
    model, batch = case.load(), packed_batch(1)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    want = model(**case.inputs(batch)).loss
    again.train()
    again.activation_checkpointing_enable()
    got = again(**case.inputs(batch)).loss
    assert float(got.detach()) == float(want.detach())
    got.backward()


def test_a_mask_of_another_length_is_refused(case):
    inputs = case.inputs(packed_batch(0))
    with pytest.raises(ValueError, match=r"attention_mask is \(4, 23\); it must be \[4, 24\]"):
        case.load()(inputs["input_ids"], inputs["attention_mask"][:, 1:])


def test_widths_are_those_of_the_config(case):
    module = importlib.import_module(type(case.load()).__module__)
    for widths in ("equal", "arithmetic", "geometric", "hybrid"):
        for d_ff in (32, 100, 511):
            moe = config.MoE(16, d_ff, widths=widths)
            assert module.expert_widths(encode(moe, config.MoE)) == list(moe.expert_widths)
