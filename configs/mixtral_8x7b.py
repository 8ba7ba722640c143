"""The shape of Mixtral-8x7B (arXiv 2401.04088): 32 layers of 8 experts, of which every token passes 2.

Command:   python train.py configs/mixtral_8x7b.py --data.sources.0.glob "texts/**/*.jsonl.zst"
Hardware:  32 chips of TPU v5p; checked without one: python -m jmoe.aot configs/mixtral_8x7b.py --topology v5p:2x4x4
Expected:  fits: 29.7 of 95 GiB at the peak; a chip's step of 16,384 tokens compiles to 1,747 TFLOP,
           of the model 1,359. Not trained yet
"""

from jmoe.config import AdamW, Config, Cosine, Data, Files, LayerGroup, Loss, Mesh, Model, MoE, TokenizerFile, TopK


def config() -> Config:
    return Config(
        model=Model(
            vocab_size=32000,
            d_model=4096,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            qk_norm=False,
            rope_base=1e6,
            norm_eps=1e-5,
            tie_embeddings=False,
            layers=(LayerGroup((MoE(num_experts=8, d_ff=14336, router=TopK(2)),), repeats=32),),
        ),
        data=Data((Files("texts/**/*.jsonl.zst"),), tokenizer=TokenizerFile("tokenizer.json"), seq_len=4096),
        optim=AdamW(learning_rate=3e-4, schedule=Cosine(warmup_steps=2000)),
        loss=Loss(load_balance_loss=2e-2, dynamic_loss=0.0, z_loss=0.0),
        mesh=Mesh(fsdp=-1),
        steps=500_000,
        batch_size=128,
        dtype="bfloat16",
        remat="full",
    )
