"""jmoe: sparse Mixture-of-Experts language models, pretrained from scratch in JAX.

The way of one batch, with the file that each step lives in:

    configs/x.py            a recipe: `def config() -> Config`
    jmoe/recipe.py          reads it, applies flags, checks everything      (the fields: jmoe/config.py)
    jmoe/data/              documents → tokens → packed rows → global batch (the batch: jmoe/batch.py)
    jmoe/training.py        train_step: gradients, optimiser, metrics
    jmoe/model/             transformer: embed → [attention → moe] × N → unembed
    jmoe/loss.py            sums over tokens, normalised once per global batch
    jmoe/optim/             AdamW, Muon and schedules
    jmoe/checkpoint.py      saves and restores the state

`train.py` walks this way from top to bottom. `jmoe.load(run_dir)` gives a trained model to use.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

    from jmoe.language_model import LanguageModel


def load(
    run_dir: str | os.PathLike[str],
    *,
    step: int | None = None,
    ema: bool = False,
    mesh: "jax.sharding.Mesh | None" = None,
) -> "LanguageModel":
    """The model of a run: `.logits(tokens)`, `.generate(prompt)`. See `jmoe.language_model.LanguageModel.load`."""
    from jmoe.language_model import LanguageModel  # here, so that `import jmoe` does not import JAX

    return LanguageModel.load(run_dir, step=step, ema=ema, mesh=mesh)
