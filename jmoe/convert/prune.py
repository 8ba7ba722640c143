"""prune: experts that matter least are left out, `python -m jmoe.convert prune RUN OUT [--flag value ...]`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from jmoe import recipe
from jmoe.convert import compress
from jmoe.convert.calibration import Observed, calibrate
from jmoe.convert.compress import PLACES, alone, choose, parse_counts, write
from jmoe.folder import check_new


@dataclass(frozen=True)
class Options(compress.Options):
    """Flags of the command."""

    method: Literal["reap", "frequency"] = "reap"
    """what an expert matters: the mean of combine weight times norm of its output over the tokens that go to it (REAP,
    arXiv 2510.13999), or how many go [name]"""


def score(observed: Observed, method: Literal["reap", "frequency"]) -> Float[np.ndarray, " E"]:
    """What each expert matters. REAP: S_j = mean of g_j(x) ‖f_j(x)‖₂ over the tokens x routed to j, where the combine
    weights g sum to 1 over a token's experts (arXiv 2510.13999); 0 for an expert without tokens."""
    count = np.asarray(observed.assignments)
    return count if method == "frequency" else np.asarray(observed.saliency) / np.maximum(count, 1.0)


def main(argv: list[str]) -> None:
    """The command. Raises InputError before anything is written."""
    (run_dir, out), options = recipe.positional_arguments(argv, Options(), PLACES)
    check_new(Path(out))
    calibrated = calibrate(run_dir, options.step, options.calibrate, options.tokens)
    scores = {layer: score(observed, options.method) for layer, observed in calibrated.observed.items()}
    counts = parse_counts(options.layers, list(calibrated.moes))
    kept = choose(calibrated.moes, scores, options.keep, options.by, counts)
    groups = {layer: [alone(e) for e in experts] for layer, experts in kept.items()}
    write(out, {"from": run_dir, "options": recipe.to_dict(options)}, calibrated, groups)
