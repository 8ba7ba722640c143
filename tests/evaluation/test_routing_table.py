"""The table tells the right figures, in the columns that the run has something for."""

from jmoe.evaluation.routing_table import routing_table

ROUTING = {
    "moe_layers": [1, 13],
    "experts_per_token_by_layer": [2.5, 1.25],
    "load_by_layer": [[0.25] * 4, [0.5, 0.5, 0.0, 0.0]],
    "load_cv_by_layer": [0.0, 1.0],
    "load_max_over_mean_by_layer": [1.0, 2.0],
    "dead_experts_by_layer": [0, 1],
    "dropped_per_token_by_layer": [0.0, 0.0],
    "router_entropy_by_layer": [2.0, 1.0],
    "activated_expert_parameters_by_layer": [12345.0, 2345.5],
    "activated_parameters": 23456.5,
    "parameters": 1234567,
    "activated_flops_per_token": 1.25e6,
    "flops_per_token": 2.5e9,
}


def test_the_table():
    assert routing_table(ROUTING).splitlines() == [
        "layer  experts/token  load max/mean  load CV  dead experts  entropy  activated expert parameters",
        "    1           2.50           1.00     0.00        0 of 4     2.00                       12,345",
        "   13           1.25           2.00     1.00        1 of 4     1.00                        2,346",
        " mean           1.88           1.50     0.50           0.5     1.50                        7,345",
        "a token activates 23,456 of 1,234,567 parameters and 1.2 of 2,500.0 MFLOP, forward and backward",
    ]
    assert routing_table({"loss": 1.0}) == ""


def test_what_some_layers_have_is_a_column():
    some = {"dropped_per_token_by_layer": [0.0, 0.25], "router_bias_range_by_layer": [0.0125, None]}
    lines = routing_table(ROUTING | some | {"nucleus_p_by_layer": [None, 0.375]}).splitlines()
    assert [line[20:35].strip() for line in lines[:4]] == ["dropped/token", "0", "0.25", "0.12"]
    assert "  entropy  bias range      p  activated" in lines[0]
    assert "2.00       0.013      -  " in lines[1] and "1.00           -  0.375  " in lines[2]


def test_what_is_not_finite_is_told_as_such():
    lines = routing_table(ROUTING | {"router_entropy_by_layer": [float("nan"), 1.0]}).splitlines()
    assert "     nan  " in lines[1]
