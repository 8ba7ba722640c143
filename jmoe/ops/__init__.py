"""Arrays in, arrays out: the kernels of the model, each beside a plain reference in the tests."""
