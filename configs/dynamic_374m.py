"""The model of nucleus routing's paper (arXiv 2403.07652): 24 layers, of which every second has 16 experts, p = 0.4.

Command:   python train.py configs/dynamic_374m.py --data.sources.0.glob "texts/**/*.jsonl.zst"
Hardware:  16 chips of TPU v5e; checked without one: python -m jmoe.aot configs/dynamic_374m.py --topology v5e:4x4
Expected:  fits: 6.1 of 16 GiB at the peak; a chip's step of 16,384 tokens compiles to 132 TFLOP,
           of the model 105. Not trained yet
"""

from jmoe.config import (
    AdamW,
    Config,
    Cosine,
    Data,
    Dense,
    Files,
    LayerGroup,
    Loss,
    Mesh,
    Model,
    MoE,
    Nucleus,
    TokenizerFile,
)


def config() -> Config:
    layers = (LayerGroup((Dense(2816), MoE(num_experts=16, d_ff=2816, router=Nucleus(p=0.4))), repeats=12),)
    return Config(
        model=Model(
            vocab_size=32000,
            d_model=1024,
            num_heads=16,
            num_kv_heads=16,
            head_dim=64,
            qk_norm=False,
            tie_embeddings=False,
            layers=layers,
        ),
        data=Data((Files("texts/**/*.jsonl.zst"),), tokenizer=TokenizerFile("tokenizer.json"), seq_len=2048),
        optim=AdamW(learning_rate=3e-4, schedule=Cosine(warmup_steps=2000)),
        loss=Loss(load_balance_loss=1e-2, dynamic_loss=1e-4),
        mesh=Mesh(fsdp=-1),
        steps=380_000,
        batch_size=128,
        dtype="bfloat16",
        remat="full",
    )
