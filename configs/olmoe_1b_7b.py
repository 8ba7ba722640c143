"""OLMoE-1B-7B (arXiv 2409.02060): 16 layers of 64 experts, of which every token passes 8; 4 M tokens a step.

Command:   python train.py configs/olmoe_1b_7b.py --data.sources.0.glob "texts/**/*.jsonl.zst"
Hardware:  128 chips of TPU v5p; checked without one: python -m jmoe.aot configs/olmoe_1b_7b.py --topology v5p:4x4x8
Expected:  fits: 11.5 of 95 GiB at the peak; a chip's step of 32,768 tokens compiles to 354 TFLOP,
           of the model 285. Not trained yet
"""

from jmoe.config import AdamW, Config, Cosine, Data, Files, LayerGroup, Loss, Mesh, Model, MoE, TokenizerFile, TopK


def config() -> Config:
    return Config(
        model=Model(
            vocab_size=50304,
            d_model=2048,
            num_heads=16,
            num_kv_heads=16,
            head_dim=128,
            norm_eps=1e-5,
            tie_embeddings=False,
            layers=(LayerGroup((MoE(num_experts=64, d_ff=1024, router=TopK(8, renormalise=False)),), repeats=16),),
        ),
        data=Data((Files("texts/**/*.jsonl.zst"),), tokenizer=TokenizerFile("tokenizer.json"), seq_len=4096),
        optim=AdamW(learning_rate=4e-4, schedule=Cosine(warmup_steps=2500)),
        loss=Loss(load_balance_loss=1e-2, router_z_loss=1e-3, dynamic_loss=0.0, z_loss=0.0),
        mesh=Mesh(data=4, fsdp=-1),
        steps=1_200_000,
        batch_size=1024,
        dtype="bfloat16",
        remat="full",
    )
