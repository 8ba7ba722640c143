"""config.json of jmoe's own modelling file, `pytorch/modeling_jmoe.py`, which represents every model."""

from pathlib import Path

from jmoe import config
from jmoe.config import require
from jmoe.convert.huggingface.common import Json
from jmoe.json_form import decode, encode

MODELLING_FILE = Path(__file__).parents[1] / "pytorch" / "modeling_jmoe.py"


def to_json(model: config.Model) -> Json:
    """The architecture as it stands in a run's config.json, and where transformers finds the classes."""
    classes = {"AutoConfig": "JmoeConfig", "AutoModel": "JmoeModel", "AutoModelForCausalLM": "JmoeForCausalLM"}
    return {
        "auto_map": {auto: f"{MODELLING_FILE.stem}.{name}" for auto, name in classes.items()},
        "vocab_size": model.vocab_size,
        "architecture": encode(model, config.Model),
    }


def from_json(json: Json) -> config.Model:
    require("architecture" in json, "config.json: model_type is jmoe, and there is no architecture")
    return decode(json["architecture"], config.Model, "architecture")


def loss_to_json(settings: config.Config) -> Json:
    """The coefficients of the training loss, as they stand in a run's config.json."""
    return {"loss": encode(settings.loss, config.Loss)}


def loss_from_json(json: Json, _: config.Model) -> config.Loss:
    return decode(json.get("loss", {}), config.Loss, "loss")
