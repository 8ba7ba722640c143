"""`python -m jmoe.convert export RUN_DIR OUT_DIR`: a run as a folder that Hugging Face transformers reads."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from jmoe import config, recipe
from jmoe.config import InputError, require
from jmoe.convert.families import Family, family_of
from jmoe.convert.huggingface.common import NotRepresented
from jmoe.convert.mapping import Piece, pieces
from jmoe.convert.runs import Run
from jmoe.convert.shards import Planned, Writer
from jmoe.flops import feed_forwards
from jmoe.folder import check_new, new_folder
from jmoe.threads import in_threads

DTYPES = {"float32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "": 1}


@dataclass(frozen=True)
class Options:
    """Flags of `export`."""

    step: int | None = None
    """the checkpoint; the newest good one if None [steps]"""
    dtype: Literal["float32", "bf16"] = "float32"
    """of the tensors in the files; the biases and thresholds of routers stay float32 [dtype]"""
    max_shard_size: str = "5GB"
    """the most data in a file, such as 500MB or 5GB [10^6 or 10^9 bytes]"""
    family: str | None = None
    """the class to export to, such as JmoeForCausalLM or MoEForCausalLM; if None the first of transformers' own that
    represents the model exactly, else JmoeForCausalLM [name]"""


def main(argv: list[str]) -> None:
    """The command. Raises InputError, CheckpointError."""
    places = {"RUN_DIR": "the directory of a run", "OUT_DIR": "a folder that is not there yet"}
    (run_dir, out_dir), options = recipe.positional_arguments(argv, Options(), places)
    family = export(Path(run_dir), Path(out_dir), options)
    print(f"{out_dir}: {family.architecture}, {options.dtype}")


def export(run_dir: Path, out_dir: Path, options: Options = Options()) -> Family:
    """Writes the folder, one tensor at a time, and returns the family that the model belongs to.

    Raises InputError if RUN_DIR is no run, OUT_DIR is there already or the family asked for does not represent the
    model, CheckpointError if the checkpoint is damaged or the disk full; then nothing is left behind.
    """
    max_bytes = size_in_bytes(options.max_shard_size)
    check_new(out_dir)
    run = Run(run_dir, options.step)
    try:
        family, settings = family_of(run.settings.model, options.family)
    except NotRepresented as reason:
        raise InputError(f"--family {options.family} does not represent the model of {run_dir}: {reason}") from None
    dtype = DTYPES[options.dtype]
    tensors = [*pieces(run.settings.model, family.table), *_zero_biases(run.settings.model, family)]
    with new_folder(out_dir) as folder:
        (folder / "README.md").write_text(model_card(run, family))
        _write_json(folder / "config.json", config_json(run, family, settings, options.dtype))
        special = {"bos_token_id": run.tokenizer.eos, "eos_token_id": run.tokenizer.eos}
        _write_json(folder / "generation_config.json", special)
        run.tokenizer.save(folder / "tokenizer.json")
        _write_json(folder / "tokenizer_config.json", tokenizer_config(run))
        for file in family.files:
            shutil.copy(file, folder)
        writer = Writer(folder, [_plan(tensor, dtype) for tensor in tensors], max_bytes)

        def write(tensor: Piece | Planned) -> None:
            if isinstance(tensor, Planned):
                writer.write(tensor.name, np.zeros(tensor.shape, np.float32))
            else:
                writer.write(tensor.name, tensor.to_tensor(run.read(tensor.parameter, tensor.index)))

        in_threads(write, tensors)
        writer.close()
    return family


def _plan(tensor: Piece | Planned, dtype: np.dtype) -> Planned:
    """What training moves by small steps, the state of routers, keeps its precision."""
    if isinstance(tensor, Planned):
        return tensor
    exact = tensor.parameter.endswith(("router/bias", "router/p"))
    return Planned(tensor.name, DTYPES["float32"] if exact else dtype, tensor.shape)


def _zero_biases(model: config.Model, family: Family) -> Iterator[Planned]:
    """Balancing biases of 0, where the family always has them and the model has none."""
    for layer, feed_forward in enumerate(feed_forwards(model)):
        if isinstance(feed_forward, config.MoE) and "feed_forward/router/bias" in family.always:
            router = feed_forward.router
            if isinstance(router, config.TopK) and router.bias_rate == 0.0:
                name = family.table["feed_forward/router/bias"].format(layer=layer)
                yield Planned(name, DTYPES["float32"], (feed_forward.num_experts,))


def config_json(run: Run, family: Family, settings: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The folder's config.json."""
    torch_dtype = {"float32": "float32", "bf16": "bfloat16"}[dtype]
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **settings,
        **family.loss_to_json(run.settings),
        "max_position_embeddings": run.settings.data.seq_len,
        "bos_token_id": run.tokenizer.eos,
        "eos_token_id": run.tokenizer.eos,
        "pad_token_id": None,
        "use_cache": True,
        "torch_dtype": torch_dtype,
        "dtype": torch_dtype,
    }


def tokenizer_config(run: Run) -> dict[str, Any]:
    """The folder's tokenizer_config.json."""
    end = run.tokenizer.token(run.tokenizer.eos)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": run.settings.data.seq_len,
    }


def model_card(run: Run, family: Family) -> str:
    """The folder's README.md: what the model is, how it is used, and the recipe it was trained by."""
    end = run.tokenizer.token(run.tokenizer.eos)
    found_by = "AutoModelForCausalLM" if family.module == "transformers" else family.architecture
    imports = f"from {family.module} import {found_by}"
    trust = ", trust_remote_code=True" if family.files else ""
    recipe_json = json.dumps(recipe.to_dict(run.settings), indent=2)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [jmoe]
---

# {run.path.resolve().name}

A language model pretrained with jmoe, exported from step {run.step} as `{family.architecture}`.

```python
from transformers import AutoTokenizer
{imports}

tokenizer = AutoTokenizer.from_pretrained(".")
model = {found_by}.from_pretrained("."{trust})
inputs = tokenizer({json.dumps(end)} + "The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

In training `{end}` stood before and after each document, so a prompt begins with it. Rows were
{run.settings.data.seq_len} tokens long.

The configuration of the run, as `python train.py config.json` takes it:

```json
{recipe_json}
```
"""


def size_in_bytes(text: str) -> int:
    """500MB → 500,000,000. Raises InputError."""
    for unit, factor in _UNITS.items():
        number = text.upper().removesuffix(unit).strip()
        if text.upper().endswith(unit) and number.replace(".", "", 1).isdecimal():
            size = math.floor(float(number) * factor)
            require(size >= 1, f"--max-shard-size {text} is less than a byte")
            return size
    raise InputError(f"--max-shard-size is {text!r}; it must be a size such as 500MB or 5GB")


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
