"""Models to other formats and back, from dense to sparse, and smaller: `python -m jmoe.convert COMMAND ...`.

    __main__.py    the commands, each a module with `main(argv)`
    exporting.py   export: a run to a folder that Hugging Face transformers reads
    importing.py   import: such a folder to a run
    upcycle.py     upcycle: a dense model to a mixture of experts
    mixture.py     how a dense feed-forward becomes experts
    prune.py       prune: experts left out
    merge.py       merge: several experts made one
    compress.py    what both share: which experts to keep, and the run with fewer
    calibration.py what the experts of a run do on calibration text
    held_out.py    how far a conversion is from what it was made of
    families.py    which Hugging Face family is which `config.Model` (huggingface/: their config.json and names)
    mapping.py     jmoe's parameters, stacked over layers and experts, as single tensors of other names and layout
    layers.py      the layers of a model one by one, and back into groups
    verify.py      what a Hugging Face folder computes, by NumPy alone, beside the run made of it
    shards.py      safetensors files, read and written tensor by tensor
    runs.py        the parameters of a run, read and written piece by piece
    pytorch/       the modelling file that goes with a model that no family represents

Neither PyTorch nor transformers is needed, and the whole model is in memory only where it is run, to measure it.
"""
