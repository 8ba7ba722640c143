"""A trained run as a model to use, `jmoe.load(run_dir)`, or to begin another run with."""

import logging
import os
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jmoe import config, recipe
from jmoe.checkpoint import Checkpoints
from jmoe.config import InputError, require
from jmoe.data.tokenizer import Tokenizer
from jmoe.distributed import together
from jmoe.generate import Sampling, check_tokens, generate
from jmoe.model.attention import Place, positions_in_row
from jmoe.model.expert_parallel import check_experts
from jmoe.model.transformer import Transformer
from jmoe.run_directory import RunDirectory, differences
from jmoe.sharding import check_divisible, make_mesh
from jmoe.storage import same_place
from jmoe.training import abstract_state

log = logging.getLogger("jmoe")


class LanguageModel:
    """Parameters, architecture and tokenizer of a run."""

    def __init__(
        self,
        settings: config.Config,
        params: Transformer,
        tokenizer: Tokenizer,
        step: int,
        fingerprints: dict[str, str] | None = None,
    ):
        self.settings = settings
        self.params = params
        self.tokenizer = tokenizer
        self.step = step
        self.fingerprints = fingerprints or {}
        """of the tokenizer and of each source the run was trained and validated on"""

    @classmethod
    def load(
        cls,
        run_dir: str | os.PathLike[str],
        *,
        step: int | None = None,
        ema: bool = False,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "LanguageModel":
        """Reads a run's own config, tokenizer and newest good checkpoint (or that of `step`), and changes nothing.

        With `ema` the parameters are their moving average (`Config.ema`). They are put on one device, or shared out
        over `mesh` (`jmoe.sharding.make_mesh`), whatever mesh the run was trained on. Raises InputError if the
        directory is not that of a run, has no checkpoint yet or no average, or the mesh does not divide the model,
        CheckpointError if no checkpoint can be used.
        """
        mesh = make_mesh(config.Mesh(), jax.local_devices()[:1]) if mesh is None else mesh
        with together(InputError):
            settings, tokenizer = describe_run(run_dir)
            require(
                not ema or settings.ema is not None, f"{run_dir} keeps no average of its parameters: its ema is None"
            )
            check_experts(settings, mesh)
            state = abstract_state(settings, mesh)
            check_divisible(state.params, mesh)
        item = "ema" if ema else "params"
        step, params, metadata = read_parameters(run_dir, state.ema if ema else state.params, step, item=item)
        return cls(settings, params, tokenizer, step, metadata.get("fingerprints"))

    def logits(self, tokens: Int[np.ndarray, "B S"] | Int[Array, "B S"]) -> Float[Array, "B S V"]:
        """Next-token logits, float32 [B, S, V], of token ids int32 [B, S]; each row is one text.

        Raises InputError for ids outside the vocabulary.
        """
        check_tokens(np.asarray(tokens), self.settings.model.vocab_size)
        return _logits(self.params, jnp.asarray(tokens, jnp.int32), self.settings.dtype)

    def generate(
        self, prompt: str, *, max_new_tokens: int = 200, sampling: Sampling = Sampling(temperature=0.8, top_p=0.95)
    ) -> str:
        """Text that continues `prompt`, which is left out: up to the end of the text or `max_new_tokens`."""
        ids = np.concatenate([[self.tokenizer.eos], self.tokenizer.encode(prompt)]).astype(np.int32)
        return self.tokenizer.decode(self.generate_tokens(ids, max_new_tokens=max_new_tokens, sampling=sampling))

    def generate_tokens(
        self, prompt: Int[np.ndarray, " S"], *, max_new_tokens: int, sampling: Sampling
    ) -> Int[np.ndarray, " N"]:
        """Token ids, int32 [N], that continue the ids `prompt`, int32 [S]; see `jmoe.generate.generate`."""
        return generate(
            self.params,
            self.settings.model,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos=self.tokenizer.eos,
            dtype=self.settings.dtype,
        )


@partial(jax.jit, static_argnames="dtype")
def _logits(params, tokens, dtype):
    positions = positions_in_row(*tokens.shape)
    segments = jnp.ones_like(tokens)
    hidden, _, _ = params(tokens, Place(segments, positions, segments, positions), dtype=jnp.dtype(dtype))
    return params.logits(hidden)


def describe_run(run_dir: str | os.PathLike[str]) -> tuple[config.Config, Tokenizer]:
    """A run's own config and tokenizer. Raises InputError if the directory is not that of a run."""
    run = RunDirectory(run_dir)
    saved = run.read_config()
    if saved is None:
        raise InputError(f"{run_dir} is no run directory: it has no config.json")
    settings = recipe.from_dict(saved)
    eos = settings.data.tokenizer.eos if isinstance(settings.data.tokenizer, config.TokenizerFile) else None
    return settings, Tokenizer.from_file(run.tokenizer, eos)


def read_parameters(
    run_dir: str | os.PathLike[str],
    abstract: Transformer | None,
    step: int | None = None,
    *,
    item: Literal["params", "ema"] = "params",
) -> tuple[int, Transformer, dict[str, Any]]:
    """The parameters, or their average, of a run's newest good checkpoint, or of that of `step`, with the shardings of
    `abstract`.

    Returns the step, the parameters and the checkpoint's metadata. Raises InputError if there is no checkpoint,
    CheckpointError if none can be used or the parameters are not those of `abstract`.
    """
    checkpoints = Checkpoints(RunDirectory(run_dir).checkpoints, keep=1)
    restored = checkpoints.restore({item: abstract}, step, read_only=True)
    if restored is None:
        raise InputError(f"{run_dir} has no checkpoint yet")
    step, items = restored
    return step, items[item], checkpoints.metadata(step)


def check_start(run_dir: str, settings: config.Config, tokenizer: Tokenizer) -> None:
    """Whether a run of these settings may begin with the parameters of the run in `run_dir`.

    Raises InputError if that is no run, the same run, or one of another tokenizer; warns of what differs in the model.
    """
    require(
        settings.decay_from is None,
        f"--init-from {run_dir} and --decay-from {settings.decay_from} are two beginnings; give one of them",
    )
    other, text = describe_run(run_dir)
    require(
        not same_place(run_dir, settings.run_dir or ""),
        f"--init-from {run_dir} is the run directory itself; give the new run another --run-dir",
    )
    require(
        text.fingerprint == tokenizer.fingerprint,
        f"--init-from {run_dir} has another tokenizer; train with data.tokenizer = "
        f"TokenizerFile({str(RunDirectory(run_dir).path / 'tokenizer.json')!r}), or its own",
    )
    was, now = (recipe.to_dict(each)["model"] for each in (other, settings))
    for key, text in differences(was, now, "model"):
        log.warning("--init-from %s: %s: %s", run_dir, key, text)


def check_vocabulary(tokenizer: Tokenizer, settings: config.Config) -> None:
    """Raises `InputError` if the tokenizer has ids that the model's embedding table does not."""
    require(
        tokenizer.vocab_size <= settings.model.vocab_size,
        f"model.vocab_size = {settings.model.vocab_size} is too small: the tokenizer has {tokenizer.vocab_size} ids",
    )
