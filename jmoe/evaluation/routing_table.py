"""What the routers did, as a table of one state."""

from typing import Any

import numpy as np

COLUMNS = {
    "experts_per_token": ("experts/token", ".2f"),
    "identity_per_token": ("identity/token", ".2f"),
    "dropped_per_token": ("dropped/token", ".2g"),
    "load_max_over_mean": ("load max/mean", ".2f"),
    "load_cv": ("load CV", ".2f"),
    "dead_experts": ("dead experts", ".0f"),
    "router_entropy": ("entropy", ".2f"),
    "router_bias_range": ("bias range", ".2g"),
    "nucleus_p": ("p", ".3f"),
    "activated_expert_parameters": ("activated expert parameters", ",.0f"),
}
"""Heading and format of what the table tells, by its name in the log."""


def routing_table(routing: dict[str, Any]) -> str:
    """The routing of one state as lines of text: one per MoE layer, one for their mean, and one on what a token
    activates; "" without MoE layers.

    `routing` is what `jmoe.telemetry.describe_routing` tells. What no layer has, such as drops, has no column.
    """
    if "moe_layers" not in routing:
        return ""
    heads, cells = ["layer"], [[*map(str, routing["moe_layers"]), "mean"]]
    for name, (head, form) in COLUMNS.items():
        values = routing.get(f"{name}_by_layer", [])
        if not values or (name == "dropped_per_token" and not any(values)):
            continue
        told = ["-" if value is None else format(value, form) for value in values]
        if name == "dead_experts":
            told = [f"{dead} of {len(load)}" for dead, load in zip(told, routing["load_by_layer"], strict=True)]
            form = ".1f"
        heads.append(head)
        cells.append([*told, format(np.mean([value for value in values if value is not None]), form)])
    widths = [max(map(len, (head, *column))) for head, column in zip(heads, cells, strict=True)]
    lines = [
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        for line in (heads, *zip(*cells, strict=True))
    ]
    activated, parameters = routing["activated_parameters"], routing["parameters"]
    flops, most = routing["activated_flops_per_token"], routing["flops_per_token"]
    return "\n".join(
        [
            *lines,
            f"a token activates {activated:,.0f} of {parameters:,} parameters and {flops / 1e6:,.1f} of "
            f"{most / 1e6:,.1f} MFLOP, forward and backward",
        ]
    )
