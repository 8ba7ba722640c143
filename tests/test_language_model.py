"""A run as a model: what `jmoe.load` reads, refuses and leaves alone."""

import functools
import json
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import jmoe
from jmoe import recipe, sharding, training
from jmoe.batch import Batch
from jmoe.checkpoint import CheckpointError, Checkpoints
from jmoe.config import Bytes, Config, Data, Dense, InputError, LayerGroup, Model, MoE, Nucleus
from jmoe.data import tokenizer
from jmoe.generate import Sampling
from jmoe.language_model import check_start, check_vocabulary, read_parameters
from jmoe.run_directory import RunDirectory

LAYERS = (LayerGroup((Dense(d_ff=24), MoE(num_experts=8, d_ff=16, router=Nucleus(p=0.4)))),)
# More rows than the tokenizer has ids, as when a table is rounded up for a mesh.
SHAPE = Model(vocab_size=264, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, init_std=0.3, layers=LAYERS)
SETTINGS = Config(model=SHAPE, data=Data(seq_len=32), seed=3)


@functools.cache
def state(step: int) -> training.TrainState:
    """A state of its own for each step; the parameters of step 1 are those a run begins with."""
    initial = training.create_state(SETTINGS, sharding.make_mesh(SETTINGS.mesh, jax.devices()[:1]))
    return initial._replace(params=jax.tree.map(lambda x: x / step, initial.params))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run directory with the checkpoints of two models, as steps 1 and 2."""
    with RunDirectory.open(tmp_path_factory.mktemp("run")) as run:
        run.write_config(recipe.to_dict(SETTINGS))
        tokenizer.load(SETTINGS.data).save(run.path / "tokenizer.json")
        checkpoints = Checkpoints(run.checkpoints, keep=2)
        for step in (1, 2):
            items = training.checkpoint_items(state(step), {"tokenizer": "t"})
            checkpoints.save(step, items, metadata=recipe.to_dict(SETTINGS))
        checkpoints.close()
    return run.path


@pytest.fixture(scope="module")
def model(run_dir):
    return jmoe.load(run_dir)


def ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SHAPE.vocab_size, shape, np.int32)


def test_the_newest_step_or_the_one_asked_for(run_dir, model):
    assert (model.step, model.settings, model.tokenizer.eos) == (2, SETTINGS, 256)
    for loaded, step in ((model, 2), (jmoe.load(run_dir, step=1), 1)):
        assert loaded.step == step
        jax.tree.map(np.testing.assert_array_equal, loaded.params, state(step).params)
    with pytest.raises(CheckpointError, match=r"step 5 in .*no such checkpoint; complete steps are \[1, 2\]"):
        jmoe.load(run_dir, step=5)


def test_logits_are_float32_and_those_of_the_training_forward_pass(model):
    tokens = ids(3, 32)
    logits = model.logits(tokens)
    assert (logits.shape, logits.dtype) == ((3, 32, SHAPE.vocab_size), np.float32)
    everything = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(32, dtype=np.int32), (3, 32))
    batch = Batch(tokens, np.roll(tokens, -1, axis=1), everything, positions, everything.astype(bool))
    sums = training.make_eval_step(SETTINGS, sharding.make_mesh(SETTINGS.mesh))(model.params, batch)
    log_probabilities = jax.nn.log_softmax(logits)
    expected = -np.take_along_axis(np.asarray(log_probabilities), batch.targets[..., None], axis=-1).sum()
    np.testing.assert_allclose(sums.sums.cross_entropy, expected, rtol=1e-5)


def test_logits_take_jax_arrays_and_refuse_ids_outside_the_vocabulary(model):
    tokens = ids(1, 32)
    np.testing.assert_array_equal(model.logits(jax.numpy.asarray(tokens)), model.logits(tokens))
    for bad in (SHAPE.vocab_size, -1):
        tokens[0, 2] = bad
        with pytest.raises(InputError, match=f"token id {bad} is outside the vocabulary of 264"):
            model.logits(tokens)


def test_text_and_tokens_are_the_same_continuation(model):
    sampling = Sampling(temperature=0.7, top_p=0.9, seed=5)
    text = model.generate("tok", max_new_tokens=12, sampling=sampling)
    prompt = np.array([256, *b"tok"], np.int32)
    new = model.generate_tokens(prompt, max_new_tokens=12, sampling=sampling)
    assert text == model.tokenizer.decode(new) and 0 < len(new) <= 12
    unprompted = model.generate_tokens(np.array([256], np.int32), max_new_tokens=12, sampling=sampling)
    assert len(unprompted) > 0
    assert model.generate("", max_new_tokens=12, sampling=sampling) == model.tokenizer.decode(unprompted)


def test_loading_changes_nothing_and_takes_no_lock(run_dir):
    def content():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run_dir.rglob("*")}

    before = content()
    with RunDirectory.open(run_dir):  # as if it were being trained
        before |= {run_dir / "lock": ((run_dir / "lock").stat().st_mtime_ns, (run_dir / "lock").stat().st_size)}
        jmoe.load(run_dir)
        assert content() == before


def test_a_damaged_checkpoint_is_told_and_left_where_it_is(run_dir, tmp_path, caplog):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    for number, step in enumerate(("2", "1")):
        file = max((copy / "checkpoints" / step / "params").rglob("?" * 32), key=lambda path: path.stat().st_size)
        file.write_bytes(file.read_bytes()[:-1])
        with caplog.at_level(logging.WARNING, "jmoe"):
            if number == 0:
                assert jmoe.load(copy).step == 1
                assert "the checkpoint of step 2" in caplog.text and "is damaged" in caplog.text
            else:
                with pytest.raises(CheckpointError, match="none of the checkpoints in .* is good"):
                    jmoe.load(copy)
    assert {path.name for path in (copy / "checkpoints").iterdir()} == {"1", "2"}


def test_what_is_no_run_is_refused(run_dir, tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path} is no run directory: it has no config.json"):
        jmoe.load(tmp_path)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(run_dir / name, tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path} has no checkpoint yet"):
        jmoe.load(tmp_path)
    changed = json.loads((tmp_path / "config.json").read_text())
    changed["model"]["d_model"] = 24
    (tmp_path / "config.json").write_text(json.dumps(changed))
    shutil.copytree(run_dir / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"float32\[264,16\], expected float32\[264,24\]"):
        jmoe.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json is not JSON"):
        jmoe.load(tmp_path)


def test_a_tokenizer_larger_than_the_table_is_refused():
    text = tokenizer.load(Data(tokenizer=Bytes()))
    check_vocabulary(text, recipe.override(SETTINGS, ["--model.vocab-size", "257"]))
    with pytest.raises(InputError, match="model.vocab_size = 256 is too small: the tokenizer has 257 ids"):
        check_vocabulary(text, recipe.override(SETTINGS, ["--model.vocab-size", "256"]))


def test_what_a_run_may_begin_with(run_dir, tmp_path, caplog):
    text = tokenizer.load(SETTINGS.data)
    check_start(str(run_dir), SETTINGS, text)
    assert caplog.text == ""
    changed = recipe.override(SETTINGS, ["--model.rope-base", "500", "--run-dir", str(tmp_path)])
    check_start(str(run_dir), changed, text)
    assert "model.rope_base: run has 10000.0, command says 500.0" in caplog.text
    with pytest.raises(InputError, match="is the run directory itself"):
        check_start(str(run_dir), recipe.override(SETTINGS, ["--run-dir", str(run_dir)]), text)
    with pytest.raises(InputError, match="has another tokenizer; train with data.tokenizer = TokenizerFile"):
        check_start(str(run_dir), SETTINGS, tokenizer.train_bpe(["a b"], 258))

    params = training.abstract_state(SETTINGS, sharding.make_mesh(SETTINGS.mesh, jax.devices()[:1])).params
    step, read, _ = read_parameters(run_dir, params)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, read, state(2).params)
    wider = recipe.override(SETTINGS, ["--model.d-model", "24"])
    params = training.abstract_state(wider, sharding.make_mesh(SETTINGS.mesh, jax.devices()[:1])).params
    with pytest.raises(CheckpointError, match=r"expected float32\[264,24\]"):
        read_parameters(run_dir, params)
