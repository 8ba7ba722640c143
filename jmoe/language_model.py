"""A trained run as a model to use: `jmoe.load(run_dir)`."""

import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jmoe import config, recipe
from jmoe.checkpoint import Checkpoints
from jmoe.config import InputError, require
from jmoe.data.tokenizer import Tokenizer
from jmoe.generate import Sampling, check_tokens, generate
from jmoe.model.attention import Place, positions_in_row
from jmoe.model.transformer import Transformer
from jmoe.run_directory import RunDirectory
from jmoe.sharding import make_mesh
from jmoe.training import abstract_state


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
    def load(cls, run_dir: str | os.PathLike[str], *, step: int | None = None, ema: bool = False) -> "LanguageModel":
        """Reads a run's own config, tokenizer and newest good checkpoint (or that of `step`), and changes nothing.

        With `ema` the parameters are their moving average (`Config.ema`). Raises InputError if the directory is not
        that of a run, has no checkpoint yet or no average, CheckpointError if no checkpoint can be used.
        """
        run = RunDirectory(Path(run_dir))
        saved = run.read_config()
        if saved is None:
            raise InputError(f"{run_dir} is no run directory: it has no config.json")
        settings = recipe.from_dict(saved)
        require(not ema or settings.ema is not None, f"{run_dir} keeps no average of its parameters: its ema is None")
        # One device reads whatever mesh the run was trained on.
        mesh = make_mesh(config.Mesh(), jax.local_devices()[:1])
        item, state = "ema" if ema else "params", abstract_state(settings, mesh)
        abstract = {item: state.ema if ema else state.params}
        checkpoints = Checkpoints(run.checkpoints, keep=1)
        restored = checkpoints.restore(abstract, step, read_only=True)
        if restored is None:
            raise InputError(f"{run_dir} has no checkpoint yet")
        step, items = restored
        eos = settings.data.tokenizer.eos if isinstance(settings.data.tokenizer, config.TokenizerFile) else None
        tokenizer = Tokenizer.from_file(run.tokenizer, eos)
        return cls(settings, items[item], tokenizer, step, checkpoints.metadata(step).get("fingerprints"))

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


def check_vocabulary(tokenizer: Tokenizer, settings: config.Config) -> None:
    """Raises `InputError` if the tokenizer has ids that the model's embedding table does not."""
    require(
        tokenizer.vocab_size <= settings.model.vocab_size,
        f"model.vocab_size = {settings.model.vocab_size} is too small: the tokenizer has {tokenizer.vocab_size} ids",
    )
