"""What the documentation shows as code is valid."""

import re
from pathlib import Path

from jmoe import config, recipe

ROOT = Path(__file__).parents[1]


def test_the_layers_of_the_moe_page_make_a_model():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "moe.md").read_text(), re.S)
    names = {}
    exec(code, names)
    model = config.Model(layers=names["layers"])
    assert model.num_layers == 1 + 2 * 4 + 4 + 1 + 1
    assert recipe.from_dict(recipe.to_dict(config.Config(model=model))).model == model


def test_the_routers_of_the_moe_page_exist():
    text = (ROOT / "docs" / "moe.md").read_text()
    routers = re.findall(r"`((?:TopK|Nucleus)\(.*?\))`", text)
    assert len(routers) >= 6
    for router in routers:
        made = eval(router, vars(config))
        assert config.MoE(num_experts=64, router=made).slots >= 1
    coefficients = {name for name in vars(config.Loss()) if name not in ("z_loss", "chunk_tokens")}
    assert coefficients <= set(re.findall(r"`(\w+)`", text))
