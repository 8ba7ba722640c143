"""About 112 B parameters: 128 fine-grained experts a layer beside a shared one (arXiv 2401.06066), chosen by a nucleus
whose threshold keeps tokens at 6 experts in the mean, and at most 8; the first layer is dense.

Command:   python train.py configs/nucleus_112b.py --data.sources.0.glob "texts/**/*.jsonl.zst"
Hardware:  256 chips of TPU v5p; checked without one: python -m jmoe.aot configs/nucleus_112b.py --topology v5p:4x8x8
Expected:  fits: 32.7 of 95 GiB at the peak; a chip's step of 8,192 tokens compiles to 882 TFLOP,
           of the model 624. Not trained yet
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
    router = Nucleus(p=0.3, max_slots=8, experts_per_token=6.0)
    experts = MoE(num_experts=128, d_ff=1408, router=router, shared_d_ff=2816)
    return Config(
        model=Model(
            vocab_size=128_000,
            d_model=4096,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            tie_embeddings=False,
            layers=(LayerGroup((Dense(11264),)), LayerGroup((experts,), repeats=48)),
        ),
        data=Data((Files("texts/**/*.jsonl.zst"),), tokenizer=TokenizerFile("tokenizer.json"), seq_len=4096),
        optim=AdamW(learning_rate=3e-4, schedule=Cosine(warmup_steps=2000)),
        loss=Loss(load_balance_loss=1e-2, dynamic_loss=1e-4),
        mesh=Mesh(data=4, fsdp=-1, expert=8),  # without expert a chip would gather all weights: 1.8 TB a step
        steps=500_000,
        batch_size=512,
        dtype="bfloat16",
        remat="full",
    )
